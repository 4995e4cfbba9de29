"""The average precision of episodic benchmarks: detections of many images, classes and episodes in one list.

RepMet's matching forgives duplicates, and its "mAP" is one AP over all entries; OS2D takes the mean over episodes of
the same name. Both and VOC's rules are here, so that a number can say which it is (RepMet spec 3.4). Letters: D
detections of one class in one image, G ground-truth boxes of all classes of the episode there.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

Entries = tuple[np.ndarray, np.ndarray]
Key = tuple[Hashable, int]
# Groups of episodes that the jackknife leaves out in turn.
_NUM_FOLDS = 20


def pixel_iou(boxes: np.ndarray, others: np.ndarray, extent: float = 1.0) -> np.ndarray:
    """IoU of boxes whose last row and column belong to them (VOC's + 1).

    Args:
        boxes (float[D, 4]), others (float[G, 4]): XYXY in pixels.
        extent: how much a box is larger than the difference of its corners; 0 for the ordinary IoU.

    Returns:
        float[D, G].
    """
    first, last = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[None, :, 2:]),
    )
    intersection = (last - first + extent).clip(min=0).prod(axis=2)
    areas = [(b[:, 2:] - b[:, :2] + extent).prod(axis=1) for b in (boxes, others)]
    union = areas[0][:, None] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union, float), where=union > 0)


def in_square(boxes: np.ndarray, image_size: tuple[int, int], side: int) -> np.ndarray:
    """Boxes as they are in a square that the image is stretched to, cut to whole pixels (SILCO spec A9).

    Args:
        boxes (float[D, 4]): XYXY in pixels of the image, ending behind the last one. image_size: its (height, width).
        side: of the square, in pixels.

    Returns:
        float[D, 4]: whole numbers; the last row and column belong to the box, as ``pixel_iou`` has it.
    """
    height, width = image_size
    return np.trunc(boxes * side / np.array([width, height, width, height]))


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


def match_voc(
    scores: np.ndarray,
    overlaps: np.ndarray,
    of_class: np.ndarray,
    *,
    difficult: np.ndarray | None = None,
    iou_threshold: float = 0.5,
) -> Entries:
    """VOC's entries: each detection is right if its best ground truth of the class is hit for the first time.

    Arguments and result as of ``match_official``, best score first. A detection whose best ground truth is
    ``difficult`` (bool[G], default none) and hit is neither right nor wrong: it is left out.
    """
    order = np.argsort(-scores, kind="stable")
    right, ignored = np.zeros((2, len(scores)), bool)
    if of_class.any():
        own = overlaps[order][:, of_class]
        target, hit = own.argmax(axis=1), own.max(axis=1) >= iou_threshold
        places = np.flatnonzero(hit)
        _, first = np.unique(target[places], return_index=True)
        right[places[first]] = True
        if difficult is not None:
            ignored = hit & difficult[of_class][target]
    return scores[order][~ignored].astype(np.float32), right[~ignored]


MATCHINGS: dict[str, Callable[..., Entries]] = {"official": match_official, "voc": match_voc}


def average_precision(scores: np.ndarray, right: np.ndarray, num_truth: int) -> float:
    """Area under the monotone envelope of precision over recall (VOC 2010 and later).

    Args:
        scores (float[E]), right (bool[E]): in any order; of equal scores the wrong ones come first.
        num_truth: ground truths in all.

    Returns:
        Between 0 and 1; NaN without ground truth.
    """
    found = np.sort(scores[right])[::-1]
    return _area(_num_above(found, scores[~right]), num_truth)


def eleven_point_precision(scores: np.ndarray, right: np.ndarray, num_truth: int) -> float:
    """Mean of the best precision at a recall of at least 0, 0.1, ..., 1 (VOC 2007).

    Arguments and result as of ``average_precision``. Recalls are compared as fractions, not rounded.
    """
    if not num_truth:
        return float("nan")
    found = np.sort(scores[right])[::-1]
    rank = np.arange(1, len(found) + 1)
    precision = rank / (rank + _num_above(found, scores[~right]))
    reached = [precision[10 * rank >= tenth * num_truth] for tenth in range(11)]
    return float(np.mean([points.max(initial=0.0) for points in reached]))


def _num_above(found: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """How many of the wrong scores are not below each found one."""
    return len(wrong) - np.searchsorted(np.sort(wrong), found, side="left")


def _area(num_wrong_above: np.ndarray, num_truth: int) -> float:
    """The area, from the wrong entries ranked above each right one, best first."""
    if not num_truth:
        return float("nan")
    # Precision matters only where recall rises; the envelope is the best from there on.
    rank = np.arange(1, len(num_wrong_above) + 1)
    precision = rank / (rank + num_wrong_above)
    return float(np.maximum.accumulate(precision[::-1]).sum() / num_truth)


@dataclass
class PooledPrecision:
    """Gathers entries image by image: five bytes each, so that tens of millions fit in memory.

    Attributes:
        matching: key of ``MATCHINGS``. ranks: K of ``recall_at``; needs ``add`` to be told the image.
    """

    matching: str = "official"
    ranks: tuple[int, ...] = ()
    _entries: dict[Key, list[Entries]] = field(default_factory=dict)
    _truths: dict[Key, int] = field(default_factory=dict)
    _images: dict[Hashable, list[Entries]] = field(default_factory=dict)
    _image_truths: dict[Hashable, int] = field(default_factory=dict)

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
        truth_difficult: np.ndarray | None = None,
        image: Hashable = None,
    ) -> None:
        """Match one class's detections in one image.

        Args:
            episode, class_id: what the reducers group by.
            boxes (float[D, 4]), scores (float[D]): detections of the class, XYXY in pixels.
            truth_boxes (float[G, 4]), truth_classes (int[G]): of all classes of the episode.
            truth_difficult (bool[G]): need not be found, by VOC's matching alone; default none.
            image: of the episode, for the recall.

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
        of_voc = {}
        if self.matching == "voc" and truth_difficult is not None:
            of_voc = {"difficult": truth_difficult}
        counted = of_class & ~of_voc.get("difficult", np.zeros_like(of_class))
        key, num_truth = (episode, class_id), int(counted.sum())
        self._truths[key] = self._truths.get(key, 0) + num_truth
        overlaps = pixel_iou(boxes.reshape(-1, 4), truth_boxes.reshape(-1, 4))
        entries = MATCHINGS[self.matching](scores, overlaps, of_class, **of_voc)
        self._entries.setdefault(key, []).append(entries)
        if self.ranks:
            place = episode, image
            self._images.setdefault(place, []).append(_top(entries, max(self.ranks)))
            self._image_truths[place] = self._image_truths.get(place, 0) + num_truth

    def update(self, other: "PooledPrecision") -> None:
        """Take over the entries of ``other``, which gathered other episodes.

        Raises:
            ValueError: an episode is in both.
        """
        common = {e for e, _ in self._truths} & {e for e, _ in other._truths}
        if common:
            raise ValueError(f"episodes must differ, got {sorted(common)[:5]} twice")
        for own, more in (
            (self._entries, other._entries),
            (self._truths, other._truths),
            (self._images, other._images),
            (self._image_truths, other._image_truths),
        ):
            own.update(more)

    def recall_at(self, rank: int) -> float:
        """Mean over images with ground truth of the share of it among the image's ``rank`` best entries (spec 3.5).

        All classes of the episode in one list; an image with fewer entries counts with those it has.
        """
        if rank not in self.ranks:
            raise ValueError(f"rank must be one of {self.ranks}, got {rank}")
        recalls = [
            _top(_joined(parts), rank)[1].sum() / self._image_truths[place]
            for place, parts in self._images.items()
            if self._image_truths[place]
        ]
        return float(np.mean(recalls)) if recalls else float("nan")

    def summary(self) -> dict[str, float]:
        """The AP in three ways with the half widths of their 95 % intervals ("..._ci95"), in 0..1, and the counts.

        "joint" is one AP over all entries (RepMet), "per_episode_mean" the mean over episodes of the AP over their
        entries (OS2D), "per_class_mean" that over classes (VOC, COCO). The mean over episodes has
        1.96 s / sqrt(episodes); the others, which are no means over episodes, leave out each of at most 20 groups of
        whole episodes in turn (jackknife). NaN where there is one episode only.
        """
        by_episode = self._keys_by(0)
        episodes = np.array([self._precisions(keys)[0] for keys in by_episode])
        episodes = episodes[~np.isnan(episodes)]
        spread = episodes.std(ddof=1) if len(episodes) > 1 else np.nan
        joint, joint_width = self._with_width([list(self._truths)])
        classes, classes_width = self._with_width(self._keys_by(1))
        return {
            "joint": joint,
            "joint_ci95": joint_width,
            "per_episode_mean": float(episodes.mean()) if len(episodes) else float("nan"),
            "per_episode_mean_ci95": float(1.96 * spread / max(len(episodes), 1) ** 0.5),
            "per_class_mean": classes,
            "per_class_mean_ci95": classes_width,
            "num_episodes": len(by_episode),
            "num_entries": sum(len(s) for parts in self._entries.values() for s, _ in parts),
            "num_truth": sum(self._truths.values()),
        }

    def _keys_by(self, position: int) -> list[list[Key]]:
        groups: dict[Hashable, list[Key]] = {}
        for key in self._truths:
            groups.setdefault(key[position], []).append(key)
        return list(groups.values())

    def _with_width(self, groups: list[list[Key]]) -> tuple[float, float]:
        """Mean of the groups' precisions and the jackknife's half width."""
        folds = self._folds()
        values = (self._precisions(keys, folds) for keys in groups)
        known = np.array([value for value in values if not np.isnan(value).all()])
        if not len(known):
            return float("nan"), float("nan")
        whole = float(known[:, 0].mean())
        if len(known[0]) < 3:
            return whole, float("nan")
        # A class may have no ground truth left without a fold.
        without = np.nanmean(known[:, 1:], axis=0)
        variance = (len(without) - 1) * np.var(without)
        return whole, float(1.96 * variance**0.5)

    def _folds(self) -> dict[Hashable, int]:
        """Episode -> which of at most ``_NUM_FOLDS`` groups it is left out with."""
        episodes = list(dict.fromkeys(episode for episode, _ in self._truths))
        num_folds = min(len(episodes), _NUM_FOLDS)
        return {episode: i % num_folds for i, episode in enumerate(episodes)}

    def _precisions(
        self, keys: list[Key], folds: Mapping[Hashable, int] | None = None
    ) -> list[float]:
        """AP over the entries of ``keys``, then without each fold.

        Only right entries are ranked among each other: the many wrong ones are sorted fold by fold and counted.
        """
        of_fold: dict[int, list[Key]] = {}
        for key in keys:
            of_fold.setdefault(folds[key[0]] if folds else 0, []).append(key)
        scores = {f: [_joined(self._entries[key]) for key in own] for f, own in of_fold.items()}
        found = {f: np.concatenate([s[r] for s, r in parts]) for f, parts in scores.items()}
        ranked = np.concatenate(list(found.values())) if found else np.empty(0)
        order = np.argsort(-ranked, kind="stable")
        fold = np.repeat(list(found), [len(s) for s in found.values()])[order]
        above = {
            f: _num_above(ranked[order], np.concatenate([s[~r] for s, r in scores.pop(f)]))
            for f in list(scores)
        }
        total = sum(above.values(), start=np.zeros(len(ranked), np.int64))
        truths = {f: sum(self._truths[key] for key in own) for f, own in of_fold.items()}
        values = [_area(total, sum(truths.values()))]
        for left_out in range(max(folds.values()) + 1 if folds else 0):
            rest = fold != left_out
            without = total[rest] - above[left_out][rest] if left_out in above else total
            values.append(_area(without, sum(truths.values()) - truths.get(left_out, 0)))
        return values


def _joined(parts: list[Entries]) -> Entries:
    if not parts:
        return np.empty(0, np.float32), np.empty(0, bool)
    scores, right = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(right)


def _top(entries: Entries, rank: int) -> Entries:
    """The best ``rank`` entries, best first."""
    scores, right = entries
    order = np.argsort(-scores, kind="stable")[:rank]
    return scores[order], right[order]
