"""Which detection finds which instance at one IoU: COCO's greedy rule, kept pair by pair.

COCOeval gives the official averages and forgets the pairs; figures, presence and the gallery need
them. D detections of a pair, G annotations of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_api

from ..data.plans import EvaluationPlan
from .coco_scoring import Detection, GroundTruth, GroundTruthInstance, Pair, planned_pairs, scorable

# COCO's limit of detections per image and class, and its recall thresholds.
_MAX_DETECTIONS = 100
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Assignment:
    """Outcome of one (image, class) pair, detections by descending score.

    Attributes:
        order (ndarray[D]): position of each detection in the list that was given, int.
        scores (ndarray[D]): float.
        matched (ndarray[D]): index of the annotation that the detection found, -1 = none, int.
        is_crowd (ndarray[G]): bool.
    """

    order: np.ndarray
    scores: np.ndarray
    matched: np.ndarray
    is_crowd: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """ndarray[D], bool: found an instance."""
        return (self.matched >= 0) & ~self.ignored

    @property
    def ignored(self) -> np.ndarray:
        """ndarray[D], bool: lies in a crowd, so it is neither right nor wrong."""
        # The appended entry is what index -1, no match, looks up.
        return np.append(self.is_crowd, False)[self.matched]

    @property
    def num_instances(self) -> int:
        """Annotations to be found."""
        return int((~self.is_crowd).sum())

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """(right, wrong, missed) of the detections that score at least ``threshold``."""
        shown = self.scores >= threshold
        right = int((shown & self.hits).sum())
        wrong = int((shown & ~self.hits & ~self.ignored).sum())
        return right, wrong, self.num_instances - right

    def f1(self, threshold: float) -> float:
        """Harmonic mean of precision and recall; 1 where nothing is there and nothing was found."""
        right, wrong, missed = self.counts(threshold)
        total = 2 * right + wrong + missed
        return 2 * right / total if total else 1.0


def match_greedily(ious: np.ndarray, is_crowd: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Give each detection, in order of score, the best annotation that is still free.

    Args:
        ious (ndarray[D, G]): float, detections by descending score.
        is_crowd (ndarray[G]): bool; a crowd takes any number of detections, but only those that fit
            nothing else.
        iou_threshold: least overlap of a match.

    Returns:
        ndarray[D]: index of the annotation or -1, int.
    """
    matched = np.full(len(ious), -1)
    free = ~is_crowd
    enough = ious >= min(iou_threshold, 1 - 1e-10)
    # Most detections overlap nothing enough; only the others need a Python step.
    for detection in np.flatnonzero(enough.any(axis=1)):
        # A crowd is the last resort, however large its overlap.
        for candidates in (enough[detection] & free, enough[detection] & is_crowd):
            if candidates.any():
                # Of equal overlaps the last one, as COCOeval has it.
                overlaps = np.where(candidates, ious[detection], -1.0)[::-1]
                matched[detection] = len(overlaps) - 1 - int(overlaps.argmax())
                free[matched[detection]] = False
                break
    return matched


def order_by_score(detections: Sequence[Detection]) -> np.ndarray:
    """Positions of a pair's best 100 detections, the best first; equal scores keep their order."""
    scores = np.array([d["score"] for d in detections], dtype=float)
    return np.argsort(-scores, kind="stable")[:_MAX_DETECTIONS]


def pairwise_iou(
    detections: Sequence[Detection], instances: Sequence[GroundTruthInstance], task: str
) -> np.ndarray:
    """IoU of boxes or masks, ndarray[D, G]; of a crowd the share of the detection inside it."""
    if not detections or not instances:
        return np.zeros((len(detections), len(instances)))
    is_crowd = [int(i.is_crowd) for i in instances]
    if task == "segm":
        masks = [d["segmentation"] for d in detections]
        return np.asarray(mask_api.iou(masks, [i.rle for i in instances], is_crowd))
    boxes = np.array([d["bbox"] for d in detections], dtype=float)
    return np.asarray(mask_api.iou(boxes, np.array([i.box for i in instances], float), is_crowd))


def by_pair(detections: Iterable[Detection]) -> dict[Pair, list[Detection]]:
    """Detections of each (image id, class id), in the order given."""
    groups: dict[Pair, list[Detection]] = defaultdict(list)
    for detection in detections:
        groups[detection["image_id"], detection["category_id"]].append(detection)
    return groups


def assign_pairs(
    ground_truth: GroundTruth,
    detections: Iterable[Detection],
    plan: EvaluationPlan,
    task: str = "bbox",
    *,
    iou_threshold: float = 0.5,
) -> dict[Pair, Assignment]:
    """Assign the detections of every pair of a plan; pairs by ascending image and class."""
    groups = by_pair(detections)
    assignments = {}
    for pair in sorted(planned_pairs(plan)):
        found = groups.get(pair, [])
        instances = scorable(ground_truth.instances(*pair), task)
        order = order_by_score(found)
        ranked = [found[i] for i in order]
        is_crowd = np.array([i.is_crowd for i in instances], dtype=bool)
        ious = pairwise_iou(ranked, instances, task)
        assignments[pair] = Assignment(
            order=order,
            scores=np.array([d["score"] for d in ranked], dtype=float),
            matched=match_greedily(ious, is_crowd, iou_threshold),
            is_crowd=is_crowd,
        )
    return assignments


def interpolated_precision(
    scores: np.ndarray, hits: np.ndarray, ignored: np.ndarray, num_instances: int
) -> np.ndarray:
    """COCO's precision at the recalls 0, 0.01, ..., 1; its mean is the average precision.

    Args:
        scores (ndarray[D]): float, any order. hits, ignored (ndarray[D]): bool.
        num_instances: annotations to be found.

    Returns:
        ndarray[101]: in [0, 1]; NaN where there is nothing to be found.
    """
    if num_instances == 0:
        return np.full(len(_RECALLS), np.nan)
    order = np.argsort(-scores, kind="stable")
    order = order[~ignored[order]]
    right = np.cumsum(hits[order])
    precision = right / np.arange(1, len(order) + 1)
    # Precision at a recall is the best one at that recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(right / num_instances, _RECALLS, side="left")
    # A recall that is never reached looks up the appended zero.
    return np.append(envelope, 0.0)[reached]


def precision_by_class(assignments: Mapping[Pair, Assignment]) -> dict[int, np.ndarray]:
    """Interpolated precision, ndarray[101], over all images of each class that has an instance."""
    groups: dict[int, list[Assignment]] = defaultdict(list)
    for (_, class_id), assignment in assignments.items():
        groups[class_id].append(assignment)
    return {
        class_id: interpolated_precision(
            np.concatenate([a.scores for a in group]),
            np.concatenate([a.hits for a in group]),
            np.concatenate([a.ignored for a in group]),
            num_instances,
        )
        for class_id, group in sorted(groups.items())
        if (num_instances := sum(a.num_instances for a in group))
    }


def best_threshold(assignments: Mapping[Pair, Assignment]) -> float:
    """The least score of the detections that together have the best F1; 0.5 if none is right."""
    scores = np.concatenate([a.scores[~a.ignored] for a in assignments.values()])
    hits = np.concatenate([a.hits[~a.ignored] for a in assignments.values()])
    if not hits.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    num_instances = sum(a.num_instances for a in assignments.values())
    # 2 right / (2 right + wrong + missed), where right + wrong = shown and right + missed = all
    # instances.
    f1 = 2 * np.cumsum(hits[order]) / (np.arange(1, len(order) + 1) + num_instances)
    return float(scores[order][f1.argmax()])
