"""The optimizer, its learning rate, averaged weights, and one step, without a host sync."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

from common.distributed import DistributedContext, average_gradients, sum_over_ranks
from common.errors import InputError
from configs.schema import Config, OptimConfig
from model.checkpoint import Checkpoint, load_weights, require_fit
from model.hourglass import compile_residuals, fuse_network, kernel_obstacles
from model.loss import stack_losses
from pipelines.codec import Codec
from pipelines.loader import Batch, Loader, make_batch
from pipelines.opencv_loader import RawBatch
from training.gradient_check import check_gradients
from training.metrics import Totals
from training.step_graph import StepGraph, empty_batch, graph_obstacles

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",)}
"""State of each optimizer for a parameter, in the parameter's shape."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0) in a run of `steps` steps."""
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
    """Restore the moments; all other settings come from the config. Raises InputError.

    saved: an optimizer's state_dict, from the checkpoint `path`. name: optim.name.
    """
    if any(MOMENTS[name][0] not in moments for moments in saved["state"].values()):
        found, advice = "another optimizer's state", "set optim.name as it was, or use --init_from"
        raise InputError(path, found, f"that of optim.name: {name}", advice)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    # Fused Adam reads memory in storage order, and other code's moments are not channels-last.
    for parameter, moments in optimizer.state.items():
        for moment in MOMENTS[name]:
            moments[moment] = torch.empty_like(parameter).copy_(moments[moment])


def choose_fast_step(
    network: nn.Module, config: Config, dist: DistributedContext
) -> tuple[bool, bool]:
    """Whether to use train.cuda_graph and train.fused_kernels. Raises InputError.

    "auto": on one GPU, where they work; kernels only in a graph, because their launches take the
    host longer.
    """
    train = config.train
    expected = {
        "cuda_graph": "a GPU, bf16 or fp32, Adam, one batch a step, no verification",
        "fused_kernels": "a GPU with the shared memory of an H100, bf16 or fp16, at most 256 "
        "channels, Triton and a C compiler with Python.h",
    }
    obstacles = {
        "cuda_graph": graph_obstacles(config, dist),
        "fused_kernels": kernel_obstacles(network, dist.device, dist.dtype),
    }
    for name, found in obstacles.items():
        if getattr(train, name) is True and found:
            where, advice = f"train.{name}: true", "set it to auto"
            raise InputError(where, ", ".join(found), expected[name], advice)
    is_tried = dist.world_size == 1 and not obstacles["cuda_graph"]
    graph = train.cuda_graph is True or (train.cuda_graph == "auto" and is_tried)
    works = graph and not train.compile and not obstacles["fused_kernels"]
    return graph, train.fused_kernels is True or (train.fused_kernels == "auto" and works)


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

        torch's update_parameters reads a counter from the GPU, which synchronises.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, weight)
        torch._foreach_copy_(*self._copied)


