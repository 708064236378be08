"""Train the tiny models and measure them: `python -m tiny_models --help`."""

import argparse
import sys

from tiny_models import card, train
from tiny_models.recipes import RECIPES


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; bad settings are reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m tiny_models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train a model by its recipe, or go on with it")
    one.add_argument("name", help=", ".join(RECIPES))
    one.add_argument("--out", default="", help="where the checkpoint goes")
    one.add_argument("--work", default="", help="where saves and the log go")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--stop-after", default="", metavar="STAGE")
    one.add_argument(
        "--go-on-from", default="", metavar="FOLDER", help="a checkpoint to go on from"
    )
    two = commands.add_parser("report", help="measure a checkpoint and write its card")
    two.add_argument("name", help=", ".join(RECIPES))
    two.add_argument("--folder", default="", help="where its checkpoint is")
    two.add_argument("--haystacks", type=int, default=20, help="examples per depth")
    two.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    try:
        if args.command == "report":
            folder = args.folder or train.CHECKPOINTS / args.name
            recipe = RECIPES.get(args.name)
            start, seed = (recipe.start, recipe.seed) if recipe else ("", 0)
            predecessor = train.CHECKPOINTS / start if start else ""
            twin = train.CHECKPOINTS / args.name.removesuffix(f"-seed{seed}") if seed else ""
            print(card.report(folder, predecessor, twin, args.haystacks, args.threads))
            return 0
        settings = (args.out, args.work, args.threads, args.stop_after, args.go_on_from)
        print(train.train(args.name, *settings))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
