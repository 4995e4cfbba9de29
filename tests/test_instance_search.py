"""Metrics of instance search against hand-worked numbers, plain loops and scikit-learn; its pictures."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from fewshot_d2.evaluation.instance_search import (
    IOU_THRESHOLDS,
    SearchedQuery,
    average_precision,
    candidate_ious,
    mean_average_precision,
    mean_iou,
    metrics_by_query,
    paired_difference,
    recall_iou_curve,
    summary,
)
from fewshot_d2.visualization.search import recall_iou_figure, stages_panel

NONE = [math.nan] * 4
NO_BOXES = np.empty((0, 4))


def query(boxes, truth, num_relevant=None, query_id=1):
    truth = [np.array(rows, float).reshape(-1, 4) for rows in truth]
    relevant = np.array([len(rows) > 0 for rows in truth], bool)
    number = int(relevant.sum()) if num_relevant is None else num_relevant
    return SearchedQuery(
        query_id, np.array(boxes, float).reshape(-1, 4), relevant, truth, num_relevant=number
    )


@pytest.fixture
def worked():
    """Two queries whose IoU are [1, false, 0.5, 0 (no box)] and [false, 0.25]."""
    square = [0, 0, 10, 10]
    first = query(
        [square, square, [0, 0, 10, 5], NONE],
        # The third image has two true boxes, of which the second is the better.
        [[square], [], [[5, 5, 15, 15], square], [square]],
        num_relevant=4,
    )
    second = query([NONE, [0, 0, 5, 5]], [[], [square]], query_id=2)
    return [first, second]


def test_hand_worked_ious(worked):
    np.testing.assert_allclose(candidate_ious(worked[0]), [1, np.nan, 0.5, 0])
    np.testing.assert_allclose(candidate_ious(worked[1]), [np.nan, 0.25])
    assert mean_iou(worked) == pytest.approx((1.5 / 3 + 0.25) / 2)
    assert mean_iou(worked, all_images=True) == pytest.approx((1.5 / 4 + 0.25 / 2) / 2)
    # At depth 1 the second query has no true image, and only the secondary mean counts it.
    assert mean_iou(worked, depth=1) == 1
    assert mean_iou(worked, depth=1, all_images=True) == 0.5


def test_hand_worked_recall(worked):
    curve = recall_iou_curve(worked)
    assert len(curve) == len(IOU_THRESHOLDS) == 19
    assert IOU_THRESHOLDS[[0, 9, -1]].tolist() == [0.05, 0.5, 0.95]
    by_threshold = dict(zip(IOU_THRESHOLDS.tolist(), curve, strict=True))
    assert by_threshold[0.25] == pytest.approx((2 / 3 + 1) / 2)
    # The limit itself counts.
    assert by_threshold[0.5] == pytest.approx((2 / 3 + 0) / 2)
    assert by_threshold[0.55] == pytest.approx((1 / 3 + 0) / 2)
    np.testing.assert_allclose(recall_iou_curve(worked, np.array([0.5]), depth=1), [1])


def test_hand_worked_precision(worked):
    first = (1 + 2 / 3 + 3 / 4) / 4
    assert average_precision(worked[0].relevant, 4) == pytest.approx(first)
    assert mean_average_precision(worked) == pytest.approx((first + 1 / 2) / 2)
    # Two places for four true images: the list can hold two.
    assert average_precision(worked[0].relevant, 4, depth=2) == pytest.approx(1 / 4)
    assert average_precision(worked[0].relevant, 4, depth=2, of_listable=True) == pytest.approx(0.5)
    assert math.isnan(average_precision(np.zeros(3, bool), 0))
    assert average_precision(np.zeros(3, bool), 2) == 0
    assert average_precision(np.ones(200, bool), 200, of_listable=True) == pytest.approx(1)
    assert average_precision(np.ones(200, bool), 200) == pytest.approx(0.64)


@pytest.mark.parametrize("seed", range(5))
def test_precision_is_that_of_scikit_learn(seed):
    relevant = np.random.default_rng(seed).random(90) < 0.3
    expected = average_precision_score(relevant, -np.arange(90))
    assert average_precision(relevant, int(relevant.sum())) == pytest.approx(expected)


def random_query(rng, number):
    def boxes(n):
        corners = rng.integers(0, 12, (n, 2))
        return np.concatenate([corners, corners + rng.integers(0, 9, (n, 2))], axis=1)

    found = boxes(number).astype(float)
    found[rng.random(number) < 0.2] = np.nan
    truth = [boxes(rng.integers(1, 4)) if rng.random() < 0.5 else [] for _ in range(number)]
    return query(found, truth, num_relevant=number + 3, query_id=int(rng.integers(1000)))


def naive_ious(case, depth):
    """IoU by counting unit squares; None for false images."""
    result = []
    for box, is_true, truth in list(zip(case.boxes, case.relevant, case.truth))[:depth]:
        best = 0.0
        for other in truth if not np.isnan(box[0]) else []:
            inside = np.zeros((2, 24, 24), bool)
            for plane, (x0, y0, x1, y1) in zip(inside, (box.astype(int), other.astype(int))):
                plane[y0:y1, x0:x1] = True
            union = inside.any(axis=0).sum()
            best = max(best, inside.all(axis=0).sum() / union if union else 0.0)
        result.append(best if is_true else None)
    return result


def mean_of(values):
    values = list(values)
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("depth", [1, 4, 128])
@pytest.mark.parametrize("seed", range(4))
def test_against_plain_loops(seed, depth):
    rng = np.random.default_rng(seed)
    queries = [random_query(rng, int(n)) for n in rng.integers(1, 12, 8)]
    primary, secondary, curves = [], [], []
    for case in queries:
        ious = naive_ious(case, depth)
        true = [iou for iou in ious if iou is not None]
        secondary.append(mean_of(iou or 0.0 for iou in ious))
        if true:
            primary.append(mean_of(true))
            curves.append([mean_of(float(iou >= t) for iou in true) for t in IOU_THRESHOLDS])
    assert mean_iou(queries, depth=depth) == pytest.approx(mean_of(primary))
    assert mean_iou(queries, depth=depth, all_images=True) == pytest.approx(mean_of(secondary))
    curve = recall_iou_curve(queries, depth=depth)
    np.testing.assert_allclose(curve, np.mean(curves, axis=0))
    assert (np.diff(curve) <= 0).all()
    scores = summary(queries, depth)
    deviation = math.sqrt(
        sum((v - mean_of(primary)) ** 2 for v in primary) / max(len(primary) - 1, 1)
    )
    assert scores["mIoU"] == pytest.approx(100 * mean_of(primary))
    assert scores["mIoU_ci95"] == pytest.approx(196 * deviation / math.sqrt(len(primary)))
    assert scores["recall_iou50"] == pytest.approx(100 * mean_of(c[9] for c in curves))
    assert scores["recall_iou75"] == pytest.approx(100 * mean_of(c[14] for c in curves))
    assert (scores["num_queries"], scores["num_queries_found"]) == (8, len(primary))


def test_summary_by_hand(worked):
    scores = summary(worked)
    assert scores["mIoU"] == pytest.approx(37.5)
    # Values 50 and 25: s = 25 / sqrt(2), over sqrt(2) queries.
    assert scores["mIoU_ci95"] == pytest.approx(1.96 * 12.5)
    assert scores["mIoU_all"] == pytest.approx(25)
    assert scores["mAP"] == scores["mAP_listable"] == pytest.approx(100 * (29 / 48 + 0.5) / 2)
    cut = summary(worked, depth=1)
    assert (cut["mIoU"], cut["num_queries_found"]) == (100, 1)
    assert math.isnan(cut["mIoU_ci95"])
    assert cut["mAP"] == pytest.approx(100 / 8) and cut["mAP_listable"] == pytest.approx(50)


def test_paired_difference_is_that_of_the_queries(worked):
    rng = np.random.default_rng(3)
    queries, others = (
        [replace(random_query(rng, int(n)), query_id=i) for i, n in enumerate(sizes)]
        for sizes in rng.integers(1, 12, (2, 9))
    )
    found = paired_difference(queries, others, depth=4)
    one, other = metrics_by_query(queries, 4), metrics_by_query(others, 4)
    for name in one:
        pairs = [(a, b) for a, b in zip(one[name], other[name]) if not math.isnan(a + b)]
        values = [100 * (a - b) for a, b in pairs]
        deviation = np.std(values, ddof=1)
        assert found[name] == pytest.approx(mean_of(values))
        assert found[f"{name}_ci95"] == pytest.approx(1.96 * deviation / math.sqrt(len(values)))
    back = paired_difference(others, queries, depth=4)
    assert all(back[name] == pytest.approx(-found[name]) for name in one)
    assert set(paired_difference(worked, worked).values()) == {0}
    with pytest.raises(ValueError, match=r"must be the same in the same order, got \[1, 2\] and"):
        paired_difference(worked, worked[::-1])


def test_nothing_found_and_nothing_listed():
    queries = [query([NONE], [[]], num_relevant=2), query([], [], num_relevant=0)]
    scores = summary(queries)
    assert math.isnan(scores["mIoU"]) and math.isnan(scores["recall_iou50"])
    assert scores["mIoU_all"] == scores["mAP"] == 0
    assert np.isnan(recall_iou_curve(queries)).all()


def test_boxes_without_area_overlap_nothing():
    point = [3, 3, 3, 3]
    assert candidate_ious(query([point, point], [[point], [[0, 0, 9, 9]]])).tolist() == [0, 0]


def made(**changes):
    values = {
        "boxes": np.ones((2, 4)),
        "relevant": np.array([True, False]),
        "truth": [np.ones((1, 4)), NO_BOXES],
        "num_relevant": 1,
    }
    return SearchedQuery(7, **{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relevant": np.array([1, 0])}, "relevant must be bool"),
        ({"truth": [np.ones((1, 4))]}, "truth one a candidate"),
        ({"boxes": np.ones((3, 4))}, r"boxes must be \(2, 4\)"),
        ({"boxes": np.array([[1, 2, 3, np.nan], [1, 2, 3, 4]])}, "boxes must be finite"),
        ({"boxes": np.full((2, 4), np.inf)}, "boxes must be finite"),
        ({"boxes": np.array([[5.0, 5, 3, 3], NONE])}, "must be XYXY"),
        ({"truth": [np.array([[5, 5, 3, 3]]), NO_BOXES]}, "must be XYXY"),
        ({"truth": [np.ones((1, 4)), np.empty(0)]}, r"truth must be finite \(G, 4\)"),
        ({"truth": [np.full((1, 4), np.nan), NO_BOXES]}, r"truth must be finite \(G, 4\)"),
        ({"truth": [NO_BOXES, NO_BOXES]}, "true candidates alone"),
        ({"truth": [np.ones((1, 4))] * 2}, "true candidates alone"),
        ({"num_relevant": 0}, "num_relevant must be at least"),
    ],
)
def test_wrong_queries_are_refused(changes, message):
    made()
    with pytest.raises(ValueError, match=f"query 7: .*{message}"):
        made(**changes)


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must be at least one"):
        summary([])
    with pytest.raises(ValueError, match="must be at least one"):
        summary([made()], depth=0)


def test_recall_figure(worked):
    curves = {"search": recall_iou_curve(worked), "stage 1": np.full(19, np.nan)}
    picture = Image.open(io.BytesIO(recall_iou_figure(curves, IOU_THRESHOLDS, "all")))
    assert picture.format == "PNG" and min(picture.size) > 400
    assert np.asarray(picture.convert("L")).std() > 5
    recall_iou_figure({}, IOU_THRESHOLDS)
    with pytest.raises(ValueError, match="must have a recall for each of 19"):
        recall_iou_figure({"short": np.ones(3)}, IOU_THRESHOLDS)


def panel_input():
    images = [np.full(shape, 128, np.uint8) for shape in ((60, 100, 3), (90, 50, 3), (700, 900, 3))]
    boxes = [np.array([[5, 5, 40, 40], [10, 10, 30, 30]], float) for _ in images]
    boxes[1][0] = np.nan
    return images, boxes


def test_stages_panel():
    images, boxes = panel_input()
    names = ["search", "stage 1"]
    panel = stages_panel(images, boxes, names, columns=2)
    assert panel.dtype == np.uint8 and panel.ndim == 3
    # Two pictures of 400 pixels side by side; rows of 400 and 311, a line of names.
    assert panel.shape[1] == 810 and 721 < panel.shape[0] < 800
    truth = [np.array([[5, 5, 40, 40]]), np.empty((0, 4)), np.empty((0, 4))]
    more = stages_panel(images, boxes, names, columns=2, truth=truth, captions=["a", "b", "c"])
    assert more.shape[1] == 810 and more.shape[0] > panel.shape[0]


def test_stages_have_their_own_colours():
    image = np.full((100, 100, 3), 128, np.uint8)
    boxes = np.array([[10, 10, 60, 60], [30, 30, 90, 90]], float)
    both = stages_panel([image], [boxes], ["a", "b"])[-400:]
    alone = boxes.copy()
    alone[1] = np.nan
    first = stages_panel([image], [alone], ["a", "b"])[-400:]
    for stage, color in enumerate([(213, 94, 0), (86, 180, 233)]):
        assert (both == color).all(axis=2).sum() > 500
        assert (first == color).all(axis=2).any() == (stage == 0)
    # Box a starts at 4 * 10 pixels; the frame lies around it.
    ys, xs = np.nonzero((first == (213, 94, 0)).all(axis=2))
    assert 36 <= xs.min() <= 40 <= 240 <= xs.max() <= 244
    assert 36 <= ys.min() <= 40 <= 240 <= ys.max() <= 244


def test_wrong_panels_are_refused():
    images, boxes = panel_input()
    with pytest.raises(ValueError, match="must be at least one"):
        stages_panel([], [], [])
    with pytest.raises(ValueError, match="boxes must be one an image"):
        stages_panel(images, boxes[:2], ["a", "b"])
    with pytest.raises(ValueError, match=r"boxes must be \(3, 4\)"):
        stages_panel(images, boxes, ["a", "b", "c"])
    with pytest.raises(ValueError, match="captions must be one an image"):
        stages_panel(images, boxes, ["a", "b"], captions=["a"])
