"""Whom to evaluate on: a split of shards, or an annotation file with loose pictures."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.skeleton import Skeleton, require_same_joints
from pipelines.annotations import People, read_annotations
from pipelines.opencv_loader import LooseImages, Source
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet


class EvaluationDataset(NamedTuple):
    """People with pictures, in the annotation's order."""

    people: People
    source: Source
    samples: npt.NDArray[np.int64]
    """(N,) number in the source of each person."""
    skeleton: Skeleton
    train: People | None
    """The people of the training split, if it is at hand, for the mean pose."""
    name: str


def open_pictures_dataset(
    annotations: Path, images: Path, joints: Skeleton | None
) -> EvaluationDataset:
    """People of an annotation file, pictures in a folder. joints: of it, or MPII's. InputError."""
    people, skeleton = read_annotations(annotations, "valid", joints)
    source = LooseImages(people, images)
    return EvaluationDataset(
        people, source, np.arange(people.count), skeleton, None, str(annotations)
    )


def split_to_evaluate(folder: Path) -> Path:
    """The folder itself if it is a split, or the split `valid` in a folder of splits."""
    if not (folder / MANIFEST).is_file() and (folder / "valid").is_dir():
        return folder / "valid"
    return folder


def open_shards_dataset(folder: Path) -> EvaluationDataset:
    """People of a split, or of the split `valid` in a folder of splits. Raises InputError."""
    folder = split_to_evaluate(folder)
    shards = ShardSet(folder)
    people, samples = shards.people()
    skeleton = shards.manifest.skeleton
    train = _people_to_train_on(folder.parent / "train", skeleton, folder)
    return EvaluationDataset(people, shards, samples, skeleton, train, str(folder))


def _people_to_train_on(beside: Path, skeleton: Skeleton, folder: Path) -> People | None:
    """Those of the training split, if there is one; a damaged one is said, and costs no more."""
    if not (beside / MANIFEST).is_file():
        return None
    try:
        train = ShardSet(beside)
        people = train.people()[0]
    except InputError as error:
        print(f"no mean pose, for the training split is damaged: {error.where}: {error.found}",
              file=sys.stderr)  # fmt: skip
        return None
    require_same_joints(train.manifest.skeleton, skeleton, beside, folder)
    return people
