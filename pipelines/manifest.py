"""What a folder of shards says of itself in manifest.json."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import read_json, write_whole
from configs.skeleton import Skeleton, skeleton_from_plain
from pipelines.annotations import safe_name

FORMAT = "stacked-hourglass-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PACK_AGAIN = "pack the data again with tools/make_shards.py into a new folder"
_LARGEST_MANIFEST = 64 << 20
"""Bytes."""
_MOST_JOINTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a split."""

    tar: str
    """File name inside the split's folder."""
    index: str
    people: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class CropRule:
    """How much of a picture shards of crops hold, and how finely."""

    preset: str
    """The preset whose strongest draw decides the region."""
    reach: float
    """Side of the region / side of the person's box."""
    person_px: int
    """Most px that the side of a person's box has."""
    quality: int
    """Of the JPEGs."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds and how it was made."""

    split: str
    packing: str
    people: int
    joints: int
    skeleton: Skeleton
    shards: tuple[Shard, ...]
    max_width: int
    """Largest stored picture, px."""
    max_height: int
    source: dict[str, str]
    """Annotation file, its SHA-256, and the folder of pictures."""
    seed: int
    """Of the shuffle of people."""
    crop: CropRule | None = None
    """None where the pictures are the originals."""
    left_out: list[str] = field(default_factory=list)
    """People whose pictures could not be packed."""
    command: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height that no stored picture exceeds, px."""
        return self.max_width, self.max_height


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all."""
    text = json.dumps({**asdict(manifest), "skeleton": manifest.skeleton.plain()}, indent=1)
    write_whole(folder / MANIFEST, (text + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check what it says of itself. Raises InputError."""
    path = folder / MANIFEST
    try:
        raw = read_json(path, _LARGEST_MANIFEST)
    except FileNotFoundError as error:
        raise InputError(
            folder,
            "no manifest.json" if folder.is_dir() else "no such folder",
            "a folder of shards made by tools/make_shards.py",
            _what_else(folder) or "pack the data first: python tools/make_shards.py --help",
        ) from error
    except (ValueError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(path, f"not readable ({error})", "a manifest", PACK_AGAIN) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(path, "another kind of file", f"format {FORMAT!r}", PACK_AGAIN)
    if raw.get("format_version") != FORMAT_VERSION:
        found = f"format version {raw.get('format_version')}"
        raise InputError(path, found, f"format version {FORMAT_VERSION}", PACK_AGAIN)
    try:
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        raw["skeleton"] = skeleton_from_plain(raw["skeleton"])
        raw["crop"] = _crop_rule(raw["crop"]) if raw.get("crop") else None
        manifest = Manifest(**raw)
        _check_manifest(manifest)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(path, f"a damaged manifest ({error})", "a manifest", PACK_AGAIN) from error
    return manifest


def _what_else(folder: Path) -> str:
    """What was meant, perhaps, by a folder that is no split; empty if nothing near it is one."""
    parent = folder.parent
    if (parent / MANIFEST).is_file():
        return f"{parent} is itself a split; give the folder above it, {parent.parent}"
    for place in (folder, parent):  # the latter where a program has added the name of a split
        packed = sorted({each.parent.parent for each in place.glob(f"*/*/{MANIFEST}")})
        if packed:
            return f"give a folder of splits: {', '.join(map(str, packed[:4]))}"
    beside = sorted(each.parent for each in parent.glob(f"*/{MANIFEST}"))
    if beside:
        return f"pack that split too; there is {', '.join(map(str, beside[:4]))}"
    return ""


def _crop_rule(raw: dict[str, Any]) -> CropRule:
    rule = CropRule(
        preset=str(raw["preset"]),
        reach=float(raw["reach"]),
        person_px=int(raw["person_px"]),
        quality=int(raw["quality"]),
    )
    if not (0 < rule.reach < np.inf and rule.person_px > 0):
        raise ValueError(f"a crop of reach {rule.reach} and {rule.person_px} px")
    return rule


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless its numbers are possible and agree with each other."""
    shards = manifest.shards
    numbers = {
        "people": manifest.people, "max_width": manifest.max_width,
        "max_height": manifest.max_height, "joints": manifest.joints,
        **{f"{shard.tar}: people": shard.people for shard in shards},
        **{f"{shard.tar}: bytes": shard.bytes for shard in shards},
    }  # fmt: skip
    for name, value in numbers.items():
        if type(value) is not int or value <= 0:
            raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    if sum(shard.people for shard in shards) != manifest.people:
        raise ValueError("the shards' people do not add up to people")
    if manifest.skeleton.joint_count != manifest.joints or manifest.joints > _MOST_JOINTS:
        raise ValueError("joints are not those of the skeleton")
    names = [name for shard in shards for name in (shard.tar, shard.index)]
    for name in names:
        if not safe_name(name) or Path(name).name != name or names.count(name) > 1:
            raise ValueError(f"file name {name!r:.100}, which is not plain or is there twice")
    if (manifest.packing, manifest.crop is None) not in (("original", True), ("crop", False)):
        raise ValueError(f"packing {manifest.packing!r}, and the rule of crops {manifest.crop}")
    if not isinstance(manifest.source, dict) or not isinstance(manifest.left_out, list):
        raise ValueError("source or left_out of another kind")
