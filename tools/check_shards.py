"""Verifies packed shards, byte by byte: python tools/check_shards.py data/shards/mpii --decode

Everything that the manifest says is compared with the files: SHA-256 of tars and indices, the
indices with the tars' own headers, counts, ranges of the records, and the JSON of each person with
the record. Exit codes: 0 all is well, 1 something is damaged, 2 the command line.
"""

import sys
from pathlib import Path

# `python tools/check_shards.py` puts tools/ on the path, and not the folder that holds configs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools
import math
import tarfile
from collections import Counter
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.cli import Parser, at_least, counting
from common.errors import InputError, run_main
from common.files import parse_json
from common.system import usable_cores
from pipelines.annotations import safe_name
from pipelines.jpeg import PictureError, check_jpeg
from pipelines.packing import index_text, worker_pool
from pipelines.shard_format import (
    COMPONENTS,
    IDENTITY_AFFINE,
    LARGEST,
    MANIFEST,
    Manifest,
    Shard,
    file_sha256,
    read_manifest,
    record_faults,
    record_length,
    unpack_records,
)

EXIT_DAMAGED = 1
_LARGEST_NUMBER, _ROUNDING = 1e15, 1e-6
"""Of a JSON: no number is larger, and it has float64 where the record has float32."""


class Task(NamedTuple):
    """One shard to check."""

    folder: Path
    shard: Shard
    manifest: Manifest
    decode: bool


class Report(NamedTuple):
    """The result for one shard."""

    people: int
    """As the manifest counts them."""
    keys: list[str]
    rows: list[float]
    faults: list[str]
    """Each begins with the path, and the key if it is one person's."""


def main(argv: list[str] | None = None) -> int:
    """Check every split and print what is damaged. Returns the exit code."""
    options = make_parser().parse_args(argv)
    folders = split_folders(options.shards)
    tar_folders = {path.parent for path in options.shards.glob("*/*.tar")}
    lost = sorted(folder for folder in tar_folders if not (folder / MANIFEST).is_file())
    faults, people = [f"{folder}: no {MANIFEST} beside its tars" for folder in lost], 0
    with worker_pool(options.workers) as map_tasks:
        for folder in folders:
            try:
                manifest = read_manifest(folder)
            except InputError as error:
                faults.append(f"{error.where}: {error.found}")
                continue
            tasks = [Task(folder, shard, manifest, options.decode) for shard in manifest.shards]
            reports = []
            with counting(f"checking {folder.name}", manifest.people, "people") as advance:
                for report in map_tasks(check_shard, tasks):
                    reports.append(report)
                    advance(report.people)
            faults += [fault for report in reports for fault in report.faults]
            faults += repeated(folder, "key", [key for report in reports for key in report.keys])
            faults += repeated(folder, "row", [row for report in reports for row in report.rows])
            people += manifest.people

    for fault in faults[: options.show]:
        print(fault)
    if len(faults) > options.show:
        print(f"... and {len(faults) - options.show:,} more")
    pictures = "pictures decoded" if options.decode else "pictures not decoded (--decode)"
    if not faults:
        splits = " and ".join(folder.name for folder in folders)
        print(f"{options.shards}: {people:,} people of {splits}, all is well; {pictures}")
        return 0
    print(f"{options.shards}: DAMAGED, {len(faults):,} fault(s); {people:,} people; {pictures}")
    print("next: restore these files from a copy, or pack again with tools/make_shards.py")
    return EXIT_DAMAGED


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="check_shards.py",
        description="Verifies packed shards; exit code 0: whole, 1: damaged, 2: command line.",
        epilog="example: python tools/check_shards.py data/shards/mpii --decode",
    )
    add = parser.add_argument
    add("shards", type=Path, help="a split of shards, or the folder of its splits")
    add("--decode", action="store_true", help="also decode every picture, as packing does")
    cores = usable_cores()
    add("--workers", type=at_least(0), default=cores, help="processes (default: all cores)")
    add(
        "--show",
        type=at_least(0),
        default=20,
        help="faults to list before the rest is counted (default: %(default)s)",
    )
    return parser


def split_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a split, else the splits in it. Raises InputError for none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    splits = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not splits:
        raise InputError(
            folder,
            f"no {MANIFEST} in it or in its folders" if folder.is_dir() else "no such folder",
            "a folder of shards made by tools/make_shards.py",
            "give the folder that was packed with --output",
        )
    return splits


