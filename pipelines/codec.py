"""Encodes a person as a crop and target heatmaps, and decodes heatmaps into joints."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from configs.schema import DataConfig, HeatmapsConfig, RuleName
from configs.skeleton import Skeleton
from pipelines import heatmaps, princeton
from pipelines.augment import Preset, constant_on_device, preset_of
from pipelines.geometry import STRIDE
from pipelines.shard_format import Records


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The crop, joint and heatmap rules of a network, the same in both directions.

    Joints follow princeton's rules if both its crop and its heatmap rule are used, else the affine
    of the crop's pixels. Axes: N person, J joint, H row, W column.
    """

    preset: Preset  # augmentation, and whether the crop is princeton's
    rule: RuleName
    sigma: float  # heatmap px
    input_px: int  # side of the crop
    skeleton: Skeleton

    @property
    def heat_px(self) -> int:
        """Side of a heatmap, px."""
        return self.input_px // STRIDE

    @property
    def _is_princeton(self) -> bool:
        return self.preset.princeton_crop and self.rule == "princeton"

    def heat_joints(
        self, records: Records, input_from_image_N23: torch.Tensor, draws_ND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Annotated joints in heatmap px (N, J, 2), and which of them have a target (N, J) bool.

        Left and right joints are swapped in mirrored crops.
        """
        flip_indices = constant_on_device(self.skeleton.flip_indices, torch.int64, draws_ND.device)
        if self._is_princeton:
            return princeton.heat_joints(records, draws_ND, flip_indices, self.input_px)
        flip_N = draws_ND[:, 2] > 0
        return heatmaps.heat_joints(records, input_from_image_N23, flip_N, flip_indices, self.rule)

    def ignored_joints(self, records: Records, draws_ND: torch.Tensor) -> torch.Tensor:
        """(N, J) bool: which joints of the crops the loss leaves out (`Records.ignored_NJ`)."""
        flip_indices = constant_on_device(self.skeleton.flip_indices, torch.int64, draws_ND.device)
        ignored = records.ignored_NJ
        return torch.where(draws_ND[:, 2:3] > 0, ignored[:, flip_indices], ignored)

    def render(self, joints_NJ2: torch.Tensor, has_target_NJ: torch.Tensor) -> torch.Tensor:
        """(N, J, H, W) float32 target heatmaps. joints_NJ2: heatmap px."""
        return heatmaps.render(joints_NJ2, has_target_NJ, self.heat_px, self.rule, self.sigma)

    def decode(self, heat_NJHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Joints (N, J, 2) float32 heatmap px, and scores (N, J): the heights of the peaks."""
        return heatmaps.decode(heat_NJHW, self.rule)

    def image_joints(
        self, joints_NJ2: torch.Tensor, records: Records, input_from_image_N23: torch.Tensor
    ) -> npt.NDArray[np.float64]:
        """Transform decoded joints, heatmap px -> image px (N, J, 2). records: of numpy arrays."""
        joints = joints_NJ2.double().cpu().numpy()
        if self._is_princeton:
            return princeton.image_joints(joints, records, self.input_px)
        matrices = input_from_image_N23.double().cpu().numpy()
        return heatmaps.image_joints(joints, matrices, self.rule)


def codec_of(data: DataConfig, heat: HeatmapsConfig, skeleton: Skeleton) -> Codec:
    """The Codec that a config describes."""
    return Codec(
        preset=preset_of(data.preset, data.mirror),
        rule=heat.rule,
        sigma=heat.sigma,
        input_px=data.input_px,
        skeleton=skeleton,
    )
