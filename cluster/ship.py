"""Write the kept results of models as the shipped results of `data/results`.

python -m cluster.ship MODEL ... --machine "2 CPU cores"

Notebooks keep what they compute in `runs`; run them first, `reproduce.py --fresh` to compute all of
it again.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence

from cluster import real_documents
from mmheads import answers, causal, paths, scoring, store
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.retrieval import kept
from mmheads.tables import LEFT_OUT, read_table

KINDS = {"scores": scoring, "answers": answers, "effects": causal, "rankings": kept}
KINDS[real_documents.KIND] = real_documents
"""The module that computes each kind of results."""
SHORT = {"scores": scoring.SHORT, real_documents.KIND: real_documents.SHORT}
"""Arrays of a kind that are shipped in 16 bits."""
BRIEF = {name: scoring.SHORT[name] for name in ("raw", "null")}
BRIEF |= {name: LEFT_OUT for name in scoring.QUANTITIES if name not in BRIEF}
"""Scores of heads, without what is measured beside them."""


def ship(models: Sequence[str], machine: str, date: str, *, brief: bool = False) -> None:
    """Write the shipped files of models and their list, `data/results/README.md`.

    Args:
        models: Their names.
        machine: Where the results were computed.
        date: The day.
        brief: Of scores, ship only what the calibrated score is made of: `load_needle_scores`
            reads it, and `score_needles` computes everything again.

    Raises:
        ValueError: There are no kept and no shipped results of a model.
    """
    for model in models:
        written = []
        for kind, module in KINDS.items():
            now = Provenance(code=code_version(module.MODULES), versions=library_versions())
            short = BRIEF if brief and kind == "scores" else SHORT.get(kind, {})
            about = {"version": module.VERSION, "machine": machine, "date": date}
            written += store.ship(kind, model, now=now, short=short, **about)
        if not written:
            raise ValueError(f"there are no results of {model}; run the notebooks with it first")
        print(*(path.relative_to(paths.ROOT) for path in written), sep="\n")
    with paths.write_whole(store.SHIPPED / "README.md") as temporary:
        temporary.write_text(describe(), encoding="utf-8")


def describe() -> str:
    """Returns the list of all shipped files, in Markdown."""
    lines = [
        "# Shipped results",
        "",
        "Notebooks read these files and compute only what is missing; `reproduce.py --fresh`",
        "leaves them out. `python -m cluster.ship` wrote them and this list.",
        "",
        "| File | Model | Rows | CPU hours | Machine | Date |",
        "|---|---|---:|---:|---|---|",
    ]
    for path in sorted(store.SHIPPED.glob("*/*.parquet")):
        about, rows, _ = read_table(path)
        seconds = rows["cpu_seconds"].to_pylist()
        cells = (
            path.relative_to(store.SHIPPED),
            about["provenance"]["model"],
            f"{len(seconds):,}",
            f"{sum(seconds) / 3600:.2f}",
            about["machine"],
            about["date"],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name of a model")
    parser.add_argument("--machine", required=True, help='where they were computed: "1 x H100"')
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--date", default=today, help="default: today")
    about = "of scores, ship only what the calibrated score is made of (a fifth of the size)"
    parser.add_argument("--brief", action="store_true", help=about)
    options = parser.parse_args(arguments)
    try:
        ship(options.models, options.machine, options.date, brief=options.brief)
    except (ValueError, OSError) as error:
        print(f"cluster.ship: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
