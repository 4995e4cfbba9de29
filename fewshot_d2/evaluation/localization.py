"""Scores of cluttered Omniglot: mask IoU and localisation accuracy of one predicted mask a scene.

Letters: N scenes, H,W pixels. Pure functions of bool masks in one frame; what the prediction is (a
union of instances, a thresholded map) is the caller's business.
"""

import torch
from torch import Tensor


def mask_iou_per_scene(predicted: Tensor, target: Tensor) -> Tensor:
    """IoU of each predicted mask with its target; 1 where both are empty.

    Args:
        predicted (Tensor[N, H, W]): bool.
        target (Tensor[N, H, W]): bool.

    Returns:
        Tensor[N]: float32 in [0, 1].
    """
    _check_masks(predicted, target)
    intersection = (predicted & target).sum(dim=(1, 2))
    union = (predicted | target).sum(dim=(1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def centres_of_mass(masks: Tensor) -> Tensor:
    """Mean position of each mask's pixels.

    Args:
        masks (Tensor[N, H, W]): bool.

    Returns:
        Tensor[N, 2]: float32 xy in pixels, NaN for an empty mask.
    """
    count = masks.sum(dim=(1, 2))
    x = torch.arange(masks.shape[2], device=masks.device, dtype=torch.float32)
    y = torch.arange(masks.shape[1], device=masks.device, dtype=torch.float32)
    sums = torch.stack(
        [(masks.sum(dim=1) * x).sum(dim=1), (masks.sum(dim=2) * y).sum(dim=1)], dim=1
    )
    return sums / count[:, None]


def centre_distances(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance of the two centres of mass; 0 where both masks are empty, infinite where one is.

    Args:
        predicted (Tensor[N, H, W]): bool.
        target (Tensor[N, H, W]): bool.

    Returns:
        Tensor[N]: float32, pixels.
    """
    _check_masks(predicted, target)
    distance = (centres_of_mass(predicted) - centres_of_mass(target)).norm(dim=1)
    both_empty = ~predicted.flatten(1).any(dim=1) & ~target.flatten(1).any(dim=1)
    return distance.nan_to_num(nan=torch.inf).masked_fill(both_empty, 0.0)


def localization_scores(
    predicted: Tensor, target: Tensor, max_distance: float = 5.0
) -> dict[str, float]:
    """Mean IoU and share of scenes whose centres of mass are closer than ``max_distance`` pixels.

    Args:
        predicted (Tensor[N, H, W]): bool.
        target (Tensor[N, H, W]): bool.
        max_distance: pixels, exclusive.

    Returns:
        ``mask_iou`` and ``localization_accuracy`` in [0, 1]; NaN where there is no scene.
    """
    close = centre_distances(predicted, target) < max_distance
    return {
        "mask_iou": float(mask_iou_per_scene(predicted, target).mean()),
        "localization_accuracy": float(close.float().mean()),
    }


def _check_masks(predicted: Tensor, target: Tensor) -> None:
    for name, masks in {"predicted": predicted, "target": target}.items():
        if masks.dtype != torch.bool or masks.dim() != 3:
            raise ValueError(
                f"{name} masks must be bool (N, H, W), got {masks.dtype} {tuple(masks.shape)}"
            )
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted masks must have the targets' shape {tuple(target.shape)}, "
            f"got {tuple(predicted.shape)}"
        )
