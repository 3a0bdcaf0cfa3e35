"""PCK of the validation split during training, through the run's own loader."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from common.distributed import DistributedContext, loader_workers
from configs.schema import Config
from evaluation import pckh
from evaluation.inference import Predictions, predict_distributed
from evaluation.visualize import PredictedPeople, draw_people
from pipelines.codec import Codec
from pipelines.opencv_loader import RawBatch
from pipelines.shards import ShardSet

PICTURE_PEOPLE = 12


class Validator:
    """Predicts the people of the validation split on all ranks."""

    def __init__(self, shards: ShardSet, codec: Codec, config: Config, dist: DistributedContext):
        """shards: the validation split, of which eval.people are used, of each data set."""
        self.shards, self.codec, self.config, self.dist = shards, codec, config, dist
        people, samples = shards.people()
        self.sets = {name: np.isin(samples, own) for name, own in shards.samples_of_set.items()}
        rows = [np.flatnonzero(own)[: config.eval.people or None] for own in self.sets.values()]
        chosen = np.concatenate(rows)
        self.sets = {name: own[chosen] for name, own in self.sets.items()}
        self.people, self.samples = people.select(chosen), samples[chosen]
        self.found: Predictions
        """Of the last validation."""

    def run(
        self,
        network: nn.Module,
        watch: Callable[[Iterable[RawBatch]], Iterable[RawBatch]] = iter,
    ) -> dict[str, Any]:
        """Returns pckh.summary; `sets`, the pooled PCK@0.5 of each of several data sets; and
        `peak`, the mean height of the heatmaps' peaks. Arguments as for predict_distributed.
        """
        self.found = predict_distributed(
            network,
            self.shards,
            self.samples,
            self.codec,
            self.dist,
            loader=self.config.data.loader,
            batch_size=self.config.eval.batch_size,
            workers=loader_workers(self.config.data.workers, self.dist.device),
            flip=self.config.eval.flip,
            watch=watch,
        )
        result = pckh.summary(self.found.keypoints_NJ2, self.people, self.codec.skeleton)
        errors_NJ = pckh.normalized_errors(self.found.keypoints_NJ2, self.people)
        rates = {
            name: np.nan_to_num(pckh.score(errors_NJ[own], self.codec.skeleton, 0.5).pooled)
            for name, own in self.sets.items()
        }
        sets = rates if len(rates) > 1 else {}
        return {**result, "peak": float(self.found.scores_NJ.mean()), "sets": sets}

    def picture(self) -> npt.NDArray[np.uint8]:
        """(H, W, 3) RGB: the last predictions for a few people, always the same people."""
        keypoints_NJ2, skeleton = self.found.keypoints_NJ2, self.codec.skeleton
        data = PredictedPeople(self.people, keypoints_NJ2, skeleton, self.shards, self.samples)
        return draw_people(data, PICTURE_PEOPLE)[..., ::-1]
