"""Checkpoints: tensors and plain values with a checksum, written atomically, never unpickled.

A file is the zip archive that torch.save writes. The zip comment holds the SHA-256 of all bytes
before it: it stays with the file, torch.load ignores it, and `unzip -z` shows it.
"""

import errno
import hashlib
import io
import os
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError  # only the exception
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import InputError
from common.files import write_atomic
from configs.schema import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    Config,
    as_dict,
    config_from_dict,
    flat,
)
from configs.skeleton import Skeleton, skeleton_from_dict
from model.calibration import Calibration
from model.export import OnnxNetwork, read_export
from model.foreign_checkpoints import PRINCETON_MODEL, princeton_contents, read_foreign
from model.hourglass import StackedHourglass

FORMAT = "stacked-hourglass-checkpoint"
FORMAT_VERSION = 4
LAST, BEST = "last.pt", "best.pt"

_CHECKSUM_TAG = b"sha256:"
_CHECKSUM_LENGTH = len(_CHECKSUM_TAG) + 2 * hashlib.sha256().digest_size
_PARSER_ERRORS = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
_FORMAT_ERRORS = (OSError, ArithmeticError, AssertionError, struct.error, zlib.error)
_DAMAGE_ERRORS = (*_PARSER_ERRORS, *_FORMAT_ERRORS, zipfile.BadZipFile)
"""What torch.load and zipfile raise for the various kinds of damage."""
_USE_ANOTHER = "use another checkpoint of the run: last.pt, one of step_*.pt, best.pt"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a training run besides weights and optimizer."""

    ranks: int
    loader: str
    """As chosen, never "auto"."""
    rng: list[Tensor]
    """uint8, torch's random state of each rank."""
    people_sha256: str
    people_a_step: int
    """The global batch size."""
    best: float
    """The best pooled PCKh of a validation, -1 before the first."""
    seconds: float
    """Time spent in training."""
    validation_due: bool
    scaler: dict[str, Any]
    """State of torch.amp.GradScaler; empty without fp16."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint file, config and skeleton parsed and checked."""

    path: Path
    config: Config
    skeleton: Skeleton
    step: int
    weights: dict[str, Tensor]
    """The network's ("model" in the file); {} for an ONNX file."""
    averaged: dict[str, Tensor]
    """Exponential moving averages of the weights ("ema" in the file); {} if there are none."""
    optimizer: dict[str, Any] | None
    """State of torch's optimizer; None if the file holds only weights."""
    run: RunState | None
    """None for checkpoints of other code and for exported networks."""
    is_onnx: bool = False
    calibration: Calibration | None = None
    """What peaks of the heatmaps mean, if it was measured (`evaluate.py --calibrate`)."""


# Writing


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the old file stays until the new one is on disk. Raises OSError."""
    contents = {
        **header(checkpoint),
        "model": checkpoint.weights,
        "ema": checkpoint.averaged,
        "optimizer": checkpoint.optimizer,
        **(vars(checkpoint.run) if checkpoint.run else {}),
    }
    write_archive(path, {name: value for name, value in contents.items() if value is not None})


def header(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain values that both checkpoint files and exported networks hold."""
    tables = checkpoint.calibration
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": as_dict(checkpoint.config),
        "skeleton": checkpoint.skeleton.as_dict(),
        "step": checkpoint.step,
        "calibration": tables and {name: t.tolist() for name, t in tables._asdict().items()},
    }


def write_archive(path: Path, contents: dict[str, Any]) -> None:
    """torch.save with a checksum, atomically. Raises OSError that names the file."""
    with io.BytesIO() as archive:
        torch.save(contents, archive)
        archive.seek(-2, os.SEEK_END)  # the archive's last field: the length of its comment
        archive.write(_CHECKSUM_LENGTH.to_bytes(2, "little"))
        with archive.getbuffer() as data:
            checksum = hashlib.sha256(data).hexdigest()
        archive.write(_CHECKSUM_TAG + checksum.encode())
        with archive.getbuffer() as data:
            write_atomic(path, data)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a rename in it survives a crash of the machine."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # not every file system can sync a folder
            os.fsync(descriptor)
        os.close(descriptor)


# Reading


