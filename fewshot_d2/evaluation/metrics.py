"""Numbers beside average precision: presence, false alarms, intervals over runs, clutter and confusion.

Pure functions; percentages are 0 to 100. Figure numbers are those of Siamese Mask R-CNN (arXiv
1811.11507).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..data.plans import EvaluationPlan
from .assignment import (
    Assignment,
    by_pair,
    interpolated_precision,
    match_greedily,
    order_by_score,
    pairwise_iou,
    precision_by_class,
)
from .coco_scoring import Detection, GroundTruth, Pair, planned_pairs, scorable

# Number of instances in the image, first and last (fig. 8; the paper does not print its own bins).
INSTANCE_BINS: tuple[tuple[int, float], ...] = ((1, 1), (2, 3), (4, 7), (8, 15), (16, math.inf))


def auroc(scores: Sequence[float] | np.ndarray, present: Sequence[bool] | np.ndarray) -> float:
    """Probability that a present class scores higher than an absent one, ties counting half.

    Args:
        scores (sequence of P): one a pair, any scale, larger = more certain. present (sequence of
            P): bool.

    Returns:
        Mann-Whitney's U / (present * absent) in [0, 1]; NaN if only one of the two kinds is there.
    """
    present = np.asarray(present, dtype=bool)
    num_present, num_absent = int(present.sum()), int((~present).sum())
    if not num_present or not num_absent:
        return math.nan
    _, inverse, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = ranks[present].sum() - num_present * (num_present + 1) / 2
    return float(u / (num_present * num_absent))


def false_positives_per_image(
    assignments: Mapping[Pair, Assignment], threshold: float = 0.5
) -> float:
    """Wrong detections that score at least ``threshold``, of all classes searched, by image; NaN without images."""
    images = {image_id for image_id, _ in assignments}
    wrong = sum(assignment.counts(threshold)[1] for assignment in assignments.values())
    return wrong / len(images) if images else math.nan


def presence_metrics(
    ground_truth: GroundTruth, assignments: Mapping[Pair, Assignment], threshold: float = 0.5
) -> dict[str, float]:
    """How well the best detection of a pair tells whether the class is in the image at all.

    Pairs that hold only a crowd are neither present nor absent and are left out.

    Args:
        ground_truth: of the plan's data set.
        assignments: of the pairs that were searched; a pair without detections scores 0.
        threshold: the score from which on a detection is an alarm.

    Returns:
        ``AUROC`` in percent, ``false_positives_per_image``, and in percent ``hit_rate`` and
        ``false_alarm_rate``: the shares of present and of absent pairs with an alarm.
    """
    scores: dict[bool, list[float]] = {True: [], False: []}
    for pair, assignment in assignments.items():
        present = ground_truth.is_present(*pair)
        if present is not None:
            scores[present].append(float(assignment.scores.max(initial=0.0)))
    labels = [True] * len(scores[True]) + [False] * len(scores[False])
    alarms = {
        kind: 100 * float(np.mean(np.array(values) >= threshold)) if values else math.nan
        for kind, values in scores.items()
    }
    return {
        "AUROC": 100 * auroc(scores[True] + scores[False], labels),
        "false_positives_per_image": false_positives_per_image(assignments, threshold),
        "hit_rate": alarms[True],
        "false_alarm_rate": alarms[False],
    }


class Interval(NamedTuple):
    """Mean of n runs and half the width of its 95 % interval, None for fewer than two."""

    mean: float
    half_width: float | None
    num_runs: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.1f}" + ("" if self.half_width is None else f" ± {self.half_width:.1f}")


def confidence_interval(values: Iterable[float]) -> Interval:
    """Mean and 1.96 s / sqrt(n), with the sample deviation s (ddof = 1); NaN values are left out.

    The original's notebooks divide by n instead of n - 1 under the root, which gives intervals
    narrower by sqrt((n - 1) / n): 11 % for five runs.
    """
    finite = np.array([v for v in values if math.isfinite(v)], dtype=float)
    if not len(finite):
        return Interval(math.nan, None, 0)
    half_width = None
    if len(finite) > 1:
        half_width = 1.96 * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    return Interval(float(finite.mean()), half_width, len(finite))


def summarize_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Result dicts of several plans -> a dict of the same form with an ``Interval`` in each number's place."""
    if not runs:
        raise ValueError("runs to be summarized must be at least one, got none")
    summary: dict[str, Any] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [run[key] for run in runs if key in run]
        if isinstance(values[0], Mapping):
            summary[key] = summarize_runs(values)
        else:
            summary[key] = confidence_interval(values)
    return summary


