"""Episodic AP: the spec's conformance cases, loops, and scikit-learn."""

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
    assert precision.joint() == pytest.approx(1.0)
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
    assert precision.joint() == pytest.approx(expected)


def test_case_e_of_the_spec():
    precision = pooled(
        "official",
        (0, 1, [(G1, 0.9)], {1: [G1]}),
        (1, 1, [(G2, 0.95), (G1, 0.2)], {1: [G1]}),
    )
    assert precision.joint() == pytest.approx(2 / 3)
    assert precision.per_episode_mean() == pytest.approx(0.75)
    assert precision.per_class_mean() == pytest.approx(2 / 3)


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
    assert pooled("voc", (0, 1, [], {1: [G1]})).joint() == 0.0
    assert math.isnan(pooled("voc", (0, 1, [(G1, 0.5)], {})).joint())
    assert math.isnan(PooledPrecision().joint()) and math.isnan(PooledPrecision().per_class_mean())


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
