"""Writing one shard of tools/make_shards.py, and knowing one that an earlier run has written."""

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from pipelines.crop_packing import Region, crop_jpeg
from pipelines.jpeg import Picture
from pipelines.shard_format import CropRule, Shard, file_sha256
from pipelines.shards import write_shard


class Sample(NamedTuple):
    """One person, ready to be written."""

    key: str
    record: bytes
    text: bytes
    picture: Picture
    region: Region | None
    """What to store of the picture; None stores its own bytes."""
    width: int
    """Of what is stored, px."""
    height: int


class Task(NamedTuple):
    """One shard to write."""

    partial: Path
    split: str
    number: int
    plan: str
    crop: CropRule | None
    samples: tuple[Sample, ...]

    @property
    def largest(self) -> tuple[int, int]:
        """Largest stored width and height, px."""
        widths, heights = ([s.width for s in self.samples], [s.height for s in self.samples])
        return max(widths), max(heights)


def finish_shard(task: Task) -> Shard:
    """Write one shard, unless an earlier run did so from the same plan and the same pictures."""
    folder = task.partial / task.split
    state = task.partial / f"{task.split}.state" / f"{task.number:05d}.json"
    pictures = json.dumps([sample.picture for sample in task.samples]).encode()
    inputs = {"plan": task.plan, "pictures": hashlib.sha256(pictures).hexdigest()}
    shard = _finished(state, inputs, folder)
    if shard is None:
        shard = write_shard(folder, task.number, map(partial(_load, task.crop), task.samples))
        state.write_text(json.dumps({**inputs, "shard": asdict(shard)}))
    return shard


def _finished(state: Path, inputs: dict[str, str], folder: Path) -> Shard | None:
    try:
        noted = json.loads(state.read_text())
        shard = Shard(**noted.pop("shard"))
        files = [(folder / shard.tar, shard.sha256), (folder / shard.index, shard.index_sha256)]
        whole = all(file_sha256(path) == digest for path, digest in files)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return shard if whole and noted == inputs else None


def _load(crop: CropRule | None, sample: Sample) -> tuple[str, bytes, bytes, bytes]:
    jpeg = _read(sample.picture)
    if crop and sample.region:
        jpeg = crop_jpeg(jpeg, sample.region, crop.quality)
    return sample.key, sample.record, jpeg, sample.text


def _read(picture: Picture) -> bytes:
    """The picture's bytes. Raises InputError if it is not the one that was checked."""
    path = Path(picture.path)
    jpeg, stat = path.read_bytes(), path.stat()
    if (len(jpeg), stat.st_mtime_ns) != (picture.bytes, picture.mtime_ns):
        found, expected = "changed since it was checked", "pictures that nobody writes to meanwhile"
        raise InputError(path, found, expected, "run the same command again; it continues")
    return jpeg
