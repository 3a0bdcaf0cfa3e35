"""The Triton kernels compute the same as the plain network.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

import copy
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from helpers import new_network
from torch import Tensor, nn

from common import system
from common.system import triton_works
from configs.schema import config_from_dict
from model import hourglass
from model.hourglass import (
    KERNEL_SHARED_BYTES,
    Residual,
    StackedHourglass,
    kernel_obstacles,
)
from model.loss import stack_losses

triton = pytest.importorskip("triton")
from model import fused_kernels as kernels  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for triton's interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOW = pytest.mark.slow
BF16, FP32 = torch.bfloat16, torch.float32
OBSTACLES = kernel_obstacles(new_network(1, 8, 3, 1, (4, 8, 8)), DEVICE, BF16)
ON_A_LARGE_GPU = pytest.mark.skipif(
    DEVICE.type == "cuda" and bool(OBSTACLES), reason=", ".join(OBSTACLES)
)


@pytest.fixture(autouse=True)
def small_ranges(request, monkeypatch):
    """On a CPU, one or two programs with several tiles each, and bf16 as a GPU computes it.

    Triton's interpreter multiplies the bits of bf16 in tl.dot and truncates to bf16. Here the
    products are of float32, where they are exact, and casts round to nearest.
    """
    if DEVICE.type == "cuda" or "sm_90" in request.node.name:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    monkeypatch.setattr(kernels, "MULTIPROCESSORS", triton.language.constexpr(1))
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
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE.type, BF16, enabled=x.dtype == BF16):
        if fused:
            weights = kernels.cast_weights(DEVICE, residual)
            y = kernels.fused_residual(residual, weights, (x, None))[0]
        else:
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
@ON_A_LARGE_GPU
@pytest.mark.parametrize("shape", [(64, 128, 16, 128, 128), (128, 256, 64, 64, 64),
                                   (256, 256, 64, 64, 64), (256, 256, 16, 4, 4)])  # fmt: skip
def test_on_a_gpu_it_is_as_exact_as_the_plain_block(shape):
    assert_bf16_is_as_exact_as_the_plain_block(shape)


@interpreted
def test_what_is_not_finite_stays_so():
    """Otherwise a bad batch would have a finite loss."""
    residual, (x, grad) = make_residual(16, 16), (None, None)
    x, grad = inputs_of(residual, 1, 4, 4)
    x[0, 0, 0, 0] = math.nan
    assert results(residual, x, grad, fused=True)["y"].isnan().all()
    pooled = kernels._MaxPool.apply(x)[0]
    assert torch.equal(pooled.isnan(), nn.functional.max_pool2d(x, 2).isnan())


def test_the_variance_is_exact_where_the_mean_is_large():
    """A sum of squares in float32 would lose all of this variance: 1000^2 / 0.1^2 is 10^8."""
    residual, (x, grad) = make_residual(16, 16), (None, None)
    x, grad = inputs_of(residual, 2, 9, 9)
    x = 1000 + 0.1 * torch.randn_like(x)
    found = results(residual, x, grad, fused=True)
    expected = 0.9 + 0.1 * x.double().var((0, 2, 3))
    torch.testing.assert_close(found["norm1.running_var"].double(), expected, rtol=1e-5, atol=0)


@interpreted
def test_gradients_are_exact_where_the_mean_is_large():
    """They are differences of sums that grow with the mean: here 100 times the deviation."""
    residual = make_residual(16, 16)
    x, grad = inputs_of(residual, 2, 9, 9)
    x = 100 + torch.randn_like(x)
    exact = results(residual.double(), x.double(), grad.double(), fused=False)
    found = results(residual.float(), x, grad, fused=True)
    for name in ("norm1.weight", "norm1.bias", "conv1.weight"):
        assert relative_error(found[name], exact[name]) < 1e-4, name


def make_network(*args: object, **settings: bool) -> StackedHourglass:
    """Random weights, also of batch norms; the upsampled map and the heatmaps matter."""
    torch.manual_seed(0)
    network = new_network(*args, **settings).to(DEVICE, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network


def step_of(network: StackedHourglass, images: Tensor, fused: bool) -> dict[str, Tensor]:
    """Loss, gradients and buffers after a step, in bf16 if the images are."""
    network = copy.deepcopy(network)
    network.fused = kernels.fused_network if fused else None
    joints, side = network.heads[0].out_channels, images.shape[2] // 4
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(len(images), joints, side, images.shape[-1] // 4, generator=generator).to(
        images
    )
    with torch.autocast(DEVICE.type, BF16, enabled=images.dtype == BF16):
        heat = network(images)
    loss = stack_losses(heat, target, torch.ones(len(images), joints).to(images)).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {
        "loss": loss.detach(),
        "heat": heat.detach(),
        **dict(network.named_buffers()),
    } | gradients


TINY, TWO_RESOLUTIONS = (2, 8, 3, 1, (4, 8, 8)), (2, 20, 3, 2, (4, 8, 20))


@interpreted
@pytest.mark.parametrize(
    ("shape", "side", "checkpoint_activations"),
    [(TINY, 16, False), *(pytest.param(TWO_RESOLUTIONS, 48, c, marks=SLOW) for c in (False, True))],
)
def test_a_network_trains_as_without_the_kernels(shape, side, checkpoint_activations):
    network = make_network(*shape, checkpoint_activations=checkpoint_activations)
    images = torch.rand(2, 3, side, side + 8 * shape[3]).to(DEVICE)
    exact = step_of(network.double(), images.double(), fused=False)
    found = step_of(network.float(), images, fused=True)
    for name, expected in exact.items():
        # Biases before a batch norm have no gradient but rounding errors.
        error = (found[name] - expected).double().norm()
        assert error <= 1e-3 * expected.double().norm() + 1e-6, name
    for name, parameter in network.named_parameters():  # DDP would copy and warn
        assert found[name].stride() == parameter.stride(), name


@interpreted
@SLOW
def test_a_network_in_bf16_is_as_exact_as_without_the_kernels():
    """Gradients far from the loss have errors of 10 to 40 % in both: their median is compared."""
    network = make_network(2, 32, 3, 1, (16, 16, 32))
    images = torch.rand(2, 3, 48, 48).to(DEVICE, BF16)
    exact = step_of(network.double(), images.double(), fused=False)
    plain, fused = (step_of(network.float(), images, fused) for fused in (False, True))
    errors = [{n: relative_error(s[n], exact[n]) for n in exact} for s in (plain, fused)]
    for name, parameter in network.named_parameters():  # DDP would copy and warn
        assert fused[name].stride() == parameter.stride(), name
    assert errors[1]["heat"] <= 1.1 * errors[0]["heat"]
    names = [n for n, p in network.named_parameters() if exact[n].norm() > 1e-4]
    assert len(names) > 100
    assert np.median([errors[1][name] / errors[0][name] for name in names]) <= 1.3


def test_evaluation_uses_the_plain_network():
    network = new_network(1, 8, 3, 1, (4, 8, 8)).eval()
    images = torch.rand(1, 3, 16, 16)
    expected = network(images)
    network.fused = lambda *_: pytest.fail("the kernels")
    assert torch.equal(network(images), expected)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "found"),
    [
        ("cpu", BF16, 8, ["device cpu"]),
        ("cuda", FP32, 8, ["float32"]),
        ("cuda", BF16, 258, ["258 channels"]),
        ("cuda", BF16, 8, []),
    ],
)
def test_the_kernels_are_refused_where_they_cannot_run(device, dtype, width, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as if it were an H100
    monkeypatch.setattr(hourglass, "triton_works", lambda: True)
    network = new_network(1, width, 3, 1, (4, 8, 8))
    assert kernel_obstacles(network, torch.device(device), dtype) == found


def test_the_kernels_are_refused_without_a_compiler_or_on_a_small_gpu(monkeypatch):
    network, device = new_network(1, 8, 3, 1, (4, 8, 8)), torch.device("cuda")
    properties = types.SimpleNamespace(shared_memory_per_block_optin=166_912)  # an A100
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(hourglass, "triton_works", lambda: True)
    assert kernel_obstacles(network, device, BF16) == ["166,912 bytes of shared memory a block"]
    monkeypatch.setattr(hourglass, "triton_works", lambda: False)
    (found,) = kernel_obstacles(network, device, BF16)
    assert "no C compiler" in found
    assert kernel_obstacles(nn.Linear(2, 2), torch.device("cpu"), FP32)[0] == "the network Linear"


def test_triton_needs_a_compiler_and_pythons_header(monkeypatch):
    monkeypatch.setattr(system.sysconfig, "get_path", lambda name: str(ROOT))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(system.shutil, "which", lambda name: name if name == "clang" else None)
    assert not triton_works()  # no Python.h
    monkeypatch.setattr(system.Path, "exists", lambda path: True)
    assert triton_works()
    monkeypatch.setenv("CC", "no-such-compiler")  # triton then looks for no other
    assert not triton_works()
    monkeypatch.setenv("CC", "clang")
    monkeypatch.setattr(system.importlib.util, "find_spec", lambda name: None)
    assert not triton_works()


def networks_of_configs() -> list[tuple[int, ...]]:
    """Width and channels of the stem of the networks of all configs."""
    found: set[tuple[int, ...]] = set()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = config_from_dict(yaml.safe_load(path.read_text()), path.name)
        found.add((config.model.width, *config.model.stem))
    return sorted(found)


@pytest.mark.gpu
@ON_A_LARGE_GPU
@pytest.mark.parametrize("width_and_stem", networks_of_configs())
def test_on_a_gpu_the_networks_of_all_configs_are_as_exact_in_bf16(width_and_stem):
    """Two stacks; the loss and all gradients together, compared with float64."""
    width, *stem = width_and_stem
    network = make_network(2, width, 16, 2, stem)
    images = torch.rand(4, 3, 128, 160).to(DEVICE, BF16)
    steps = [step_of(network.double(), images.double(), fused=False)]
    steps += [step_of(network.float(), images, fused) for fused in (False, True)]
    names = [name for name, _ in network.named_parameters()]
    exact, plain, fused = (torch.cat([s[n].double().flatten() for n in names]) for s in steps)
    assert relative_error(fused, exact) <= 1.3 * relative_error(plain, exact) + 2e-3
    torch.testing.assert_close(steps[2]["loss"], steps[1]["loss"], rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("side", [24, 32])
def test_the_kernels_of_all_configs_compile_for_sm_90(side, tmp_path):
    """They fit into a block's shared memory and spill almost no registers.

    Integers that 16 divides, and others, are compiled differently.
    """
    networks = networks_of_configs()
    assert (256, 64, 128, 128) in networks
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_kernels.py"
    shapes = [",".join(map(str, (16, *network))) for network in networks]
    shapes += [f"{joints},256,64,128,128" for joints in (40, 144)]
    command = [sys.executable, script, tmp_path, str(side), *shapes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    assert {each["name"] for each in found} == {
        "_normalisation", "_norm_relu_conv", "_gradient_sums", "_input_gradient",
        "_upsampling_gradient", "_max_pool_gradient",
    }  # fmt: skip
    for each in found:
        assert (
            each["shared"] <= KERNEL_SHARED_BYTES and each["STACK"] <= 256 and each["LOCAL"] == 0
        ), each
