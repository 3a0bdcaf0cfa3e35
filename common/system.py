"""The machine: usable cores, malloc, a C compiler, optional packages."""

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from common.errors import InputError


def keep_freed_memory() -> bool:
    """Let malloc keep freed blocks of up to 32 MiB, 1 GiB in all, and reuse them.

    By default glibc returns large blocks to the kernel, and each page causes a page fault at its
    next use: 1,350 faults for a crop of a 1280 x 720 picture (9.6 ms of CPU time; 5.3 without
    them), 5,000 for a training step of a small network (74 ms; 58 without them). Returns whether
    this system's C library supports it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    mmap_threshold, trim_threshold = -3, -1  # from glibc's malloc.h
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 1 << 30))


def usable_cores() -> int:
    """Cores that this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def triton_works() -> bool:
    """Whether Triton is installed and finds a C compiler and Python.h, for its launchers."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    header = Path(sysconfig.get_path("include"), "Python.h")
    is_installed = importlib.util.find_spec("triton") is not None
    return is_installed and header.exists() and any(map(shutil.which, compilers))


def optional_module(name: str, where: object) -> Any:
    """A module of a package that may be missing; then raises InputError. where: what needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        advice = f"pip install {package}"
        raise InputError(where, f"{package} is not installed", package, advice) from error
