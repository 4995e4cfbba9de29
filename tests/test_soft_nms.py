"""Soft-NMS against a naive double loop, in its limits and at its edges."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from fewshot_d2.modeling.soft_nms import batched_soft_nms, soft_nms


def random_boxes(rng, count):
    corners = torch.rand(count, 2, generator=rng) * 30
    return torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2, generator=rng)], dim=1)


def by_loops(boxes, scores, method, sigma, threshold):
    """{index: final score} of one class."""
    left, final = dict(enumerate(scores.tolist())), {}
    while left:
        best = max(left, key=left.get)
        final[best] = left.pop(best)
        for other in left:
            overlap = box_iou(boxes[best : best + 1], boxes[other : other + 1]).item()
            if method == "gaussian":
                left[other] *= math.exp(-(overlap**2) / sigma)
            elif overlap > threshold:
                left[other] *= 1 - overlap
    return final


@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_equals_loops_class_by_class(rng, method, num_classes):
    boxes, scores = random_boxes(rng, 30), torch.rand(30, generator=rng)
    class_ids = torch.randint(0, num_classes, (30,), generator=rng) * 7
    expected = {}
    for c in class_ids.unique():
        own = (class_ids == c).nonzero()[:, 0]
        found = by_loops(boxes[own], scores[own], method, 0.6, 0.3)
        expected.update({own[i].item(): score for i, score in found.items()})
    kept, final = batched_soft_nms(boxes, scores, class_ids, method=method, min_score=0.0)
    assert sorted(kept.tolist()) == list(range(30))
    assert (final.diff() <= 0).all()
    assert_close(final, torch.tensor([expected[i] for i in kept.tolist()]), atol=1e-6, rtol=1e-5)
    cut, scores_above = batched_soft_nms(boxes, scores, class_ids, method=method, min_score=0.3)
    assert cut.tolist() == kept[final >= 0.3].tolist() and (scores_above >= 0.3).all()


def test_order_of_the_input_does_not_matter(rng):
    boxes, scores = random_boxes(rng, 20), torch.rand(20, generator=rng)
    kept, final = soft_nms(boxes, scores, method="gaussian")
    order = torch.randperm(20, generator=rng)
    again, same = soft_nms(boxes[order], scores[order], method="gaussian")
    assert order[again].tolist() == kept.tolist()
    assert_close(same, final)


def test_disjoint_boxes_keep_their_scores():
    boxes = torch.tensor([[0.0, 0, 5, 5], [10, 10, 15, 15], [20, 0, 25, 5]])
    for method in ("gaussian", "linear"):
        kept, final = soft_nms(boxes, torch.tensor([0.2, 0.9, 0.5]), method=method)
        assert kept.tolist() == [1, 2, 0]
        assert_close(final, torch.tensor([0.9, 0.5, 0.2]))


def test_identical_boxes():
    boxes, scores = torch.tensor([[0.0, 0, 5, 5]]).repeat(2, 1), torch.tensor([0.9, 0.8])
    _, final = soft_nms(boxes, scores, method="gaussian", sigma=0.5)
    assert_close(final, torch.tensor([0.9, 0.8 * math.exp(-2)]))
    kept, final = soft_nms(boxes, scores, method="linear")
    assert kept.tolist() == [0] and final.tolist() == pytest.approx([0.9])
    # No cut-off: a score of zero is kept too.
    assert len(soft_nms(boxes, scores, method="linear", min_score=0.0)[0]) == 2


def test_narrow_gaussian_kills_every_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60]])
    kept, _ = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.1]), method="gaussian", sigma=1e-4)
    assert kept.tolist() == [0, 2]


def test_boxes_without_an_area_overlap_nothing():
    boxes = torch.tensor([[0.0, 0, 0, 5], [0, 0, 0, 5], [1, 1, 3, 3]])
    for method in ("gaussian", "linear"):
        kept, final = soft_nms(boxes, torch.tensor([0.7, 0.8, 0.9]), method=method)
        assert kept.tolist() == [2, 1, 0]
        assert_close(final, torch.tensor([0.9, 0.8, 0.7]))


def test_half_precision_one_box_and_none():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]).half(), torch.tensor([0.5]).half()
    kept, final = soft_nms(boxes, scores, method="gaussian")
    assert kept.tolist() == [0] and final.dtype == torch.float32
    kept, final = soft_nms(boxes[:0], scores[:0], method="linear")
    assert kept.shape == final.shape == (0,) and kept.dtype == torch.int64


def test_bad_input_is_refused():
    boxes = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="method must be one of"):
        soft_nms(boxes, torch.ones(1), method="hard")
    with pytest.raises(ValueError, match="NaN"):
        soft_nms(boxes, torch.tensor([torch.nan]), method="linear")
