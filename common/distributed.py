"""Ranks, device, precision and seed of a process, and communication between ranks.

With one process all functions work without torch.distributed.
"""

import hashlib
import math
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.distributed import DistStoreError, PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from common.errors import InputError
from common.system import keep_freed_memory, usable_cores

T = TypeVar("T")

WARM_UP_STEPS, ROUNDS, STEPS_PER_ROUND = 4, 2, 4
"""In each round each thread count runs STEPS_PER_ROUND steps; the first is not counted."""
MAX_SLOWDOWN = 3
"""A step that is so many times slower than with the other thread count ends the measurement."""


class DistributedContext(NamedTuple):
    """One process of a run."""

    rank: int
    """Global rank; selects its share of the data."""
    world_size: int
    device: torch.device
    dtype: torch.dtype
    """Autocast type; float32: no autocast."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


def init_distributed(
    device: Literal["auto", "cuda", "cpu"], precision: Literal["auto", "bf16", "fp16", "fp32"]
) -> DistributedContext:
    """Choose the device and join the process group if torchrun started several processes.

    The device is the GPU of the local rank. Ranks use nccl on GPUs and gloo on CPUs. Raises
    InputError.
    """
    keep_freed_memory()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    if world_size > 1 and not torch.distributed.is_initialized():
        store = torchrun_store()
        torch.distributed.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=_store_of_this_start(store, rank, world_size) if store else None,
            rank=rank,
            world_size=world_size,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return DistributedContext(rank, world_size, chosen, choose_dtype(precision, chosen))


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device for `auto`, `cuda` or `cpu`; `auto` prefers a GPU. Raises InputError."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        found = f"{count} CUDA GPU(s) for {local_rank + 1} or more processes"
        found = found if count else "no CUDA GPU that torch can use"
        expected = "an NVIDIA GPU for each process of this machine, and a CUDA build of torch"
        advice = "check nvidia-smi, start fewer processes (torchrun --nproc-per-node), or use cpu"
        raise InputError("device cuda", found, expected, advice)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype. `auto`: bf16 if the device has it, else fp16 on a GPU, float32 on a CPU.

    On a CPU bf16 instructions double the speed; without them bf16 would be emulated.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def free_threads(workers: int) -> int:
    """One for each core that no worker needs; at most torch's present count, at least 1.

    The threads of one step wait for each other, so a core shared with a busy process halves the
    speed of all: 38 people/s with two threads beside a busy process on two cores, 96 with one.
    """
    return max(1, min(torch.get_num_threads(), cores_per_rank() - workers))


def cores_per_rank() -> int:
    """The usable cores of this machine for each of its ranks."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def loader_workers(workers: int | Literal["auto"], device: torch.device) -> int:
    """The number of a rank's loader workers.

    auto: on a GPU all but two of the rank's cores; two feed the GPU. On a CPU a quarter of them,
    because the network takes far more time than the data. At least 1.
    """
    if workers != "auto":
        return workers
    cores = cores_per_rank()
    return max(1, cores - 2 if device.type == "cuda" else cores // 4)


class ThreadTuner:
    """Finds the faster of two thread counts: all cores, or those that loader workers leave free.

    Threads of one step wait for each other, so a core shared with a busy process slows all of them;
    but a worker that is mostly idle needs none. This is measured with the real loader.
    """

    def __init__(self, dist: DistributedContext, threads: int, workers: int):
        """Set the initial thread count. threads: 0 measures, if there is a choice."""
        self._dist = dist
        self._schedule: list[tuple[int, bool]] = []
        """For each of the next steps: thread count, and whether the step is counted."""
        self._measured: dict[int, float] = {}
        """Seconds per step by thread count, as long as the larger count is in use."""
        self._recent: list[float] = []
        if dist.device.type != "cpu":
            return
        torch.set_num_threads(threads or free_threads(workers))
        counts = [max(1, cores_per_rank() - max(1, workers)), cores_per_rank()]
        if threads or "OMP_NUM_THREADS" in os.environ or counts[0] == counts[1]:
            return
        torch.set_num_threads(counts[0])
        self._seconds: dict[int, list[float]] = {count: [] for count in counts}
        self._schedule = [(counts[0], False)] * WARM_UP_STEPS
        for count in ROUNDS * counts:
            self._schedule += [(count, step > 0) for step in range(STEPS_PER_ROUND)]

    @property
    def is_measuring(self) -> bool:
        """Whether steps run with changing thread counts."""
        return bool(self._schedule)

    def add_step(self, seconds: float) -> dict[int, float]:
        """Record a step. Returns the seconds per thread count if it is time to choose one, else {}.

        That is after the measurement, and if steps become far slower; all ranks get the same.
        """
        if not self._schedule:
            return self._check_slowdown(seconds)
        count, is_counted = self._schedule.pop(0)
        others = [s for other, times in self._seconds.items() if other != count for s in times]
        is_far_slower = bool(others) and seconds > MAX_SLOWDOWN * median(others)
        if is_counted or is_far_slower:
            self._seconds[count].append(seconds)
        if is_far_slower and self._dist.world_size == 1:
            self._schedule = []  # beside busy processes each further step could take seconds
        if self._schedule:
            torch.set_num_threads(self._schedule[0][0])
            return {}
        medians = torch.tensor([median(s) for s in self._seconds.values()], dtype=torch.float64)
        means = sum_over_ranks(medians, self._dist) / self._dist.world_size
        result = dict(zip(self._seconds, means.tolist(), strict=True))
        if self._dist.world_size == 1 and result[max(result)] < result[min(result)]:
            self._measured = result
        return result

    def _check_slowdown(self, seconds: float) -> dict[int, float]:
        """As add_step, with the last steps' seconds for the larger thread count."""
        self._recent = [*self._recent[1 - STEPS_PER_ROUND :], seconds]
        limit = MAX_SLOWDOWN * min(self._measured.values(), default=math.inf)
        if len(self._recent) < STEPS_PER_ROUND or min(self._recent) < limit:
            return {}
        result = {**self._measured, max(self._measured): median(self._recent)}
        self._measured = {}
        return result


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch on this rank. The data order and augmentation have their own generators."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))


def barrier(dist: DistributedContext) -> None:
    """Wait for the other ranks."""
    if dist.world_size > 1:
        torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor, dist: DistributedContext) -> torch.Tensor:
    """The tensor's sum over all ranks, in place."""
    if dist.world_size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def average_gradients(network: torch.nn.Module, dist: DistributedContext) -> None:
    """Average the gradients over all ranks in one message."""
    gradients = [gradient for p in network.parameters() if (gradient := p.grad) is not None]
    sizes = [gradient.numel() for gradient in gradients]
    message = gradients[0].new_empty(sum(sizes))
    parts = [
        part.as_strided(gradient.shape, gradient.stride())
        for part, gradient in zip(message.split(sizes), gradients, strict=True)
    ]
    torch._foreach_copy_(parts, gradients)
    sum_over_ranks(message, dist).div_(dist.world_size)
    torch._foreach_copy_(gradients, parts)


