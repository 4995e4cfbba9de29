"""RepMet's losses on ROIs against loops, worked numbers of the spec, and where they could fail."""

import math

import pytest
import torch
import torch.nn.functional as F
from repmet_cases import CHANNELS, NUM_CLASSES, labelled, predictor
from torch.testing import assert_close

from fewshot_d2.modeling.losses import hardest_rois


def smooth_l1(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def losses_by_loops(layers, x, proposals, keep):
    """Spec 1.3-1.5 one ROI after another."""
    embeddings = F.normalize(layers.embedding(x), dim=1)
    modes = F.normalize(layers.representatives, dim=2)
    auxiliary, deltas = layers.cls_score(x), layers.bbox_pred(x)
    totals = {"cls": 0.0, "box_reg": 0.0, "margin": 0.0, "auxiliary": 0.0}
    start = 0
    for image in proposals:
        rows = []
        for i in range(len(image)):
            label, e = image.gt_classes[i].item(), embeddings[start + i]
            d = [min(((e - m) ** 2).sum().item() for m in modes[c]) for c in range(NUM_CLASSES)]
            q = [math.exp(-v / (2 * 0.5**2)) + 1e-7 for v in d]
            q.append(1 + 1e-7 - max(q))
            exps = [math.exp(15 * v) for v in q]
            ce = -math.log(exps[label] / sum(exps))
            box = margin = 0.0
            if label < NUM_CLASSES:
                wanted = layers.box2box_transform.get_deltas(
                    image.proposal_boxes.tensor[i : i + 1], image.gt_boxes.tensor[i : i + 1]
                )[0]
                box = sum(
                    smooth_l1((a - b).item())
                    for a, b in zip(deltas[start + i], wanted, strict=True)
                )
                wrong = min(v for c, v in enumerate(d) if c != label)
                margin = max(d[label] - wrong + 0.5, 0.0)
            linear = F.cross_entropy(auxiliary[start + i], image.gt_classes[i]).item()
            rows.append((ce, box, margin, linear))
        kept = sorted(rows, key=lambda r: -(r[0] + r[1]))[:keep]
        totals["cls"] += sum(r[0] for r in kept) / len(kept)
        totals["auxiliary"] += sum(r[3] for r in kept) / len(kept)
        totals["box_reg"] += sum(r[1] for r in kept) / keep
        totals["margin"] += sum(r[2] for r in kept) / keep
        start += len(image)
    return {f"loss_{name}": total / len(proposals) for name, total in totals.items()}


@pytest.mark.parametrize("keep", [2, 4, 100])
def test_losses_equal_loops(rng, keep):
    layers = predictor(hard_rois=keep)
    proposals = [
        labelled([0, 1, 2, 3, 3, 3], rng),
        labelled([3, 3, 3], rng, with_truth=False),
        labelled([2, 3, 0], rng),
    ]
    x = torch.randn(12, CHANNELS, generator=rng)
    actual = layers.losses(layers(x), proposals)
    expected = losses_by_loops(layers, x, proposals, keep)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name].item(), value, atol=1e-5, rtol=1e-4)


def test_loss_weights_multiply(rng):
    x, proposals = torch.randn(3, CHANNELS, generator=rng), [labelled([0, 2, 3], rng)]
    plain = predictor().losses(predictor()(x), proposals)
    weighted = predictor(
        margin_weight=0.0,
        auxiliary_weight=2.0,
        loss_weight={"loss_cls": 3.0, "loss_box_reg": 0.5},
    )
    for name, factor in (("cls", 3), ("margin", 0), ("auxiliary", 2), ("box_reg", 0.5)):
        name = f"loss_{name}"
        assert_close(weighted.losses(weighted(x), proposals)[name], factor * plain[name])