class TrainStep:
    """The network, its optimizer and averaged weights, and one training step of them."""

    def __init__(self, network: nn.Module, codec: Codec, config: Config, dist: DistributedContext):
        """network: on the device, with the same weights on every rank."""
        self.network, self.codec, self.config, self.dist = network, codec, config, dist
        optim = config.optim
        self.optimizer = make_optimizer(network, optim)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.averaged = AveragedModel(network, optim.ema_decay) if optim.ema_decay else None
        self.uses_graph, self.uses_kernels = choose_fast_step(network, config, dist)
        self.forward = network
        """The network, in DDP if there are several ranks and no graph."""
        if dist.world_size > 1 and not self.uses_graph:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            self.forward = DistributedDataParallel(network, ids, gradient_as_bucket_view=True)
        if self.uses_kernels:
            fuse_network(network)
        if config.train.compile:
            compile_residuals(network)
        torch.backends.cudnn.benchmark = True  # cuDNN times its algorithms
        self._graph: StepGraph | None = None

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer, averaged weights and scaler. Raises InputError."""
        load_weights(self.network, checkpoint.weights, checkpoint.path)
        if checkpoint.optimizer:
            name = self.config.optim.name
            load_optimizer_state(self.optimizer, checkpoint.optimizer, name, checkpoint.path)
        if checkpoint.averaged:
            require_fit(self.network, checkpoint.averaged, checkpoint.path)
        self.load_averaged(checkpoint.averaged or checkpoint.weights)
        if checkpoint.run and checkpoint.run.scaler:
            self.scaler.load_state_dict(checkpoint.run.scaler)

    def load_averaged(self, weights: dict[str, Tensor]) -> None:
        """Set the averaged weights, if the config asks for them."""
        if self.averaged:
            self.averaged.module.load_state_dict(weights)

    @property
    def averaged_weights(self) -> dict[str, Tensor]:
        """By the network's names; empty if the config asks for none."""
        return self.averaged.module.state_dict() if self.averaged else {}

    def run(self, loader: Loader, step: int, totals: Totals) -> None:
        """Do a step, counted from 0. It is skipped on the device if a gradient is not finite."""
        train, optim = self.config.train, self.config.optim
        rate = learning_rate(optim, step, train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.uses_graph:
            self._graph = self._graph or self._record()  # before the loader uses the GPU
            self._graph.run(_next_batch(loader, totals), rate, totals)
        else:
            raws = (_next_batch(loader, totals) for _ in range(optim.accumulate))
            is_checked = train.verify_every > 0 and step % train.verify_every == 0
            self._step(raws, totals, step if is_checked else None)
        if self.averaged:
            self.averaged.update(step)

    def _record(self) -> StepGraph:
        joints, device = self.codec.skeleton.joint_count, self.dist.device
        buffers = empty_batch(self.config, joints, device)
        return StepGraph(
            lambda raw, totals: self._step([raw], totals), self.network, self.optimizer, buffers
        )

    def _step(
        self, raws: Iterable[RawBatch], totals: Totals, checked_step: int | None = None
    ) -> None:
        """Forward, backward and update. checked_step: the step's number if it is verified."""
        accumulate, batches = self.config.optim.accumulate, list[Batch]()
        for part, raw in enumerate(raws):
            batch = make_batch(raw, self.codec, self.dist.device)
            if checked_step is not None:
                batches.append(batch)
            reduce = part == accumulate - 1 and checked_step is None
            losses_S, heat_NSJHW = self._backward(batch, reduce)
            totals.add(losses_S, heat_NSJHW[:, -1], batch, self.codec)
        if checked_step is not None:
            self._check_gradients(batches, checked_step)
        if self.dist.world_size > 1 and (self.uses_graph or checked_step is not None):
            average_gradients(self.network, self.dist)  # DDP did not
        losses_are_finite = torch.stack(totals.finite[-accumulate:]).all()
        totals.skipped.append(self._apply_gradients(losses_are_finite))
        self.optimizer.zero_grad(set_to_none=True)

    def _check_gradients(self, batches: list[Batch], step: int) -> None:
        """Check this rank's own gradients. Raises InputError."""

        def backward() -> None:
            for batch in batches:
                self._backward(batch, reduce=False)

        check_gradients(self.network, backward, step, self.dist)

    def _backward(self, batch: Batch, reduce: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward pass. Returns losses (S,) and heatmaps (N, S, J, H, W).

        reduce: average the gradients over ranks, as in the last batch of a step.
        """
        dist = self.dist
        if isinstance(self.forward, DistributedDataParallel):
            self.forward.require_backward_grad_sync = reduce
        with torch.autocast(dist.device.type, dist.dtype, enabled=dist.dtype != torch.float32):
            heat_NSJHW = self.forward(batch.images_N3HW)
        losses_S = self._losses(heat_NSJHW, batch)
        self.scaler.scale(losses_S.mean() / self.config.optim.accumulate).backward()
        return losses_S.detach(), heat_NSJHW.detach()

    def _losses(self, heat_NSJHW: Tensor, batch: Batch) -> Tensor:
        unmarked = self.codec.skeleton.unmarked or self.config.loss.unmarked
        counts_NJ = ~batch.ignored_NJ if unmarked == "empty" else batch.has_target_NJ
        return stack_losses(heat_NSJHW, batch.heat_NJHW, counts_NJ, self.config.loss.foreground)

    def _apply_gradients(self, losses_are_finite: Tensor) -> Tensor:
        """Clip and update. Returns whether the step was skipped because of non-finite gradients.

        Ranks agree, because gradients are reduced. With fp16 the scaler skips steps to find its
        scale; these count as bad only if a loss was not finite or the scale is below 1.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~torch.isfinite(norm)
        if self.config.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            lost = sum_over_ranks((~losses_are_finite).float(), self.dist) > 0
            scale = self.scaler._scale
            assert scale is not None
            return bad & (lost | (scale < 1))
        if isinstance(self.optimizer, torch.optim.Adam):
            # If this is 1, the fused kernel keeps weights and moments, without a host sync.
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        return bad


def _next_batch(loader: Loader, totals: Totals) -> RawBatch:
    with totals.waiting():
        return loader.next()
