"""The training run, composed of parts that keep their own state.

A step is `optim.accumulate` batches. Results are computed on the device and read once every
`train.log_every` steps, so that the host does not wait for the GPU in between.
"""

import copy
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.distributed import (
    DistributedContext,
    ThreadTuner,
    any_rank,
    barrier,
    from_first_rank,
    gather,
    launched_by_torchrun,
    loader_workers,
    max_over_ranks,
    seed_everything,
    sum_over_ranks,
)
from common.errors import InputError
from common.files import write_atomic
from configs.schema import Config, save_yaml
from configs.skeleton import require_same_joints
from model.checkpoint import (
    Checkpoint,
    RunState,
    build_network,
    foreign_remarks,
    init_weights,
    require_same_size,
)
from pipelines.annotations import scored_text
from pipelines.augment import preset_of, without_augmentation
from pipelines.bad_samples import BadSamples, SkippingLoader
from pipelines.codec import codec_of
from pipelines.crop_packing import require_preset_fits
from pipelines.joined_shards import JoinedShards, union_skeleton
from pipelines.loader import Loader, LoaderSpec, RawBatch, TrainLoader, choose_loader
from pipelines.shard_cache import local_folder
from pipelines.shard_format import people_sha256
from pipelines.shards import ShardSet
from training.checkpoint_manager import BEST, LAST, RESUME_ME, CheckpointManager
from training.learning_check import LearningCheck
from training.metrics import MetricsLogger, TimeShares, Totals, keep_lines_until, logged_pck
from training.nonfinite import SKIPPED, NonFiniteMonitor
from training.preemption import stop_signals
from training.profiler import profiled_steps
from training.resume import fit_to_ranks, global_batch_size
from training.train_step import TrainStep
from training.validation import Validator
from training.watchdog import Watchdog

SPEED_IS_KNOWN_AFTER_S = 20.0
"""Seconds of training before the speed is used: the first steps are slower (compilation, caches,
measurement of threads)."""
NO_REQUEST, SAVE_REQUEST, STOP_REQUEST = 0, 1, 2
"""What a rank requests after a step; all ranks do the largest request."""


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0
    best: float = -1.0
    """Pooled PCK@0.5 of this folder's best.pt; -1 before the first validation."""
    seconds: float = 0.0
    """Time spent in training."""
    validation_due: bool = False
    """The validation at the end of an epoch is not finished."""


class StoppedError(Exception):
    """A signal has ended a validation, on all ranks before the same batch."""


