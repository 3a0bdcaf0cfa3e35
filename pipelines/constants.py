"""Numbers that every step needs on its device: copied once, for a copy makes the host wait."""

import functools

import torch


@functools.lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(len(values),) tensor of them. It is shared: never write into it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
