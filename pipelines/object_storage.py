"""Files in object storage (s3://, gs://, https://), read and written through fsspec.

Credentials and endpoints come from the environment and the user's profile (AWS_PROFILE,
AWS_ENDPOINT_URL, ...), as in the storage's own tools. A URL must not contain credentials.
"""

import itertools
import logging
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from common.errors import NO_SPACE, InputError

ATTEMPTS = 7
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
"""Pauses double from attempt to attempt; their sum is about 31 s."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 20
PARTS, SMALLEST_PART, LARGEST_PART = 4, 512 << 10, 16 << 20
"""Parts of an object that are requested at the same time, and their bytes."""


class StorageError(InputError):
    """An object that cannot be fetched or stored. It does not mean that a picture is damaged."""


class MissingObjectError(StorageError):
    """There is no such object."""


def is_url(location: str) -> bool:
    """Whether a location is a URL of object storage, not a folder."""
    return "://" in location


def require_no_secret(url: str) -> None:
    """Raise InputError if the URL contains credentials, because configs and logs contain URLs."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise InputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",
            "a URL with a user, a password or a query",
            "a plain URL, because configs and checkpoints contain it",
            "give credentials in the environment or a profile, such as AWS_PROFILE",
        )


def read(url: str) -> bytes:
    """An object's bytes. Raises StorageError."""
    # One request. fsspec's cat_file makes three on S3, and needs permission to list the bucket.
    with tempfile.TemporaryDirectory() as folder:
        fetch(url, Path(folder) / "object")
        return (Path(folder) / "object").read_bytes()


def fetch(url: str, path: Path, size: int = 0) -> None:
    """Write an object to a local file. Raises StorageError, and OSError if the disk is full.

    size: bytes of the object, if known; a large one is fetched from S3 in parts.
    """
    # gcsfs would need permission to list, and repeat each of its six attempts six times.
    one_request = {"concurrency": 1} if url.startswith("gs:") else {}
    if url.startswith("s3:") and size >= PARTS * SMALLEST_PART:
        _repeat(url, lambda files: _fetch_parts(files, url, path, size))
    else:
        _repeat(url, lambda files: files.get_file(url, str(path), **one_request))


def _fetch_parts(files: Any, url: str, path: Path, size: int) -> None:
    """Write an object to a local file, PARTS requests at a time. Raises what the server causes."""
    edges = [*range(0, size, min(-(-size // PARTS), LARGEST_PART)), size]
    with path.open("wb") as file:
        for first in range(0, len(edges) - 1, PARTS):
            few = edges[first : first + PARTS + 1]
            for part in files.cat_ranges([url] * (len(few) - 1), few[:-1], few[1:]):
                if isinstance(part, Exception):
                    raise part
                file.write(part)


def store(path: Path, url: str) -> None:
    """Write a local file to an object. Raises StorageError."""
    _repeat(url, lambda files: files.put_file(str(path), url))


def remove(url: str) -> None:
    """Delete an object if there is one. Raises StorageError."""
    with suppress(MissingObjectError):
        _repeat(url, lambda files: files.rm_file(url))


def _repeat(url: str, action: Callable[[Any], object]) -> None:
    """Run an action on a file system; repeat it after errors that may be temporary."""
    files = _file_system(url)
    attempts = 2 if url.startswith("gs:") else ATTEMPTS  # gcsfs itself tries six times
    for attempt in itertools.count(1):
        try:
            action(files)
            return
        except Exception as error:  # from fsspec, aiohttp, botocore, google.auth or the disk
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            kind, found, is_final = _describe(error)
            if is_final or attempt == attempts:
                raise kind(
                    url,
                    found if is_final else f"{found}, in all attempts",
                    "an object that these credentials may use, and a server that answers",
                    "check the URL, the credentials and the network, then start again (--resume)",
                ) from error
        pause = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
        time.sleep(pause * random.uniform(0.8, 1.2))


def _describe(error: Exception) -> tuple[type[StorageError], str, bool]:
    """The error class to raise, what was found, and whether another attempt is useless."""
    name = type(error).__name__
    text = " ".join(str(error).split())[:300] or name
    status = getattr(error, "status", None) or 0  # of an HTTP response
    if isinstance(error, FileNotFoundError):
        return MissingObjectError, "no such object", True
    if isinstance(error, PermissionError) or status in (401, 403) or "Forbidden:" in text:
        return StorageError, f"access denied ({text})", True
    if name in ("NoCredentialsError", "ProfileNotFound", "DefaultCredentialsError"):
        return StorageError, f"no credentials ({text})", True
    return StorageError, text, 400 <= status < 500 and status not in (408, 429)


def _file_system(url: str) -> Any:
    """fsspec's file system for a URL; fsspec caches one per thread. Raises InputError."""
    require_no_secret(url)
    protocol = urlsplit(url).scheme
    try:
        files = fsspec.filesystem(protocol, use_listings_cache=False, **_options(protocol))
    except ImportError as error:
        raise InputError(
            url,
            f"a package is missing ({error})",
            "s3fs for s3://, gcsfs for gs://, aiohttp for https://",
            "pip install stacked-hourglass-trainer[cloud] (in a checkout: -e '.[cloud]')",
        ) from error
    except ValueError as error:
        expected = "s3://, gs:// or https://"
        raise InputError(url, str(error), expected, "correct the URL") from error
    files.retries = 1  # _repeat tries again
    return files


def _options(protocol: str) -> dict[str, Any]:
    """Time limits of a file system. Raises ImportError."""
    if protocol == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        return {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}}
    if protocol in ("http", "https"):
        import aiohttp

        # aiohttp's default is five minutes for a whole transfer.
        limits = {"sock_connect": CONNECT_TIMEOUT_S, "sock_read": READ_TIMEOUT_S}
        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, **limits)}}
    if protocol == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # else it prints each traceback
    return {}
