"""What is learnt from as many people, and how soon: python benchmarks/gpu_accuracy.py --out OUT

Two stacks on Leeds Sports Pose Extended, by this project's way and by princeton-vl's, re-created,
from the same people, batch and rate, two seeds each, in at most nine minutes on a GPU.
"""

import sys
from pathlib import Path

# `python benchmarks/gpu_accuracy.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import functools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.pieces import (
    Bar,
    Deadline,
    Piece,
    Report,
    add_common_options,
    require_device,
    run_pieces,
)
from benchmarks.princeton_path import princeton_batches
from benchmarks.timing import ROOT, synchronize
from common.cli import Parser, at_least
from common.distributed import DistributedContext, choose_dtype, seed_everything
from common.errors import InputError, run_main
from common.system import usable_cores
from configs import schema
from configs.skeleton import MPII
from evaluation import pckh
from evaluation.inference import predict_distributed
from model.hourglass import StackedHourglass
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.shards import ShardSet
from training.trainer import Trainer

PRINCETON, OURS = "princeton-vl's way", "ours"
VALIDATION_SECONDS = 12.0
"""Kept free for each run: starting workers, and predicting 500 people twice."""


def main() -> int:
    """Pack, train by both ways, evaluate, write."""
    options = make_parser().parse_args()
    device = require_device(options.device)
    deadline = Deadline(options.minutes)
    with tempfile.TemporaryDirectory(prefix="gpu-accuracy-") as folder:
        shards = pack(Path(options.data), Path(folder) / "lspet")
        trial = Trial(options, shards, Path(folder), device, deadline)
        report: Report = {"options": vars(options), "what differs": DIFFERENCES}
        path = Path(options.out) / "gpu_accuracy.json"
        return run_pieces(trial.pieces(), report, path, device, deadline, panels_of_runs)


