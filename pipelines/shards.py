"""People <-> WebDataset tar shards: writing, the index, and reading at random.

A split is a folder of NNNNN.tar, each with its wds2idx index NNNNN.idx, and one manifest.json. A
sample is one person with three components:

    <key>.f32   little-endian float32 record (pipelines/shard_format.py), which DALI reads as it is
    <key>.jpg   the picture
    <key>.json  the same facts for a person to read, and the name of the picture
"""

import copy
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import webdataset

from common.errors import InputError
from common.files import parse_json, read_bytes, write_atomic
from pipelines.annotations import People, safe_name
from pipelines.jpeg import claimed_size, require_sane_size
from pipelines.shard_format import (
    PACK_AGAIN,
    Shard,
    file_sha256,
    read_manifest,
    record_faults,
    record_length,
    unpack_records,
)

COMPONENTS = ("f32", "jpg", "json")
_INDEX_VERSION = "v1.2"

# Bytes: what no whole split has more of.
_LARGEST_INDEX_LINE = 1024
LARGEST = {"f32": 1 << 20, "jpg": 256 << 20, "json": 4 << 20}
_TAR_BLOCK = 512
_JPEG_HEADER_BYTES = 4096
"""The size stands in the first of them, but for pictures with a thumbnail or a colour profile."""


def write_shard(
    folder: Path, number: int, samples: Iterable[tuple[str, bytes, bytes, bytes]]
) -> Shard:
    """Write a tar and its index of (key, record, jpeg, json) samples; same samples, same bytes."""
    tar, index = folder / f"{number:05d}.tar", folder / f"{number:05d}.idx"
    people = 0
    temporary = tar.with_suffix(".tar.tmp")
    with temporary.open("wb") as stream:
        with webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
            for key, record, jpeg, text in samples:
                components = zip(COMPONENTS, (record, jpeg, text), strict=True)
                writer.write({"__key__": key, **dict(components)})
                people += 1
        stream.flush()
        os.fsync(stream.fileno())
    index.write_text(index_text(temporary))
    temporary.rename(tar)
    return Shard(
        tar=tar.name,
        index=index.name,
        people=people,
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        index_sha256=file_sha256(index),
    )


def index_text(tar: Path) -> str:
    """A wds2idx index, version 1.2: a line a sample of `extension offset size name` groups."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key, extension = member.name.split(".", 1)
            entry = f"{extension} {member.offset_data} {member.size} {member.name}"
            samples.setdefault(key, []).append(entry)
    lines = [f"{_INDEX_VERSION} {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    return "\n".join(lines) + "\n"


class _Extents(NamedTuple):
    """(N,) int64 arrays that say where each sample's components lie."""

    shard: npt.NDArray[np.int64]
    key: tuple[str, ...]
    offset: dict[str, npt.NDArray[np.int64]]
    size: dict[str, npt.NDArray[np.int64]]


