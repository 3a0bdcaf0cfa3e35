"""The optimizer, its learning rate, and the averaged weights."""

import math

import torch
from torch import nn

from configs.schema import OptimConfig


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
    """Adam in its fused form, or RMSprop with the settings of the Torch7 code (alpha 0.99)."""
    if optim.name == "adam":
        return torch.optim.Adam(
            network.parameters(), optim.lr, weight_decay=optim.weight_decay, fused=True
        )
    return torch.optim.RMSprop(
        network.parameters(), optim.lr, alpha=0.99, weight_decay=optim.weight_decay, foreach=True
    )


class Average:
    """Exponential moving average of a network's weights and batch-norm statistics."""

    def __init__(self, network: nn.Module, decay: float):
        """decay: per step, approached from below so that the first steps do not weigh for long."""
        self.decay = decay
        now = network.state_dict()  # the very tensors, which a step changes in place
        self.tensors = {name: t.detach().clone() for name, t in now.items()}
        floats = [name for name, t in now.items() if t.is_floating_point()]
        counts = [name for name in now if name not in floats]
        self._averaged = [self.tensors[n] for n in floats], [now[n] for n in floats]
        self._copied = [self.tensors[n] for n in counts], [now[n] for n in counts]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, weight)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
