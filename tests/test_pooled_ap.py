"""Episodic AP: the spec's conformance cases, loops, and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fewshot_d2.evaluation.pooled_ap import (
    PooledPrecision,
    average_precision,
    match_official,
    match_voc,
    pixel_iou,
)

G1, G1_PART, G2 = [0, 0, 99, 99], [0, 0, 99, 59], [200, 200, 299, 299]


def pooled(matching, *images):
    """Images as (episode, class searched, {box: score}, {class: [boxes]})."""
    precision = PooledPrecision(matching)
    for episode, class_id, found, truth in images:
        boxes = [box for of_class in truth.values() for box in of_class]
        classes = [c for c, of_class in truth.items() for _ in of_class]
        precision.add(
            episode,
            class_id,
            boxes=np.array([box for box, _ in found], float).reshape(-1, 4),
            scores=np.array([score for _, score in found]),
            truth_boxes=np.array(boxes, float).reshape(-1, 4),
            truth_classes=np.array(classes, int),
        )
    return precision


@pytest.mark.parametrize(("matching", "entries"), [("official", 1), ("voc", 2)])
def test_case_a_of_the_spec(matching, entries):
    precision = pooled(matching, (0, 1, [(G1, 0.9), (G1_PART, 0.8)], {1: [G1]}))
    assert precision.summary()["joint"] == pytest.approx(1.0)
    ((scores, right),) = precision._entries[0, 1]
    assert len(scores) == entries and right.sum() == 1


@pytest.mark.parametrize(("matching", "expected"), [("official", 0.25), ("voc", 1 / 6)])
def test_case_c_of_the_spec(matching, expected):
    precision = pooled(
        matching,
        (0, 1, [], {1: [G1]}),
        (0, 2, [(G1, 0.9), (G1_PART, 0.8)], {1: [G1]}),
        (0, 1, [(G2, 0.5)], {1: [G2]}),
        (0, 2, [], {1: [G2]}),
    )
    assert precision.summary()["joint"] == pytest.approx(expected)


def test_case_e_of_the_spec():
    precision = pooled(
        "official",
        (0, 1, [(G1, 0.9)], {1: [G1]}),
        (1, 1, [(G2, 0.95), (G1, 0.2)], {1: [G1]}),
    )
    assert precision.summary()["joint"] == pytest.approx(2 / 3)
    assert precision.summary()["per_episode_mean"] == pytest.approx(0.75)
    assert precision.summary()["per_class_mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("matching", ["official", "voc"])
def test_half_an_overlap_is_a_hit(matching):
    half, less = [0, 0, 99, 49], [0, 0, 99, 48]
    for box, expected in ((half, 1.0), (less, 0.0)):
        precision = pooled(matching, (0, 1, [(box, 0.9)], {1: [G1]}))
        assert precision.summary()["joint"] == expected


def test_of_equal_scores_the_wrong_ones_come_first():
    assert average_precision(np.array([0.5, 0.5]), np.array([True, False]), 1) == 0.5
    precision = pooled("official", (0, 1, [(G1, 0.5), (G2, 0.5)], {1: [G1]}))
    assert precision.summary()["joint"] == 0.5


def naive_iou(a, b):
    pixels = [
        {(x, y) for x in range(box[0], box[2] + 1) for y in range(box[1], box[3] + 1)}
        for box in (a, b)
    ]
    return len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])


def random_boxes(rng, count):
    corner, size = rng.integers(0, 8, (count, 2)), rng.integers(0, 8, (count, 2))
    return np.concatenate([corner, corner + size], axis=1)


def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    boxes, others = random_boxes(rng, 6), random_boxes(rng, 5)
    expected = [[naive_iou(a, b) for b in others.tolist()] for a in boxes.tolist()]
    np.testing.assert_allclose(pixel_iou(boxes, others), expected)


def naive_official(scores, overlaps, of_class):
    entries = []
    for g, own in enumerate(of_class):
        on = [d for d in range(len(scores)) if overlaps[d, g] >= 0.5]
        if not own:
            on = [
                d
                for d in on
                if not any(o and overlaps[d, k] >= 0.5 for k, o in enumerate(of_class))
            ]
        if on:
            entries.append((max(scores[d] for d in on), bool(own)))
    entries += [(scores[d], False) for d in range(len(scores)) if not (overlaps[d] >= 0.5).any()]
    return entries


def test_class_of_one_episode_only_has_an_interval_too():
    rows = [r for r in random_run() if r[2] != 3 or r[0] == 0]
    for i, row in enumerate(rows):
        classes = np.where(row[6] == 3, 1, row[6]) if row[0] else row[6]
        rows[i] = (*row[:6], classes)
    summary = gathered(rows).summary()
    without = [gathered([r for r in rows if r[0] != e]).summary() for e in range(7)]
    values = np.array([part["per_class_mean"] for part in without])
    expected = 1.96 * (6 * values.var()) ** 0.5
    assert summary["per_class_mean_ci95"] == pytest.approx(expected)


def naive_voc(scores, overlaps, of_class):
    taken, entries = set(), []
    for d in sorted(range(len(scores)), key=lambda d: -scores[d]):
        own = [(overlaps[d, g], -g) for g in range(len(of_class)) if of_class[g]]
        best, g = max(own) if own else (0.0, 0)
        right = best >= 0.5 and g not in taken
        if right:
            taken.add(g)
        entries.append((scores[d], right))
    return entries


@pytest.mark.parametrize(
    ("matching", "naive"), [(match_official, naive_official), (match_voc, naive_voc)]
)
def test_matchings_equal_loops(matching, naive):
    rng = np.random.default_rng(1)
    rights = 0
    for _ in range(200):
        detections, truths = rng.integers(0, 7), rng.integers(0, 5)
        scores = rng.permutation(20)[:detections] / 20
        overlaps, of_class = rng.random((detections, truths)), rng.random(truths) < 0.5
        found, right = matching(scores, overlaps, of_class)
        expected = [(np.float32(s), r) for s, r in naive(scores, overlaps, of_class)]
        assert sorted(zip(found, right.tolist(), strict=True)) == sorted(expected)
        rights += right.sum()
    assert rights > 50


def naive_precision(scores, right, num_truth):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    points, hits = [], 0
    for rank, i in enumerate(order, start=1):
        hits += right[i]
        points.append((hits / num_truth, hits / rank))
    area, recall = 0.0, 0.0
    for i, (r, _) in enumerate(points):
        area += (r - recall) * max(p for _, p in points[i:])
        recall = r
    return area


def test_precision_equals_loops_and_bounds_scikit_learn():
    rng = np.random.default_rng(2)
    for _ in range(50):
        count = rng.integers(1, 40)
        scores, right = rng.random(count), rng.random(count) < 0.4
        missed = int(rng.integers(0, 5))
        truth = int(right.sum()) + missed
        if not truth:
            assert math.isnan(average_precision(scores, right, truth))
            continue
        value = average_precision(scores, right, truth)
        assert value == pytest.approx(naive_precision(scores, right, truth))
        if right.any() and not missed:
            # Without the envelope it is scikit-learn's.
            assert value >= average_precision_score(right, scores) - 1e-12


def test_nothing_found_and_nothing_there():
    assert pooled("voc", (0, 1, [], {1: [G1]})).summary()["joint"] == 0.0
    assert math.isnan(pooled("voc", (0, 1, [(G1, 0.5)], {})).summary()["joint"])
    empty = PooledPrecision().summary()
    assert math.isnan(empty["joint"]) and math.isnan(empty["per_class_mean"])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="matching must be one of"):
        PooledPrecision("coco")
    with pytest.raises(ValueError, match="scores must be numbers"):
        pooled("voc", (0, 1, [(G1, math.nan)], {1: [G1]}))
    with pytest.raises(ValueError, match="each box must have a score"):
        PooledPrecision().add(
            0,
            1,
            boxes=np.zeros((2, 4)),
            scores=np.zeros(1),
            truth_boxes=np.zeros((0, 4)),
            truth_classes=np.zeros(0),
        )


def random_run(seed=3, episodes=7, images=3, classes=(1, 2, 3)):
    """Rows (episode, image, class, boxes, scores, truth boxes, truth classes)."""
    rng = np.random.default_rng(seed)
    rows = []
    for episode, image in itertools.product(range(episodes), range(images)):
        truth = np.concatenate([c := rng.uniform(0, 80, (4, 2)), c + 30], axis=1)
        truth_classes = rng.choice(classes, 4)
        for class_id in classes:
            near = truth[rng.integers(0, 4, 5)] + rng.normal(0, 4, (5, 4))
            rows.append((episode, image, class_id, near, rng.random(5), truth, truth_classes))
    return rows


def gathered(rows, matching="voc", ranks=()):
    precision = PooledPrecision(matching, ranks=ranks)
    for episode, image, class_id, boxes, scores, truth, truth_classes in rows:
        precision.add(
            episode,
            class_id,
            image=image,
            boxes=boxes,
            scores=scores,
            truth_boxes=truth,
            truth_classes=truth_classes,
        )
    return precision


@pytest.mark.parametrize("matching", ["official", "voc"])
def test_summary_equals_leaving_out_each_episode_by_hand(matching):
    rows = random_run()
    summary = gathered(rows, matching).summary()
    without = [gathered([r for r in rows if r[0] != e], matching) for e in range(7)]
    for name in ("joint", "per_class_mean"):
        values = np.array([part.summary()[name] for part in without])
        variance = 6 / 7 * ((values - values.mean()) ** 2).sum()
        assert summary[f"{name}_ci95"] == pytest.approx(1.96 * variance**0.5)
    episodes = [
        gathered([r for r in rows if r[0] == e], matching).summary()["joint"] for e in range(7)
    ]
    assert summary["per_episode_mean"] == pytest.approx(np.mean(episodes))
    width = 1.96 * np.std(episodes, ddof=1) / 7**0.5
    assert summary["per_episode_mean_ci95"] == pytest.approx(width)
    assert summary["num_episodes"] == 7 and summary["num_truth"] == 7 * 3 * 4
    assert 0 < summary["joint"] < 1 and summary["joint_ci95"] > 0


def test_jackknife_width_is_that_of_the_mean_where_the_statistic_is_one():
    # One class and one ground truth an episode, found or missed: the joint AP is the share of those found.
    rng = np.random.default_rng(0)
    found = rng.random(20) < 0.6
    precision = PooledPrecision("voc")
    for episode, is_found in enumerate(found):
        boxes = np.array([G1], float) if is_found else np.zeros((0, 4))
        precision.add(
            episode,
            1,
            boxes=boxes,
            scores=np.ones(len(boxes)),
            truth_boxes=np.array([G1], float),
            truth_classes=np.array([1]),
        )
    summary = precision.summary()
    assert summary["joint"] == pytest.approx(found.mean())
    assert summary["joint_ci95"] == pytest.approx(1.96 * found.std(ddof=1) / 20**0.5)


def test_one_episode_has_no_interval():
    summary = gathered(random_run(episodes=1)).summary()
    assert summary["joint"] > 0
    assert all(math.isnan(summary[f"{name}_ci95"]) for name in ("joint", "per_episode_mean"))


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_recall_equals_loops(rank):
    rows = random_run()
    recalls = []
    for place in dict.fromkeys((r[0], r[1]) for r in rows):
        entries, truths = [], 0
        for row in (r for r in rows if (r[0], r[1]) == place):
            of_class = row[6] == row[2]
            overlaps = pixel_iou(row[3], row[5])
            entries += naive_voc(row[4], overlaps, of_class)
            truths += of_class.sum()
        best = sorted(entries, key=lambda e: -e[0])[:rank]
        recalls.append(sum(right for _, right in best) / truths)
    assert gathered(rows, "voc", (1, 3, 100)).recall_at(rank) == pytest.approx(np.mean(recalls))


def test_recall_counts_images_without_a_hit_and_not_those_without_truth():
    precision = PooledPrecision("voc", ranks=(1,))
    nothing = np.zeros((0, 4))
    for image, (boxes, truth) in enumerate(
        [([G1], [G1]), ([G2], [G1]), ([G1], nothing), (nothing, [G1])]
    ):
        precision.add(
            0,
            1,
            image=image,
            boxes=np.array(boxes, float),
            scores=np.ones(len(boxes)),
            truth_boxes=np.array(truth, float),
            truth_classes=np.ones(len(truth), int),
        )
    assert precision.recall_at(1) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="rank must be one of"):
        precision.recall_at(5)
    assert math.isnan(PooledPrecision(ranks=(1,)).recall_at(1))
