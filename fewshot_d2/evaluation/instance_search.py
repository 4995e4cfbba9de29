"""Instance search and localisation: how well rank lists find an instance and where they see it (SPIL spec 32 to 34).

A query's list has D candidates, best first, each an image with at most one box: the search's or detector's best. A
candidate is true if its image shows the instance. If the query's own image is in the set, leave it out of the list
and of the count before. Numbers are in [0, 1] but for ``summary``; boxes are XYXY in pixels of the original image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import confidence_interval

DEPTH = 128
# .05, .10, ... .95, each the float that its decimals mean.
IOU_THRESHOLDS = np.arange(5, 100, 5) / 100


@dataclass(frozen=True, eq=False)
class SearchedQuery:
    """A query with its rank list and the truth.

    Attributes:
        query_id (int): for messages.
        boxes (float[D, 4]): where each candidate was seen; a row of NaN = no box.
        relevant (bool[D]): whether each candidate is true.
        truth (sequence of D, float[G, 4]): boxes of the instance in each candidate, none in false ones.
        num_relevant (int): true images in the whole set, listed or not.

    Raises:
        ValueError: lengths differ, boxes are not XYXY, a true image has no true box or a false one has, or fewer
            images are relevant than are listed.
    """

    query_id: int
    boxes: np.ndarray
    relevant: np.ndarray
    truth: Sequence[np.ndarray]
    num_relevant: int

    def __post_init__(self) -> None:
        where, num = f"query {self.query_id}", len(self.relevant)
        if self.relevant.shape != (num,) or self.relevant.dtype != bool or len(self.truth) != num:
            raise ValueError(
                f"{where}: relevant must be bool (D,) and truth one a candidate, got "
                f"{self.relevant.dtype} {self.relevant.shape} and {len(self.truth)}"
            )
        if self.boxes.shape != (num, 4):
            raise ValueError(f"{where}: boxes must be ({num}, 4), got {self.boxes.shape}")
        for boxes in self.truth:
            if np.shape(boxes)[1:] != (4,) or not np.isfinite(boxes).all():
                raise ValueError(f"{where}: truth must be finite (G, 4), got {np.array(boxes)}")
        missing = np.isnan(self.boxes)
        if (missing.any(axis=1) != missing.all(axis=1)).any() or np.isinf(self.boxes).any():
            raise ValueError(f"{where}: boxes must be finite, or NaN in all four places")
        if any((b[:, 2:] < b[:, :2]).any() for b in (self.boxes, *self.truth)):
            raise ValueError(
                f"{where}: boxes and truth must be XYXY, got some that end before they start"
            )
        counts = np.array([len(boxes) for boxes in self.truth], dtype=int)
        if ((counts > 0) != self.relevant).any():
            place = int(((counts > 0) != self.relevant).argmax())
            raise ValueError(
                f"{where}: true candidates alone must have true boxes, got {counts[place]} for candidate "
                f"{place}, which is {bool(self.relevant[place])}"
            )
        if self.num_relevant < self.relevant.sum():
            raise ValueError(
                f"{where}: num_relevant must be at least the true candidates, {int(self.relevant.sum())}, "
                f"got {self.num_relevant}"
            )


def candidate_ious(query: SearchedQuery, depth: int = DEPTH) -> np.ndarray:
    """IoU of the first ``depth`` candidates' boxes with the truth.

    An image that shows the instance several times counts the best IoU with any of its boxes. A true image without a
    box has 0.

    Returns:
        float64[min(D, depth)]: NaN for false images, where there is nothing to overlap.
    """
    relevant = query.relevant[:depth]
    ious = np.full(len(relevant), np.nan)
    if not relevant.any():
        return ious
    truth = [np.asarray(query.truth[i], dtype=float) for i in np.flatnonzero(relevant)]
    counts = [len(boxes) for boxes in truth]
    found = np.repeat(query.boxes[:depth][relevant].astype(float), counts, axis=0)
    # Comparisons with NaN are false, so a missing box overlaps nothing.
    overlaps = np.nan_to_num(_iou(found, np.concatenate(truth)))
    starts = np.cumsum([0, *counts[:-1]])
    ious[relevant] = np.maximum.reduceat(overlaps, starts)
    return ious


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes (float[N, 4]) with others (float[N, 4]) pair by pair; NaN where neither has an area."""
    first = np.maximum(boxes[:, :2], others[:, :2])
    last = np.minimum(boxes[:, 2:], others[:, 2:])
    common = (last - first).clip(min=0).prod(axis=1)
    areas = [(b[:, 2:] - b[:, :2]).clip(min=0).prod(axis=1) for b in (boxes, others)]
    union = areas[0] + areas[1] - common
    return np.divide(common, union, out=np.full(len(boxes), np.nan), where=union > 0)


def mean_iou(
    queries: Sequence[SearchedQuery], *, depth: int = DEPTH, all_images: bool = False
) -> float:
    """Mean over queries of the mean IoU over a query's candidates.

    Args:
        queries: at least one. depth: candidates that count.
        all_images: False (primary) takes the mean over the true images of the list, and leaves out queries without
            any; True (secondary) takes it over all images of the list, with 0 for false ones.

    Returns:
        NaN where no query has such an image.
    """
    return confidence_interval(_mean_ious(queries, depth, all_images)).mean


def _mean_ious(queries: Sequence[SearchedQuery], depth: int, all_images: bool) -> list[float]:
    values = []
    for query in queries:
        ious = candidate_ious(query, depth)
        values.append(_mean(np.nan_to_num(ious) if all_images else ious[~np.isnan(ious)]))
    return values