@dataclass(frozen=True)
class InstanceBin:
    """AP50 (percent, mean over the classes) on images with ``label`` instances of any class."""

    label: str
    num_images: int
    ap50: float


def ap50_by_instances(
    ground_truth: GroundTruth, assignments: Mapping[Pair, Assignment]
) -> list[InstanceBin]:
    """AP50 against the number of instances in the image (fig. 8); crowds are not counted.

    Args:
        ground_truth: of the plan's data set.
        assignments: of the plan's pairs, at IoU 0.5; boxes or masks.
    """
    rows = []
    for first, last in INSTANCE_BINS:
        images = {i for i, _ in assignments if first <= ground_truth.num_instances(i) <= last}
        inside = {pair: a for pair, a in assignments.items() if pair[0] in images}
        precision = list(precision_by_class(inside).values())
        label = (
            f"≥ {first}" if last == math.inf else f"{first}–{last}" if last > first else f"{first}"
        )
        ap50 = 100 * float(np.mean(precision)) if precision else math.nan
        rows.append(InstanceBin(label, len(images), ap50))
    return rows


def confusion_matrix(
    ground_truth: GroundTruth,
    detections: Iterable[Detection],
    plan: EvaluationPlan,
    task: str = "bbox",
    *,
    all_images: bool = False,
) -> np.ndarray:
    """AP50 of the detections made with references of class i, scored as class j (fig. 7).

    The paper does not say on which images; by default those where i was searched, because on others
    there are no such detections and recall would only tell how often i and j occur together.

    Args:
        ground_truth: of the plan's data set.
        detections: COCO result rows.
        plan: gives the K classes, in the order of ``plan.class_ids``, and the images.
        task: "bbox" or "segm".
        all_images: count every image of the plan in every row.

    Returns:
        ndarray[K, K]: percent; NaN where the images of row i have no instance of class j.
    """
    groups = by_pair(detections)
    searched = defaultdict(list)
    for image_id, class_id in sorted(planned_pairs(plan)):
        searched[class_id].append(image_id)
    every_image = sorted({image_id for images in searched.values() for image_id in images})
    rows = []
    for class_id in plan.class_ids:
        found = {i: groups.get((i, class_id), []) for i in searched[class_id]}
        images = every_image if all_images else searched[class_id]
        rows.append(_confusion_row(ground_truth, found, images, plan.class_ids, task))
    return 100 * np.array(rows)


def _confusion_row(
    ground_truth: GroundTruth,
    found: Mapping[int, Sequence[Detection]],
    images: Collection[int],
    class_ids: Sequence[int],
    task: str,
) -> list[float]:
    """AP50 in [0, 1] of one set of detections scored as each class in turn."""
    scores: list[np.ndarray] = []
    # Of each class only the images that have it: everywhere else each detection is simply wrong.
    outcomes: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
    num_instances: dict[int, int] = defaultdict(int)
    start = 0
    for image_id in images:
        detections = found.get(image_id, [])
        ranked = [detections[i] for i in order_by_score(detections)]
        instances = [
            instance
            for class_id in class_ids
            for instance in scorable(ground_truth.instances(image_id, class_id), task)
        ]
        ious = pairwise_iou(ranked, instances, task)
        columns = defaultdict(list)
        for column, instance in enumerate(instances):
            columns[instance.class_id].append(column)
        for class_id, of_class in columns.items():
            is_crowd = np.array([instances[c].is_crowd for c in of_class])
            matched = match_greedily(ious[:, of_class], is_crowd, 0.5)
            in_crowd = np.append(is_crowd, False)[matched]
            outcomes[class_id].append((start, (matched >= 0) & ~in_crowd, in_crowd))
            num_instances[class_id] += int((~is_crowd).sum())
        scores.append(np.array([d["score"] for d in ranked], dtype=float))
        start += len(ranked)
    pooled = np.concatenate(scores) if scores else np.zeros(0)
    row = []
    for class_id in class_ids:
        hits, ignored = np.zeros((2, start), dtype=bool)
        for first, found_here, ignored_here in outcomes[class_id]:
            hits[first : first + len(found_here)] = found_here
            ignored[first : first + len(ignored_here)] = ignored_here
        precision = interpolated_precision(pooled, hits, ignored, num_instances[class_id])
        row.append(float(precision.mean()))
    return row
