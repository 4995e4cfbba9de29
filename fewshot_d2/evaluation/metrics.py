"""Numbers beside average precision: presence, intervals over runs, clutter and confusion.

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
    # Equal scores share the mean of their ranks, so a tie counts half.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = ranks[present].sum() - num_present * (num_present + 1) / 2
    return float(u / (num_present * num_absent))


def false_positives_per_image(
    assignments: Mapping[Pair, Assignment], threshold: float = 0.5
) -> float:
    """Wrong detections of any class that score at least ``threshold``, by image."""
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
        # Only a crowd of the class is there: neither answer would be wrong.
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
        spread = "" if self.half_width is None else f" ± {self.half_width:.1f}"
        return f"{self.mean:.1f}{spread}"


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
    """Result dicts of several plans -> one of the same form, an ``Interval`` for each number."""
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
        ap50 = 100 * float(np.mean(precision)) if precision else math.nan
        rows.append(InstanceBin(_bin_label(first, last), len(images), ap50))
    return rows


def _bin_label(first: int, last: float) -> str:
    if first == last:
        return f"{first}"
    return f"≥ {first}" if last == math.inf else f"{first}–{last}"


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
    scores: list[np.ndarray] = [np.zeros(0)]
    # Of each class only the images that have it, with the position of their detections: K classes
    # share one list of scores, and on all other images every detection is simply wrong.
    outcomes: dict[int, list[tuple[int, Assignment]]] = defaultdict(list)
    start = 0
    for image_id in images:
        detections = found.get(image_id, [])
        order = order_by_score(detections)
        ranked = [detections[i] for i in order]
        scores.append(np.array([d["score"] for d in ranked], dtype=float))
        instances = [i for c in class_ids for i in ground_truth.instances(image_id, c)]
        instances = scorable(instances, task)
        # One call for all classes; each then matches in its own columns.
        ious = pairwise_iou(ranked, instances, task)
        owner = np.array([i.class_id for i in instances])
        is_crowd = np.array([i.is_crowd for i in instances], dtype=bool)
        for class_id in np.unique(owner):
            own = owner == class_id
            matched = match_greedily(ious[:, own], is_crowd[own], 0.5)
            outcome = Assignment(order, scores[-1], matched, is_crowd[own])
            outcomes[int(class_id)].append((start, outcome))
        start += len(ranked)
    pooled = np.concatenate(scores)
    return [_pooled_ap50(pooled, outcomes[class_id]) for class_id in class_ids]


def _pooled_ap50(scores: np.ndarray, outcomes: Sequence[tuple[int, Assignment]]) -> float:
    """AP50 in [0, 1] of all scores, wrong unless an outcome (given with its position) says else."""
    hits, ignored = np.zeros((2, len(scores)), dtype=bool)
    for start, outcome in outcomes:
        place = slice(start, start + len(outcome.scores))
        hits[place], ignored[place] = outcome.hits, outcome.ignored
    num_instances = sum(outcome.num_instances for _, outcome in outcomes)
    return float(interpolated_precision(scores, hits, ignored, num_instances).mean())
