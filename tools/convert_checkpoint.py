"""Converts checkpoints between this project and princeton-vl/pytorch_stacked_hourglass."""

import sys
from pathlib import Path

# `python tools/convert_checkpoint.py` puts tools/ on the path, and not the folder of the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from common.cli import Parser
from common.errors import InputError, run_main
from model import checkpoint


def main() -> None:
    """Read either format, write the one asked for. Raises InputError."""
    options = make_parser().parse_args()
    source, target = Path(options.source), Path(options.target)
    if target.exists():
        raise InputError(target, "a file", "a new name", "give another name, or remove the file")
    loaded = checkpoint.load_checkpoint(source)
    if options.to == "princeton":
        raw = checkpoint.to_princeton(loaded)
        checkpoint.write_archive(target, raw)
        what = "with" if "optimizer" in raw else "without"
    else:
        checkpoint.save_checkpoint(target, loaded)
        what = "with" if loaded.optimizer else "without"
    print(f"wrote {target} ({options.to}), step {loaded.step:,}, {what} the optimizer's state")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="convert_checkpoint.py",
        description="Converts a checkpoint, of whatever kind it is, to the kind that is asked for.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/convert_checkpoint.py checkpoint.pt mine.pt --to native",
    )
    parser.add_argument("source", metavar="IN", help="a checkpoint of either kind")
    parser.add_argument("target", metavar="OUT", help="the file to write, which must not exist yet")
    parser.add_argument(
        "--to",
        choices=("native", "princeton"),
        required=True,
        help="native: this project's; princeton: princeton-vl/pytorch_stacked_hourglass's",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
