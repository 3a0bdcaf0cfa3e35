"""Timing of loaders: each way to a batch, and what grows with the number of people."""

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import princeton_path
from benchmarks.made_people import first_shards, make_many
from benchmarks.timing import Case, Result, memory_mib, take_turns
from common.distributed import set_cpu_threads
from common.system import keep_freed_memory
from configs.skeleton import MPII
from pipelines import opencv_loader as opencv_crops
from pipelines.augment import PRESETS, Preset
from pipelines.codec import Codec
from pipelines.loader import LoaderName, LoaderSpec, dali_is_installed, make_batch, train_loader
from pipelines.shards import ShardSet


class Load(NamedTuple):
    """How batches are asked for."""

    people: int
    """A turn."""
    batch_size: int
    workers: int
    input_px: int
    device: torch.device

    @property
    def steps(self) -> int:
        """Batches a turn."""
        return max(1, self.people // self.batch_size)


PRINCETONS_DRAWS = PRESETS["princeton"]._replace(princeton_crop=False)
"""Its draws and its colour jitter, in one warp."""
SIZES = (1_000, 5_000, 25_204)
"""People of the scaling suite; the last is MPII, training and validation."""
START_UPS = 3
"""Of each size; the shortest is reported, for a busy machine lengthens the others."""


def loader_spec(loader: LoaderName, preset: Preset, load: Load, batch_size: int) -> LoaderSpec:
    """How a loader of this project makes its batches."""
    return LoaderSpec(
        loader=loader,
        device=load.device,
        preset=preset,
        input_px=load.input_px,
        batch_size=batch_size,
        workers=load.workers,
    )


def set_up_as_training(load: Load) -> None:
    """Memory and threads of this process as train.py has them."""
    keep_freed_memory()
    set_cpu_threads(load.device, load.workers)


def loader_cases(originals: ShardSet, crops: ShardSet, load: Load) -> list[Case]:
    """Augmented batches with heatmaps, on the device; first princeton-vl's steps, re-created."""
    set_up_as_training(load)
    way = f"dali on {load.device.type}"
    ways: list[tuple[str, ShardSet, Preset, LoaderName]] = [
        ("opencv, originals, princeton preset", originals, PRESETS["princeton"], "opencv"),
        ("opencv, originals, its draws, one warp", originals, PRINCETONS_DRAWS, "opencv"),
        ("opencv, crops, its draws, one warp", crops, PRINCETONS_DRAWS, "opencv"),
        ("opencv, originals, hrnet", originals, PRESETS["hrnet"], "opencv"),
        ("opencv, crops, hrnet", crops, PRESETS["hrnet"], "opencv"),
    ]
    if dali_is_installed():
        preset = PRESETS["princeton"]  # of configs/2hg.yaml and 8hg.yaml
        ways.append((f"{way}, originals, princeton preset", originals, preset, "dali"))
        ways.append((f"{way}, originals, hrnet", originals, PRESETS["hrnet"], "dali"))
        ways.append((f"{way}, crops, hrnet", crops, PRESETS["hrnet"], "dali"))
    return [
        princeton_case(originals, load),
        *(loader_case(name, shards, preset, which, load) for name, shards, preset, which in ways),
    ]


def princeton_case(originals: ShardSet, load: Load) -> Case:
    """The denominator: everything in the workers, then images and heatmaps to the device."""

    def start() -> Callable[[], object]:
        ready = princeton_path.princeton_batches(
            originals, load.input_px, load.batch_size, load.workers
        )
        return lambda: [tensor.to(load.device, non_blocking=True) for tensor in next(ready)]

    return _case("princeton-vl's steps, re-created", start, princeton_path.PREFETCH, load)


def loader_case(name: str, shards: ShardSet, preset: Preset, which: LoaderName, load: Load) -> Case:
    """Batches of a loader of this project, finished on the device."""
    codec = Codec(preset=preset, rule="exact", sigma=1.0, input_px=load.input_px, skeleton=MPII)

    def start() -> Callable[[], object]:
        loader = train_loader(shards, loader_spec(which, preset, load, load.batch_size))
        return lambda: make_batch(loader.next(), codec, load.device)

    return _case(name, start, opencv_crops.PREFETCH, load)


def _case(name: str, start: Callable[[], Callable[[], object]], prefetch: int, load: Load) -> Case:
    """start: makes a loader and returns what makes the next batch; each turn has its own."""
    running: list[Callable[[], object]] = []

    def prepare() -> None:
        running.append(start())
        for _ in range(prefetch * max(load.workers, 1) + 1):
            running[0]()

    def run() -> int:
        for _ in range(load.steps):
            running[0]()
        return load.steps * load.batch_size

    def finish() -> None:
        running.clear()
        # What is left to the collector could be collected in a worker process of another case.
        gc.collect()

    return Case(name, run, prepare, finish)


def scaling(
    folder: Path, load: Load, rounds: int, sizes: tuple[int, ...] = SIZES
) -> tuple[list[Result], list[dict[str, Any]]]:
    """Results a size, and a dict a size of start-up seconds and peak memory.

    Each size is started in a process of its own, so that memory is its own.
    """
    most = make_many(folder / "many", max(sizes))
    splits = {size: first_shards(most, folder / str(size), size) for size in sizes}
    context = multiprocessing.get_context("spawn")
    tries: list[list[dict[str, Any]]] = [[] for _ in splits]
    for _ in range(START_UPS):
        for split, found in zip(splits.values(), tries, strict=True):
            with ProcessPoolExecutor(1, context) as pool:
                how = multiprocessing.get_start_method()
                found.append(pool.submit(start_up, split.folder, load, how).result())
    facts = [
        {
            "people": found[0]["people"],
            "start_up_s": min(fact["start_up_s"] for fact in found),
            "peak_mib": max(fact["peak_mib"] for fact in found),
        }
        for found in tries
    ]
    set_up_as_training(load)
    cases = [
        loader_case(
            f"opencv, crops, {len(split):,} people", split, PRINCETONS_DRAWS, "opencv", load
        )
        for split in splits.values()
    ]
    return take_turns(cases, rounds, load.device), facts


def start_up(folder: Path, load: Load, start_method: str) -> dict[str, Any]:
    """Open a split, check its records and make batches; runs in a process of its own.

    start_method: of the loader's workers. A spawned process would spawn them, too.
    """
    multiprocessing.set_start_method(start_method, force=True)
    set_up_as_training(load)
    began = time.perf_counter()
    shards = ShardSet(folder)
    shards.records()
    loader = train_loader(shards, loader_spec("opencv", PRINCETONS_DRAWS, load, load.batch_size))
    codec = Codec(
        preset=PRINCETONS_DRAWS, rule="exact", sigma=1.0, input_px=load.input_px, skeleton=MPII
    )
    make_batch(loader.next(), codec, load.device)
    seconds, peak = time.perf_counter() - began, 0.0
    for _ in range(40):
        make_batch(loader.next(), codec, load.device)
        peak = max(peak, memory_mib())
    return {"people": len(shards), "start_up_s": seconds, "peak_mib": peak}


def scaling_table(facts: list[dict[str, Any]]) -> str:
    """Lines of what `scaling` found beside the rates."""
    lines = [
        "scaling: people, seconds from opening the shards to the first batch (least of "
        f"{START_UPS}), MiB at most"
    ]
    lines += [
        f"  {fact['people']:>7,}  {fact['start_up_s']:>6.2f} s  {fact['peak_mib']:>7.0f} MiB"
        for fact in facts
    ]
    return "\n".join(lines)
