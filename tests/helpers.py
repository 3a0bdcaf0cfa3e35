"""Functions that several test files share; fixtures are in conftest.py."""

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from conftest import ROOT

from common.distributed import DistributedContext
from configs.schema import Config, LoaderName, ModelConfig, config_from_dict
from configs.skeleton import MPII
from model.checkpoint import load_checkpoint
from model.hourglass import StackedHourglass
from pipelines.annotations import People
from pipelines.augment import PRESETS, Draw, Preset
from pipelines.codec import Codec
from pipelines.geometry import transform
from pipelines.loader import Batch, LoaderSpec, RawBatch, TrainLoader
from pipelines.opencv_loader import Source, collate, crop_person, stored_picture
from pipelines.shard_format import MANIFEST, file_sha256, unpack_records
from pipelines.shards import ShardSet
from training import step_graph, train_step
from training.metrics import Totals
from training.trainer import Trainer

AFFINE_PRESETS = [name for name, preset in PRESETS.items() if not preset.princeton_crop]
OTHER_LOADERS = [name for name in get_args(LoaderName) if name not in ("auto", "opencv")]
"""Those that are compared with OpenCV's."""


def people_at(joints: np.ndarray, normalize: float = 10.0) -> People:
    """People with these (N, J, 2) joints, all marked and visible, in pictures of their own."""
    count = len(joints)
    ones = np.ones(joints.shape[:2], dtype=bool)
    index = np.arange(count)
    return People(
        images=tuple(f"{i}.jpg" for i in index), index=index, person=index,
        center=np.full((count, 2), 100.0), scale=np.ones(count),
        normalize=np.full(count, normalize), joints=joints, marked=ones, visible=ones.copy(),
    )  # fmt: skip


def make_codec(
    preset: str = "hrnet", rule: Any = "exact", input_px: int = 64, skeleton: Any = MPII
) -> Codec:
    """A codec with sigma 1."""
    return Codec(preset=PRESETS[preset], rule=rule, sigma=1.0, input_px=input_px, skeleton=skeleton)


def make_spec(preset: str | Preset, loader: Any = "dali", **changes: Any) -> LoaderSpec:
    """A loader on the CPU of four people a batch at 64 px."""
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    values = {"device": torch.device("cpu"), "input_px": 64, "batch_size": 4, "workers": 1}
    return LoaderSpec(**{"loader": loader, "preset": preset, **values, **changes})


def sample_of_row(split: ShardSet, row: float) -> int:
    """The sample of a row of the annotation."""
    return int(np.flatnonzero(unpack_records(split.records()).row_N == float(row))[0])


def draws_array(draws: list[Draw]) -> np.ndarray:
    """(N, 10) float32, one row per draw."""
    return np.asarray(draws, dtype=np.float32)


def crop_sample(
    source: Source, sample: int, drawn: Draw, preset: Preset, input_px: int
) -> RawBatch:
    """Read, decode and crop one person."""
    record, image = source.record(sample)[None], stored_picture(source, sample)
    crop, matrix = crop_person(image, unpack_records(record), drawn, preset, input_px)
    parts = crop[None], matrix[None], draws_array([drawn]), record
    return RawBatch(*map(torch.from_numpy, map(np.array, parts)))


def repeat_draws(shards: ShardSet, raw: RawBatch, preset: Preset) -> RawBatch:
    """OpenCV's crops for the people and draws of another loader's batch (on the CPU)."""
    samples = [sample_of_row(shards, row) for row in unpack_records(raw.records_NR).row_N.tolist()]
    people, size = zip(samples, raw.draws_ND.tolist(), strict=True), raw.images_NHW3.shape[1]
    return collate([crop_sample(shards, i, Draw(*drawn), preset, size) for i, drawn in people])


def assert_loaders_agree(split: ShardSet, spec: LoaderSpec, steps: int) -> RawBatch:
    """A loader's crops are OpenCV's with the same draws; returns the last batch.

    Grey levels differ by 0.5 on average and 6 at the 99.9th percentile, joints by 0.01 px.
    """
    loader, grey, pixels = TrainLoader(split, spec), [], []
    for _ in range(steps):
        raw = RawBatch(*(tensor.cpu() for tensor in loader.next()))
        twin = repeat_draws(split, raw, spec.preset)
        grey.append(np.abs(twin.images_NHW3.numpy().astype(float) - raw.images_NHW3.numpy()))
        joints_NJ2 = unpack_records(raw.records_NR.numpy()).joints_NJ2
        one, other = (transform(r.input_from_image_N23, joints_NJ2) for r in (raw, twin))
        pixels.append(np.abs(one - other))
    assert np.mean(grey) <= 0.5 and np.percentile(grey, 99.9) <= 6
    assert np.max(pixels) <= 0.01
    return raw


