"""Verifies packed shards, byte by byte: python tools/check_shards.py data/shards/mpii --decode

Checks SHA-256 of tars and indices, indices against the tars' headers, counts, ranges of the
records, and each person's JSON against the record. Exit codes: 0 intact, 1 damaged, 2 bad options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import itertools
import math
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.cli import Parser, at_least, progress_bar
from common.errors import InputError, run_main
from common.files import parse_json
from common.system import usable_cores
from pipelines.annotations import safe_name
from pipelines.jpeg import PictureError, check_jpeg
from pipelines.object_storage import StorageError
from pipelines.packing import index_text, worker_pool
from pipelines.shard_cache import ORIGIN, ShardCache, local_folder
from pipelines.shard_format import (
    COLUMNS,
    IDENTITY_AFFINE,
    LARGEST,
    MANIFEST,
    PEOPLE,
    PICTURE_EXTENSIONS,
    Manifest,
    Shard,
    components,
    file_sha256,
    is_person,
    read_manifest,
    record_faults,
    record_length,
    unpack_records,
)

EXIT_DAMAGED = 1
FAULTS_SHOWN = 20
CACHE_GB = 10.0
"""Size of the temporary cache in which a URL's tars are checked."""


class Report(NamedTuple):
    """The result for one shard."""

    people: int
    """According to the manifest."""
    keys: list[str]
    rows: list[float]
    faults: list[str]
    """Each begins with the path, and the key if it is one person's."""


def main(argv: list[str] | None = None) -> int:
    """Check every split and print what is damaged. Returns the exit code."""
    options = make_parser().parse_args(argv)
    # Object storage is fetched again into an empty cache, not read from the user's cache.
    with tempfile.TemporaryDirectory() as cache:
        return check(local_folder(options.shards, cache, CACHE_GB), options)


def check(location: Path, options: argparse.Namespace) -> int:
    """Check every split of a folder. Returns the exit code."""
    folders = split_folders(location)
    tars = location.glob("*/*.tar")
    lost = sorted({tar.parent for tar in tars if not (tar.parent / MANIFEST).is_file()})
    faults, people = [f"{folder}: no {MANIFEST} beside its tars" for folder in lost], 0
    with worker_pool(options.workers) as map_tasks:
        for folder in folders:
            try:
                manifest = read_manifest(folder)
            except InputError as error:
                faults.append(f"{error.where}: {error.found}")
                continue
            if manifest.people_file_sha256:
                faults += file_faults(folder / PEOPLE, manifest.people_file_sha256)
            check_one = partial(check_shard, folder, manifest, options.decode)
            reports = []
            with progress_bar(f"checking {folder.name}", manifest.people, "people") as advance:
                for report in map_tasks(check_one, manifest.shards):
                    reports.append(report)
                    advance(report.people)
            faults += [fault for report in reports for fault in report.faults]
            faults += repeated(folder, "key", [key for report in reports for key in report.keys])
            faults += repeated(folder, "row", [row for report in reports for row in report.rows])
            people += manifest.people

    pictures = "pictures decoded" if options.decode else "pictures not decoded (--decode)"
    if not faults:
        splits = " and ".join(folder.name for folder in folders)
        print(f"{options.shards}: {people:,} people of {splits}, no damage found; {pictures}")
        return 0
    print("\n".join(faults[:FAULTS_SHOWN]))
    if len(faults) > FAULTS_SHOWN:
        print(f"... and {len(faults) - FAULTS_SHOWN:,} more")
    print(f"{options.shards}: DAMAGED, {len(faults):,} fault(s); {people:,} people; {pictures}")
    print("next: restore these files from a copy, or pack again with tools/make_shards.py")
    return EXIT_DAMAGED


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="check_shards.py",
        description="Verifies packed shards; exit code 0: intact, 1: damaged, 2: bad options.",
        epilog="example: python tools/check_shards.py data/shards/mpii --decode",
    )
    add = parser.add_argument
    add("shards", help="a split, or the folder of splits, or the URL of either")
    add("--decode", action="store_true", help="also decode every JPEG, as packing does")
    add("--workers", type=at_least(0), default=usable_cores(), help="processes (default: all)")
    return parser


def split_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a split, else the splits in it. Raises InputError for none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    splits = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not splits:
        found = f"no {MANIFEST} in it or in its folders" if folder.is_dir() else "no such folder"
        raise InputError(folder, found, "shards", "give the --output of tools/make_shards.py")
    return splits