class ShardSet:
    """A split of shards, read at random. Sample i is the i-th person in the order of the tars.

    Files are opened at first use, so that an object may be sent to a worker process.
    """

    def __init__(self, folder: Path):
        """Read the manifest and the indices; no tar is read. Raises InputError."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.tars = [self._path(shard.tar) for shard in self.manifest.shards]
        self.indices = [self._path(shard.index) for shard in self.manifest.shards]
        self._extents = self._read_indices()
        self._origin = np.arange(len(self))
        self._records: npt.NDArray[np.float32] | None = None
        self._files: dict[int, io.BufferedReader] = {}

    def __len__(self) -> int:
        return self.manifest.people

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def jpeg(self, sample: int) -> bytes:
        """The picture of one person, as stored."""
        return self._component(sample, "jpg")

    def record(self, sample: int) -> npt.NDArray[np.float32]:
        """(record_length,) the record of one person; from memory once `records` has read it."""
        if self._records is not None:
            return self._records[sample]
        return np.frombuffer(self._component(sample, "f32"), dtype="<f4")

    def damaged_records(self) -> dict[int, str]:
        """Samples whose record on the disk is gone, or no longer what `records` has read; and why.

        Tars are opened anew, for one may have gone since.
        """
        self._files.clear()
        found = {sample: self._record_fault(sample) for sample in range(len(self))}
        return {sample: fault for sample, fault in found.items() if fault}

    def _record_fault(self, sample: int) -> str:
        try:
            data = self._component(sample, "f32")
        except InputError as error:
            return error.found
        same = self._records is None or data == self._records[sample].tobytes()
        return "" if same else "its record is not what it was at the start"

    def records(self) -> npt.NDArray[np.float32]:
        """(N, record_length) all records, in the order of the samples. Raises InputError.

        On the way the tar's own headers of records and pictures are compared with the index, the
        values with the manifest, and pictures that claim to be huge are refused.
        """
        records = np.stack([self._checked_record(sample) for sample in range(len(self))])
        faults = record_faults(records, self.manifest.largest)
        found = [(int(bad.argmax()), int(bad.sum()), what) for what, bad in faults.items()]
        found = [fault for fault in found if fault[1]]
        if found:
            first = min(found)
            raise InputError(
                self.where(first[0]),
                f"damaged record(s): {'; '.join(f'{n} with {what}' for _, n, what in found)}",
                "finite numbers in the ranges of docs/conventions.md, each person once",
                PACK_AGAIN,
            )
        records.setflags(write=False)
        self._records = records
        return records

    def facts(self, sample: int) -> dict[str, Any]:
        """The JSON of one person. Raises InputError."""
        try:
            facts = parse_json(self._component(sample, "json"))
            if not {"image", "index", "person"} <= facts.keys():
                raise ValueError("fields are missing")
            if not isinstance(facts["image"], str) or not safe_name(facts["image"]):
                raise ValueError(f"file name {facts['image']!r:.100}")
            for name in ("index", "person"):
                if type(facts[name]) is not int or abs(facts[name]) >= 2**53:
                    raise ValueError(f"{name} {facts[name]!r:.100}")
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(
                self.where(sample), f"damaged JSON ({error})", "the facts of a person", PACK_AGAIN
            ) from error
        return facts

    def key(self, sample: int) -> str:
        """The key in the tar."""
        return self._extents.key[sample]

    def samples_of(self, shard: int) -> list[int]:
        """The samples of one tar, in its order."""
        return np.flatnonzero(self._extents.shard == shard).tolist()

    def origin(self, sample: int) -> int:
        """Whose bytes are given for a sample: its own, or its stand-in's."""
        return int(self._origin[sample])

    def with_replacements(self, bad: set[int], folder: Path) -> "ShardSet":
        """The same split with another person's bytes in the place of each of these samples.

        It is the next good one of the same tar, from whose end its start follows. folder: gets the
        indices that say so, for DALI. Raises InputError for a tar in which nobody is good.
        """
        changed = copy.copy(self)
        shard_N, numbers = self._extents.shard, np.arange(len(self))
        good = ~np.isin(numbers, list(bad))
        origin, indices = numbers.copy(), list(self.indices)
        for shard in np.unique(shard_N[~good]):
            mine = numbers[shard_N == shard]
            if not good[mine].any():
                raise InputError(self.tars[shard], f"{len(mine)} damaged pictures of {len(mine)}",
                                 "a good one, to stand in for the others", PACK_AGAIN)  # fmt: skip
            following = np.concatenate([mine, mine])
            for place in np.flatnonzero(~good[mine]):
                rest = following[place:]
                origin[mine[place]] = rest[good[rest].argmax()]
            indices[shard] = folder / self.indices[shard].name
            _write_patched_index(self.indices[shard], indices[shard], origin[mine] - mine[0])
        changed._origin, changed._files, changed.indices = origin, {}, indices
        changed._records = None if self._records is None else self._records[origin]
        changed._extents = _Extents(
            shard=shard_N,
            key=tuple(self._extents.key[i] for i in origin),
            offset={name: values[origin] for name, values in self._extents.offset.items()},
            size={name: values[origin] for name, values in self._extents.size.items()},
        )
        return changed

    def where(self, sample: int) -> str:
        """Shard, number and key of a sample, for messages."""
        shard = self.tars[self._extents.shard[sample]]
        return f"{shard}: sample {self.origin(sample)} (key {self.key(sample)})"

    def people(self) -> tuple[People, npt.NDArray[np.int64]]:
        """Everybody in the annotation's order, and the sample number of each, (N,)."""
        fields = unpack_records(self.records())
        facts = [self.facts(sample) for sample in range(len(self))]
        people = People(
            images=tuple(fact["image"] for fact in facts),
            index=np.array([fact["index"] for fact in facts]),
            person=np.array([fact["person"] for fact in facts]),
            center=fields.center_N2.astype(np.float64),
            scale=fields.scale_N.astype(np.float64),
            normalize=fields.normalize_N.astype(np.float64),
            joints=fields.joints_NJ2.astype(np.float64),
            marked=fields.marked_NJ,
            visible=fields.visible_NJ,
        )
        order = np.argsort(fields.row_N, kind="stable")
        return people.select(order), order

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise InputError(path, "missing", "every shard with its index beside it", PACK_AGAIN)
        return path

    def _component(self, sample: int, extension: str) -> bytes:
        size = int(self._extents.size[extension][sample])
        offset = int(self._extents.offset[extension][sample])
        data = self._read(sample, offset, size)
        if len(data) != size:
            raise InputError(
                self.where(sample),
                f"{len(data)} of {size} bytes of {extension}: the tar was cut off",
                f"{size} bytes at offset {offset}",
                PACK_AGAIN,
            )
        return data

    def _read(self, sample: int, offset: int, size: int) -> bytes:
        """What the sample's tar has there; shorter where it ends. Raises InputError."""
        shard = int(self._extents.shard[sample])
        try:
            if shard not in self._files:
                self._files[shard] = self.tars[shard].open("rb", buffering=0)  # type: ignore[assignment]
            return os.pread(self._files[shard].fileno(), size, offset)
        except OSError as error:  # a bad sector; a tar that is gone
            raise InputError(
                self.where(sample), f"not readable ({error.strerror})", "a tar on a sound disk",
                "restore the tar, or " + PACK_AGAIN,
            ) from error  # fmt: skip

    def _checked_record(self, sample: int) -> npt.NDArray[np.float32]:
        """The record, if the headers about it are those of this sample. One read for all three."""
        extents = self._extents
        start = int(extents.offset["f32"][sample]) - _TAR_BLOCK
        size = int(extents.size["f32"][sample])
        picture = int(extents.offset["jpg"][sample]) - start
        data = self._read(sample, start, picture + _JPEG_HEADER_BYTES)
        headers = ("f32", data[:_TAR_BLOCK]), ("jpg", data[picture - _TAR_BLOCK : picture])
        for extension, header in headers:
            name = f"{extents.key[sample]}.{extension}".encode()
            if not _is_header(header, name, int(extents.size[extension][sample])):
                raise InputError(
                    self.where(sample),
                    f"something else where the index has the {extension} of this key",
                    "a tar with its own index, both whole",
                    PACK_AGAIN,
                )
        head = data[picture:]
        whole = self.jpeg(sample) if claimed_size(head) is None else head
        require_sane_size(whole, self.where(sample))
        return np.frombuffer(data[_TAR_BLOCK : _TAR_BLOCK + size], dtype="<f4")

    def _read_indices(self) -> _Extents:
        shards, tables, keys = [], [], list[str]()
        for number, (shard, path) in enumerate(
            zip(self.manifest.shards, self.indices, strict=True)
        ):
            names, table = _read_index(path, shard)
            shards.append(np.full(len(table), number))
            tables.append(table)
            keys += names
        table_NC2 = np.concatenate(tables)
        if len(set(keys)) != len(keys):
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise InputError(self.folder, f"the key {twice} twice", "each key once", PACK_AGAIN)
        wanted = 4 * record_length(self.manifest.joints)
        bad = table_NC2[:, 0, 1] != wanted
        if bad.any():
            raise InputError(
                f"{self.folder}: sample {bad.argmax()}",
                f"a record of {table_NC2[bad.argmax(), 0, 1]} bytes",
                f"{wanted} bytes for {self.manifest.joints} joints",
                PACK_AGAIN,
            )
        return _Extents(
            shard=np.concatenate(shards),
            key=tuple(keys),
            offset={name: table_NC2[:, c, 0] for c, name in enumerate(COMPONENTS)},
            size={name: table_NC2[:, c, 1] for c, name in enumerate(COMPONENTS)},
        )


