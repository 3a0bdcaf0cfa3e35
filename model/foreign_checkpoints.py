"""Checkpoints of other code: princeton-vl/pytorch_stacked_hourglass and bearpaw/pytorch-pose.

Princeton's hold `state_dict`, `optimizer` (Adam) and `epoch`; they are read, resumed and written.
Every residual block of its network has a 1x1 `skip_layer`, which is used only if the number of
channels changes. The others are dead: they have no gradient and no optimizer state. They are
dropped on reading and written as zeros.

The biases of convolutions before a batch norm, which our networks do not have, are also written as
zeros. On reading, each bias is subtracted from the norm's running mean; the output is the same.

Bearpaw's and anibali's networks have a wider stem (64, 128, 256) and subtract MPII's mean colour
from the input. Only `num_blocks=1`, one residual block in each place, is supported.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import InputError
from configs.schema import Config, DataConfig, HeatmapsConfig, ModelConfig
from configs.skeleton import MPII, Skeleton, unnamed
from model.hourglass import Residual, StackedHourglass

INPUT_MEAN = (0.4404, 0.4440, 0.4327)
"""RGB in 0..1, the constant of anibali/pytorch-stacked-hourglass."""

_STEPS_PER_EPOCH = 1_000
"""In princeton's recipe; its checkpoints count epochs."""
PRINCETON_MODEL = {"stem": (64, 128, 128), "depth": 4, "input_mean": (0.0, 0.0, 0.0)}
"""Fixed in princeton's code."""
_PREFIX = "model.module."
"""Prefix of every key in princeton's checkpoints."""

Renames = tuple[tuple[str, str], ...]
"""Pairs of a regular expression on our names and its replacement, applied in order."""

_TO_PRINCETON: Renames = (
    (r"^stem\.conv\.0", "pre.0.conv"),
    (r"^stem\.conv\.1", "pre.0.bn"),
    (r"^stem\.residual1", "pre.1"),
    (r"^stem\.residual2", "pre.3"),
    (r"^stem\.residual3", "pre.4"),
    (r"^hourglasses\.(\d+)", r"hgs.\1.0"),
    (r"^features\.(\d+)\.1\.0", r"features.\1.1.conv"),
    (r"^features\.(\d+)\.1\.1", r"features.\1.1.bn"),
    (r"^heads\.(\d+)", r"outs.\1.conv"),
    (r"^merge_features\.(\d+)", r"merge_features.\1.conv.conv"),
    (r"^merge_heatmaps\.(\d+)", r"merge_preds.\1.conv.conv"),
    (r"\.across\b", ".up1"),
    (r"\.down\b", ".low1"),
    (r"\.inner\b", ".low2"),
    (r"\.up\b", ".low3"),
    (r"\.conv([123])\b", r".conv\1.conv"),
    (r"\.norm([123])\b", r".bn\1"),
    (r"\.skip\b", ".skip_layer.conv"),
)
_TO_BEARPAW: Renames = (
    (r"^stem\.conv\.0", "conv1"),
    (r"^stem\.conv\.1", "bn1"),
    (r"^stem\.residual([123])", r"layer\1.0"),
    (r"^features\.(\d+)\.0", r"res.\1.0"),
    (r"^features\.(\d+)\.1", r"fc.\1"),
    (r"^heads", "score"),
    (r"^merge_features", "fc_"),
    (r"^merge_heatmaps", "score_"),
    (r"\.norm([123])\b", r".bn\1"),
    (r"\.skip\b", ".downsample.0"),
)
_BIAS_TO_MEAN: Renames = (
    (r"^(stem\.conv|features\.\d+\.1)\.0\.bias$", r"\1.1.running_mean"),
    (r"\.conv1\.bias$", ".norm2.running_mean"),
    (r"\.conv2\.bias$", ".norm3.running_mean"),
)
"""Name of a bias before a batch norm -> name of the norm's running mean."""


class _Layout(NamedTuple):
    """How another code base names the parts of this network."""

    prefixes: tuple[str, ...]
    """Possible prefixes of all names."""
    layers: tuple[str, str, str, str]
    """Stem convolution, last convolutions of the stem's first two residuals, first head."""
    heads: str
    """Pattern of the heads' weights, one per stack."""
    levels: str
    """Pattern of a weight that occurs once in each level of the first hourglass."""
    input_mean: tuple[float, float, float]


