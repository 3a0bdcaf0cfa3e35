"""Reads files up to a size limit, parses JSON and YAML, and writes files atomically."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from common.errors import InputError

LARGEST_JSON = 512 << 20
"""Bytes. COCO's annotation file of 118,000 pictures has 238 million."""
_LARGEST_YAML = 1 << 20


def read_bytes(path: Path, limit: int) -> bytes:
    """A file's content. Reads at most limit + 1 bytes; raises ValueError if it has more."""
    with path.open("rb") as file:
        return bounded(file.read(limit + 1), limit)


def bounded(data: bytes, limit: int) -> bytes:
    """Return the data unchanged. Raises ValueError if it has more bytes than the limit."""
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit:,} bytes"
        raise ValueError(f"more than {size}")
    return data


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, also for lists nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("lists nested too deeply") from error


def read_json(path: Path, limit: int = LARGEST_JSON) -> Any:
    """Parse a JSON file of at most `limit` bytes. Raises OSError or ValueError."""
    return parse_json(read_bytes(path, limit))


def json_numbers(
    entry: dict[str, Any], key: str, shape: tuple[int, ...], where: object
) -> npt.NDArray[np.float64]:
    """The numbers under a key of a JSON object, as an array of that shape. Raises InputError."""
    value = entry.get(key)
    try:
        numbers = np.array(value)
    except ValueError:  # lists of different lengths
        numbers = np.array(None)
    if numbers.dtype.kind not in "iuf" or numbers.shape != shape:
        expected = f"numbers of shape {shape}"
        raise InputError(where, f"{key}: {str(value)[:100]}", expected, "correct the file")
    return numbers.astype(np.float64)


def read_yaml(path: Path, keys: str) -> dict[str, Any]:
    """The dict in a YAML file of at most 1 MiB. keys: expected ones, for the InputError."""
    try:
        value = yaml.safe_load(read_bytes(path, _LARGEST_YAML).decode("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        found = "no such file"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        found = f"not YAML: {' '.join(str(error).split())[:300]}"
    else:
        if isinstance(value, dict | None):
            return value or {}
        found = f"a {type(value).__name__}"
    raise InputError(path, found, f"a YAML file with {keys}", "correct the file or its path")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a temporary file beside `path`, sync and rename it. Creates missing folders.

    An older file stays until the new one is complete. Raises OSError that names the path.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk's error does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