DIFFERENCES = {
    PRINCETON: "its loader re-created, with as many workers as ours (its config has 2); float32 "
    "with torch's TF32 for convolutions; cuDNN times its algorithms; Adam; the loss read in each "
    "step; its targets, decode and crop",
    OURS: "data.loader auto; one resampling; bf16, channels-last, fused Adam; exact targets and "
    "decode; averaged weights",
    "neither": "network, people, draws' distributions, batch, learning rate, flip test",
}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="gpu_accuracy.py",
        description="Compares accuracy and time of this project's way and princeton-vl's.",
        epilog="example: python benchmarks/gpu_accuracy.py --data shared/data/lspet --out runs/gpu",
    )
    add_common_options(parser, 8.0)
    # fmt: off
    add = parser.add_argument_group("data and training").add_argument
    shared = os.environ.get("POSE_SHARED", "../shared")
    add("--data", default=f"{shared}/data/lspet",
        help="folder with annot/ and images/ (default: POSE_SHARED's, here %(default)s)")
    add("--people", type=at_least(1), default=40_000,
        help="that each network sees, with repeats (default: %(default)s)")
    add("--seeds", type=at_least(0), nargs="+", default=[0, 1], help="default: 0 1")
    add("--large-batch", type=at_least(0), default=64,
        help="trained with besides, at the end, its rate raised by the root; 0 does not "
        "(default: %(default)s)")
    add("--batch-size", type=at_least(1), default=16, help="of both (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="of both (default: %(default)s)")
    add("--stacks", type=at_least(1), default=2, help="default: %(default)s")
    add("--width", type=at_least(2), default=256, help="default: %(default)s")
    add("--depth", type=at_least(1), default=4, help="default: %(default)s")
    add("--input-px", type=at_least(64), default=256, help="default: %(default)s")
    add("--workers", type=at_least(0), default=max(1, usable_cores() - 2),
        help="worker processes, or DALI's threads (default here: %(default)s)")
    # fmt: on
    return parser


def pack(data: Path, output: Path) -> Path:
    """Original pictures as shards. Raises InputError where there are none, or packing fails."""
    if not (data / "annot").is_dir():
        raise InputError(
            data, "no annot/ in it", "Leeds Sports Pose Extended in MPII's layout",
            "set POSE_SHARED to the folder that holds data/lspet, or give --data",
        )  # fmt: skip
    words = [ROOT / "tools" / "make_shards.py", "--annotations", data / "annot", "--images",
             data / "images", "--output", output]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(data, done.stderr.strip()[-500:], "pictures that can be packed", "see it")
    return output


class Trial:
    """Trainings on the same number of people, each a piece of its own."""

    def __init__(
        self,
        options: argparse.Namespace,
        shards: Path,
        folder: Path,
        device: torch.device,
        deadline: Deadline,
    ):
        """shards: with train and valid. folder: for the runs."""
        self.options, self.shards, self.folder, self.deadline = options, shards, folder, deadline
        self.people = options.people
        dtype = choose_dtype("auto", device)
        self.dist = DistributedContext(0, 1, device, dtype)
        self.left = 0

    def pieces(self) -> list[Piece]:
        """Both ways with each seed in turn; then ours with the larger batch."""
        batch, seeds = self.options.batch_size, self.options.seeds
        planned: list[tuple[str, int, Callable[[int, float], dict[str, Any]]]] = []
        for seed in seeds:
            planned.append((PRINCETON, seed, self.princeton))
            planned.append((OURS, seed, functools.partial(self.ours, batch)))
        large = self.options.large_batch
        planned += [
            (f"{OURS}, batch {large}", seed, functools.partial(self.ours, large))
            for seed in seeds
            if large
        ]
        self.left = len(planned)
        return [
            Piece(f"{way}, seed {seed}", functools.partial(self._timed, train, seed), 20.0)
            for way, seed, train in planned
        ]

    def _timed(self, train: Callable[[int, float], dict[str, Any]], seed: int) -> dict[str, Any]:
        """Train with its share of the time that is left. A shorter run shortens those that follow.

        train: of a seed and seconds.
        """
        seconds = max(5.0, self.deadline.left() / max(1, self.left) - VALIDATION_SECONDS)
        self.left -= 1
        found = train(seed, seconds)
        self.people = min(self.people, max(found["people"], self.options.batch_size))
        return {**found, "people_per_s": found["people"] / found["seconds"]}

    def ours(self, batch_size: int, seed: int, seconds: float) -> dict[str, Any]:
        """A run of training/trainer.py. Its seconds are those of building and training."""
        torch.backends.cudnn.benchmark = False  # as train.py
        began = time.perf_counter()
        config = self._config(batch_size, seed, seconds)
        run = Trainer(config, self.dist, self.folder / "runs" / config.train.name)
        built = time.perf_counter() - began
        result = run.train()
        return {
            "people": run.progress.step * batch_size,
            "whole": run.progress.step == config.train.steps,
            "seconds": built + run.progress.seconds,
            **scores(result),
        }

    def _config(self, batch_size: int, seed: int, seconds: float) -> schema.Config:
        options, steps = self.options, max(1, self.people // batch_size)
        rate = options.lr * (batch_size / options.batch_size) ** 0.5
        return schema.Config(
            data=schema.DataConfig(
                shards=str(self.shards), batch_size=batch_size, workers=options.workers,
                input_px=options.input_px, preset="princeton",
            ),
            model=schema.ModelConfig(
                stacks=options.stacks, width=options.width, depth=options.depth
            ),
            optim=schema.OptimConfig(lr=rate, schedule="constant", ema_decay=0.998),
            train=schema.TrainConfig(
                name=f"batch{batch_size}_seed{seed}", steps=steps, steps_per_epoch=steps,
                keep_last=1, seed=seed, max_minutes=seconds / 60, log_every=20,
            ),
        )  # fmt: skip

    def princeton(self, seed: int, seconds: float) -> dict[str, Any]:
        """princeton-vl's step and loader, re-created; evaluated by its rules."""
        options, device = self.options, self.dist.device
        torch.backends.cudnn.benchmark = True  # as its train.py
        began = time.perf_counter()
        seed_everything(seed, 0)
        network = StackedHourglass(options.stacks, options.width, MPII.joint_count, options.depth)
        network.to(device).train()
        optimizer = torch.optim.Adam(network.parameters(), options.lr)
        batches = princeton_batches(
            ShardSet(self.shards / "train"), options.input_px, options.batch_size,
            options.workers, seed,
        )  # fmt: skip
        steps, done = max(1, self.people // options.batch_size), 0
        while done < steps and time.perf_counter() - began < seconds:
            princeton_step(network, optimizer, batches, device)
            done += 1
        synchronize(device)
        spent = time.perf_counter() - began
        return {
            "people": done * options.batch_size,
            "whole": done == steps,
            "seconds": spent,
            **scores(self._validate(network)),
        }

    def _validate(self, network: nn.Module) -> dict[str, Any]:
        valid = ShardSet(self.shards / "valid")
        people, samples_N = valid.people()
        codec = Codec(
            preset=PRESETS["princeton"],
            rule="princeton",
            sigma=1.0,
            input_px=self.options.input_px,
            skeleton=MPII,
        )
        found = predict_distributed(
            network.eval(), valid, samples_N, codec, self.dist._replace(dtype=torch.float32),
            batch_size=32, workers=self.options.workers, flip=True,
        )  # fmt: skip
        return pckh.summary(found.keypoints_NJ2, people, MPII)


def princeton_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[list[torch.Tensor]],
    device: torch.device,
) -> float:
    """Its step: NHWC images permuted, a loss a stack, their mean, and the loss read for its log."""
    images_NHW3, heat_NJHW = (tensor.to(device) for tensor in next(batches))
    heat_NSJHW = network(images_NHW3.permute(0, 3, 1, 2))
    losses = [(heat - heat_NJHW).square().mean() for heat in heat_NSJHW.unbind(dim=1)]
    loss = torch.stack(losses).mean()
    read = loss.item()  # where its log reads it
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return read


def scores(result: dict[str, Any]) -> dict[str, float]:
    """Pooled PCK, in %."""
    return {f"pck@{t}": 100 * (result["pckh"][t]["pooled"] or 0.0) for t in ("0.5", "0.1")}


def panels_of_runs(report: Report) -> dict[str, list[Bar]]:
    """Bars of accuracy and of time, a run each, and the means of each way."""
    runs = {n: e for n, e in report.items() if isinstance(e, dict) and "pck@0.5" in e}
    ways = dict.fromkeys(name.rsplit(", seed", 1)[0] for name in runs)
    panels = {}
    for title, key, unit in (("PCK@0.5 (pooled)", "pck@0.5", "%"), ("training", "seconds", "s")):
        bars = [Bar(name, run[key], f"{run[key]:.1f} {unit}") for name, run in runs.items()]
        for way in ways:
            mean = statistics.mean(run[key] for n, run in runs.items() if n.startswith(f"{way}, s"))
            bars.append(Bar(f"{way}, mean", mean, f"{mean:.1f} {unit}"))
        panels[title] = bars
    return panels


if __name__ == "__main__":
    run_main(main)
