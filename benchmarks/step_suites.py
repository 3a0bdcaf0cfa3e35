"""Benchmarks of training steps, without and with loaders."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loader_suites import (
    HRNET,
    Options,
    Start,
    act_as_training,
    drain,
    start_loader,
    stream_cases,
)
from benchmarks.princeton_baseline import princeton_step
from benchmarks.timing import Case
from common.distributed import choose_dtype
from configs.schema import LoaderName, ModelConfig
from configs.skeleton import MPII
from model.hourglass import StackedHourglass, compile_residuals, fuse_network, kernel_obstacles
from model.loss import stack_losses
from pipelines.geometry import STRIDE
from training.step_graph import record_cuda_graph

LEAST_STEPS = 150
"""Minimum number of steps with a loader; fewer would measure its prefetched batches."""


class Variant(NamedTuple):
    """An implementation of the training step. Images are channels-last, as princeton-vl's."""

    name: str
    dtype: torch.dtype
    is_princeton: bool = False
    change: Callable[[nn.Module], object] = lambda network: None
    """Applied to the network: compiles it, or replaces parts of it."""
    graphed: bool = False
    """Whether the step is recorded as a CUDA graph."""


def variants_of(options: Options) -> list[Variant]:
    """Ratios refer to the first; the last is train.py's default.

    torch.compile is used on a GPU only: it takes minutes.
    """
    device = options.device
    dtype = choose_dtype("auto", device)
    theirs = Variant("princeton-vl's: float32 (TF32), Adam", torch.float32, is_princeton=True)
    ours = Variant(f"ours: {str(dtype).removeprefix('torch.')}, fused Adam", dtype)
    if device.type == "cpu":
        return [theirs, ours]
    compiled = ours._replace(name=f"{ours.name}, compiled", change=compile_residuals)
    kernels = ours._replace(name=f"{ours.name}, fused kernels", change=fuse_network)
    has_kernels = not kernel_obstacles(build_network(1, options), device, dtype)
    plain = [compiled, ours, *([kernels] if has_kernels else [])]
    graphed = [v._replace(name=f"{v.name}, CUDA graph", graphed=True) for v in plain]
    return [theirs, *plain, *graphed]


def training_step(variant: Variant, stacks: int, options: Options) -> Callable[..., object]:
    """Forward, loss, backward and optimizer, as a function of a batch of random_batch."""
    layout = torch.contiguous_format if variant.is_princeton else torch.channels_last
    network = build_network(stacks, options, layout)
    variant.change(network)
    fused = None if variant.is_princeton else True
    optimizer = torch.optim.Adam(
        network.parameters(), 1e-3, fused=fused, capturable=variant.graphed
    )

    def step(images_N3HW: Tensor, heat_NJHW: Tensor, has_target_NJ: Tensor) -> None:
        torch.backends.cudnn.benchmark = True  # as each train.py sets it
        if variant.is_princeton:
            princeton_step(network, optimizer, images_N3HW.permute(0, 2, 3, 1), heat_NJHW)
            return
        is_mixed = variant.dtype != torch.float32
        with torch.autocast(options.device.type, variant.dtype, enabled=is_mixed):
            heat_NSJHW = network(images_N3HW)
        stack_losses(heat_NSJHW, heat_NJHW, has_target_NJ).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build_step(
    variant: Variant, stacks: int, options: Options, batch_size: int
) -> Callable[..., object]:
    """`training_step`, or a CUDA graph of it on buffers, into which each batch is copied."""
    step = training_step(variant, stacks, options)
    if not variant.graphed:
        return step
    buffers = random_batch(batch_size, options)
    replay = record_cuda_graph(lambda: step(*buffers))

    def run(*batch: Tensor) -> None:
        for buffer, tensor in zip(buffers, batch, strict=True):
            buffer.copy_(tensor)
        replay()

    return run


def build_network(
    stacks: int, options: Options, layout: torch.memory_format = torch.channels_last
) -> StackedHourglass:
    """Random weights on the device."""
    model = ModelConfig(stacks=stacks, width=options.width)
    network = StackedHourglass(model, MPII.joint_count).to(options.device)
    return network.to(memory_format=layout)  # type: ignore[call-overload]


def random_batch(people: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Images, target heatmaps of noise, and a target for each joint."""
    side, heat_px, device = options.input_px, options.input_px // STRIDE, options.device
    images = torch.rand(people, side, side, 3, device=device).permute(0, 3, 1, 2)
    heat = torch.rand(people, MPII.joint_count, heat_px, heat_px, device=device)
    return images, heat, torch.ones(people, MPII.joint_count, dtype=torch.bool, device=device)


def step_group(options: Options, stacks: int, batch_size: int) -> list[Case]:
    """The variants of the step that suit the device, on a fixed batch."""
    act_as_training(options)
    tflop = flop_of_a_person(stacks, options) / 1e12
    repeats = 10 if options.device.type == "cuda" else 1
    batch = random_batch(batch_size, options)

    def case(variant: Variant) -> Case:
        """A variant whose network is built at its first turn."""
        built: list[Callable[..., object]] = []

        def prepare() -> None:
            if not built:
                built.append(build_step(variant, stacks, options, batch_size))

        def run() -> int:
            for _ in range(repeats):
                built[0](*batch)
            return repeats * batch_size

        def finish() -> None:
            if variant.graphed:  # frees the graph's memory pool for the other cases
                built.clear()
                torch.cuda.empty_cache()

        return Case(variant.name, run, prepare, finish, tflop)

    return [case(variant) for variant in variants_of(options)]


def flop_of_a_person(stacks: int, options: Options) -> int:
    """FLOP of convolutions, forward and backward, counted by torch without memory for tensors."""
    network, side = build_network(stacks, options).to("meta"), options.input_px
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, side, side, device="meta")).sum().backward()
    return counter.get_total_flops()


def training_group(options: Options, batch_size: int) -> list[Case]:
    """train.py's steps of 2 stacks with each loader; 1 - ratio is the time lost to data."""
    act_as_training(options)
    variant = variants_of(options)[-1]
    step, ready = build_step(variant, 2, options, batch_size), random_batch(batch_size, options)

    def start(packing: str, loader: LoaderName) -> Callable[[], None]:
        next_batch = start_loader(options, batch_size, options.shards(packing), HRNET, loader)
        drain(next_batch, options.workers)  # the untimed warm-up steps prefetch again

        def one_step() -> None:
            batch = next_batch()
            step(batch.images_N3HW, batch.heat_NJHW, batch.has_target_NJ)

        return one_step

    starts: dict[str, Start] = {"network alone": lambda: partial(step, *ready)}
    for (loader, name), packing in product(options.loaders.items(), ("original", "crop")):
        starts[f"{name}, {packing}s"] = partial(start, packing, loader)
    return stream_cases(starts, options, batch_size, LEAST_STEPS * batch_size)
