"""A training step as one CUDA graph: the host starts all of its kernels with a single launch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.distributed import DistributedContext
from configs.schema import Config
from pipelines.augment import Draw
from pipelines.opencv_loader import RawBatch
from pipelines.shard_format import record_length
from training.metrics import Totals

WARM_UP_STEPS = 3
"""Steps before the recording, which compile, choose algorithms and create the optimizer's state."""


def graph_obstacles(config: Config, dist: DistributedContext) -> list[str]:
    """The settings with which train.cuda_graph does not work."""
    unsupported = {
        "a CPU": dist.device.type == "cpu",
        "fp16": dist.dtype == torch.float16,
        f"optim.name {config.optim.name}": config.optim.name != "adam",
        f"optim.accumulate {config.optim.accumulate}": config.optim.accumulate > 1,
        f"train.verify_every {config.train.verify_every}": config.train.verify_every > 0,
    }
    return [setting for setting, is_set in unsupported.items() if is_set]


def empty_batch(config: Config, joints: int, device: torch.device) -> RawBatch:
    """Zeros in the shapes of the loader's batches; images in float32."""
    people, px = config.data.batch_size, config.data.input_px
    shapes = (px, px, 3), (2, 3), (len(Draw._fields),), (record_length(joints),)
    return RawBatch(*(torch.zeros(people, *shape, device=device) for shape in shapes))


class StepGraph:
    """Runs a recorded step on batches that are copied into its buffers."""

    def __init__(
        self,
        step: Callable[[RawBatch, Totals], None],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        buffers: RawBatch,
    ):
        """Record `step`, which must not wait for the GPU. Weights and optimizer state are restored.

        network, optimizer: those that the step changes; the optimizer has one parameter group.
        buffers: a batch on the device.
        """
        self._step, self._buffers = step, buffers
        self._device = buffers.images_NHW3.device
        self._copies = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._rate = torch.zeros((), device=self._device)
        (group,) = optimizer.param_groups
        settings = {name: group[name] for name in ("lr", "capturable", "params")}
        # Fused Adam updates 36 tensors at a time; one large among them takes as long as 36.
        parameters = sorted(group["params"], key=Tensor.numel)
        group.update(lr=self._rate, capturable=True, params=parameters)
        before = _state(network, optimizer)
        kept = [tensor.clone() for tensor in before]
        self._replay = record_cuda_graph(self._run_on_buffers)
        after = _state(network, optimizer)
        for tensor in after[len(kept) :]:  # state of an optimizer that had not done a step before
            tensor.zero_()
        for tensor, value in zip(after, kept, strict=False):
            tensor.copy_(value)
        group.update(settings)

    def _run_on_buffers(self) -> None:
        self._results = Totals(self._device)
        self._step(self._buffers, self._results)

    def run(self, raw: RawBatch, learning_rate: float, totals: Totals) -> None:
        """Do a step on a batch and add its results to `totals`."""
        with torch.cuda.stream(self._copies):  # while the step before still runs
            tensors = [tensor.to(self._device, non_blocking=True) for tensor in raw]
        if self._copies:
            stream = torch.cuda.current_stream()
            stream.wait_stream(self._copies)
            for tensor in tensors:
                tensor.record_stream(stream)
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer.copy_(tensor)
        self._rate.fill_(learning_rate)
        self._replay()
        totals.merge(self._results)


def _state(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a step changes in place; the optimizer's come last."""
    moments = [tensor for values in optimizer.state.values() for tensor in values.values()]
    return [*network.state_dict().values(), *moments]


def record_cuda_graph(function: Callable[[], object]) -> Callable[[], None]:
    """Run a function a few times, record it, and return a function that replays the recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # "global" would forbid other threads to wait for the GPU, as DALI's does to free buffers.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay
