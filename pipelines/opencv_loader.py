"""Crops people with OpenCV: the reference, and the loader on a CPU.

Also defines Source, LoaderSpec and RawBatch, which both loaders use. All randomness is in a Draw,
so cropping is a pure function.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from common.errors import InputError
from common.system import usable_cores
from configs.schema import LoaderName, WorkerKind
from pipelines import geometry, princeton
from pipelines.annotations import People, stays_inside
from pipelines.augment import (
    PRESETS,
    Draw,
    Preset,
    color_by_opencv,
    draw_batch,
    draw_rng,
)
from pipelines.i420 import Planes, planes_of, warp_to_rgb
from pipelines.jpeg import BadSamplesError, decode
from pipelines.object_storage import StorageError
from pipelines.shard_cache import Key, ReadAhead
from pipelines.shard_format import COLUMNS, Records, record_of, unpack_records
from pipelines.shards import ShardSet, read_ahead
from pipelines.workers import THREADS_AHEAD, in_processes, in_threads

_FOUR_CHANNELS_UP_TO = 400_000
"""Largest picture, in pixels, to which a fourth channel is added. It makes the warp faster, but in
larger pictures the copy takes longer than it saves."""


class RawBatch(NamedTuple):
    """What both loaders return: crops before colour jitter, and how each was made."""

    images_NHW3: torch.Tensor  # RGB in 0..255: uint8, or float32 for princeton's crop
    input_from_image_N23: torch.Tensor  # float32 affine of the pixels, image px -> input px
    draws_ND: torch.Tensor  # float32, columns in the order of augment.Draw
    records_NR: torch.Tensor  # pipelines/shard_format.py; float32, or float64 of loose pictures


class JitteredBatch(RawBatch):
    """Crops as the network takes them: float32 RGB in 0..1 with jittered colours."""


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """How a training loader makes its batches."""

    loader: LoaderName
    device: torch.device
    preset: Preset
    input_px: int
    batch_size: int  # people per rank and step
    workers: int  # of OpenCV; CPU threads of DALI
    worker_kind: WorkerKind = "threads"  # of OpenCV's workers
    jitter_in_workers: bool = False  # OpenCV returns JitteredBatches
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shard_window: int = 0  # shards whose people are mixed; 0: all


class Source(Protocol):
    """People with pictures, numbered from 0."""

    is_raw: bool
    """Whether the pictures are raw (pipelines/i420.py)."""

    def picture(self, sample: int) -> bytes:
        """The stored picture of one person. Raises InputError if it cannot be read."""

    def record(self, sample: int) -> npt.NDArray[np.floating]:
        """(record_length,) of one person."""

    def where(self, sample: int) -> str:
        """The name of a sample in messages."""


class LooseImages:
    """People of an annotation file with their pictures in a folder."""

    is_raw = False

    def __init__(self, people: People, folder: Path):
        """Check that every picture is in the folder. Raises InputError."""
        self.people, self.folder = people, Path(folder)
        names = sorted(set(people.images))
        missing = [name for name in names if not (self.folder / name).is_file()]
        outside = [name for name in names if not stays_inside(self.folder, name)]
        if missing or outside:
            reason, bad = ("missing", missing) if missing else ("outside by a link", outside)
            found = f"{len(bad)} of {len(names)} pictures {reason}, first {self.folder / bad[0]}"
            expected = "the pictures that the annotation file names"
            raise InputError(self.folder, found, expected, "give their folder with --images")

    def picture(self, sample: int) -> bytes:
        """The bytes of one person's picture file. Raises InputError."""
        path = self.folder / self.people.images[sample]
        try:
            return path.read_bytes()
        except OSError as error:
            found = f"not readable ({error.strerror})"
            raise InputError(path, found, "a readable JPEG", "restore the file") from error

    def record(self, sample: int) -> npt.NDArray[np.float64]:
        """The record, with 0 x 0 as the picture's size, because nothing is decoded here."""
        return record_of(self.people, sample, 0, 0)

    def where(self, sample: int) -> str:
        """The path of one person's picture, for messages."""
        return str(self.folder / self.people.images[sample])


def crop_person(
    image: npt.NDArray[np.uint8] | Planes,
    record: Records,
    drawn: Draw,
    preset: Preset,
    input_px: int,
) -> tuple[npt.NDArray, npt.NDArray[np.float32]]:
    """Crop one person: (input_px, input_px, 3) RGB in 0..255 and the (2, 3) affine applied.

    image: (H, W, 3) BGR, or a raw picture. record: fields of one person, with a leading axis of 1.
    The crop is uint8 after one warp, or float32 after the two of princeton's rules. Without
    augmentation, as in evaluation and prediction, a picture that would be shrunk more than twice is
    halved first.
    """
    matrix = crop_affines(record, drawn, preset, input_px)
    warp = matrix @ image_from_stored(record)
    crop = _crop_pixels(image, record, warp[0], drawn, preset, input_px)
    return crop, matrix[0, :2].astype(np.float32)


