"""Packs pictures and annotations into tar shards, one person a sample (pipelines/shards.py).

The pictures are stored as they are, or as crops that are smaller and faster to decode
(pipelines/crop_packing.py). Every picture is decoded before the first shard is written. A split is
written in a folder beside the output and moved there when it is whole, so that an interrupted run
can be continued and the output never holds half a split.
"""

import sys
from pathlib import Path

# `python tools/make_shards.py` puts tools/ on the path, and not the folder that holds configs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from common.cli import Parser, at_least, counting, progress
from common.errors import InputError, run_main
from configs.skeleton import MPII, PIXELS_PER_SCALE, Skeleton, load_skeleton
from pipelines.annotations import People, has_both_splits, read_annotations, split_file
from pipelines.augment import PRESETS
from pipelines.crop_packing import crop_region, crop_rule
from pipelines.jpeg import Picture, Verdict, find_picture, inspect_picture
from pipelines.shard_format import (
    FORMAT,
    FORMAT_VERSION,
    IDENTITY_AFFINE,
    MANIFEST,
    CropRule,
    Manifest,
    Shard,
    file_sha256,
    pack_record,
    person_json,
    read_manifest,
    record_length,
    write_manifest,
)
from tools.pack_tasks import Sample, Task, finish_shard
from tools.pack_workers import crew, spread
from tools.packing_summary import summary

SPLITS = ("train", "valid")
CHECKED = "checked.jsonl"
"""Of the folder of unfinished work: good pictures, which need not be decoded again."""
DATA = Path("data/mpii")
HOW_TO_GET_DATA = """download it into data/mpii:
    data/mpii/images  the pictures: mpii_human_pose_v1.tar.gz (12.9 GB) from the web site of MPII
                      Human Pose, human-pose.mpi-inf.mpg.de
    data/mpii/annot   train.h5 and valid.h5: data/MPII/annot of
                      github.com/princeton-vl/pytorch_stacked_hourglass
  or try it with drawn people first:
    python tools/make_synthetic.py --output data/synthetic
    python tools/make_shards.py --annotations data/synthetic/annot \\
      --images data/synthetic/images --output data/shards/synthetic"""
SHOWN, BAD = 10, "bad_pictures.txt"
"""Bad pictures on the screen; where all are listed if there are more."""
JPEG_QUALITY = 95
"""Of stored crops."""
# Bytes, to estimate the disk space: a tar's block and its end, a person's index line and JSON.
_BLOCK, _TAR_END, _INDEX_BYTES, _JSON_BYTES = 512, 10_240, 256, 3072
_BYTES_PER_PIXEL = 0.6
"""Of a very detailed stored crop; photographs have about 0.3."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for. Paths are absolute."""

    annotations: Path
    images: Path
    output: Path
    splits: tuple[str, ...]
    people_per_shard: int
    workers: int
    """Processes; with 0 and 1 this process does the work."""
    seed: int
    skip_bad: bool
    overwrite: bool
    packing: str
    skeleton: Path | None
    """YAML file of the joints; None for MPII's."""
    crop: CropRule | None
    """None if pictures are stored as they are."""
    command: str

    @property
    def partial(self) -> Path:
        """Where unfinished work lies: on the output's file system, so that a rename can move it."""
        if self.output.is_mount():
            return self.output / ".partial"
        return self.output.with_name(self.output.name + ".partial")


class Job(NamedTuple):
    """One split to pack."""

    split: str
    people: People
    skeleton: Skeleton
    source: dict[str, str]
    """Annotation file, its SHA-256 and the folder of pictures."""


