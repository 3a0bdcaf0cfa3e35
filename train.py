"""Train a stacked hourglass network: python (or torchrun) train.py --config configs/2hg.yaml"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch.distributed.elastic.multiprocessing.errors import record

from common.distributed import (
    from_first_rank,
    init_distributed,
    launched_by_torchrun,
    mark_run_started,
    report_error_once,
    restarted_by_torchrun,
    shutdown_distributed,
)
from common.errors import EXIT_RESUME, InputError, run_main
from configs.schema import add_config_options, parse_config
from model import checkpoint
from model.checkpoint import Checkpoint
from pipelines.loader import choose_loader
from pipelines.shard_format import CropRule
from training import checkpoint_manager as keeping
from training.checkpoint_manager import BEST, LAST, RESUME_ME
from training.metrics import BOARD, CURVES, METRICS, PEOPLE
from training.nonfinite import SKIPPED
from training.screen import let_output_fail
from training.tracker import require_tracker
from training.trainer import Run

AUTO = "auto"
PROFILED_STEPS = 5
"""Of --profile."""


def main() -> int:
    """Read the settings, join the ranks, check or reopen the run's folder, train."""
    config, options = parse_config(make_parser(), sys.argv[1:])
    if options["profile"]:
        config = replace(config, train=replace(config.train, profile_steps=PROFILED_STEPS))
    require_tracker(config.train.tracker)
    if options["resume"] not in (None, AUTO) and options["init_from"]:
        raise InputError("command line", "--resume and --init_from", "one of them", "leave one out")
    try:
        dist = init_distributed(config.train.device, config.train.precision)
        folder = Path(config.train.out) / config.train.name
        if dist.is_first:
            keeping.take_back(folder)
        restarted = restarted_by_torchrun(dist)
        source, remarks = from_first_rank(
            lambda: find_start(folder, options["resume"], restarted), dist
        )
        start = load_run(Path(source)) if source else None
        if dist.is_first:
            print(f"reading {config.data.shards} ...", file=sys.stderr, flush=True)
        run = Run(config, dist, folder, start)
        if options["init_from"] and not start:
            start_from(Path(options["init_from"]), run)
        run.remarks = remarks + run.remarks
        from_first_rank(lambda: keeping.begin(folder), dist)
        if dist.is_first:
            mark_run_started()
            announce(run)
        began_at = run.step
        run.train()
        if dist.is_first:
            conclude(run, began_at)
        # torchrun takes any other code for a failure, and starts the ranks again.
        return EXIT_RESUME if run.interrupted and not launched_by_torchrun() else 0
    finally:
        shutdown_distributed()


def make_parser() -> ArgumentParser:
    """The command line: a config, every field of it, and where to start from."""
    parser = ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        description="Trains a stacked hourglass network on shards made by tools/make_shards.py.",
        epilog="example: python train.py --config configs/2hg.yaml --optim.lr 5e-4",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT | auto",
        help="continue the run in its folder, from its newest whole checkpoint or from this one; "
        "auto: if there is one, else begin it, so that one command starts and continues a run",
    )
    parser.add_argument(
        "--init_from",
        help="begin a new run with the weights of this checkpoint, nothing else of it",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"the same as --train.profile_steps {PROFILED_STEPS}: write trace.json and a table of "
        "operators",
    )
    add_config_options(parser)
    return parser


def find_start(folder: Path, resume: str | None, restarted: bool) -> tuple[str, list[str]]:
    """The checkpoint to continue from, empty for a new run; and what is to be said of it.

    resume: None for a new run, empty for the newest whole checkpoint, "auto" for it if there is
    one, or a path. restarted: by torchrun, which is as "auto". Raises
    InputError.
    """
    given = resume if resume not in (None, "", AUTO) else ""
    if given and not restarted:
        _refuse_other_run(folder, Path(given))
        return given, []
    if resume is None and not restarted:
        _refuse_old_folder(folder)
        return "", []
    source, remarks = keeping.newest_whole(folder)
    if resume == "" and source is None and not restarted:
        raise InputError(
            folder / LAST, "no such file", "a checkpoint of the run",
            "begin it without --resume; of a run that was moved give the place, "
            "--train.out FOLDER --train.name NAME",
        )  # fmt: skip
    start = str(source or given)
    why = "torchrun started the ranks again: " if restarted else ""
    how = f"continuing from {start}" if start else "there is no checkpoint yet, so it begins anew"
    return start, [*remarks, why + how]


def _refuse_other_run(folder: Path, given: Path) -> None:
    """A checkpoint from elsewhere would begin anew in a folder that has a run, and replace it."""
    if keeping.has_checkpoint(folder) and given.resolve().parent != folder.resolve():
        raise InputError(
            folder,
            f"a run of this name, and --resume {given}, which is not of it",
            "a new folder, or a checkpoint of this run",
            "continue this run with --resume alone, or choose another --train.name",
        )


