"""Write one HTML file that shows where every head looks.

The file needs no network. It has a map of all heads, and shows their attention on each of your
examples. For examples without evidence it shows attention but no scores.

Examples:
    mmheads explore tiny-qwen3-vl-m examples.jsonl -o heads.html
"""

from __future__ import annotations

import argparse
from typing import Any

from mmheads import commands
from mmheads.commands import Outcome


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(subparsers, "explore", run, __doc__)
    commands.add_model(parser)
    commands.add_examples(parser)
    commands.add_out(parser, "file to write, by default <examples>.html here")
    commands.add_null_images(parser)
    parser.add_argument("--title", default="", help="heading of the HTML page")
    commands.add_flag(parser, "--gradients", "also show gate gradients; examples need answers")


def run(options: argparse.Namespace) -> Outcome:
    """Write the page."""
    from mmheads.example_files import read_examples
    from mmheads.explorer import checked_path, explore
    from mmheads.models import load

    examples = read_examples(options.examples)
    out = checked_path(options.out or f"{examples.path.stem}.html")
    page = explore(
        load(options.model, device=options.device),
        examples,
        out,
        null_images=options.null_images,
        gradients=options.gradients,
        title=options.title,
    )
    for text in page.notes:
        commands.note(f"warning: {text}")
    size = out.stat().st_size
    line = f"{out}: {len(examples)} examples, {size / 1e6:.1f} MB; open it in a browser"
    data = {"page": str(out), "examples": len(examples), "bytes": size, "notes": list(page.notes)}
    return Outcome(data, [line])
