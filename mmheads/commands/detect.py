"""Find the retrieval heads of a model, without any data of yours.

Needles are hidden in texts and on pages, and heads are scored by their attention to them, until
the two halves of the haystacks agree about the strongest heads. The command says beforehand how
long this takes, and goes on where it was interrupted. It writes the scores, a heat map, and a list
of the heads, which `rank` and `ablate` take; but no list if the halves agree no better than by
chance.

Examples:
    mmheads detect tiny-qwen3-vl-m
    mmheads detect Qwen/Qwen3-VL-2B-Instruct --tasks text,image --lengths 1024,4096
    mmheads detect my-model --from my-documents --json > summary.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmheads import commands, paths
from mmheads.commands import Outcome

if TYPE_CHECKING:
    from mmheads.detection import Detection


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(subparsers, "detect", run, __doc__)
    commands.add_model(parser)
    parser.add_argument(
        "--from",
        dest="folder",
        default="",
        metavar="FOLDER",
        help="your texts, PDF files and images, in which needles are hidden in place of the "
        "shipped corpus",
    )
    parser.add_argument(
        "--tasks",
        type=_names,
        default=(),
        help="one or several of text, image, rendered_text and identical_image, with commas "
        "between them; by default all that the model can read",
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=(),
        help="lengths of the prompts in tokens, with commas between them (default: 1024)",
    )
    commands.add_number(parser, "--haystacks", 20, "largest number of haystacks per task", low=4)
    commands.add_fraction(parser, "that each task selects")
    commands.add_out(parser, "folder of the results, by default runs/detect")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(map(commands.number(int, 1), _names(text)))


def run(options: argparse.Namespace) -> Outcome:
    """Search for heads and write what is found."""
    from mmheads.detection import LEAST, detect, search_for
    from mmheads.models import load
    from mmheads.store import kept_folder

    folder = paths.writable(kept_folder("detect", options.out))
    vlm = load(options.model, device=options.device)
    search = search_for(
        vlm,
        options.folder,
        tasks=options.tasks,
        lengths=options.lengths,
        haystacks=options.haystacks,
        fraction=options.fraction,
    )
    commands.note(
        f"{vlm} on {vlm.device.type}: tasks {', '.join(search.tasks)}; needles "
        f"{search.needles.name}; {', '.join(map(str, search.lengths))} tokens; "
        f"{len(search.needles.depths)} depths; {LEAST} to {search.haystacks} haystacks per task"
    )
    least, most = search.seconds(vlm)
    commands.note(
        f"this takes about {commands.duration(least)} if the top heads are soon stable, and at "
        f"most about {commands.duration(most)}; if interrupted, it goes on from there"
    )
    found = detect(vlm, search, folder=options.out and folder / "scores")
    stem = f"{Path(vlm.model_id).name}-{search.needles.name}"
    files = {kind: folder / f"{stem}.{kind}" for kind in ("parquet", "png", "json")}
    found.scores.save(files["parquet"])
    maps = {task: found.scores.select(task=task) for task in search.tasks}
    title = f"{vlm}: dots mark the heads of the list"
    commands.write_picture(commands.heat_maps(title, maps, found.heads), files["png"])
    if len(found.heads):
        found.heads.save(files["json"])
    else:
        files.pop("json").unlink(missing_ok=True)  # that of an earlier run
    data = {
        "model": vlm.model_id,
        "revision": vlm.revision,
        "needles": search.needles.name,
        "lengths": list(search.lengths),
        "tasks": commands.records(found.table),
        "heads": commands.listed(found.heads),
        "files": {kind: str(path) for kind, path in files.items()},
    }
    code = 0 if len(found.heads) else commands.NOTHING_FOUND
    return Outcome(data, [*_lines(found), " ".join(map(str, files.values()))], code)


def _lines(found: Detection) -> list[str]:
    """What is printed: the agreement of each task, then the heads."""
    lines = []
    for row in found.table.to_dict("records"):
        lines.append(
            f"{row['task']}: halves of {row['haystacks']} haystacks share {row['shared']} of their "
            f"{row['heads']} top heads (by chance {row['chance']:.1f}; p = {row['p_holm']:.2g}); "
            + (f"{row['found']} heads" if row["found"] else "no heads")
            + ("" if row["stable"] or not row["found"] else ", not stable yet")
        )
    if not len(found.heads):
        lines.append("no heads were found: the halves agree no better than by chance")
    lines += [f"{head!s:>8}  {found.heads.scores[head]:+.4f}" for head in found.heads]
    return lines
