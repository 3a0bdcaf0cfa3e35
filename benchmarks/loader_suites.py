"""Benchmarks of the data path: loaders, and DALI's operators."""

import dataclasses
import gc
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args
from unittest import mock

import cv2
import numpy as np
import torch

from benchmarks.princeton_baseline import PREFETCH, princeton_batches
from benchmarks.timing import Case
from common.system import keep_freed_memory, usable_cores
from configs.schema import LoaderName, WorkerKind
from configs.skeleton import MPII
from pipelines import synthetic
from pipelines.augment import PRESETS, Preset
from pipelines.codec import Codec
from pipelines.crop_packing import crop_rule
from pipelines.loader import (
    Batch,
    LoaderSpec,
    RawBatch,
    TrainLoader,
    dali_is_installed,
    make_batch,
)
from pipelines.packing import PackingOptions, pack
from pipelines.shard_format import PICTURE_EXTENSIONS
from pipelines.shards import ShardSet

Start = Callable[[], Callable[[], object]]
"""Starts a loader; returns a function that makes its next batch, or does a step with it."""
PICTURES, SIZE_WH, TINY_WH = 32, (1280, 720), (320, 180)
"""Synthetic pictures; with more people than pictures, people share them."""
SMALL_WH = (240, 135)
"""Picture size with which people are as large as in Leeds Sports Pose Extended."""
SCALE_PERCENTILES = ((5, 25, 50, 75, 95), (1.43, 2.38, 3.45, 5.06, 8.58))
"""Percentiles, and the scales of MPII's h5 files at them."""
FAST_PEOPLE = 4096
"""Minimum number of people in a timed run of a loader on a GPU, or of `operators_group`."""
HRNET, PRINCETON = PRESETS["hrnet"], PRESETS["princeton"]
ONE_WARP = PRINCETON._replace(princeton_crop=False)
TIMED = {"princeton preset": PRINCETON, "its draws, one warp": ONE_WARP, "hrnet": HRNET}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the benchmarks."""

    device: torch.device
    folder: Path
    """Folder of shards: synthetic people in "original" and "crop", real people in "real"."""
    people: int = 320
    """Number of synthetic people, and of people in a timed run."""
    workers: int = 2
    worker_kind: WorkerKind = "threads"
    input_px: int = 256
    width: int = 256
    people_to_train: int = 40_000

    @property
    def loaders(self) -> dict[LoaderName, str]:
        """The installed loaders, and their names in reports."""
        dali: dict[LoaderName, str] = {"dali": f"dali on {self.device.type}"}
        return {"opencv": "opencv", **(dali if dali_is_installed() else {})}

    def shards(self, packing: str) -> ShardSet:
        """The synthetic people."""
        return ShardSet(self.folder / packing / "train")

    def loader_spec(self, loader: LoaderName, preset: Preset, batch_size: int) -> LoaderSpec:
        """Settings of a loader, as in training."""
        return LoaderSpec(
            loader=loader,
            device=self.device,
            preset=preset,
            input_px=self.input_px,
            batch_size=batch_size,
            workers=self.workers,
            worker_kind=self.worker_kind,
            jitter_in_workers=self.worker_kind == "threads" and self.device.type == "cpu",
        )


def make_data(folder: Path, people: int, size_wh: tuple[int, int] = SIZE_WH) -> None:
    """Draw annot/train.h5 and images/*.jpg; at 1280 x 720 px people are as large as MPII's."""
    rng, rows = np.random.default_rng(0), list[synthetic.Person]()
    (folder / "images").mkdir(parents=True)
    (folder / "annot").mkdir()
    scales = np.interp(100 * (np.arange(people) + 0.5) / people, *SCALE_PERCENTILES)
    for row, scale in enumerate((scales * size_wh[0] / SIZE_WH[0]).tolist()):
        if row < PICTURES:
            image, (person,) = synthetic.draw_scene(rng, 1, size_wh)
            # Sensor noise, for JPEGs of 500 kB as MPII's.
            image = (image + rng.normal(0, 9, image.shape)).clip(0, 255).astype(np.uint8)
            name = f"{row:09d}.jpg"
            cv2.imwrite(str(folder / "images" / name), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            person |= {"imgname": name.encode(), "index": float(row)}
        else:
            person = rows[row % PICTURES]
        ratio, center, part = scale / person["scale"], person["center"], person["part"]
        moved = np.where(part.any(1, keepdims=True), center + ratio * (part - center), 0.0)
        rows.append(person | {"scale": scale, "part": moved, "person": float(row)})
    synthetic.write_annotations(folder / "annot" / "train.h5", rows)


def make_shards(
    folder: Path,
    people: int,
    size_wh: tuple[int, int] = SIZE_WH,
    packings: Iterable[str] = ("original",),
) -> None:
    """Draw people in folder/made, and pack them in folder/PACKING."""
    make_data(folder / "made", people, size_wh)
    for packing in packings:
        pack_people(folder / "made", folder / packing, packing)


def pack_people(source: Path, output: Path, packing: str = "original") -> None:
    """Pack annot/*.h5 and images/ of a folder."""
    annotations, images = source / "annot", source / "images"
    splits = tuple(sorted(path.stem for path in annotations.glob("*.h5")))
    options = PackingOptions(annotations=annotations, images=images, output=output, splits=splits)
    if packing != "original":
        crop = crop_rule("hrnet", person_px=288, quality=95)
        options = dataclasses.replace(options, packing=packing, crop=crop)
    pack(options)


def act_as_training(options: Options) -> None:
    """Set malloc and threads as in training: one core is left for each worker."""
    keep_freed_memory()
    torch.set_num_threads(max(1, usable_cores() - options.workers))


def loader_group(options: Options, batch_size: int) -> list[Case]:
    """Augmented batches with heatmaps, on the device; the first case is princeton-vl's loader."""
    starts = princeton_start(options, batch_size)
    ways = product(options.loaders.items(), TIMED.items(), ("original", "crop"))
    for (loader, loader_name), (name, preset), packing in ways:
        if not (preset.princeton_crop and packing == "crop"):
            starts[f"{loader_name}, {packing}s, {name}"] = partial(
                start_loader, options, batch_size, options.shards(packing), preset, loader
            )
    people = FAST_PEOPLE if options.device.type == "cuda" else 0
    return stream_cases(starts, options, batch_size, people)


def princeton_start(options: Options, batch_size: int) -> dict[str, Start]:
    """princeton-vl's loader: workers do everything; images and heatmaps are moved to the device."""
    shards = options.shards("original")

    def start() -> Callable[[], object]:
        batches = princeton_batches(shards, options.input_px, batch_size, options.workers)
        return lambda: [tensor.to(options.device, non_blocking=True) for tensor in next(batches)]

    return {"princeton-vl's steps, re-created": start}


def start_loader(
    options: Options, batch_size: int, shards: ShardSet, preset: Preset, loader: LoaderName
) -> Callable[[], Batch]:
    """A loader of this project; returns a function that makes its next batch on the device."""
    batches = TrainLoader(shards, options.loader_spec(loader, preset, batch_size))
    codec = Codec(preset=preset, rule="exact", sigma=1.0, input_px=options.input_px, skeleton=MPII)
    return lambda: make_batch(batches.next(), codec, options.device)


def drain(step: Callable[[], object], workers: int) -> None:
    """Use up the prefetched batches."""
    for _ in range(PREFETCH * max(workers, 1) + 1):
        step()


def workers_group(options: Options, batch_size: int) -> list[Case]:
    """Threads and processes of the OpenCV loader for each packing; 1, 2 and 4 threads for crops.

    All use princeton's draws and colours in one warp. The first case is princeton-vl's loader.
    """
    starts = princeton_start(options, batch_size)
    ways = list(product(PICTURE_EXTENSIONS, get_args(WorkerKind), (options.workers,)))
    ways += [("crop", "threads", n) for n in (1, 2, 4) if n <= usable_cores()]
    for packing, kind, count in ways:
        chosen = dataclasses.replace(options, worker_kind=kind, workers=count)
        starts[f"{packing}, {count} {kind}"] = partial(
            start_loader, chosen, batch_size, chosen.shards(packing), ONE_WARP, "opencv"
        )
    return stream_cases(starts, options, batch_size)


def small_pictures_group(options: Options, batch_size: int) -> list[Case]:
    """As `workers_group`, for pictures as small as those of Leeds Sports Pose Extended."""
    small = dataclasses.replace(options, folder=options.folder / "small")
    make_shards(small.folder, small.people, SMALL_WH, PICTURE_EXTENSIONS)
    return workers_group(small, batch_size)


def stream_cases(
    starts: dict[str, Start], options: Options, batch_size: int, people: int = 0
) -> list[Case]:
    """Cases that time prefetching loaders, each by its name.

    people: at least so many in a timed run, and at least options.people.
    """
    act_as_training(options)
    steps = max(1, options.people // batch_size, people // batch_size)
    return [_stream_case(*named, steps, batch_size, options.workers) for named in starts.items()]


def _stream_case(name: str, start: Start, steps: int, batch_size: int, workers: int) -> Case:
    """The loader is started before each timed run, which begins after the prefetched batches."""
    running: list[Callable[[], object]] = []

    def prepare() -> None:
        running.append(start())
        drain(running[0], workers)

    def run() -> int:
        for _ in range(steps):
            running[0]()
        return steps * batch_size

    def finish() -> None:
        running.clear()
        gc.collect()  # otherwise its processes would end during another case

    return Case(name, run, prepare, finish)


def operators_group(options: Options, batch_size: int) -> list[Case]:
    """DALI's pictures, draws and affines on the CPU: neither decoded nor warped."""
    folder = options.folder / f"operators-{batch_size}"
    make_shards(folder, options.people, TINY_WH)
    options = dataclasses.replace(options, device=torch.device("cpu"), folder=folder)
    starts: dict[str, Start] = {
        name: partial(start_without_pictures, options, batch_size, PRESETS[name])
        for name in ("hrnet", "princeton")
    }
    return stream_cases(starts, options, batch_size, FAST_PEOPLE)


def start_without_pictures(
    options: Options, batch_size: int, preset: Preset
) -> Callable[[], RawBatch]:
    """DALI's loader without decoding and warping: it returns the affines in place of crops."""
    from pipelines import dali_loader

    fn, types = dali_loader.fn, dali_loader.types
    pixel = types.Constant(np.zeros((1, 1, 3), dtype=np.uint8))
    with (
        mock.patch.object(fn.decoders, "image", lambda jpeg, **_: pixel),
        mock.patch.object(fn, "slice", lambda image, **_: image),
        mock.patch.object(fn, "warp_affine", lambda image, *, matrix, **_: matrix),
    ):
        spec = options.loader_spec("dali", preset, batch_size)
        return TrainLoader(options.shards("original"), spec).next
