"""Trained networks in others' formats: .safetensors and .onnx, with our facts in their metadata.

The facts are everything of a checkpoint that is no tensor and no state of a run: config, skeleton,
step. They lie as JSON under one key, so that such a file is read as a checkpoint is.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.files import parse_json, write_atomic
from model.export import read_metadata

KEY = "stacked_hourglass"
_FACTS = ("format", "format_version", "config", "skeleton", "step")
_EXPECTED = "a file that tools/export_onnx.py wrote"


def facts_text(state: dict[str, Any]) -> str:
    """What stands under KEY."""
    return json.dumps({name: state[name] for name in _FACTS})


def read_exported(path: Path) -> dict[str, Any]:
    """A .safetensors or .onnx as the dict of a checkpoint. Raises InputError.

    Of an .onnx there are no weights, and `onnx` says that it is one.
    """
    if path.suffix == ".onnx":
        metadata = read_metadata(path)
        return {**_facts(metadata, path), "model": {}, "ema": {}, "onnx": True}
    metadata, weights = _read_safetensors(path)
    return {**_facts(metadata, path), "model": weights, "ema": {}}


def write_safetensors(path: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write weights and facts, whole or not at all. Raises InputError."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", KEY: facts_text(state)}
    write_atomic(path, _safetensors(path).torch.save(tensors, metadata))


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with _safetensors(path).safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, weights
    except InputError:
        raise
    except PermissionError:
        raise
    except Exception as error:  # its SafetensorError, and others for other damage
        raise InputError(
            path, f"not readable as safetensors ({str(error)[:120]})", _EXPECTED, "export it again"
        ) from error


def _facts(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        facts = parse_json(metadata[KEY].encode())
        return {name: facts[name] for name in _FACTS}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            path,
            f"no facts of ours in its metadata ({', '.join(sorted(metadata)) or 'it has none'})",
            _EXPECTED,
            "export the checkpoint again",
        ) from error


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(
            path,
            "safetensors is not installed",
            "it, for .safetensors files",
            "pip install safetensors",
        ) from error
    return safetensors