_PRINCETON = _Layout(
    prefixes=(_PREFIX, "module.", "model.", ""),
    layers=("pre.0.conv", "pre.1.conv3.conv", "pre.3.conv3.conv", "outs.0.conv"),
    heads=r"outs\.\d+\.conv\.weight",
    levels=r"hgs\.0\.0(\.low2)*\.up1\.conv1\.conv\.weight",
    input_mean=(0.0, 0.0, 0.0),
)
_BEARPAW = _Layout(
    prefixes=("module.", ""),
    layers=("conv1", "layer1.0.conv3", "layer2.0.conv3", "score.0"),
    heads=r"score\.\d+\.weight",
    levels=r"hg\.0\.hg\.\d+\.0\.0\.conv1\.weight",
    input_mean=INPUT_MEAN,
)


class ForeignCheckpoint(NamedTuple):
    """What a file of other code holds, in our names. The weights' shapes are not checked."""

    config: Config
    skeleton: Skeleton
    """The files do not name the joints; 16 joints are assumed to be MPII's."""
    weights: dict[str, Tensor]
    step: int = 0
    optimizer: dict[str, Any] | None = None


def read_foreign(raw: Any, path: Path) -> ForeignCheckpoint | None:
    """Convert the contents of a file; None if no known code wrote it. Raises InputError."""
    for layout in (_PRINCETON, _BEARPAW):
        if theirs := _tensors_of(raw, layout):
            break
    else:
        return None
    first, second, third, head = (theirs[f"{name}.weight"].shape for name in layout.layers)
    model = ModelConfig(
        stacks=_count(theirs, layout.heads),
        width=head[1],
        depth=_count(theirs, layout.levels),
        stem=(first[0], second[0], third[0]),
        input_mean=layout.input_mean,
    )
    skeleton = MPII if head[0] == MPII.joint_count else unnamed(head[0])
    with torch.device("meta"):  # only names and shapes
        network = StackedHourglass(model, head[0])
    renames = _TO_PRINCETON if layout is _PRINCETON else _to_bearpaw(model.depth)
    ours = [*network.state_dict(), *_absent_biases(network)]
    names = {_renamed(name, renames): name for name in ours}
    weights = {
        names.get(name, name): tensor
        for name, tensor in theirs.items()
        if name in names or ".skip_layer." not in name  # dead layers of princeton
    }
    weights = fold_biases(weights)
    if layout is _BEARPAW:
        return ForeignCheckpoint(Config(model=model), skeleton, weights)
    data, rule = DataConfig(preset="princeton"), HeatmapsConfig(rule="princeton")
    config = Config(data=data, heatmaps=rule, model=model)
    epoch, optimizer = raw.get("epoch", 0), raw.get("optimizer")
    if type(epoch) is not int or epoch < 0:
        raise InputError(path, f"epoch {epoch}", "the number of an epoch", "give another file")
    optimizer = _our_adam_state(optimizer, network, path) if optimizer else None
    return ForeignCheckpoint(config, skeleton, weights, epoch * _STEPS_PER_EPOCH, optimizer)


def _tensors_of(raw: Any, layout: _Layout) -> dict[str, Tensor]:
    """The tensors under the layout's names without prefix; {} if some of its layers are missing."""
    contents = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    if not isinstance(contents, dict):
        return {}
    for prefix in layout.prefixes:
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in contents.items()
            if isinstance(tensor, Tensor) and name.startswith(prefix)
        }
        known = [tensors.get(f"{name}.weight", torch.empty(0)) for name in layout.layers]
        if all(tensor.dim() == 4 for tensor in known):
            return tensors if _count(tensors, layout.levels) else {}
    return {}


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


