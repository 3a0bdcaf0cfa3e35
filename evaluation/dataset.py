"""Data to evaluate on: a split of shards, or an annotation file with pictures in a folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.skeleton import Skeleton
from pipelines.annotations import People, read_annotations
from pipelines.joined_shards import with_joints_of
from pipelines.opencv_loader import LooseImages, Source
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet


class EvaluationDataset(NamedTuple):
    """People with pictures, in the annotation's order."""

    people: People
    source: Source
    samples: npt.NDArray[np.int64]
    """(N,) each person's number in the source."""
    skeleton: Skeleton
    name: str


def open_pictures_dataset(
    annotations: Path, images: Path, joints: Skeleton | None
) -> EvaluationDataset:
    """An annotation file and its pictures. joints: of the file; None: MPII's. Raises InputError."""
    people, skeleton = read_annotations(annotations, "valid", joints, images)
    source, samples = LooseImages(people, images), np.arange(people.count)
    return EvaluationDataset(people, source, samples, skeleton, str(annotations))


def open_shards_dataset(folder: Path, trained: Skeleton) -> EvaluationDataset:
    """People of a split, or of the split `valid` in a folder of splits. Raises InputError.

    trained: the network's joints. It may have more than the people, who then have no others marked.
    """
    if not (folder / MANIFEST).is_file() and (folder / "valid").is_dir():
        folder /= "valid"
    shards = with_joints_of(ShardSet(folder), trained)
    people, samples = shards.people()
    return EvaluationDataset(people, shards, samples, shards.manifest.skeleton, shards.location)
