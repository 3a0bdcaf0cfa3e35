"""Functions that several test files share; fixtures are in conftest.py."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.skeleton import MPII
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.shard_format import MANIFEST, file_sha256
from pipelines.shards import ShardSet


def make_codec(
    preset: str = "hrnet", rule: Any = "exact", input_px: int = 64, skeleton: Any = MPII
) -> Codec:
    """A codec with sigma 1."""
    return Codec(preset=PRESETS[preset], rule=rule, sigma=1.0, input_px=input_px, skeleton=skeleton)


def change_manifest(split: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest of a split in place."""
    raw = json.loads((split / MANIFEST).read_text())
    change(raw)
    (split / MANIFEST).write_text(json.dumps(raw))


def overwrite(split: Path, sample: int, component: str, data: bytes) -> None:
    """Write over the start of a packed person's component, in the tar itself."""
    place = ShardSet(split).place(sample, component)
    with place.tar.open("r+b", buffering=0) as file:
        file.seek(place.offset)
        file.write(data)


def update_sha256(split: Path) -> None:
    """Make the manifest's checksums those of the tars."""
    change_manifest(
        split,
        lambda raw: [s.update(sha256=file_sha256(split / s["tar"])) for s in raw["shards"]],
    )


def damage_picture(split: Path, copy: Path, sample: int) -> Path:
    """Copy a split and overwrite one picture; the manifest's checksums are updated."""
    shutil.copytree(split, copy)
    overwrite(copy, sample, "jpg", b"\x13" * ShardSet(copy).place(sample, "jpg").size)
    update_sha256(copy)
    return copy


def exif(orientation: int, order: str = "<", more: bytes = b"") -> bytes:
    """An APP1 segment with two tags, laid out by hand from the TIFF 6.0 specification."""
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 2)
    tiff += struct.pack(order + "HHII", 0x010F, 2, 4, 0)  # Make, four letters
    tiff += struct.pack(order + "HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff + more
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]
