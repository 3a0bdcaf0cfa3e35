"""Shards in object storage, read through a local cache of whole tars.

A split has a folder in the cache with its manifest, its indices and people.json. Tars are fetched
into this folder when they are needed, or earlier by ReadAhead. Any number of processes may use the
same cache:

    NNNNN.tar              complete and checked; each reader holds a shared lock, and removing it
                           needs an exclusive lock, so no tar in use is removed
    NNNNN.tar.BYTES.part   being fetched; BYTES is its final size, which counts as used
    NNNNN.lock             exclusively locked while the tar is fetched

The locks (flock) belong to open files, so they end with the process in any case.
"""

import fcntl
import hashlib
import io
import os
import queue
import re
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from common.files import write_atomic
from pipelines import object_storage
from pipelines.object_storage import MissingObjectError, StorageError, is_url
from pipelines.shard_format import MANIFEST, PEOPLE, SPLITS, Shard, file_sha256, read_manifest

ORIGIN = "origin.txt"
"""File in the cache's folder of a split that contains the split's URL."""
FETCH_THREADS = 4
WAIT_FOR_ROOM_S = 60.0
_PLANNED, _PLANNED_AT_ONCE = 512, 8
"""Maximum number of batches that ReadAhead plans, and that it adds per yielded batch."""

Key = tuple[int, int]
"""Sample and epoch."""


def local_folder(location: str, cache_dir: str, cache_gb: float) -> Path:
    """The folder with the manifests and indices of a split, or of its splits. Raises InputError.

    A local folder is returned unchanged. From a URL, everything but the tars is fetched. cache_dir:
    empty for the user's default (XDG specification). cache_gb: becomes the limit of that cache.
    """
    if not is_url(location):
        return Path(location)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(cache_dir).expanduser() if cache_dir else users / "stacked-hourglass"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        write_atomic(root / "limit", str(int(cache_gb * 1e9)).encode())
    base, split = location.rstrip("/"), ""
    if base.rpartition("/")[2] in SPLITS:
        base, _, split = base.rpartition("/")
    manifests = {}
    for name in SPLITS:
        with suppress(MissingObjectError):
            manifests[name] = object_storage.read(f"{base}/{name}/{MANIFEST}")
    if not manifests or split not in ("", *manifests):
        expected = f"{MANIFEST} in its folders {' or '.join(SPLITS)}"
        advice = "give the --output of tools/make_shards.py"
        raise InputError(location, f"no {MANIFEST}", expected, advice)
    digest = hashlib.sha256(base.encode() + b"".join(manifests.values())).hexdigest()[:16]
    folder = root / f"{re.sub(r'[^A-Za-z0-9.]+', '-', base)[:80]}-{digest}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            new = Path(temporary) / "new"
            for name, manifest in manifests.items():
                _fetch_small_files(new / name, f"{base}/{name}", manifest)
            with suppress(OSError):  # another process was faster
                new.rename(folder)
    return folder / split


def _fetch_small_files(folder: Path, url: str, manifest: bytes) -> None:
    """Write manifest, indices and people.json of a split into a new folder. Raises InputError."""
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(manifest)
    (folder / ORIGIN).write_text(url)
    try:
        facts = read_manifest(folder)
    except InputError as error:
        error.where = f"{url}/{MANIFEST}"
        raise
    digests = {shard.index: shard.index_sha256 for shard in facts.shards}
    digests[PEOPLE] = facts.people_file_sha256

    def fetch_one(name: str) -> None:
        object_storage.fetch(f"{url}/{name}", folder / name)
        _require_sha256(folder / name, digests[name], f"{url}/{name}")

    with ThreadPoolExecutor(2 * FETCH_THREADS) as pool:
        list(pool.map(fetch_one, digests))


