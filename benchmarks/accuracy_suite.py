"""The time in which this project and princeton-vl reach the same PCK.

Both train the same network on the same people with the same batch size, learning rate and
augmentation ranges. princeton-vl uses its loader, step, targets and decoding, re-created. This
project uses data.loader auto, one resampling, automatic precision, exact targets and decoding, EMA.
"""

import time
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from benchmarks.loader_suites import Options
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
from pipelines.shards import ShardSet
from training.metrics import METRICS, read_metrics
from training.trainer import Trainer

WAYS = ("princeton-vl's way", "ours")
LR, STACKS, VALIDATIONS = 1e-3, 2, 8


def accuracy_group(options: Options, way: str, batch_size: int) -> dict[str, Any]:
    """Train; returns the learning curve, seconds of training and pooled PCK@0.5 in %."""
    train = train_ours if way == "ours" else train_princeton
    seconds, pck = zip(*train(options, batch_size), strict=True)
    return {"seconds": seconds, "pck": pck}


def train_ours(options: Options, batch_size: int) -> list[tuple[float, float]]:
    """A run of training/trainer.py: seconds of training and PCK at each validation."""
    began, parser, folder = time.perf_counter(), ArgumentParser(), options.folder / "run"
    add_config_options(parser)
    steps = max(VALIDATIONS, options.people_to_train // batch_size)
    settings = f"""--data.shards {options.folder}/real --data.batch_size {batch_size}
        --data.preset princeton --data.workers {options.workers} --data.input_px {options.input_px}
        --model.stacks {STACKS} --model.width {options.width}
        --optim.lr {LR} --optim.schedule constant --optim.ema_decay 0.998
        --train.steps {steps} --train.steps_per_epoch {steps // VALIDATIONS} --train.keep_last 1"""
    config, _ = parse_config(parser, settings.split())
    dist = DistributedContext(0, 1, options.device, choose_dtype("auto", options.device))
    trainer = Trainer(config, dist, folder)
    seconds, last_step, curve = time.perf_counter() - began, 0, list[tuple[float, float]]()
    trainer.train()
    for line in read_metrics(folder / METRICS):
        if line["kind"] == "train":  # its rate leaves out validations
            seconds += (line["step"] - last_step) * batch_size / line["people_per_s"]
            last_step = line["step"]
        elif line["kind"] == "valid":
            curve.append((seconds, 100 * line["pckh@0.5_pooled"]))
    return curve


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
