"""Checkpoints of other code: princeton-vl/pytorch_stacked_hourglass and bearpaw/pytorch-pose.

Princeton's hold `state_dict`, `optimizer` (Adam) and `epoch`; they are read, continued and written.
Every residual of its network owns a 1x1 `skip_layer`, used only where the number of channels
changes. The others are dead: without gradient and without optimizer state. They are dropped in
reading and written as zeros.

Bearpaw's and anibali's networks have a wider stem (64, 128, 256) and subtract MPII's mean colour
from the input. Only their form with one residual a place (`num_blocks=1`) is read.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from configs.schema import Config, DataConfig, HeatmapsConfig, ModelConfig
from configs.skeleton import MPII, Skeleton, unnamed
from model.hourglass import Residual, StackedHourglass

INPUT_MEAN = (0.4404, 0.4440, 0.4327)
"""RGB in 0..1, the constant of anibali/pytorch-stacked-hourglass."""

_STEPS_PER_EPOCH = 1_000
"""Of princeton's recipe; its checkpoints count epochs."""
_STEM, _DEPTH = (64, 128, 128), 4
"""Fixed in princeton's code."""
_PREFIX = "model.module."
"""What princeton's train.py puts before every key."""

# Parts of a name, princeton's and ours; {} is a number.
_PRINCETON_PARTS = (
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

# Beginnings of a name, bearpaw's and ours; \1 is the stack.
_BEARPAW_STARTS = (
    (r"conv1\.", "stem.conv.0."),
    (r"bn1\.", "stem.conv.1."),
    (r"layer1\.0\.", "stem.residual1."),
    (r"layer2\.0\.", "stem.residual2."),
    (r"layer3\.0\.", "stem.residual3."),
    (r"res\.(\d+)\.0\.", r"features.\1.0."),
    (r"fc\.(\d+)\.", r"features.\1.1."),
    (r"score\.(\d+)\.", r"heads.\1."),
    (r"fc_\.(\d+)\.", r"merge_features.\1."),
    (r"score_\.(\d+)\.", r"merge_heatmaps.\1."),
)
_BEARPAW_LEVEL = re.compile(r"hg\.(\d+)\.hg\.(\d+)\.([0-3])\.0\.")
_BEARPAW_ROLES = ("across", "down", "up", "inner")


class ForeignCheckpoint(NamedTuple):
    """What a file of other code holds, in our names."""

    config: Config
    skeleton: Skeleton
    """The files do not name the joints; 16 are taken to be MPII's, which both codes train on."""
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    """As in the file; `our_adam_state` translates it."""


def read_foreign(raw: Any, path: Path) -> ForeignCheckpoint | None:
    """Recognise a file's contents; None if they are of no known code. Raises InputError."""
    step, optimizer = 0, None
    if theirs := _tensors_under(raw, "pre.0.conv.weight", (_PREFIX, "module.", "model.", "")):
        weights = _weights_from_princeton(theirs)
        epoch, optimizer = raw.get("epoch", 0), raw.get("optimizer")
        if type(epoch) is not int or epoch < 0:
            raise _unlike(path, f"epoch {epoch}")
        step = epoch * _STEPS_PER_EPOCH
        config = Config(
            data=DataConfig(preset="princeton"),
            heatmaps=HeatmapsConfig(rule="princeton"),
            model=_model_of(weights, (0.0, 0.0, 0.0), path),
        )
    elif theirs := _tensors_under(raw, "hg.0.hg.0.0.0.conv1.weight", ("module.", "")):
        weights = _weights_from_bearpaw(theirs)
        config = Config(model=_model_of(weights, INPUT_MEAN, path))
    else:
        return None
    joints = len(weights["heads.0.weight"])
    skeleton = MPII if joints == MPII.joint_count else unnamed(joints)
    return ForeignCheckpoint(config, skeleton, step, weights, optimizer)


def _tensors_under(raw: Any, key: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors without the prefix that `key` has among them; {} if it is not there."""
    tensors = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    for prefix in prefixes:
        if prefix + key in tensors:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and isinstance(tensor, Tensor)
            }
    return {}


def _model_of(
    weights: dict[str, Tensor], input_mean: tuple[float, float, float], path: Path
) -> ModelConfig:
    """The architecture, read off the tensors' names and shapes. Raises InputError."""
    layers = ("stem.conv.0", "stem.residual1.conv3", "stem.residual2.conv3", "heads.0")
    names = [f"{layer}.weight" for layer in layers]
    if not all(name in weights and weights[name].dim() == 4 for name in names):
        raise _unlike(path, f"not all of the layers {', '.join(layers)}")
    first, second, third, head = (weights[name].shape for name in names)
    depths = [name.count(".inner") for name in weights if name.startswith("hourglasses.0.")]
    return ModelConfig(
        stacks=len({name.split(".")[1] for name in weights if name.startswith("heads.")}),
        width=head[1],
        depth=max(depths, default=0),
        stem=(first[0], second[0], third[0]),
        input_mean=input_mean,
    )


def _unlike(path: Path, found: str) -> InputError:
    return InputError(
        path,
        f"a network that differs from its kind ({found})",
        "a network of princeton-vl/pytorch_stacked_hourglass or bearpaw/pytorch-pose",
        "give a checkpoint that its own train.py wrote",
    )


# Bearpaw


def _weights_from_bearpaw(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bearpaw's tensors under our names; names without a place here stay as they are."""
    levels = [int(match[2]) for match in map(_BEARPAW_LEVEL.match, theirs) if match]
    return {_name_from_bearpaw(name, 1 + max(levels)): tensor for name, tensor in theirs.items()}


def _name_from_bearpaw(theirs: str, depth: int) -> str:
    level = _BEARPAW_LEVEL.match(theirs)
    if level:
        inner = ".inner" * (depth - 1 - int(level[2]))
        start = f"hourglasses.{level[1]}{inner}.{_BEARPAW_ROLES[int(level[3])]}."
        return start + _inside_residual(theirs[level.end() :])
    for pattern, replacement in _BEARPAW_STARTS:
        if match := re.match(pattern, theirs):
            return match.expand(replacement) + _inside_residual(theirs[match.end() :])
    return theirs


def _inside_residual(name: str) -> str:
    return re.sub(r"^bn([123])\.", r"norm\1.", name).replace("downsample.0.", "skip.")


# Princeton


def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(re.escape(part).replace(r"\{\}", r"(\d+)") + r"(?:\.|$)")


_FROM_PRINCETON = [(_pattern(theirs), ours) for theirs, ours in _PRINCETON_PARTS]
_TO_PRINCETON = [(_pattern(ours), theirs) for theirs, ours in _PRINCETON_PARTS]


def _translate(name: str, parts: list[tuple[re.Pattern[str], str]]) -> str:
    """A tensor's name in the other code; unknown parts stay as they are."""
    done: list[str] = []
    while name:
        for pattern, target in parts:
            if match := pattern.match(name):
                done.append(target.format(*match.groups()))
                name = name[match.end() :]
                break
        else:
            part, _, name = name.partition(".")
            done.append(part)
    return ".".join(done)


def _weights_from_princeton(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Princeton's tensors under our names, without the dead skip layers."""
    dead = {
        name.removesuffix("weight")
        for name, tensor in theirs.items()
        if name.endswith(".skip_layer.conv.weight") and tensor.shape[0] == tensor.shape[1]
    }
    return {
        _translate(name, _FROM_PRINCETON): tensor
        for name, tensor in theirs.items()
        if name.removesuffix("weight").removesuffix("bias") not in dead
    }


def _weights_to_princeton(ours: dict[str, Tensor], network: StackedHourglass) -> dict[str, Tensor]:
    """Our tensors under princeton's names, in its order, its dead layers as zeros."""
    dead = {
        name
        for name, module in network.named_modules()
        if isinstance(module, Residual) and isinstance(module.skip, torch.nn.Identity)
    }
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        theirs[_translate(name, _TO_PRINCETON)] = tensor
        residual, _, last = name.rpartition(".conv3.")
        if residual in dead and last == "bias":
            channels = len(tensor)
            layer = _translate(residual, _TO_PRINCETON) + ".skip_layer.conv"
            theirs[layer + ".weight"] = torch.zeros(channels, channels, 1, 1)
            theirs[layer + ".bias"] = torch.zeros(channels)
    return theirs


def require_princeton_size(model: ModelConfig, path: Path) -> None:
    """Raise InputError for a network that princeton's code cannot build."""
    if model.stem != _STEM or model.depth != _DEPTH or any(model.input_mean):
        found = f"stem {model.stem}, depth {model.depth}, input mean {model.input_mean}"
        expected = f"stem {_STEM}, depth {_DEPTH}, no mean: its code has no others"
        raise InputError(path, found, expected, "keep this checkpoint in our format")


def princeton_contents(
    network: StackedHourglass, step: int, optimizer: dict[str, Any] | None
) -> dict[str, Any]:
    """What princeton's train.py would have saved. optimizer: of ours; only Adam's is kept."""
    weights = _weights_to_princeton(network.state_dict(), network)
    contents: dict[str, Any] = {
        "state_dict": {_PREFIX + name: tensor for name, tensor in weights.items()},
        "epoch": step // _STEPS_PER_EPOCH,
    }
    if optimizer and all("exp_avg" in moments for moments in optimizer["state"].values()):
        contents["optimizer"] = _adam_state_to_princeton(optimizer, network)
    return contents


def _parameter_numbers(network: StackedHourglass) -> list[int]:
    """For each of our parameters its number in princeton's optimizer, which counts dead ones."""
    ours = {name: tensor.detach() for name, tensor in network.named_parameters()}
    order = {name: n for n, name in enumerate(_weights_to_princeton(ours, network))}
    return [order[_translate(name, _TO_PRINCETON)] for name in ours]


def our_adam_state(theirs: dict[str, Any], network: StackedHourglass, path: Path) -> dict[str, Any]:
    """The state of princeton's Adam for our parameters, as torch.optim.Adam loads it. InputError.

    network: of the same architecture, on any device.
    """
    numbers, all_moments = _parameter_numbers(network), theirs["state"]
    state = {n: all_moments.get(number, {}) for n, number in enumerate(numbers)}
    for moments, parameter in zip(state.values(), network.parameters(), strict=True):
        if all_moments and getattr(moments.get("exp_avg"), "shape", None) != parameter.shape:
            raise _unlike(path, "an optimizer state of other weights")
    own = {"params": list(range(len(numbers))), "fused": True}
    group = {**theirs["param_groups"][0], **own}
    return {"state": state if all_moments else {}, "param_groups": [group]}


def _adam_state_to_princeton(ours: dict[str, Any], network: StackedHourglass) -> dict[str, Any]:
    """The state of our Adam for princeton's parameters; its dead ones have none."""
    numbers = _parameter_numbers(network)
    group = {**ours["param_groups"][0], "params": list(range(max(numbers) + 1)), "fused": None}
    state = {
        numbers[n]: {name: tensor.contiguous() for name, tensor in moments.items()}
        for n, moments in ours["state"].items()
    }
    return {"state": state, "param_groups": [group]}
