"""Where and how a process computes: its rank, device, precision and seed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common import torchrun
from common.errors import InputError
from common.system import keep_freed_memory, usable_cores


class Runtime(NamedTuple):
    """One process of a run."""

    rank: int
    """Among all processes; decides the share of the data."""
    ranks: int
    device: torch.device
    dtype: torch.dtype
    """Of autocast; float32 switches it off."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def start(
    device: Literal["auto", "cuda", "cpu"], precision: Literal["auto", "bf16", "fp16", "fp32"]
) -> Runtime:
    """Find the device and join the other ranks, if torchrun started several. Raises InputError.

    The device is the local rank's GPU; ranks meet over nccl on GPUs and over gloo on CPUs.
    """
    keep_freed_memory()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ["RANK"]) if ranks > 1 else 0
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=torchrun.store_of_this_start(rank, ranks),
            rank=rank,
            world_size=ranks,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Runtime(rank, ranks, chosen, choose_dtype(precision, chosen))


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device of a name; `auto` is a GPU where there is one. Raises InputError."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if not found:
        raise InputError(
            "train.device or --device: cuda",
            "no CUDA device that torch can use",
            "an NVIDIA GPU, its driver, and a CUDA build of torch",
            "look at nvidia-smi, or take cpu",
        )
    if local_rank >= found:
        raise InputError(
            f"local rank {local_rank}",
            f"{found} CUDA device(s)",
            "a GPU for each process of this machine",
            "start fewer processes (torchrun --nproc-per-node), or set train.device to cpu",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of autocast. `auto`: bf16 where the device computes in it, else fp16 on a GPU.

    On a CPU with bf16 instructions it doubles the speed; without them it would be emulated, so that
    float32 is taken.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def leave_cores_to_workers(device: torch.device, workers: int) -> None:
    """On a CPU, compute with as many threads as there are cores beside the worker processes.

    Threads of one step wait for each other, so that a core shared with another process halves the
    speed of all: 38 people/s with two threads beside a busy process on two cores, 96 with one.
    Threads that have nothing to do spin: a loader's batches cost 1.4 ms a person more with two.
    """
    if device.type == "cpu":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = usable_cores() // local_ranks - workers
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch's generators of this rank. Draws and order of the data have seeds of their own."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether the ranks could not meet, because one is gone. It has said why, if it could."""
    from_gloo = "gloo" in str(error).lower()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, dist.DistError) or from_gloo)


def barrier(runtime: Runtime) -> None:
    """Wait for the other ranks."""
    if runtime.ranks > 1:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """The tensor's sum over all ranks, in place."""
    if runtime.ranks > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, runtime: Runtime) -> bool:
    """Whether the flag is set on some rank; the same answer everywhere."""
    if runtime.ranks == 1:
        return flag
    count = torch.tensor(float(flag), device=runtime.device)
    return bool(sum_over_ranks(count, runtime).item() > 0)


def gather_bytes(data: bytes, runtime: Runtime) -> list[bytes]:
    """Every rank's bytes, in the order of the ranks, on every rank."""
    if runtime.ranks == 1:
        return [data]
    lengths = _gather(torch.tensor([len(data)], device=runtime.device), runtime)
    longest = int(torch.cat(lengths).max())
    padded = np.frombuffer(data.ljust(longest, b"\0"), dtype=np.uint8).copy()
    parts = _gather(torch.from_numpy(padded).to(runtime.device), runtime) if longest else lengths
    return [
        part.cpu().numpy().tobytes()[: int(length)]
        for part, length in zip(parts, lengths, strict=True)
    ]


def _gather(tensor: torch.Tensor, runtime: Runtime) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(runtime.ranks)]
    dist.all_gather(gathered, tensor)
    return gathered


def decided_by_first(decide: Callable[[], Any], runtime: Runtime) -> Any:
    """What the first rank decides, on every rank; plain values. Its InputError is raised on all."""
    answer: dict[str, Any] = {}
    if runtime.is_first:
        try:
            answer = {"value": decide()}
        except InputError as error:
            answer = {"error": error.args}
    answer = json.loads(gather_bytes(json.dumps(answer).encode(), runtime)[0])
    if "error" in answer:
        raise InputError(*answer["error"])
    return answer["value"]
