"""Times loaders, heatmaps and the training step: python benchmarks/throughput.py

Prints a table for each, then everything as one JSON line. The data are made here: 1280 x 720
pictures with people as large as in MPII.
"""

import sys
from pathlib import Path

# `python benchmarks/throughput.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configs.interrupt  # noqa: F401 - before the slow imports

# isort: split
import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.evaluation import decode_cases, evaluate_cases
from benchmarks.timing import Case, Result, table, take_turns, world
from configs.errors import InputError, run_main
from configs.mpii import MPII
from configs.options import Parser, at_least
from model.hourglass import StackedHourglass
from model.loss import stack_losses
from pipelines import batches, heatmaps, opencv_crops
from pipelines.annotations import People
from pipelines.augment import PRESETS, Preset
from pipelines.batches import Target
from pipelines.shards import (
    Manifest,
    ShardSet,
    describe,
    pack_record,
    write_manifest,
    write_shard,
)
from training import runtime

SUITES = ("loader", "heatmaps", "train", "decode", "evaluate")
WIDTH, HEIGHT = 1280, 720
# h5 scale of MPII's people: percentiles 5, 25, 50, 75, 95.
SCALE_PERCENTILES = ((5, 25, 50, 75, 95), (1.43, 2.38, 3.45, 5.06, 8.58))