def check_shard(folder: Path, manifest: Manifest, decode: bool, shard: Shard) -> Report:
    """Check one tar and its index."""
    if (folder / ORIGIN).is_file():
        try:
            # Kept open during the check, so that no other process removes it.
            _file = ShardCache(folder, manifest.shards).file(manifest.shards.index(shard))
        except StorageError as error:
            return Report(shard.people, [], [], [f"{error.where}: {error.found}"])
    tar, index = folder / shard.tar, folder / shard.index
    faults = file_faults(tar, shard.sha256) + file_faults(index, shard.index_sha256)
    try:
        with tarfile.open(tar, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        # tarfile calls itself for each header of a long name.
        faults += [f"{tar}: no tar ({error})"] if tar.is_file() else []
        return Report(shard.people, [], [], faults)
    if index.is_file() and index.read_bytes() != index_text(members).encode():
        faults.append(f"{index}: not the index of its tar")
    keys, records, picture_bytes = [], [], []
    with tar.open("rb") as file:
        for key, group in itertools.groupby(members, lambda member: member.name.split(".")[0]):
            parts, found = read_sample(file, list(group), manifest)
            if not found:
                keys.append(key)
                records.append(np.frombuffer(parts["f32"], dtype="<f4"))
                picture_bytes.append(len(parts[PICTURE_EXTENSIONS[manifest.packing]]))
                found = sample_faults(parts, records[-1], manifest.skeleton.names, decode)
            faults += [f"{tar}: key {key}: {fault}" for fault in found]
    if len(keys) != shard.people:
        faults.append(f"{tar}: {len(keys)} people, the manifest says {shard.people}")
    if not records:
        return Report(shard.people, [], [], faults)
    records_NR = np.stack(records)
    for fault, is_bad in record_faults(records_NR, manifest, picture_bytes).items():
        faults += [f"{tar}: key {keys[i]}: a record with {fault}" for i in np.flatnonzero(is_bad)]
    return Report(shard.people, keys, unpack_records(records_NR).row_N.tolist(), faults)


def file_faults(path: Path, digest: str) -> list[str]:
    """Compare a file with its SHA-256 in the manifest."""
    if not path.is_file():
        return [f"{path}: missing"]
    is_same = file_sha256(path) == digest
    return [] if is_same else [f"{path}: its SHA-256 is not the one in the manifest"]


def read_sample(
    file: BinaryIO, members: list[tarfile.TarInfo], manifest: Manifest
) -> tuple[dict[str, bytes], list[str]]:
    """The components of a sample, and why it cannot be read."""
    parts, record_bytes = {}, 4 * record_length(manifest.joints)
    for member in members:
        extension = member.name.partition(".")[2]
        if not member.isreg() or not safe_name(member.name) or "/" in member.name:
            return {}, [f"{member.name!r:.100} is not a regular file with a plain name"]
        if member.size > LARGEST.get(extension, 0):
            return {}, [f"{member.size:,} bytes of {extension!r:.20}"]
        file.seek(member.offset_data)
        parts[extension] = file.read(member.size)
    if set(parts) != set(components(manifest.packing)):
        return {}, [f"only the components {', '.join(sorted(parts))}"]
    if len(parts["f32"]) != record_bytes:
        return {}, [f"a record of {len(parts['f32'])} bytes, not {record_bytes}"]
    return parts, []


def sample_faults(
    parts: dict[str, bytes], record_R: np.ndarray, joint_names: tuple[str, ...], decode: bool
) -> list[str]:
    """What is wrong with one person's JSON and picture."""
    faults = []
    try:
        facts = parse_json(parts["json"])
    except ValueError as error:
        faults.append(f"damaged JSON ({error})")
    else:
        if not json_matches(facts, record_R, joint_names):
            faults.append("JSON and record differ")
    if decode and "jpg" in parts:
        try:
            size = check_jpeg(parts["jpg"])
            if list(size) != record_R[COLUMNS["size"]].tolist():
                faults.append(f"a picture of {size[0]} x {size[1]} px, not as in the record")
        except PictureError as error:
            faults.append(f"picture: {error}")
    return faults


def json_matches(facts: Any, record_R: np.ndarray, joint_names: tuple[str, ...]) -> bool:
    """Whether a person's JSON has the same numbers as the record, and a safe file name."""
    if not is_person(facts) or not isinstance(facts.get("joints"), dict):
        return False
    size = [facts.get("width"), facts.get("height")]
    facts = {"image_from_stored": list(IDENTITY_AFFINE), **facts, "size": size}
    found = np.array(list(numbers([facts.get(name) for name in [*COLUMNS, "joints"]])))
    is_equal = found.shape == record_R.shape and np.allclose(found, record_R, rtol=1e-6, atol=1e-9)
    return is_equal and tuple(facts["joints"]) == joint_names


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a JSON value, depth first."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield float(value) if abs(value) < 1e15 else math.inf


def repeated(folder: Path, what: str, values: list[Any]) -> list[str]:
    """Keys, or rows of the annotation, that a split has more than once."""
    counts = Counter(values).items()
    return [f"{folder}: {what} {value} more than once" for value, count in counts if count > 1]


if __name__ == "__main__":
    run_main(main)
