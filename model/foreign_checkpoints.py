"""Checkpoints of princeton-vl/pytorch_stacked_hourglass, read and written.

They hold `state_dict` (keys with the prefix `model.module.`, `module.` or none), `optimizer` (Adam)
and `epoch`. Every residual of its network owns a 1x1 `skip_layer`, used only where the number of
channels changes. The others are dead, without gradient and without optimizer state. They are
dropped in reading and written as zeros.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.hourglass import Residual, StackedHourglass

STEPS_PER_EPOCH = 1_000
"""Of its recipe; its checkpoints count epochs."""
STEM, DEPTH = (64, 128, 128), 4
"""Fixed in its code."""
PREFIX = "model.module."
"""What its train.py puts before every key."""
_PREFIXES = (PREFIX, "module.", "model.", "")
_FIRST = "pre.0.conv.weight"

# Parts of a name, theirs and ours; {} is a number.
_PARTS = (
    ("pre.0.conv", "stem.conv.0"),
    ("pre.0.bn", "stem.conv.1"),
    ("pre.1", "stem.residual1"),
    ("pre.3", "stem.residual2"),
    ("pre.4", "stem.residual3"),
    ("hgs.{}.0", "hourglasses.{}"),
    ("features.{}.0", "features.{}.0"),
    ("features.{}.1.conv", "features.{}.1.0"),
    ("features.{}.1.bn", "features.{}.1.1"),
    ("outs.{}.conv", "heads.{}"),
    ("merge_features.{}.conv.conv", "merge_features.{}"),
    ("merge_preds.{}.conv.conv", "merge_heatmaps.{}"),
    ("up1", "across"),
    ("low1", "down"),
    ("low2", "inner"),
    ("low3", "up"),
    ("conv{}.conv", "conv{}"),
    ("bn{}", "norm{}"),
    ("skip_layer.conv", "skip"),
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
    return without_prefix(raw, _FIRST, _PREFIXES)


def without_prefix(raw: Any, key: str, prefixes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint under the prefix that `key` has in it, or None if it has none."""
    tensors = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(tensors, dict):
        return None
    for prefix in prefixes:
        if prefix + key in tensors:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and isinstance(tensor, Tensor)
            }
    return None


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(re.escape(part).replace(r"\{\}", r"(\d+)") + r"(?:\.|$)")


_TO_OURS = [(_pattern(theirs), ours) for theirs, ours in _PARTS]
_TO_THEIRS = [(_pattern(ours), theirs) for theirs, ours in _PARTS]


def our_name(theirs: str) -> str:
    """Our name of one of its tensors; parts that it does not know stay as they are."""
    return _translate(theirs, _TO_OURS)


def their_name(ours: str) -> str:
    """Its name of one of our tensors."""
    return _translate(ours, _TO_THEIRS)


def _translate(name: str, parts: list[tuple[re.Pattern[str], str]]) -> str:
    done: list[str] = []
    while name:
        for pattern, target in parts:
            match = pattern.match(name)
            if match:
                done.append(target.format(*match.groups()))
                name = name[match.end() :]
                break
        else:
            part, _, name = name.partition(".")
            done.append(part)
    return ".".join(done)


def our_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors under our names, the dead skip layers left out."""
    return {our_name(name): t for name, t in theirs.items() if not _is_dead(name, theirs)}


def _is_dead(name: str, theirs: dict[str, Tensor]) -> bool:
    """Whether this is a skip layer between equal numbers of channels."""
    if ".skip_layer." not in name:
        return False
    weight = theirs[name.rsplit(".", 1)[0] + ".weight"]
    return weight.shape[0] == weight.shape[1]


def their_weights(ours: dict[str, Tensor], network: StackedHourglass) -> dict[str, Tensor]:
    """Our tensors under its names, in its order, its dead layers as zeros."""
    theirs: dict[str, Tensor] = {}
    dead = _dead_layers(network)
    for name, tensor in ours.items():
        theirs[their_name(name)] = tensor
        owner, _, last = name.rpartition(".conv3.")
        if owner in dead and last == "bias":
            channels = len(tensor)
            layer = their_name(owner) + ".skip_layer.conv"
            theirs[layer + ".weight"] = torch.zeros(channels, channels, 1, 1)
            theirs[layer + ".bias"] = torch.zeros(channels)
    return theirs


def _dead_layers(network: StackedHourglass) -> set[str]:
    """Our names of the residuals whose skip layer it would never use."""
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, Residual) and isinstance(module.skip, torch.nn.Identity)
    }


def _parameter_places(network: StackedHourglass) -> list[int]:
    """For each of our parameters its number in its optimizer, which counts dead ones too."""
    ours = {name: tensor.detach() for name, tensor in network.named_parameters()}
    order = {name: place for place, name in enumerate(their_weights(ours, network))}
    return [order[their_name(name)] for name in ours]


def our_adam_state(theirs: dict[str, Any], network: StackedHourglass) -> dict[str, Any]:
    """The state of its Adam for our parameters, as `torch.optim.Adam.load_state_dict` takes it.

    Raises KeyError or ValueError if it belongs to another network.
    """
    places = _parameter_places(network)
    group = theirs["param_groups"][0]
    state = {n: theirs["state"][place] for n, place in enumerate(places) if theirs["state"]}
    for moments, parameter in zip(state.values(), network.parameters(), strict=False):
        if moments["exp_avg"].shape != parameter.shape:
            raise ValueError("moments of other shapes than the weights")
    own = {"params": list(range(len(places))), "fused": True}
    return {"state": state, "param_groups": [{**group, **own}]}


def their_adam_state(ours: dict[str, Any], network: StackedHourglass) -> dict[str, Any]:
    """The state of our Adam for its parameters; dead ones have none, as in its own checkpoints."""
    places = _parameter_places(network)
    group = {**ours["param_groups"][0], "params": list(range(max(places) + 1)), "fused": None}
    state = {
        places[n]: {name: tensor.contiguous() for name, tensor in moments.items()}
        for n, moments in ours["state"].items()
    }
    return {"state": state, "param_groups": [group]}


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
