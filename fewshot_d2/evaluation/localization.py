"""Scores of cluttered Omniglot: mask IoU and localisation accuracy of one predicted mask a scene.

Letters: N scenes, H,W pixels. Pure functions of bool masks in one frame; what the prediction is (a
union of instances, a thresholded map) is the caller's business.
"""

from collections.abc import Iterable

import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from ..data.plans import EvaluationPlan
from .coco_scoring import Detection, GroundTruth, planned_pairs


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


def single_target_scores(
    ground_truth: GroundTruth, detections: Iterable[Detection], plan: EvaluationPlan
) -> dict[str, float]:
    """``localization_scores`` in percent of the best-scored detection of each planned pair.

    Args:
        ground_truth: of the plan's data set; all images of one size, one instance a pair.
        detections: COCO result rows with masks. A pair without any has an empty predicted mask.
        plan: what was searched.
    """
    best: dict[tuple[int, int], Detection] = {}
    for row in detections:
        pair = row["image_id"], row["category_id"]
        if pair not in best or row["score"] > best[pair]["score"]:
            best[pair] = row
    predicted, target = [], []
    for pair in sorted(planned_pairs(plan)):
        instances = ground_truth.instances(*pair)
        if len(instances) != 1 or instances[0].rle is None:
            raise ValueError(
                f"image {pair[0]} must have one instance with a mask of class {pair[1]} for the "
                f"single-target protocol, got {len(instances)}"
            )
        mask = torch.from_numpy(coco_mask.decode(instances[0].rle)).bool()
        target.append(mask)
        found = best.get(pair)
        segmentation = coco_mask.decode(found["segmentation"]) if found else None
        predicted.append(mask & False if found is None else torch.from_numpy(segmentation).bool())
    scores = localization_scores(torch.stack(predicted), torch.stack(target))
    return {name: 100 * value for name, value in scores.items()}


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
