"""Verifies packed shards, byte by byte: python tools/check_shards.py data/shards/mpii --decode

Everything that the manifest says is compared with the files: SHA-256 of tars and indices, the
indices with the tars' own headers, counts, ranges of the records, and the JSON of each person with
the record. Exit codes: 0 all is well, 1 something is damaged, 2 the command line.
"""

import sys
from pathlib import Path

# `python tools/check_shards.py` puts tools/ on the path, and not the folder that holds configs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.cli import Parser, at_least, counting
from common.errors import InputError, run_main
from common.files import parse_json
from pipelines.annotations import safe_name
from pipelines.jpeg import PictureError, check_jpeg
from pipelines.shard_format import (
    IDENTITY_AFFINE,
    MANIFEST,
    Manifest,
    Shard,
    file_sha256,
    read_manifest,
    record_faults,
    record_length,
    unpack_records,
)
from pipelines.shards import COMPONENTS, LARGEST, index_text
from tools.pack_workers import crew, spread

EXIT_DAMAGED = 1
_ROUNDING = 1e-6
"""The JSON has float64 where the record has float32."""


class Task(NamedTuple):
    """One shard to check."""

    folder: Path
    shard: Shard
    manifest: Manifest
    decode: bool


class Fault(NamedTuple):
    """One thing that is wrong."""

    where: str
    """Shard, and key if it is one person's."""
    what: str


class Report(NamedTuple):
    """What the check of one shard came to."""

    people: int
    """As the manifest counts them."""
    keys: tuple[str, ...]
    rows: tuple[float, ...]
    faults: tuple[Fault, ...]


def main(argv: list[str] | None = None) -> int:
    """Check every split, print what is wrong, and say how it went."""
    options = make_parser().parse_args(argv)
    folders = split_folders(options.shards)
    faults, people = without_manifest(options.shards), 0
    with crew(options.workers) as pool:
        for folder in folders:
            try:
                manifest = read_manifest(folder)
            except InputError as error:
                faults.append(Fault(error.where, error.found))
                continue
            tasks = [Task(folder, shard, manifest, options.decode) for shard in manifest.shards]
            results = spread(pool, check_shard, tasks)
            reports = list(shown(results, folder, manifest))
            faults += [fault for report in reports for fault in report.faults]
            faults += repeated(folder, reports)
            people += manifest.people
    return conclude(faults, people, folders, options)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="check_shards.py",
        description="Verifies packed shards; exit code 0: whole, 1: damaged, 2: command line.",
        epilog="example: python tools/check_shards.py data/shards/mpii --decode",
    )
    add = parser.add_argument
    add("shards", type=Path, help="a split of shards, or the folder of its splits")
    add("--decode", action="store_true", help="decode every picture as packing does, too")
    cores = len(os.sched_getaffinity(0))
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


def without_manifest(folder: Path) -> list[Fault]:
    """Splits that hold tars and nothing that says what they hold."""
    tars = {path.parent for path in folder.glob("*/*.tar")}
    lost = sorted(path for path in tars if not (path / MANIFEST).is_file())
    return [Fault(str(path), f"no {MANIFEST} beside its tars") for path in lost]


def shown(results: Iterator[Report], folder: Path, manifest: Manifest) -> Iterator[Report]:
    """The reports, with a progress bar that counts people."""
    with counting(f"checking {folder.name}", manifest.people, "people") as advance:
        for report in results:
            advance(report.people)
            yield report


def check_shard(task: Task) -> Report:
    """Everything about one tar and its index. Never raises for what is in them."""
    shard = task.shard
    tar, index = task.folder / shard.tar, task.folder / shard.index
    faults = [*file_faults(tar, shard.bytes, shard.sha256)]
    faults += file_faults(index, None, shard.index_sha256)
    try:
        faults += index_faults(tar, index)
        keys, records, more = read_samples(task, tar)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        # OSError alone is what a missing file gives, and that is said above. tarfile calls itself
        # for each header of a long name.
        more = (
            [] if isinstance(error, FileNotFoundError) else [Fault(str(tar), f"no tar ({error})")]
        )
        return Report(shard.people, (), (), (*faults, *more))
    faults += more
    if len(keys) != shard.people:
        faults.append(Fault(str(tar), f"{len(keys)} people, the manifest says {shard.people}"))
    rows: tuple[float, ...] = ()
    if len(records):
        rows = tuple(unpack_records(records).row_N.tolist())
        faults += range_faults(tar, keys, records, task.manifest)
    return Report(shard.people, tuple(keys), rows, tuple(faults))


def file_faults(path: Path, size: int | None, digest: str) -> list[Fault]:
    """Whether a file is the one that the manifest describes."""
    if not path.is_file():
        return [Fault(str(path), "missing")]
    found = path.stat().st_size
    if size is not None and found != size:
        return [Fault(str(path), f"{found:,} bytes, the manifest says {size:,}")]
    if file_sha256(path) != digest:
        return [Fault(str(path), "its SHA-256 is not the one in the manifest")]
    return []


def index_faults(tar: Path, index: Path) -> list[Fault]:
    """Lines of the index that are not what the tar's own headers give."""
    wanted, found = index_text(tar).splitlines(), index.read_bytes().splitlines()
    faults = [] if len(wanted) == len(found) else [
        Fault(str(index), f"{len(found) - 1} people, the tar has {len(wanted) - 1}")
    ]  # fmt: skip
    for line, theirs in zip(wanted, found, strict=False):
        if line.encode() != theirs:
            key = line.split(" ")[-1].split(".")[0]
            faults.append(Fault(f"{index}: key {key}", "not where the tar has it"))
    return faults