def main(argv: list[str] | None = None) -> int:
    """Check everything, then write. Raises InputError."""
    began = time.monotonic()
    options = parse_options(argv)
    jobs = [job for job in read_jobs(options) if not already_packed(options, job)]
    if not jobs:
        return 0
    with explained(options), locked(options), crew(options.workers) as pool:
        verdicts = check_pictures(options, jobs, pool)
        plans = [claim(options, job, left_out(job, verdicts)) for job in jobs]
        manifests = [
            pack_split(options, job, plan, verdicts, pool)
            for job, plan in zip(jobs, plans, strict=True)
        ]
        remove_partial(options)
    summarise(options, manifests, time.monotonic() - began)
    return 0


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="make_shards.py",
        description="Packs pictures and annotations of people into tar shards for training.",
        epilog="example: python tools/make_shards.py --splits valid --output data/shards/mpii",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("what to pack").add_argument
    add("--annotations", type=Path, default=DATA / "annot",
        help="folder of train.h5 and valid.h5, or of train.json and valid.json in COCO's layout, "
        "or one such file, or mpii_annotations.json(.gz)")
    add("--skeleton", type=Path, metavar="YAML",
        help="the joints, for COCO's layout and for all joints but MPII's (docs/custom-data.md)")
    add("--images", type=Path, default=DATA / "images", help="folder of the JPEGs")
    add("--output", type=Path, default=Path("data/shards/mpii"), help="folder for a folder a split")
    add("--splits", nargs="+", choices=SPLITS, default=list(SPLITS),
        help="what to pack; one h5 or COCO file is the split named here, or in its file name")
    add = parser.add_argument_group("how").add_argument
    add("--people-per-shard", type=at_least(1), default=512, help="people in a tar")
    add("--workers", type=at_least(0), default=len(os.sched_getaffinity(0)), help="processes")
    add("--seed", type=at_least(0), default=0, help="of the order of people")
    add("--skip-bad", action="store_true", help="leave out people whose pictures are bad")
    add("--overwrite", action="store_true", help="replace another packing when the new is whole")
    add("--packing", choices=["original", "crop"], default="original",
        help="original: the bytes of the JPEG files as they are; crop: what augmentation can reach,"
        " shrunk (docs/conventions.md)")
    add("--reach", choices=list(PRESETS), default="hrnet",
        help="crop: the strongest data.preset that these shards will be trained with")
    add("--person-px", type=at_least(16), default=288,
        help="crop: most px of a person's box; an eighth more than data.input_px is enough")
    # fmt: on
    return parser


def parse_options(argv: list[str] | None) -> Options:
    """The command line, with paths made absolute."""
    given = vars(make_parser().parse_args(argv))
    reach, person_px = given.pop("reach"), given.pop("person_px")
    is_crop = given["packing"] == "crop"
    given["crop"] = crop_rule(reach, person_px, JPEG_QUALITY) if is_crop else None
    given["splits"] = _splits(given["annotations"], given["splits"])
    _require_data(given["annotations"], given["images"])
    for name in ("annotations", "images", "output"):
        given[name] = given[name].resolve()
    words = sys.argv[1:] if argv is None else argv
    return Options(**given, command=shlex.join(["python", "tools/make_shards.py", *words]))


def _splits(annotations: Path, asked: list[str]) -> tuple[str, ...]:
    splits = tuple(split for split in SPLITS if split in asked)
    if not annotations.is_file() or has_both_splits(annotations) or len(splits) == 1:
        return splits
    stem = annotations.name.split(".")[0]
    if stem in SPLITS:
        return (stem,)
    raise InputError(
        annotations,
        "one file for two splits",
        f"a file named after its split, {' or '.join(SPLITS)}, or one split",
        "say which split it is with --splits train or --splits valid",
    )


def _require_data(annotations: Path, images: Path) -> None:
    for path, option, default in (
        (annotations, "--annotations", DATA / "annot"),
        (images, "--images", DATA / "images"),
    ):
        if path == default and not path.exists():
            raise InputError(path, "no such folder", "MPII's data", HOW_TO_GET_DATA)
        if not path.exists() or (path == images and not path.is_dir()):
            raise InputError(path, "no such folder", "the data", f"name it with {option}")


def read_jobs(options: Options) -> list[Job]:
    """Annotations of the splits to pack."""
    jobs = []
    given = load_skeleton(options.skeleton) if options.skeleton else None
    for split in options.splits:
        people, skeleton = read_annotations(options.annotations, split, given)
        path = split_file(options.annotations, split)
        source = {
            "annotations": str(path),
            "sha256": file_sha256(path),
            "images": str(options.images),
        }
        jobs.append(Job(split, people, skeleton, source))
    return jobs


