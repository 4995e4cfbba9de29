"""OS2D: both losses and NMS in chunks against loops."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from fewshot_d2.modeling import losses
from fewshot_d2.modeling.losses import contrastive_loss, hinges, ranked_list_loss
from fewshot_d2.systems.os2d.detections import chunked_nms
from fewshot_d2.systems.os2d.objective import Objective


def places(rng, count=200, num_classes=4):
    scores = torch.rand(count, generator=rng, dtype=torch.float64)
    labels = torch.randint(-1, 2, (count,), generator=rng)
    return scores, labels, torch.randint(0, num_classes, (count,), generator=rng)


def naive_hinges(scores, labels, margins):
    positive = [0.5 * max(margins[0] - s, 0) for s, t in zip(scores, labels, strict=True) if t == 1]
    negative = [0.5 * max(s - margins[1], 0) for s, t in zip(scores, labels, strict=True) if t == 0]
    return positive, negative


def naive_ranked_list(scores, labels, classes, margins):
    scores, labels, classes = scores.tolist(), labels.tolist(), classes.tolist()
    positive, _ = naive_hinges(scores, labels, margins)
    active = [loss for loss in positive if loss > 0]
    first = sum(active) / max(len(active), 1)
    sums = []
    for c in sorted(set(classes)):
        own = [i for i, k in enumerate(classes) if k == c]
        _, losses = naive_hinges([scores[i] for i in own], [labels[i] for i in own], margins)
        most = max(losses, default=0.0)
        if most <= 1e-5:
            continue
        weights = [math.exp((x - most) * -math.log(0.001) / most) if x > 0 else 0.0 for x in losses]
        sums.append(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
    second = sum(sums) / len(sums) if sums and positive else 0.0
    return first, second


@pytest.mark.parametrize("margins", [(0.6, 0.5), (1.0, 0.5), (0.1, 0.95)])
def test_losses_are_those_of_loops(rng, margins):
    scores, labels, classes = places(rng)
    # A class without a negative above the margin, and one without any negative.
    scores[classes == 2] = 0.3 * scores[classes == 2]
    labels[classes == 3] = labels[classes == 3].abs()
    positive, negative = hinges(scores, scores, labels, margins)
    first, second = naive_ranked_list(scores, labels, classes, margins)
    found = ranked_list_loss(positive, negative, labels, classes, num_classes=5)
    assert_close(found[0].item(), first, rtol=0, atol=1e-5)
    assert_close(found[1].item(), second, rtol=0, atol=1e-5)
    of_positives, of_negatives = naive_hinges(scores.tolist(), labels.tolist(), margins)
    count = len(of_positives)
    hardest = sorted(of_negatives, reverse=True)[: 3 * count]
    found = contrastive_loss(positive, negative, labels)
    assert_close(found[0].item(), sum(x * x for x in of_positives) / count, rtol=0, atol=1e-5)
    assert_close(found[1].item(), sum(x * x for x in hardest) / count, rtol=0, atol=1e-5)


def test_only_the_hardest_negatives_count():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2])
    labels = torch.tensor([0, 0, 0, 0, 1])
    positive, negative = hinges(scores, scores, labels, (1.0, 0.5))
    first, second = contrastive_loss(positive, negative, labels, negatives_per_positive=2)
    assert_close(first, torch.tensor(0.4**2))
    assert_close(second, torch.tensor(0.2**2 + 0.15**2))


def test_weights_fall_a_thousandfold_to_the_margin():
    """Two negatives: the larger loss and one next to the margin."""
    scores = torch.tensor([0.9, 0.5 + 1e-6, 0.0], dtype=torch.float64)
    labels, classes = torch.tensor([0, 0, 1]), torch.zeros(3).long()
    positive, negative = hinges(scores, scores, labels, (0.6, 0.5))
    negative = negative.requires_grad_()
    ranked_list_loss(positive, negative, labels, classes, num_classes=1)[1].backward()
    assert_close(
        negative.grad[0] / negative.grad[1], torch.tensor(1000.0).double(), rtol=1e-3, atol=0
    )
    assert_close(negative.grad.sum(), torch.tensor(1.0).double())


def test_small_weights_times_positives_are_dropped_and_the_rest_stays(monkeypatch):
    """Weights 0.5 and 0.4995 of two classes' hardest, a thousandth of it for one at the margin."""
    monkeypatch.setattr(losses, "_LEAST_WEIGHT", 1.2e-3)
    scores = torch.tensor([0.9, 0.5 + 1e-6, 0.8, 0.0, 0.0, 0.0], dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 0, 1, 1])
    gradients = []
    for labels in ([0, 0, 0, 1, -1, -1], [0, 0, 0, 1, 1, 1]):
        labels = torch.tensor(labels)
        positive, negative = hinges(scores, scores, labels, (0.6, 0.5))
        negative = negative.requires_grad_()
        ranked_list_loss(positive, negative, labels, classes, num_classes=2)[1].backward()
        gradients.append(negative.grad[:3])
    small = 0.5 / 1001
    assert_close(gradients[0], torch.tensor([0.5 - small, 0, 0.5]).double(), rtol=1e-4, atol=0)
    assert_close(gradients[1], torch.tensor([0.5 - small, small, 0.5]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [contrastive_loss, ranked_list_loss])
def test_without_positives_and_without_places_the_loss_is_zero_and_has_a_gradient(loss):
    for count in (0, 3):
        scores = torch.full((count,), 0.9, requires_grad=True)
        labels, classes = torch.zeros(count).long(), torch.zeros(count).long()
        positive, negative = hinges(scores, scores, labels, (0.6, 0.5))
        arguments, more = ((classes,), {"num_classes": 1}) if loss is ranked_list_loss else ((), {})
        first, second = loss(positive, negative, labels, *arguments, **more)
        assert first == second == 0
        (first + second).backward()
        assert torch.isfinite(scores.grad).all()


def test_gradients_go_to_the_two_scores_by_label(rng):
    scores, labels, classes = places(rng)
    first, second = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    pair = hinges(first, second, labels, (0.6, 0.5))
    sum(ranked_list_loss(*pair, labels, classes, num_classes=4)).backward()
    assert first.grad[labels == 1].any() and not first.grad[labels != 1].any()
    assert second.grad[labels == 0].any() and not second.grad[labels != 0].any()
    # The weights of negatives have no gradient, so the losses themselves are checked by differences elsewhere.
    assert torch.autograd.gradcheck(
        lambda s: contrastive_loss(*hinges(s, s, labels, (1.0, 0.5)), labels),
        scores.clone().requires_grad_(),
    )


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="MODEL.OS2D.LOSS"):
        Objective("triplet", (0.6, 0.5), 3, 1.0, 0.2, (0.5, 0.1), None)


