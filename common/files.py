"""Files read with a bound on their size, and files written whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

LARGEST_JSON = 512 << 20
"""Bytes. COCO's annotation of 118,000 pictures has 238 million."""
_WEIGHTS = {b",": 1, b":": 1, b'"': 1, b"[": 2, b"{": 4}
_LARGEST_WEIGHT = 80_000_000
"""Of one JSON text: each is 50 bytes of memory at most (`{"":0.5},` weighs 8 and takes 240).

COCO's person_keypoints_train2017.json weighs about 50 million: 13 of 262,000 people's joints, 20 of
their outlines, the rest of brackets and names; MPII's annotation of 25,000 people less than 5.
"""
_LARGEST_YAML = 4 << 20
_DEEPEST_YAML = 50


def read_bytes(path: Path, most: int) -> bytes:
    """The whole of a file of at most so many bytes; no more than that is ever read."""
    with path.open("rb") as file:
        return bounded(file.read(most + 1), most)


def bounded(data: bytes, most: int) -> bytes:
    """The data themselves, if they are not longer than that."""
    if len(data) > most:
        size = f"{most >> 20} MiB" if most >> 20 else f"{most:,} bytes"
        raise ValueError(f"more than {size}")
    return data


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; nesting without end, and memory that runs out, are
    ValueErrors too."""
    weight = sum(each * data.count(sign) for sign, each in _WEIGHTS.items())
    if weight > _LARGEST_WEIGHT:
        raise ValueError(f"more values than {50 * _LARGEST_WEIGHT:,} bytes of memory hold")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("lists within lists without end") from error
    except MemoryError as error:
        raise ValueError("more values than there is memory for") from error


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """The value of a JSON file of at most so many bytes."""
    return parse_json(read_bytes(path, most))


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file: no objects, no aliases, whose unfolding can be endless."""
    text = read_bytes(path, _LARGEST_YAML).decode("utf-8")
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    except (RecursionError, OverflowError, AttributeError, TypeError) as error:
        # PyYAML lets these through for some damage, as a tag on the wrong kind of value.
        raise ValueError(f"{type(error).__name__}: {error}"[:300]) from error


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader, without what makes a small text a large value."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias (*name) in line {mark.line + 1}; write the value out")
        self._depth += 1
        if self._depth > _DEEPEST_YAML:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside and rename it; folders above it are made. Raises OSError that names it.

    An older file stays until the new one is whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of a full disk it does not say the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
