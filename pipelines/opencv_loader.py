"""Pictures -> person crops by OpenCV, in worker processes. The reference path, and evaluation's.

A source gives the bytes of a picture and the record of a person; `ShardSet` is one and
`LooseImages` is the other. All that is random is in a Draw, so that a crop is a pure function.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from common.errors import InputError
from common.system import keep_freed_memory, usable_cores
from pipelines import geometry, princeton
from pipelines.annotations import People, stays_inside
from pipelines.augment import Draw, Preset, draw, draw_rng, draws_array
from pipelines.jpeg import BadSamplesError, require_sane_size
from pipelines.shard_format import Records, record_of, unpack_records
from pipelines.shards import ShardSet

PREFETCH = 4
"""Batches that each worker process makes ahead."""
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]
"""What asks a program to stop. It decides itself when; its workers end with it."""


class RawBatch(NamedTuple):
    """What either loader hands over: crops before colour, and how each was made."""

    images_NHW3: torch.Tensor
    """RGB in 0..255: uint8, or float32 where the crop is princeton's."""
    input_from_image_N23: torch.Tensor
    """float32 affine of the pixels, image px -> input px."""
    draws_ND: torch.Tensor
    """float32, columns in the order of augment.Draw."""
    records_NR: torch.Tensor
    """Layout in pipelines/shard_format.py: float32 from shards, float64 from loose pictures."""


Item = tuple[npt.NDArray, npt.NDArray[np.float32], Draw, npt.NDArray[np.floating]]
"""One person: crop, affine, draw, record."""


class Source(Protocol):
    """People with pictures, numbered from 0."""

    def __len__(self) -> int: ...

    def jpeg(self, sample: int) -> bytes:
        """The stored picture of one person. Raises InputError if it cannot be read."""

    def record(self, sample: int) -> npt.NDArray[np.floating]:
        """(record_length,) of one person."""

    def where(self, sample: int) -> str:
        """What to call a sample in a message."""


class LooseImages:
    """People of an annotation file with their pictures in a folder."""

    def __init__(self, people: People, folder: Path):
        """Check that every picture is there. Raises InputError that counts the missing ones."""
        self.people, self.folder = people, Path(folder)
        missing = sorted({n for n in people.images if not (self.folder / n).is_file()})
        if missing:
            raise InputError(
                self.folder,
                f"{len(missing)} of {len(set(people.images))} pictures missing, first {missing[0]}",
                "the pictures that the annotation file names",
                "give their folder with --images",
            )
        outside = [
            name for name in sorted(set(people.images)) if not stays_inside(self.folder, name)
        ]
        if outside:
            raise InputError(
                self.folder / outside[0], "a link that leads out of the folder of pictures",
                "pictures in the folder itself", "name the folder that has them",
            )  # fmt: skip

    def __len__(self) -> int:
        return self.people.count

    def jpeg(self, sample: int) -> bytes:
        """The file's bytes. Raises InputError."""
        path = self.folder / self.people.images[sample]
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(path, f"not readable ({error.strerror})", "a JPEG on a sound disk",
                             "restore the file") from error  # fmt: skip

    def record(self, sample: int) -> npt.NDArray[np.float64]:
        """The record; the picture's size is left at 0, for it is not decoded here."""
        return record_of(self.people, sample, 0, 0)

    def where(self, sample: int) -> str:
        """The file."""
        return str(self.folder / self.people.images[sample])


