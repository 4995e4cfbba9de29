"""Random baselines (arXiv 1811.11507, 5.3) as COCO result rows, to be scored like a model's.

``gt_shift`` is the paper's; ``detection_shift`` is what the original code does instead.
"""

import math
from collections.abc import Iterable

import numpy as np
from pycocotools import mask as mask_api

from ..data.plans import EvaluationPlan
from .assignment import by_pair
from .coco_scoring import Detection, GroundTruth, GroundTruthInstance, planned_pairs

_SCORES = (0.8, 1.0)


def gt_shift(
    ground_truth: GroundTruth, plan: EvaluationPlan, rng: np.random.Generator
) -> list[Detection]:
    """Ground truth of each pair at a random place, the score uniform in [0.8, 1).

    Shifts are whole pixels, uniform over the places where box and mask are fully inside the image,
    so that a mask moves exactly with its box. Classes that are absent get no detection.
    """
    return [
        _shifted_instance(instance, rng)
        for pair in sorted(planned_pairs(plan))
        for instance in ground_truth.instances(*pair)
        if not instance.is_crowd
    ]


def detection_shift(
    ground_truth: GroundTruth,
    detections: Iterable[Detection],
    plan: EvaluationPlan,
    rng: np.random.Generator,
) -> list[Detection]:
    """A model's detections, each box at a random place and the scores of a pair exchanged.

    Masks stay where they were predicted, as in the original code; ``detections`` are not changed.
    """
    groups = by_pair(detections)
    shifted = []
    for pair in sorted(planned_pairs(plan)):
        found = groups.get(pair, [])
        record = ground_truth.images[pair[0]]
        for detection, source in zip(found, rng.permutation(len(found)), strict=True):
            x, y, width, height = detection["bbox"]
            # A box that is larger than its image, by rounding, stays at its edge.
            x = rng.uniform(0, max(record["width"] - width, 0))
            y = rng.uniform(0, max(record["height"] - height, 0))
            score = found[source]["score"]
            shifted.append({**detection, "bbox": [x, y, width, height], "score": score})
    return shifted


def _shifted_instance(instance: GroundTruthInstance, rng: np.random.Generator) -> Detection:
    x, y, width, height = instance.box
    x0, y0, x1, y1 = x, y, x + width, y + height
    if instance.rle is not None:
        # Rasterized polygons reach up to a pixel over the annotated box.
        mask_x, mask_y, mask_width, mask_height = mask_api.toBbox(instance.rle)
        x0, y0 = min(x0, mask_x), min(y0, mask_y)
        x1, y1 = max(x1, mask_x + mask_width), max(y1, mask_y + mask_height)
    image_height, image_width = instance.image_size
    dx = _uniform_shift(x0, x1, image_width, rng)
    dy = _uniform_shift(y0, y1, image_height, rng)
    detection: Detection = {
        "image_id": instance.image_id,
        "category_id": instance.class_id,
        "bbox": [x + dx, y + dy, width, height],
        "score": float(rng.uniform(*_SCORES)),
    }
    if instance.rle is not None:
        detection["segmentation"] = _shifted_mask(instance.rle, dx, dy)
    return detection


def _uniform_shift(start: float, end: float, size: int, rng: np.random.Generator) -> int:
    """A whole number of pixels that keeps [start, end] inside [0, size]; 0 where there is none."""
    first, last = math.ceil(-start), math.floor(size - end)
    return int(rng.integers(first, last + 1)) if last >= first else 0


def _shifted_mask(rle: dict, dx: int, dy: int) -> dict:
    # The shift keeps the mask inside the image, so that nothing is rolled over the edge.
    mask = np.roll(mask_api.decode(rle), (dy, dx), axis=(0, 1))
    moved = mask_api.encode(np.asfortranarray(mask))
    return {"size": moved["size"], "counts": moved["counts"].decode("ascii")}
