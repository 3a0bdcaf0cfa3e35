"""Weights of bearpaw/pytorch-pose and anibali/pytorch-stacked-hourglass as weights of this network.

The same network with a wider stem (64, 128, 256) and keys of its own. The mean colour of MPII is
subtracted from its input. Only the form with one residual a place is read (`num_blocks=1`).
"""

import re
from typing import Any

from torch import Tensor

from model.foreign_checkpoints import without_prefix

INPUT_MEAN = (0.4404, 0.4440, 0.4327)
"""RGB in 0..1, the constant of anibali/pytorch-stacked-hourglass."""
_PREFIXES = ("module.", "")
_FIRST = "hg.0.hg.0.0.0.conv1.weight"

# Beginnings of a name, theirs and ours; \1 is the stack.
_PLACES = (
    (r"conv1", "stem.conv.0"),
    (r"bn1", "stem.conv.1"),
    (r"layer1\.0", "stem.residual1"),
    (r"layer2\.0", "stem.residual2"),
    (r"layer3\.0", "stem.residual3"),
    (r"res\.(\d+)\.0", r"features.\1.0"),
    (r"fc\.(\d+)", r"features.\1.1"),
    (r"score\.(\d+)", r"heads.\1"),
    (r"fc_\.(\d+)", r"merge_features.\1"),
    (r"score_\.(\d+)", r"merge_heatmaps.\1"),
)
_LEVEL = re.compile(r"hg\.(\d+)\.hg\.(\d+)\.([0-3])\.0\.")
_ROLES = ("across", "down", "up", "inner")


def find_state_dict(raw: Any) -> dict[str, Tensor] | None:
    """The tensors of one of its checkpoints without their prefix, or None if it is not one."""
    return without_prefix(raw, _FIRST, _PREFIXES)


def our_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors under our names. Raises ValueError for a name that has no place here."""
    depth = 1 + max(int(match[2]) for match in map(_LEVEL.match, theirs) if match)
    return {our_name(name, depth): tensor for name, tensor in theirs.items()}


def our_name(theirs: str, depth: int) -> str:
    """Our name of one of its tensors. depth: of the hourglasses. Raises ValueError."""
    level = _LEVEL.match(theirs)
    if level:
        inner = ".inner" * (depth - 1 - int(level[2]))
        place = f"hourglasses.{level[1]}{inner}.{_ROLES[int(level[3])]}"
        return f"{place}.{_inside(theirs[level.end() :])}"
    for pattern, replacement in _PLACES:
        match = re.match(pattern + r"\.", theirs)
        if match:
            rest = theirs[match.end() :]
            return f"{match.expand(replacement)}.{_inside(rest)}"
    raise ValueError(f"{theirs} has no place in a network of one residual a place")


def _inside(name: str) -> str:
    """Names inside a residual."""
    return re.sub(r"^bn([123])\.", r"norm\1.", name).replace("downsample.0.", "skip.")
