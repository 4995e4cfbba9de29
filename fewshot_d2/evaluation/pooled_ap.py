"""The average precision of episodic benchmarks: detections of many images, classes and episodes in one list.

RepMet's matching forgives duplicates, and its "mAP" is one AP over all entries; OS2D takes the mean over episodes of
the same name. Both and VOC's rules are here, so that a number can say which it is (RepMet spec 3.4). Letters: D
detections of one class in one image, G ground-truth boxes of all classes of the episode there.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

Entries = tuple[np.ndarray, np.ndarray]


def pixel_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes whose last row and column belong to them (VOC's + 1).

    Args:
        boxes (float[D, 4]), others (float[G, 4]): XYXY in pixels.

    Returns:
        float[D, G].
    """
    first, last = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[None, :, 2:]),
    )
    intersection = (last - first + 1).clip(min=0).prod(axis=2)
    areas = [(b[:, 2:] - b[:, :2] + 1).prod(axis=1) for b in (boxes, others)]
    return intersection / (areas[0][:, None] + areas[1] - intersection)


def match_official(scores: np.ndarray, overlaps: np.ndarray, of_class: np.ndarray) -> Entries:
    """RepMet's entries: one a ground truth that is hit, and one a detection on background.

    A ground truth of the class gives its best-scored hit as right; one of another class gives the best of the
    detections on it, that hit none of the class, as wrong. Duplicates and further wrong hits are dropped.

    Args:
        scores (float[D]), overlaps (float[D, G]): a hit has an IoU of at least 0.5.
        of_class (bool[G]): whether a ground truth is of the class that was searched.

    Returns:
        float32[E] scores and bool[E], whether each is right.
    """
    hits = overlaps >= 0.5
    right = hits[:, of_class]
    wrong = hits[:, ~of_class] & ~right.any(axis=1, keepdims=True)
    background = scores[~hits.any(axis=1)]
    best = [_best_scores(scores, matrix) for matrix in (right, wrong)]
    found = np.concatenate([best[0], best[1], background]).astype(np.float32)
    return found, np.arange(len(found)) < len(best[0])


def _best_scores(scores: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Highest score on each ground truth (column) that is hit."""
    hits = hits[:, hits.any(axis=0)]
    return np.where(hits, scores[:, None], -np.inf).max(axis=0, initial=-np.inf)


def match_voc(scores: np.ndarray, overlaps: np.ndarray, of_class: np.ndarray) -> Entries:
    """VOC's entries: each detection is right if its best ground truth of the class is hit for the first time.

    Arguments and result as of ``match_official``, best score first.
    """
    order = np.argsort(-scores, kind="stable")
    right = np.zeros(len(scores), bool)
    if of_class.any():
        own = overlaps[order][:, of_class]
        target, hit = own.argmax(axis=1), own.max(axis=1) >= 0.5
        places = np.flatnonzero(hit)
        _, first = np.unique(target[places], return_index=True)
        right[places[first]] = True
    return scores[order].astype(np.float32), right


MATCHINGS: dict[str, Callable[..., Entries]] = {"official": match_official, "voc": match_voc}


def average_precision(scores: np.ndarray, right: np.ndarray, num_truth: int) -> float:
    """Area under the monotone envelope of precision over recall (VOC 2010 and later).

    Args:
        scores (float[E]), right (bool[E]): in any order; equal scores keep it.
        num_truth: ground truths in all.

    Returns:
        Between 0 and 1; NaN without ground truth.
    """
    if not num_truth:
        return float("nan")
    ranked = right[np.argsort(-scores, kind="stable")]
    found = np.flatnonzero(ranked)
    # Precision matters only where recall rises; the envelope is the best from there on.
    precision = np.arange(1, len(found) + 1) / (found + 1)
    return float(np.maximum.accumulate(precision[::-1]).sum() / num_truth)


@dataclass
class PooledPrecision:
    """Gathers entries image by image: five bytes each, so that tens of millions fit in memory.

    Attributes:
        matching: key of ``MATCHINGS``.
    """

    matching: str = "official"
    _entries: dict[tuple[Hashable, int], list[Entries]] = field(default_factory=dict)
    _truths: dict[tuple[Hashable, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {sorted(MATCHINGS)}, got {self.matching!r}")

    def add(
        self,
        episode: Hashable,
        class_id: int,
        *,
        boxes: np.ndarray,
        scores: np.ndarray,
        truth_boxes: np.ndarray,
        truth_classes: np.ndarray,
    ) -> None:
        """Match one class's detections in one image.

        Args:
            episode, class_id: what the reducers group by.
            boxes (float[D, 4]), scores (float[D]): detections of the class, XYXY in pixels.
            truth_boxes (float[G, 4]), truth_classes (int[G]): of all classes of the episode.

        Raises:
            ValueError: counts that differ, or a score that is not a number.
        """
        if len(boxes) != len(scores) or len(truth_boxes) != len(truth_classes):
            raise ValueError(
                f"each box must have a score and each truth a class, got {len(boxes)} boxes, "
                f"{len(scores)} scores, {len(truth_boxes)} truths, {len(truth_classes)} classes"
            )
        if np.isnan(scores).any():
            raise ValueError(f"scores must be numbers, got NaN in episode {episode!r}")
        of_class = np.asarray(truth_classes) == class_id
        key = episode, class_id
        self._truths[key] = self._truths.get(key, 0) + int(of_class.sum())
        overlaps = pixel_iou(boxes.reshape(-1, 4), truth_boxes.reshape(-1, 4))
        entries = MATCHINGS[self.matching](scores, overlaps, of_class)
        self._entries.setdefault(key, []).append(entries)

    def joint(self) -> float:
        """One AP over all entries (RepMet)."""
        return self._precision(list(self._truths))

    def per_episode_mean(self) -> float:
        """Mean over episodes of the AP over their entries (OS2D)."""
        return self._mean_over(0)

    def per_class_mean(self) -> float:
        """Mean over classes of the AP over their entries (VOC, COCO)."""
        return self._mean_over(1)

    def _mean_over(self, position: int) -> float:
        groups: dict[Hashable, list[tuple[Hashable, int]]] = {}
        for key in self._truths:
            groups.setdefault(key[position], []).append(key)
        values = [self._precision(keys) for keys in groups.values()]
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else float("nan")

    def _precision(self, keys: list[tuple[Hashable, int]]) -> float:
        parts = [part for key in keys for part in self._entries[key]]
        if not parts:
            return float("nan")
        scores, right = (np.concatenate(column) for column in zip(*parts, strict=True))
        return average_precision(scores, right, sum(self._truths[key] for key in keys))
