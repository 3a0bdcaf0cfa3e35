"""The Triton kernels of a residual block compute the same as the plain block.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from torch import Tensor, nn

from common.errors import InputError
from configs.schema import config_from_dict
from model.hourglass import (
    Residual,
    StackedHourglass,
    compile_residuals,
    fuse_residuals,
)
from model.loss import stack_losses

triton = pytest.importorskip("triton")
from model import fused_residual as kernels  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for triton's interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOW = pytest.mark.slow
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_ranges(request, monkeypatch):
    """On a CPU, two ranges of several blocks of rows, and bf16 as a GPU computes it.

    Triton's interpreter multiplies the bits of bf16 in tl.dot and truncates to bf16. Here the
    products are of float32, where they are exact, and casts round to nearest.
    """
    if DEVICE.type == "cuda" or "sm_90" in request.node.name:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    monkeypatch.setattr(kernels, "PROGRAMS", triton.language.constexpr(2))
    monkeypatch.setattr(kernels, "LEAST_ROWS", 64)
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    bf16, fp32 = triton.language.bfloat16, triton.language.float32

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == bf16:
            a, b = (self.create_fp_ext(each, fp32) for each in (a, b))
        return plain_dot(self, a, b, *rest)

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (fp32, bf16):
            return plain_cast(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(BF16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), bf16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def make_residual(inputs: int, outputs: int, seed: int = 0) -> Residual:
    """Random weights, also of batch norms."""
    torch.manual_seed(seed)
    residual = Residual(inputs, outputs).to(DEVICE, memory_format=torch.channels_last)
    for norm in (residual.norm1, residual.norm2, residual.norm3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return residual


def results(residual: Residual, x: Tensor, grad: Tensor, fused: bool) -> dict[str, Tensor]:
    """Output, running statistics, and gradients of the input and of all parameters."""
    residual = copy.deepcopy(residual)
    residual.fused = kernels.fused_residual if fused else None
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE.type, BF16, enabled=x.dtype == BF16):
        y = residual(x)
    y.backward(grad)
    gradients = {name: p.grad for name, p in residual.named_parameters()}
    found = {"y": y, "dx": x.grad, **dict(residual.named_buffers()), **gradients}
    assert None not in found.values()
    return {name: tensor.detach() for name, tensor in found.items()}


def inputs_of(residual: Residual, people: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """An input of mean 3 and a gradient, channels-last."""
    channels = residual.norm1.num_features, residual.conv3.out_channels
    x, grad = (torch.randn(people, each, height, width, device=DEVICE) for each in channels)
    layout = torch.channels_last
    return (2 * x + 3).to(memory_format=layout), grad.to(memory_format=layout)


SMALL = [(6, 10, 3, 7, 9), (16, 16, 2, 8, 16), (20, 20, 1, 3, 5)]
"""Inputs, outputs, people, height, width: no power of two and part of a block; whole blocks."""
LARGER = [(64, 128, 2, 16, 16), (128, 128, 1, 13, 11), (128, 256, 1, 8, 8), (256, 256, 2, 9, 9)]


@interpreted
@pytest.mark.parametrize("shape", [*SMALL, *(pytest.param(s, marks=SLOW) for s in LARGER)])
def test_output_gradients_and_running_statistics_are_those_of_the_plain_block(shape):
    residual = make_residual(*shape[:2])
    x, grad = inputs_of(residual, *shape[2:])
    exact = results(residual.double(), x.double(), grad.double(), fused=False)
    found = results(residual.float(), x, grad, fused=True)
    for name, expected in exact.items():
        # Where a z is 0 but for rounding, one of thousands of gradients may pass the ReLU or not.
        assert relative_error(found[name], expected) < 1e-3, name


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm().clamp(min=1e-9))


def assert_bf16_is_as_exact_as_the_plain_block(shape: tuple[int, ...]) -> None:
    """Both are compared with the plain block in float64; their ReLUs round differently."""
    residual = make_residual(*shape[:2])
    x, grad = (each.to(BF16) for each in inputs_of(residual, *shape[2:]))
    exact = results(residual.double(), x.double(), grad.double(), fused=False)
    plain, fused = (results(residual.float(), x, grad, fused) for fused in (False, True))
    for name, expected in exact.items():
        errors = [relative_error(each[name], expected) for each in (plain, fused)]
        assert fused[name].dtype == plain[name].dtype
        assert errors[1] <= 1.3 * errors[0] + 2e-3, (name, errors)


@interpreted
@pytest.mark.parametrize("shape", [(16, 24, 2, 11, 9)])
def test_in_bf16_it_is_as_exact_as_the_plain_block(shape):
    assert_bf16_is_as_exact_as_the_plain_block(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 128, 16, 128, 128), (128, 256, 64, 64, 64),
                                   (256, 256, 64, 64, 64), (256, 256, 16, 4, 4)])  # fmt: skip
def test_on_a_gpu_it_is_as_exact_as_the_plain_block(shape):
    assert_bf16_is_as_exact_as_the_plain_block(shape)


def test_the_variance_is_exact_where_the_mean_is_large():
    """A sum of squares in float32 would lose all of this variance: 1000^2 / 0.1^2 is 10^8."""
    residual, (x, grad) = make_residual(16, 16), (None, None)
    x, grad = inputs_of(residual, 2, 9, 9)
    x = 1000 + 0.1 * torch.randn_like(x)
    found = results(residual, x, grad, fused=True)
    expected = 0.9 + 0.1 * x.double().var((0, 2, 3))
    torch.testing.assert_close(found["norm1.running_var"].double(), expected, rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("checkpoint_activations", [pytest.param(False, marks=SLOW), True])
def test_a_network_trains_as_without_the_kernels(checkpoint_activations):
    """Loss, gradients and buffers of a step; all residual blocks are replaced."""
    torch.manual_seed(0)
    plain = StackedHourglass(1, 8, 3, 1, (4, 8, 8), checkpoint_activations=checkpoint_activations)
    plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    replace(fused)
    images, target = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8)
    for network in (plain, fused):
        stack_losses(network(images), target, torch.ones(2, 3)).mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, a), b in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)


def replace(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Residual):
            module.fused = kernels.fused_residual


def test_evaluation_uses_the_plain_block():
    residual = make_residual(6, 10).eval()
    x, _ = inputs_of(residual, 1, 4, 4)
    expected = residual(x)
    residual.fused = lambda *_: pytest.fail("the kernels")
    assert torch.equal(residual(x), expected)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", BF16), ("cuda", FP32)])
def test_the_kernels_are_refused_without_a_gpu_or_in_float32(device, dtype):
    with pytest.raises(InputError, match=r"train\.fused_kernels: true"):
        fuse_residuals(Residual(4, 4), torch.device(device), dtype)


def test_blocks_too_wide_for_the_kernels_use_the_plain_code():
    network = nn.Sequential(Residual(256, 256), Residual(256, 258), Residual(258, 16))
    fuse_residuals(network, torch.device("cuda"), BF16)
    assert [block.fused for block in network] == [kernels.fused_residual, None, None]


def test_compilation_leaves_out_the_blocks_with_kernels(monkeypatch):
    network = nn.Sequential(Residual(8, 8), nn.MaxPool2d(2), Residual(8, 258))
    fuse_residuals(network, torch.device("cuda"), BF16)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    compile_residuals(network)
    assert compiled == [network[2]]


def shapes_of_configs() -> list[str]:
    """Channels of all residual blocks of all configs, as `inputs,outputs`."""
    shapes: set[tuple[int, int]] = set()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = config_from_dict(yaml.safe_load(path.read_text()), path.name)
        with torch.device("meta"):
            network = StackedHourglass.of(config.model, joints=16)
        blocks = [m for m in network.modules() if isinstance(m, Residual)]
        shapes |= {(m.norm1.num_features, m.conv3.out_channels) for m in blocks}
    return [f"{inputs},{outputs}" for inputs, outputs in sorted(shapes)]


@pytest.mark.gpu
def test_on_a_gpu_the_blocks_of_all_configs_are_as_exact():
    for shape in shapes_of_configs():
        inputs, outputs = map(int, shape.split(","))
        assert_bf16_is_as_exact_as_the_plain_block((inputs, outputs, 3, 20, 20))


@pytest.mark.gpu
def test_on_a_gpu_a_network_trains_as_without_the_kernels():
    """Two stacks at 256 px in bf16: the loss, and the norm of all gradients."""
    torch.manual_seed(0)
    network = StackedHourglass(2, 256, 16).to(DEVICE, memory_format=torch.channels_last)
    images, target = torch.rand(4, 3, 256, 256), torch.rand(4, 16, 64, 64)
    images, target, has_target = (t.to(DEVICE) for t in (images, target, torch.ones(4, 16)))
    found = []
    for change in (lambda _: None, replace):
        copied = copy.deepcopy(network)
        change(copied)
        with torch.autocast("cuda", BF16):
            heat = copied(images)
        loss = stack_losses(heat, target, has_target).mean()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in copied.parameters()])
        found.append(torch.stack([loss.detach(), norm]))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("side", [3, 8])
def test_the_kernels_of_all_configs_compile_for_sm_90(side, tmp_path):
    """They fit into a block's shared memory (227 KB) and spill almost no registers.

    Integers that 16 divides, and others, are compiled differently.
    """
    shapes = shapes_of_configs()
    assert "256,256" in shapes and "16,32" in shapes
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_kernels.py"
    command = [sys.executable, script, tmp_path, str(side), *shapes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    names = {"_statistics", "_normalisation", "_norm_relu_conv", "_gradient_sums"}
    assert {each["name"] for each in found} == {*names, "_input_gradient"}
    for each in found:
        assert each["shared"] <= 227 * 1024 and each["STACK"] <= 256 and each["LOCAL"] == 0, each
