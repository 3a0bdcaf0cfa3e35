"""The on-disk format of a split of shards: the record of a person, and manifest.json.

A record is a row of little-endian float32 numbers, which DALI reads without parsing: the fields of
COLUMNS, then (x, y, marked, visible) for each of the J joints. A joint that is visible, but not
marked, is ignored by loss and metrics, as one that its data set does not label
(docs/conventions.md, Missing joints).
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_origin

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import LARGEST_JSON, parse_json, read_bytes, read_json, write_atomic
from configs.skeleton import Skeleton, skeleton_from_dict
from pipelines.annotations import People, safe_name

COLUMNS: dict[str, Any] = {
    "row": 0,  # in the annotation file's split, from 0
    "center": slice(1, 3),  # x, y in image px
    "scale": 3,  # box side / 200 px
    "normalize": 4,  # px, 0 if unknown
    "size": slice(5, 7),  # width and height of the stored picture, px
    "image_from_stored": slice(7, 13),  # affine of pixel centres, px, row by row
}
"""Index of each field in a record."""
HEADER_LENGTH = 13
IDENTITY_AFFINE: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
IGNORED = (0.0, 0.0, 0.0, 1.0)
"""x, y, marked, visible of a joint that is neither trained nor scored."""

PICTURE_EXTENSIONS = {"original": "jpg", "crop": "jpg", "raw": "i420"}
"""`packing` of the manifest -> extension of the stored picture (raw: pipelines/i420.py)."""
INDEX_VERSION = "v1.2"
FORMAT = "stacked-hourglass-shards"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PEOPLE = "people.json"
"""Records and pictures' names of a split, so that the tars need not be read for them."""
SPLITS = ("train", "valid")
PACK_AGAIN = "pack the data again with tools/make_shards.py into a new folder"
_MAX_MANIFEST = 64 << 20


class Records(NamedTuple):
    """Fields of a batch of records, numpy arrays or torch tensors. Units: docs/conventions.md."""

    row_N: Any
    center_N2: Any
    scale_N: Any
    normalize_N: Any
    size_N2: Any
    """Width and height of the stored picture, px."""
    image_from_stored_N23: Any
    joints_NJ2: Any
    marked_NJ: Any
    visible_NJ: Any

    @property
    def ignored_NJ(self) -> Any:
        """Joints that are neither trained nor scored: visible, but not marked."""
        return self.visible_NJ & ~self.marked_NJ


def record_length(joints: int) -> int:
    """Number of float32 values in the record of a person with that many joints."""
    return HEADER_LENGTH + 4 * joints


def record_of(
    people: People,
    row: int,
    width: int,
    height: int,
    image_from_stored: tuple[float, ...] = IDENTITY_AFFINE,
) -> npt.NDArray[np.float64]:
    """(record_length,) float64 record of one person.

    width, height: of the stored picture, px. image_from_stored: six numbers, row by row.
    """
    facts = np.stack([people.marked[row], people.visible[row]], axis=-1)
    joints = np.concatenate([people.joints[row], facts], axis=-1)
    header = [row, *people.center[row], people.scale[row], people.normalize[row], width, height]
    return np.concatenate([header, image_from_stored, joints.ravel()])


def unpack_records(records_NR: Any) -> Records:
    """Split (N, record_length) records into fields; the results are views where possible."""
    count = records_NR.shape[0]
    joints_NJ4 = records_NR[:, HEADER_LENGTH:].reshape(count, -1, 4)
    return Records(
        row_N=records_NR[:, COLUMNS["row"]],
        center_N2=records_NR[:, COLUMNS["center"]],
        scale_N=records_NR[:, COLUMNS["scale"]],
        normalize_N=records_NR[:, COLUMNS["normalize"]],
        size_N2=records_NR[:, COLUMNS["size"]],
        image_from_stored_N23=records_NR[:, COLUMNS["image_from_stored"]].reshape(count, 2, 3),
        joints_NJ2=joints_NJ4[..., :2],
        marked_NJ=joints_NJ4[..., 2] > 0,
        visible_NJ=joints_NJ4[..., 3] > 0,
    )


def people_sha256(records_NR: npt.NDArray[np.float32]) -> str:
    """Hexadecimal SHA-256 of the people and their order; equal for all packings of one split."""
    picture_fields = np.r_[COLUMNS["size"], COLUMNS["image_from_stored"]]
    people = np.delete(records_NR, picture_fields, axis=1)
    return hashlib.sha256(np.ascontiguousarray(people, dtype="<f4").tobytes()).hexdigest()


