"""Random baselines: what moves, what stays, and where it lands."""

import copy

import numpy as np
import pytest
from evaluation_cases import (
    HEIGHT,
    WIDTH,
    perfect_detections,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)
from pycocotools import mask as mask_api

from fewshot_d2.evaluation import detection_shift, evaluate_detections, gt_shift
from fewshot_d2.evaluation.coco_scoring import planned_pairs


def test_gt_shift_moves_boxes_with_their_masks():
    dicts = random_dicts(np.random.default_rng(0), num_images=20, max_instances=8)
    truth, plan = truth_of(dicts), plan_of(dicts)
    shifted = gt_shift(truth, plan, np.random.default_rng(1))
    originals = [
        i for pair in sorted(planned_pairs(plan)) for i in truth.instances(*pair) if not i.is_crowd
    ]
    assert len(shifted) == len(originals) > 20
    moved = 0
    for row, instance in zip(shifted, originals, strict=True):
        x, y, width, height = row["bbox"]
        assert (width, height) == instance.box[2:]
        assert 0 <= x <= WIDTH - width and 0 <= y <= HEIGHT - height
        assert 0.8 <= row["score"] < 1.0
        assert (row["image_id"], row["category_id"]) == (instance.image_id, instance.class_id)
        dx, dy = x - instance.box[0], y - instance.box[1]
        before, after = mask_api.decode(instance.rle), mask_api.decode(row["segmentation"])
        rows, columns = np.nonzero(before)
        expected = np.zeros_like(before)
        expected[rows + int(dy), columns + int(dx)] = 1
        assert (after == expected).all()
        moved += (dx, dy) != (0, 0)
    assert moved > len(shifted) / 2


def test_gt_shift_reaches_every_place_equally():
    dicts = random_dicts(np.random.default_rng(0), num_images=1, max_instances=1, crowd=0.0)
    dicts[0]["annotations"][0].update(bbox=[50, 3, WIDTH - 4, 20], category_id=0)
    dicts[0]["annotations"][0].pop("segmentation")
    dicts[0]["annotations"][0]["bbox"][0] = 2
    truth, plan = truth_of(dicts), plan_of(dicts)
    rng = np.random.default_rng(2)
    places = [gt_shift(truth, plan, rng)[0]["bbox"][0] for _ in range(1000)]
    values, counts = np.unique(places, return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 4] and counts.min() > 150


def test_gt_shift_of_a_box_as_large_as_its_image_stays():
    dicts = random_dicts(np.random.default_rng(0), num_images=1, max_instances=1, crowd=0.0)
    dicts[0]["annotations"][0].update(bbox=[0, 0, WIDTH, HEIGHT])
    dicts[0]["annotations"][0].pop("segmentation")
    rows = gt_shift(truth_of(dicts), plan_of(dicts), np.random.default_rng(0))
    assert rows[0]["bbox"] == [0, 0, WIDTH, HEIGHT] and "segmentation" not in rows[0]


@pytest.mark.parametrize("protocol", ["present", "open"])
def test_gt_shift_is_scored_like_a_model(protocol):
    dicts = random_dicts(np.random.default_rng(3), num_images=30)
    truth, plan = truth_of(dicts), plan_of(dicts, protocol=protocol)
    rows = gt_shift(truth, plan, np.random.default_rng(4))
    assert rows == gt_shift(truth, plan, np.random.default_rng(4))
    results = evaluate_detections(truth, rows, plan)
    assert 0 < results["bbox"]["AP50"] < 50
    assert results["segm"]["AP50"] < 50
    if protocol == "open":
        # It never searches in vain: presence is known to it.
        assert results["presence"]["AUROC"] == 100


def test_detection_shift_keeps_sizes_masks_and_the_scores_of_a_pair():
    rng = np.random.default_rng(5)
    dicts = random_dicts(rng)
    truth, plan = truth_of(dicts), plan_of(dicts, protocol="open")
    detections = [d for d in random_detections(rng, dicts) if d["category_id"] in (3, 7, 20)]
    before = copy.deepcopy(detections)
    shifted = detection_shift(truth, detections, plan, np.random.default_rng(6))
    assert detections == before and len(shifted) == len(detections)
    for pair in planned_pairs(plan):
        old = [d for d in detections if (d["image_id"], d["category_id"]) == pair]
        new = [d for d in shifted if (d["image_id"], d["category_id"]) == pair]
        assert [d["bbox"][2:] for d in new] == [d["bbox"][2:] for d in old]
        assert [d["segmentation"] for d in new] == [d["segmentation"] for d in old]
        assert sorted(d["score"] for d in new) == sorted(d["score"] for d in old)
        for x, y, width, height in (d["bbox"] for d in new):
            assert 0 <= x <= WIDTH - width and 0 <= y <= HEIGHT - height
    perfect = evaluate_detections(truth, perfect_detections(dicts), plan)
    random = evaluate_detections(
        truth, detection_shift(truth, perfect_detections(dicts), plan, rng), plan
    )
    assert random["bbox"]["AP"] < perfect["bbox"]["AP"] / 2


def test_nothing_to_shift():
    dicts = random_dicts(np.random.default_rng(0), crowd=0.0)
    absent = plan_of(dicts, class_ids=(21,), protocol="open")
    rng = np.random.default_rng(0)
    assert gt_shift(truth_of(dicts), absent, rng) == []
    assert detection_shift(truth_of(dicts), [], absent, rng) == []
