"""Train a stacked hourglass network: python (or torchrun) train.py --config configs/2hg.yaml"""

import configs.interrupt  # noqa: F401 - before the slow imports

# isort: split
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from configs.errors import EXIT_INTERRUPTED, InputError, run_main
from configs.schema import Config, add_config_options, parse_config
from pipelines.batches import choose_loader
from training import checkpoint, runtime
from training.checkpoint import State
from training.log import BOARD, CURVES, METRICS, PEOPLE
from training.loop import BEST, LAST, Run
from training.runtime import Runtime
from training.tracker import require_tracker


def main() -> int:
    """Read the settings, join the ranks, check or reopen the run's folder, train."""
    config, options = parse_config(make_parser(), sys.argv[1:])
    require_tracker(config.train.tracker)
    if options["resume"] is not None and options["init_from"]:
        raise InputError("command line", "--resume and --init_from", "one of them", "leave one out")
    place = runtime.start(config.train.device, config.train.precision)
    try:
        folder = Path(config.train.out) / config.train.name
        source = Path(options["resume"]) if options["resume"] else folder / LAST
        state = open_folder(folder, options["resume"] is not None, source, place)
        if place.is_first:
            print(f"reading {config.data.shards} ...", file=sys.stderr, flush=True)
        run = Run(config, place, folder, state, source)
        if options["init_from"]:
            start_from(Path(options["init_from"]), run)
        if place.is_first:
            announce(config, run)
        try:
            run.train()
        finally:  # an error is told below the live line, not in it
            if hasattr(run, "log"):
                run.log.close()
        if place.is_first:
            conclude(run)
        return EXIT_INTERRUPTED if run.interrupted else 0
    finally:
        runtime.stop()


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
        help="continue the run in its folder, from last.pt or from this checkpoint",
    )
    parser.add_argument(
        "--init_from",
        help="begin a new run with the weights of this checkpoint, nothing else of it",
    )
    add_config_options(parser)
    return parser


def open_folder(folder: Path, resume: bool, source: Path, place: Runtime) -> State | None:
    """The checkpoint to continue from, or None for a new run. Raises InputError."""
    if resume:
        state = checkpoint.load(source)
        if "optimizer" not in state:
            raise InputError(
                source,
                "weights alone",
                "a checkpoint of a run, with its optimizer and its place in the data",
                "begin a new run with --init_from",
            )
        return state
    if folder.exists():
        has_checkpoint = (folder / LAST).exists()
        raise InputError(
            folder,
            "a run of this name" + ("" if has_checkpoint else ", which has no checkpoint yet"),
            "a new folder",
            "choose another --train.name, or "
            + ("continue it with --resume" if has_checkpoint else "remove this folder"),
        )
    # No rank may make the folder before every rank has looked for it.
    runtime.barrier(place)
    return None


def start_from(path: Path, run: Run) -> None:
    """Take over a checkpoint's weights, and say which layers could not be."""
    fresh = checkpoint.init_weights(run.network, run.skeleton, checkpoint.load(path), path)
    run.restart_average()
    if run.place.is_first and fresh:
        print(f"Other joints: {len(fresh)} tensors start fresh ({fresh[0]}, ...)")


def announce(config: Config, run: Run) -> None:
    """Say what is about to happen, the global batch size above all."""
    data, model, optim, train = config.data, config.model, config.optim, config.train
    place = run.place
    total = data.batch_size * place.ranks * optim.accumulate
    parameters = sum(p.numel() for p in run.network.parameters())
    facts: dict[str, Any] = {
        "run": run.folder,
        "network": f"{model.stacks} stack(s) of width {model.width}, {parameters:,} parameters",
        "people": f"{len(run.train_shards):,} to train on, "
        f"{len(run.valid_shards):,} to validate on",
        "batch": f"{total} = {data.batch_size} per rank "
        f"x {place.ranks} rank(s) x {optim.accumulate}",
        "steps": f"{train.steps:,}, {train.steps_per_epoch:,} an epoch, from {run.step:,}",
        "loader": choose_loader(config.data.loader, place.device),
        "device": f"{place.device}, {str(place.dtype).removeprefix('torch.')}",
    }
    for name, fact in facts.items():
        print(f"{name:>8}: {fact}", flush=True)


def conclude(run: Run) -> None:
    """Say what was made, and the command that comes next."""
    made = {
        "config.yaml": "every setting",
        LAST: f"weights, optimizer and place in the data after step {run.step:,}",
        BEST: f"the best by validation, PCKh@0.5 {100 * run.best:.2f} %",
        METRICS: "every number",
        CURVES: "loss and PCKh over the steps",
        PEOPLE: "people of the last validation",
        BOARD: f"tensorboard --logdir {run.folder}",
    }
    print(f"Made, after {run.step:,} of {run.config.train.steps:,} steps:")
    for name, what in made.items():
        if (run.folder / name).exists():
            print(f"  {run.folder / name}  ({what})")
    if run.interrupted:
        config = run.folder / "config.yaml"
        print(f"Next: python train.py --config {config} --resume")
    elif run.best >= 0:
        print(f"Next: python evaluate.py --checkpoint {run.folder / BEST}")


if __name__ == "__main__":
    # A worker process that fails must not leave the other ranks waiting in silence.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    run_main(main)
