"""Scores of detections against naive loops, and what counts in which protocol."""

import dataclasses
import math

import numpy as np
import pytest
from evaluation_cases import (
    CLASS_NAMES,
    HEIGHT,
    WIDTH,
    detection,
    perfect_detections,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)
from pycocotools import mask as mask_api

from fewshot_d2.evaluation import evaluate_detections, score_detections
from fewshot_d2.evaluation.assignment import assign_pairs, best_threshold, precision_by_class
from fewshot_d2.evaluation.coco_scoring import GroundTruth, planned_pairs

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
IOUS = [0.5 + 0.05 * i for i in range(10)]


def naive_iou(shape_a, shape_b, crowd_b):
    """IoU of two bool masks or two XYWH boxes."""
    if isinstance(shape_a, np.ndarray):
        common = float((shape_a & shape_b).sum())
        area_a, area_b = float(shape_a.sum()), float(shape_b.sum())
    else:
        (ax, ay, aw, ah), (bx, by, bw, bh) = shape_a, shape_b
        common = max(min(ax + aw, bx + bw) - max(ax, bx), 0.0)
        common *= max(min(ay + ah, by + bh) - max(ay, by), 0.0)
        area_a, area_b = aw * ah, bw * bh
    return common / (area_a if crowd_b else area_a + area_b - common)


def naive_ap(truth, detections, class_id, task, iou, area):
    """(average precision, recall) of a class over truth = [(image, shape, area, crowd)]."""
    num_wanted, outcomes = 0, []
    for image in sorted({row[0] for row in truth}):
        instances = [row for row in truth if row[0] == image]
        ignored = [crowd or not area[0] <= size <= area[1] for _, _, size, crowd in instances]
        num_wanted += ignored.count(False)
        taken = set()
        found = [d for d in detections if d[0] == image]
        for _, shape, size, score in sorted(found, key=lambda d: -d[3])[:100]:
            best, best_rank = None, (False, 0.0)
            for index, (_, other, _, crowd) in enumerate(instances):
                overlap = naive_iou(shape, other, crowd)
                rank = (not ignored[index], overlap)
                if overlap >= iou and (crowd or index not in taken) and rank > best_rank:
                    best, best_rank = index, rank
            if best is None:
                if area[0] <= size <= area[1]:
                    outcomes.append((score, False))
                continue
            taken.add(best)
            if not ignored[best]:
                outcomes.append((score, True))
    if not num_wanted:
        return None
    outcomes.sort(key=lambda pair: -pair[0])
    points, right = [], 0
    for number, (_, hit) in enumerate(outcomes, start=1):
        right += hit
        points.append((right / num_wanted, right / number))
    total = 0.0
    for step in range(101):
        total += max((p for r, p in points if r >= step / 100 - 1e-12), default=0.0)
    return total / 101, right / num_wanted


def naive_metrics(dicts, detections, plan, task):
    """The metrics that COCO reports for 100 detections, by loops over everything."""
    ids = list(CLASS_NAMES)
    pairs = [(e.image_id, c) for e in plan.episodes for c in e.class_ids]
    collected = {}
    for class_id in plan.class_ids:
        images = [i for i, c in pairs if c == class_id]
        truth, found = [], []
        for record in dicts:
            if record["image_id"] not in images:
                continue
            truth.append((record["image_id"], None, None, None))
            for a in record["annotations"]:
                if ids[a["category_id"]] == class_id:
                    mask = mask_api.decode(a["segmentation"]).astype(bool)
                    shape = mask if task == "segm" else tuple(a["bbox"])
                    truth.append((record["image_id"], shape, mask.sum(), bool(a["iscrowd"])))
        for d in detections:
            if d["image_id"] in images and d["category_id"] == class_id:
                mask = mask_api.decode(d["segmentation"]).astype(bool)
                size = mask.sum() if task == "segm" else d["bbox"][2] * d["bbox"][3]
                shape = mask if task == "segm" else tuple(d["bbox"])
                found.append((d["image_id"], shape, size, d["score"]))
        for name, area in AREAS.items():
            for iou in IOUS:
                value = naive_class(truth, found, images, task, iou, area)
                if value is not None:
                    collected.setdefault(name, {}).setdefault(class_id, {})[round(iou, 2)] = value
    return collected


