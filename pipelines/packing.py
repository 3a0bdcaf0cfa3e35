"""Writes pictures and annotations as tar shards (format: pipelines/shard_format.py).

Every picture is decoded before the first shard is written. A split is written in a folder beside
the output and moved there when it is complete, so that an interrupted run can be continued and the
output never contains an incomplete split.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import webdataset

from common.cli import progress
from common.errors import InputError
from common.files import write_atomic
from common.system import keep_freed_memory
from configs.skeleton import Skeleton, load_skeleton
from pipelines import object_storage
from pipelines.annotations import Boxes, Exif, People, find_annotations, read_annotations
from pipelines.crop_packing import Region, crop_region, stored_crop
from pipelines.i420 import byte_count
from pipelines.jpeg import EXIF_KINDS, QUALITY, Picture, check_picture, convert, find_picture
from pipelines.shard_format import (
    FORMAT_VERSION,
    IDENTITY_AFFINE,
    INDEX_VERSION,
    MANIFEST,
    PEOPLE,
    PICTURE_EXTENSIONS,
    SPLITS,
    CropRule,
    Manifest,
    Shard,
    file_sha256,
    person_json,
    read_manifest,
    record_of,
    write_manifest,
    write_people_file,
)

_BAD_SHOWN = 10
_RUN_AGAIN = "run the same command again; it continues where it stopped"
_TAR_BYTES, _FILE_BYTES = 10_240, 1024
"""Size of an empty tar, and the most that tar adds to the content of each file."""
_BYTES_PER_PIXEL = 0.6
"""Upper estimate for a crop's JPEG; photographs have about 0.3."""
_EXIF_RULE = """  Pictures with an EXIF orientation: width and height in the labels decide; without
  them the orientation with fewer joints outside of the pictures; else turned. If
  tools/show_batch.py shows wrong joints in them, pack again with --exif stored or --exif turned."""


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """What to pack and how. Paths are absolute."""

    annotations: Path
    images: Path
    output: Path
    url: str = ""
    """URL of the splits in object storage, or empty; with a URL `output` is temporary."""
    splits: tuple[str, ...] = SPLITS
    people_per_shard: int = 512
    workers: int = 1
    """Worker processes; 0 and 1 use this process only."""
    format: str = "auto"
    """Of the annotations, as `find_annotations` takes it."""
    boxes: Boxes = "auto"
    """How people in label files get boxes."""
    exif: Exif = "auto"
    """How pictures with an EXIF orientation were labelled."""
    valid_fraction: float | None = None
    """Share of the pictures that becomes `valid`; None if the annotations have splits."""
    seed: int = 0
    skip_bad: bool = False
    overwrite: bool = False
    packing: str = "original"
    skeleton: Path | None = None
    """YAML file of the joints; None for MPII's."""
    crop: CropRule | None = None
    """None if pictures are stored unchanged."""
    command: str = ""

    @property
    def location(self) -> str:
        """Folder or URL of the splits, for messages."""
        return self.url or str(self.output)

    @property
    def partial(self) -> Path:
        """Folder of unfinished work, on the output's file system so that a rename can move it."""
        beside = self.output.with_name(self.output.name + ".partial")
        return self.output / ".partial" if self.output.is_mount() else beside


class SplitJob(NamedTuple):
    """One split to pack."""

    split: str
    people: People
    skeleton: Skeleton
    source: dict[str, str]
    """Annotation file, its SHA-256 and the folder of pictures."""


class Sample(NamedTuple):
    """One person to write."""

    key: str
    record: bytes
    text: bytes
    picture: Picture
    region: Region | None
    """Part of the picture to store; None stores the file's bytes."""
    width: int
    """Of the stored picture, px, as is `height`."""
    height: int


def pack(options: PackingOptions) -> list[Manifest]:
    """Pack the splits that are not packed yet; returns their manifests. Raises InputError."""
    if options.url:
        with locked(options):  # another process may be packing to this URL
            fetch_manifests(options)
    jobs = [job for job in read_jobs(options) if not already_packed(options, job)]
    if not jobs:
        return []
    with locked(options), worker_pool(options.workers) as map_tasks:
        try:
            checked = check_pictures(options, jobs, map_tasks)
            manifests = [pack_split(options, job, checked, map_tasks) for job in jobs]
        except KeyboardInterrupt:
            print(f"\nStopped. To continue, {_RUN_AGAIN}.", file=sys.stderr)
            raise
        except BrokenProcessPool as error:
            found, advice = "a worker process was killed", f"with fewer --workers, {_RUN_AGAIN}"
            raise InputError("--workers", found, "enough memory for all", advice) from error
    return manifests


