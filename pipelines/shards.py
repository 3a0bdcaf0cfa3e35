"""Random access to a split of shards.

A split is a folder of NNNNN.tar, each with its wds2idx index NNNNN.idx, one manifest.json, and one
people.json with all records. A sample is one person with three components, in this order:

    <key>.f32   the record (pipelines/shard_format.py), for other readers of WebDataset tars
    <key>.jpg   the picture; <key>.i420 in raw shards (pipelines/i420.py)
    <key>.json  the same values in readable form, and the name of the picture
"""

import copy
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import read_bytes
from pipelines.annotations import People
from pipelines.coco import object_array
from pipelines.shard_cache import ORIGIN, Key, ReadAhead, ShardCache
from pipelines.shard_format import (
    PACK_AGAIN,
    Shard,
    read_manifest,
    read_people_file,
    unpack_records,
)

_MAX_INDEX = 256 << 20  # bytes


class ShardSet:
    """A split of shards. Sample i is the i-th person in the order of the tars.

    Files are opened at first use, so that the object can be sent to a worker process.
    """

    def __init__(self, folder: Path):
        """Read the manifest and the indices, but no tar. Raises InputError."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.tars = [self.folder / shard.tar for shard in self.manifest.shards]
        self.is_raw = self.manifest.packing == "raw"
        is_cached = (self.folder / ORIGIN).is_file()
        self.cache = ShardCache(self.folder, self.manifest.shards) if is_cached else None
        """The cache of a split in object storage; None for a local folder."""
        indices = [self._read_index(shard) for shard in self.manifest.shards]
        counts = [shard.people for shard in self.manifest.shards]
        self.shard_of_sample = np.repeat(np.arange(len(counts)), counts)
        """(N,) the number of each sample's tar."""
        self.keys = [key for keys, _ in indices for key in keys]
        """The key of each sample in its tar."""
        self._ranges_NC2 = np.concatenate([ranges for _, ranges in indices])
        self._origin_N = np.arange(len(self))
        self._records: npt.NDArray[np.float32] | None = None
        self._columns: dict[str, list[Any]] = {}
        """Of people.json: image, index, person and, from COCO's files, area and ignored."""
        self._files: dict[int, io.FileIO] = {}
        self.samples_of_set = {self.location: range(len(self))}
        """The samples of each data set; JoinedShards have several."""

    def __len__(self) -> int:
        return self.manifest.people

    @property
    def location(self) -> str:
        """The split's URL, or its folder."""
        return self.cache.url if self.cache else str(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def record(self, sample: int) -> npt.NDArray[np.float32]:
        """(record_length,) the record of one person. Raises InputError."""
        return self.records()[sample]

    def records(self) -> npt.NDArray[np.float32]:
        """(N, record_length) all records, in the order of the samples; read-only.

        Reads people.json once. Raises InputError if it is damaged.
        """
        if self._records is None:
            self._records, self._columns = read_people_file(self.folder, self.manifest)
        return self._records

    def image_name(self, sample: int) -> str:
        """The name of one person's picture in the annotation file. Raises InputError."""
        self.records()
        return self._columns["image"][self.origin(sample)]

    def people(self) -> tuple[People, npt.NDArray[np.int64]]:
        """All people in the order of the annotation file, and the sample of each, (N,)."""
        fields, columns = unpack_records(self.records()), self._columns
        people = People(
            images=tuple(columns["image"]),
            index=np.array(columns["index"]),
            person=np.array(columns["person"]),
            center=fields.center_N2.astype(np.float64),
            scale=fields.scale_N.astype(np.float64),
            normalize=fields.normalize_N.astype(np.float64),
            joints=fields.joints_NJ2.astype(np.float64),
            marked=fields.marked_NJ,
            visible=fields.visible_NJ,
        )
        if "area" in columns:
            people = people._replace(
                area=np.array(columns["area"]), ignored=object_array(columns["ignored"])
            )
        order = np.argsort(fields.row_N, kind="stable")
        return people.select(order), order

    def where(self, sample: int) -> str:
        """Shard, number and key of a sample, for messages."""
        tar = self.tars[self.shard_of_sample[sample]]
        return f"{tar}: sample {self.origin(sample)} (key {self.keys[sample]})"

    def keys_of_epoch(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """(N, 2) the people that an epoch takes, and the pass over them that each belongs to."""
        return np.column_stack([np.arange(len(self)), np.full(len(self), epoch)])

    def origin(self, sample: int) -> int:
        """The sample whose data are returned for this one: itself, or its replacement."""
        return int(self._origin_N[sample])

    def picture(self, sample: int) -> bytes:
        """The picture of one person, as stored. Raises InputError."""
        offset, size = self._ranges_NC2[sample, 1].tolist()
        try:
            file = self._file(int(self.shard_of_sample[sample]))  # this reference keeps it open
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            found = f"not readable ({error.strerror})"
            raise InputError(self.where(sample), found, "a readable tar", PACK_AGAIN) from error
        if len(data) != size:
            found = f"{len(data)} of {size} bytes at offset {offset}: the tar was cut off"
            raise InputError(self.where(sample), found, "the whole tar", PACK_AGAIN)
        return data

    def with_replacements(self, bad: set[int]) -> "ShardSet":
        """The same split, but each of these samples is replaced by the next good one of its tar.

        Raises InputError for a tar without a good sample.
        """
        changed = copy.copy(self)
        changed._files = {}
        origin_N = np.arange(len(self))
        is_good_N = ~np.isin(origin_N, list(bad))
        for shard in np.unique(self.shard_of_sample[~is_good_N]):
            samples = np.flatnonzero(self.shard_of_sample == shard)
            good = samples[is_good_N[samples]]
            if not len(good):
                found = f"{len(samples)} damaged pictures of {len(samples)}"
                raise InputError(self.tars[shard], found, "at least one good picture", PACK_AGAIN)
            origin_N[samples] = good[np.searchsorted(good, samples) % len(good)]
        changed._origin_N = origin_N
        changed.keys = [self.keys[sample] for sample in origin_N]
        changed._ranges_NC2 = self._ranges_NC2[origin_N]
        changed._records = self.records()[origin_N]
        return changed

    def _read_index(self, shard: Shard) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Keys, and (people, component, 2) offsets and sizes in bytes. Raises InputError."""
        try:
            # A tar in object storage is fetched, and checked, when it is read.
            tar_bytes = shard.bytes if self.cache else (self.folder / shard.tar).stat().st_size
            if tar_bytes != shard.bytes:
                raise ValueError(f"the tar has {tar_bytes} bytes, the manifest says {shard.bytes}")
            data = read_bytes(self.folder / shard.index, _MAX_INDEX)
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise ValueError("its SHA-256 is not the one in the manifest")
        except (OSError, ValueError) as error:
            found = f"not the index of {shard.tar} ({error})"
            expected = f"the tar and its wds2idx index of {shard.people} people"
            where = self.folder / shard.index
            raise InputError(where, found, expected, PACK_AGAIN) from error
        # A line: extension, offset, size and name of each component.
        rows = [line.split() for line in data.decode().splitlines()[1:]]
        ranges = [[row[1:3], row[5:7], row[9:11]] for row in rows]
        return [row[3].partition(".")[0] for row in rows], np.array(ranges, dtype=np.int64)

    def _file(self, shard: int) -> io.FileIO:
        """An opened tar. Raises OSError, and StorageError of one in object storage."""
        if self.cache:
            return self.cache.file(shard)
        file = self._files.get(shard)
        if file is None:  # setdefault: threads that open it at the same time use one file
            file = self._files.setdefault(shard, self.tars[shard].open("rb", buffering=0))
        return file


def read_ahead(
    source: object, batches: Iterable[list[Key]], behind: int = 0
) -> Iterable[list[Key]]:
    """The same batches. If they come from object storage, their tars are fetched in advance.

    behind: number of batches that are still being read after they were yielded.
    """
    if isinstance(source, ShardSet) and source.cache:
        return ReadAhead(source.cache, source.shard_of_sample, iter(batches), behind)
    return batches