def read_samples(task: Task, tar: Path) -> tuple[list[str], np.ndarray, list[Fault]]:
    """Keys and records of a tar's whole samples, and what is wrong with single ones."""
    keys, records, faults = list[str](), list[np.ndarray](), list[Fault]()
    length = record_length(task.manifest.joints)
    for key, parts, problem in samples_of(tar):
        where = f"{tar}: key {key}"
        if problem or set(parts) != set(COMPONENTS):
            faults.append(Fault(where, problem or f"components {', '.join(sorted(parts))} alone"))
        elif len(parts["f32"]) != 4 * length:
            faults.append(Fault(where, f"a record of {len(parts['f32'])} bytes, not {4 * length}"))
        else:
            record = np.frombuffer(parts["f32"], dtype="<f4")
            faults += [Fault(where, what) for what in sample_faults(task, record, parts)]
            records.append(record)
            keys.append(key)
    return keys, np.array(records).reshape(-1, length), faults


def samples_of(tar: Path) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Key, components, and what forbids to read them, of each sample in the tar's order."""
    key, parts, problem = "", dict[str, bytes](), ""
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            name = folder + slash + stem
            if name != key:
                if key:
                    yield key, parts, problem
                key, parts, problem = name, {}, ""
            if not member.isreg() or not safe_name(member.name) or "/" in member.name:
                problem = f"{member.name!r:.100} is no plain file of a plain name"
            elif member.size > LARGEST.get(extension, 0):
                problem = f"{member.size:,} bytes of {extension!r:.20}"
            else:
                file = archive.extractfile(member)
                parts[extension] = file.read() if file else b""
    if key:
        yield key, parts, problem


def range_faults(
    tar: Path, keys: list[str], records: np.ndarray, manifest: Manifest
) -> list[Fault]:
    """Records with impossible values."""
    return [
        Fault(f"{tar}: key {keys[place]}", f"a record with {what}")
        for what, bad in record_faults(records, manifest.largest).items()
        for place in np.flatnonzero(bad)
    ]


def sample_faults(task: Task, record: np.ndarray, parts: dict[str, bytes]) -> list[str]:
    """What is wrong with one person's JSON and picture."""
    faults = []
    try:
        differing = differences(parse_json(parts["json"]), record, task.manifest)
        if differing:
            faults.append(f"JSON and record differ in {', '.join(differing)}")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        faults.append(f"damaged JSON ({type(error).__name__}: {str(error)[:100]})")
    if task.decode:
        try:
            size = check_jpeg(parts["jpg"])
            if size != (record[5], record[6]):
                faults.append(f"a picture of {size[0]} x {size[1]} px, not as in the record")
        except PictureError as error:
            faults.append(f"picture: {error.reason}")
    return faults


def differences(facts: dict, record: np.ndarray, manifest: Manifest) -> list[str]:
    """Names of the fields in which a person's JSON is not what the record holds."""
    fields = unpack_records(record[None])
    joints = facts["joints"]
    if tuple(joints) != manifest.skeleton.names:
        return ["joints' names"]
    points = [[joint["x"], joint["y"]] for joint in joints.values()]
    affine = facts.get("image_from_stored", np.reshape(IDENTITY_AFFINE, (2, 3)))
    pairs = {
        "row": (facts["row"], fields.row_N[0]),
        "center": (facts["center"], fields.center_N2[0]),
        "scale": (facts["scale"], fields.scale_N[0]),
        "normalize": (facts["normalize"], fields.normalize_N[0]),
        "size": ([facts["width"], facts["height"]], fields.size_N2[0]),
        "image_from_stored": (affine, fields.image_from_stored_N23[0]),
        "joints": (points, fields.joints_NJ2[0]),
        "marked": ([joint["marked"] for joint in joints.values()], fields.marked_NJ[0]),
        "visible": ([joint["visible"] for joint in joints.values()], fields.visible_NJ[0]),
    }
    if not safe_name(facts["image"]):
        raise ValueError(f"file name {facts['image']!r}")
    return [name for name, (told, held) in pairs.items() if not _equal(told, held)]


def _equal(told: object, held: np.ndarray) -> bool:
    values = np.asarray(told, dtype=np.float64)
    return values.shape == np.shape(held) and np.allclose(values, held, rtol=_ROUNDING, atol=1e-9)


def repeated(folder: Path, reports: list[Report]) -> list[Fault]:
    """Keys and rows of the annotation that a split has more than once."""
    faults = []
    for what, values in (
        ("key", [key for report in reports for key in report.keys]),
        ("row", [row for report in reports for row in report.rows]),
    ):
        twice = [value for value, count in Counter(values).items() if count > 1]
        faults += [Fault(str(folder), f"{what} {value} more than once") for value in twice]
    return faults


def conclude(
    faults: list[Fault], people: int, folders: list[Path], options: argparse.Namespace
) -> int:
    """Print the faults, bounded, and the sum. Returns the exit code."""
    splits = " and ".join(folder.name for folder in folders)
    for fault in faults[: options.show]:
        print(f"{fault.where}: {fault.what}")
    if len(faults) > options.show:
        print(f"... and {len(faults) - options.show:,} more")
    pictures = "pictures decoded" if options.decode else "pictures not decoded (--decode)"
    if not faults:
        print(f"{options.shards}: {people:,} people of {splits}, all is well; {pictures}")
        return 0
    print(f"{options.shards}: DAMAGED, {len(faults):,} fault(s); {people:,} people; {pictures}")
    print("next: restore these files from a copy, or pack again with tools/make_shards.py")
    return EXIT_DAMAGED


if __name__ == "__main__":
    run_main(main)
