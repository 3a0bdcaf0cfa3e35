"""The optimizer, its learning rate, and the averaged weights."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from common.errors import InputError
from configs.schema import OptimConfig

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}
"""What each optimizer keeps for a parameter, in the parameter's shape."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0) in a run of so many steps."""
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    if optim.schedule == "step":
        return optim.lr * warmup * optim.gamma ** sum(step >= m for m in optim.milestones)
    if optim.schedule == "cosine":
        progress = min(1.0, max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
        share = 0.5 * (1 + math.cos(math.pi * progress))
        return optim.lr * warmup * (optim.final_fraction + (1 - optim.final_fraction) * share)
    return optim.lr * warmup


def make_optimizer(network: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Fused Adam, or RMSprop with the settings of the Torch7 code (alpha 0.99)."""
    if optim.name == "adam":
        return torch.optim.Adam(
            network.parameters(), optim.lr, weight_decay=optim.weight_decay, fused=True
        )
    return torch.optim.RMSprop(
        network.parameters(), optim.lr, alpha=0.99, weight_decay=optim.weight_decay, foreach=True
    )


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], name: str, path: Path
) -> None:
    """Restore the moments; all other settings stay the config's. Raises InputError.

    saved: an optimizer's state_dict, from the checkpoint `path`. name: optim.name.
    """
    if any(MOMENTS[name][0] not in moments for moments in saved["state"].values()):
        raise InputError(
            path,
            "the state of another optimizer",
            f"that of optim.name: {name}",
            "resume with the settings of the run, or begin a new one with --init_from",
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    # Fused Adam reads memory in storage order, and other code's moments are not channels-last.
    for parameter, moments in optimizer.state.items():
        for moment in MOMENTS[name]:
            moments[moment] = torch.empty_like(parameter).copy_(moments[moment])


class AveragedModel(swa_utils.AveragedModel):
    """Exponential moving average of a network's weights and batch-norm statistics."""

    def __init__(self, network: nn.Module, decay: float):
        """decay: per step; smaller in the first steps, so that the initial weights fade out."""
        super().__init__(network)
        self.decay = decay
        # References to the tensors that both networks change in place.
        averaged, current = self.module.state_dict(), network.state_dict()
        floats = [name for name, tensor in current.items() if tensor.is_floating_point()]
        counts = [name for name in current if name not in floats]
        self._averaged = [averaged[n] for n in floats], [current[n] for n in floats]
        self._copied = [averaged[n] for n in counts], [current[n] for n in counts]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after a step, counted from 0; counters are copied.

        torch's update_parameters reads its own counter, for which it waits for the GPU.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, weight)
        torch._foreach_copy_(*self._copied)
