"""Training benchmarks: the time to the same PCK as princeton-vl, and the PCK of each packing.

Time: this project and princeton-vl train the same network on the same people with the same batch
size, learning rate and augmentation ranges. princeton-vl uses its loader, step, targets and
decoding, re-created. This project uses data.loader auto, one resampling, automatic precision, exact
targets and decoding, EMA.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from benchmarks.loader_suites import Options, pack_people
from benchmarks.princeton_baseline import princeton_batches, princeton_step
from benchmarks.step_suites import build_network
from benchmarks.timing import synchronize
from common.distributed import DistributedContext, choose_dtype, seed_everything
from configs.schema import add_config_options, parse_config
from configs.skeleton import MPII
from evaluation import pckh
from evaluation.inference import predict_distributed
from model.hourglass import StackedHourglass
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.shard_format import PICTURE_EXTENSIONS
from pipelines.shards import ShardSet
from training.trainer import Trainer

WAYS = ("princeton-vl's way", "ours")
LR, STACKS, VALIDATIONS = 1e-3, 2, 8
SEEDS, SMALL_BATCH = 3, 8
SMALL_NETWORK = """--data.preset mild --heatmaps.sigma 4 --model.stacks 1 --model.width 64
    --model.depth 3 --model.stem [32,64,64] --optim.lr 3e-3 --optim.warmup_steps 50"""
"""Network and learning rate of configs/lspet_small.yaml."""


def accuracy_group(options: Options, way: str, batch_size: int) -> dict[str, Any]:
    """Train; returns the learning curve, seconds of training and pooled PCK@0.5 in %."""
    train = train_ours if way == "ours" else train_princeton
    seconds, pck = zip(*train(options, batch_size), strict=True)
    return {"seconds": seconds, "pck": pck}


def train_ours(options: Options, batch_size: int) -> list[tuple[float, float]]:
    """A run of training/trainer.py."""
    steps = max(VALIDATIONS, options.people_to_train // batch_size)
    return training_curve(
        options,
        f"""--data.shards {options.folder}/real --data.batch_size {batch_size}
        --data.preset princeton --model.stacks {STACKS} --model.width {options.width}
        --optim.lr {LR} --optim.schedule constant --train.steps {steps}
        --train.steps_per_epoch {steps // VALIDATIONS}""",
        options.folder / "run",
    )


def training_curve(options: Options, settings: str, folder: Path) -> list[tuple[float, float]]:
    """Seconds of training and PCK at each validation of a run. settings: options of train.py."""
    began, parser = time.perf_counter(), ArgumentParser()
    add_config_options(parser)
    settings += f""" --data.workers {options.workers} --data.input_px {options.input_px}
        --optim.ema_decay 0.998 --train.keep_last 1"""
    config, _ = parse_config(parser, settings.split())
    dist = DistributedContext(0, 1, options.device, choose_dtype("auto", options.device))
    trainer = Trainer(config, dist, folder)
    batch_size = config.data.batch_size
    seconds, last_step, curve = time.perf_counter() - began, 0, list[tuple[float, float]]()
    trainer.train()
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":  # its rate leaves out validations
            seconds += (line["step"] - last_step) * batch_size / line["people_per_s"]
            last_step = line["step"]
        elif line["kind"] == "valid":
            curve.append((seconds, 100 * line["pckh@0.5_pooled"]))
    return curve


def packings_group(options: Options) -> dict[str, list[float]]:
    """Packing -> pooled PCK@0.5 in % of small networks, one per seed; the people are the same."""
    assert options.data, "required by throughput.py"
    pck: dict[str, list[float]] = {packing: [] for packing in PICTURE_EXTENSIONS}
    steps = max(1, options.people_to_train // SMALL_BATCH)
    for seed, packing in itertools.product(range(SEEDS), pck):
        shards = options.folder / f"real-{packing}"
        if not shards.exists():
            pack_people(options.data, shards, packing, round(1.125 * options.input_px))
        settings = f"""--data.shards {shards} --data.batch_size {SMALL_BATCH} {SMALL_NETWORK}
            --train.steps {steps} --train.steps_per_epoch {steps} --train.seed {seed}"""
        curve = training_curve(options, settings, options.folder / f"run-{packing}-{seed}")
        pck[packing].append(curve[-1][1])
        print(f"  seed {seed}, {packing}: {pck[packing][-1]:.2f} %", file=sys.stderr, flush=True)
    return pck


def train_princeton(options: Options, batch_size: int) -> list[tuple[float, float]]:
    """princeton-vl's loader and step, evaluated by its rules."""
    torch.backends.cudnn.benchmark = True  # as its train.py
    steps, device = max(VALIDATIONS, options.people_to_train // batch_size), options.device
    seconds, began, curve = 0.0, time.perf_counter(), list[tuple[float, float]]()
    seed_everything(0, 0)
    network = build_network(STACKS, options, torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), LR)
    shards = ShardSet(options.folder / "real" / "train")
    batches = princeton_batches(shards, options.input_px, batch_size, options.workers)
    for step in range(1, steps + 1):
        images, heat = (tensor.to(device) for tensor in next(batches))
        princeton_step(network.train(), optimizer, images, heat)
        if step % (steps // VALIDATIONS) == 0:
            synchronize(device)
            seconds += time.perf_counter() - began
            curve.append((seconds, validate(network.eval(), options)))
            began = time.perf_counter()
    return curve


def validate(network: StackedHourglass, options: Options) -> float:
    """Pooled PCK@0.5 in % on the validation people, with the flip test."""
    shards, preset = ShardSet(options.folder / "real" / "valid"), PRESETS["princeton"]
    people, samples = shards.people()
    side, dist = options.input_px, DistributedContext(0, 1, options.device, torch.float32)
    codec = Codec(preset=preset, rule="princeton", sigma=1.0, input_px=side, skeleton=MPII)
    how: dict[str, Any] = {"batch_size": 32, "workers": options.workers, "flip": True}
    found = predict_distributed(network, shards, samples, codec, dist, **how)
    return 100 * (pckh.summary(found.keypoints_NJ2, people, MPII)["pckh"]["0.5"]["pooled"] or 0.0)


def time_to_same_pck(curves: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The highest PCK that every curve reaches, and the seconds until each does."""
    found = {"pck": min((max(curve["pck"]) for curve in curves.values()), default=0.0)}
    for name, curve in curves.items():
        # Interpolated between validations; each curve starts at 0 s and 0 %.
        best, row = np.unique(np.maximum.accumulate([0.0, *curve["pck"]]), return_index=True)
        found[name] = float(np.interp(found["pck"], best, np.array([0.0, *curve["seconds"]])[row]))
    return found