def main() -> None:
    """Run the suites that were asked for."""
    options = make_parser().parse_args()
    if options.people < options.batch_size:
        raise InputError(
            "command line",
            f"batch {options.batch_size}, {options.people} people",
            "at least a batch of people",
            "raise --people, or lower --batch-size",
        )
    device = runtime.choose_device(options.device)
    found: dict[str, list[Result]] = {}
    for suite in options.suites:
        print(f"timing {suite} ...", file=sys.stderr, flush=True)
        results = run_suite(suite, options, device)
        print(table(f"{suite} ({device})", "people", results), end="\n\n", flush=True)
        found[suite] = results
    if device.type == "cpu":
        print("not measured: everything on a GPU (no CUDA device is in use)\n")
    report: dict[str, Any] = {"world": world(device), "options": vars(options)}
    report |= {suite: [r._asdict() for r in results] for suite, results in found.items()}
    line = json.dumps(report)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(line + "\n")
    print(line)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="throughput.py",
        description="Times loaders, heatmaps and the training step of this machine.",
        epilog="example: python benchmarks/throughput.py --suites loader --workers 2",
    )
    # fmt: off
    add = parser.add_argument_group("what to time").add_argument
    add("--suites", nargs="+", choices=SUITES, default=list(SUITES), help="default: all of them")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="auto: a GPU where there is one (default: %(default)s)")
    add("--people", type=at_least(1), default=96,
        help="people in the made data (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=16, help="people a batch (default: %(default)s)")
    add("--workers", type=at_least(0), default=2,
        help="worker processes, or DALI's threads (default: %(default)s)")
    add("--input-px", type=at_least(64), default=256,
        help="side of the input, px (default: %(default)s)")
    add = parser.add_argument_group("how often, and what to write").add_argument
    add("--rounds", type=at_least(1), default=5,
        help="turns that each case takes (default: %(default)s)")
    add("--json", metavar="OUT", help="also write the JSON line to this file")
    # fmt: on
    return parser


def run_suite(suite: str, options: argparse.Namespace, device: torch.device) -> list[Result]:
    """The results of one suite."""
    if suite == "heatmaps":
        cases = heatmap_cases(options.batch_size, device)
        return take_turns(cases, options.rounds, device)
    if suite == "train":
        return take_turns(train_cases(options, device), options.rounds, device)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        shards = make_shards(Path(folder), options.people)
        if suite == "decode":
            return take_turns(decode_cases(shards, device), options.rounds, device)
        if suite == "evaluate":
            cases = evaluate_cases(shards, options.workers, device)
            return take_turns(cases, options.rounds, device)
        return take_turns(loader_cases(shards, options, device), options.rounds, device)


def make_shards(folder: Path, people: int) -> ShardSet:
    """A split of people in 1280 x 720 JPEGs of about 200 kB, one picture a person."""
    rng = np.random.default_rng(0)
    crowd = make_people(people, rng)
    jpegs = [make_jpeg(rng) for _ in range(min(people, 32))]

    def samples() -> Iterator[tuple[str, bytes, bytes, bytes]]:
        for row in range(people):
            record = pack_record(crowd, row, WIDTH, HEIGHT).tobytes()
            facts = describe(crowd, row, MPII, WIDTH, HEIGHT)
            yield f"{row:09d}", record, jpegs[row % len(jpegs)], facts

    shard = write_shard(folder, 0, samples())
    manifest = Manifest(
        split="train", packing="original", people=people, joints=MPII.joint_count, skeleton=MPII,
        shards=(shard,), max_width=WIDTH, max_height=HEIGHT, source={"made by": "benchmark"},
        seed=0,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return ShardSet(folder)


def make_people(count: int, rng: np.random.Generator) -> People:
    """People at random places, their scales spread as in MPII."""
    percent, scales = SCALE_PERCENTILES
    scale = np.interp(rng.uniform(5, 95, count), percent, scales)
    center = rng.uniform([0.3 * WIDTH, 0.4 * HEIGHT], [0.7 * WIDTH, 0.6 * HEIGHT], (count, 2))
    offsets = rng.uniform(-0.4, 0.4, (count, MPII.joint_count, 2)) * 200 * scale[:, None, None]
    marked = np.ones((count, MPII.joint_count), dtype=bool)
    number = np.arange(count)
    return People(
        images=tuple(f"{i:09d}.jpg" for i in number), index=number, person=np.zeros_like(number),
        center=center, scale=scale, normalize=20 * scale, joints=center[:, None] + offsets,
        marked=marked, visible=marked,
    )  # fmt: skip


def make_jpeg(rng: np.random.Generator) -> bytes:
    """A picture with detail at every size, as photographs have."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for level in range(1, 8):
        size = (WIDTH >> level, HEIGHT >> level)
        noise = rng.normal(0, 12 * level**0.5, (size[1], size[0], 3)).astype(np.float32)
        image += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    ok, jpeg = cv2.imencode(".jpg", (image + 128).clip(0, 255).astype(np.uint8))
    assert ok
    return jpeg.tobytes()


def loader_cases(shards: ShardSet, options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Augmented batches with heatmaps, on the device. First comes princeton's way in OpenCV."""
    ways: list[tuple[str, Preset, batches.LoaderName]] = [
        ("opencv, princeton's two resamplings", PRESETS["princeton"], "opencv"),
        ("opencv, one warp, same colour", _one_warp(PRESETS["princeton"]), "opencv"),
        ("opencv, one warp, hrnet", PRESETS["hrnet"], "opencv"),
    ]
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        ways.append((f"dali on {device.type}, hrnet", PRESETS["hrnet"], "dali"))
    else:
        print("not measured: DALI (pip install nvidia-dali-cuda120, on Linux)", file=sys.stderr)
    cases = []
    for name, preset, way in ways:
        loader = batches.train_loader(
            shards, preset, loader=way, device=device, input_px=options.input_px,
            batch_size=options.batch_size, workers=options.workers, shuffle_buffer=1024, seed=0,
            rank=0, ranks=1, first_step=0, state=b"",
        )  # fmt: skip
        target = Target(preset, "exact", 1.0, options.input_px, MPII)
        cases.append(_loader_case(name, loader, target, device, options))
    return cases


def _one_warp(preset: Preset) -> Preset:
    return preset._replace(princeton_crop=False)


def _loader_case(
    name: str,
    loader: batches.Loader,
    target: Target,
    device: torch.device,
    options: argparse.Namespace,
) -> Case:
    count = max(1, options.people // options.batch_size)
    ahead = opencv_crops.PREFETCH * max(options.workers, 1)

    def use_up() -> None:
        for _ in range(ahead):
            loader.next()

    def run() -> int:
        for _ in range(count):
            batches.finish(loader.next(), target, device)
        return count * options.batch_size

    return Case(name, run, use_up)


def heatmap_cases(batch_size: int, device: torch.device) -> list[Case]:
    """Targets of a batch: a loop over joints in numpy, and the batched routine."""
    rng = np.random.default_rng(0)
    joints = rng.uniform(-5, 69, (batch_size, MPII.joint_count, 2))
    on_device = torch.from_numpy(joints).float().to(device)
    drawn = torch.ones(joints.shape[:2], device=device)
    repeats = 20 if device.type == "cpu" else 500

    def loop() -> int:
        for person in joints:
            render_by_loop(person)
        return batch_size

    def batched(rule: heatmaps.Rule, sigma: float) -> int:
        for _ in range(repeats):
            heatmaps.render(on_device, drawn, 64, rule, sigma)
        return repeats * batch_size

    return [
        Case("numpy, a loop over joints (princeton)", loop),
        Case(f"torch on {device.type}, princeton", lambda: batched("princeton", 1.0)),
        Case(f"torch on {device.type}, exact", lambda: batched("exact", 1.0)),
    ]


def render_by_loop(joints_J2: np.ndarray) -> np.ndarray:
    """(J, 64, 64) targets of one person as loaders make them: a pasted 9 x 9 Gaussian a joint."""
    y, x = np.mgrid[-4:5, -4:5]
    stamp = np.exp(-(x**2 + y**2) / 2)
    maps = np.zeros((len(joints_J2), 64, 64), dtype=np.float32)
    for target, (px, py) in zip(maps, joints_J2.astype(int), strict=True):
        if 0 <= px < 64 and 0 <= py < 64:
            left, top = max(0, px - 4), max(0, py - 4)
            right, bottom = min(64, px + 5), min(64, py + 5)
            target[top:bottom, left:right] = stamp[
                top - py + 4 : bottom - py + 4, left - px + 4 : right - px + 4
            ]
    return maps


def train_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Forward, loss, backward and optimizer of 2 stacks; first float32 in torch's own layout."""
    size = options.batch_size if device.type == "cuda" else min(options.batch_size, 2)
    best = runtime.choose_dtype("auto", device)
    ways = [("float32, NCHW", torch.float32, torch.contiguous_format),
            ("float32, channels-last", torch.float32, torch.channels_last)]  # fmt: skip
    if best != torch.float32:
        name = str(best).removeprefix("torch.")
        ways.append((f"{name}, channels-last, fused Adam", best, torch.channels_last))
    return [
        Case(
            f"2 stacks, batch {size}, {name}", _step(options.input_px, size, dtype, layout, device)
        )
        for name, dtype, layout in ways
    ]


def _step(
    input_px: int, size: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Any:
    network = StackedHourglass(2, 256, MPII.joint_count).to(device)
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=dtype != torch.float32)
    images = torch.rand(size, 3, input_px, input_px, device=device)
    images = images.contiguous(memory_format=layout)
    target = torch.rand(size, MPII.joint_count, input_px // 4, input_px // 4, device=device)
    drawn = torch.ones(size, MPII.joint_count, device=device)
    repeats = 1 if device.type == "cpu" else 10

    def run() -> int:
        for _ in range(repeats):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                heat = network(images)
            stack_losses(heat, target, drawn, "empty").mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return repeats * size

    return run


if __name__ == "__main__":
    run_main(main)
