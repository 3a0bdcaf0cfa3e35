"""Timing of what the network is part of: targets, training steps, and whole steps."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.loading import Load, loader_spec, set_up_as_training
from benchmarks.princeton_path import render_by_loop
from benchmarks.timing import Case
from common.distributed import choose_dtype
from common.system import keep_freed_memory
from configs.skeleton import MPII
from model.hourglass import StackedHourglass
from model.loss import stack_losses
from pipelines import heatmaps
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.geometry import STRIDE
from pipelines.loader import Batch, LoaderName, dali_is_installed, make_batch, train_loader
from pipelines.shards import ShardSet


def heatmap_cases(batch_size: int, device: torch.device) -> list[Case]:
    """Targets of a batch: a loop over joints in numpy, and the batched routine."""
    rng = np.random.default_rng(0)
    joints = rng.uniform(-5, 69, (batch_size, MPII.joint_count, 2))
    on_device = torch.from_numpy(joints).float().to(device)
    drawn = torch.ones(joints.shape[:2], device=device)
    repeats = 20 if device.type == "cpu" else 500

    def loop() -> int:
        for person in joints:
            render_by_loop(person)
        return batch_size

    def batched(rule: heatmaps.Rule, sigma: float) -> int:
        for _ in range(repeats):
            heatmaps.render(on_device, drawn, 64, rule, sigma)
        return repeats * batch_size

    return [
        Case("numpy, a loop over joints (princeton)", loop),
        Case(f"torch on {device.type}, princeton", lambda: batched("princeton", 1.0)),
        Case(f"torch on {device.type}, exact", lambda: batched("exact", 1.0)),
    ]


class Step:
    """Forward, loss, backward and optimizer of 2 stacks."""

    def __init__(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device):
        self.dtype, self.device = dtype, device
        self.network = StackedHourglass(2, 256, MPII.joint_count).to(device)
        self.network.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), 1e-3, fused=dtype != torch.float32
        )

    def __call__(self, images_N3HW: Tensor, heat_NJHW: Tensor, drawn_NJ: Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            heat = self.network(images_N3HW)
        stack_losses(heat, heat_NJHW, drawn_NJ, "empty").mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def made_batch(size: int, load: Load, layout: torch.memory_format) -> tuple[Tensor, ...]:
    """Images, targets and marks of noise."""
    heat_px = load.input_px // STRIDE
    images = torch.rand(size, 3, load.input_px, load.input_px, device=load.device)
    target = torch.rand(size, MPII.joint_count, heat_px, heat_px, device=load.device)
    drawn = torch.ones(size, MPII.joint_count, device=load.device)
    return images.contiguous(memory_format=layout), target, drawn


def train_cases(load: Load) -> list[Case]:
    """The training step on a batch that lies ready; first float32 in torch's own layout."""
    keep_freed_memory()  # as the programs do
    best = choose_dtype("auto", load.device)
    ways = [("float32, NCHW", torch.float32, torch.contiguous_format),
            ("float32, channels-last", torch.float32, torch.channels_last)]  # fmt: skip
    if best != torch.float32:
        name = str(best).removeprefix("torch.")
        ways.append((f"{name}, channels-last, fused Adam", best, torch.channels_last))
    size = step_size(load)
    return [
        _step_case(f"2 stacks, batch {size}, {name}", dtype, layout, load)
        for name, dtype, layout in ways
    ]


def step_size(load: Load) -> int:
    """People a step: a CPU takes two."""
    return load.batch_size if load.device.type == "cuda" else min(load.batch_size, 2)


def _step_case(name: str, dtype: torch.dtype, layout: torch.memory_format, load: Load) -> Case:
    step, batch = Step(dtype, layout, load.device), made_batch(step_size(load), load, layout)
    repeats = 1 if load.device.type == "cpu" else 10

    def run() -> int:
        for _ in range(repeats):
            step(*batch)
        return repeats * step_size(load)

    return Case(name, run)


def end_to_end_cases(originals: ShardSet, crops: ShardSet, load: Load) -> list[Case]:
    """Training steps with a loader, against the same steps on one batch that lies ready."""
    set_up_as_training(load)
    dtype = choose_dtype("auto", load.device)
    step = Step(dtype, torch.channels_last, load.device)
    ready = made_batch(step_size(load), load, torch.channels_last)
    preset, repeats = PRESETS["hrnet"], 4 if load.device.type == "cpu" else 40
    codec = Codec(preset=preset, rule="exact", sigma=1.0, input_px=load.input_px, skeleton=MPII)

    def case(name: str, next_batch: Callable[[], tuple[Tensor, ...]]) -> Case:
        def run() -> int:
            for _ in range(repeats):
                step(*next_batch())
            return repeats * step_size(load)

        return Case(name, run)

    def loaded(shards: ShardSet, which: LoaderName) -> Callable[[], tuple[Tensor, ...]]:
        loader = train_loader(shards, loader_spec(which, preset, load, step_size(load)))

        def next_batch() -> tuple[Tensor, ...]:
            batch: Batch = make_batch(loader.next(), codec, load.device)
            return batch.images_N3HW, batch.heat_NJHW, batch.drawn_NJ

        return next_batch

    cases = [
        case("network alone", lambda: ready),
        case("opencv, originals", loaded(originals, "opencv")),
        case("opencv, crops", loaded(crops, "opencv")),
    ]
    if dali_is_installed():
        cases.append(case(f"dali on {load.device.type}, crops", loaded(crops, "dali")))
    return cases
