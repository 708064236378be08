"""Find the attention heads that fetch evidence, and use them.

Examples:
    mmheads detect tiny-qwen3-vl-m
    mmheads rank report.pdf --model Qwen/Qwen3-VL-8B-Instruct --question "What was the total?"
    mmheads score tiny-qwen3-vl-m examples.jsonl
    mmheads ablate tiny-qwen3-vl-m tiny-qwen3-vl-m examples.jsonl
    mmheads explore tiny-qwen3-vl-m examples.jsonl -o heads.html

Exit codes:
    0 done; 1 an error, in one sentence on standard error; 2 wrong options;
    3 no heads found (detect); 130 interrupted
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence

from mmheads.commands import Outcome, ablate, detect, explore, help_of, note, rank, score


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Everything that can be checked without the model is checked before the model is loaded. Results
    go to standard output, as text or as one JSON object; all else goes to standard error.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="mmheads", **help_of(__doc__))
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (detect, rank, score, ablate, explore):
        command.add(subparsers)
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            outcome: Outcome = options.run(options)
            print(json.dumps(outcome.data) if options.json else "\n".join(outcome.lines))
            sys.stdout.flush()
            return outcome.code
    except BrokenPipeError:  # The reader of a pipe has gone, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, MemoryError) as error:
        note(_sentence(error))
        return 1
    except KeyboardInterrupt:
        note("interrupted; what was computed is kept (rank: with --index; explore: not); repeat it")
        return 130
    return 0


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"warning: {message}")


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory; give a smaller --window or --dpi, or a shorter example"
    return " ".join(str(error).split()) or type(error).__name__
