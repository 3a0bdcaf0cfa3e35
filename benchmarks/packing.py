"""What packing crops costs and saves on real pictures: python benchmarks/packing.py --help

For each size of a stored person: bytes, packing speed, decoding time, and how far the network's
input is from that of the original pictures. A bilinear warp of an original that is shrunk aliases,
so both are also held against an area average: which is closer to the truth?
"""

import sys
from pathlib import Path

# `python benchmarks/packing.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import time
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from common.cli import Parser, at_least, progress
from common.errors import InputError, run_main
from common.system import keep_freed_memory
from configs.skeleton import Skeleton
from evaluation import pckh
from evaluation.inference import predict
from model import checkpoint
from pipelines import geometry
from pipelines.annotations import People, read_annotations
from pipelines.augment import PRESETS, Draw, draw, draw_rng
from pipelines.codec import codec_of
from pipelines.crop_packing import crop_jpeg, crop_region, crop_rule
from pipelines.loader import evaluation_batches
from pipelines.opencv_loader import LooseImages, crop_person, decode, image_from_stored
from pipelines.shard_format import record_of, unpack_records

Crop = npt.NDArray[np.uint8]


class Row(NamedTuple):
    """One packing of the people."""

    name: str
    kilobytes: float
    """Of a person's JPEG, mean."""
    pack_per_s: float
    """People a core packs in a second, without the tar; 0 for the originals."""
    decode_ms: float
    """CPU time of decoding and warping a person, mean."""
    to_warp_db: float
    """PSNR of the inputs to those warped from the originals."""
    to_area_db: float
    """PSNR of the inputs to area averages of the originals."""
    pck: float
    """Pooled, threshold 0.5; nan where no checkpoint was given."""


class Packed:
    """People with their pictures in memory, as a source of crops."""

    def __init__(self, jpegs: list[bytes], records: list[npt.NDArray[np.float64]]):
        self.jpegs, self.records = jpegs, records

    def __len__(self) -> int:
        return len(self.jpegs)

    def jpeg(self, sample: int) -> bytes:
        """The stored picture of one person."""
        return self.jpegs[sample]

    def record(self, sample: int) -> npt.NDArray[np.float64]:
        """(record_length,) of one person."""
        return self.records[sample]

    def where(self, sample: int) -> str:
        """For messages."""
        return f"person {sample}"


def main() -> None:
    """Pack in memory in each size, compare, print a table."""
    options = make_parser().parse_args()
    keep_freed_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    people, skeleton = read_annotations(Path(options.annotations), options.split)
    people = people.select(np.arange(min(people.count, options.people)))
    loose = LooseImages(people, Path(options.images))
    everybody = range(people.count)
    originals = Packed(
        [loose.jpeg(i) for i in everybody], [record_of(people, i, 0, 0) for i in everybody]
    )
    packings = {"original": (originals, 0.0)}
    for person_px in options.person_px:
        packings[f"crop, {person_px} px"] = pack(originals, people, options.reach, person_px)
    warped, areas = make_inputs(originals, options), area_inputs(originals, options)
    rows = []
    for name, (packed, speed) in progress(packings.items(), "comparing", "packings"):
        inputs = make_inputs(packed, options)
        pck = score(packed, people, skeleton, options.checkpoint)
        rows.append(
            Row(name, mean_kilobytes(packed), speed, decode_time(packed, options),
                psnr(inputs, warped), psnr(inputs, areas), pck)
        )  # fmt: skip
    print_table(rows, people, options)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="packing.py",
        description="Compares packings of the same people in size, speed, pixels and PCK.",
        epilog="example: python benchmarks/packing.py --annotations valid.h5 --images images",
    )
    # fmt: off
    add = parser.add_argument_group("whom to pack").add_argument
    add("--annotations", required=True, help="valid.h5, or a folder of it")
    add("--images", required=True, help="folder of the pictures")
    add("--split", choices=("train", "valid"), default="valid", help="default: %(default)s")
    add("--people", type=at_least(1), default=500, help="the first so many (default: %(default)s)")
    add = parser.add_argument_group("what to compare").add_argument
    add("--person-px", type=at_least(16), nargs="+", default=[192, 256, 288, 384],
        help="most px of a person's box (default: %(default)s)")
    add("--reach", choices=list(PRESETS), default="hrnet",
        help="preset that the crops are for, and whose draws are compared (default: %(default)s)")
    add("--input-px", type=at_least(64), default=256,
        help="side of the input, px (default: %(default)s)")
    add("--checkpoint", metavar="PATH", help="also the PCK of this network")
    # fmt: on
    return parser


def pack(originals: Packed, people: People, reach: str, person_px: int) -> tuple[Packed, float]:
    """The people as crops, and how many a core makes in a second of CPU time."""
    rule = crop_rule(reach, person_px, 95)
    jpegs, records, began = [], [], time.process_time()
    for row, jpeg in enumerate(originals.jpegs):
        height, width = decode(jpeg, people.images[row]).shape[:2]
        part = crop_region(people.center[row], people.scale[row], width, height, rule)
        jpegs.append(crop_jpeg(jpeg, part, rule.quality))
        records.append(record_of(people, row, part.width, part.height, part.image_from_stored))
    return Packed(jpegs, records), len(jpegs) / (time.process_time() - began)


