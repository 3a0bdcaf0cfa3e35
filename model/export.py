"""Trained networks in other formats: .onnx, run by ONNX Runtime, and .safetensors.

Their metadata holds the header of a checkpoint (config, skeleton, step) as JSON under one key, so
that they are read like checkpoints. Both packages are optional.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.files import parse_json, write_atomic
from common.system import optional_module

INPUT, OUTPUT = "images", "heatmaps"
"""Names in the graph: (N, 3, S, S) float32 RGB in 0..1, and (N, J, S/4, S/4) of the last stack."""
KEY = "stacked_hourglass"
"""Key in the metadata."""


class OnnxNetwork(nn.Module):
    """Called like `StackedHourglass`; returns only the last stack's heatmaps."""

    def __init__(self, path: Path):
        """Open the file, on a GPU if this ONNX Runtime supports one. Raises InputError."""
        super().__init__()
        self.path = path
        self.session = open_session(path)
        self.eval()

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """RGB in 0..1 -> heatmaps (N, 1, J, H/4, W/4) on the same device. Raises InputError."""
        images = images_N3HW.float().contiguous().cpu().numpy()
        try:
            (heat,) = self.session.run([OUTPUT], {INPUT: images})
        except _onnxruntime_errors() as error:
            raise _unusable(self.path, f"a graph that cannot be run ({error})") from error
        return torch.from_numpy(heat).to(images_N3HW.device)[:, None]


def read_export(path: Path) -> dict[str, Any]:
    """A .safetensors or .onnx as the contents of a checkpoint file. Raises InputError.

    An .onnx has no weights.
    """
    weights: dict[str, Tensor] = {}
    try:
        if path.suffix == ".onnx":
            metadata = open_session(path).get_modelmeta().custom_metadata_map
        else:
            metadata, weights = _read_safetensors(path)
        header = parse_json(metadata.get(KEY, "").encode())
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
    except ValueError as error:  # UnicodeDecodeError is one too
        raise _unusable(path, f"no metadata {KEY!r} of this project") from error
    return {**header, "model": weights, "ema": {}}


def write_safetensors(path: Path, weights: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write weights and a checkpoint's header atomically. Raises InputError without safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", KEY: json.dumps(header)}
    write_atomic(path, optional_module("safetensors.torch", path).save(tensors, metadata))


def open_session(path: Path) -> Any:
    """ONNX Runtime's session of a file. Raises InputError."""
    onnxruntime = optional_module("onnxruntime", path)
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except _onnxruntime_errors() as error:
        problem = f"not readable as ONNX ({str(error)[:120]})" if path.exists() else "no such file"
        raise _unusable(path, problem) from error


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its errors have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    broken = (state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, state.NotImplemented)
    return (state.Fail, state.InvalidArgument, state.RuntimeException, *broken)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    safetensors = optional_module("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, weights
    except safetensors.SafetensorError as error:
        raise _unusable(path, f"not readable as safetensors ({str(error)[:120]})") from error


def _unusable(path: Path, found: str) -> InputError:
    expected = "a file of tools/export_onnx.py, or an ONNX detector (docs/predict.md)"
    return InputError(path, found, expected, "export it again")
