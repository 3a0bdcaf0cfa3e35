"""Train a stacked hourglass network: python (or torchrun) train.py --config configs/2hg.yaml"""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch.distributed.elastic.multiprocessing.errors import record

from common.distributed import (
    SummaryErrorHandler,
    from_first_rank,
    init_distributed,
    launched_by_torchrun,
    mark_run_started,
    report_error_once,
    restarted_by_torchrun,
    shutdown_distributed,
)
from common.errors import EXIT_RESUME, InputError, run_main
from common.system import optional_module
from configs.schema import add_config_options, parse_config
from model.checkpoint import load_checkpoint
from model.hourglass import kernel_obstacles
from pipelines.annotations import scored_text
from pipelines.shard_format import CropRule
from training.checkpoint_manager import BEST, LAST, RESUME_ME, lock_run_folder
from training.resume import AUTO, find_start, global_batch_size, load_resumable
from training.trainer import Trainer

OUT_OF_MEMORY = (
    "If memory is short: lower data.batch_size (and raise optim.accumulate), or eval.batch_size."
)
LOCK_WAIT_S = 60
"""Seconds that a resumed run waits for another process that still trains it."""


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, join the ranks, check or reopen the run's folder, train."""
    config, options = parse_config(make_parser(), sys.argv[1:] if arguments is None else arguments)
    if config.train.tracker != "none":
        optional_module(config.train.tracker, "train.tracker")
    if options["resume"] not in (None, AUTO) and options["init_from"]:
        raise InputError("command line", "--resume and --init_from", "one of them", "leave one out")
    try:
        dist = init_distributed(config.train.device, config.train.precision)
        folder = Path(config.train.out) / config.train.name
        if dist.is_first:
            (folder / RESUME_ME).unlink(missing_ok=True)
        restarted = restarted_by_torchrun(dist)
        start, remarks = from_first_rank(
            lambda: lock_and_find_start(folder, options["resume"], restarted), dist
        )
        if dist.is_first:
            print(f"reading {', '.join(config.data.weights)} ...", file=sys.stderr, flush=True)
        trainer = Trainer(config, dist, folder, load_resumable(Path(start)) if start else None)
        if options["init_from"] and not start:
            fresh = trainer.init_from(load_checkpoint(Path(options["init_from"])))
            loaded = len(trainer.network.state_dict()) - len(fresh)
            new = f", {len(fresh)} new for other joints ({fresh[0]}, ...)" if fresh else ""
            remarks.append(f"weights from {options['init_from']}: {loaded} tensors loaded{new}")
        trainer.remarks = remarks + trainer.remarks
        from_first_rank(lambda: lock_run_folder(folder), dist)
        first_step = trainer.progress.step
        if dist.is_first:
            mark_run_started()
            print_settings(trainer)
        trainer.train()
        if dist.is_first:
            print_results(trainer, first_step)
        # torchrun takes any other code for a failure, and starts the ranks again.
        return EXIT_RESUME if trainer.interrupted and not launched_by_torchrun() else 0
    except RuntimeError as error:
        if "allocate" in str(error):  # torch's errors for CPUs and GPUs have no common type
            error.add_note(OUT_OF_MEMORY)
        raise
    finally:
        shutdown_distributed()


def lock_and_find_start(folder: Path, resume: str | None, restarted: bool) -> tuple[str, list[str]]:
    """As find_start, but locks an existing run first: its last process may still be writing."""
    if folder.exists() and (resume is not None or restarted):
        lock_run_folder(folder, wait_s=LOCK_WAIT_S)
    return find_start(folder, resume, restarted)


def make_parser() -> ArgumentParser:
    """The command line: a config, every field of it, and where to start from."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Trains a stacked hourglass network on shards made by tools/make_shards.py.",
        epilog="example: python train.py --config configs/2hg.yaml --optim.lr 5e-4",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT | auto",
        help="continue the run in its folder, from its newest undamaged checkpoint or this one; "
        "auto: start the run if it has no checkpoint, so that one command starts and continues it",
    )
    parser.add_argument(
        "--init_from",
        help="start a new run with only the weights of this checkpoint",
    )
    add_config_options(parser)
    return parser


def print_settings(trainer: Trainer) -> None:
    """Print the main settings of the run, such as the global batch size."""
    config, dist, shards = trainer.config, trainer.dist, trainer.shards
    data, model, optim, train = config.data, config.model, config.optim, config.train
    parameters = sum(p.numel() for p in trainer.network.parameters())
    batch, valid = global_batch_size(config, dist.world_size), trainer.validator.people
    facts: dict[str, Any] = {
        "run": trainer.folder,
        "network": f"{model.stacks} stack(s) of width {model.width}, {parameters:,} parameters",
        "people": f"{len(shards):,} to train on, validation scores "
        f"{scored_text(valid.scored.sum(), valid.count)}",
        "pictures": describe_pictures(shards.manifest.crop, data.input_px),
        "batch": f"{batch} = {data.batch_size} per rank x {dist.world_size} rank(s) "
        f"x {optim.accumulate}",
        "steps": f"{train.steps:,}, {train.steps_per_epoch:,} an epoch, "
        f"from {trainer.progress.step:,}",
        "loader": f"{trainer.loader_name}, {trainer.workers} worker(s)",
        "device": f"{dist.device}, {str(dist.dtype).removeprefix('torch.')}"
        + ", a CUDA graph" * trainer.train_step.uses_graph
        + describe_kernels(trainer),
    }
    for name, fact in facts.items():
        print(f"{name:>8}: {fact}", flush=True)


def describe_kernels(trainer: Trainer) -> str:
    """Whether the fused kernels are used, and what keeps `auto` from using them in a graph."""
    step, dist = trainer.train_step, trainer.dist
    if step.uses_kernels or not step.uses_graph or trainer.config.train.fused_kernels is False:
        return ", fused kernels" * step.uses_kernels
    obstacles = kernel_obstacles(trainer.network, dist.device, dist.dtype) or ["train.compile"]
    return f", no fused kernels ({', '.join(obstacles)})"


def describe_pictures(crop: CropRule | None, input_px: int) -> str:
    """What the shards store of each picture."""
    if crop is None:
        return "originals"
    small = f", enlarged for data.input_px {input_px}" if crop.person_px < input_px else ""
    return f"crops for the preset {crop.preset}, {crop.person_px} px a person at most{small}"


def print_results(trainer: Trainer, first_step: int) -> None:
    """Print the results and the next command. first_step: of this start."""
    folder, progress, saved = trainer.folder, trainer.progress, trainer.checkpoints
    metric, steps = trainer.codec.skeleton.metric, trainer.config.train.steps
    if progress.step == first_step and not trainer.interrupted:
        print(f"The run was complete: step {progress.step:,} is its last. More: --train.steps")
    print(f"{folder}, after {progress.step:,} of {steps:,} steps, contains")
    print(f"  {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"  {LAST} is from step {saved.saved_step:,}")
    if progress.best >= 0:
        print(f"  {BEST} has {metric}@0.5 {100 * progress.best:.2f} %, the best of all validations")
    if saved.failure:
        print(f"LOST: steps {saved.saved_step + 1:,} to {progress.step:,}: {saved.failure}")
    if trainer.interrupted:
        print(f"Next: python train.py --config {folder / 'config.yaml'} --resume")
    elif progress.best >= 0:
        print(f"Next: python evaluate.py --checkpoint {folder / BEST}")


if __name__ == "__main__":
    run_main(record(main, SummaryErrorHandler()), report_error_once)