def _read_index(path: Path, shard: Shard) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Keys, and (people, component, 2) offset and size in bytes. InputError unless they fit."""
    try:
        tar_bytes = path.with_name(shard.tar).stat().st_size
        if tar_bytes != shard.bytes:
            raise ValueError(f"{shard.tar} has {tar_bytes} bytes, the manifest says {shard.bytes}")
        data = read_bytes(path, _LARGEST_INDEX_LINE * (shard.people + 1))
        header, *lines = data.decode("ascii").splitlines() or [""]
        if header != f"{_INDEX_VERSION} {shard.people}" or len(lines) != shard.people:
            raise ValueError(f"it begins {header[:100]!r} and has {len(lines)} samples")
        words = np.array([line.split(" ") for line in lines])
        words = words.reshape(shard.people, len(COMPONENTS), 4)
        keys = [name.split(".", 1)[0] for name in words[:, 0, 3]]
        names = [[f"{key}.{extension}" for extension in COMPONENTS] for key in keys]
        if not (words[:, :, 0] == np.array(COMPONENTS)).all() or words[:, :, 3].tolist() != names:
            raise ValueError(f"components other than {', '.join(COMPONENTS)} of one key")
        table = words[:, :, 1:3].astype(np.int64)
        _check_places(table, tar_bytes)
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise ValueError("its SHA-256 is not the one in the manifest")
    except (ValueError, OverflowError) as error:
        raise InputError(
            path, f"an index that does not fit its tar ({error})",
            f"the wds2idx index of {shard.people} people in {shard.tar}", PACK_AGAIN,
        ) from error  # fmt: skip
    return keys, table


def _write_patched_index(source: Path, target: Path, lines_N: npt.NDArray[np.int64]) -> None:
    """An index whose n-th person is the lines_N[n]-th of the source, written whole."""
    try:
        header, *lines = source.read_text().splitlines()
    except OSError as error:
        raise InputError(source, f"not readable ({error.strerror})", "the index of its tar",
                         "restore it, or " + PACK_AGAIN) from error  # fmt: skip
    write_atomic(target, ("\n".join([header, *(lines[i] for i in lines_N)]) + "\n").encode())


def _check_places(table_NC2: npt.NDArray[np.int64], tar_bytes: int) -> None:
    """Raise ValueError unless a tar has its files there: one after another, in whole blocks."""
    sizes = table_NC2[..., 1].ravel()
    largest = np.tile([LARGEST[name] for name in COMPONENTS], len(table_NC2))
    if (sizes < 0).any() or (sizes > largest).any():
        raise ValueError("sizes out of range")
    ends = np.cumsum(_TAR_BLOCK + -(-sizes // _TAR_BLOCK) * _TAR_BLOCK)
    starts = np.concatenate([[0], ends[:-1]]) + _TAR_BLOCK
    if (table_NC2[..., 0].ravel() != starts).any() or ends[-1] > tar_bytes:
        raise ValueError("offsets at which no tar of these sizes has its files")


def _is_header(block: bytes, name: bytes, size: int) -> bool:
    """Whether these 512 bytes begin a plain file of that name and size in a tar."""
    plain = block[156:157] in (b"0", b"\0") and block[257:262] == b"ustar"
    return plain and block[:100].rstrip(b"\0") == name and block[124:136] == b"%011o\0" % size