def naive_nms(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(box_iou(boxes[i : i + 1], boxes[j : j + 1]) <= threshold for j in kept):
            kept.append(i)
    return kept


def naive_chunks(boxes, scores, threshold, chunk):
    alive = list(range(len(boxes)))
    while True:
        parts = [alive[i : i + chunk] for i in range(0, len(alive), chunk)]
        left = [p[j] for p in parts for j in naive_nms(boxes[p], scores[p].tolist(), threshold)]
        if len(parts) <= 1 or len(left) == len(alive):
            return left
        alive = left


def test_nms_in_chunks_is_a_loop_and_not_plain_nms(rng):
    corner = 30 * torch.rand(60, 2, generator=rng)
    boxes = torch.cat([corner, corner + 20 + 10 * torch.rand(60, 2, generator=rng)], dim=1)
    scores = torch.rand(60, generator=rng)
    plain = chunked_nms(boxes, scores, 0.3, 0).tolist()
    assert (
        plain
        == naive_nms(boxes, scores.tolist(), 0.3)
        == chunked_nms(boxes, scores, 0.3, 60).tolist()
    )
    different = 0
    for chunk in (7, 20):
        found = chunked_nms(boxes, scores, 0.3, chunk).tolist()
        assert found == naive_chunks(boxes, scores, 0.3, chunk)
        different += set(found) != set(plain)
    assert different
    for chunk in (0, 5):
        assert chunked_nms(boxes[:0], scores[:0], 0.3, chunk).shape == (0,)