def _require_sha256(path: Path, expected: str, url: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise StorageError(
            url,
            f"the SHA-256 {found[:16]}..., {path.stat().st_size:,} bytes",
            f"{expected[:16]}..., as in {MANIFEST}",
            "upload this object again (tools/check_shards.py finds all), or pack again "
            "with tools/make_shards.py --overwrite",
        )


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let only one process or thread at a time change what is in the cache."""
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class ShardCache:
    """The tars of one split that are on this machine. Thread-safe."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...]):
        """folder: the split's folder in the cache."""
        self.folder, self.shards = folder, shards
        self.root = folder.parents[1]
        self.url = (folder / ORIGIN).read_text()
        self.limit = int((self.root / "limit").read_text())
        self.bytes = sum(shard.bytes for shard in shards)
        self._largest = max(shard.bytes for shard in shards)
        self.reserved = 0
        """Bytes of the cache that are left to another split."""
        self._files: dict[int, io.FileIO] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    @property
    def capacity(self) -> int:
        """Number of tars of this split that may be in use at a time, at least 1.

        If the split does not fit, room for two is left for ranks that are slightly ahead or behind.
        """
        room = self.limit - self.reserved
        if self.bytes <= room:
            return len(self.shards)
        return max(1, room // self._largest - 2)

    def require_capacity(self, shards: int, why: str) -> None:
        """Raise InputError unless this number of tars may be in use at a time."""
        if self.capacity < min(shards, len(self.shards)):
            need = min(self.bytes, (shards + 2) * self._largest) + self.reserved
            raise InputError(
                f"data.cache_gb {self.limit / 1e9:g}",
                f"room for {self.capacity} of the {len(self.shards)} tars of {self.url}",
                f"{need / 1e9:.3g} or more: {why}",
                "raise data.cache_gb, mix fewer tars (data.shard_window), or copy the shards to a "
                "local folder",
            )

    def file(self, number: int) -> io.FileIO:
        """An open tar, fetched if it is missing. Raises StorageError.

        The file stays open until `release`, or until `capacity` other tars were used after it.
        """
        with self._lock:
            file = self._files.pop(number, None)
            if file:
                self._files[number] = file
                return file
        file = self._open(self.shards[number])
        with self._lock:
            self._files[number] = file
            while len(self._files) > self.capacity:
                # A thread that still reads it has a reference, which keeps it open.
                del self._files[next(iter(self._files))]
        return file

    def release(self, number: int) -> None:
        """Allow a tar to be removed."""
        with self._lock:
            self._files.pop(number, None)

    def _open(self, shard: Shard) -> io.FileIO:
        """Open a tar with a shared lock, which protects it until the file is closed."""
        path = self.folder / shard.tar
        while True:
            with suppress(FileNotFoundError):
                file = path.open("rb", buffering=0)
                fcntl.flock(file, fcntl.LOCK_SH)
                # A tar may be removed, and even fetched again, before the lock.
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    os.utime(file.fileno())
                    return file
            self._fetch(shard)

    def _fetch(self, shard: Shard) -> None:
        """Fetch a tar, or wait for the process or thread that fetches it. Raises StorageError."""
        path, part = self.folder / shard.tar, self.folder / f"{shard.tar}.{shard.bytes}.part"
        with _lock_of(part).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            try:
                self._make_room(part, shard)
                self._download(f"{self.url}/{shard.tar}", part, shard)
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)

    def _download(self, url: str, part: Path, shard: Shard) -> None:
        """Write a tar to a file and check it; removes unused tars on a full disk."""
        while True:
            try:
                object_storage.fetch(url, part, shard.bytes)
                break
            except OSError as error:
                with _locked(self.root):
                    removed = self._remove_unused(shard.bytes)
                if not removed:
                    raise StorageError(
                        url,
                        f"{error.strerror} in the cache {self.root}",
                        f"{shard.bytes / 1e6:,.1f} MB for this tar",
                        "free some space, or choose another data.cache_dir or data.cache_gb",
                    ) from error
        _require_sha256(part, shard.sha256, url)

    def _make_room(self, part: Path, shard: Shard) -> None:
        """Wait until the tar fits into the cache's limit, then create the transfer's file."""
        deadline = time.monotonic() + WAIT_FOR_ROOM_S
        while True:
            with _locked(self.root):
                used = sum(size for _, size, _ in self._stored())
                excess = used + shard.bytes - self.limit
                if excess <= 0 or self._remove_unused(excess) >= excess:
                    part.touch()
                    return
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{self.url}/{shard.tar}",
                    f"a full cache of {self.limit / 1e9:g} GB, with all tars in use",
                    f"{excess / 1e6:,.1f} MB more",
                    f"raise data.cache_gb, or use {self.root} for fewer runs at a time",
                )
            time.sleep(0.05)

    def _stored(self) -> list[tuple[int, int, Path]]:
        """Time of the last use, bytes and path of all tars in the cache, also unfinished ones."""
        found = []
        for path in self.root.glob("*/*/*.*"):
            with suppress(FileNotFoundError):  # removed by another process
                if path.suffix == ".part":
                    found.append((path.stat().st_mtime_ns, int(path.name.split(".")[-2]), path))
                elif path.suffix == ".tar":
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        return found

    def _remove_unused(self, size: int) -> int:
        """Remove the least recently used tars, at least `size` bytes; returns the bytes removed.

        The caller must hold `_locked`.
        """
        removed = 0
        for _, used, path in sorted(self._stored()):
            if removed >= size:
                break
            locked = _lock_of(path) if path.suffix == ".part" else path
            with suppress(FileNotFoundError, BlockingIOError), locked.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if it is in use
                path.unlink()
                removed += used
        return removed


