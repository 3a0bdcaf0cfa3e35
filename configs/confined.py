"""Somebody else's parser is tried out in a child process first, where it may crash, hang or swell.

libhdf5 and SciPy's reader of .mat trust what a file claims; a damaged one can end the process. The
child is a fork, so that this costs milliseconds; it parses, says how it went, and is gone.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import InputError

SECONDS = 120
"""Annotations of 100,000 people take one or two."""
MEMORY = 4 << 30
"""Bytes beyond what this process has."""

_passed: set[tuple[Any, ...]] = set()


def rehearse(parse: Callable[[], object], path: Path) -> None:
    """Run parse(), which reads that file, in a child process. Nothing happens if it can be read.

    Raises the InputError that parse raises there, and ValueError for any other end. A file that has
    passed is not tried again while it is unchanged. Without Linux nothing is tried.
    """
    with path.open("rb"):  # a missing permission is not the parser's to tell
        stat = path.stat()
    identity = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if identity in _passed or sys.platform != "linux":
        return
    answer, ending = _in_child(parse)
    if not answer:
        raise ValueError(ending)
    told = json.loads(answer)
    if told.get("input_error"):
        raise InputError(*told["input_error"])
    if told.get("forbidden"):
        raise PermissionError(*told["forbidden"], str(path))
    if told.get("error"):
        raise ValueError(told["error"])
    _passed.add(identity)


def _in_child(parse: Callable[[], object]) -> tuple[bytes, str]:
    """What the child has written, and how it ended if that is nothing."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of locks that other threads may hold; the child takes none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_child(parse, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as file:
            answer = file.read()
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return answer, _in_words(os.waitstatus_to_exitcode(status))


def _in_words(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"its parser was not done after {SECONDS} s"
    if code < 0:
        return f"its parser crashed ({signal.Signals(-code).name})"
    return f"its parser ended with {code}"


def _be_child(parse: Callable[[], object], writer: int) -> NoReturn:
    """Parse and tell; whatever happens, this process does nothing else."""
    gc.disable()  # what is inherited may want threads that are not here to be destroyed
    try:
        _limit()
        told: dict[str, Any] = {}
        try:
            parse()
        except InputError as error:
            told = {"input_error": error.args}
        except PermissionError as error:
            told = {"forbidden": [error.errno, error.strerror]}
        except MemoryError:
            told = {"error": f"it takes more than {MEMORY >> 20:,} MiB of memory"}
        except BaseException as error:
            told = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        os.write(writer, json.dumps(told).encode()[:60_000])
    finally:
        os._exit(0)


def _limit() -> None:
    import resource  # it is there on Linux

    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
