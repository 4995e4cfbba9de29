"""Support images of RepMet: whole pictures with the boxes of their examples, and the ROIs that stand for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from ...structures import Support, SupportSet
from ...transforms import ResizeByRule

SUPPORT_ROIS = ("best_iou", "all_iou", "gt_box")


@dataclass
class SupportImage:
    """One picture with B examples.

    Attributes:
        image (Tensor[3, H, W]): uint8, resized as a query is, in the detector's channel order.
        boxes (Tensor[B, 4]): XYXY, absolute pixels of ``image``.
        rows (Tensor[B]): int64, the class of each among the classes of all support sets, one after another.
    """

    image: Tensor
    boxes: Tensor
    rows: Tensor


def support_images(
    support_sets: Sequence[SupportSet], resize: ResizeByRule, input_format: str
) -> list[SupportImage]:
    """Resize the pictures of the positive examples, each picture once however many examples it holds."""
    classes = [shots for support_set in support_sets for shots in support_set.positives()]
    pictures: dict[tuple, list[tuple[Support, int]]] = {}
    for row, shots in enumerate(classes):
        for shot in shots:
            key = shot.image_size, shot.image.numpy().tobytes()
            pictures.setdefault(key, []).append((shot, row))
    return [_resized(examples, resize, input_format) for examples in pictures.values()]


def _resized(
    examples: list[tuple[Support, int]], resize: ResizeByRule, input_format: str
) -> SupportImage:
    pixels = examples[0][0].image.permute(1, 2, 0).numpy()
    transform = resize.get_transform(pixels)
    image = torch.from_numpy(np.array(transform.apply_image(pixels))).permute(2, 0, 1)
    boxes = torch.stack([shot.region for shot, _ in examples])
    return SupportImage(
        image=image.flip(0) if input_format == "BGR" else image,
        boxes=torch.from_numpy(transform.apply_box(boxes.numpy())).float(),
        rows=torch.tensor([row for _, row in examples]),
    )


def chosen_rois(
    proposals: Tensor, picture: SupportImage, rule: str, min_iou: float
) -> tuple[Tensor, Tensor, int]:
    """The ROIs that stand for the examples of a picture (spec 2.1).

    Args:
        proposals (Tensor[R, 4]): of the picture. rule: one of ``SUPPORT_ROIS``. min_iou: of a proposal with a box.

    Returns:
        Tensor[C, 4] boxes, Tensor[C] the class row of each, and how many examples no proposal covers: those are
        represented by their own box.
    """
    boxes, rows = picture.boxes.to(proposals), picture.rows.to(proposals.device)
    if rule == "gt_box" or not len(proposals):
        return boxes, rows, 0 if rule == "gt_box" else len(boxes)
    overlaps = pairwise_iou(Boxes(boxes), Boxes(proposals))
    is_covering = overlaps >= min_iou
    covered = is_covering.any(dim=1)
    if rule == "best_iou":
        best = torch.where(covered[:, None], proposals[overlaps.argmax(dim=1)], boxes)
        return best, rows, int((~covered).sum())
    example, proposal = is_covering.nonzero(as_tuple=True)
    chosen = torch.cat([proposals[proposal], boxes[~covered]])
    return chosen, torch.cat([rows[example], rows[~covered]]), int((~covered).sum())
