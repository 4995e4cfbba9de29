"""Scores of the single-target protocol against loops over pixels."""

import math

import pytest
import torch
from evaluation_cases import HEIGHT, WIDTH, box_mask, rle

from fewshot_d2.data.plans import EvaluationPlan, PlannedEpisode
from fewshot_d2.evaluation.coco_scoring import GroundTruth
from fewshot_d2.evaluation.localization import (
    centre_distances,
    localization_scores,
    mask_iou_per_scene,
    single_target_scores,
)


def naive_iou(a, b):
    both = sum(bool(a[y][x] and b[y][x]) for y in range(len(a)) for x in range(len(a[0])))
    any_ = sum(bool(a[y][x] or b[y][x]) for y in range(len(a)) for x in range(len(a[0])))
    return both / any_ if any_ else 1.0


def naive_centre(mask):
    points = [(x, y) for y in range(len(mask)) for x in range(len(mask[0])) if mask[y][x]]
    if not points:
        return None
    return tuple(sum(p[axis] for p in points) / len(points) for axis in (0, 1))


def naive_distance(a, b):
    a, b = naive_centre(a), naive_centre(b)
    if a is None and b is None:
        return 0.0
    return math.inf if a is None or b is None else math.dist(a, b)


@pytest.fixture
def masks(rng):
    predicted = torch.rand(12, 7, 9, generator=rng) < torch.linspace(0, 0.6, 12)[:, None, None]
    target = torch.rand(12, 7, 9, generator=rng) < 0.2
    target[:2] = False
    predicted[1, 3, 3] = True
    return predicted, target


def test_scores_equal_loops(masks):
    predicted, target = masks
    pairs = list(zip(predicted.tolist(), target.tolist()))
    iou = torch.tensor([naive_iou(a, b) for a, b in pairs])
    distance = torch.tensor([naive_distance(a, b) for a, b in pairs])
    torch.testing.assert_close(mask_iou_per_scene(predicted, target), iou)
    torch.testing.assert_close(centre_distances(predicted, target), distance)
    scores = localization_scores(predicted, target, max_distance=1.5)
    assert scores["mask_iou"] == pytest.approx(iou.mean().item())
    assert scores["localization_accuracy"] == pytest.approx((distance < 1.5).float().mean().item())


def test_empty_masks():
    empty, full = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert mask_iou_per_scene(empty, empty).tolist() == [1.0]
    assert centre_distances(empty, empty).tolist() == [0.0]
    assert mask_iou_per_scene(empty, full).tolist() == [0.0]
    assert centre_distances(empty, full).tolist() == [math.inf]
    assert localization_scores(empty, full) == {"mask_iou": 0.0, "localization_accuracy": 0.0}


def test_no_scenes():
    none = torch.zeros(0, 4, 4, dtype=torch.bool)
    assert mask_iou_per_scene(none, none).shape == centre_distances(none, none).shape == (0,)
    assert all(math.isnan(score) for score in localization_scores(none, none).values())


def test_a_distance_of_exactly_the_limit_is_a_miss():
    predicted, target = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
    predicted[..., 0], target[..., 5] = True, True
    assert localization_scores(predicted, target)["localization_accuracy"] == 0.0
    assert localization_scores(predicted, target, 5.01)["localization_accuracy"] == 1.0


def test_wrong_masks_are_refused():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="predicted masks must be bool"):
        mask_iou_per_scene(masks.float(), masks)
    with pytest.raises(ValueError, match=r"target masks must be bool \(N, H, W\), got .* \(4, 4\)"):
        mask_iou_per_scene(masks, masks[0])
    with pytest.raises(ValueError, match="must have the targets' shape"):
        centre_distances(masks, masks[:1])


def square(x, y, side=6):
    return box_mask([x, y, side, side])


@pytest.fixture
def single_target(tmp_path):
    """Two scenes with one instance each, and their plan."""
    masks = [square(10, 10), square(40, 20)]
    dicts = [
        {
            "image_id": i,
            "file_name": "",
            "height": HEIGHT,
            "width": WIDTH,
            "annotations": [
                {
                    "id": i + 1,
                    "bbox": [0, 0, 9, 9],
                    "bbox_mode": 1,
                    "category_id": 0,
                    "iscrowd": 0,
                    "segmentation": rle(mask),
                }
            ],
        }
        for i, mask in enumerate(masks)
    ]
    episodes = tuple(PlannedEpisode(i, i, (3,), ((i + 1,),)) for i in range(2))
    plan = EvaluationPlan("d", "d", "all", "all", "present", 1, 0, 0, (3,), episodes)
    return GroundTruth(dicts, {3: "cat"}), plan, masks


def row(image_id, mask, score):
    return {
        "image_id": image_id,
        "category_id": 3,
        "bbox": [0, 0, 1, 1],
        "score": score,
        "segmentation": rle(mask),
    }


def test_best_detection_counts_and_a_missing_one_is_empty(single_target):
    truth, plan, masks = single_target
    found = [row(0, square(60, 60), 0.2), row(0, masks[0], 0.9), row(0, square(70, 10), 0.5)]
    assert single_target_scores(truth, found, plan) == {
        "mask_iou": 50.0,
        "localization_accuracy": 50.0,
    }
    found.append(row(1, masks[1], 0.1))
    assert single_target_scores(truth, found, plan)["mask_iou"] == 100.0
    assert single_target_scores(truth, [], plan)["mask_iou"] == 0.0