def check_shard(task: Task) -> Report:
    """Everything about one tar and its index."""
    shard = task.shard
    tar, index = task.folder / shard.tar, task.folder / shard.index
    faults = file_faults(tar, shard.bytes, shard.sha256)
    faults += file_faults(index, None, shard.index_sha256)
    try:
        with tarfile.open(tar, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        # tarfile calls itself for each header of a long name.
        faults += [f"{tar}: no tar ({error})"] if tar.is_file() else []
        return Report(shard.people, [], [], faults)
    if index.is_file():
        faults += index_faults(index, index_text(members).splitlines())
    length = record_length(task.manifest.joints)
    keys, records = [], []
    with tar.open("rb") as file:
        for key, group in itertools.groupby(members, lambda member: member.name.split(".")[0]):
            parts, sample_fault = read_sample(file, list(group), length)
            if sample_fault:
                faults.append(f"{tar}: key {key}: {sample_fault}")
                continue
            record = np.frombuffer(parts["f32"], dtype="<f4")
            faults += [f"{tar}: key {key}: {fault}" for fault in sample_faults(task, record, parts)]
            keys.append(key)
            records.append(record)
    if len(keys) != shard.people:
        faults.append(f"{tar}: {len(keys)} people, the manifest says {shard.people}")
    table = np.array(records, dtype=np.float32).reshape(-1, length)
    for fault, is_bad in record_faults(table, task.manifest.largest).items():
        faults += [f"{tar}: key {keys[i]}: a record with {fault}" for i in np.flatnonzero(is_bad)]
    return Report(shard.people, keys, unpack_records(table).row_N.tolist(), faults)


def file_faults(path: Path, size: int | None, digest: str) -> list[str]:
    """Whether a file is the one that the manifest describes."""
    if not path.is_file():
        return [f"{path}: missing"]
    found = path.stat().st_size
    if size is not None and found != size:
        return [f"{path}: {found:,} bytes, the manifest says {size:,}"]
    if file_sha256(path) != digest:
        return [f"{path}: its SHA-256 is not the one in the manifest"]
    return []


def index_faults(index: Path, expected: list[str]) -> list[str]:
    """Lines of the index that differ from those made from the tar's headers."""
    found, faults = index.read_bytes().splitlines(), []
    if len(expected) != len(found):
        faults = [f"{index}: {len(found) - 1} people, the tar has {len(expected) - 1}"]
    for line, theirs in zip(expected, found, strict=False):
        if line.encode() != theirs:
            key = line.split(" ")[-1].split(".")[0]
            faults.append(f"{index}: key {key}: not where the tar has it")
    return faults


def read_sample(
    file: BinaryIO, members: list[tarfile.TarInfo], length: int
) -> tuple[dict[str, bytes], str]:
    """The components of a sample, and what is wrong with its files (empty: nothing)."""
    parts = {}
    for member in members:
        extension = member.name.partition(".")[2]
        if not member.isreg() or not safe_name(member.name) or "/" in member.name:
            return {}, f"{member.name!r:.100} is no plain file of a plain name"
        if member.size > LARGEST.get(extension, 0):
            return {}, f"{member.size:,} bytes of {extension!r:.20}"
        file.seek(member.offset_data)
        parts[extension] = file.read(member.size)
    if set(parts) != set(COMPONENTS):
        return {}, f"components {', '.join(sorted(parts))} alone"
    if len(parts["f32"]) != 4 * length:
        return {}, f"a record of {len(parts['f32'])} bytes, not {4 * length}"
    return parts, ""


def sample_faults(task: Task, record: np.ndarray, parts: dict[str, bytes]) -> list[str]:
    """What is wrong with one person's JSON and picture."""
    faults = []
    fields = unpack_records(record[None])
    try:
        facts = parse_json(parts["json"])
    except ValueError as error:
        faults.append(f"damaged JSON ({error})")
    else:
        names = differing_fields(facts, record, task.manifest.skeleton.names)
        faults += [f"JSON and record differ in {', '.join(names)}"] if names else []
    if task.decode:
        try:
            size = check_jpeg(parts["jpg"])
            if list(size) != fields.size_N2[0].tolist():
                faults.append(f"a picture of {size[0]} x {size[1]} px, not as in the record")
        except PictureError as error:
            faults.append(f"picture: {error.reason}")
    return faults


def differing_fields(facts: Any, record: np.ndarray, joint_names: tuple[str, ...]) -> list[str]:
    """Fields in which a person's JSON differs from the record."""
    if not isinstance(facts, dict):
        return ["all fields"]
    fields = unpack_records(record[None])
    width, height = fields.size_N2[0].tolist()
    joints = zip(
        joint_names, fields.joints_NJ2[0], fields.marked_NJ[0], fields.visible_NJ[0], strict=True
    )
    expected = {
        "row": fields.row_N[0],
        "center": fields.center_N2[0].tolist(),
        "scale": fields.scale_N[0],
        "normalize": fields.normalize_N[0],
        "width": width,
        "height": height,
        "joints": {
            name: {"x": x, "y": y, "marked": marked, "visible": visible}
            for name, (x, y), marked, visible in joints
        },
        "image_from_stored": fields.image_from_stored_N23[0].tolist(),
    }
    original = {"image_from_stored": np.reshape(IDENTITY_AFFINE, (2, 3)).tolist()}
    names = [name for name in expected if differs(expected[name], {**original, **facts}.get(name))]
    image = facts.get("image")
    return names if isinstance(image, str) and safe_name(image) else [*names, "image"]


def differs(expected: Any, found: Any) -> bool:
    """Whether a JSON value is another structure, or has another number in it."""
    if isinstance(expected, dict):
        return (
            not isinstance(found, dict)
            or found.keys() != expected.keys()
            or any(differs(value, found[key]) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return (
            not isinstance(found, list)
            or len(found) != len(expected)
            or any(differs(*pair) for pair in zip(expected, found, strict=True))
        )
    is_number = isinstance(found, int | float) and abs(found) < _LARGEST_NUMBER
    return not (is_number and math.isclose(found, expected, rel_tol=_ROUNDING, abs_tol=1e-9))


def repeated(folder: Path, what: str, values: list[Any]) -> list[str]:
    """Keys, or rows of the annotation, that a split has more than once."""
    counts = Counter(values).items()
    return [f"{folder}: {what} {value} more than once" for value, count in counts if count > 1]


if __name__ == "__main__":
    run_main(main)