def plan_of(options: Options, job: Job, left_out: list[str]) -> str:
    """Fingerprint of all that decides what a split holds; two plans are never mixed."""
    facts = [
        FORMAT_VERSION, options.packing, options.people_per_shard, options.seed,
        job.split, job.source["sha256"], job.source["images"], left_out,
        *([asdict(options.crop)] if options.crop else []),
    ]  # fmt: skip
    if job.skeleton != MPII:  # packings of before there were others have the plan without
        facts.append(job.skeleton.plain())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def already_packed(options: Options, job: Job) -> bool:
    """Whether the output holds this very split. Raises InputError where it holds anything else."""
    folder = options.output / job.split
    if not os.path.lexists(folder):
        return False
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        ours = isinstance(raw, dict) and raw.get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise InputError(
            folder,
            "something that is not a folder of shards",
            "no such folder yet, or one packed by this program",
            "name another place with --output (--overwrite does not replace it either)",
        )
    if options.overwrite:
        return False
    manifest = read_manifest(folder)
    if manifest.source.get("plan") != plan_of(options, job, manifest.left_out):
        raise InputError(
            folder,
            f"another packing: {manifest.command}",
            "the same annotations, pictures, joints, packing, seed and --people-per-shard",
            "name another place with --output, or replace it with --overwrite",
        )
    left_out = f", {len(manifest.left_out)} left out" if manifest.left_out else ""
    print(f"{folder}: already packed, {manifest.people:,} people{left_out}")
    return True


@contextmanager
def explained(options: Options) -> Iterator[None]:
    """Say how to go on after Ctrl-C, a killed worker, or a disk that does not take it."""
    again = "run the same command again; it continues where it stopped"
    try:
        yield
    except KeyboardInterrupt:
        is_kept = options.partial.exists()
        kept = f"Finished work is kept in {options.partial}" if is_kept else "Nothing is done yet"
        print(f"\nStopped. {kept}: {again}.", file=sys.stderr)
        raise
    except BrokenProcessPool as error:
        where, next_step = f"--workers {options.workers}", f"with fewer --workers, {again}"
        found, expected = "a worker process was killed", "enough memory for all of them"
        raise InputError(where, found, expected, next_step) from error
    except OSError as error:
        raise InputError(
            error.filename or options.output,
            error.strerror or str(error),
            "files that can be read, and a place that can be written",
            f"mend that, or name another --output; then {again}",
        ) from error


