"""Weights of princeton-vl/pytorch_stacked_hourglass as weights of this network.

Its checkpoints hold `state_dict` (keys with the prefix `model.module.`, `module.` or none),
`optimizer` and `epoch`. Every residual of its network owns a 1x1 `skip_layer`, used only where the
number of channels changes; the others are dead and are dropped.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor

_PREFIXES = ("model.module.", "module.", "model.", "")
_FIRST = "pre.0.conv.weight"

# Parts of a name, theirs -> ours, tried from left to right at each part of the name.
_PLACES = (
    (r"pre\.0\.conv", "stem.conv.0"),
    (r"pre\.0\.bn", "stem.conv.1"),
    (r"pre\.1", "stem.residual1"),
    (r"pre\.3", "stem.residual2"),
    (r"pre\.4", "stem.residual3"),
    (r"hgs\.(\d+)\.0", r"hourglasses.\1"),
    (r"features\.(\d+)\.0", r"features.\1.0"),
    (r"features\.(\d+)\.1\.conv", r"features.\1.1.0"),
    (r"features\.(\d+)\.1\.bn", r"features.\1.1.1"),
    (r"outs\.(\d+)\.conv", r"heads.\1"),
    (r"merge_features\.(\d+)\.conv\.conv", r"merge_features.\1"),
    (r"merge_preds\.(\d+)\.conv\.conv", r"merge_heatmaps.\1"),
    (r"up1", "across"),
    (r"low1", "down"),
    (r"low2", "inner"),
    (r"low3", "up"),
    (r"conv([123])\.conv", r"conv\1"),
    (r"bn([123])", r"norm\1"),
    (r"skip_layer\.conv", "skip"),
)


class Size(NamedTuple):
    """The architecture that a set of weights belongs to."""

    stacks: int
    width: int
    depth: int
    stem: tuple[int, int, int]
    joints: int


def find_state_dict(raw: Any) -> dict[str, Tensor] | None:
    """The tensors of one of its checkpoints without their prefix, or None if it is not one."""
    tensors = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(tensors, dict):
        return None
    for prefix in _PREFIXES:
        if prefix + _FIRST in tensors:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and isinstance(tensor, Tensor)
            }
    return None


def our_name(name: str) -> str:
    """Our name of one of its tensors; parts that it does not know stay as they are."""
    done = ""
    while name:
        for pattern, replacement in _PLACES:
            match = re.match(pattern + r"(?=\.)", name)
            if match:
                done += match.expand(replacement) + "."
                name = name[match.end() + 1 :]
                break
        else:
            part, _, name = name.partition(".")
            done += part + ("." if name else "")
    return done


def our_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors under our names, the dead skip layers left out."""
    return {our_name(name): t for name, t in theirs.items() if not _is_dead(name, theirs)}


def _is_dead(name: str, theirs: dict[str, Tensor]) -> bool:
    """Whether this is a skip layer between equal numbers of channels."""
    if ".skip_layer." not in name:
        return False
    weight = theirs[name.rsplit(".", 1)[0] + ".weight"]
    return weight.shape[0] == weight.shape[1]


def size_of(weights: dict[str, Tensor]) -> Size:
    """The architecture, read off the shapes of the tensors under our names."""
    stacks = len({name.split(".")[1] for name in weights if name.startswith("heads.")})
    depths = [name.count(".inner") for name in weights if name.startswith("hourglasses.0.")]
    first, second, third = (
        weights[f"stem.{name}.weight"].shape[0]
        for name in ("conv.0", "residual1.conv3", "residual2.conv3")
    )
    joints, width = weights["heads.0.weight"].shape[:2]
    return Size(stacks, width, max(depths), (first, second, third), joints)
