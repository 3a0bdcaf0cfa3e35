"""Checkpoints: tensors and plain values only, sealed, written beside, renamed, never unpickled."""

import errno
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from common.errors import InputError
from configs.schema import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    Config,
    DataConfig,
    HeatmapsConfig,
    ModelConfig,
    as_dict,
    check_values,
    config_from_dict,
    flat,
)
from configs.skeleton import MPII, Skeleton, skeleton_from_plain, unnamed
from model import bearpaw, seal
from model import foreign_checkpoints as princeton
from model.export import OnnxNetwork
from model.exported import read_exported
from model.hourglass import StackedHourglass

FORMAT = "stacked-hourglass-checkpoint"
FORMAT_VERSION = 1

State = dict[str, Any]
_USE_ANOTHER = "use another checkpoint of the run: last.pt, one of step_*.pt, best.pt"


def save(path: Path, state: State) -> None:
    """Write a checkpoint whole or not at all; an older file stays until the new one is on disk."""
    write(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **state})


def write(path: Path, raw: State) -> None:
    """The same for a checkpoint in anybody's format. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w+b") as file:
            _write_zip(raw, file)
            seal.seal(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:  # of a full disk it does not say the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_zip(raw: State, file: BinaryIO) -> None:
    """torch.save. Raises OSError; torch's writer itself hides what the file said."""
    sink = _Sink(file)
    try:
        torch.save(raw, sink)  # type: ignore[arg-type]
    except RuntimeError as error:
        hidden = OSError(errno.EIO, f"torch.save failed: {str(error)[:120]}")
        raise sink.fault or hidden from error


class _Sink:
    """A file for torch.save that keeps its first fault."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.fault: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.fault = self.fault or error
            raise

    def flush(self) -> None:
        self.file.flush()


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk; a renamed file is safe only then."""
    if os.name != "posix":
        return  # a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def load(path: Path, onnx: bool = False) -> State:
    """Read a checkpoint onto the CPU. Raises InputError; never runs code from the file.

    Checkpoints of others' code and .safetensors are read likewise. onnx: an .onnx will do, which
    has no weights to train or convert; `evaluation_network` runs it.
    """
    if not path.is_file():
        raise _missing(path)
    if path.suffix == ".onnx" and not onnx:
        raise InputError(
            path,
            "an ONNX file, which can be run and not trained",
            "a checkpoint (.pt) or .safetensors",
            "give the checkpoint that it was exported from",
        )
    state = read_exported(path) if path.suffix in (".safetensors", ".onnx") else _read(path)
    foreign = _foreign(state, path)
    if foreign is not None:
        _check_kinds(foreign, path)
        return foreign
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(path, "another kind of file", f"format {FORMAT!r}", "give a checkpoint")
    if state.get("format_version") != FORMAT_VERSION:
        found = f"format version {state.get('format_version')}"
        raise InputError(path, found, f"version {FORMAT_VERSION}", "train with this version")
    missing = {"config", "skeleton", "model", "step"} - state.keys()
    if missing:
        raise InputError(
            path, f"no {', '.join(sorted(missing))}", "a whole checkpoint", "use another one"
        )
    _check_kinds(state, path)
    return state


def _missing(path: Path) -> InputError:
    """The error for what is no file; it gives the command with a checkpoint that lies there."""
    expected = "a checkpoint (last.pt, best.pt)"
    folder, found = (path, "a folder") if path.is_dir() else (path.parent, "no such file")
    there = [folder / name for name in ("best.pt", "last.pt") if (folder / name).is_file()]
    if not there:
        return InputError(path, found, expected, "give its path")
    other = there[0]
    if other.name == "last.pt":
        found += ", and no best.pt in it" if path.is_dir() else ""
        found += ", but last.pt is there; best.pt comes with the first validation"
    words = [str(other) if word == str(path) else word for word in sys.argv]
    again = shlex.join(["python", *words]) if str(other) in words else f"give {other}"
    return InputError(path, found, expected, again)