def read_jobs(options: PackingOptions) -> list[SplitJob]:
    """Annotations of the splits to pack."""
    jobs = []
    given = load_skeleton(options.skeleton) if options.skeleton else None
    read, find_groups = cache(read_annotations), cache(picture_groups)
    how = options.images, options.boxes, options.format, options.exif
    for split in options.splits:
        # With a fraction, one file is read for both splits, and what it lacks is counted once.
        part = options.splits[0] if options.valid_fraction else split
        people, skeleton = read(options.annotations, part, given, *how)
        file, kind = find_annotations(options.annotations, part, options.format)
        if options.valid_fraction:
            groups = find_groups(people.images) if kind.has_videos else people.images
            people = people.select(
                rows_of_split(groups, split, options.valid_fraction, options.seed)
            )
        if people.box_warning:
            print(f"warning: in {split} {people.box_warning}", file=sys.stderr)
        files = kind.files(file)
        digest = file_sha256(files[0])
        if len(files) > 1:
            digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
        source = {"annotations": str(files[0]), "sha256": digest, "images": str(options.images)}
        jobs.append(SplitJob(split, people, skeleton, source))
    return jobs


def picture_groups(images: Sequence[str]) -> Sequence[str]:
    """The group of each frame, which must not be divided between splits: its video, or itself.

    The frames of a video are in one folder. If there is only one video, each frame is a group.
    """
    videos = [PurePosixPath(image).parent.as_posix() for image in images]
    if len(set(videos)) > 1:
        return videos
    print(
        "note: all pictures are of one video, so neighbouring frames are in both splits, and the "
        "score holds for this video only",
        file=sys.stderr,
    )
    return images


