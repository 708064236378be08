"""Train the tiny models and measure them: `python -m mmheads.zoo --help`."""

import argparse
import sys

from mmheads.zoo import card, train
from mmheads.zoo.recipes import RECIPES


def main() -> int:
    """Run one command; bad settings are reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m mmheads.zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train a model by its recipe, or go on with it")
    one.add_argument("name", help=", ".join(RECIPES))
    one.add_argument("--out", default="", help="where the checkpoint goes")
    one.add_argument("--work", default="", help="where saves and the log go")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--stop-after", default="", metavar="STAGE")
    one.add_argument("--shipped", default="", metavar="FOLDER", help="a checkpoint to go on from")
    two = commands.add_parser("report", help="measure accuracy and attention, write the card")
    two.add_argument("folder", nargs="+", help="data/models/<name>")
    two.add_argument("--haystacks", type=int, default=10, help="examples a depth")
    args = parser.parse_args()
    try:
        if args.command == "train":
            settings = (args.out, args.work, args.threads, args.stop_after, args.shipped)
            print(train.train(args.name, *settings))
        else:
            for folder in args.folder:
                print(card.write(folder, args.haystacks))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
