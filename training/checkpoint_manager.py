"""Writes and removes a run's checkpoints, finds the newest undamaged one, locks the run's folder.

A thread writes each checkpoint once, as step_NNNNNNNN.pt; last.pt and best.pt are hard links to
such a file (copies on file systems without links). Each name always refers to a complete file.
"""

import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from model.checkpoint import BEST, LAST, Checkpoint, load_checkpoint, save_checkpoint, sync_folder

RESUME_ME = "resume_me"
"""Exists in the folder of a run that a signal ended, until the run is started again."""
LOCK = "lock"
"""Locked by the process that trains the run; contains its id."""


class CheckpointManager:
    """Writes the checkpoints of a run, one at a time. A failed write does not end the run."""

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], object]):
        """folder: of the run. keep: number of newest checkpoints to keep. warn: prints failures."""
        self.folder, self.keep, self._warn = folder, keep, warn
        self.saved_step = 0
        """Step of last.pt."""
        self.failure = ""
        """Why the last checkpoint could not be written, or empty; set when the write has ended."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, names: list[str]) -> None:
        """Copy a checkpoint, and start to write the copy under each name.

        Waits for the previous write. Removes all but the newest checkpoints, and also those of
        later steps, which a run that was resumed from an earlier step replaces. If the write fails,
        `failure` says why, and each name refers to its old file or the new one.
        """
        self.wait()
        copy = replace(
            checkpoint,
            weights=_copy(checkpoint.weights),
            averaged=_copy(checkpoint.averaged),
            optimizer=_copy(checkpoint.optimizer),
        )
        uses_gpu = torch.cuda.is_initialized()
        copied = torch.cuda.current_stream().record_event() if uses_gpu else None
        self._writing = self._thread.submit(self._write, copy, copied, names)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def add_name(self, name: str) -> None:
        """Give the last checkpoint, once written, another name; if that fails, see `failure`."""
        try:
            _link(self.folder / LAST, self.folder / name)
            sync_folder(self.folder)
        except OSError as error:
            self._fail(f"{name} of step {self.saved_step} could not be written: {error}")

    def _write(
        self, checkpoint: Checkpoint, copied: torch.cuda.Event | None, names: list[str]
    ) -> None:
        """Write the checkpoint. copied: the event after which its tensors are filled."""
        newest = self.folder / f"step_{checkpoint.step:08d}.pt"
        if copied:
            copied.synchronize()
        try:
            save_checkpoint(newest, checkpoint)
            for name in names:
                _link(newest, self.folder / name)
            sync_folder(self.folder)
            later = [path for path in step_checkpoints(self.folder) if path.name > newest.name]
            for path in later + step_checkpoints(self.folder)[len(later) + self.keep :]:
                path.unlink(missing_ok=True)
        except OSError as error:
            self._fail(f"no checkpoint of step {checkpoint.step} could be written: {error}")
        else:
            self.failure, self.saved_step = "", checkpoint.step

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self._warn(f"WARNING: {failure}; training continues")


def _copy(value: Any) -> Any:
    """Copies of all tensors in nested dicts and lists, in CPU memory.

    The host does not wait for a GPU, because torch copies from it into page-locked memory.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _link(source: Path, target: Path) -> None:
    """Make target a name of the file source, atomically."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    temporary.replace(target)


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are named by their step, newest first."""
    return sorted(folder.glob("step_" + 8 * "[0-9]" + ".pt"), reverse=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder has checkpoints, damaged or not."""
    return bool(step_checkpoints(folder)) or any((folder / name).exists() for name in (LAST, BEST))


def newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, and a message for each newer, unusable one.

    None if the run has no checkpoint yet. Raises InputError if all checkpoints are unusable.
    """
    remarks: list[str] = []
    seen = set[int]()
    for path in [folder / LAST, *step_checkpoints(folder), folder / BEST]:
        if not path.is_file() or path.stat().st_ino in seen:
            continue
        seen.add(path.stat().st_ino)
        try:
            load_checkpoint(path)
        except InputError as error:
            remarks.append(f"{path} is damaged ({error.found}); trying the one before it")
        except OSError as error:
            remarks.append(f"{path} cannot be read ({error.strerror}); trying the one before it")
        else:
            return path, remarks
    if remarks:
        found = f"{len(remarks)} checkpoint(s), none of them usable: {remarks[0].split(';')[0]}"
        advice = "restore a copy or its permissions, or begin a new run"
        raise InputError(folder, found, "an undamaged, readable checkpoint", advice)
    return None, []


def lock_run_folder(folder: Path, wait_s: float = 0) -> None:
    """Make a run's folder, lock it, and remove the unfinished files of a killed process.

    wait_s: seconds to wait for a process that is ending. The lock lasts until this
    process ends; its workers do not inherit it, and it may be taken again. File systems without
    locks are not locked. Raises InputError if another process trains this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)  # stays open
    end = time.monotonic() + wait_s
    with suppress(OSError):  # without locks; or on a full disk, without the holder's name
        if wait_s and not _try_lock(descriptor):
            print(f"waiting for the process that trains {folder} ...", file=sys.stderr, flush=True)
        while not _try_lock(descriptor):
            if time.monotonic() >= end:
                holder = os.pread(descriptor, 200, 0).decode()
                found = f"another process that trains this run ({holder})"
                advice = "wait until it ends, stop it, or choose another --train.name"
                raise InputError(folder, found, "one process per run", advice)
            time.sleep(0.1)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    for unfinished in folder.glob("*.pt.tmp"):
        unfinished.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
