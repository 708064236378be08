"""Score the heads of a model on your own examples.

A head's score is its attention to the evidence, minus its attention to it from a question that says
nothing. The command writes all scores, their means and a heat map, and prints the heads with the
highest scores. L8H10 is layer 8, head 10, both counted from 0.

Examples:
    mmheads score tiny-qwen3-vl-m examples.jsonl
    mmheads score Qwen/Qwen3-VL-2B-Instruct examples.jsonl --json | jq .heads
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmheads import commands, paths
from mmheads.commands import Outcome


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(subparsers, "score", run, __doc__)
    commands.add_model(parser)
    commands.add_examples(parser)
    commands.add_out(parser, "folder of the results, by default runs/scores")
    commands.add_null_images(parser)
    commands.add_fraction(parser, "to print")


def run(options: argparse.Namespace) -> Outcome:
    """Score the examples and write the files."""
    from mmheads.example_files import read_examples
    from mmheads.models import load
    from mmheads.provenance import hash_json
    from mmheads.scoring import score_heads
    from mmheads.store import kept_folder

    examples = read_examples(options.examples)
    for line, has_evidence in zip(examples.lines, examples.has_evidence, strict=True):
        if not has_evidence:
            raise ValueError(
                f"{examples.path}, line {line}: the example has no evidence; heads are scored by "
                "their attention to evidence"
            )
    folder = paths.writable(kept_folder("scores", options.out))
    vlm = load(options.model, device=options.device)
    # Files of one name in different folders, and models of one name, keep their own results.
    mark = hash_json([str(examples.path.resolve()), vlm.revision])[:6]
    stem = f"{Path(vlm.model_id).name}-{examples.path.name.removesuffix('.jsonl')}-{mark}"
    scores = score_heads(vlm, examples, folder=folder, null_images=options.null_images)
    files = {kind: folder / f"{stem}.{kind}" for kind in ("parquet", "csv", "json", "png")}
    scores.save(files["parquet"])
    with paths.write_whole(files["csv"]) as path:
        scores.to_frame().to_csv(path, index=False)
    with paths.write_whole(files["json"]) as path:
        path.write_text(json.dumps(scores.to_released_json()), encoding="utf-8")
    title = f"{scores.provenance.model}, n = {len(scores.values)}"
    commands.write_picture(commands.heat_maps(title, {"": scores}), files["png"])
    top = scores.top(options.fraction)
    lines = [f"{head!s:>8}  {scores.mean[head]:+.4f}" for head in top]
    lines.append(f"{len(examples)} examples; {folder / stem}.parquet, .csv, .json, .png")
    data = {
        "model": vlm.model_id,
        "revision": vlm.revision,
        "examples": len(examples),
        "heads": commands.listed(top),
        "files": {kind: str(path) for kind, path in files.items()},
    }
    return Outcome(data, lines)
