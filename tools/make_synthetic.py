"""Draws a synthetic pose data set in MPII's own layout: annot/*.h5 and images/*.jpg.

The same options give the same bytes, whatever the number of workers.
"""

import sys
from pathlib import Path

# `python tools/make_synthetic.py` puts tools/ on the path, and not the folder that holds configs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Generator
from contextlib import closing
from multiprocessing.pool import Pool
from typing import NamedTuple

import cv2
import h5py
import numpy as np

from common.cli import Parser, progress
from common.errors import InputError, run_main
from tools.synthetic_scenes import SIZES_WH, Row, draw_scene

VERSION = 1
"""Goes up whenever the same options draw other pictures."""

SPLITS = ("train", "valid")
JPEG_QUALITY = 90
PEOPLE_PER_PICTURE = {1: 0.72, 2: 0.21, 3: 0.07}
"""How many annotated people a picture has, and how often."""


class Picture(NamedTuple):
    """One picture to draw. split: index in SPLITS."""

    folder: Path
    seed: int
    split: int
    number: int
    annotated: int
    max_width_px: int

    @property
    def name(self) -> str:
        """File name of 13 characters, like MPII's; no name stands in both splits."""
        return f"{self.split}{self.number:08d}.jpg"


def main() -> None:
    """Draw both splits into a temporary folder, and give it its name when it is whole."""
    args = make_parser().parse_args()
    check_arguments(args)
    options = {"version": VERSION, "seed": args.seed, "train": args.train, "valid": args.valid}
    options["max_width_px"] = args.max_width
    if already_drawn(args.output, options):
        print(f"{args.output}: already drawn with these options")
    else:
        draw_data_set(args.output, options, args.workers)
        pictures = len(list((args.output / "images").iterdir()))
        print(f"{args.output}: {args.train} + {args.valid} people in {pictures} pictures")
    print(
        f"next: python tools/make_shards.py --annotations {args.output}/annot"
        f" --images {args.output}/images --output data/shards/synthetic"
    )
    print("then: python train.py --config configs/demo.yaml (their sides differ: no mirroring)")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="make_synthetic.py",
        description="Draws a synthetic pose data set in MPII's layout, to try things without MPII.",
        epilog="example: python tools/make_synthetic.py --output data/synthetic --max-width 640."
        " Right limbs are red and left ones blue, so train on it without mirrored pictures.",
    )
    # fmt: off
    add = parser.add_argument_group("what to draw").add_argument
    add("--train", type=int, default=1500,
        help="annotated people in annot/train.h5 (default: %(default)s)")
    add("--valid", type=int, default=300,
        help="annotated people in annot/valid.h5 (default: %(default)s)")
    add("--seed", type=int, default=0,
        help="whole number; others draw other pictures (default: %(default)s)")
    add("--max-width", type=int, default=1280,
        help="no pictures wider than this, px; 640 for speed (default: %(default)s)")
    add = parser.add_argument_group("where and how").add_argument
    add("--output", type=Path, required=True, help="folder to write, data/synthetic say")
    add("--workers", type=int, default=os.cpu_count() or 1,
        help="processes; they change no byte (default: %(default)s)")
    # fmt: on
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for the first option out of its range."""
    narrowest = min(width for width, _ in SIZES_WH)
    ranges = (
        ("--train", args.train, 1, 10**7),
        ("--valid", args.valid, 1, 10**7),
        ("--seed", args.seed, 0, 2**32 - 1),
        ("--max-width", args.max_width, narrowest, 10**5),
        ("--workers", args.workers, 1, 1024),
    )
    for option, value, low, high in ranges:
        if not low <= value <= high:
            raise InputError(
                option, str(value), f"a whole number from {low} to {high}", f"give another {option}"
            )


def already_drawn(output: Path, options: dict[str, int]) -> bool:
    """Whether output is whole and of these options. Raise InputError if it holds anything else."""
    if not output.exists():
        return False
    try:
        found = json.loads((output / "synthetic.json").read_text())
    except (OSError, ValueError):
        found = "something that this program did not write"
    if found == options:
        return True
    raise InputError(
        output,
        f"{found}",
        f"{options}, or no such folder",
        f"name another --output, or delete {output}",
    )


def draw_data_set(output: Path, options: dict[str, int], workers: int) -> None:
    """Draw everything beside output, and rename it to output at the end."""
    temporary = output.with_name(f"{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "images").mkdir(parents=True)
        (temporary / "annot").mkdir()
        for split, name in enumerate(SPLITS):
            pictures = plan_pictures(temporary, options, split)
            with closing(draw_all(pictures, workers)) as drawn:
                rows = list(progress(drawn, f"drawing {name}", "pictures", len(pictures)))
            write_annotations(temporary / "annot" / f"{name}.h5", pictures, rows)
        (temporary / "synthetic.json").write_text(json.dumps(options, indent=2) + "\n")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_pictures(folder: Path, options: dict[str, int], split: int) -> list[Picture]:
    """Pictures with as many annotated people in all as the options ask for."""
    # Four numbers, where a picture's stream has three: the plan shares its stream with no picture.
    rng = np.random.default_rng([options["seed"], split, 0, 1])
    people, shares = list(PEOPLE_PER_PICTURE), list(PEOPLE_PER_PICTURE.values())
    pictures: list[Picture] = []
    left = options[SPLITS[split]]
    while left:
        annotated = min(int(rng.choice(people, p=shares)), left)
        number, width = len(pictures), options["max_width_px"]
        pictures.append(Picture(folder, options["seed"], split, number, annotated, width))
        left -= annotated
    return pictures


def draw_all(pictures: list[Picture], workers: int) -> Generator[list[Row]]:
    """The rows of each picture, in order; pictures are written on the way."""
    if workers == 1:
        yield from map(draw_picture, pictures)
        return
    with _deaf_pool(workers) as pool:
        yield from pool.imap(draw_picture, pictures, chunksize=4)


def _deaf_pool(workers: int) -> Pool:
    """Processes that leave Ctrl-C, which they inherit to ignore, to this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (1,))
    finally:
        signal.signal(signal.SIGINT, before)


