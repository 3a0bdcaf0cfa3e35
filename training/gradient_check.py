"""Finds silent corruption: computes a step's gradients twice and compares them."""

import socket
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.distributed import DistributedContext
from common.errors import InputError

TOLERANCE = 0.01
"""Allowed difference, as a share of a tensor's largest gradient. GPU kernels sum in a varying
order, and bf16 has 8 significant bits."""


def check_gradients(
    network: nn.Module, backward: Callable[[], None], step: int, dist: DistributedContext
) -> None:
    """Compute the gradients again and compare them. Gradients and buffers are restored.

    backward: adds the gradients of step `step` to the network's parameters. Raises InputError if a
    tensor differs by more than TOLERANCE, or if other values are finite.
    """
    named = {name: p for name, p in network.named_parameters() if p.grad is not None}
    first = {name: p.grad for name, p in named.items()}
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    for parameter in named.values():
        parameter.grad = None
    backward()
    differs = {name: _differs(first[name], p.grad) for name, p in named.items()}
    for name, parameter in named.items():
        parameter.grad = first[name]
    for buffer, before in buffers.items():
        buffer.copy_(before)
    different = torch.stack(list(differs.values())).tolist()
    names = [name for name, is_different in zip(differs, different, strict=True) if is_different]
    if names:
        where = f"rank {dist.rank} on {socket.gethostname()} ({dist.device}), step {step + 1}"
        found = f"a second computation differs in {len(names)} tensor(s), first {names[0]}"
        expected = f"the same within {TOLERANCE:g} x the tensor's largest value"
        raise InputError(where, found, expected, "check the GPU and its memory, then --resume")


def _differs(first: Tensor | None, second: Tensor | None) -> Tensor:
    assert first is not None and second is not None
    is_finite = torch.isfinite(first)
    largest = first.abs().max()
    return ((first - second).abs().max() > TOLERANCE * largest) | (
        is_finite != torch.isfinite(second)
    ).any()