def _renamed(ours: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        ours = re.sub(pattern, replacement, ours)
    return ours


def _absent_biases(network: StackedHourglass) -> list[str]:
    """Names of the biases that other code has and our network does not."""
    return [
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.bias is None
    ]


def fold_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the biases before batch norms and change the running means, for the same output."""
    folded = dict(weights)
    for bias in weights:
        mean = _renamed(bias, _BIAS_TO_MEAN)
        if mean != bias and mean in weights and weights[mean].shape == weights[bias].shape:
            folded[mean] = weights[mean] - folded.pop(bias)
    return folded


def _to_bearpaw(depth: int) -> Renames:
    """Bearpaw counts levels from the innermost one; our names are nested."""
    levels = []
    for outer in reversed(range(depth)):
        for n, part in enumerate(("across", "down", "up", "inner")):
            ours = r"^hourglasses\.(\d+)" + r"\.inner" * outer + rf"\.{part}\b"
            levels.append((ours, rf"hg.\1.hg.{depth - 1 - outer}.{n}.0"))
    return (*levels, *_TO_BEARPAW)


# Princeton's weights and optimizer


def princeton_contents(
    network: StackedHourglass, step: int, optimizer: dict[str, Any] | None
) -> dict[str, Any]:
    """What princeton's train.py would have saved. optimizer: of ours; only Adam's is kept.

    network: must have the stem, depth and input mean of PRINCETON_MODEL.
    """
    weights = _weights_to_princeton(network.state_dict(), network)
    contents: dict[str, Any] = {
        "state_dict": {_PREFIX + name: tensor for name, tensor in weights.items()},
        "epoch": step // _STEPS_PER_EPOCH,
    }
    if optimizer and all("exp_avg" in moments for moments in optimizer["state"].values()):
        numbers = _parameter_numbers(network)
        params = list(range(max(numbers) + 1))
        group = {**optimizer["param_groups"][0], "params": params, "fused": None}
        state = {
            numbers[n]: {name: tensor.contiguous() for name, tensor in moments.items()}
            for n, moments in optimizer["state"].items()
        }
        contents["optimizer"] = {"state": state, "param_groups": [group]}
    return contents


def _weights_to_princeton(ours: dict[str, Tensor], network: StackedHourglass) -> dict[str, Tensor]:
    """Our tensors under princeton's names, in its order; zeros for layers that we do not have."""
    absent_biases = _absent_biases(network)
    dead = {
        name
        for name, module in network.named_modules()
        if isinstance(module, Residual) and isinstance(module.skip, nn.Identity)
    }
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        theirs[_renamed(name, _TO_PRINCETON)] = tensor
        bias = f"{name.rpartition('.')[0]}.bias"
        if bias in absent_biases:
            theirs[_renamed(bias, _TO_PRINCETON)] = torch.zeros(len(tensor))
        residual, _, last = name.rpartition(".conv3.")
        if residual in dead and last == "bias":
            channels = len(tensor)
            layer = _renamed(f"{residual}.skip", _TO_PRINCETON)
            theirs[f"{layer}.weight"] = torch.zeros(channels, channels, 1, 1)
            theirs[f"{layer}.bias"] = torch.zeros(channels)
    return theirs


def _parameter_numbers(network: StackedHourglass) -> list[int]:
    """The index of each of our parameters in princeton's optimizer, which counts dead ones."""
    ours = {name: tensor.detach() for name, tensor in network.named_parameters()}
    order = {name: n for n, name in enumerate(_weights_to_princeton(ours, network))}
    return [order[_renamed(name, _TO_PRINCETON)] for name in ours]


def _our_adam_state(
    theirs: dict[str, Any], network: StackedHourglass, path: Path
) -> dict[str, Any]:
    """The state of princeton's Adam for our parameters, as torch.optim.Adam loads it."""
    numbers, all_moments = _parameter_numbers(network), theirs["state"]
    state = {n: all_moments.get(number, {}) for n, number in enumerate(numbers)}
    for moments, parameter in zip(state.values(), network.parameters(), strict=True):
        if all_moments and getattr(moments.get("exp_avg"), "shape", None) != parameter.shape:
            found, expected = "an optimizer of other weights", "Adam's state of the same weights"
            raise InputError(path, found, expected, "use only its state_dict")
    own = {"params": list(range(len(numbers))), "fused": True}
    group = {**theirs["param_groups"][0], **own}
    return {"state": state if all_moments else {}, "param_groups": [group]}
