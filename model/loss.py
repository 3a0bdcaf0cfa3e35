"""The training loss: mean squared error of every stack's heatmaps, in float32."""

import torch
from torch import Tensor
from torch.nn import functional


def stack_losses(
    heat_NSJHW: Tensor, target_NJHW: Tensor, counts_NJ: Tensor, foreground: float = 0.0
) -> Tensor:
    """(S,) mean over people, joints and pixels of (prediction - target)^2, one per stack.

    The loss to minimise is their mean: intermediate supervision, every stack weighs the same
    (princeton-vl/pytorch_stacked_hourglass). counts_NJ: which joints' maps are in the mean: all
    but the ignored ones (princeton's rule), or those with a target (HRNet's). foreground: the
    error of a pixel is multiplied by 1 + foreground x its target (the idea of the weighted loss map
    of Wang, Bo, Li, Adaptive Wing Loss, ICCV 2019).
    """
    target_N1JHW = target_NJHW[:, None].float()
    target_NSJHW = target_N1JHW.expand_as(heat_NSJHW)
    error_NSJHW = functional.mse_loss(heat_NSJHW.float(), target_NSJHW, reduction="none")
    if foreground:
        error_NSJHW = error_NSJHW * (1 + foreground * target_N1JHW)
    error_NSJ, weight_N1J = error_NSJHW.mean(dim=(3, 4)), counts_NJ[:, None].float()
    return (error_NSJ * weight_N1J).sum(dim=(0, 2)) / weight_N1J.sum().clamp_min(1)


def peak_height(heat_NJHW: Tensor, has_target_NJ: Tensor) -> Tensor:
    """Mean of the highest pixel over joints with a target; near 0 if all is predicted as zero."""
    peaks_NJ = heat_NJHW.float().amax(dim=(2, 3))
    weight_NJ = has_target_NJ.to(peaks_NJ)
    return (peaks_NJ * weight_NJ).sum() / weight_NJ.sum().clamp_min(1)


def pck(joints_NJ2: Tensor, target_NJ2: Tensor, has_target_NJ: Tensor, radius_px: float) -> Tensor:
    """Share of joints with a target that lie within radius_px of it (heatmap px)."""
    near_NJ = torch.linalg.vector_norm(joints_NJ2 - target_NJ2, dim=-1) < radius_px
    return (near_NJ & has_target_NJ).sum() / has_target_NJ.sum().clamp_min(1)