def draw_picture(picture: Picture) -> list[Row]:
    """Draw and write one picture. Its rows depend on seed, split and number only."""
    rng = np.random.default_rng([picture.seed, picture.split, picture.number])
    image_HWC, rows = draw_scene(rng, picture.annotated, picture.max_width_px)
    ok, jpeg = cv2.imencode(".jpg", image_HWC, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert ok, f"OpenCV did not encode {picture.name}"
    (picture.folder / "images" / picture.name).write_bytes(jpeg.tobytes())
    return rows


def write_annotations(path: Path, pictures: list[Picture], rows: list[list[Row]]) -> None:
    """One h5 file with the keys and types of MPII's valid.h5. rows: those of each picture."""
    flat = [
        (picture, person, row)
        for picture, of_picture in zip(pictures, rows, strict=True)
        for person, row in enumerate(of_picture)
    ]
    columns = {
        "center": np.array([row.center for _, _, row in flat]),
        "imgname": np.array([picture.name.encode() for picture, _, _ in flat], "S13"),
        "index": np.array([picture.number for picture, _, _ in flat], np.float64),
        "normalize": np.array([row.normalize for _, _, row in flat]),
        "part": np.array([row.part for _, _, row in flat]),
        "person": np.array([person for _, person, _ in flat], np.float64),
        "scale": np.array([row.scale for _, _, row in flat]),
        "torsoangle": np.array([row.torsoangle for _, _, row in flat]),
        "visible": np.array([row.visible for _, _, row in flat]),
    }
    with h5py.File(path, "w") as file:
        file.attrs["name"] = "synthetic"
        for key, values in columns.items():
            # With times the same data would be other bytes a second later.
            file.create_dataset(key, data=values, track_times=False)


if __name__ == "__main__":
    run_main(main)