def recall_iou_curve(
    queries: Sequence[SearchedQuery],
    thresholds: np.ndarray = IOU_THRESHOLDS,
    *,
    depth: int = DEPTH,
) -> np.ndarray:
    """Share of the true images of the list whose box has at least a given IoU.

    A share is of one query; the curve is the mean over the queries that have a true image in the list, so that queries
    with many do not outweigh the others. True images that the search did not list do not count.

    Args:
        queries: at least one. thresholds (float[T]): IoU. depth: candidates that count.

    Returns:
        float64[T]: NaN where no query has a true image.
    """
    recalls = _recalls(queries, thresholds, depth)
    return np.array([confidence_interval(column).mean for column in recalls.T])


def _recalls(
    queries: Sequence[SearchedQuery], thresholds: Sequence[float] | np.ndarray, depth: int
) -> np.ndarray:
    """Recall of each query at each IoU, float[Q, T]; NaN without a true image."""
    rows = []
    for query in queries:
        ious = candidate_ious(query, depth)
        ious = ious[~np.isnan(ious)]
        rows.append([_mean(ious >= threshold) for threshold in thresholds])
    return np.array(rows, dtype=float).reshape(len(queries), len(thresholds))


def average_precision(
    relevant: np.ndarray, num_relevant: int, *, depth: int = DEPTH, of_listable: bool = False
) -> float:
    """Average precision of a rank list that is cut after ``depth`` candidates.

    It is the sum of the precisions at the ranks of true images, neither interpolated nor by the trapezoidal rule of
    Oxford's and Paris's scripts.

    Args:
        relevant (bool[D]): best first. num_relevant: true images in the whole set.
        depth: candidates that count.
        of_listable: False divides by all true images; True by those that a list of this depth can hold,
            min(num_relevant, depth), so that a perfect list has 1.

    Returns:
        NaN where nothing is relevant.
    """
    if not num_relevant:
        return float("nan")
    ranks = np.flatnonzero(relevant[:depth]) + 1
    precisions = np.arange(1, len(ranks) + 1) / ranks
    denominator = min(num_relevant, depth) if of_listable else num_relevant
    return float(precisions.sum() / denominator)


def mean_average_precision(
    queries: Sequence[SearchedQuery], *, depth: int = DEPTH, of_listable: bool = False
) -> float:
    """Mean of ``average_precision`` over the queries that have a true image in the set; NaN without any."""
    return confidence_interval(_precisions(queries, depth, of_listable)).mean


def _precisions(queries: Sequence[SearchedQuery], depth: int, of_listable: bool) -> list[float]:
    return [
        average_precision(q.relevant, q.num_relevant, depth=depth, of_listable=of_listable)
        for q in queries
    ]


def summary(queries: Sequence[SearchedQuery], depth: int = DEPTH) -> dict[str, float]:
    """Every metric in percent with the half width of its 95 % interval over queries ("..._ci95").

    Returns:
        ``mIoU`` (over true images), ``mIoU_all`` (0 for false ones), ``recall_iou50``, ``recall_iou75``, ``mAP``
        (of all true images), ``mAP_listable`` (of those that a list can hold); the counts ``num_queries`` and
        ``num_queries_found``, those with a true image in the list, whose mIoU and recall are defined. The half width
        is 1.96 s / sqrt(n) over the n queries whose value is defined, NaN for fewer than two.

    Raises:
        ValueError: no queries, or a depth below 1.
    """
    if not queries or depth < 1:
        raise ValueError(
            f"queries and depth must be at least one, got {len(queries)} queries and depth {depth}"
        )
    result: dict[str, float] = {}
    for name, values in metrics_by_query(queries, depth).items():
        result[name], result[f"{name}_ci95"] = _percent(values)
    result["num_queries"] = len(queries)
    result["num_queries_found"] = sum(bool(q.relevant[:depth].any()) for q in queries)
    return result


def metrics_by_query(queries: Sequence[SearchedQuery], depth: int = DEPTH) -> dict[str, np.ndarray]:
    """The metrics of ``summary`` for each query.

    Returns:
        name -> float64[Q], in [0, 1]; NaN where a query leaves a metric undefined.
    """
    recalls = _recalls(queries, (0.5, 0.75), depth)
    values = {
        "mIoU": _mean_ious(queries, depth, all_images=False),
        "mIoU_all": _mean_ious(queries, depth, all_images=True),
        "recall_iou50": recalls[:, 0],
        "recall_iou75": recalls[:, 1],
        "mAP": _precisions(queries, depth, of_listable=False),
        "mAP_listable": _precisions(queries, depth, of_listable=True),
    }
    return {name: np.array(v, dtype=float) for name, v in values.items()}


def paired_difference(
    queries: Sequence[SearchedQuery], others: Sequence[SearchedQuery], depth: int = DEPTH
) -> dict[str, float]:
    """How much better the same queries fare: each metric of ``queries`` minus that of ``others``, query by query.

    Returns:
        As of ``summary``, without counts. The interval is that of the differences, narrower than those of the two
        summaries where queries that are hard for one are hard for the other.

    Raises:
        ValueError: the queries are not the same, in the same order.
    """
    ids = [[q.query_id for q in some] for some in (queries, others)]
    if ids[0] != ids[1]:
        raise ValueError(f"queries must be the same in the same order, got {ids[0]} and {ids[1]}")
    first, second = metrics_by_query(queries, depth), metrics_by_query(others, depth)
    result: dict[str, float] = {}
    for name, values in first.items():
        result[name], result[f"{name}_ci95"] = _percent(values - second[name])
    return result


def _percent(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of the interval of values in [-1, 1], in percent."""
    interval = confidence_interval(values)
    width = float("nan") if interval.half_width is None else interval.half_width
    return 100 * interval.mean, 100 * width


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