def _check_kinds(state: State, path: Path) -> None:
    """Raise InputError unless the parts that everybody needs are of their kind."""
    try:
        skeleton_from_plain(state["skeleton"])
        for name in ("model", "ema"):
            tensors = state.get(name, {})
            whole = isinstance(tensors, dict)
            if not whole or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                raise ValueError(f"{name} has values that are no tensors")
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"step {state['step']!r:.100}")
        if not isinstance(state["config"], dict):
            raise ValueError("a config that is no dict")
        for name, is_sound in _PLACE_IN_A_RUN.items():
            if name in state and not is_sound(state[name]):
                raise ValueError(f"{name} {state[name]!r:.100}")
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            path, f"damaged ({type(error).__name__}: {error})", "a whole checkpoint", _USE_ANOTHER
        ) from error


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63  # torch takes no larger ones
    return type(value) is float and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _are_bytes(value: Any) -> bool:
    """Whether it is a list of states, one of each rank."""
    return isinstance(value, list) and all(
        isinstance(each, Tensor) and each.dtype == torch.uint8 and each.dim() == 1 for each in value
    )


def _is_scaler(value: Any) -> bool:
    """Whether it is the state of torch's GradScaler, or empty where there was none."""
    return isinstance(value, dict) and all(
        _is_count(each) if name in _SCALERS_COUNTS else _is_number(each) and 0 < each < 3e38
        for name, each in value.items()
    )


_SCALERS_COUNTS = {"growth_interval", "_growth_tracker"}
_PLACE_IN_A_RUN: dict[str, Callable[[Any], bool]] = {
    "best": lambda value: _is_number(value) and -1 <= value <= 1,
    "seconds": lambda value: _is_number(value) and 0 <= value < 2**40,
    "validation_due": lambda value: isinstance(value, bool),
    "people": lambda value: _is_count(value, 1),
    "people_sha256": _is_name,
    "ranks": lambda value: _is_count(value, 1),
    "people_a_step": lambda value: _is_count(value, 1),
    "loader": _is_name,
    "loader_device": _is_name,
    "loader_began": _is_count,
    "rng": _are_bytes,
    "loader_states": _are_bytes,
    "scaler": _is_scaler,
}
"""What a resumed run reads besides weights and moments, and whether it is sound."""


def _read(path: Path) -> Any:
    damage = seal.damage(path) or seal.bomb(path)
    if damage:
        raise InputError(path, damage, "a file as training wrote it", _USE_ANOTHER)
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_inflated(raw)
        return raw
    except PermissionError:
        raise
    except Exception as error:  # torch raises a different type for each kind of damage
        if type(error).__name__ == "UnpicklingError":
            raise InputError(
                path,
                "objects that only running code of the file could make, or damage",
                "tensors and plain values",
                "let who made it save the weights alone: torch.save(model.state_dict(), PATH)",
            ) from error
        raise InputError(
            path,
            f"not readable as a checkpoint ({type(error).__name__}: {str(error)[:120]})",
            "a file that training wrote",
            _USE_ANOTHER,
        ) from error


def _refuse_inflated(value: Any) -> None:
    """Raise ValueError for a tensor that is larger than the bytes which the file has of it."""
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and value.device.type == "cpu"
        held = value.untyped_storage().nbytes() if plain else 0
        if not plain or value.is_quantized or value.numel() * value.element_size() > held:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} without its values")
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_inflated(item)


def _foreign(raw: Any, path: Path) -> State | None:
    """A checkpoint of somebody else's code as one of ours, or None if it is not one we know."""
    for layout in (princeton, bearpaw):
        theirs = layout.find_state_dict(raw)
        if theirs is not None:
            try:
                return _from_foreign(raw, layout.our_weights(theirs), layout is princeton, path)
            except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
                raise InputError(
                    path,
                    f"a network that differs from its kind ({type(error).__name__}: {error})",
                    f"a network of {layout.__name__}",
                    "give a checkpoint that its own train.py wrote",
                ) from error
    return None


