"""Draws synthetic people in MPII's layout: annot/*.h5 and images/*.jpg."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import os

from common.cli import Parser, at_least
from common.errors import InputError, run_main
from common.files import read_json
from pipelines.synthetic import SIZES_WH, VERSION, draw_data_set


def main(argv: list[str] | None = None) -> None:
    """Draw both splits, unless they exist."""
    args = make_parser().parse_args(argv)
    options = {name: getattr(args, name) for name in ("seed", "train", "valid", "max_width")}
    options["version"] = VERSION
    record = args.output / "synthetic.json"
    found = read_json(record) if record.is_file() else "no synthetic.json in it"
    if not args.output.exists():
        draw_data_set(args.output, options, args.workers)
        print(f"{args.output}: {args.train} + {args.valid} people")
    elif found == options:
        print(f"{args.output}: already drawn with these options")
    else:
        next_step = f"name another --output, or delete {args.output}"
        raise InputError(args.output, f"{found}", f"{options}, or no such folder", next_step)
    sources = f"--annotations {args.output}/annot --images {args.output}/images"
    print(f"next: python tools/make_shards.py {sources} --output data/shards/synthetic")
    print("then: python train.py --config configs/demo.yaml (left and right differ: no mirroring)")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Draws a synthetic pose data set in MPII's layout, to try things without MPII.",
        epilog="example: python tools/make_synthetic.py --output data/synthetic --max-width 640",
    )
    # fmt: off
    add = parser.add_argument_group("what to draw").add_argument
    add("--train", type=at_least(1), default=1500,
        help="annotated people in annot/train.h5 (default: %(default)s)")
    add("--valid", type=at_least(1), default=300,
        help="annotated people in annot/valid.h5 (default: %(default)s)")
    add("--seed", type=at_least(0), default=0,
        help="random seed (default: %(default)s)")
    add("--max-width", type=at_least(min(SIZES_WH)[0]), default=1280,
        help="maximum width of a picture, px; 640 is faster (default: %(default)s)")
    add = parser.add_argument_group("where and how").add_argument
    add("--output", type=Path, required=True, help="folder to write, for example data/synthetic")
    add("--workers", type=at_least(1), default=os.cpu_count() or 1,
        help="processes; the output is the same with any number (default: %(default)s)")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_main(main)