def naive_class(truth, found, images, task, iou, area):
    """Images without an instance count too: the marker rows of ``truth`` name them."""
    rows = [row for row in truth if row[1] is not None]
    empty = set(images) - {row[0] for row in rows}
    # A crowd that nothing overlaps makes an image known without adding anything to be found.
    nowhere = np.zeros((HEIGHT, WIDTH), bool) if task == "segm" else (-9.0, -9.0, 1.0, 1.0)
    rows += [(image, nowhere, 1, True) for image in empty]
    return naive_ap(rows, found, None, task, iou, area)


def mean(values):
    values = list(values)
    return 100 * sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("protocol", ["present", "open"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_naive_loops(protocol, task, seed):
    rng = np.random.default_rng(seed)
    dicts = random_dicts(rng)
    detections = random_detections(rng, dicts)
    plan = plan_of(dicts, protocol=protocol)
    naive = naive_metrics(dicts, detections, plan, task)
    scores = score_detections(truth_of(dicts), detections, plan, task)
    expected = {
        "AP": mean(v[0] for c in naive[""].values() for v in c.values()),
        "AP50": mean(c[0.5][0] for c in naive[""].values()),
        "AP75": mean(c[0.75][0] for c in naive[""].values()),
        "AR100": mean(v[1] for c in naive[""].values() for v in c.values()),
    }
    for size in "sml":
        of_size = naive.get(size, {}).values()
        expected[f"AP{size}"] = mean(v[0] for c in of_size for v in c.values())
    for name, value in expected.items():
        assert scores.metrics[name] == pytest.approx(value, nan_ok=True, abs=1e-9), name
    assert scores.class_ids == tuple(sorted(naive[""]))
    for index, class_id in enumerate(scores.class_ids):
        by_iou = naive[""][class_id]
        assert scores.ap50[index] == pytest.approx(100 * by_iou[0.5][0])
        assert scores.ap[index] == pytest.approx(mean(v[0] for v in by_iou.values()))
    own = precision_by_class(assign_pairs(truth_of(dicts), detections, plan, task))
    np.testing.assert_allclose(np.array(list(own.values())), scores.precision50, atol=1e-12)


def test_perfect_detections_score_100_and_none_0():
    dicts = random_dicts(np.random.default_rng(0), crowd=0.0)
    plan = plan_of(dicts, protocol="open")
    for task in ("bbox", "segm"):
        perfect = score_detections(truth_of(dicts), perfect_detections(dicts), plan, task).metrics
        assert perfect["AP"] == pytest.approx(100) and perfect["AR100"] == pytest.approx(100)
        nothing = score_detections(truth_of(dicts), [], plan, task).metrics
        assert nothing["AP"] == nothing["AP50"] == nothing["AR100"] == 0


def test_only_searched_pairs_count():
    dicts = random_dicts(np.random.default_rng(1), crowd=0.0)
    truth, detections = truth_of(dicts), perfect_detections(dicts)
    plan = plan_of(dicts, class_ids=(3, 7))
    before = score_detections(truth, detections, plan, "bbox").metrics
    pairs = planned_pairs(plan)
    noise = [
        detection(r["image_id"], c, [1, 1, 20, 20], 0.99)
        for r in dicts
        for c in CLASS_NAMES
        if (r["image_id"], c) not in pairs
    ]
    assert noise
    assert score_detections(truth, detections + noise, plan, "bbox").metrics == before
    # Ground truth of class 20 is not searched, so not finding it costs nothing.
    of_plan = [d for d in detections if d["category_id"] != 20]
    assert score_detections(truth, of_plan, plan, "bbox").metrics == before


def test_false_alarms_on_absent_classes_count_in_the_open_protocol_only():
    dicts = random_dicts(np.random.default_rng(2), num_images=8, max_instances=2, crowd=0.0)
    truth, detections = truth_of(dicts), perfect_detections(dicts)
    absent = [
        detection(r["image_id"], c, [5, 5, 30, 30], 0.99)
        for r in dicts
        for c in (3, 7, 20)
        if truth.is_present(r["image_id"], c) is False
    ]
    for protocol, changes in (("present", False), ("open", True)):
        plan = plan_of(dicts, protocol=protocol)
        clean = evaluate_detections(truth, detections, plan)
        alarmed = evaluate_detections(truth, detections + absent, plan)
        assert clean["bbox"]["AP"] == pytest.approx(100)
        assert (alarmed["bbox"]["AP"] < 99) == changes
        assert ("presence" in clean) == changes
    assert clean["presence"]["AUROC"] == 100
    assert clean["presence"]["false_positives_per_image"] == 0
    assert alarmed["presence"]["AUROC"] == 0
    assert alarmed["presence"]["false_positives_per_image"] == len(absent) / len(dicts)
    assert alarmed["presence"]["false_alarm_rate"] == 100


def test_a_class_without_ground_truth_has_no_score():
    dicts = random_dicts(np.random.default_rng(3), crowd=0.0)
    plan = plan_of(dicts, class_ids=(3, 21), protocol="open")
    scores = score_detections(truth_of(dicts), perfect_detections(dicts), plan, "bbox")
    assert scores.class_ids == (3,) and scores.metrics["AP"] == pytest.approx(100)
    alone = plan_of(dicts, class_ids=(21,), protocol="open")
    scores = score_detections(truth_of(dicts), [], alone, "bbox")
    assert scores.class_ids == () and math.isnan(scores.metrics["AP"])


def test_masks_that_are_not_there():
    dicts = random_dicts(np.random.default_rng(4), masks=False, crowd=0.0)
    plan = plan_of(dicts)
    boxes_only = perfect_detections(dicts, masks=False)
    results = evaluate_detections(truth_of(dicts), boxes_only, plan)
    assert "bbox" in results and "segm" not in results
    with_masks = evaluate_detections(truth_of(dicts), perfect_detections(dicts), plan)
    assert math.isnan(with_masks["segm"]["AP"])
    with pytest.raises(ValueError, match="image 1"):
        evaluate_detections(truth_of(dicts), boxes_only[:1] + perfect_detections(dicts)[1:], plan)


def test_empty_plan_repeated_pair_and_unknown_task():
    dicts = random_dicts(np.random.default_rng(5))
    with pytest.raises(ValueError, match="must have an episode"):
        score_detections(truth_of(dicts), [], plan_of([]), "bbox")
    with pytest.raises(ValueError, match="image 1 must be searched for class"):
        planned_pairs(plan_of_twice(dicts))
    with pytest.raises(ValueError, match="task must be"):
        score_detections(truth_of(dicts), [], plan_of(dicts), "keypoints")


def plan_of_twice(dicts):
    plan = plan_of(dicts)
    again = dataclasses.replace(plan.episodes[0], id=99)
    return dataclasses.replace(plan, episodes=(*plan.episodes, again))


def test_best_threshold_against_all_thresholds():
    rng = np.random.default_rng(6)
    dicts = random_dicts(rng)
    detections = random_detections(rng, dicts)
    assignments = assign_pairs(truth_of(dicts), detections, plan_of(dicts, protocol="open"))

    def f1(threshold):
        right, wrong, missed = np.sum([a.counts(threshold) for a in assignments.values()], axis=0)
        return 2 * right / (2 * right + wrong + missed)

    best = max(f1(d["score"]) for d in detections)
    assert f1(best_threshold(assignments)) == pytest.approx(best)
    nothing = assign_pairs(truth_of(dicts), [], plan_of(dicts))
    assert best_threshold(nothing) == 0.5


def test_ground_truth_from_polygons_and_missing_areas():
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    record = random_dicts(np.random.default_rng(0), num_images=1)[0]
    common = {"bbox": (10, 10, 20, 20), "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record["annotations"] = [
        {"id": 0, **common, "segmentation": [square]},
        {"id": 1, **common, "area": 7.5},
        {"id": 2, **common},
    ]
    polygon, annotated, box = GroundTruth([record], CLASS_NAMES).instances(1, 3)
    assert (polygon.area, annotated.area, box.area) == (400.0, 7.5, 400.0)
    assert mask_api.decode(polygon.rle)[10:30, 10:30].all() and box.rle is None