def _refuse_old_folder(folder: Path) -> None:
    if folder.exists():
        has_checkpoint = keeping.has_checkpoint(folder)
        raise InputError(
            folder,
            "a run of this name" + ("" if has_checkpoint else ", which has no checkpoint yet"),
            "a new folder",
            "choose another --train.name, or "
            + ("continue it with --resume" if has_checkpoint else "remove this folder"),
        )


def load_run(source: Path) -> Checkpoint:
    """A checkpoint that a run can continue from. Raises InputError."""
    start = checkpoint.load_checkpoint(source)
    if start.optimizer is None:
        raise InputError(
            source,
            "weights alone",
            "a checkpoint of a run, with its optimizer and its place in the data",
            "begin a new run with --init_from",
        )
    return start


def start_from(path: Path, run: Run) -> None:
    """Take over a checkpoint's weights, and say which layers could not be."""
    start = checkpoint.load_checkpoint(path)
    checkpoint.require_same_size(start, run.config)
    fresh = checkpoint.init_weights(run.network, run.skeleton, start)
    run.restart_average()
    if run.dist.is_first and fresh:
        print(f"Other joints: {len(fresh)} tensors start fresh ({fresh[0]}, ...)")


def announce(run: Run) -> None:
    """Say what is about to happen, the global batch size above all."""
    config = run.config
    data, model, optim, train = config.data, config.model, config.optim, config.train
    dist = run.dist
    total = data.batch_size * dist.world_size * optim.accumulate
    parameters = sum(p.numel() for p in run.network.parameters())
    facts: dict[str, Any] = {
        "run": run.folder,
        "network": f"{model.stacks} stack(s) of width {model.width}, {parameters:,} parameters",
        "people": f"{len(run.train_shards):,} to train on, "
        f"{len(run.valid_shards):,} to validate on",
        "pictures": describe_pictures(run.train_shards.manifest.crop, data.input_px),
        "batch": f"{total} = {data.batch_size} per rank "
        f"x {dist.world_size} rank(s) x {optim.accumulate}",
        "steps": f"{train.steps:,}, {train.steps_per_epoch:,} an epoch, from {run.step:,}",
        "loader": choose_loader(config.data.loader, dist.device),
        "device": f"{dist.device}, {str(dist.dtype).removeprefix('torch.')}",
    }
    for name, fact in facts.items():
        print(f"{name:>8}: {fact}", flush=True)


def describe_pictures(crop: CropRule | None, input_px: int) -> str:
    """What the shards store of each picture."""
    if crop is None:
        return "originals"
    small = f", enlarged for data.input_px {input_px}" if crop.person_px < input_px else ""
    return f"crops as far as {crop.preset} reaches, {crop.person_px} px a person at most{small}"


def conclude(run: Run, began_at: int) -> None:
    """Say what was made, and the command that comes next. began_at: the step of this start."""
    made = {
        "config.yaml": "every setting",
        LAST: f"weights, optimizer and place in the data after step {run.saved_step:,}",
        BEST: f"the best by validation, {run.skeleton.metric}@0.5 {100 * run.best:.2f} %",
        **{path.name: "of its step" for path in keeping.numbered(run.folder)},
        SKIPPED: "people whose loss or gradients were not finite",
        METRICS: "every number",
        CURVES: f"loss and {run.skeleton.metric} over the steps",
        PEOPLE: "people of the last validation",
        BOARD: f"tensorboard --logdir {run.folder}",
    }
    if run.step == began_at and not run.interrupted:
        print(f"The run was done: step {run.step:,} is its last. More: --train.steps")
    print(f"Made, after {run.step:,} of {run.config.train.steps:,} steps:")
    for name, what in made.items():
        if (run.folder / name).exists():
            print(f"  {run.folder / name}  ({what})")
    if run.unsaved:
        print(f"LOST: steps {run.saved_step + 1:,} to {run.step:,}: {run.unsaved}")
    if run.interrupted:
        marker = run.folder / RESUME_ME
        marked = f"{marker} is there until the run goes on"
        print(f"Stopped by a signal: {marked if marker.exists() else f'no room for {marker}'}")
        config = run.folder / "config.yaml"
        print(f"Next: python train.py --config {config} --resume")
    elif run.best >= 0:
        print(f"Next: python evaluate.py --checkpoint {run.folder / BEST}")


if __name__ == "__main__":
    # A worker process that fails must not leave the other ranks waiting in silence.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    let_output_fail()
    run_main(record(main), report_error_once)