def _from_foreign(raw: State, weights: dict[str, Tensor], is_princeton: bool, path: Path) -> State:
    """Config from the shapes of the tensors, and Adam's state; it has no place in our data."""
    size = princeton.size_of(weights)
    # Its files do not name the joints; those of MPII are what its code trains on.
    skeleton = MPII if size.joints == MPII.joint_count else unnamed(size.joints)
    model = ModelConfig(
        stacks=size.stacks,
        width=size.width,
        depth=size.depth,
        stem=size.stem,
        input_mean=(0.0, 0.0, 0.0) if is_princeton else bearpaw.INPUT_MEAN,
    )
    config = Config(model=model)
    if is_princeton:
        data, rule = DataConfig(preset="princeton"), HeatmapsConfig(rule="princeton")
        config = Config(data=data, heatmaps=rule, model=model)
    network = build_network(config, size.joints)
    load_weights(network, weights, path)
    state: State = {
        "config": as_dict(config),
        "skeleton": skeleton.plain(),
        "model": weights,
        "ema": {},
        "step": int(raw.get("epoch", 0)) * princeton.STEPS_PER_EPOCH if is_princeton else 0,
    }
    if is_princeton and raw.get("optimizer"):
        state["optimizer"] = princeton.our_adam_state(raw["optimizer"], network)
    return state


def to_princeton(state: State, path: Path) -> State:
    """A checkpoint of ours as princeton-vl's train.py would write it. Raises InputError.

    Its weights are the averaged ones where there are some; then there is no optimizer state, which
    belongs to the others.
    """
    size = config_of(state, path).model
    if size.stem != princeton.STEM or size.depth != princeton.DEPTH or any(size.input_mean):
        raise InputError(
            path,
            f"stem {size.stem}, depth {size.depth}, input mean {size.input_mean}",
            f"stem {princeton.STEM}, depth {princeton.DEPTH}, no mean: its code has no others",
            "keep this checkpoint in our format",
        )
    network = trained_network(state, path)
    weights = princeton.their_weights(network.state_dict(), network)
    raw: State = {
        "state_dict": {princeton.PREFIX + name: tensor for name, tensor in weights.items()},
        "epoch": state["step"] // princeton.STEPS_PER_EPOCH,
    }
    if "optimizer" in state and not state["ema"] and _is_adam(state["optimizer"]):
        raw["optimizer"] = princeton.their_adam_state(state["optimizer"], network)
    return raw


def _is_adam(optimizer: State) -> bool:
    return all("exp_avg" in moments for moments in optimizer["state"].values())


def config_of(state: State, path: Path) -> Config:
    """The resolved config that the checkpoint was trained with."""
    config = config_from_dict(state["config"], f"{path}: config")
    check_values(config)
    return config


def compare_settings(saved: dict[str, Any], config: Config, path: Path) -> list[str]:
    """What a resumed run changes of its settings, a sentence each.

    saved: the config in the checkpoint. Raises InputError for changes that make it another run,
    and names those alone.
    """
    now = flat(as_dict(config))
    changed = {
        name: f"{name} was {before}, is {now[name]}"
        for name, before in flat(saved).items()
        if before != now[name] and name not in FREE_ON_RESUME
    }
    refused = [line for name, line in changed.items() if name in FIXED_ON_RESUME]
    if refused:
        raise InputError(
            path,
            "; ".join(refused),
            "the settings that the run began with",
            "resume with the config.yaml in its folder, or begin a new run with --init_from",
        )
    return [f"changed on resuming: {line}" for line in changed.values()]


