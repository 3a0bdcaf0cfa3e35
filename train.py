"""Train a stacked hourglass network: python (or torchrun) train.py --config configs/2hg.yaml"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from configs.errors import InputError, run_main
from configs.schema import Config, add_config_options, parse_config, save_yaml
from training import checkpoint, runtime
from training.checkpoint import State
from training.loop import Run
from training.runtime import Runtime


def main() -> None:
    """Read the settings, join the ranks, make or reopen the run's folder, train."""
    parser = make_parser()
    config, options = parse_config(parser, sys.argv[1:])
    place = runtime.start(config.train.device, config.train.precision)
    try:
        folder = Path(config.train.out) / config.train.name
        state = open_folder(folder, options["resume"], place)
        run = Run(config, place, folder, state)
        if options["init_from"] and state is None:
            start_from(Path(options["init_from"]), run)
        if place.is_first:
            save_yaml(config, folder / "config.yaml")
            announce(config, run)
        run.train()
        if place.is_first:
            print(
                f"Checkpoints: {folder}/last.pt, {folder}/best.pt (PCKh@0.5 {100 * run.best:.2f} %)"
            )
            print(f"Next: python evaluate.py --checkpoint {folder}/best.pt")
    finally:
        runtime.stop()


def make_parser() -> ArgumentParser:
    """The command line: a config, every field of it, and where to start from."""
    parser = ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a stacked hourglass network on shards made by tools/make_shards.py.",
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


def open_folder(folder: Path, resume: str | None, place: Runtime) -> State | None:
    """The checkpoint to continue from, or None in a new folder. Raises InputError."""
    if resume is not None:
        path = Path(resume) if resume else folder / "last.pt"
        state = checkpoint.load(path)
        if "optimizer" not in state:
            raise InputError(
                path,
                "weights alone",
                "a checkpoint of a run, with its optimizer and its place in the data",
                "begin a new run with --init_from",
            )
        return state
    if folder.exists():
        raise InputError(
            folder,
            "a run of this name",
            "a new folder",
            "continue it with --resume, or choose another --train.name",
        )
    # No rank may make the folder (Run does) before every rank has looked for it.
    runtime.barrier(place)
    return None


def start_from(path: Path, run: Run) -> None:
    """Take over a checkpoint's weights, and say which layers could not be."""
    fresh = checkpoint.init_weights(run.network, checkpoint.load(path), path)
    run.restart_average()
    if run.place.is_first and fresh:
        print(f"New number of joints: {len(fresh)} tensors start fresh ({fresh[0]}, ...)")


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
        "device": f"{place.device}, {str(place.dtype).removeprefix('torch.')}",
    }
    for name, fact in facts.items():
        print(f"{name:>8}: {fact}", flush=True)


if __name__ == "__main__":
    # A worker process that fails must not leave the other ranks waiting in silence.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    run_main(main)