def decode(jpeg: bytes, where: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) BGR picture as stored, its EXIF orientation ignored. Raises InputError."""
    require_sane_size(jpeg, where)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    data = np.frombuffer(jpeg, dtype=np.uint8)
    try:
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:  # more pixels than OpenCV is willing to read, or damage that it checks for
        image = None
    if image is None:
        raise InputError(
            where,
            f"{data.size} bytes that are no picture",
            "a JPEG",
            "replace the picture; if it lies in a tar, pack again with tools/make_shards.py",
        )
    return image  # type: ignore[return-value]


def crop_person(
    image_HW3: npt.NDArray[np.uint8], record: Records, drawn: Draw, preset: Preset, input_px: int
) -> tuple[npt.NDArray, npt.NDArray[np.float32]]:
    """Crop one person: (input_px, input_px, 3) RGB in 0..255 and the (2, 3) affine applied.

    image_HW3: BGR. record: fields of one person, with a leading axis of 1. The crop is uint8, by
    one warp; under princeton's rules it is float32, by its own two.
    """
    center = record.center_N2[0].astype(np.float64)
    scale = float(record.scale_N[0])
    if preset.princeton_crop:
        crop = princeton.crop(image_HW3, center, scale, input_px)
        # Without an augmentation there is no second resampling, as in its test.
        if drawn != Draw():
            crop = princeton.augment(crop, drawn)
        matrix = princeton.input_from_image(center, scale, drawn, input_px)
        return crop[..., ::-1].astype(np.float32), matrix[:2].astype(np.float32)
    matrix = geometry.input_from_image(
        center, scale, input_px, drawn.scale, drawn.rotation_deg, bool(drawn.flip)
    )
    warp = (matrix @ image_from_stored(record))[:2]
    crop = cv2.warpAffine(image_HW3, warp, (input_px, input_px), flags=cv2.INTER_LINEAR)
    return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB), matrix[:2].astype(np.float32)


def image_from_stored(record: Records) -> geometry.Matrix:
    """(3, 3) affine, px of the stored picture -> image px. record: with a leading axis of 1."""
    matrix = np.eye(3)
    matrix[:2] = record.image_from_stored_N23[0]
    return matrix


class CropDataset(Dataset):
    """Crops by (sample, epoch) keys; the draw follows from the seed and the key alone."""

    def __init__(
        self,
        source: Source,
        preset: Preset,
        input_px: int,
        seed: int,
        decoder: Callable[[bytes, str], npt.NDArray[np.uint8]] = decode,
    ):
        """preset: augment.PRESETS[...]. input_px: side of the crop. seed: of the draws.

        decoder: (JPEG, what to call it) -> (H, W, 3) BGR.
        """
        self.source, self.preset, self.input_px, self.seed = source, preset, input_px, seed
        self.decoder = decoder

    def __getitem__(self, key: tuple[int, int]) -> Item:
        sample, epoch = key
        drawn = draw(self.preset, draw_rng(self.seed, epoch, sample))
        where = self.source.where(sample)
        try:
            record = self.source.record(sample)
            image = self.decoder(self.source.jpeg(sample), where)
        except InputError as error:
            raise BadSamplesError.of({sample: error.found}, where, error.found) from error
        fields = unpack_records(record[None])
        crop, matrix = crop_person(image, fields, drawn, self.preset, self.input_px)
        return crop, matrix, drawn, record


def collate(items: list[Item]) -> RawBatch:
    """Stack the items of CropDataset."""
    images, matrices, draws, records = zip(*items, strict=True)
    return RawBatch(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(matrices)),
        torch.from_numpy(draws_array(list(draws))),
        torch.from_numpy(np.stack(records)),
    )


class EndlessSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample, epoch) keys for one rank, without end, from any step on.

    All ranks walk one endless sequence of shuffled passes over the people; step t of rank r takes
    positions (t x world_size + r) x batch_size and on. So the sequence depends on the seed and the
    global batch size alone, and no state but the step is needed to continue it.
    """

    def __init__(
        self,
        people: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        first_step: int = 0,
    ):
        """batch_size: people per rank and step."""
        self.people, self.batch_size, self.seed = people, batch_size, seed
        self.rank, self.world_size, self.first_step = rank, world_size, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        step = self.first_step
        while True:
            start = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(start, start + self.batch_size):
                if position // self.people != epoch:
                    epoch = position // self.people
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.people)
                batch.append((int(order[position % self.people]), epoch))
            yield batch
            step += 1


class ListSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample, 0) keys in the given order, the last one shorter if need be."""

    def __init__(self, samples: npt.NDArray[np.int64], batch_size: int):
        """samples: (N,) sample numbers."""
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.samples), self.batch_size):
            yield [(int(s), 0) for s in self.samples[start : start + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)


class CropLoader:
    """RawBatches of a dataset, cropped in worker processes."""

    def __init__(
        self,
        dataset: CropDataset,
        sampler: EndlessSampler | ListSampler,
        workers: int,
        pin: bool,
    ):
        """workers: processes, no more than there are cores; 0 crops in this one.

        pin: page-locked memory, for a GPU.
        """
        workers = min(workers, usable_cores())
        self._batches = DataLoader(
            _Careful(dataset),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate_careful,
            pin_memory=pin,
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCH if workers else None,
            # Else each start of a run would take a number from the generator that it restores.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[RawBatch]:
        with _signals_held(), _garbage_held():
            batches = iter(self._batches)
        for batch in batches:
            if isinstance(batch, InputError):
                break
            yield batch
        else:
            return
        # The workers end here: in the cycle of an error and its traceback the collector would find
        # them, whose order leaves the workers without a word, and this process waiting for each.
        del batches
        raise batch


class OpenCVLoader:
    """Endless augmented batches by OpenCV; they depend on the seed and the step alone."""

    def __init__(
        self,
        shards: ShardSet,
        preset: Preset,
        *,
        input_px: int,
        batch_size: int,
        workers: int,
        pin: bool,
        seed: int,
        rank: int,
        world_size: int,
        first_step: int,
    ):
        """workers: processes. pin: page-locked batches for a GPU. first_step: batches to skip."""
        self.shards = shards
        dataset = CropDataset(shards, preset, input_px, seed)
        sampler = EndlessSampler(len(shards), batch_size, seed, rank, world_size, first_step)
        self._batches: Iterator[RawBatch] = iter(CropLoader(dataset, sampler, workers, pin))

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError; then this loader has come to its end."""
        try:
            return next(self._batches)
        except BadSamplesError as error:
            # A stand-in that is damaged itself goes by its own number.
            error.faults = {self.shards.origin(s): text for s, text in error.faults.items()}
            error.advise_to_skip()
            raise

    def state(self) -> bytes:
        """Empty: the step is enough."""
        return b""


class _Careful(Dataset):
    """A dataset that hands errors over as values: a DataLoader's worker would turn them to text."""

    def __init__(self, dataset: CropDataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Item | InputError:
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def _collate_careful(items: list[Item | InputError]) -> RawBatch | InputError:
    whole = [item for item in items if not isinstance(item, InputError)]
    errors = [item for item in items if isinstance(item, InputError)]
    if errors:
        return errors[0]
    batch = collate(whole)
    return batch if get_worker_info() is None else _shared(batch)


def _shared(batch: RawBatch) -> RawBatch | InputError:
    """Its tensors in shared memory, where the main process finds them.

    Left to the queue's own thread, a failure would be a traceback and a batch that never comes.
    """
    try:
        for tensor in batch:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in batch) / 1e6
        return InputError(
            "the workers' shared memory, /dev/shm",
            f"no room for a batch of {size:.1f} MB ({str(error).splitlines()[0]})",
            f"room for {PREFETCH + 1} batches of each worker and rank",
            "in a container give it more: docker run --shm-size=2g; or take fewer workers, smaller "
            "batches, or no workers (0)",
        )
    return batch


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the signals that stop a program; processes started meanwhile never get them.

    A mask is inherited, so that there is no moment at which a worker could be hit. One whose parent
    is gone ends by itself. Where a worker could not hear its parent, SIGTERM is let through.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = set(STOP_SIGNALS)
    if not hasattr(signal, "sigwaitinfo"):
        held.discard(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _garbage_held() -> Iterator[None]:
    """Destroy nothing that only the collector finds; processes started meanwhile begin so.

    What a worker inherits is not for it to destroy: a dead pipeline of DALI would wait for threads
    that are not there.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _start_worker(worker: int) -> None:
    """Leave the other cores to the other workers, keep buffers, end when the main process says."""
    gc.freeze()  # see _garbage_held
    gc.enable()
    cv2.setNumThreads(0)
    keep_freed_memory()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_at_its_word, args=[os.getppid()], daemon=True).start()


def _end_at_its_word(parent: int) -> None:
    """Take the held signals from the queue; SIGTERM by the parent ends this worker."""
    while True:
        info = signal.sigwaitinfo(STOP_SIGNALS)
        if info.si_signo == signal.SIGTERM and info.si_pid == parent:
            os._exit(0)