def max_over_ranks(number: int, dist: DistributedContext) -> int:
    """The largest number of all ranks; the same result on every rank."""
    if dist.world_size == 1:
        return number
    tensor = torch.tensor(number, device=dist.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def any_rank(flag: bool, dist: DistributedContext) -> bool:
    """Whether the flag is set on any rank; the same result on every rank."""
    return bool(max_over_ranks(int(flag), dist))


def gather(value: T, dist: DistributedContext) -> list[T]:
    """Every rank's value, ordered by rank, on every rank."""
    gathered = [value] * dist.world_size
    if dist.world_size > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def from_first_rank(function: Callable[[], Any], dist: DistributedContext) -> Any:
    """Call the function on rank 0; every rank gets its result, or raises its InputError."""
    answer: list[Any] = [None, None]
    if dist.is_first:
        try:
            answer = [function(), None]
        except InputError as error:
            answer = [None, error]
    if dist.world_size > 1:
        torch.distributed.broadcast_object_list(answer, 0)
    if answer[1]:
        raise answer[1]
    return answer[0]


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def mark_run_started() -> None:
    """Record for the ranks that torchrun starts after a failure that this run has started."""
    if store := torchrun_store():
        store.set("run_started", "")


def restarted_by_torchrun(dist: DistributedContext) -> bool:
    """Whether torchrun started the ranks again after `mark_run_started`."""
    store = torchrun_store()
    return any_rank(store is not None and store.check(["run_started"]), dist)


def report_error_once(text: str) -> bool:
    """Whether this rank is the first to report this text; the ranks count in torchrun's store."""
    store = torchrun_store()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return store is None or store.add(f"error/{start}/{digest}", 1) == 1


class SummaryErrorHandler(ErrorHandler):
    """For torch's `record`: torchrun's summary shows InputErrors without their traceback."""

    def record_exception(self, e: BaseException) -> None:
        """Write the file that torchrun reads."""
        if isinstance(e, InputError):
            e.__traceback__ = e.__cause__ = None
        super().record_exception(e)


def _store_of_this_start(store: TCPStore, rank: int, world_size: int) -> PrefixStore:
    """A part of torchrun's store in which a rank finds no addresses of ranks that have ended.

    Rank 0 names each start, and the others ask until a rank 0 that is alive answers. The restart
    count cannot be the name, because two nodes may count differently.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            asking = store.get(f"{own}/asks/{other}").decode()
            store.set(f"{own}/answer/{asking}", "")
        return PrefixStore(own, store)
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/asks/{rank}", own)
        try:
            store.wait([f"{start}/answer/{own}"], timedelta(seconds=1))
        except DistStoreError:
            continue
        return PrefixStore(start, store)


def torchrun_store() -> TCPStore | None:
    """The key-value store that torchrun serves; None without torchrun. Raises DistError.

    torchrun (2.13) keeps its store, with all keys, when it restarts the ranks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False)