def _lock_of(part: Path) -> Path:
    """The file that is locked while a tar is fetched. part: path of the unfinished tar."""
    return part.with_name(f"{part.name.split('.')[0]}.lock")


class ReadAhead(Iterator[list[Key]]):
    """Yields batches of keys unchanged, and fetches the tars of later ones in the background.

    It fetches as many tars as the cache may hold, in the order of their first use, and releases
    those that are no longer needed. Errors are ignored here: the reader requests the same tar and
    gets the error.
    """

    def __init__(
        self,
        cache: ShardCache,
        shard_N: npt.NDArray[np.int64],
        batches: Iterator[list[Key]],
        behind: int = 0,
    ):
        """shard_N: the shard of each sample. behind: number of batches that are still being read
        after they were yielded."""
        self._cache, self._shard_N, self._batches = cache, shard_N, batches
        self._behind = behind
        self._uses: Counter[int] = Counter()
        """Tar -> number of planned or current batches that read it."""
        self._planned: deque[tuple[list[Key], list[int]]] = deque()
        self._in_use: deque[list[int]] = deque()
        self._waiting: tuple[list[Key], list[int]] | None = None
        """The next batch after the planned ones, if its tars do not fit yet."""
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._plan()
        first = set(self._planned[0][1]) if self._planned else set()
        for _ in range(FETCH_THREADS):
            # Daemons, so that the program can end without waiting for a server.
            arguments = [self._queue, cache, self._uses, first]
            threading.Thread(target=_fetch_tars, args=arguments, daemon=True).start()

    def __next__(self) -> list[Key]:
        if len(self._in_use) > self._behind:
            done = self._in_use.popleft()
            self._uses.subtract(done)
            for number in [number for number in done if not self._uses[number]]:
                del self._uses[number]
                self._cache.release(number)
        self._plan()
        if not self._planned:
            raise StopIteration
        batch, numbers = self._planned.popleft()
        self._in_use.append(numbers)
        return batch

    def _plan(self) -> None:
        for _ in range(min(_PLANNED - len(self._planned), _PLANNED_AT_ONCE)):
            if self._waiting is None:
                batch = next(self._batches, None)
                if batch is None:
                    return
                numbers = self._shard_N[[sample for sample, _ in batch]]
                self._waiting = batch, list(dict.fromkeys(numbers.tolist()))
            new = [number for number in self._waiting[1] if number not in self._uses]
            if self._planned and len(self._uses) + len(new) > self._cache.capacity:
                return
            for number in new:
                self._queue.put(number)
            self._uses.update(self._waiting[1])
            self._planned.append(self._waiting)
            self._waiting = None

    def __del__(self) -> None:
        for _ in range(FETCH_THREADS):
            self._queue.put(None)


def _fetch_tars(
    numbers: "queue.SimpleQueue[int | None]",
    cache: ShardCache,
    wanted: Container[int],
    first: set[int],
) -> None:
    """Fetch tars that are still wanted, until the queue yields None; those in `first` first."""
    while (number := numbers.get()) is not None:
        while first and number not in first:
            time.sleep(0.005)
        try:
            if number in wanted:
                cache.file(number)
        except InputError:
            pass  # the reader gets the same error
        finally:
            first.discard(number)