def test_worked_numbers_of_the_spec():
    layers = predictor(num_classes=2)
    layers.embedding = torch.nn.Identity()
    layers.representatives = torch.nn.Parameter(
        torch.tensor(
            [[[2.0, 0, 0, 0], [0, 3.0, 0, 0]], [[0, 0, 1.0, 0], [0, 0, 1.0, 2.0]]],
        )
    )
    x = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0.1, 0], [0, 0, 1, 1], [-1, 0, 0, 0.2]])
    x = F.pad(x, (0, CHANNELS - 4))
    layers.representatives = torch.nn.Parameter(F.pad(layers.representatives, (0, CHANNELS - 4)))
    scores, _ = layers(x)
    labels = torch.tensor([0, 0, 1, 2])
    assert_close(layers.class_losses(scores, labels).mean().item(), 5.7813e-5, atol=1e-8, rtol=1e-3)
    raw = predictor(score="posterior", num_classes=2).probabilities(scores)
    expected = [
        [1.0, 0.018316, 0],
        [0.797579, 0.027857, 0.202421],
        [0.018316, 0.814430, 0.185570],
        [0.018316, 0.036944, 0.963056],
    ]
    assert_close(raw, torch.tensor(expected), atol=2e-6, rtol=0)
    literal = predictor(class_loss="literal", num_classes=2).class_losses(scores, labels)
    assert_close(
        literal[1:].exp().reciprocal(),
        torch.tensor([0.797579, 0.81443, 0.963056]),
        atol=2e-6,
        rtol=0,
    )


def test_margin_on_distances(rng):
    x, proposals = torch.randn(1, CHANNELS, generator=rng), [labelled([1], rng)]
    layers = predictor(margin_on="distance", hard_rois=1)
    distances = layers(x)[0].distances.sqrt().amin(dim=2)[0]
    wrong = torch.minimum(distances[0], distances[2])
    expected = F.relu(distances[1] - wrong + 0.5)
    assert_close(layers.losses(layers(x), proposals)["loss_margin"], expected)


def test_box_losses_make_rois_hard_too(rng):
    layers = predictor(hard_rois=1)
    proposals = [labelled([0, 1], rng)]
    x = torch.randn(2, CHANNELS, generator=rng)
    scores, deltas = layers(x)
    # The second one is classified better, and far off.
    easy = layers.class_losses(scores, torch.tensor([0, 1])).argmin()
    wanted = layers.box2box_transform.get_deltas(
        proposals[0].proposal_boxes.tensor, proposals[0].gt_boxes.tensor
    )
    deltas = wanted.clone()
    deltas[easy] += 101.5
    losses = layers.losses((scores, deltas), proposals)
    assert_close(losses["loss_box_reg"].item(), 4 * 101.0, atol=1e-2, rtol=1e-4)


def test_margin_on_distances_has_a_gradient_at_a_representative(rng):
    layers = predictor(margin_on="distance", num_classes=2)
    scores, deltas = layers(torch.randn(1, CHANNELS, generator=rng))
    distances = torch.tensor([[[0.0, 1.0], [0.01, 2.0]]], requires_grad=True)
    scores = scores._replace(distances=distances)
    losses = layers.losses((scores, deltas), [labelled([0], rng)])
    assert losses["loss_margin"] > 0
    losses["loss_margin"].backward()
    assert torch.isfinite(distances.grad).all()


@pytest.mark.parametrize("keep", [1, 3, 10])
def test_hardest_rois_equal_sorting(rng, keep):
    losses, counts = torch.rand(12, generator=rng), [5, 0, 4, 3]
    kept = hardest_rois(losses, counts, keep)
    start = 0
    for count in counts:
        part = losses[start : start + count]
        expected = set(part.argsort(descending=True)[:keep].tolist())
        assert set(kept[start : start + count].nonzero()[:, 0].tolist()) == expected
        start += count


@pytest.mark.parametrize("margin_on", ["squared_distance", "distance"])
def test_class_without_any_mode_leaves_the_losses_finite(rng, margin_on):
    layers = predictor(margin_on=margin_on)
    x, proposals = torch.randn(4, CHANNELS, generator=rng), [labelled([0, 1, 3, 3], rng)]
    episode = layers.episode_tensors([x[:1], x[1:2], x[:0]], [1, 1, 1])
    losses = layers.losses(layers(x, episode), proposals)
    fewer = {name: tensor[:2] for name, tensor in episode.items()}
    proposals[0].gt_classes = torch.tensor([0, 1, 2, 2])
    expected = layers.losses(layers(x, fewer), proposals)
    assert_close(losses["loss_margin"], expected["loss_margin"])
    sum(losses.values()).backward()
    assert torch.isfinite(layers.embedding.weight.grad).all()
