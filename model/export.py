"""A network in an ONNX file, run by ONNX Runtime, in the place of a torch module."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError

INPUT, OUTPUT = "images", "heatmaps"
"""Names in the graph: (N, 3, S, S) float32 RGB in 0..1, and (N, J, S/4, S/4) of the last stack."""

_EXPECTED = "a file that tools/export_onnx.py wrote"


class OnnxNetwork(nn.Module):
    """Answers as `StackedHourglass` does, with the last stack alone."""

    def __init__(self, path: Path, joints: int):
        """Open the file, on a GPU if this ONNX Runtime has one. Raises InputError."""
        super().__init__()
        self.path, self.joints = path, joints
        self.session = open_session(path)
        self.eval()

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """RGB in 0..1 -> heatmaps (N, 1, J, H/4, W/4) on the same device. Raises InputError."""
        images = images_N3HW.float().contiguous().cpu().numpy()
        count, _, height, width = images.shape
        try:
            (heat,) = self.session.run([OUTPUT], {INPUT: images})
        except Exception as error:  # it raises a type of its own for each kind of fault
            raise self._unusable(f"a graph that cannot be run ({str(error)[:200]})") from error
        shape = (count, self.joints, height // 4, width // 4)
        found = getattr(heat, "shape", None), str(getattr(heat, "dtype", None))
        if found != (shape, "float32"):
            raise self._unusable(f"heatmaps of shape {found[0]}, {found[1]}, and not {shape}")
        return torch.from_numpy(heat).to(images_N3HW.device)[:, None]

    def _unusable(self, found: str) -> InputError:
        return InputError(self.path, found, _EXPECTED, "export it again")


def open_session(path: Path) -> Any:
    """ONNX Runtime's session of a file. Raises InputError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            path, "ONNX Runtime is not installed", "it, for .onnx files", "pip install onnxruntime"
        ) from error
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # it raises a type of its own for each kind of damage
        raise InputError(
            path,
            f"not readable as ONNX ({str(error)[:120]})",
            _EXPECTED,
            "export it again",
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """What an ONNX file says of itself. Raises InputError."""
    meta = open_session(path).get_modelmeta()
    try:
        metadata: dict[str, str] = meta.custom_metadata_map
    except UnicodeDecodeError as error:
        raise InputError(
            path, f"metadata that is not UTF-8 ({error})", _EXPECTED, "export it again"
        ) from error
    return metadata