def load_checkpoint(path: Path, onnx: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises InputError; never runs code from the file.

    path: a file, or the folder of a run, whose best.pt is read. Checkpoints of other code and
    .safetensors are read too. onnx: accept an .onnx, which has no weights to train or convert;
    `evaluation_network` runs it.
    """
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        raise InputError(path, "no such file", f"a checkpoint ({BEST}, {LAST})", "give its path")
    if path.suffix == ".onnx" and not onnx:
        found, advice = "an ONNX file, which has no weights", "give the checkpoint it was made from"
        raise InputError(path, found, "a checkpoint or .safetensors", advice)
    if path.suffix in (".safetensors", ".onnx"):
        return _from_ours(read_export(path), path)
    raw = _read_archive(path)
    return _from_foreign(raw, path) or _from_ours(raw, path)


def _read_archive(path: Path) -> Any:
    if damage := find_damage(path):
        raise InputError(path, damage, "a file as training wrote it", _USE_ANOTHER)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = "objects that need code from the file to run, or damage"
        advice = "ask its author to save only the weights: torch.save(model.state_dict(), PATH)"
        raise InputError(path, found, "tensors and plain values", advice) from error
    except _DAMAGE_ERRORS as error:
        found = f"not readable as a checkpoint ({_describe(error)})"
        raise InputError(path, found, "a file that training wrote", _USE_ANOTHER) from error


def find_damage(path: Path) -> str:
    """The fault in a zip archive's bytes; empty without a fault, and for other kinds of files.

    Records may not claim more bytes than the file has, because torch.load allocates what they
    claim; torch.save stores them uncompressed. Without a checksum (files of other code) the CRC-32
    of each record is checked.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start[:1] == b"\x80":  # a pickle, torch's format before version 1.6
            return ""
        return "it is cut off" if start == b"PK\x03\x04" else "not a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            records, checksum = archive.infolist(), archive.comment
            is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            damaged = archive.testzip() if is_stored and not checksum else None
    except _DAMAGE_ERRORS as error:
        return f"a damaged archive ({_describe(error)})"
    size = path.stat().st_size
    claimed = sum(record.file_size for record in records)
    faults = {
        "its bytes do not match its checksum": checksum
        and checksum != _CHECKSUM_TAG + _sha256(path, size - len(checksum)),
        "compressed records": not is_stored,
        f"records of {claimed:,} bytes": claimed > size,
        f"its record {damaged} is damaged": damaged,
    }
    return next((fault for fault, is_there in faults.items() if is_there), "")


def _describe(error: Exception) -> str:
    """The error as text. Raises it if the file cannot be read; EINVAL means a negative offset."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        raise error
    return " ".join(str(error).split())[:120] or "no reason given"


def _sha256(path: Path, size: int) -> bytes:
    """Hexadecimal SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest().encode()


def _from_ours(raw: Any, path: Path) -> Checkpoint:
    """The Checkpoint of a file that this project wrote. Raises InputError."""
    expected = FORMAT, FORMAT_VERSION
    found = (raw.get("format"), raw.get("format_version")) if isinstance(raw, dict) else type(raw)
    if found != expected:
        raise InputError(path, f"format {found}", f"format {expected}", "give another checkpoint")
    run = {f.name: raw[f.name] for f in fields(RunState) if f.name in raw}
    tables = raw.get("calibration")
    return Checkpoint(
        path=path,
        config=config_from_dict(raw["config"], f"{path}: config"),
        skeleton=skeleton_from_dict(raw["skeleton"]),
        step=raw["step"],
        weights=raw["model"],
        averaged=raw["ema"],
        optimizer=raw.get("optimizer"),
        run=RunState(**run) if run else None,
        is_onnx=path.suffix == ".onnx",
        calibration=tables and Calibration(*map(np.array, tables.values())),
    )


def _from_foreign(raw: Any, path: Path) -> Checkpoint | None:
    """A checkpoint of other code, or None if it is of no known kind. Raises InputError."""
    found = read_foreign(raw, path)
    if found is None:
        return None
    with torch.device("meta"):  # only shapes, whatever size the file claims
        network = build_network(found.config, found.skeleton.joint_count)
    require_fit(network, found.weights, path)
    return Checkpoint(path=path, averaged={}, run=None, **found._asdict())


def to_princeton(checkpoint: Checkpoint) -> dict[str, Any]:
    """What princeton-vl's train.py would have saved. Raises InputError.

    With averaged weights these are used, and the optimizer's state is left out.
    """
    network = trained_network(checkpoint)
    own = {name: getattr(checkpoint.config.model, name) for name in PRINCETON_MODEL}
    if not isinstance(network, StackedHourglass) or own != PRINCETON_MODEL:
        found = f"{type(network).__name__} with {own}"
        expected = f"StackedHourglass with {PRINCETON_MODEL}, which its code fixes"
        raise InputError(checkpoint.path, found, expected, "keep this checkpoint's format")
    optimizer = None if checkpoint.averaged else checkpoint.optimizer
    return princeton_contents(network, checkpoint.step, optimizer)


# Networks


def build_network(config: Config, joints: int) -> nn.Module:
    """The network of a config, with fresh weights."""
    return StackedHourglass(config.model, joints)


def evaluation_network(checkpoint: Checkpoint) -> nn.Module:
    """`trained_network`, or the graph of an ONNX file, which is called the same way."""
    if checkpoint.is_onnx:
        return OnnxNetwork(checkpoint.path)
    return trained_network(checkpoint)


def trained_network(checkpoint: Checkpoint) -> nn.Module:
    """The network in eval mode, with the averaged weights if there are any."""
    weights = checkpoint.averaged or checkpoint.weights
    joints = checkpoint.skeleton.joint_count
    with torch.device("meta"):  # takes no memory, whatever the config says
        require_fit(build_network(checkpoint.config, joints), weights, checkpoint.path)
    network = build_network(checkpoint.config, joints)
    network.load_state_dict(weights)
    return network.eval()


def load_weights(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load every tensor. Raises InputError as `require_fit` does."""
    require_fit(network, weights, path)
    network.load_state_dict(weights)


def require_fit(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless these are the network's tensors, by name and shape."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = [
        f"{name} is {given.get(name, 'missing')}, not {own.get(name, 'in the network')}"
        for name in own | given
        if given.get(name) != own.get(name)
    ]
    if differing:
        found = f"weights of another network; {len(differing)} tensors differ: "
        advice = "use the checkpoint's config, or --init_from for another number of joints"
        found += "; ".join(differing[:3])
        raise InputError(path, found, "the architecture of the config", advice)


def init_weights(network: nn.Module, skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Load a checkpoint's weights, also of other joints. Returns the tensors that start fresh.

    skeleton: the network's joints. If the checkpoint has other joints, the layers that depend on
    them (heads, merge_heatmaps) keep their initial weights. Raises InputError for other shapes.
    """
    weights = dict(checkpoint.averaged or checkpoint.weights)
    fresh: dict[str, Tensor] = {}
    if not skeleton.same_joints(checkpoint.skeleton):
        fresh = {
            name: tensor
            for name, tensor in network.state_dict().items()
            if re.fullmatch(r"heads\..+|merge_heatmaps\..+\.weight", name)
        }
    load_weights(network, {**weights, **fresh}, checkpoint.path)
    return list(fresh)


# Comparing a checkpoint's config with a run's


def require_same_size(checkpoint: Checkpoint, config: Config) -> None:
    """Raise InputError, with options to add, unless config and checkpoint have the same network."""
    changes = _changes(checkpoint, config)
    other = {name: before for name, (before, _) in changes.items() if name.startswith("model.")}
    if other:
        found = "a network with " + ", ".join(f"{name} {value}" for name, value in other.items())
        options = [f"--{name} {value}".replace(", ", ",") for name, value in other.items()]
        advice = "add " + " ".join(options)
        raise InputError(checkpoint.path, found, "the network of the config", advice)


def compare_settings(checkpoint: Checkpoint, config: Config) -> list[str]:
    """One sentence for each setting that a resumed run changes.

    Raises InputError for settings that may not change.
    """
    changes = _changes(checkpoint, config)
    lines = {name: f"{name} was {before}, is {now}" for name, (before, now) in changes.items()}
    refused = [line for name, line in lines.items() if name in FIXED_ON_RESUME]
    if refused:
        advice = "resume with the config.yaml in its folder, or begin a new run with --init_from"
        expected = "the settings that the run began with"
        raise InputError(checkpoint.path, "; ".join(refused), expected, advice)
    return [f"changed on resuming: {line}" for line in lines.values()]


def foreign_remarks(checkpoint: Checkpoint, config: Config) -> list[str]:
    """One sentence for each setting that differs from the code that wrote the checkpoint."""
    names = ("data.preset", "heatmaps.rule", "heatmaps.sigma")
    return [
        f"its code trained with {name} {before}; this run continues with {now}"
        for name, (before, now) in _changes(checkpoint, config).items()
        if name in names
    ]


def _changes(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (the checkpoint's value, the config's) of settings that matter and differ."""
    saved, now = flat(as_dict(checkpoint.config)), flat(as_dict(config))
    return {
        name: (before, now[name])
        for name, before in saved.items()
        if before != now[name] and name not in FREE_ON_RESUME
    }