def crop_affines(records: Records, drawn: Draw, preset: Preset, input_px: int) -> geometry.Matrix:
    """(N, 3, 3) affines of the crops, image px -> input px. drawn: fields (N,), or numbers."""
    center_N2, scale_N = records.center_N2.astype(np.float64), records.scale_N.astype(np.float64)
    if preset.princeton_crop:
        return princeton.input_from_image(center_N2, scale_N, drawn, input_px)
    return geometry.input_from_image(center_N2, scale_N, input_px, *drawn[:3])


def _crop_pixels(
    image: npt.NDArray[np.uint8] | Planes,
    record: Records,
    warp: geometry.Matrix,
    drawn: Draw,
    preset: Preset,
    input_px: int,
) -> npt.NDArray:
    """The crop of `crop_person`. warp: affine, stored px -> input px."""
    if preset.princeton_crop:
        assert not isinstance(image, Planes), "require_preset_fits refuses it"
        center = record.center_N2[0].astype(np.float64)
        crop = princeton.crop(image, center, float(record.scale_N[0]), input_px)
        # As in its test code, there is no second resampling without augmentation.
        if drawn != Draw():
            crop = princeton.augment(crop, drawn)
        return crop[..., ::-1].astype(np.float32)
    if isinstance(image, Planes):
        return warp_to_rgb(image, warp, input_px)
    if halves_large_pictures(preset):
        image, warp = _halved(image, warp)
    return _warp_to_rgb(image, warp[:2], input_px)


def halves_large_pictures(preset: Preset) -> bool:
    """Whether pictures that are shrunk more than twice are averaged first: without augmentation.

    Raw pictures are never averaged, because they are stored at about the input's size.
    """
    return preset == PRESETS["none"]