def require_same_size(state: State, config: Config, path: Path) -> None:
    """Raise InputError, naming the options, unless the config has the checkpoint's network."""
    saved, now = flat(state["config"]), flat(as_dict(config))
    other = {
        name: value
        for name, value in saved.items()
        if name.startswith("model.")
        and value != now[name]
        and name != "model.checkpoint_activations"
    }
    if other:
        raise InputError(
            path,
            "a network with " + ", ".join(f"{name} {value}" for name, value in other.items()),
            "the network of the config: " + ", ".join(f"{name} {now[name]}" for name in other),
            "add " + " ".join(f"--{name} {_as_option(value)}" for name, value in other.items()),
        )


def foreign_remarks(state: State, config: Config) -> list[str]:
    """In what a run goes on otherwise than the code that wrote its checkpoint, a sentence each."""
    saved, now = flat(state["config"]), flat(as_dict(config))
    names = ("data.preset", "heatmaps.rule", "heatmaps.sigma")
    return [
        f"its code trained with {name} {saved[name]}; this run goes on with {now[name]}"
        for name in names
        if saved[name] != now[name]
    ]


def _as_option(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def skeleton_of(state: State) -> Skeleton:
    """The joints that the checkpoint was trained on; without names where it does not tell them."""
    return skeleton_from_plain(state["skeleton"])


def build_network(config: Config, joints: int) -> StackedHourglass:
    """The network of a config, with fresh weights."""
    size = config.model
    return StackedHourglass(
        size.stacks, size.width, joints, size.depth, size.stem, size.input_mean,
        size.checkpoint_activations,
    )  # fmt: skip


def evaluation_network(state: State, path: Path, averaged: bool = True) -> nn.Module:
    """What `trained_network` gives, or the graph of an .onnx, which answers alike."""
    if state.get("onnx"):
        return OnnxNetwork(path, skeleton_of(state).joint_count)
    return trained_network(state, path, averaged)


def trained_network(state: State, path: Path, averaged: bool = True) -> StackedHourglass:
    """The trained network in eval mode. averaged: take the averaged weights if there are some."""
    config, joints = config_of(state, path), skeleton_of(state).joint_count
    weights = state["ema"] if averaged and state.get("ema") else state["model"]
    with torch.device("meta"):  # costs no memory, whatever the config says
        require_fit(build_network(config, joints), weights, path)
    network = build_network(config, joints)
    network.load_state_dict(weights)
    return network.eval()


def load_weights(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load every tensor. Raises InputError as `require_fit` does."""
    require_fit(network, weights, path)
    network.load_state_dict(weights)


def require_fit(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless these are the network's tensors, by name and shape."""
    differing = _differences(network.state_dict(), weights)
    if differing:
        raise InputError(
            path,
            f"weights of another network; {len(differing)} tensors differ: "
            + "; ".join(differing[:3]),
            "the architecture of the config",
            "use the config that the checkpoint was trained with, "
            "or --init_from for another size of head",
        )


def _differences(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    lines = []
    for name, tensor in mine.items():
        if name not in theirs:
            lines.append(f"{name} is missing")
        elif theirs[name].shape != tensor.shape:
            lines.append(f"{name} is {tuple(theirs[name].shape)}, not {tuple(tensor.shape)}")
    return lines + [f"{name} is not in the network" for name in theirs if name not in mine]


def init_weights(network: nn.Module, skeleton: Skeleton, state: State, path: Path) -> list[str]:
    """Start from a checkpoint's weights; other joints are allowed. Returns what starts fresh.

    skeleton: the network's joints. Where the checkpoint's are others, the layers that see the
    joints (heads, merge_heatmaps) start fresh. Nothing else may differ in shape, else InputError.
    """
    weights = dict(state.get("ema") or state["model"])
    fresh: dict[str, Tensor] = {}
    if not skeleton.same_joints(skeleton_of(state)):
        fresh = {
            name: tensor
            for name, tensor in network.state_dict().items()
            if re.fullmatch(r"heads\..+|merge_heatmaps\..+\.weight", name)
        }
    load_weights(network, {**weights, **fresh}, path)
    return list(fresh)
