"""The training run: one object holds its state, and its loop reads from top to bottom.

A step is `optim.accumulate` batches. Every number that decides something is computed on the device
and read once every `train.log_every` steps, so that the host does not wait for the GPU in between.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import (
    DistributedContext,
    any_rank,
    barrier,
    gather_bytes,
    launched_by_torchrun,
    seed_everything,
    set_cpu_threads,
    sum_over_ranks,
)
from common.errors import InputError
from configs import schema
from configs.schema import Config
from configs.skeleton import require_same_joints
from evaluation import pckh, visualize
from evaluation.inference import StoppedError, predict_distributed
from model import checkpoint
from model.checkpoint import Checkpoint, RunState
from model.loss import stack_losses, stack_losses_of_joints
from pipelines.augment import without_augmentation
from pipelines.bad_samples import BadSamples, SkippingLoader
from pipelines.codec import codec_of
from pipelines.crop_packing import require_preset_fits
from pipelines.loader import (
    Batch,
    Loader,
    LoaderSpec,
    RawBatch,
    choose_loader,
    make_batch,
    train_loader,
)
from pipelines.shard_format import people_sha256
from pipelines.shards import ShardSet
from training import checkpoint_manager as keeping
from training import preemption as signals
from training import resuming
from training.checkpoint_manager import BEST, LAST
from training.metrics import Log, Totals
from training.nonfinite import Guard
from training.optimizer import Average, learning_rate, make_optimizer
from training.profiler import Tracer

SHEET_PEOPLE = 12
"""People in the picture of a validation."""
COLLAPSED_PEAK = 0.05
"""Mean peak of the heatmaps under which a network is taken to answer nothing but zeros."""
COLLAPSE_FROM_STEP = 1_000
"""Before it every network answers little."""


class Run:
    """A training run on one rank."""

    def __init__(
        self,
        config: Config,
        dist: DistributedContext,
        folder: Path,
        start: Checkpoint | None = None,
    ):
        """Build everything; nothing is written yet. folder: of the run.

        start: the checkpoint to continue from.
        """
        self.given, self.remarks = config, list[str]()
        if start:
            config, self.remarks = resuming.fit_to_ranks(config, start, dist.world_size)
        self.config, self.dist, self.folder = config, dist, folder
        set_cpu_threads(dist.device, config.data.workers)
        self.train_shards = ShardSet(Path(config.data.shards) / "train")
        self.valid_shards = ShardSet(Path(config.data.shards) / "valid")
        self.skeleton = self.train_shards.manifest.skeleton
        self.codec = codec_of(config.data, config.heatmaps, self.skeleton)
        preset = self.codec.preset
        still = without_augmentation(preset)
        for shards, needed in ((self.train_shards, preset), (self.valid_shards, still)):
            require_preset_fits(shards.manifest, needed, shards.folder)
        self.people_sha256 = people_sha256(self.train_shards.records())  # all of them are sound
        require_same_joints(self.valid_shards.manifest.skeleton, self.skeleton,
                            self.valid_shards.folder, self.train_shards.folder)  # fmt: skip
        self.valid_people, self.valid_samples = self.valid_shards.people()
        seed_everything(config.train.seed, 0)  # the same weights on every rank
        network = checkpoint.build_network(config, self.skeleton.joint_count).to(dist.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seed_everything(config.train.seed, dist.rank + 1)
        self.optimizer = make_optimizer(self.network, config.optim)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.step, self.best, self.seconds = 0, -1.0, 0.0
        self.saved_step = 0  # of last.pt
        self.average: Average | None = None
        self.loader_began, self.validation_due = 0, False
        loader_state = self._restore(start) if start else b""
        if config.optim.ema_decay and self.average is None:
            self.average = Average(self.network, config.optim.ema_decay)
        self.loader = self._make_loader(loader_state)
        self.forward = self._wrap()
        self.fused_losses = (
            torch.compile(stack_losses_of_joints) if config.train.fuse_targets else None
        )
        self.interrupted, self.unsaved, self.parent = False, "", os.getppid()
        self.noted: list[int] = []
        self.guard = Guard(self.network, self.train_shards, folder, config.train.max_bad_steps)

    def restart_average(self) -> None:
        """Begin the averaged weights anew from the network's, after these were changed."""
        if self.average:
            self.average = Average(self.network, self.config.optim.ema_decay)

    def train(self) -> dict[str, Any]:
        """Train to the last step, the time limit or a signal, and write what came of it.

        Returns the numbers of the last validation. A signal (training/preemption.py) lets the step
        or the batch of a validation end and writes last.pt; `interrupted` is set then. Raises
        InputError if the end of the run could not be written.
        """
        train, dist, started = self.config.train, self.dist, time.perf_counter()
        spent_before = self.seconds
        result: dict[str, Any] = {}
        totals, timed_out = Totals(dist.device), False
        # The live line is closed before an error is told.
        with (
            signals.noted() as self.noted,
            closing(self._open_log()) as self.log,
            Tracer(self.folder, self._steps_to_trace(), dist.device, self.log.say) as tracer,
        ):
            self.interrupted = any_rank(self._is_asked_to_stop(), dist)
            if self.interrupted:  # by a signal that came while the program started
                self.save([LAST])
            elif self.validation_due:
                result = self._finish_epoch()
            while self.step < train.steps and not (self.interrupted or timed_out):
                self.network.train()
                self._train_step(totals)
                self.step += 1
                self.log.advance()
                tracer.advance()
                seconds = time.perf_counter() - started
                self.seconds = spent_before + seconds
                at_epoch = self.step % train.steps_per_epoch == 0 or self.step == train.steps
                at_line = self.step % train.log_every == 0
                # Ranks on GPUs meet here at a line alone, for to meet is to wait for the GPU.
                if at_epoch or at_line or dist.world_size == 1 or dist.device.type == "cpu":
                    self.interrupted = any_rank(self._is_asked_to_stop(), dist)
                if not (at_epoch or at_line or self.interrupted):
                    continue
                self._report(totals)
                timed_out = any_rank(self._is_late(seconds), dist)
                self.validation_due = at_epoch or timed_out
                if self.interrupted:  # there may be seconds left: no time to validate
                    self.save([LAST])
                elif self.validation_due:
                    self.save([LAST])  # whatever may happen in a validation
                    result = self._finish_epoch()
                totals = Totals(dist.device)
            self._say_why_it_ended()
        if self.unsaved and not self.interrupted:
            raise InputError(self.folder, self.unsaved, "room for a checkpoint", "--resume then")
        return result

    def _open_log(self) -> Log:
        """Make the folder, with the settings in it, and the log; say what _restore found."""
        if self.dist.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            schema.save_yaml(self.given, self.folder / "config.yaml")
            self.guard.begin(self.step)
            keeping.take_back(self.folder)
        self.guard.remember(self.average)
        log = Log(self.folder, self.config, self.dist, self.step, self.skeleton.metric)
        for remark in self.remarks:
            log.say(remark)
        return log

    def _steps_to_trace(self) -> int:
        return self.config.train.profile_steps if self.dist.is_first else 0

    def _is_late(self, seconds: float) -> bool:
        limit = 60 * self.config.train.max_minutes
        return bool(limit) and seconds >= limit

    def _is_asked_to_stop(self) -> bool:
        return bool(self.noted) or self._torchrun_has_ended()

    def _torchrun_has_ended(self) -> bool:
        return launched_by_torchrun() and os.getppid() != self.parent

    def _say_why_it_ended(self) -> None:
        """Of a run that ended early; after a signal the marker for job scripts says it too."""
        train = self.config.train
        if self.step == train.steps and not self.interrupted:
            return
        why = f"train.max_minutes {train.max_minutes} is over"
        if self.interrupted:
            other = "torchrun is gone, or a signal reached another rank"
            why = signal.Signals(self.noted[0]).name if self.noted else other
        text = f"STOPPED EARLY at step {self.step} of {train.steps}: {why}. "
        self.log.say(text + "--resume, without a path, continues.")
        if self.interrupted and self.dist.is_first:
            try:
                keeping.ask_to_resume(self.folder, text.strip())
            except OSError as error:
                self.log.say(f"{self.folder / keeping.RESUME_ME} cannot be written: {error}")

    def _train_step(self, totals: Totals) -> None:
        """One step of the optimizer, skipped on the device if a gradient is not finite."""
        optim = self.config.optim
        rate = learning_rate(optim, self.step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in range(optim.accumulate):
            before = time.perf_counter()
            raw = self.loader.next()
            totals.waited += time.perf_counter() - before
            batch = make_batch(
                raw, self.codec, self.dist.device, render=not self.config.train.fuse_targets
            )
            self._backward(batch, totals, last=part == optim.accumulate - 1)
        totals.add_step(self._apply_gradients(totals.losses_were_finite(optim.accumulate)))
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.step)

    def _backward(self, batch: Batch, totals: Totals, last: bool) -> None:
        dist, optim = self.dist, self.config.optim
        if isinstance(self.forward, DistributedDataParallel):
            self.forward.require_backward_grad_sync = last
        with torch.autocast(dist.device.type, dist.dtype, enabled=dist.dtype != torch.float32):
            heat = self.forward(batch.images_N3HW)
        losses = self._losses(heat, batch)
        self.scaler.scale(losses.mean() / optim.accumulate).backward()
        totals.add(losses, heat[:, -1], batch, self.codec.rule)

    def _losses(self, heat_NSJHW: Tensor, batch: Batch) -> Tensor:
        unmarked = self.config.loss.unmarked
        if self.fused_losses:
            return self.fused_losses(
                heat_NSJHW, batch.joints_NJ2, batch.drawn_NJ, self.codec.rule, self.codec.sigma,
                unmarked,
            )  # fmt: skip
        return stack_losses(heat_NSJHW, batch.heat_NJHW, batch.drawn_NJ, unmarked)

    def _apply_gradients(self, losses_are_finite: Tensor) -> Tensor:
        """Clip and step. Returns whether the step was skipped because a gradient is not finite.

        Ranks agree, because gradients are reduced. With fp16 a skipped step after finite losses is
        the scaler's way to find its scale, and counts as bad only if the scale has no room left.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.network.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~torch.isfinite(norm)
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            lost = sum_over_ranks((~losses_are_finite).float(), self.dist) > 0
            return bad & (lost | (self.scaler._scale < 1))  # type: ignore[operator]
        if isinstance(self.optimizer, torch.optim.Adam):
            # The fused kernel leaves weights and moments alone if this is 1, without a host sync.
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        return bad

    def _report(self, totals: Totals) -> None:
        """Read the sums, log them, and act on what is not finite."""
        dist = self.dist
        numbers = torch.cat([totals.sums, totals.good_batches[None], totals.bad_steps[None]])
        *sums, good, bad = sum_over_ranks(numbers, dist).tolist()
        seconds = time.perf_counter() - totals.started
        means = [total / good if good else math.nan for total in sums]
        values = dict(zip(Totals.NAMES, means, strict=True))
        bad_steps = math.ceil(bad / dist.world_size)
        values |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "people_per_s": totals.batches
            * self.config.data.batch_size
            * dist.world_size
            / seconds,
            "wait_share": totals.waited / seconds,
            "bad_steps": float(bad_steps),
            "epoch": self.step / self.config.train.steps_per_epoch,
        }
        self.log.train(self.step, values)
        self.guard.check(self.step, bad_steps, totals, self.average, self.log, dist)
        if self.config.data.on_bad_sample == "skip":
            reports = gather_bytes(self.bad_samples.report(), dist)
            for line in self.bad_samples.learn(reports):
                self.log.say(f"step {self.step}: {line}")

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate, say how it went, and write the checkpoints.

        If a signal comes, the checkpoint from before the validation stays as it is.
        """
        people = self.config.eval.people or self.valid_people.count
        try:
            result = self.validate(lambda batches: self.log.validating(batches, people))
        except StoppedError:
            self.interrupted = True
            return {}
        pooled = result["pckh"]["0.5"]["pooled"] or 0.0
        is_best = pooled > self.best
        self.best = max(self.best, pooled)
        numbers = {"pckh@0.5_pooled": pooled,
                   "pckh@0.1_pooled": result["pckh"]["0.1"]["pooled"] or 0.0,
                   "auc": result["auc"] or 0.0, "peak": result["peak"]}  # fmt: skip
        self.log.validation(self.step, numbers)
        self.log.say(
            f"step {self.step}: {self.skeleton.metric}@0.5 {100 * pooled:.2f} % pooled over "
            f"{result['joints_counted']} joints of {result['people']} people"
            f"{' (best so far)' if is_best else ''}"
        )
        if not result["peak"] >= COLLAPSED_PEAK and self.step >= COLLAPSE_FROM_STEP:
            self.log.say(
                f"step {self.step}: the heatmaps peak at {result['peak']:.3f} on average, so the "
                "network answers almost nothing but zeros. If this stays, lower optim.lr or raise "
                "heatmaps.sigma."
            )
        self.validation_due = False
        self.save([LAST, BEST] if is_best else [LAST])
        if self.dist.is_first:
            self.log.pictures(self.step, self._sheet())
        return result

    def validate(
        self, progress: Callable[[Iterable[RawBatch]], Iterable[RawBatch]] = iter
    ) -> dict[str, Any]:
        """PCKh of the averaged weights, or of the network where there are none, over all ranks.

        Raises StoppedError between two batches if a signal comes.
        """
        chosen = np.arange(self.valid_people.count)[: self.config.eval.people or None]
        found = predict_distributed(
            self._evaluated_network(), self.valid_shards, self.valid_samples[chosen], self.codec,
            self.dist, batch_size=self.config.eval.batch_size, workers=self.config.data.workers,
            flip=self.config.eval.flip, progress=progress, should_stop=self._is_asked_to_stop,
        )  # fmt: skip
        self.predicted_NJ2 = found.keypoints_NJ2
        people = self.valid_people.select(chosen)
        result = pckh.summary(found.keypoints_NJ2, people, self.skeleton)
        return {**result, "peak": float(found.scores_NJ.mean())}

    def _sheet(self) -> npt.NDArray[np.uint8]:
        """A picture of a few people as validated last, the same people each time."""
        rows = np.unique(np.linspace(0, len(self.predicted_NJ2) - 1, SHEET_PEOPLE).astype(int))
        return visualize.draw_people(
            self.valid_shards, self.valid_samples[rows], self.valid_people.select(rows),
            self.predicted_NJ2[rows], self.skeleton,
        )  # fmt: skip

    def _evaluated_network(self) -> nn.Module:
        """A network in eval mode with the weights to judge; the same on every rank."""
        network = checkpoint.build_network(self.config, self.skeleton.joint_count)
        weights = self.average.tensors if self.average else self.network.state_dict()
        if self.dist.world_size > 1:
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            for tensor in weights.values():
                torch.distributed.broadcast(tensor, 0)
        network.load_state_dict(weights)
        network.to(self.dist.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.eval()

    def save(self, names: list[str]) -> None:
        """Write a checkpoint under each name, on the first rank; the others give their states.

        A write that fails leaves the older ones whole, and the run goes on.
        """
        rng = gather_bytes(torch.get_rng_state().numpy().tobytes(), self.dist)
        loaders = gather_bytes(self.loader.state(), self.dist)
        if self.dist.is_first:
            try:
                made = self._checkpoint(rng, loaders)
                keeping.save(self.folder, made, names, self.config.train.keep_last)
                self.unsaved, self.saved_step = "", self.step
            except OSError as error:
                before, self.unsaved = (
                    self.unsaved,
                    (f"no checkpoint of step {self.step} could be written: {error}"),
                )
                if self.unsaved != before:
                    self.log.say(f"WARNING: {self.unsaved}; training goes on")
        barrier(self.dist)

    def _checkpoint(self, rng: list[bytes], loaders: list[bytes]) -> Checkpoint:
        """Everything that continues the run. rng, loaders: the states of each rank."""
        run = RunState(
            scaler=self.scaler.state_dict(),
            best=self.best,
            seconds=self.seconds,
            validation_due=self.validation_due,
            people=len(self.train_shards),
            people_sha256=self.people_sha256,
            ranks=self.dist.world_size,
            people_a_step=resuming.people_a_step(self.config, self.dist.world_size),
            loader=self._loader_name(),
            loader_device=self.dist.device.type,
            loader_began=self.loader_began,
            rng=[_as_tensor(data) for data in rng],
            loader_states=[_as_tensor(data) for data in loaders],
        )
        return Checkpoint(
            path=self.folder / LAST,
            config=self.given,
            skeleton=self.skeleton,
            step=self.step,
            weights=self.network.state_dict(),
            averaged=self.average.tensors if self.average else {},
            optimizer=self.optimizer.state_dict(),
            run=run,
        )

    def _restore(self, start: Checkpoint) -> bytes:
        """Continue from a checkpoint. Returns the state of this rank's loader, if it has one."""
        source, run = start.path, start.run
        require_same_joints(start.skeleton, self.skeleton, source, self.train_shards.folder)
        checkpoint.require_same_size(start, self.config)
        if run and run.people_sha256 not in (None, self.people_sha256):
            raise InputError(
                self.train_shards.folder,
                f"{len(self.train_shards):,} people, not the {run.people:,} of {source}",
                "the people that the run was begun with, in their order",
                f"give their shards (--data.shards), or begin a new run with --init_from {source}",
            )
        checkpoint.load_weights(self.network, start.weights, source)
        if start.step > self.config.train.steps:
            raise InputError(
                f"train.steps {self.config.train.steps}",
                f"{start.step} steps that {source} has done already",
                "the number of steps in all, those included",
                f"--train.steps {start.step + self.config.train.steps} for as many more",
            )
        if start.optimizer:
            self._restore_optimizer(start.optimizer, source)
        self.step = start.step
        if start.averaged and self.config.optim.ema_decay:
            checkpoint.require_fit(self.network, start.averaged, source)
            self.average = Average(self.network, self.config.optim.ema_decay)
            for name, tensor in start.averaged.items():
                self.average.tensors[name].copy_(tensor)
        if source.resolve().parent == self.folder.resolve():
            self.best = run.best if run else -1.0  # of this folder's best.pt
            self.saved_step = self.step
        if not run:
            self.remarks += checkpoint.foreign_remarks(start, self.config)
            return b""
        self.seconds, self.validation_due = run.seconds, run.validation_due
        if run.scaler:
            self.scaler.load_state_dict(run.scaler)
        if run.ranks == self.dist.world_size:
            torch.set_rng_state(run.rng[self.dist.rank])
        return self._loader_state(run)

    def _restore_optimizer(self, saved: dict[str, Any], path: Path) -> None:
        """Take over the optimizer's moments. Raises InputError if they are another optimizer's."""
        kinds = ["exp_avg", "exp_avg_sq"] if self.config.optim.name == "adam" else ["square_avg"]
        if any(kinds[0] not in moments for moments in saved["state"].values()):
            raise InputError(
                path,
                "the state of another optimizer",
                f"that of optim.name: {self.config.optim.name}",
                "resume with the settings of the run, or begin a new one with --init_from",
            )
        # All else of the optimizer is the config's to say.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved["state"]})
        # Fused Adam goes through memory as it lies, and other code's moments are not channels-last.
        for parameter, moments in self.optimizer.state.items():
            for name in kinds:
                moments[name] = torch.empty_like(parameter).copy_(moments[name])

    def _loader_state(self, run: RunState) -> bytes:
        """DALI's state, if as many ranks were loaded by it before; else its order begins anew."""
        loader, before = self._loader_name(), run.loader
        device = self.dist.device.type
        if loader != before:
            self.remarks.append(
                f"the loader was {before} and is {loader}: the order of people is another"
            )
        elif loader == "dali" and run.loader_device not in (None, device):
            self.remarks.append("DALI runs on another kind of device: it begins a new pass")
        elif run.ranks != self.dist.world_size:
            self.remarks.append(
                "people follow each other as before"
                if loader == "opencv"
                else "DALI begins a new pass over the people, with new draws"
            )
        else:
            self.loader_began = run.loader_began
            return bytes(run.loader_states[self.dist.rank].numpy())
        self.loader_began = self.step if loader == "dali" else 0
        return b""

    def _loader_name(self) -> str:
        return choose_loader(self.config.data.loader, self.dist.device)

    def _make_loader(self, loader_state: bytes) -> Loader:
        data, seed = self.config.data, self.config.train.seed
        if self.loader_began:  # not what the run began with once more
            seed = int(np.random.SeedSequence([seed, self.loader_began]).generate_state(1)[0] >> 1)

        spec = LoaderSpec(
            loader=data.loader,
            device=self.dist.device,
            preset=self.codec.preset,
            input_px=data.input_px,
            batch_size=data.batch_size,
            workers=data.workers,
            shuffle_buffer=data.shuffle_buffer,
            seed=seed,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
            cache_mb=data.cache_mb,
        )

        def make(shards: ShardSet, first_batch: int, state: bytes) -> Loader:
            return train_loader(shards, spec, first_batch, state)

        first_batch = self.step * self.config.optim.accumulate
        if data.on_bad_sample == "stop":
            return make(self.train_shards, first_batch, loader_state)
        limit, rank = data.max_bad_samples, self.dist.rank
        self.bad_samples = BadSamples(self.train_shards, self.folder, limit, rank)
        return SkippingLoader(make, self.bad_samples, first_batch, loader_state)

    def _wrap(self) -> nn.Module:
        """The network as the step calls it: over all ranks, and compiled if asked."""
        forward: nn.Module = self.network
        if self.dist.world_size > 1:
            ids = [self.dist.device.index] if self.dist.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, ids, gradient_as_bucket_view=True)
        if self.config.train.compile:
            forward.compile()
        return forward


def _as_tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor, which a checkpoint may hold."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()
