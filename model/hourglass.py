"""The stacked hourglass network (Newell, Yang, Deng, ECCV 2016), in the layout of princeton-vl.

Any number of stacks, width, depth and joints. Axes: N person, C channel, H row, W column, S stack.
Inputs are RGB in 0..1 whose sides are multiples of 4 x 2^depth.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.system import triton_works
from configs.schema import ModelConfig

KERNEL_SHARED_BYTES = 212_992
"""Shared memory that a block of the largest Triton kernel needs; an H100 has 232,448."""


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d without its own batch counter update; StackedHourglass updates them all."""

    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        return functional.batch_norm(
            x, mean, variance, self.weight, self.bias, self.training, momentum, self.eps
        )


class Residual(nn.Module):
    """Pre-activation bottleneck (1x1, 3x3, 1x1) with skip: (N, inputs, H, W) -> (N, outputs, H, W).

    The 3x3 convolution has outputs / 2 channels. The skip is 1x1 if inputs != outputs. Convolutions
    before a batch norm have no bias, because the norm would subtract it.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        inside = outputs // 2
        self.norm1 = BatchNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, inside, 1, bias=False)
        self.norm2 = BatchNorm(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, padding=1, bias=False)
        self.norm3 = BatchNorm(inside)
        self.conv3 = nn.Conv2d(inside, outputs, 1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.norm1(x)))
        y = self.conv2(functional.relu(self.norm2(y)))
        y = self.conv3(functional.relu(self.norm3(y)))
        return y + self.skip(x)


class AddUpsampled(Function):
    """x (N, C, 2H, 2W) + low (N, C, H, W) upsampled by functional.interpolate(mode="nearest").

    The upsampled map is not stored.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, low: Tensor) -> Tensor:
        cells = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (N, C, H, 2, W, 2)
        return (cells + low[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, functional.avg_pool2d(grad, 2, divisor_override=1)  # the sum of 2 x 2


class Hourglass(nn.Module):
    """Halve the resolution `depth` times and double it again; (N, width, H, W) keeps its shape."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.across = Residual(width, width)
        self.down = Residual(width, width)
        self.inner = Hourglass(depth - 1, width) if depth > 1 else Residual(width, width)
        self.up = Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(functional.max_pool2d(x, 2))))
        return AddUpsampled.apply(self.across(x), low)


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; a stride of 1 keeps the size."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(outputs), nn.ReLU(inplace=True))


def make_stem(width: int, channels: tuple[int, int, int]) -> nn.Sequential:
    """(N, 3, H, W) -> (N, width, H/4, W/4). channels: after convolution, residual 1 and 2."""
    first, second, third = channels
    layers = {
        "conv": conv_norm_relu(3, first, 7, stride=2),
        "residual1": Residual(first, second),
        "pool": nn.MaxPool2d(2),
        "residual2": Residual(second, third),
        "residual3": Residual(third, width),
    }
    return nn.Sequential(OrderedDict(layers))


class StackedHourglass(nn.Module):
    """`stacks` hourglasses, each of which refines the heatmaps of the one before."""

    input_mean: Tensor | None
    fused: Callable[["StackedHourglass", Tensor], list[Tensor]] | None = None
    """If set, computes the heatmaps of every stack in training (`fuse_network`)."""

    def __init__(self, model: ModelConfig, joints: int):
        """Fresh weights. joints: heatmaps of each stack.

        With model.checkpoint_activations, training keeps only each stack's input and recomputes its
        activations for the gradient, with the same results.
        """
        super().__init__()
        stacks, width, mean = model.stacks, model.width, None
        if any(model.input_mean):
            mean = torch.tensor(model.input_mean).reshape(1, 3, 1, 1)
        self.register_buffer("input_mean", mean, persistent=False)
        self.stacks, self.depth = stacks, model.depth
        self.checkpoint_activations = model.checkpoint_activations
        self.stem = make_stem(width, model.stem)
        self.hourglasses = nn.ModuleList(Hourglass(model.depth, width) for _ in range(stacks))
        self.features = nn.ModuleList(
            nn.Sequential(Residual(width, width), conv_norm_relu(width, width, 1))
            for _ in range(stacks)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, joints, 1) for _ in range(stacks))
        self.merge_features = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(stacks - 1))
        self.merge_heatmaps = nn.ModuleList(nn.Conv2d(joints, width, 1) for _ in range(stacks - 1))
        self._norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        with torch.no_grad():
            for parameter in self.heads.parameters():
                parameter.mul_(model.head_scale)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """RGB in 0..1 -> heatmaps of every stack, (N, S, J, H/4, W/4); the last is the result."""
        if self.training:  # all counters in one kernel
            torch._foreach_add_([norm.num_batches_tracked for norm in self._norms], 1)
        if self.input_mean is not None:
            images_N3HW = images_N3HW - self.input_mean
        if self.fused and self.training:
            return torch.stack(self.fused(self, images_N3HW), dim=1)
        x = self.stem(images_N3HW)
        outputs = []
        for stack in range(self.stacks):
            features = self.recomputed(self._features, stack, x)
            heat = self.heads[stack](features)
            outputs.append(heat)
            if stack < self.stacks - 1:
                x = x + self.merge_heatmaps[stack](heat) + self.merge_features[stack](features)
        return torch.stack(outputs, dim=1)

    def _features(self, stack: int, x: Tensor) -> Tensor:
        return self.features[stack](self.hourglasses[stack](x))

    def recomputed(self, function: Callable[..., Tensor], stack: int, *inputs: object) -> Tensor:
        """function(stack, *inputs), computed again for the gradient if checkpoint_activations."""
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            return function(stack, *inputs)
        modules = self.hourglasses[stack], self.features[stack]
        return checkpoint(
            function,
            stack,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _keep_statistics(*modules)),
        )


@contextmanager
def _keep_statistics(*modules: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norms that run in this context."""
    buffers = [buffer for each in modules for buffer in each.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(buffers, before)


def kernel_obstacles(network: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why train.fused_kernels does not work. dtype: of activations."""
    convolutions = (each for each in network.modules() if isinstance(each, nn.Conv2d))
    widest = max((each.out_channels for each in convolutions), default=0)
    unsupported = {
        f"the network {type(network).__name__}": not isinstance(network, StackedHourglass),
        f"device {device.type}": device.type != "cuda",
        "float32": dtype == torch.float32,
        f"{widest} channels": widest > 256,
        "no Triton, or no C compiler with Python.h for it": not triton_works(),
    }
    if not any(unsupported.values()) and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin
        unsupported[f"{shared:,} bytes of shared memory a block"] = shared < KERNEL_SHARED_BYTES
    return [setting for setting, is_set in unsupported.items() if is_set]


def fuse_network(network: nn.Module) -> None:
    """Train a StackedHourglass with model/fused_kernels.py."""
    from model.fused_kernels import fused_network  # imports triton

    network.fused = fused_network  # type: ignore[assignment]


def compile_residuals(network: nn.Module, backend: str = "inductor") -> None:
    """Compile each residual block by itself: blocks of one shape share a graph.

    A network without residual blocks is compiled as a whole.
    """
    torch._dynamo.config.recompile_limit = 64  # graphs of one function, one for each shape
    blocks: list[nn.Module] = [each for each in network.modules() if isinstance(each, Residual)]
    for part in blocks or [network]:
        part.compile(backend=backend, dynamic=False)