def drawn_for(sample: int, options: argparse.Namespace) -> Draw:
    """The draw of a person, the same in every packing."""
    return draw(PRESETS[options.reach], draw_rng(0, 0, sample))


def make_inputs(packed: Packed, options: argparse.Namespace) -> list[Crop]:
    """Augmented inputs, as the OpenCV path makes them."""
    return [_input(packed, sample, options) for sample in range(len(packed))]


def _input(packed: Packed, sample: int, options: argparse.Namespace) -> Crop:
    image = decode(packed.jpeg(sample), packed.where(sample))
    record = unpack_records(packed.record(sample)[None])
    drawn = drawn_for(sample, options)
    return crop_person(image, record, drawn, PRESETS[options.reach], options.input_px)[0]


def area_inputs(packed: Packed, options: argparse.Namespace) -> list[Crop]:
    """The same inputs as means of the area that each pixel covers: warped finely, then averaged."""
    inputs = []
    for sample in range(len(packed)):
        image = decode(packed.jpeg(sample), packed.where(sample))
        record, drawn = unpack_records(packed.record(sample)[None]), drawn_for(sample, options)
        matrix = geometry.input_from_image(
            record.center_N2[0], float(record.scale_N[0]), options.input_px,
            drawn.scale, drawn.rotation_deg, bool(drawn.flip),
        )  # fmt: skip
        shrink = 1 / math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        fine = max(4, math.ceil(2 * shrink))
        shift = (fine - 1) / 2  # edge to edge: (x + 0.5) fine - 0.5
        fine_from_input = geometry.translation(shift, shift) @ geometry.scaling(fine, fine)
        warp = (fine_from_input @ matrix @ image_from_stored(record))[:2]
        side = fine * options.input_px
        large = cv2.cvtColor(cv2.warpAffine(image, warp, (side, side)), cv2.COLOR_BGR2RGB)
        size = (options.input_px, options.input_px)
        inputs.append(cv2.resize(large, size, interpolation=cv2.INTER_AREA))
    return inputs  # type: ignore[return-value]


def decode_time(packed: Packed, options: argparse.Namespace, rounds: int = 3) -> float:
    """CPU milliseconds a person, the least of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for sample in range(len(packed)):
            _input(packed, sample, options)
        times.append(time.process_time() - began)
    return 1e3 * min(times) / len(packed)


def mean_kilobytes(packed: Packed) -> float:
    """Mean size of a person's JPEG, kB."""
    return sum(map(len, packed.jpegs)) / len(packed) / 1e3


def psnr(inputs: list[Crop], references: list[Crop]) -> float:
    """Peak signal to noise over all pixels of all people, dB; infinite where they are equal."""
    squares = [
        np.square(a.astype(np.float64) - b).mean() for a, b in zip(inputs, references, strict=True)
    ]
    mean = float(np.mean(squares))
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def score(packed: Packed, people: People, skeleton: Skeleton, path: str | None) -> float:
    """Pooled PCK of a network on the packing. Raises InputError if its joints are others."""
    if path is None:
        return math.nan
    trained = checkpoint.load_checkpoint(Path(path))
    config = trained.config
    if not skeleton.same_joints(trained.skeleton) or config.data.preset == "princeton":
        raise InputError(
            path, "other joints, or princeton's crop", skeleton.name, "give another checkpoint"
        )
    codec = codec_of(config.data, config.heatmaps, skeleton)
    batches = evaluation_batches(
        packed, np.arange(len(packed)), codec, loader="opencv", device=torch.device("cpu"),
        batch_size=config.eval.batch_size, workers=0,
    )  # fmt: skip
    found = predict(
        checkpoint.evaluation_network(trained), batches, codec,
        flip=config.eval.flip, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    return pckh.score(pckh.normalized_errors(found.keypoints_NJ2, people), skeleton, 0.5).pooled


def print_table(rows: list[Row], people: People, options: argparse.Namespace) -> None:
    """A line a packing."""
    box = np.percentile(200 * people.scale, [5, 50, 95]).round().astype(int)
    print(f"\n{people.count} people of {options.annotations}, boxes of {box[0]} to {box[2]} px "
          f"(median {box[1]}), input {options.input_px} px, draws of {options.reach}")  # fmt: skip
    columns = ["kB", "packed/s", "ms", "dB to warp", "dB to area", "PCK@0.5"]
    print(f"{'':16}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        values = [f"{row.kilobytes:.1f}", f"{row.pack_per_s:.0f}" if row.pack_per_s else "-",
                  f"{row.decode_ms:.2f}", f"{row.to_warp_db:.2f}", f"{row.to_area_db:.2f}",
                  "-" if math.isnan(row.pck) else f"{100 * row.pck:.2f}"]  # fmt: skip
        print(f"{row.name:16}" + "".join(f"{value:>12}" for value in values))
    print(
        "kB: a person's JPEG. packed/s: people a core (decode, shrink, encode). ms: CPU time to "
        "decode and warp.\ndB: PSNR of the inputs to a warp from the original, and to an area "
        "average of it."
    )


if __name__ == "__main__":
    run_main(main)
