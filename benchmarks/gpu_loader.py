"""Loaders on a GPU, in at most nine minutes: python benchmarks/gpu_loader.py --out OUT

Pixels of DALI's decoders against OpenCV's, every loader against princeton-vl's steps, and a sweep
of DALI's settings, one after another, each with the best of those before. JSON and bars go to OUT.
"""

import sys
from pathlib import Path

# `python benchmarks/gpu_loader.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import gc
import tempfile
from typing import Any, NamedTuple

import numpy as np

from benchmarks.loading import Load, loader_cases
from benchmarks.made_people import make_crops, make_originals
from benchmarks.pieces import (
    Deadline,
    Piece,
    Report,
    add_common_options,
    require_device,
    run_pieces,
)
from benchmarks.timing import Case, Result, take_turns
from common.cli import Parser, at_least
from common.errors import run_main
from common.system import usable_cores
from pipelines.augment import PRESETS, Draw
from pipelines.loader import LoaderSpec, RawBatch, choose_loader
from pipelines.opencv_loader import crop_person, decode
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

HW_LOADS = (0.65, 0.0, 0.35, 1.0)
BATCHES = (64, 32, 128, 256)
PREFETCHES = (2, 1, 4)
CACHE_MB = 8_000
"""Holds all made crops, decoded."""
AXIS_SECONDS = 40.0
LOADERS_SECONDS = 165.0


class Setting(NamedTuple):
    """What the sweep varies."""

    threads: int
    hw_decoder_load: float = HW_LOADS[0]
    batch_size: int = BATCHES[0]
    prefetch: int = PREFETCHES[0]
    cache_mb: int = 0


