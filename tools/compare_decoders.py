"""Compares JPEG decoders with each other, in pixels and in PCKh."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import functools
import io
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from common.cli import Parser, at_least, progress
from common.errors import InputError, run_main
from evaluation import pckh
from evaluation.dataset import split_to_evaluate
from evaluation.inference import predict
from model.checkpoint import evaluation_network, load_checkpoint
from pipelines.codec import codec_of
from pipelines.loader import dali_is_installed, evaluation_batches
from pipelines.opencv_loader import decode
from pipelines.shards import ShardSet

CPU = torch.device("cpu")
Picture = npt.NDArray[np.uint8]
Decoder = Callable[[list[bytes]], list[Picture]]
"""JPEGs -> RGB pictures (H, W, 3)."""


class Difference(NamedTuple):
    """How two decoders differ over all pictures. Units are grey levels of 0..255."""

    pixels: float  # share of pixels with a difference in any channel
    total: int  # sum of absolute differences
    rms: float
    largest: int


def main(argv: list[str] | None = None) -> None:
    """Decode all pictures with every installed decoder, compare, print. Raises InputError."""
    options = make_parser().parse_args(argv)
    decoders, missing = find_decoders()
    for name, reason in missing.items():
        print(f"not compared: {name} ({reason})")
    shards = ShardSet(split_to_evaluate(Path(options.shards))) if options.shards else None
    jpegs = read_jpegs(options, shards)
    pictures = {name: decode_all(name, decoder, jpegs) for name, decoder in decoders.items()}
    print(f"\n{len(jpegs)} pictures, {sum(p.size // 3 for p in pictures['opencv']):,} pixels\n")
    print(f"{'':24}{'pixels that differ':>20}{'sum':>14}{'RMS':>10}{'largest':>10}")
    for a, b in itertools.combinations(decoders, 2):
        d = compare(pictures[a], pictures[b])
        print(f"{a + ' - ' + b:24}{d.pixels:>20.4%}{d.total:>14,}{d.rms:>10.4f}{d.largest:>10}")
    if shards and options.checkpoint:
        print_pckh(Path(options.checkpoint), shards, jpegs, pictures)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="compare_decoders.py",
        description="Compare OpenCV, Pillow and DALI (on a GPU: nvJPEG) as JPEG decoders.",
        epilog="example: python tools/compare_decoders.py --shards data/shards/lspet/valid",
    )
    what = parser.add_argument_group("what to decode, one of the two")
    what.add_argument("--images", metavar="DIR", help="folder of .jpg files")
    what.add_argument("--shards", metavar="DIR", help="a split made by tools/make_shards.py")
    how = parser.add_argument_group("how much")
    how.add_argument("--checkpoint", metavar="PATH", help="also compare PCKh; with --shards")
    most = "maximum number of pictures, without --checkpoint (default: %(default)s)"
    how.add_argument("--most", type=at_least(1), default=500, help=most)
    return parser


def read_jpegs(options: argparse.Namespace, shards: ShardSet | None) -> list[bytes]:
    """Different pictures of the folder or of the shards, in order. Raises InputError."""
    if bool(options.images) == bool(options.shards) or (options.checkpoint and not shards):
        raise InputError(
            "command line",
            "no pictures, two sources, or --checkpoint without --shards",
            "--images or --shards",
            "give one of the two",
        )
    if shards is not None and shards.is_raw:
        raise InputError(shards.folder, "raw pictures", "JPEGs", "give shards of another packing")
    if shards is not None:
        jpegs = [shards.jpeg(sample) for sample in range(len(shards))]
    else:
        jpegs = [path.read_bytes() for path in sorted(Path(options.images).glob("*.jpg"))]
    if not jpegs:
        raise InputError(options.images, "no .jpg in this folder", "pictures", "give another")
    # A checkpoint needs the pictures of all people.
    most = None if options.checkpoint else options.most
    return list(dict.fromkeys(jpegs))[:most]


def find_decoders() -> tuple[dict[str, Decoder], dict[str, str]]:
    """The installed decoders, OpenCV first, and why others are missing."""
    decoders: dict[str, Decoder] = {
        "opencv": lambda jpegs: [decode(jpeg, "picture")[..., ::-1] for jpeg in jpegs],
        "pillow": lambda jpegs: [
            np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs
        ],
    }
    if not dali_is_installed():
        advice = "pip install nvidia-dali-cuda120, on Linux"
        return decoders, {"dali cpu": advice, "nvjpeg": advice}
    from pipelines.dali_loader import decode_pictures

    decoders["dali cpu"] = functools.partial(decode_pictures, device=CPU)
    if not torch.cuda.is_available():
        return decoders, {"nvjpeg": "no CUDA device"}
    decoders["nvjpeg"] = functools.partial(decode_pictures, device=torch.device("cuda"))
    return decoders, {}


def decode_all(name: str, decoder: Decoder, jpegs: list[bytes]) -> list[Picture]:
    """All pictures by one decoder, a few at a time, with progress."""
    starts = progress(range(0, len(jpegs), 32), f"decoding ({name})", "batches")
    return [picture for start in starts for picture in decoder(jpegs[start : start + 32])]


def compare(first: list[Picture], second: list[Picture]) -> Difference:
    """Differences over all pictures, which must have the same sizes."""
    pixels = differing = total = squares = largest = 0
    for a, b in zip(first, second, strict=True):
        difference = np.abs(a.astype(np.int64) - b)
        pixels += difference.shape[0] * difference.shape[1]
        differing += int(difference.any(axis=2).sum())
        total += int(difference.sum())
        squares += int(np.square(difference).sum())
        largest = max(largest, int(difference.max()))
    return Difference(differing / pixels, total, (squares / (3 * pixels)) ** 0.5, largest)


def print_pckh(
    path: Path, shards: ShardSet, jpegs: list[bytes], pictures: dict[str, list[Picture]]
) -> None:
    """Print PCKh of the same people with each decoder."""
    checkpoint = load_checkpoint(path)
    config, network = checkpoint.config, evaluation_network(checkpoint)
    skeleton = shards.manifest.skeleton
    codec = codec_of(config.data, config.heatmaps, skeleton)
    people, samples = shards.people()
    print(f"\n{f'{skeleton.metric} of {path}':40}{'@0.5':>10}{'@0.1':>10}  (pooled, %)")
    for name, decoded in pictures.items():
        bgr = {jpeg: picture[..., ::-1] for jpeg, picture in zip(jpegs, decoded, strict=True)}
        batches = evaluation_batches(
            shards,
            samples,
            codec,
            loader="opencv",
            device=CPU,
            batch_size=config.eval.batch_size,
            workers=0,
            decoder=lambda jpeg, where, bgr=bgr: np.ascontiguousarray(bgr[jpeg]),  # type: ignore[misc]
        )
        bar = progress(batches, f"predicting ({name})", "batches")
        flip = config.eval.flip
        found = predict(network, bar, codec, flip=flip, device=CPU, dtype=torch.float32)
        errors = pckh.normalized_errors(found.keypoints_NJ2, people)
        half, tenth = (100 * pckh.score(errors, skeleton, t).pooled for t in (0.5, 0.1))
        print(f"{name:40}{half:>10.3f}{tenth:>10.3f}")


if __name__ == "__main__":
    run_main(main)