def rows_of_split(
    groups: Sequence[str], split: str, valid_fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """The people of a split. A random share of the groups becomes `valid`; seed: of this choice.

    groups: the group of each person's picture. All people of a group are in the same split.
    """
    names, group_N = np.unique(groups, return_inverse=True)
    order = np.random.default_rng([seed, len(SPLITS)]).permutation(len(names))
    is_valid = np.isin(group_N, order[: max(1, round(valid_fraction * len(names)))])
    return np.flatnonzero(is_valid == (split == "valid"))


def fingerprint(options: PackingOptions, job: SplitJob, left_out: list[str]) -> str:
    """SHA-256 of everything that determines a split's content; `plan` in the manifest."""
    facts: list[Any] = [FORMAT_VERSION, options.packing, options.people_per_shard, options.seed]
    facts += [job.split, job.source["sha256"], job.source["images"], left_out]
    facts += [options.valid_fraction, str(options.boxes), options.exif, job.skeleton.as_dict()]
    facts.append(options.crop and asdict(options.crop))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def fetch_manifests(options: PackingOptions) -> None:
    """Copy the manifests in object storage to the temporary output. Raises StorageError."""
    shutil.rmtree(options.output, ignore_errors=True)
    for split in options.splits:
        with suppress(object_storage.MissingObjectError):
            manifest = object_storage.read(f"{options.url}/{split}/{MANIFEST}")
            write_atomic(options.output / split / MANIFEST, manifest)


def upload_each(
    options: PackingOptions, split: str, folder: Path, shards: Iterator[Shard]
) -> Iterator[Shard]:
    """Upload the files of each shard as soon as it is packed. Raises StorageError."""
    url = f"{options.url}/{split}"
    if (options.output / split).exists():  # the old manifest does not describe the new tars
        object_storage.remove(f"{url}/{MANIFEST}")
    for shard in shards:
        for name in (shard.tar, shard.index):
            object_storage.store(folder / name, f"{url}/{name}")
        yield shard


def already_packed(options: PackingOptions, job: SplitJob) -> bool:
    """Whether the output contains this split. Raises InputError if it has other content."""
    folder = options.output / job.split
    if not os.path.lexists(folder):
        return False
    if not (folder / MANIFEST).is_file():
        raise InputError(folder, f"no {MANIFEST}", "a split of shards", "choose another --output")
    manifest = read_manifest(folder)
    if options.overwrite:
        return False
    if manifest.source.get("plan") != fingerprint(options, job, manifest.left_out):
        expected = "the same annotations, pictures, joints, packing, seed and --people-per-shard"
        advice = "choose another --output, or replace it with --overwrite"
        raise InputError(folder, f"another packing: {manifest.command}", expected, advice)
    left_out = f", {len(manifest.left_out)} left out" if manifest.left_out else ""
    print(f"{options.location}/{job.split}: already packed, {manifest.people:,} people{left_out}")
    return True


@contextmanager
def locked(options: PackingOptions) -> Iterator[None]:
    """Create the folder of unfinished work and lock it for this process; remove it if empty."""
    options.partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(options.partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        found = "in use by another run of this program"
        raise InputError(options.partial, found, "one at a time", "wait until it ends") from error
    try:
        yield
    finally:
        with suppress(OSError):  # it contains unfinished work
            options.partial.rmdir()
        os.close(lock)


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` that runs in worker processes; the builtin one for at most one worker."""
    if workers <= 1:
        _start_worker()
        yield map
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    # Workers inherit that Ctrl-C is ignored; the main process ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(os.getpid)  # each call starts a process
    signal.signal(signal.SIGINT, handler)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Use one thread; a worker process exits with the main process, even if that is killed."""
    cv2.setNumThreads(1)
    keep_freed_memory()
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)


def check_pictures(
    options: PackingOptions, jobs: list[SplitJob], map_tasks: Callable[..., Iterator[Picture]]
) -> dict[str, Picture]:
    """Decode every picture once; by file name. Raises InputError."""
    names = sorted({name for job in jobs for name in job.people.images})
    if not any(find_picture(options.images, name).is_file() for name in names):
        found = f"none of the {len(names):,} pictures, such as {names[0]}"
        raise InputError(options.images, found, "the pictures", "name their folder with --images")
    turned: dict[str, int] = {}
    for people in (job.people for job in jobs):
        turned |= zip(people.images, people.turned.tolist(), strict=True)
    results = map_tasks(partial(check_picture, options.images), names, map(turned.get, names))
    checked = dict(zip(names, progress(results, "checking", "pictures", len(names)), strict=True))
    _report_bad_pictures(options, checked)
    kinds = Counter(p.converted for p in checked.values() if p.converted and not p.fault)
    if kinds:
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        print(f"converted to RGB JPEGs of quality {QUALITY}: {counts}")
    if kinds.keys() & {*EXIF_KINDS}:
        print(_EXIF_RULE)
    _warn_of_shared_pictures(jobs, checked)
    for job in jobs:
        if all(checked[name].fault for name in job.people.images):
            found, advice = f"only bad pictures in {job.split}", "replace them"
            raise InputError(options.images, found, "at least one good one", advice)
    return checked


def _warn_of_shared_pictures(jobs: list[SplitJob], checked: dict[str, Picture]) -> None:
    """Print how many pictures are in both splits, compared by their content."""
    names = [{checked[n].sha256: n for n in sorted(job.people.images)[::-1]} for job in jobs]
    shared = set.intersection(*map(set, names)) - {""} if len(names) > 1 else set()
    if shared:
        first = min(names[-1][each] for each in shared)
        print(
            f"warning: {len(shared):,} picture(s) are in train and in valid (the first: {first}), "
            "so scores will be too high; correct the annotations, or use --valid-fraction",
            file=sys.stderr,
        )


def _report_bad_pictures(options: PackingOptions, checked: dict[str, Picture]) -> None:
    """Print the first bad pictures; raise InputError unless they are to be skipped."""
    bad = {name: picture.fault for name, picture in checked.items() if picture.fault}
    for name in list(bad)[:_BAD_SHOWN]:
        print(f"bad picture: {name}: {bad[name]}", file=sys.stderr)
    if len(bad) > _BAD_SHOWN:
        print(f"... and {len(bad) - _BAD_SHOWN:,} more", file=sys.stderr)
    if bad and not options.skip_bad:
        found = f"{len(bad):,} bad of {len(checked):,} pictures"
        expected = "complete pictures (pipelines/jpeg.py lists what is refused)"
        advice = "replace them, or leave the people out with --skip-bad"
        raise InputError(options.images, found, expected, advice)


def pack_split(
    options: PackingOptions,
    job: SplitJob,
    checked: dict[str, Picture],
    map_tasks: Callable[..., Iterator[Shard]],
) -> Manifest:
    """Write the shards of a split that are not written yet, and move it to the output."""
    faults = [(row, name, checked[name].fault) for row, name in enumerate(job.people.images)]
    left_out = [f"row {row}: {name}: {fault}" for row, name, fault in faults if fault]
    plan = fingerprint(options, job, left_out)
    rows = [row for row, _, fault in faults if not fault]
    order = np.random.default_rng([options.seed, SPLITS.index(job.split)]).permutation(rows)
    samples = [
        prepare_sample(options.crop, job, row, f"{number:09d}", checked[job.people.images[row]])
        for number, row in enumerate(order.tolist())
    ]
    # The name depends on all inputs, so that shards of two packings are never mixed.
    inputs = plan + json.dumps([sample.picture for sample in samples])
    folder = options.partial / f"{job.split}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    check_space(options, folder, samples)
    size = options.people_per_shard
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    packed = map_tasks(partial(pack_shard, options, folder), range(len(parts)), parts)
    if options.url:
        packed = upload_each(options, job.split, folder, packed)
    shards = []
    with progress(None, f"packing {job.split}", "people", len(samples)) as bar:
        for shard in packed:
            shards.append(shard)
            bar.update(shard.people)
    manifest = Manifest(
        split=job.split,
        packing=options.packing,
        people=len(samples),
        joints=job.skeleton.joint_count,
        skeleton=job.skeleton,
        shards=tuple(shards),
        max_width=max(sample.width for sample in samples),
        max_height=max(sample.height for sample in samples),
        source={**job.source, "plan": plan},
        seed=options.seed,
        crop=options.crop,
        left_out=left_out,
        command=options.command,
        people_file_sha256=write_people_file(
            folder,
            np.stack([np.frombuffer(sample.record, "<f4") for sample in samples]),
            job.people.select(order),
        ),
    )
    write_manifest(folder, manifest)
    if options.url:
        for name in (PEOPLE, MANIFEST):  # a split without a manifest is incomplete
            object_storage.store(folder / name, f"{options.url}/{job.split}/{name}")
    move_to_output(options, job.split, folder)
    return manifest


def move_to_output(options: PackingOptions, split: str, folder: Path) -> None:
    """Replace the old split, which was kept until now, by the new one; remove unfinished work."""
    target, old = options.output / split, options.partial / f"{split}.old"
    options.output.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    for path in (old, *options.partial.glob(f"{split}-{'[0-9a-f]' * 16}")):
        shutil.rmtree(path, ignore_errors=True)


def prepare_sample(
    crop: CropRule | None, job: SplitJob, row: int, key: str, picture: Picture
) -> Sample:
    """Everything of one person except the picture's bytes."""
    people, width, height = job.people, picture.width, picture.height
    region, affine = None, IDENTITY_AFFINE
    if crop:
        region = crop_region(people.center[row], people.scale[row], width, height, crop)
        width, height, affine = region.width, region.height, region.image_from_stored
    record = record_of(people, row, width, height, affine).astype("<f4").tobytes()
    text = person_json(people, row, job.skeleton, width, height, affine)
    return Sample(key, record, text, picture, region, width, height)


def check_space(options: PackingOptions, folder: Path, samples: list[Sample]) -> None:
    """Raise InputError unless the disk has space for the shards that are not written yet."""
    need = -sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    need += (len(samples) // options.people_per_shard + 1) * _TAR_BYTES
    for sample in samples:
        picture = sample.picture.bytes
        if options.packing == "raw":
            picture = byte_count(sample.width, sample.height)
        elif sample.region or sample.picture.converted:
            picture = int(_BYTES_PER_PIXEL * sample.width * sample.height) + _FILE_BYTES
        need += len(sample.record) + len(sample.text) + picture + 3 * _FILE_BYTES
    free = shutil.disk_usage(folder).free
    if need > free:
        expected = f"{need / 1e6:,.1f} MB for the shards"
        advice = "free some space, or choose an --output on another disk"
        raise InputError(options.output, f"{free / 1e6:,.1f} MB free", expected, advice)


def pack_shard(options: PackingOptions, folder: Path, number: int, samples: list[Sample]) -> Shard:
    """Write a tar and its index, unless an earlier run did. Deterministic."""
    tar = folder / f"{number:05d}.tar"
    index, temporary = tar.with_suffix(".idx"), tar.with_suffix(".tar.tmp")
    extension = PICTURE_EXTENSIONS[options.packing]
    if not tar.exists():
        with temporary.open("wb") as stream:
            with webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
                for sample in samples:
                    picture = {extension: load_picture(sample, options)}
                    files = {"f32": sample.record, **picture, "json": sample.text}
                    writer.write({"__key__": sample.key, **files})
            stream.flush()
            os.fsync(stream.fileno())
        with tarfile.open(temporary, "r:") as archive:
            write_atomic(index, index_text(archive.getmembers()).encode())
        temporary.rename(tar)
    return Shard(
        tar=tar.name,
        index=index.name,
        people=len(samples),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        index_sha256=file_sha256(index),
    )


def load_picture(sample: Sample, options: PackingOptions) -> bytes:
    """The picture to store. Raises InputError if the file has changed since it was checked."""
    path = Path(sample.picture.path)
    jpeg, stat = path.read_bytes(), path.stat()
    if (len(jpeg), stat.st_mtime_ns) != (sample.picture.bytes, sample.picture.mtime_ns):
        raise InputError(path, "changed since it was checked", "the same picture", _RUN_AGAIN)
    if sample.picture.converted:
        jpeg = convert(jpeg, sample.picture.converted)
    if options.crop and sample.region:
        return stored_crop(jpeg, sample.region, options.packing, options.crop.quality)
    return jpeg


def index_text(members: list[tarfile.TarInfo]) -> str:
    """A wds2idx index: per sample a line of `extension offset size name` of each component."""
    samples: dict[str, list[str]] = {}
    for member in members:
        key, _, extension = member.name.partition(".")
        entry = f"{extension} {member.offset_data} {member.size} {member.name}"
        samples.setdefault(key, []).append(entry)
    lines = [f"{INDEX_VERSION} {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    return "\n".join(lines) + "\n"