def main() -> int:
    """Make data, measure, write."""
    options = make_parser().parse_args()
    device = require_device(options.device)
    choose_loader("dali", device)  # says how to install it
    deadline = Deadline(options.minutes)
    load = Load(options.turn, options.batch_size, options.workers, options.input_px, device)
    report: Report = {"options": vars(options)}
    with tempfile.TemporaryDirectory(prefix="gpu-loader-") as folder:
        print("making people ...", file=sys.stderr, flush=True)
        originals = make_originals(Path(folder) / "originals", options.people)
        crops = make_crops(Path(folder) / "crops", originals)
        packings = {"originals": originals, "crops": crops}
        pieces = pieces_of(packings, load, options.rounds)
        return run_pieces(pieces, report, Path(options.out) / "gpu_loader.json", device, deadline)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="gpu_loader.py",
        description="Times the loaders on a GPU and sweeps DALI's settings.",
        epilog="example: python benchmarks/gpu_loader.py --out runs/gpu",
    )
    add_common_options(parser, 8.5)
    # fmt: off
    add = parser.add_argument_group("how much").add_argument
    add("--people", type=at_least(2), default=1024,
        help="people in the made data (default: %(default)s)")
    add("--turn", type=at_least(1), default=4096, help="people a turn (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=64, help="of the loaders (default: %(default)s)")
    add("--workers", type=at_least(1), default=max(1, usable_cores() - 2),
        help="worker processes, or DALI's threads (default here: %(default)s)")
    add("--input-px", type=at_least(64), default=256, help="default: %(default)s")
    # fmt: on
    return parser


def pieces_of(packings: dict[str, ShardSet], load: Load, rounds: int) -> list[Piece]:
    """Everything that is measured, the most important first."""
    best = {name: Setting(threads=load.workers) for name in packings}
    originals, crops = packings["originals"], packings["crops"]
    pieces = [
        Piece("pixels", lambda: pixel_gaps(packings, load)),
        Piece(
            "loaders",
            lambda: take_turns(loader_cases(originals, crops, load), rounds, load.device),
            LOADERS_SECONDS,
        ),
    ]
    for packing in ("crops", "originals"):
        for axis, values in axes_of(packing, load).items():
            run = functools.partial(
                sweep, packings[packing], best, packing, axis, values, load, rounds
            )
            pieces.append(Piece(f"{packing}: {axis}", run, AXIS_SECONDS))
    pieces.append(Piece("best", lambda: {name: s._asdict() for name, s in best.items()}))
    return pieces


def axes_of(packing: str, load: Load) -> dict[str, list[Any]]:
    """The values of each setting, the default first; on a CPU what exists there."""
    gpu = load.device.type == "cuda"
    threads = dict.fromkeys([load.workers, max(1, load.workers // 2), max(1, load.workers // 4)])
    axes: dict[str, list[Any]] = {"threads": list(threads)}
    if gpu:
        axes["hw_decoder_load"] = list(HW_LOADS)
    axes |= {"batch_size": list(BATCHES), "prefetch": list(PREFETCHES)}
    if gpu and packing == "crops":
        axes["cache_mb"] = [0, CACHE_MB]
    return axes


def sweep(
    shards: ShardSet,
    best: dict[str, Setting],
    packing: str,
    axis: str,
    values: list[Any],
    load: Load,
    rounds: int,
) -> list[Result]:
    """Rates of DALI alone for each value of one setting; the fastest becomes `best` of it."""
    settings = [best[packing]._replace(**{axis: value}) for value in values]
    cases = [
        dali_case(f"{axis} {value}", shards, setting, load)
        for value, setting in zip(values, settings, strict=True)
    ]
    results = take_turns(cases, rounds, load.device)
    best[packing] = settings[int(np.argmax([result.median for result in results]))]
    return results


def dali_case(name: str, shards: ShardSet, setting: Setting, load: Load) -> Case:
    """Crops by DALI on the device, nothing behind it; each turn builds a pipeline of its own."""
    running: list[Any] = []
    steps = max(1, load.people // setting.batch_size)

    def prepare() -> None:
        from pipelines.dali_loader import DaliLoader

        spec = LoaderSpec(
            loader="dali",
            device=load.device,
            preset=PRESETS["hrnet"],
            input_px=load.input_px,
            batch_size=setting.batch_size,
            workers=setting.threads,
            cache_mb=setting.cache_mb,
        )
        running.append(
            DaliLoader(
                shards,
                spec,
                prefetch=setting.prefetch,
                hw_decoder_load=setting.hw_decoder_load,
            )
        )
        ahead = len(shards) // setting.batch_size + 1 if setting.cache_mb else 0
        for _ in range(setting.prefetch + 2 + ahead):
            running[0].next()

    def run() -> int:
        for _ in range(steps):
            running[0].next()
        return steps * setting.batch_size

    def finish() -> None:
        running.clear()
        gc.collect()

    return Case(name, run, prepare, finish)


def pixel_gaps(packings: dict[str, ShardSet], load: Load) -> list[dict[str, Any]]:
    """DALI's crops against OpenCV's with the same draws, by packing and decoder."""
    loads = (0.0, 1.0) if load.device.type == "cuda" else (0.0,)
    return [
        {"packing": name, "hw_decoder_load": share, **pixel_gap(shards, share, load)}
        for name, shards in packings.items()
        for share in loads
    ]


def pixel_gap(shards: ShardSet, hw_decoder_load: float, load: Load) -> dict[str, float]:
    """Grey levels of one batch: mean, 99.9th percentile and largest difference."""
    from pipelines.dali_loader import DaliLoader

    preset = PRESETS["hrnet"]
    people = min(load.batch_size, len(shards))
    spec = LoaderSpec(
        loader="dali",
        device=load.device,
        preset=preset,
        input_px=load.input_px,
        batch_size=people,
        workers=load.workers,
    )
    loader = DaliLoader(shards, spec, hw_decoder_load=hw_decoder_load)
    raw = RawBatch(*(tensor.cpu() for tensor in loader.next()))
    sample_of_row = {int(shards.record(sample)[0]): sample for sample in range(len(shards))}
    gaps = []
    for person in range(people):
        sample = sample_of_row[int(raw.records_NR[person, 0])]
        image = decode(shards.jpeg(sample), shards.where(sample))
        fields = unpack_records(shards.record(sample)[None])
        drawn = Draw(*raw.draws_ND[person].tolist())
        crop, _ = crop_person(image, fields, drawn, preset, load.input_px)
        gaps.append(np.abs(crop.astype(int) - raw.images_NHW3[person].numpy()))
    gap = np.stack(gaps)
    return {
        "people": float(people),
        "mean": float(gap.mean()),
        "percentile_99_9": float(np.percentile(gap, 99.9)),
        "largest": float(gap.max()),
    }


if __name__ == "__main__":
    run_main(main)