def change_manifest(split: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest of a split in place."""
    raw = json.loads((split / MANIFEST).read_text())
    change(raw)
    (split / MANIFEST).write_text(json.dumps(raw))


class Place(NamedTuple):
    """Where a packed person's component is, in bytes."""

    tar: Path
    offset: int
    size: int


def place_of(split: ShardSet, sample: int, component: str) -> Place:
    tar = split.tars[split.shard_of_sample[sample]]
    with tarfile.open(tar) as archive:
        member = archive.getmember(f"{split.keys[sample]}.{component}")
    return Place(tar, member.offset_data, member.size)


def overwrite(split: Path, sample: int, component: str, data: bytes) -> None:
    """Write over the start of a packed person's component, in the tar itself."""
    place = place_of(ShardSet(split), sample, component)
    with place.tar.open("r+b", buffering=0) as file:
        file.seek(place.offset)
        file.write(data)


def update_sha256(split: Path) -> None:
    """Make the manifest's checksums those of the tars."""
    change_manifest(
        split,
        lambda raw: [s.update(sha256=file_sha256(split / s["tar"])) for s in raw["shards"]],
    )


def damage_picture(split: Path, copy: Path, sample: int) -> Path:
    """Copy a split and overwrite one picture; the manifest's checksums are updated."""
    shutil.copytree(split, copy)
    overwrite(copy, sample, "jpg", b"\x13" * place_of(ShardSet(copy), sample, "jpg").size)
    update_sha256(copy)
    return copy


def exif(orientation: int, order: str = "<", more: bytes = b"") -> bytes:
    """An APP1 segment with two tags, laid out by hand from the TIFF 6.0 specification."""
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 2)
    tiff += struct.pack(order + "HHII", 0x010F, 2, 4, 0)  # Make, four letters
    tiff += struct.pack(order + "HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff + more
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]


CPU = DistributedContext(0, 1, torch.device("cpu"), torch.float32)
SMALL = shlex.split(
    "--data.batch_size 4 --data.workers 0 --data.input_px 64 --model.width 16 --model.depth 2 "
    "--model.stacks 1 --model.stem [8,16,16] --train.steps 4 --train.steps_per_epoch 2 "
    "--train.log_every 1 --train.device cpu --train.precision fp32 --train.threads 1"
)
"""Options of train.py for a tiny network."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""For programs of this project in a process of their own."""


def train_options(shards: Path, out: Path, name: str, more: str = "") -> list[str]:
    """The command line of train.py for a run of a tiny network. more: further options."""
    return [*SMALL, *f"--data.shards {shards} --train.out {out} --train.name {name} {more}".split()]


def tiny_config(shards: Path, **sections: dict) -> Config:
    """A config for 6 steps of a tiny network. sections: changes, such as optim={"lr": 1e-2}."""
    raw: dict = {
        "data": {"shards": str(shards), "batch_size": 4, "workers": 0, "input_px": 64},
        "heatmaps": {"sigma": 4.0},
        "model": {"stacks": 1, "width": 16, "depth": 2, "stem": [8, 16, 16]},
        "optim": {"schedule": "constant", "lr": 3e-3},
        "train": {
            "steps": 6,
            "steps_per_epoch": 6,
            "log_every": 2,
            "precision": "fp32",
            "threads": 1,
        },
        "eval": {"batch_size": 4},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return config_from_dict(raw, "test")


def make_trainer(
    config: Config, folder: Path, checkpoint: Any = None, dist: DistributedContext = CPU
) -> Trainer:
    """A trainer whose folder exists. checkpoint: to resume from, or the path of one."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, Path):
        checkpoint = load_checkpoint(checkpoint)
    return Trainer(config, dist, folder, checkpoint)


def new_network(
    stacks: int, width: int, joints: int, depth: int = 4, stem: Any = (64, 128, 128), **more: Any
) -> StackedHourglass:
    """A network with random weights. more: other settings of ModelConfig."""
    return StackedHourglass(
        ModelConfig(stacks=stacks, width=width, depth=depth, stem=stem, **more), joints
    )


def give_biases(network: StackedHourglass) -> StackedHourglass:
    """Biases of noise before each batch norm, as in princeton's code and our first checkpoints."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.bias is None:
            module.bias = torch.nn.Parameter(0.1 * torch.randn(module.out_channels))
    return network


def step(trainer: Trainer) -> Totals:
    """Train one step, without a log."""
    totals = Totals(trainer.dist.device)
    trainer.network.train()
    trainer.train_step.run(trainer.loader, trainer.progress.step, totals)
    trainer.progress.step += 1
    return totals


def steps(trainer: Trainer, count: int) -> list[float]:
    """Train so many steps of one batch each; returns their losses."""
    return [step(trainer).sums[0].item() for _ in range(count)]


def call_instead_of_replay(monkeypatch: Any) -> None:
    """Three warm-up steps, then the recorded function called where a GPU would replay it."""

    def record(function: Callable[[], object]) -> Callable[[], object]:
        for _ in range(step_graph.WARM_UP_STEPS):
            function()
        return function

    monkeypatch.setattr(step_graph, "record_cuda_graph", record)


def metrics(folder: Path, kind: str) -> list[dict]:
    """The lines of a run's log of one kind, train or valid."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def poison(monkeypatch: Any, bad_batches: Iterable[int]) -> None:
    """Make the images of some batches, counted from now, not finite."""
    real, calls, bad = train_step.make_batch, itertools.count(), set(bad_batches)

    def make_batch(*arguments: Any, **options: Any) -> Batch:
        batch = real(*arguments, **options)
        factor = torch.nan if next(calls) in bad else 1.0
        return batch._replace(images_N3HW=batch.images_N3HW * factor)

    monkeypatch.setattr(train_step, "make_batch", make_batch)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every plain value and every tensor's bytes, by path; of dataclasses too."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in pairs for k, v in leaves(item, f"{name}{key}/").items()}
    return {name: value}
