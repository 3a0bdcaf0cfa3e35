"""One training step in the ways that gpu_train.py times, and what of the GPU a step uses."""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loading import Load
from benchmarks.timing import Case, Result, synchronize, take_turns
from configs.skeleton import MPII
from model.hourglass import Residual, StackedHourglass
from model.loss import stack_losses, stack_losses_of_joints
from pipelines import heatmaps
from pipelines.geometry import STRIDE

H200_BF16 = 790e12
"""FLOP/s of a bf16 matrix product of 8192 x 8192 on an NVIDIA H200, measured by others with torch;
`card` measures this card's own."""
HEATMAP_PEOPLE = 1024
"""Their heatmaps, 268 MB at 256 px, do not fit into a GPU's cache."""


class Network(NamedTuple):
    """What is trained."""

    stacks: int
    width: int
    depth: int
    input_px: int

    def build(self, checkpointed: bool = False) -> StackedHourglass:
        """Fresh weights."""
        return StackedHourglass(
            self.stacks, self.width, MPII.joint_count, self.depth,
            checkpoint_activations=checkpointed,
        )  # fmt: skip


class Way(NamedTuple):
    """One way to make the same step."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    layout: torch.memory_format = torch.channels_last
    """Of the images, and so of what the network computes."""
    weights: torch.memory_format = torch.channels_last
    fused_adam: bool = True
    reads_loss: bool = False
    """The host waits for the loss before it begins the backward pass, for princeton-vl's log."""
    checkpointed: bool = False
    tries_algorithms: bool = True
    """cuDNN times its algorithms once a shape, as princeton-vl's train.py asks; ours asks not."""
    graphed: bool = False
    """The network's forward and backward pass are a CUDA graph each."""
    compiles: str = ""
    """Nothing, "residuals", or the mode of torch.compile for the whole network."""
    targets: str = "ready"
    """Ready, "plain" rendered in the step, or "fused": rendered in the compiled loss."""


NCHW = torch.contiguous_format
# Its network permutes NHWC images, so that torch computes in channels-last with weights in NCHW.
PRINCETON = Way(
    "princeton-vl's: float32, Adam", torch.float32, weights=NCHW, fused_adam=False, reads_loss=True
)
OURS = Way("bf16, channels-last, fused Adam")


def ways(device: torch.device) -> list[Way]:
    """All ways; the first is what the others are divided by. CUDA graphs on a GPU alone."""
    listed = [
        PRINCETON,
        Way("float32, channels-last, fused Adam", torch.float32),
        Way("bf16, NCHW, fused Adam", layout=NCHW, weights=NCHW),
        OURS,
        OURS._replace(name=f"{OURS.name}, activations twice", checkpointed=True),
        OURS._replace(name=f"{OURS.name}, cuDNN's heuristics", tries_algorithms=False),
    ]
    if device.type == "cuda":
        listed.append(OURS._replace(name=f"{OURS.name}, CUDA graphs", graphed=True))
    residuals = OURS._replace(compiles="residuals")
    listed += [
        residuals._replace(name="residuals compiled"),
        residuals._replace(name="residuals compiled, targets rendered", targets="plain"),
        residuals._replace(name="residuals compiled, targets in the loss", targets="fused"),
    ]
    if device.type == "cuda":
        listed += [
            residuals._replace(name="residuals compiled, CUDA graphs", graphed=True),
            OURS._replace(name="network compiled", compiles="default"),
        ]
    return listed


class TimedStep:
    """Forward, loss, backward and optimizer on a batch of noise that lies ready."""

    def __init__(self, way: Way, size: Network, people: int, device: torch.device):
        """Build the network and the batch; compile and capture what the way asks for."""
        self.way, self.device = way, device
        torch.backends.cudnn.benchmark = way.tries_algorithms  # a capture is of what it chooses
        heat_px = size.input_px // STRIDE
        images = torch.rand(people, 3, size.input_px, size.input_px, device=device)
        self.images = images.contiguous(memory_format=way.layout)
        self.joints = torch.rand(people, MPII.joint_count, 2, device=device) * heat_px
        self.drawn = torch.ones(people, MPII.joint_count, dtype=torch.bool, device=device)
        self.heat_px = heat_px
        self.target = self._render()
        self.network = size.build(way.checkpointed).to(device)
        self.network.to(memory_format=way.weights)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), 1e-3, fused=way.fused_adam or None
        )
        fuses = way.targets == "fused"
        self.fused_losses = torch.compile(stack_losses_of_joints) if fuses else None
        self.forward = self._wrap()

    def __call__(self) -> None:
        """One step."""
        torch.backends.cudnn.benchmark = self.way.tries_algorithms
        heat = self.forward(self.images)
        loss = self._losses(heat).mean()
        if self.way.reads_loss:
            loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _render(self) -> Tensor:
        return heatmaps.render(self.joints, self.drawn, self.heat_px, "exact", 1.0)

    def _losses(self, heat_NSJHW: Tensor) -> Tensor:
        if self.fused_losses:
            return self.fused_losses(heat_NSJHW, self.joints, self.drawn, "exact", 1.0, "empty")
        target = self._render() if self.way.targets == "plain" else self.target
        return stack_losses(heat_NSJHW, target, self.drawn, "empty")

    def _wrap(self) -> Callable[[Tensor], Tensor]:
        if self.way.compiles == "residuals":
            # A kind of residual is compiled once a resolution, however many stacks there are.
            torch._dynamo.config.recompile_limit = 64
            for module in self.network.modules():
                if isinstance(module, Residual):
                    module.compile(dynamic=False)
        elif self.way.compiles:
            self.network.compile(mode=self.way.compiles)
        network = Cast(self.network, self.way)
        if not self.way.graphed:
            return network
        return torch.cuda.make_graphed_callables(network, (self.images,))  # type: ignore[return-value]


