"""Which checkpoints of a run are kept, which is the newest whole one, and the run's small files.

Each checkpoint is written once, as step_NNNNNNNN.pt, and last.pt and best.pt are further names of
such a file (hard links; copies where there are none). A name is never without a whole file behind
it.
"""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from common.errors import InputError
from common.files import write_atomic
from model import checkpoint
from model.checkpoint import Checkpoint

LAST, BEST = "last.pt", "best.pt"
RESUME_ME = "resume_me"
"""Is in the folder of a run that a signal ended, until it is started again."""
LOCK = "lock"
"""Is held by the process that trains the run, and names it."""


def save(folder: Path, made: Checkpoint, names: list[str], keep: int) -> None:
    """Write a checkpoint under each name, and remove all but the newest so many.

    Checkpoints of later steps go too: the run went back and left them. Raises OSError, and then
    every name stands for the file that it stood for before, or already for the new one.
    """
    newest = folder / f"step_{made.step:08d}.pt"
    checkpoint.save_checkpoint(newest, made)
    for name in names:
        _name_also(newest, folder / name)
    checkpoint.sync_folder(folder)
    later = [path for path in numbered(folder) if path.name > newest.name]
    for path in later + numbered(folder)[len(later) + keep :]:
        path.unlink(missing_ok=True)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints that are named by their step, newest first."""
    return sorted(folder.glob("step_" + 8 * "[0-9]" + ".pt"), reverse=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has anything to go on from, damaged or not."""
    return bool(numbered(folder)) or any((folder / name).exists() for name in (LAST, BEST))


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence about each damaged one before it.

    One that cannot be read is as good as damaged. None if the run has none yet. Raises InputError
    if it has some and none of them is whole.
    """
    remarks: list[str] = []
    forbidden: list[Path] = []
    seen: list[os.stat_result] = []
    for path in [folder / LAST, *numbered(folder), folder / BEST]:
        if not path.is_file() or any(os.path.samestat(path.stat(), other) for other in seen):
            continue
        seen.append(path.stat())
        try:
            checkpoint.load_checkpoint(path)
        except InputError as error:
            remarks.append(f"{path} is damaged ({error.found}); the one before it is looked at")
        except OSError as error:  # sectors that cannot be read, say
            remarks.append(f"{path} cannot be read ({error.strerror}); the one before it is tried")
            forbidden += [path] if isinstance(error, PermissionError) else []
        else:
            return path, [*remarks, f"{path} is whole, and used"] if remarks else []
    if forbidden:
        raise InputError(
            forbidden[0],
            "no permission to read it, and no other checkpoint that is whole",
            "checkpoints that this user may read",
            "change their permissions, or start as the user who trained the run",
        )
    if remarks:
        raise InputError(
            folder,
            f"{len(remarks)} checkpoint(s), all of them damaged",
            "one that is whole",
            "restore a copy of one, or begin a new run",
        )
    return None, []


def begin(folder: Path) -> None:
    """Make a run's folder and keep other processes out of it.

    What a killed process was writing is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    for half in folder.glob("*.pt.tmp"):
        half.unlink(missing_ok=True)


def lock(folder: Path) -> None:
    """Keep other processes from training this run until this one ends. Raises InputError.

    The lock is the kernel's: it goes with the process, however that ends, and worker processes do
    not inherit it. Where there are no locks nobody is kept out.
    """
    try:
        import fcntl  # it is there on Linux and macOS
    except ImportError:
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)  # stays open
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise InputError(
            folder,
            f"another process that trains this run ({holder})",
            "one at a time",
            "wait for its end, stop it, or choose another --train.name",
        ) from error
    except OSError:  # a file system without locks
        return
    with suppress(OSError):  # a full disk: the lock holds without its holder's name
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def ask_to_resume(folder: Path, text: str) -> None:
    """Leave the marker that tells a job script to start the run again. Raises OSError."""
    write_atomic(folder / RESUME_ME, f"{text}\n".encode())


def take_back(folder: Path) -> None:
    """Remove that marker: the run is started again, and would leave it again."""
    (folder / RESUME_ME).unlink(missing_ok=True)


def _name_also(source: Path, target: Path) -> None:
    """Let target be the same file as source, in one stroke."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            with source.open("rb") as old, temporary.open("wb") as new:
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