class Trainer:
    """A training run on one rank."""

    def __init__(
        self,
        config: Config,
        dist: DistributedContext,
        folder: Path,
        checkpoint: Checkpoint | None = None,
    ):
        """Build everything; nothing is written yet. Raises InputError.

        folder: of the run. checkpoint: to continue from.
        """
        self.workers = loader_workers(config.data.workers, dist.device)
        config = replace(config, data=replace(config.data, workers=self.workers))
        self.shards, valid = open_shards(config)
        self.remarks: list[str] = []
        if not self.shards.manifest.skeleton.mirror and (config.data.mirror or config.eval.flip):
            data, validation = replace(config.data, mirror=False), replace(config.eval, flip=False)
            config = replace(config, data=data, eval=validation)
            self.remarks.append("pictures are not mirrored: the left-right pairs are not known")
        self.saved_config = config
        """For config.yaml and checkpoints: before it is adapted to the number of ranks."""
        self.config, self.dist, self.folder = config, dist, folder
        if checkpoint:
            self.config, remarks = fit_to_ranks(config, checkpoint, dist.world_size)
            self.remarks += remarks
            if not config.train.threads:
                self._set_threads(checkpoint.config.train.threads)
        config = self.config
        self.thread_tuner = ThreadTuner(dist, config.train.threads, self.workers)
        self.people_sha256 = people_sha256(self.shards.records())  # raises if they are damaged
        if isinstance(self.shards, JoinedShards):
            self.people_sha256 += f" {self.shards.weights}"
        self.codec = codec_of(config.data, config.heatmaps, self.shards.manifest.skeleton)
        # Before the network is built: tars of object storage are fetched meanwhile.
        self.loader = self._make_loader(checkpoint.step if checkpoint else 0)
        self.validator = Validator(valid, self.codec, config, dist)
        self.learning = LearningCheck(self.validator.people, config.train.steps)
        self.remarks += self.learning.check_labels()
        seed_everything(config.train.seed, 0)  # the same weights on every rank
        network = build_network(config, self.codec.skeleton.joint_count).to(dist.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seed_everything(config.train.seed, dist.rank + 1)
        self.train_step = TrainStep(self.network, self.codec, config, dist)
        self.progress = Progress()
        self.checkpoints = CheckpointManager(
            folder, config.train.keep_last, lambda text: self.log.info(text)
        )
        if checkpoint:
            self._restore(checkpoint)
        limit = config.train.max_bad_steps
        self.monitor = NonFiniteMonitor(self.train_step, self.shards, folder, limit)
        self._may_warn_of_time_limit = config.train.max_minutes > 0
        self.interrupted = False
        """A signal ended the run."""
        self.time = TimeShares()
        self.received_signals: list[int] = []
        self.watchdog = Watchdog(dist, 60 * config.train.hang_minutes)
        self._parent = os.getppid()

    # Starting

    def init_from(self, checkpoint: Checkpoint) -> list[str]:
        """Load only a checkpoint's weights; returns the tensors that start fresh."""
        require_same_size(checkpoint, self.config)
        fresh = init_weights(self.network, self.codec.skeleton, checkpoint)
        self.train_step.load_averaged(self.network.state_dict())
        return fresh

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises InputError."""
        path, run, steps = checkpoint.path, checkpoint.run, self.config.train.steps
        require_same_joints(checkpoint.skeleton, self.codec.skeleton, path, self.shards.folder)
        require_same_size(checkpoint, self.config)
        if run and run.people_sha256 != self.people_sha256:
            found = f"other people or weights than those of {path}"
            advice = "give their shards, or begin a new run with --init_from"
            raise InputError(self.shards.folder, found, "the same people", advice)
        if checkpoint.step > steps:
            found = f"{checkpoint.step} done in {path}"
            advice = f"--train.steps {checkpoint.step + steps} for as many more"
            raise InputError(f"train.steps {steps}", found, "a total that includes these", advice)
        self.train_step.load_state(checkpoint)
        self.progress.step = checkpoint.step
        is_own = path.resolve().parent == self.folder.resolve()
        self.checkpoints.saved_step = checkpoint.step if is_own else 0
        if not run:
            self.remarks += foreign_remarks(checkpoint, self.config)
            return
        self.progress.seconds, self.progress.validation_due = run.seconds, run.validation_due
        if is_own:
            self.progress.best = run.best
        if is_own and run.validation_due:  # the log has its result if it was finished
            pck = from_first_rank(lambda: logged_pck(self.folder, checkpoint.step), self.dist)
            if pck is not None:
                self.progress.validation_due = False
                self.progress.best = max(run.best, pck)
        if run.ranks == self.dist.world_size:
            torch.set_rng_state(run.rng[self.dist.rank])

    def _make_loader(self, step: int) -> Loader:
        """The loader of the batches after this step."""
        data = self.config.data
        self.loader_name = choose_loader(data.loader, self.dist.device)
        spec = LoaderSpec(
            loader=self.loader_name,
            device=self.dist.device,
            preset=self.codec.preset,
            input_px=data.input_px,
            batch_size=data.batch_size,
            workers=self.workers,
            worker_kind=data.worker_kind,
            # A process would have to copy four times as many bytes.
            jitter_in_workers=data.worker_kind == "threads" and self.dist.device.type == "cpu",
            shard_window=data.shard_window,
            seed=self.config.train.seed,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
        )
        first_batch = step * self.config.optim.accumulate
        self.bad_samples: BadSamples | None = None
        if data.on_bad_sample == "stop":
            return TrainLoader(self.shards, spec, first_batch)
        limit, rank = data.max_bad_samples, self.dist.rank
        self.bad_samples = BadSamples(self.shards, self.folder, limit, rank)
        return SkippingLoader(
            lambda shards, batch: TrainLoader(shards, spec, batch), self.bad_samples, first_batch
        )

    # Training

    def train(self) -> dict[str, Any]:
        """Train to the last step, the time limit or a signal; returns the last validation.

        A signal (training/preemption.py) ends the run after the current step, or batch of a
        validation; last.pt is written and `interrupted` set. Raises InputError if the end of the
        run could not be written.
        """
        train, dist = self.config.train, self.dist
        with (
            stop_signals() as self.received_signals,
            self.watchdog.watching(),
            closing(self.open_log()) as self.log,
            profiled_steps(
                self.folder, train.profile_steps * dist.is_first, dist.device, self.log.info
            ) as end_profiled_step,
        ):
            try:
                result = self._train_steps(end_profiled_step)
            finally:
                self._wait_for_checkpoint()
            self._report_early_end()
        barrier(dist)  # the checkpoint exists when any rank returns
        if self.checkpoints.failure and not self.interrupted:
            found, advice = self.checkpoints.failure, "free some space, then --resume"
            raise InputError(self.folder, found, "room for a checkpoint", advice)
        return result

    def _train_steps(self, end_profiled_step: Callable[[], None]) -> dict[str, Any]:
        """The steps of `train`, with logs, checkpoints and validations."""
        train, dist = self.config.train, self.dist
        result, timed_out, seconds_before = {}, False, self.progress.seconds
        self.time = TimeShares()
        self._saved_at = time.perf_counter()
        if self.progress.validation_due:
            self.start_saving([LAST])  # this folder may lack the checkpoint
            result = self._finish_epoch()
        totals = Totals(dist.device)
        while self.progress.step < train.steps and not (self.interrupted or timed_out):
            self._step(totals)
            end_profiled_step()
            seconds = time.perf_counter() - self.time.started
            self.progress.seconds = seconds_before + seconds
            step, request = self.progress.step, NO_REQUEST
            at_epoch = step % train.steps_per_epoch == 0 or step == train.steps
            at_log = at_epoch or step % train.log_every == 0
            # GPU ranks synchronise only here; a collective at each step would stall the queue.
            if at_log or dist.world_size == 1 or dist.device.type == "cpu":
                request = max_over_ranks(self._request(), dist)
                self.interrupted = request == STOP_REQUEST
            if not (at_log or request):
                continue
            self.report(totals)
            limit = 60 * train.max_minutes
            timed_out = any_rank(bool(limit) and seconds >= limit, dist)
            self.progress.validation_due = at_epoch or timed_out
            if request or self.progress.validation_due:
                self.start_saving([LAST])
            if self.progress.validation_due and not self.interrupted:
                result = self._finish_epoch()
            totals = Totals(dist.device)
        return result

    def open_log(self) -> MetricsLogger:
        """Make the folder, with the settings in it, and the log; print the remarks."""
        if self.dist.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_yaml(self.saved_config, self.folder / "config.yaml")
            (self.folder / RESUME_ME).unlink(missing_ok=True)
            keep_lines_until(self.folder / SKIPPED, self.progress.step)
        step, metric = self.progress.step, self.codec.skeleton.metric
        log = MetricsLogger(self.folder, self.config, self.dist, step, metric)
        for remark in self.remarks:
            log.info(remark)
        return log

    def _step(self, totals: Totals) -> None:
        """Do one step and count it."""
        self.watchdog.progress(f"step {self.progress.step + 1}")
        started = time.perf_counter()
        self.network.train()
        self.train_step.run(self.loader, self.progress.step, totals)
        self.progress.step += 1
        self.log.advance()
        seconds = self.thread_tuner.add_step(time.perf_counter() - started)
        if seconds:
            rates = [f"{1000 * s:.0f} ms a step with {n}" for n, s in seconds.items()]
            self.log.info(f"CPU threads: {', '.join(rates)}; the faster is kept (train.threads)")
            self._set_threads(min(seconds, key=lambda count: seconds[count]))
            torch.set_num_threads(self.config.train.threads)
            if self.dist.is_first:
                save_yaml(self.saved_config, self.folder / "config.yaml")

    def _set_threads(self, threads: int) -> None:
        self.config, self.saved_config = (
            replace(c, train=replace(c.train, threads=threads))
            for c in (self.config, self.saved_config)
        )

    def _request(self) -> int:
        """What this rank requests: nothing, a checkpoint after train.save_minutes, or a stop."""
        if self._should_stop():
            return STOP_REQUEST
        minutes = (time.perf_counter() - self._saved_at) / 60
        return SAVE_REQUEST if 0 < self.config.train.save_minutes <= minutes else NO_REQUEST

    def _should_stop(self) -> bool:
        """Whether a signal arrived, or torchrun has died and cannot end this rank any more."""
        is_orphan = launched_by_torchrun() and os.getppid() != self._parent
        return bool(self.received_signals) or is_orphan

    def report(self, totals: Totals) -> None:
        """Read and log the sums, and handle non-finite steps and damaged pictures."""
        dist, step = self.dist, self.progress.step
        *sums, good = sum_over_ranks(
            torch.cat([totals.sums, totals.good_batches[None]]), dist
        ).tolist()
        seconds = time.perf_counter() - totals.started
        people = len(totals.rows) * self.config.data.batch_size * dist.world_size
        means = [total / good if good else math.nan for total in sums]
        values = dict(zip(Totals.NAMES, means, strict=True)) | {
            "lr": self.train_step.optimizer.param_groups[0]["lr"],
            "people_per_s": people / seconds,
            "wait_share": totals.seconds_waited() / seconds,
            "bad_steps": float(torch.stack(totals.skipped).sum()),
            "epoch": step / self.config.train.steps_per_epoch,
            **self.time.shares(),
        }
        self.log.log_training(step, values)
        self._warn_of_time_limit(seconds / max(1, len(totals.skipped)))
        self.monitor.check(step, totals, self.log, dist)
        if self.bad_samples:
            for line in self.bad_samples.merge(gather(self.bad_samples.faults, dist)):
                self.log.info(f"step {step}: {line}")

    def _warn_of_time_limit(self, seconds_per_step: float) -> None:
        """Warn once if train.max_minutes will end the run before train.steps at this speed."""
        train, spent = self.config.train, time.perf_counter() - self.time.started
        is_known = spent >= SPEED_IS_KNOWN_AFTER_S and not self.thread_tuner.is_measuring
        if not (is_known and self._may_warn_of_time_limit):
            return
        self._may_warn_of_time_limit = False
        reached = self.progress.step + int((60 * train.max_minutes - spent) / seconds_per_step)
        if reached < train.steps:
            self.log.info(
                f"WARNING: at this speed train.max_minutes {train.max_minutes:g} allows about "
                f"{reached:,} of {train.steps:,} steps, but the learning-rate schedule covers all "
                f"of them; --train.steps {reached} fits the schedule to the limit"
            )

    def _report_early_end(self) -> None:
        """Print why the run ended early; after a signal also write resume_me for job scripts."""
        step, train = self.progress.step, self.config.train
        if step == train.steps and not self.interrupted:
            return
        why = f"train.max_minutes {train.max_minutes} is over"
        if self.interrupted:
            why = "torchrun has ended, or a signal reached another rank"
        if self.received_signals:
            why = signal.Signals(self.received_signals[0]).name
        text = f"STOPPED EARLY at step {step} of {train.steps}: {why}."
        self.log.info(text + " --resume continues." * (not self.interrupted))
        if self.interrupted and self.dist.is_first:
            with suppress(OSError):  # on a full disk only the exit code asks for a restart
                write_atomic(self.folder / RESUME_ME, f"{text}\n".encode())

    # Validation and checkpoints

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate while the epoch's checkpoint is written, and report the result.

        The checkpoint says that the validation is due; the log says that it is done. If a signal or
        an error ends the validation, a resumed run begins with it.
        """
        try:
            with self.time.measure("validation_share"):
                result = self.validator.run(self.evaluation_network(), self._until_stopped)
        except StoppedError:
            self.interrupted = True
            self._complete_checkpoint(is_best=False)
            return {}
        step, pooled = self.progress.step, result["pckh"]["0.5"]["pooled"] or 0.0
        is_best = pooled >= self.progress.best  # of equal ones the newer
        self.progress.best = max(self.progress.best, pooled)
        numbers = {
            "pckh@0.5_pooled": pooled,
            "pckh@0.1_pooled": result["pckh"]["0.1"]["pooled"] or 0.0,
            "auc": result["auc"] or 0.0,
            "peak": result["peak"],
            "validation_share": self.time.shares()["validation_share"],
            **{f"pckh@0.5_pooled/{name}": value for name, value in result["sets"].items()},
        }
        self.progress.validation_due = False
        self._complete_checkpoint(is_best)
        self.log.log_validation(step, numbers)
        self.log.info(
            f"step {step}: {self.codec.skeleton.metric}@0.5 {100 * pooled:.2f} % pooled over "
            f"{result['joints_counted']} joints of "
            f"{scored_text(result['people_scored'], result['people'])}"
            f"{' (best so far)' if is_best else ''}"
        )
        for name, value in result["sets"].items():
            self.log.info(f"step {step}: {100 * value:.2f} % on {name}")
        if warning := self.learning.check_validation(step, pooled, result["peak"]):
            self.log.info(f"step {step}: {warning}")
        if self.dist.is_first:
            with self.time.measure("validation_share"):
                self.log.log_pictures(step, self.validator.picture())
        return result

    def _until_stopped(self, batches: Iterable[RawBatch]) -> Iterator[RawBatch]:
        """This rank's batches of a validation; before each, all ranks agree whether to go on."""
        own, people = iter(batches), len(self.validator.samples)
        # Some ranks may have one batch less than others.
        for done in range(0, people, self.dist.world_size * self.config.eval.batch_size):
            self.watchdog.progress(f"the validation after step {self.progress.step}")
            self.log.show_validation(done, people)
            if any_rank(self._should_stop(), self.dist):
                raise StoppedError
            yield from itertools.islice(own, 1)

    def _complete_checkpoint(self, is_best: bool) -> None:
        """Wait for the epoch's checkpoint, write it again if that failed, and name the best one."""
        with self.time.measure("save_share"):
            self._wait_for_checkpoint()
        if any_rank(bool(self.checkpoints.failure), self.dist):  # there may be room again
            self.save([LAST, BEST] if is_best else [LAST])
        elif is_best and self.dist.is_first:
            self.checkpoints.add_name(BEST)
        self._saved_at = time.perf_counter()

    def evaluation_network(self) -> nn.Module:
        """A copy of the network in eval mode, with the averaged weights if there are some.

        It is the same on every rank: batch-norm statistics are those of the first one.
        """
        network = copy.deepcopy(self.network)  # a new one would draw from the saved generator
        network.load_state_dict(self.train_step.averaged_weights or self.network.state_dict())
        if self.dist.world_size > 1:
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        return network.eval()

    def save(self, names: list[str]) -> None:
        """`start_saving`, and wait until the file exists on all ranks."""
        self.start_saving(names)
        self._wait_for_checkpoint()
        barrier(self.dist)

    def start_saving(self, names: list[str]) -> None:
        """Write a checkpoint under each name on the first rank, with the state of all ranks.

        Returns when the state is copied; a thread writes the copy.
        """
        with self.time.measure("save_share"):
            self._wait_for_checkpoint()
            rng = gather(torch.get_rng_state(), self.dist)
            if self.dist.is_first:
                self.checkpoints.save(self._checkpoint(rng), names)
        self._saved_at = time.perf_counter()

    def _wait_for_checkpoint(self) -> None:
        self.watchdog.progress(f"the checkpoint of step {self.progress.step}")
        self.checkpoints.wait()

    def _checkpoint(self, rng: list[torch.Tensor]) -> Checkpoint:
        """Everything needed to resume the run. rng: torch's random state of each rank."""
        counters = asdict(self.progress)
        step = counters.pop("step")
        run = RunState(
            **counters,
            scaler=self.train_step.scaler.state_dict(),
            people_sha256=self.people_sha256,
            ranks=self.dist.world_size,
            people_a_step=global_batch_size(self.config, self.dist.world_size),
            loader=self.loader_name,
            rng=rng,
        )
        return Checkpoint(
            path=self.folder / LAST,
            config=self.saved_config,
            skeleton=self.codec.skeleton,
            step=step,
            weights=self.network.state_dict(),
            averaged=self.train_step.averaged_weights,
            optimizer=self.train_step.optimizer.state_dict(),
            run=run,
        )


def open_shards(config: Config) -> tuple[ShardSet, ShardSet]:
    """The training and validation splits. Raises InputError unless they fit the config."""
    opened = {location: _open_data_set(config, location) for location in config.data.weights}
    if isinstance(config.data.shards, str):
        return opened[config.data.shards]
    skeleton = union_skeleton({name: each.manifest.skeleton for name, (each, _) in opened.items()})
    weights = list(config.data.shards.values())
    train, valid = ({name: splits[i] for name, splits in opened.items()} for i in (0, 1))
    return JoinedShards(train, skeleton, weights), JoinedShards(valid, skeleton, weights)


def _open_data_set(config: Config, location: str) -> tuple[ShardSet, ShardSet]:
    folder = local_folder(location, config.data.cache_dir, config.data.cache_gb)
    train, valid = ShardSet(folder / "train"), ShardSet(folder / "valid")
    if train.cache and valid.cache:
        why = "a validation reads all of its split"
        valid.cache.require_capacity(len(valid.cache.shards), why)
        train.cache.reserved = valid.cache.bytes
    preset = preset_of(config.data.preset, config.data.mirror)
    require_preset_fits(train.manifest, preset, train.folder)
    require_preset_fits(valid.manifest, without_augmentation(preset), valid.folder)
    require_same_joints(
        valid.manifest.skeleton, train.manifest.skeleton, valid.folder, train.folder
    )
    return train, valid
