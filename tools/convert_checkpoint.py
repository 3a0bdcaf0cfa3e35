"""Converts checkpoints between this project and princeton-vl/pytorch_stacked_hourglass."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

from common.cli import Parser
from common.errors import InputError, run_main
from model.checkpoint import load_checkpoint, save_checkpoint, to_princeton, write_archive


def main(argv: list[str] | None = None) -> None:
    """Read any format, write the one asked for. Raises InputError."""
    options = make_parser().parse_args(argv)
    if options.target.exists():
        raise InputError(options.target, "a file", "a new name", "give another name, or remove it")
    loaded = load_checkpoint(options.source)
    if options.to == "princeton":
        contents = to_princeton(loaded)
        write_archive(options.target, contents)
        has_optimizer = "optimizer" in contents
    else:
        save_checkpoint(options.target, loaded)
        has_optimizer = loaded.optimizer is not None
    which = "with" if has_optimizer else "without"
    print(f"wrote {options.target} ({options.to}), step {loaded.step:,}, {which} optimizer state")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Convert a checkpoint of any readable kind.",
        epilog="example: python tools/convert_checkpoint.py checkpoint.pt mine.pt --to native",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a checkpoint")
    parser.add_argument("target", metavar="OUT", type=Path, help="a new file")
    kinds = "native: this project's; princeton: princeton-vl/pytorch_stacked_hourglass's"
    parser.add_argument("--to", choices=("native", "princeton"), required=True, help=kinds)
    return parser


if __name__ == "__main__":
    run_main(main)