class Cast(nn.Module):
    """A network in autocast. It is inside the module, so that a captured backward pass is not."""

    def __init__(self, network: nn.Module, way: Way):
        super().__init__()
        self.network, self.way = network, way

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Heatmaps of every stack."""
        dtype, kind = self.way.dtype, images_N3HW.device.type
        # A captured graph cannot share autocast's cache of weights.
        with torch.autocast(
            kind, dtype, enabled=dtype != torch.float32, cache_enabled=not self.way.graphed
        ):
            return self.network(images_N3HW)


def step_case(way: Way, size: Network, people: int, device: torch.device) -> Case:
    """Steps of a way; it is built before its first turn."""
    repeats = 10 if device.type == "cuda" else 1

    @functools.cache
    def built() -> TimedStep:
        return TimedStep(way, size, people, device)

    def run() -> int:
        for _ in range(repeats):
            built()()
        return repeats * people

    return Case(way.name, run, built)


@functools.cache
def flops_of_a_person(size: Network) -> int:
    """FLOP of convolutions, forward and backward, counted by torch on a network without weights."""
    network = size.build().to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size.input_px, size.input_px, device="meta")).sum().backward()
    return counter.get_total_flops()


def utilisation(results: list[Result], flops: int, report: dict[str, Any]) -> dict[str, Any]:
    """For each result, TFLOP/s of the network and their share of the card's bf16 matrix rate."""
    own = report.get("card", {}).get("bf16_flops_per_s") or H200_BF16
    return {
        "GFLOP a person": flops / 1e9,
        **{
            r.name: {
                "TFLOP/s": r.median * flops / 1e12,
                "of 790 TFLOP/s": r.median * flops / H200_BF16,
                "of this card's": r.median * flops / own,
            }
            for r in results
        },
    }


def card(device: torch.device) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and FLOP/s of a bf16 matrix product."""
    side, count = (8192, 1 << 29) if device.type == "cuda" else (256, 1 << 20)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.empty(count, device=device, dtype=torch.bfloat16).normal_()
    sink = torch.empty_like(source)
    product_s = seconds_of(lambda: a @ a, device)
    copy_s = seconds_of(lambda: sink.copy_(source), device)
    return {"bf16_flops_per_s": 2 * side**3 / product_s, "copy_bytes_per_s": 4 * count / copy_s}


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Mean seconds of some work, after three times that do not count."""
    for _ in range(3):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def heatmap_facts(load: Load, rounds: int, report: dict[str, Any]) -> dict[str, Any]:
    """Targets by the plain routine and compiled: people/s, and bytes of what a copy moves."""
    people = HEATMAP_PEOPLE if load.device.type == "cuda" else load.batch_size
    heat_px = load.input_px // STRIDE
    joints = torch.rand(people, MPII.joint_count, 2, device=load.device) * heat_px
    drawn = torch.ones(joints.shape[:2], dtype=torch.bool, device=load.device)

    def case(name: str, render: Callable[..., Tensor]) -> Case:
        def run() -> int:
            for _ in range(20):
                render(joints, drawn, heat_px, "exact", 1.0)
            return 20 * people

        return Case(name, run)

    cases = [case("plain", heatmaps.render), case("compiled", torch.compile(heatmaps.render))]
    results = take_turns(cases, rounds, load.device)
    bytes_each = 4 * MPII.joint_count * heat_px**2
    copy = report.get("card", {}).get("copy_bytes_per_s")
    return {
        r.name: {
            "people_per_s": r.median,
            "bytes_per_s": r.median * bytes_each,
            "of copy bandwidth": r.median * bytes_each / copy if copy else None,
        }
        for r in results
    }


def memory_facts(size: Network, load: Load, largest: int) -> dict[str, Any]:
    """By way: the peak of each batch, doubled until one does not fit, and bytes a person.

    cuDNN chooses by its heuristics here: to try all algorithms for each batch would take minutes.
    """
    chosen = [PRINCETON, OURS, OURS._replace(name="activations twice", checkpointed=True)]
    chosen = [way._replace(tries_algorithms=False) for way in chosen]
    return {way.name: memory_of(way, size, load, largest) for way in chosen}


def memory_of(way: Way, size: Network, load: Load, largest: int) -> dict[str, Any]:
    """Peaks of one way; `fits` is the largest batch that ran, `does_not` the first that did not."""
    peaks: dict[int, float] = {}
    people, failed, why = max(1, load.batch_size // 2), None, "out of memory"
    while people <= largest and failed is None:
        try:
            peaks[people] = peak_mb(way, size, people, load.device)
            people *= 2
        except torch.OutOfMemoryError:
            failed = people
        except RuntimeError as error:  # of cuDNN, for tensors that are too large for it
            failed, why = people, f"{error}"[:200]
        gc.collect()
        if load.device.type == "cuda":
            torch.cuda.empty_cache()
    *_, second, last = [0, *peaks]
    each = (peaks[last] - peaks.get(second, 0.0)) / (last - second) if last else None
    return {"peak_mb": peaks, "mb_a_person": each, "fits": last or None,
            "does_not": failed, "why": why if failed else None}  # fmt: skip


def peak_mb(way: Way, size: Network, people: int, device: torch.device) -> float:
    """10^6 bytes that torch holds at most in two steps; 0 on a CPU, where torch does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = TimedStep(way, size, people, device)
    step()
    step()
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
