"""COCO's AP and AR, computed by pycocotools from object keypoint similarities (OKS).

cocodataset.org/#keypoints-eval defines both.
"""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from configs.skeleton import BOX_SCALE, PIXELS_PER_SCALE, Skeleton
from evaluation.pckh import Floats
from evaluation.predictions import as_coco
from pipelines.annotations import People

NAMES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
"""M, L: of people with areas of 32^2 to 96^2 px^2, and of larger ones."""


def average_precision(
    keypoints_NJ2: Floats, scores_N: Floats | None, people: People, skeleton: Skeleton
) -> dict[str, float | None] | None:
    """The ten numbers of NAMES in 0..1, None where there are no such people.

    keypoints_NJ2: image px, one prediction a person. scores_N: rank the predictions; None: equal.
    All people are of one category. Returns None without sigmas in the skeleton or areas in the
    annotation.
    """
    if people.area is None or not skeleton.sigmas:
        return None
    # Not at the top: without this package, training and data without areas still work.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    scores_N1 = np.ones((people.count, 1)) if scores_N is None else scores_N[:, None]
    scores_NJ = np.broadcast_to(scores_N1, people.marked.shape)
    truth = COCO()
    truth.dataset["images"] = [{"id": picture} for picture in set(people.index.tolist())]
    truth.dataset["categories"] = [{"id": 1}]
    truth.dataset["annotations"] = _annotations(people)
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        found = truth.loadRes(as_coco(people, keypoints_NJ2, scores_NJ))
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats.tolist()
    return {name: None if s < 0 else s for name, s in zip(NAMES, stats, strict=True)}


def _annotations(people: People) -> list[dict[str, Any]]:
    """COCO's annotations of the people and, once a picture, of those whom its metric ignores."""
    assert people.area is not None and people.ignored is not None
    joints_NJ3 = np.concatenate([people.joints, people.marked[..., None]], axis=-1)
    side_N1 = PIXELS_PER_SCALE / BOX_SCALE * people.scale[:, None]
    box_N4 = np.concatenate([people.center - side_N1 / 2, side_N1, side_N1], axis=1)
    pictures = people.index.tolist()
    rows = [*zip(pictures, joints_NJ3, box_N4, people.area, [0] * people.count, strict=True)]
    for picture, regions in dict(zip(pictures, people.ignored, strict=True)).items():
        nobody = np.zeros_like(joints_NJ3[0])
        rows += [(picture, nobody, box, area, crowd) for *box, area, crowd in regions]
    return [
        {
            "id": number,
            "image_id": picture,
            "category_id": 1,
            "keypoints": joints_J3.ravel(),
            "num_keypoints": joints_J3[:, 2].sum(),
            "bbox": box,
            "area": area,
            "iscrowd": crowd,
        }
        for number, (picture, joints_J3, box, area, crowd) in enumerate(rows, start=1)
    ]
