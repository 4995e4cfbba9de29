"""PASCAL VOC's average precision over the (image, class) pairs that a plan searches (OS2D spec 1.15).

Unlike COCO's: one IoU, no limit of detections, each detection looks at its best box only, and boxes marked
``difficult`` may be found or not. Of equal scores the wrong detections rank first, so that their order in the list
changes nothing. Letters: D detections and G boxes of one pair.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..data.plans import EvaluationPlan
from .assignment import by_pair
from .coco_scoring import Detection, GroundTruth, GroundTruthInstance, planned_pairs
from .pooled_ap import Entries, average_precision, eleven_point_precision, match_voc, pixel_iou


def voc_scores(
    ground_truth: GroundTruth,
    detections: Iterable[Detection],
    plan: EvaluationPlan,
    *,
    iou_threshold: float = 0.5,
    extent: float = 1.0,
) -> dict[str, float]:
    """VOC's scores of the boxes of all planned pairs.

    Args:
        ground_truth: of the plan's data set; a crowd counts as difficult.
        detections: COCO result rows; those of pairs that the plan does not search are not counted.
        plan: what is searched.
        iou_threshold: least overlap of a hit. extent: see ``pixel_iou``.

    Returns:
        In percent: ``mAP``, the mean of the classes' areas under the interpolated curve, ``mAP_11point`` of the
        eleven-point averages, ``mAP_weighted``, each class by its number of boxes, ``AP_joint``, one curve of all
        classes together, ``recall`` of all boxes, and ``AP-<class>``; then the counts ``num_classes`` with a box that
        is not difficult and ``num_boxes``. NaN where there is none.
    """
    groups = by_pair(detections)
    entries: dict[int, list[Entries]] = defaultdict(list)
    num_boxes: dict[int, int] = defaultdict(int)
    for image_id, class_id in sorted(planned_pairs(plan)):
        found = groups.get((image_id, class_id), [])
        instances = ground_truth.instances(image_id, class_id)
        entries[class_id].append(
            match_boxes(found, instances, iou_threshold=iou_threshold, extent=extent)
        )
        num_boxes[class_id] += sum(not _is_difficult(i) for i in instances)
    joined = {c: tuple(map(np.concatenate, zip(*own, strict=True))) for c, own in entries.items()}
    classes = [c for c, number in num_boxes.items() if number]
    weights = np.array([num_boxes[c] for c in classes], float)
    areas = np.array([average_precision(*joined[c], num_boxes[c]) for c in classes])
    points = np.array([eleven_point_precision(*joined[c], num_boxes[c]) for c in classes])
    # A class without a box has no curve of its own, but its detections are wrong in the joint one.
    scores, right = map(np.concatenate, zip(*joined.values(), strict=True))
    total = int(weights.sum())
    names = [ground_truth.class_names[c] for c in classes]
    return {
        "mAP": _percent(areas.mean() if len(areas) else np.nan),
        "mAP_11point": _percent(points.mean() if len(points) else np.nan),
        "mAP_weighted": _percent((areas * weights).sum() / total if total else np.nan),
        "AP_joint": _percent(average_precision(scores, right, total)),
        "recall": _percent(right.sum() / total if total else np.nan),
        **{f"AP-{name}": _percent(area) for name, area in zip(names, areas, strict=True)},
        "num_classes": float(len(classes)),
        "num_boxes": float(total),
    }


def match_boxes(
    detections: Sequence[Detection],
    instances: Sequence[GroundTruthInstance],
    *,
    iou_threshold: float = 0.5,
    extent: float = 1.0,
) -> Entries:
    """Scores and right or wrong (float32[E], bool[E]) of one pair's detections, best first; ignored ones left out."""
    found, truth = _corners(d["bbox"] for d in detections), _corners(i.box for i in instances)
    return match_voc(
        np.array([d["score"] for d in detections], float),
        pixel_iou(found, truth, extent),
        np.ones(len(instances), bool),
        difficult=np.array([_is_difficult(i) for i in instances], bool),
        iou_threshold=iou_threshold,
    )


def _corners(boxes: Iterable[Sequence[float]]) -> np.ndarray:
    """XYWH -> float[n, 4] XYXY."""
    rows = np.array(list(boxes), float).reshape(-1, 4)
    return BoxMode.convert(rows, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def _is_difficult(instance: GroundTruthInstance) -> bool:
    return instance.is_difficult or instance.is_crowd


def _percent(value: float) -> float:
    return 100 * float(value)