def _halved(
    image_HW3: npt.NDArray[np.uint8], input_from_stored: geometry.Matrix
) -> tuple[npt.NDArray[np.uint8], geometry.Matrix]:
    """The picture halved as `geometry.halvings` says, and the affine input_from_half.

    Bilinear sampling at half the size is the mean of 2 x 2 pixels.
    """
    for _ in range(int(geometry.halvings(input_from_stored))):
        height, width = image_HW3.shape[:2]
        half = cv2.resize(image_HW3, (max(1, width // 2), max(1, height // 2)))
        image_HW3 = np.asarray(half, np.uint8)
        input_from_stored = input_from_stored @ geometry.stored_from_half(width, height)
    return image_HW3, input_from_stored


def _warp_to_rgb(
    image_HW3: npt.NDArray[np.uint8], input_from_stored: geometry.Matrix, input_px: int
) -> npt.NDArray[np.uint8]:
    """Warp a BGR picture bilinearly. A warp of four channels gives the same in half the time."""
    size = input_px, input_px
    if image_HW3.shape[0] * image_HW3.shape[1] > _FOUR_CHANNELS_UP_TO:
        crop = cv2.cvtColor(cv2.warpAffine(image_HW3, input_from_stored, size), cv2.COLOR_BGR2RGB)
    else:
        bgra_HW4 = cv2.cvtColor(image_HW3, cv2.COLOR_BGR2BGRA)
        crop = cv2.cvtColor(cv2.warpAffine(bgra_HW4, input_from_stored, size), cv2.COLOR_BGRA2RGB)
    return np.asarray(crop, np.uint8)


def image_from_stored(records: Records) -> geometry.Matrix:
    """(N, 3, 3) affines, px of the stored picture -> image px."""
    matrix = geometry.identities(records.scale_N)
    matrix[:, :2] = records.image_from_stored_N23
    return matrix


def stored_picture(source: Source, sample: int) -> npt.NDArray[np.uint8] | Planes:
    """(H, W, 3) BGR picture of one person, or its planes in raw shards. Raises InputError."""
    if source.is_raw:
        width, height = source.record(sample)[COLUMNS["size"]].astype(int).tolist()
        return planes_of(source.picture(sample), width, height)
    return decode(source.picture(sample), source.where(sample))


@dataclass(frozen=True)
class CropDataset:
    """Maps keys to crops. The draw depends only on the seed and the key."""

    source: Source
    preset: Preset
    input_px: int
    seed: int
    jitter: bool = False  # `batch` returns JitteredBatches

    def batch(self, keys: list[Key]) -> RawBatch:
        """Crop the people of a batch. Raises BadSamplesError."""
        draws_ND = draws_of(self.preset, self.seed, keys)
        records_NR = np.stack([self.source.record(sample) for sample, _ in keys])
        fields = unpack_records(records_NR)
        # All at once: one by one, affines take 0.03 ms a person and hold the interpreter's lock.
        matrices_N33 = crop_affines(fields, Draw(*draws_ND.T), self.preset, self.input_px)
        people = zip(
            keys,
            records_NR,
            matrices_N33 @ image_from_stored(fields),
            draws_ND.tolist(),
            strict=True,
        )
        crops = [self._crop(key[0], *person) for key, *person in people]
        facts = matrices_N33[:, :2].astype(np.float32), draws_ND.astype(np.float32), records_NR
        raw = RawBatch(*map(torch.from_numpy, (np.stack(crops), *facts)))
        return jittered(raw) if self.jitter else raw

    def _crop(self, sample: int, record: Any, warp: Any, drawn: list[float]) -> npt.NDArray:
        with bad_samples_named(self.source, sample):
            image, fields = stored_picture(self.source, sample), unpack_records(record[None])
            return _crop_pixels(image, fields, warp, Draw(*drawn), self.preset, self.input_px)


def draws_of(preset: Preset, seed: int, keys: list[Key]) -> npt.NDArray[np.float64]:
    """(N, 10) draws of the people of a batch. Each depends only on the seed and the key."""
    return draw_batch(preset, (draw_rng(seed, epoch, sample) for sample, epoch in keys))


@contextmanager
def bad_samples_named(source: Source, sample: int) -> Iterator[None]:
    """Raise BadSamplesError for an InputError about this sample, except those of object storage."""
    try:
        yield
    except StorageError:
        raise
    except InputError as error:
        where = source.where(sample)
        raise BadSamplesError.of({sample: error.found}, where, error.found) from error


def collate(batches: Iterable[RawBatch]) -> RawBatch:
    """One batch of several."""
    return RawBatch(*map(torch.cat, zip(*batches, strict=True)))


def jittered(raw: RawBatch) -> JitteredBatch:
    """The batch with colours jittered in this thread only; bit-identical to `augment.jitter`."""
    images_NHW3 = np.empty(raw.images_NHW3.shape, dtype=np.float32)
    people = zip(images_NHW3, raw.images_NHW3.numpy(), raw.draws_ND.tolist(), strict=True)
    for image_HW3, crop, drawn in people:
        np.divide(crop, np.float32(255), out=image_HW3)
        color_by_opencv(image_HW3, Draw(*drawn))
    return JitteredBatch(torch.from_numpy(images_NHW3), *raw[1:])


def endless_batches(
    keys_of_epoch: Callable[[int], npt.NDArray[np.int64]],
    batch_size: int,
    rank: int,
    world_size: int,
    first_step: int = 0,
) -> Iterator[list[Key]]:
    """Endless batches of keys for one rank, starting at any step. batch_size: people per rank.

    All ranks share one endless sequence of epochs; step t of rank r takes batch_size keys from
    position (t x world_size + r) x batch_size on. The sequence depends only on the epochs and the
    global batch size, so the step is enough to resume it. keys_of_epoch: (N, 2) keys of an epoch in
    their order, as `shuffled_keys`.
    """
    keys_of = functools.lru_cache(maxsize=1)(keys_of_epoch)
    people = len(keys_of(0))
    for step in itertools.count(first_step):
        start = (step * world_size + rank) * batch_size
        epoch_B, place_B = np.divmod(np.arange(start, start + batch_size), people)
        epochs = np.unique(epoch_B).tolist()
        keys_B2 = np.concatenate([keys_of(epoch)[place_B[epoch_B == epoch]] for epoch in epochs])
        yield [(sample, epoch) for sample, epoch in keys_B2.tolist()]


def shuffled_keys(shards: ShardSet, seed: int, window: int, epoch: int) -> npt.NDArray[np.int64]:
    """(N, 2) the keys of an epoch in random order. window: see `mix_shards`; 0 mixes all."""
    keys_N2 = shards.keys_of_epoch(seed, epoch)
    rng = np.random.default_rng([seed, epoch])
    if window:
        return keys_N2[mix_shards(shards.shard_of_sample[keys_N2[:, 0]], window, rng)]
    return keys_N2[rng.permutation(len(keys_N2))]


def mix_shards(
    shard_N: npt.NDArray[np.int64], window: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(N,) samples in random order, of which at most window + 1 shards are read at a time.

    The shards are shuffled. Each person of shard s, in this order, is put at random into one of the
    groups s to s + window - 1. The groups follow one another, each shuffled. shard_N: the shard of
    each sample.
    """
    position_of_shard = rng.permutation(shard_N.max() + 1)
    group_N = position_of_shard[shard_N] + rng.integers(window, size=len(shard_N))
    return np.lexsort((rng.random(len(shard_N)), group_N))


def batches_in_order(samples: npt.NDArray[np.int64], batch_size: int) -> list[list[Key]]:
    """Batches of keys of the given samples; the last one may be shorter."""
    keys = [(int(sample), 0) for sample in samples]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def load_crops(
    dataset: CropDataset,
    batches: Iterable[list[Key]],
    workers: int,
    pin: bool,
    kind: WorkerKind = "threads",
) -> Iterator[RawBatch]:
    """The batches in order, cropped by workers. Raises BadSamplesError.

    workers: at most one per core; 0 crops in the calling thread. pin: page-locked memory, for a
    GPU.
    """
    workers = min(workers, usable_cores())
    batches = read_ahead(dataset.source, batches, behind=THREADS_AHEAD * workers)
    if not workers:
        return map(dataset.batch, batches)
    # The clients of object storage do not work in forked processes.
    in_this_process = kind == "threads" or isinstance(batches, ReadAhead)
    run = in_threads if in_this_process else in_processes
    return run(dataset.batch, batches, workers, pin)
