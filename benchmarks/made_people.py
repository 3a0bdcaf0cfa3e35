"""People and pictures made for timing: 1280 x 720, as large in them as MPII's, packed both ways."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from configs.skeleton import MPII
from pipelines.annotations import People
from pipelines.crop_packing import crop_jpeg, crop_region, crop_rule
from pipelines.shard_format import (
    CropRule,
    Manifest,
    Shard,
    pack_record,
    person_json,
    write_manifest,
)
from pipelines.shards import ShardSet, write_shard

WIDTH, HEIGHT = 1280, 720
# h5 scale of MPII's people: percentiles 5, 25, 50, 75, 95.
SCALE_PERCENTILES = ((5, 25, 50, 75, 95), (1.43, 2.38, 3.45, 5.06, 8.58))
PICTURES = 32
"""Made; more people share them."""
PER_SHARD = 512


def make_originals(folder: Path, people: int) -> ShardSet:
    """A split of people in 1280 x 720 JPEGs of about 500 kB, one picture a person."""
    rng = np.random.default_rng(0)
    crowd = make_people(people, rng)
    jpegs = [make_jpeg(rng) for _ in range(min(people, PICTURES))]

    def samples() -> Iterator[tuple[str, bytes, bytes, bytes]]:
        for row in range(people):
            record = pack_record(crowd, row, WIDTH, HEIGHT).tobytes()
            facts = person_json(crowd, row, MPII, WIDTH, HEIGHT)
            yield f"{row:09d}", record, jpegs[row % len(jpegs)], facts

    folder.mkdir()
    return _finish(folder, [write_shard(folder, 0, samples())], None)


def make_crops(folder: Path, originals: ShardSet, person_px: int = 288) -> ShardSet:
    """The same people as crops that hrnet, and princeton's draws, can reach."""
    rule = crop_rule("hrnet", person_px, 95)
    crowd, samples_N = originals.people()

    def samples() -> Iterator[tuple[str, bytes, bytes, bytes]]:
        for row in range(crowd.count):
            part = crop_region(crowd.center[row], crowd.scale[row], WIDTH, HEIGHT, rule)
            affine = part.image_from_stored
            record = pack_record(crowd, row, part.width, part.height, affine).tobytes()
            jpeg = originals.jpeg(int(samples_N[row]))
            facts = person_json(crowd, row, MPII, part.width, part.height, affine)
            yield f"{row:09d}", record, crop_jpeg(jpeg, part, rule.quality), facts

    folder.mkdir()
    return _finish(folder, [write_shard(folder, 0, samples())], rule)


def make_many(folder: Path, people: int) -> ShardSet:
    """As many people as asked for, in full shards: the first shard's again and again, renumbered.

    25,600 people take 2.3 GB.
    """
    first = make_crops(
        folder.with_name(folder.name + "-crops"),
        make_originals(folder.with_name(folder.name + "-one"), PER_SHARD),
    )

    def samples(number: int) -> Iterator[tuple[str, bytes, bytes, bytes]]:
        for sample in range(PER_SHARD):
            row = number * PER_SHARD + sample
            record = first.record(sample).copy()
            record[0] = row
            text = json.dumps({**first.facts(sample), "row": row}).encode()
            yield f"{row:09d}", record.tobytes(), first.jpeg(sample), text

    folder.mkdir()
    shards = [
        write_shard(folder, number, samples(number)) for number in range(-(-people // PER_SHARD))
    ]
    return _finish(folder, shards, first.manifest.crop)


def first_shards(shards: ShardSet, folder: Path, people: int) -> ShardSet:
    """So many people of a larger split, or some more to fill the last shard, as a split."""
    count = -(-people // PER_SHARD)
    chosen = shards.manifest.shards[:count]
    folder.mkdir()
    for shard in chosen:
        for name in (shard.tar, shard.index):
            os.link(shards.folder / name, folder / name)
    return _finish(folder, list(chosen), shards.manifest.crop)


def _finish(folder: Path, shards: list[Shard], crop: CropRule | None) -> ShardSet:
    manifest = Manifest(
        split="train", packing="crop" if crop else "original",
        people=sum(shard.people for shard in shards), joints=MPII.joint_count, skeleton=MPII,
        shards=tuple(shards), max_width=WIDTH, max_height=HEIGHT, source={"made by": "benchmark"},
        seed=0, crop=crop,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return ShardSet(folder)


def make_people(count: int, rng: np.random.Generator) -> People:
    """People at random places, their scales spread as in MPII."""
    percent, scales = SCALE_PERCENTILES
    scale = np.interp(rng.uniform(5, 95, count), percent, scales)
    center = rng.uniform([0.3 * WIDTH, 0.4 * HEIGHT], [0.7 * WIDTH, 0.6 * HEIGHT], (count, 2))
    offsets = rng.uniform(-0.4, 0.4, (count, MPII.joint_count, 2)) * 200 * scale[:, None, None]
    marked = np.ones((count, MPII.joint_count), dtype=bool)
    number = np.arange(count)
    return People(
        images=tuple(f"{i:09d}.jpg" for i in number), index=number, person=np.zeros_like(number),
        center=center, scale=scale, normalize=20 * scale, joints=center[:, None] + offsets,
        marked=marked, visible=marked,
    )  # fmt: skip


def make_jpeg(rng: np.random.Generator) -> bytes:
    """A picture with detail at every size, as photographs have."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for level in range(1, 8):
        size = (WIDTH >> level, HEIGHT >> level)
        noise = rng.normal(0, 12 * level**0.5, (size[1], size[0], 3)).astype(np.float32)
        image += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    ok, jpeg = cv2.imencode(".jpg", (image + 128).clip(0, 255).astype(np.uint8))
    assert ok
    return jpeg.tobytes()
