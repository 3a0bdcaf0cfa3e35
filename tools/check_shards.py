"""Verifies packed shards, byte by byte: python tools/check_shards.py data/shards/mpii --decode

Checks the SHA-256 of every file. Exit codes: 0 intact, 1 damaged, 2 bad options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from common.cli import Parser, at_least, progress
from common.errors import InputError, run_main
from common.system import usable_cores
from pipelines.jpeg import PictureError, check_jpeg
from pipelines.object_storage import StorageError
from pipelines.packing import worker_pool
from pipelines.shard_cache import ORIGIN, ShardCache, local_folder
from pipelines.shard_format import MANIFEST, Manifest, file_sha256, read_manifest
from pipelines.shards import ShardSet

EXIT_DAMAGED = 1
FAULTS_SHOWN = 20
CACHE_GB = 10.0
"""Size of the temporary cache in which a URL's tars are checked."""


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
            faults += split_faults(folder, manifest, options.decode, map_tasks)
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


def split_faults(
    folder: Path, manifest: Manifest, decode: bool, map_tasks: Callable[..., Iterator[Any]]
) -> list[str]:
    """What is wrong with a split; each line begins with the path, and the key if it is a person.

    Pictures are decoded only if all indices can be read.
    """
    faults, pictures = [], None
    try:
        shards = ShardSet(folder)
        pictures = shards if decode and not shards.is_raw else None
        shards.people()
    except InputError as error:
        faults.append(f"{error.where}: {error.found}")
    check_one = partial(shard_faults, folder, manifest, pictures)
    with progress(None, f"checking {folder.name}", "people", manifest.people) as bar:
        for number, found in enumerate(map_tasks(check_one, range(len(manifest.shards)))):
            faults += found
            bar.update(manifest.shards[number].people)
    return faults


def shard_faults(
    folder: Path, manifest: Manifest, pictures: ShardSet | None, number: int
) -> list[str]:
    """What is wrong with one tar and its index. pictures: of the split, to be decoded."""
    shard = manifest.shards[number]
    if (folder / ORIGIN).is_file():
        try:
            # Kept open during the check, so that no other process removes it.
            _file = ShardCache(folder, manifest.shards).file(number)
        except StorageError as error:
            return [f"{error.where}: {error.found}"]
    tar, index = folder / shard.tar, folder / shard.index
    faults = file_faults(tar, shard.sha256) + file_faults(index, shard.index_sha256)
    if pictures:
        for sample in np.flatnonzero(pictures.shard_of_sample == number).tolist():
            try:
                check_jpeg(pictures.picture(sample))
            except PictureError as error:
                faults.append(f"{pictures.where(sample)}: picture: {error}")
    return faults


def file_faults(path: Path, digest: str) -> list[str]:
    """Compare a file with its SHA-256 in the manifest."""
    if not path.is_file():
        return [f"{path}: missing"]
    is_same = file_sha256(path) == digest
    return [] if is_same else [f"{path}: its SHA-256 is not the one in the manifest"]


if __name__ == "__main__":
    run_main(main)