@contextmanager
def locked(options: Options) -> Iterator[None]:
    """The folder of unfinished work, for this process alone."""
    if options.output.exists() and not os.access(options.output, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write", str(options.output))
    if options.output.exists() and not options.output.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(options.output))
    options.partial.mkdir(parents=True, exist_ok=True)
    with (options.partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found, expected = "in use by another run of this program", "one run at a time"
            raise InputError(options.partial, found, expected, "wait for it to end") from error
        try:
            yield
        finally:
            leave_nothing_empty(options)


def leave_nothing_empty(options: Options) -> None:
    """Remove the folder of unfinished work if no work is in it."""
    checks = options.partial / CHECKED
    if checks.exists() and not checks.stat().st_size:
        checks.unlink()
    if {path.name for path in options.partial.glob("*")} == {"lock"}:
        (options.partial / "lock").unlink()
        options.partial.rmdir()


def check_pictures(options: Options, jobs: list[Job], pool: Executor | None) -> dict[str, Verdict]:
    """Decode every picture of the jobs once. Raises InputError for bad ones unless --skip-bad."""
    names = sorted({name for job in jobs for name in job.people.images})
    pictures = {name: find_picture(options.images, name) for name in names}
    if not any(picture.found for picture in pictures.values()):
        found = f"none of the {len(names):,} pictures, such as {names[0]}"
        raise InputError(options.images, found, "the pictures", "name their folder with --images")
    check_space(options, jobs, pictures)
    verdicts = read_checks(options.partial / CHECKED)
    todo = [picture for picture in pictures.values() if picture not in verdicts]
    results = spread(pool, partial(inspect_picture, options.images), todo, chunk=16)
    with (options.partial / CHECKED).open("a") as file:
        for verdict in progress(results, "checking", "pictures", len(todo)):
            verdicts[verdict.picture] = verdict
            if not verdict.fault:
                file.write(json.dumps(verdict) + "\n")
    checked = {name: verdicts[picture] for name, picture in pictures.items()}
    report_bad(options, jobs, checked)
    return checked


def read_checks(path: Path) -> dict[Picture, Verdict]:
    """Good pictures of an earlier run; a file that was changed since is another Picture."""
    verdicts = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            picture, *rest = json.loads(line)
            verdict = Verdict(Picture(*picture), *rest)
        except (ValueError, TypeError):  # the line at which a run was killed
            continue
        verdicts[verdict.picture] = verdict
    return verdicts


def report_bad(options: Options, jobs: list[Job], checked: dict[str, Verdict]) -> None:
    """List the first bad pictures, say where the others are listed, and raise InputError unless
    they are to be left out."""
    bad = {name: verdict.fault for name, verdict in checked.items() if verdict.fault}
    if not bad:
        return
    lines = [f"bad picture: {name}: {fault}" for name, fault in bad.items()]
    rest = f"... and {len(lines) - SHOWN:,} more, all of them in " if len(lines) > SHOWN else ""
    print("\n".join(lines[:SHOWN]), file=sys.stderr)
    people = sum(name in bad for job in jobs for name in job.people.images)
    if options.skip_bad:
        if rest:
            print(f"{rest}{MANIFEST} of their split, as left_out", file=sys.stderr)
        print(f"left out: {people:,} people of {len(bad):,} bad pictures", file=sys.stderr)
        return
    if rest:
        (options.partial / BAD).write_text("\n".join(lines) + "\n")
        print(f"{rest}{options.partial / BAD}", file=sys.stderr)
    kinds = Counter(fault.split(" (")[0] for fault in bad.values()).most_common(3)
    raise InputError(
        options.images,
        f"{len(bad):,} bad of {len(checked):,} pictures, of {people:,} people: "
        + ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        + (", ..." if sum(count for _, count in kinds) < len(bad) else ""),
        "whole RGB JPEGs as annotated (pipelines/jpeg.py says why others are refused)",
        "mend them and run the same command, or leave these people out with --skip-bad. "
        f"{options.partial} keeps what was checked until then; without a next time, remove it",
    )


def left_out(job: Job, checked: dict[str, Verdict]) -> list[str]:
    """A line for each person who cannot be packed. Raises InputError if that is everybody."""
    faults = [(row, name, checked[name].fault) for row, name in enumerate(job.people.images)]
    lines = [f"row {row}: {name}: {fault}" for row, name, fault in faults if fault]
    if len(lines) == job.people.count:
        found = f"only bad pictures in {job.split}"
        raise InputError(job.source["images"], found, "a good one", "check the folder of pictures")
    return lines


def check_space(options: Options, jobs: list[Job], pictures: dict[str, Picture]) -> None:
    """Raise InputError unless the disk has room for the shards that are not yet written."""
    need = 0
    for job in jobs:
        parts = [4 * record_length(job.skeleton.joint_count), _JSON_BYTES]
        fixed = sum(map(_in_tar, parts)) + _INDEX_BYTES
        need += sum(fixed + _in_tar(size) for size in _picture_bytes(options, job, pictures))
        need += (job.people.count // options.people_per_shard + 1) * _TAR_END
        need -= sum(tar.stat().st_size for tar in (options.partial / job.split).glob("*.tar"))
    free = shutil.disk_usage(options.partial).free
    if need > free:
        raise InputError(
            options.output,
            f"{free / 1e6:,.1f} MB free",
            f"{need / 1e6:,.1f} MB for the shards",
            "make room, or name a place on another disk with --output",
        )


def _picture_bytes(options: Options, job: Job, pictures: dict[str, Picture]) -> Iterator[int]:
    """What each person's stored picture may take."""
    rule = options.crop
    for row, name in enumerate(job.people.images):
        if rule is None:
            yield pictures[name].bytes
        else:
            box_px = min(PIXELS_PER_SCALE * job.people.scale[row], rule.person_px)
            yield int(_BYTES_PER_PIXEL * (rule.reach * box_px) ** 2) + 1024


def _in_tar(size: int) -> int:
    """Bytes that a file takes in a tar: a header and whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def claim(options: Options, job: Job, left_out: list[str]) -> str:
    """The split's plan, noted beside its shards. Raises InputError if those follow another."""
    plan, folder = plan_of(options, job, left_out), options.partial / job.split
    state = options.partial / f"{job.split}.state"
    noted = (state / "plan").read_text() if (state / "plan").exists() else None
    if noted is None and folder.exists():
        found, expected = "not made by this program", "no such folder"
        raise InputError(folder, found, expected, "move it, or name another --output")
    if noted not in (None, plan) and not options.overwrite:
        raise InputError(
            folder,
            "an unfinished packing of other data or with other options",
            "the command that was interrupted",
            "finish that one, or begin anew with --overwrite",
        )
    if noted != plan:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(exist_ok=True)
    (state / "plan").write_text(plan)
    folder.mkdir(exist_ok=True)
    return plan


def pack_split(
    options: Options, job: Job, plan: str, checked: dict[str, Verdict], pool: Executor | None
) -> Manifest:
    """Write the shards of one split that are not written yet, and move it to the output."""
    tasks = shard_tasks(options, job, plan, checked)
    people = sum(len(task.samples) for task in tasks)
    shards: list[Shard] = []
    with counting(f"packing {job.split}", people, "people") as advance:
        for shard in spread(pool, finish_shard, tasks):
            shards.append(shard)
            advance(shard.people)
    sizes = [task.largest for task in tasks]
    manifest = Manifest(
        split=job.split,
        packing=options.packing,
        people=people,
        joints=job.skeleton.joint_count,
        skeleton=job.skeleton,
        shards=tuple(shards),
        max_width=max(width for width, _ in sizes),
        max_height=max(height for _, height in sizes),
        source={**job.source, "plan": plan},
        seed=options.seed,
        crop=options.crop,
        left_out=left_out(job, checked),
        command=options.command,
    )
    write_manifest(options.partial / job.split, manifest)
    publish(options, job.split)
    return manifest


def shard_tasks(options: Options, job: Job, plan: str, checked: dict[str, Verdict]) -> list[Task]:
    """People with good pictures in shuffled order, cut into shards."""
    rows = [row for row, name in enumerate(job.people.images) if not checked[name].fault]
    order = np.random.default_rng([options.seed, SPLITS.index(job.split)]).permutation(rows)
    samples = [
        prepare(options.crop, job, row, f"{number:09d}", checked)
        for number, row in enumerate(order.tolist())
    ]
    starts = range(0, len(samples), options.people_per_shard)
    return [
        Task(
            options.partial, job.split, number, plan, options.crop,
            tuple(samples[start : start + starts.step]),
        )
        for number, start in enumerate(starts)
    ]  # fmt: skip


def prepare(
    crop: CropRule | None, job: Job, row: int, key: str, checked: dict[str, Verdict]
) -> Sample:
    """All of one person but the bytes of the picture."""
    picture, width, height, _ = checked[job.people.images[row]]
    region, affine = None, IDENTITY_AFFINE
    if crop:
        region = crop_region(job.people.center[row], job.people.scale[row], width, height, crop)
        width, height, affine = region.width, region.height, region.image_from_stored
    record = pack_record(job.people, row, width, height, affine).tobytes()
    text = person_json(job.people, row, job.skeleton, width, height, affine)
    return Sample(key, record, text, picture, region, width, height)


def publish(options: Options, split: str) -> None:
    """Move a whole split to the output; what it replaces stays until it has."""
    target, old = options.output / split, options.partial / f"{split}.old"
    shutil.rmtree(old, ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    (options.partial / split).rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(options.partial / f"{split}.state")


def remove_partial(options: Options) -> None:
    """Remove the folder of unfinished work, unless another split's still lies there."""
    if not any(options.partial.glob("*.state")):
        for name in (CHECKED, BAD, "lock"):
            (options.partial / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file of their own there
            options.partial.rmdir()


def summarise(options: Options, manifests: list[Manifest], seconds: float) -> None:
    """Print what was packed and what to do with it."""
    print("reading what was packed ...", file=sys.stderr, flush=True)
    for manifest in manifests:
        print(summary(options.output / manifest.split), end="\n\n")
    for manifest in manifests:
        size = sum(shard.bytes for shard in manifest.shards)
        print(
            f"{options.output / manifest.split}: {manifest.people:,} people in "
            f"{len(manifest.shards)} shards, {size / 1e6:,.1f} MB; "
            f"{len(manifest.left_out)} people left out"
        )
    people = sum(manifest.people for manifest in manifests)
    print(f"{seconds:.1f} s, {people / seconds:,.0f} people/s with {options.workers} worker(s)")
    folder = shlex.quote(str(options.output))
    if "train" in options.splits:
        preset = f" --data.preset {options.crop.preset}" if options.crop else ""
        print(f"next: python train.py --config configs/2hg.yaml --data.shards {folder}{preset}")
        print("      (or another of configs/: they are recipes for other data and other budgets)")
    else:
        print(f"next: python evaluate.py --checkpoint PATH --shards {folder}")


if __name__ == "__main__":
    run_main(main)
