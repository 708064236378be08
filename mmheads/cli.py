"""The commands of mmheads: `python -m mmheads score` and `python -m mmheads rank`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mmheads import examples as example_files
from mmheads import figures, paths
from mmheads.heads import head_count
from mmheads.models import load
from mmheads.provenance import hash_json
from mmheads.retrieval.index import WINDOW, DocumentIndex, question_parts
from mmheads.scores import HeadScores, union_of_top
from mmheads.scoring import score_heads
from mmheads.store import kept_folder
from mmheads.tasks.documents import DPI, pdf


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 after an error in one sentence."""
    parser = argparse.ArgumentParser(prog="mmheads", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_score(commands)
    _add_rank(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was computed is kept", file=sys.stderr)
        return 130
    return 0


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    score = commands.add_parser("score", help="score the heads of a model on your own examples")
    score.add_argument("--model", required=True, help="folder, or name on the hub")
    score.add_argument("--examples", required=True, help="a .jsonl file, or a folder with one")
    score.add_argument("--out", default="", help="folder of the results, default runs/scores")
    score.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    score.add_argument("--fraction", type=float, default=0.05, help="share of heads to list")
    score.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    head_count(options.fraction, 1)  # a wrong fraction is an error before the work
    examples = example_files.read(options.examples)
    vlm = load(options.model, device=options.device)
    folder = kept_folder("scores", options.out)
    file = Path(options.examples).resolve()
    mark = hash_json([str(file), vlm.revision])[:6]  # other folders, names alike, other weights
    stem = f"{Path(vlm.model_id).name}-{file.name.removesuffix('.jsonl')}-{mark}"
    scores = score_heads(vlm, examples, folder=folder)
    scores.save(folder / f"{stem}.parquet")
    with paths.write_whole(folder / f"{stem}.csv") as path:
        scores.to_frame().to_csv(path, index=False)
    with paths.write_whole(folder / f"{stem}.json") as path:
        path.write_text(json.dumps(scores.to_released_json()), encoding="utf-8")
    with paths.write_whole(folder / f"{stem}.png") as path:
        _heat_map(scores).savefig(path)
    for head in scores.top(options.fraction):
        print(f"{head!s:>8}  {scores.mean[head]:+.4f}")
    print(f"{len(examples)} examples; {folder / stem}.parquet, .csv, .json, .png")


def _heat_map(scores: HeadScores) -> Figure:
    figure = Figure(figsize=(figures.COLUMN, figures.COLUMN), dpi=200, layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"{scores.provenance.model}, n = {len(scores.values)}")
    image = figures.heat_map(axis, scores.mean)
    figure.colorbar(image, label="calibrated retrieval score")
    return figure


def _add_rank(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rank = commands.add_parser("rank", help="rank the pages of a PDF file for a question")
    rank.add_argument("pdf", help="the document")
    rank.add_argument("--model", required=True, help="folder, or name on the hub")
    rank.add_argument("--heads", required=True, help="scores of its heads, made by `score`")
    rank.add_argument("--question", required=True)
    rank.add_argument("--fraction", type=float, default=0.05, help="share of heads per task")
    rank.add_argument("--window", type=int, default=WINDOW, help="pages per forward pass")
    rank.add_argument("--dpi", type=int, default=DPI, help="resolution of the pages")
    rank.add_argument("--top", type=int, default=5, help="pages to print")
    rank.add_argument("--out", default="", help="picture, default <document>.rank.png here")
    rank.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    rank.set_defaults(run=_rank)


def _rank(options: argparse.Namespace) -> None:
    question_parts(options.question)
    document = pdf(options.pdf, dpi=options.dpi)
    images = [page.image for page in document.pages]
    heads = union_of_top(HeadScores.load(options.heads), options.fraction)
    vlm = load(options.model, device=options.device)
    index = DocumentIndex(vlm, heads, images, window=options.window, progress=True)
    ranking = index.rank(options.question)
    for row in ranking.table().head(options.top).to_dict("records"):
        print(f"{row['rank']:>4}  page {row['candidate'] + 1:<5} {row['score']:+.5f}")
    print(f"{len(heads)} heads of {vlm}; {len(images)} pages in windows of {ranking.window}")
    out = Path(options.out or f"{Path(options.pdf).stem}.rank.png")
    with paths.write_whole(out) as path:
        ranking.picture(images).savefig(path)
    print(out)