def person_json(
    people: People,
    row: int,
    skeleton: Skeleton,
    width: int,
    height: int,
    image_from_stored: tuple[float, ...] = IDENTITY_AFFINE,
) -> bytes:
    """The JSON component of a sample: the fields of its record with names, UTF-8."""
    columns = (people.joints[row], people.marked[row], people.visible[row])
    joints = {
        name: {"x": x, "y": y, "marked": marked, "visible": visible}
        for name, (x, y), marked, visible in zip(
            skeleton.names, *(column.tolist() for column in columns), strict=True
        )
    }
    facts = {
        "image": people.images[row],
        "row": int(row),
        "index": int(people.index[row]),
        "person": int(people.person[row]),
        "center": people.center[row].tolist(),
        "scale": float(people.scale[row]),
        "normalize": float(people.normalize[row]),
        "width": width,
        "height": height,
        "joints": joints,
    }
    if people.area is not None and people.ignored is not None:
        facts |= {"area": float(people.area[row]), "ignored": people.ignored[row]}
    if image_from_stored != IDENTITY_AFFINE:
        facts["image_from_stored"] = [image_from_stored[:3], image_from_stored[3:]]
    return json.dumps(facts, indent=1).encode()


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
    """Extent and resolution of stored crops."""

    preset: str
    """The preset whose largest crop is stored."""
    extent: float
    """Side of the stored region / side of the person's box."""
    person_px: int
    """Maximum side of a person's box, stored px."""
    quality: int
    """JPEG quality; 0 for raw pictures."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards contains and how it was made."""

    split: str
    packing: str
    """A key of PICTURE_EXTENSIONS."""
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
    """Random seed of the order of people."""
    crop: CropRule | None = None
    """None if the pictures are the originals."""
    left_out: list[str] = field(default_factory=list)
    """People whose pictures could not be packed."""
    command: str = ""
    people_file_sha256: str
    """SHA-256 of people.json."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_people_file(folder: Path, records_NR: npt.NDArray[np.float32], people: People) -> str:
    """Write people.json; returns its SHA-256. Both arguments in the order of the samples."""
    facts = {
        "records": base64.b64encode(records_NR.astype("<f4").tobytes()).decode(),
        "image": people.images,
        "index": people.index.tolist(),
        "person": people.person.tolist(),
    }
    if people.area is not None and people.ignored is not None:
        facts |= {"area": people.area.tolist(), "ignored": people.ignored.tolist()}
    write_atomic(folder / PEOPLE, json.dumps(facts).encode())
    return file_sha256(folder / PEOPLE)


def read_people_file(
    folder: Path, manifest: "Manifest"
) -> tuple[npt.NDArray[np.float32], dict[str, list[Any]]]:
    """(N, record_length) records, read-only, and the other columns by name. Raises InputError."""
    path = folder / PEOPLE
    try:
        data = read_bytes(path, LARGEST_JSON)
        if hashlib.sha256(data).hexdigest() != manifest.people_file_sha256:
            raise ValueError("its SHA-256 is not the one in the manifest")
        columns = parse_json(data)
        values = np.frombuffer(base64.b64decode(columns.pop("records")), dtype="<f4")
        records_NR = values.reshape(manifest.people, record_length(manifest.joints))
    except (OSError, ValueError) as error:
        found = f"damaged ({error})"
        raise InputError(path, found, f"{manifest.people:,} people", PACK_AGAIN) from error
    return records_NR, columns


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically."""
    text = json.dumps({**asdict(manifest), "skeleton": manifest.skeleton.as_dict()}, indent=1)
    write_atomic(folder / MANIFEST, (text + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json. Raises InputError."""
    path = folder / MANIFEST
    try:
        return _manifest(read_json(path, _MAX_MANIFEST))
    except FileNotFoundError as error:
        found = "no manifest.json" if folder.is_dir() else "no such folder"
        advice = "give the folder above the splits, or pack the data with tools/make_shards.py"
        raise InputError(folder, found, "a folder of shards", advice) from error
    except (ValueError, KeyError, NotADirectoryError, IsADirectoryError) as error:
        found, expected = f"a damaged manifest ({error})", f"{FORMAT} {FORMAT_VERSION}"
        raise InputError(path, found, expected, PACK_AGAIN) from error


def _manifest(raw: Any) -> Manifest:
    """The manifest of a JSON value. Raises ValueError or KeyError."""
    if not isinstance(raw, dict) or raw["format"] != FORMAT:
        raise ValueError("another kind of file")
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {raw['format_version']!r:.50}")
    if not raw["shards"] or type(raw["shards"]) is not list or type(raw["skeleton"]) is not dict:
        raise ValueError("no list of shards, or no skeleton")
    shards = tuple(_parse(Shard, shard) for shard in raw["shards"])
    if raw["packing"] not in tuple(PICTURE_EXTENSIONS):
        raise ValueError(f"packing {raw['packing']!r:.50}")
    skeleton = skeleton_from_dict(raw["skeleton"])
    crop = _parse(CropRule, raw["crop"]) if raw["crop"] else None
    manifest = _parse(Manifest, {**raw, "shards": shards, "skeleton": skeleton, "crop": crop})
    if sum(shard.people for shard in shards) != manifest.people:
        raise ValueError("the shards' people do not add up to the total")
    if skeleton.joint_count != manifest.joints:
        raise ValueError("the number of joints is not the skeleton's")
    for shard in shards:
        for name in (shard.tar, shard.index):
            if not safe_name(name) or Path(name).name != name:
                raise ValueError(f"file name {name!r:.100}")
    return manifest


def _parse(cls: Any, raw: Any) -> Any:
    """A dataclass from a dict of all its fields. Raises ValueError."""
    kinds: dict[str, Any] = {each.name: get_origin(each.type) or each.type for each in fields(cls)}
    if not isinstance(raw, dict) or raw.keys() != kinds.keys():
        raise ValueError(f"the fields of a {cls.__name__} are not {', '.join(kinds)}")
    for name, kind in kinds.items():
        if kind is not UnionType and not isinstance(raw[name], kind):
            raise ValueError(f"{name} is {raw[name]!r:.100}")
    return cls(**raw)
