"""Suite of whole trainings: how long this project's way and princeton-vl's need for the same PCK.

Both train the same network on the same people with the same batch, rate and distributions of draws.
princeton-vl's way: its loader, step, targets and decoding, re-created. Ours: data.loader auto, one
resampling, automatic precision, exact targets and decoding, averaged weights.
"""

import json
import time
from typing import Any

import numpy as np
import torch

from benchmarks.loader_suites import Options
from benchmarks.princeton_baseline import princeton_batches, princeton_step
from benchmarks.timing import synchronize
from common.distributed import DistributedContext, choose_dtype, seed_everything
from configs import schema
from configs.skeleton import MPII
from evaluation import pckh
from evaluation.inference import predict_distributed
from model.hourglass import StackedHourglass
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.shards import ShardSet
from training.trainer import Trainer

WAYS = ("princeton-vl's way", "ours")
LR, STACKS, VALIDATIONS = 1e-3, 2, 8


def accuracy_group(options: Options, way: str, batch_size: int, seed: int) -> dict[str, Any]:
    """Train, and return the learning curve: seconds of training and pooled PCK@0.5 in %."""
    train = train_ours if way == "ours" else train_princeton
    curve = train(options, batch_size, seed)
    return {"seconds": [seconds for seconds, _ in curve], "pck": [value for _, value in curve]}


def train_ours(options: Options, batch_size: int, seed: int) -> list[tuple[float, float]]:
    """A run of training/trainer.py."""
    began = time.perf_counter()
    steps = max(VALIDATIONS, options.people_to_train // batch_size)
    data = schema.DataConfig(
        shards=str(options.folder / "real"), batch_size=batch_size, workers=options.workers,
        input_px=options.input_px, preset="princeton",
    )  # fmt: skip
    train = schema.TrainConfig(
        name=f"seed{seed}", steps=steps, steps_per_epoch=steps // VALIDATIONS, keep_last=1,
        seed=seed, log_every=20,
    )  # fmt: skip
    model = schema.ModelConfig(stacks=STACKS, width=options.width, depth=options.depth)
    optim = schema.OptimConfig(lr=LR, schedule="constant", ema_decay=0.998)
    config = schema.Config(data=data, model=model, optim=optim, train=train)
    dist = DistributedContext(0, 1, options.device, choose_dtype("auto", options.device))
    folder = options.folder / "runs" / f"batch{batch_size}-seed{seed}"
    trainer = Trainer(config, dist, folder)
    seconds, last_step, curve = time.perf_counter() - began, 0, list[tuple[float, float]]()
    trainer.train()
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":  # its rate leaves out validations
            seconds += (line["step"] - last_step) * batch_size / line["people_per_s"]
            last_step = line["step"]
        elif line["kind"] == "valid":
            curve.append((seconds, 100 * line["pckh@0.5_pooled"]))
    return curve


def train_princeton(options: Options, batch_size: int, seed: int) -> list[tuple[float, float]]:
    """princeton-vl's loader and step, evaluated by its rules."""
    torch.backends.cudnn.benchmark = True  # as its train.py
    began, device = time.perf_counter(), options.device
    seed_everything(seed, 0)
    network = StackedHourglass(STACKS, options.width, MPII.joint_count, options.depth).to(device)
    optimizer = torch.optim.Adam(network.parameters(), LR)
    shards = ShardSet(options.folder / "real" / "train")
    batches = princeton_batches(shards, options.input_px, batch_size, options.workers, seed)
    steps = max(VALIDATIONS, options.people_to_train // batch_size)
    curve, validating = list[tuple[float, float]](), 0.0
    for step in range(1, steps + 1):
        images, heat = (tensor.to(device) for tensor in next(batches))
        princeton_step(network.train(), optimizer, images, heat)
        if step % (steps // VALIDATIONS) == 0:
            synchronize(device)
            seconds = time.perf_counter() - began
            curve.append((seconds - validating, validate(network, options)))
            validating += time.perf_counter() - began - seconds
    return curve


def validate(network: StackedHourglass, options: Options) -> float:
    """Pooled PCK@0.5 in % on the validation people, with the flip test."""
    shards = ShardSet(options.folder / "real" / "valid")
    people, samples = shards.people()
    preset, side = PRESETS["princeton"], options.input_px
    codec = Codec(preset=preset, rule="princeton", sigma=1.0, input_px=side, skeleton=MPII)
    dist = DistributedContext(0, 1, options.device, torch.float32)
    how: dict[str, Any] = {"batch_size": 32, "workers": options.workers, "flip": True}
    found = predict_distributed(network.eval(), shards, samples, codec, dist, **how)
    return 100 * (pckh.summary(found.keypoints_NJ2, people, MPII)["pckh"]["0.5"]["pooled"] or 0.0)


def time_to_same_pck(curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds until each curve has the highest PCK that all of them reach."""
    if not curves:
        return {}
    common = min(max(curve["pck"]) for curve in curves.values())
    return {
        "pck": common,
        "seconds": {name: seconds_to(curve, common) for name, curve in curves.items()},
    }


def seconds_to(curve: dict[str, list[float]], pck: float) -> float:
    """By linear interpolation between validations; the curve starts at 0 s and 0 %."""
    best = np.maximum.accumulate([0.0, *curve["pck"]])
    row = int(np.argmax(best >= pck))
    seconds = [0.0, *curve["seconds"]]
    share = (pck - best[row - 1]) / max(best[row] - best[row - 1], 1e-9)
    return float(seconds[row - 1] + share * (seconds[row] - seconds[row - 1])) if row else 0.0
