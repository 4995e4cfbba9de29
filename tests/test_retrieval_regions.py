"""Excitation back-propagation against loops, and the regions that come of it."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from fewshot_d2.retrieval.excitation import ExcitationRule, excite
from fewshot_d2.retrieval.regions import (
    ProposalRegions,
    SalientRegions,
    describe_regions,
    find_seeds,
    seed_box,
)


def back(model, x, start):
    """Weight at the input for a start at the output; the output."""
    x = x.clone().requires_grad_()
    with ExcitationRule():
        out = model(x)
    return excite(out, x, start), out


def conv_by_loops(x, weight, start, *, stride, padding, dilation, groups):
    """The rule, unit by unit: each output gives what it has to its inputs in proportion to x+ * w+."""
    x, weight = (x - x.min())[0].numpy(), weight.clamp(min=0).numpy()
    given = np.zeros_like(x)
    per_group = x.shape[0] // groups
    for o, r, c in np.ndindex(*start.shape):
        parts = {}
        first = o // (weight.shape[0] // groups) * per_group
        for i, a, b in np.ndindex(*weight.shape[1:]):
            y, z = r * stride - padding + a * dilation, c * stride - padding + b * dilation
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                parts[first + i, y, z] = x[first + i, y, z] * weight[o, i, a, b]
        total = sum(parts.values())
        if total >= 1e-10:
            for place, part in parts.items():
                given[place] += part / total * start[o, r, c].item()
    return torch.from_numpy(given)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (2, 0, 1, 2), (1, 1, 1, 4)],
)
def test_convolution_by_loops(rng, stride, padding, dilation, groups):
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = torch.randn(1, 4, 7, 6, generator=rng)
    conv = nn.Conv2d(4, 4, 3, **settings)
    nn.init.normal_(conv.weight, generator=rng)
    start = torch.rand(3, *conv(x).shape[1:], generator=rng)
    found, out = back(conv, x, start)
    assert torch.equal(out, conv(x))
    for one, begin in zip(found, start):
        torch.testing.assert_close(one, conv_by_loops(x, conv.weight.detach(), begin, **settings))
    assert conv.weight.grad is None


def test_unit_that_nothing_excites_gives_nothing():
    found, _ = back(
        lambda x: F.conv2d(x, -torch.ones(1, 1, 1, 1)),
        torch.rand(1, 1, 3, 3),
        torch.ones(1, 1, 3, 3),
    )
    assert found.eq(0).all()


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [2, 3])
def test_padding_by_name(rng, padding, size):
    conv = nn.Conv2d(2, 3, size, padding=padding, dilation=2)
    x = torch.rand(1, 2, 7, 7, generator=rng)
    expected = conv(x).detach()
    found, out = back(conv, x, torch.ones_like(expected))
    torch.testing.assert_close(out, expected)
    assert found.shape == x.shape and found.sum() <= expected.numel() * 1.0001


def test_sum_of_maps_shares_by_positive_parts(rng):
    x = torch.randn(1, 2, 3, 3, generator=rng)
    first, second = x, (2 - x) * 0.5
    start = torch.rand(1, 2, 3, 3, generator=rng)
    found = []
    for branch in (0, 1):
        leaf = [t.clone().requires_grad_() for t in (first, second)]
        with ExcitationRule():
            out = leaf[0] + leaf[1]
        found.append(excite(out, leaf[branch], start)[0])
    for place in itertools.product(range(2), range(3), range(3)):
        a, b = (max(t[0][place].item(), 0) for t in (first, second))
        expected = a / (a + b) if a + b else 0.5
        assert found[0][place].item() == pytest.approx(expected * start[0][place].item(), abs=1e-6)
    torch.testing.assert_close(found[0] + found[1], start[0])


def test_negative_maps_share_half_and_half():
    x = -torch.ones(1, 1, 2, 2)
    found, _ = back(lambda x: x + (x * 3.0), x, torch.ones(1, 1, 2, 2))
    assert found.eq(1).all()


def inplace(x):
    x = x * 1.0
    x += x.clone()
    return F.relu_(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        nn.Hardswish(),
        nn.SiLU(),
        nn.BatchNorm2d(3).eval(),
        nn.GroupNorm(3, 3),
        FrozenBatchNorm2d(3),
        inplace,
        torch.relu,
        lambda x: x.clamp_(0, 1),
        lambda x: torch.linspace(0.1, 3, 3).view(3, 1, 1) * x + 2,
        lambda x: x.mean((2, 3), keepdim=True).sigmoid() * x,
        lambda x: x / 6,
        lambda x: torch.cat([x[:, :1], x[:, 1:]], dim=1),
    ],
)
def test_weight_passes_unchanged(rng, layer):
    x, start = (torch.randn(1, 3, 4, 5, generator=rng) for _ in range(2))
    found, out = back(layer, x, start)
    torch.testing.assert_close(found, start)
    torch.testing.assert_close(out, layer(x.clone()))


def test_two_maps_multiplied_keep_their_gradient(rng):
    x = torch.rand(1, 1, 2, 2, generator=rng)
    found, _ = back(lambda x: x * x, x, torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(found, 2 * x)


def test_weight_is_conserved_without_padding(rng):
    """Positive inputs, weights and no padding: nothing is lost in a deep stack with a shortcut and pooling."""
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, bias=False) for _ in range(2))
    for conv in convs:
        nn.init.uniform_(conv.weight, generator=rng)

    def model(x):
        y = F.relu(convs[0](x))
        return F.max_pool2d(convs[1](y + F.relu(x[:, :, 1:-1, 1:-1])), 2)

    x = torch.rand(1, 4, 12, 12, generator=rng)
    start = torch.rand(2, 4, 4, 4, generator=rng)
    found, _ = back(model, x, start)
    torch.testing.assert_close(found.sum((1, 2, 3)), start.sum((1, 2, 3)))
    assert (found >= 0).all()


@pytest.mark.parametrize("build", [resnet18, mobilenet_v2])
def test_real_networks_keep_their_values(build):
    model = build(weights=None).eval()
    body = nn.Sequential(*list(model.children())[:-2]) if build is resnet18 else model.features
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    start = torch.zeros(2, *body(x).shape[1:])
    start[:, :, 0, 0] = 1
    found, out = back(body, x, start)
    torch.testing.assert_close(out, body(x))
    assert (found >= 0).all() and found.sum() > 0 and torch.equal(found[0], found[1])
    assert all(p.grad is None for p in model.parameters())


def test_starts_must_fit():
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="starts must be"):
        excite(x * 2, x, torch.ones(1, 1, 3, 3))


def test_describe_regions_is_the_mean_of_whole_cells(rng):
    features = torch.rand(1, 5, 6, 8, generator=rng)
    boxes = torch.tensor([[0, 0, 128, 96], [16, 32, 48, 80]])
    # Samples lie at the cell centres where a box is of whole cells.
    means = [features[0].mean((1, 2)), features[0, :, 2:5, 1:3].mean((1, 2))]
    expected = torch.stack([m / math.sqrt(sum(v * v for v in m.tolist())) for m in means])
    torch.testing.assert_close(describe_regions(features, boxes, 16), expected)


@pytest.mark.parametrize(
    ("features", "boxes"),
    [
        (torch.rand(2, 1, 2, 2), [[0.0, 0, 1, 1]]),
        (torch.rand(1, 2, 2), [[0.0, 0, 1, 1]]),
        (torch.rand(1, 1, 2, 2), [[0.0, 0, 0, 1]]),
        (torch.rand(1, 1, 2, 2), [0.0, 0, 1, 1]),
    ],
)
def test_describe_regions_bad_input(features, boxes):
    with pytest.raises(ValueError, match="must be"):
        describe_regions(features, torch.tensor(boxes), 4)


def test_find_seeds_by_loops(rng):
    strength = torch.rand(9, 11, generator=rng)
    values, median = strength.numpy(), strength.median().item()
    expected = []
    for r, c in np.ndindex(9, 11):
        around = values[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        if values[r, c] == around.max() and values[r, c] > median:
            expected.append((values[r, c], [r, c]))
    expected = [place for _, place in sorted(expected, reverse=True)][:5]
    seeds, strengths = find_seeds(strength, 5)
    assert seeds.tolist() == expected
    assert strengths.tolist() == [values[tuple(p)] for p in expected]
    assert not len(find_seeds(torch.ones(4, 4), 5)[0])


def test_seed_box_takes_the_part_of_the_seed():
    energy = np.zeros((6, 8))
    energy[1:3, 1:4] = 1
    energy[3, 4] = 0.2  # joined by a corner
    energy[5, 6:] = 0.6
    energy[0, 7] = 0.19
    assert seed_box(energy, np.array([1.4, 2.0]), 0.2) == (1, 1, 5, 4)
    assert seed_box(energy, np.array([5.0, 6.5]), 0.2) == (6, 5, 8, 6)
    assert seed_box(energy, np.array([0.0, 7.0]), 0.2) == (1, 1, 5, 4), "outside: highest sum"
    assert seed_box(0 * energy, np.array([0.0, 0.0]), 0.2) == (0, 0, 0, 0)


class Backbone(nn.Module):
    """Means over 4x4 and over 32x32 pixels: the excitation of a seed is its own cell."""

    def output_shape(self):
        return {n: ShapeSpec(channels=3, stride=s) for n, s in (("res2", 4), ("res5", 32))}

    def forward(self, images):
        fine = F.avg_pool2d(F.relu_(images), 4)
        weight = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) / 64
        return {"res2": fine, "res5": F.conv2d(fine, weight, stride=8)}


@pytest.fixture
def bright():
    """160x256 pixels, dark, with two bright rectangles in different cells of the last map."""
    image = torch.zeros(3, 160, 256)
    image[:, 40:60, 72:92] = 1
    image[:, 100:124, 196:220] = 2
    return image


@pytest.mark.parametrize("smoothing", [0, 1.0])
def test_salient_regions_find_bright_spots(bright, smoothing):
    with torch.no_grad():
        boxes = SalientRegions(Backbone(), smoothing=smoothing)(bright)
    expected = torch.tensor([[196.0, 100, 220, 124], [72, 40, 92, 60], [0, 0, 256, 160]])
    # Smoothing moves a border by one cell.
    torch.testing.assert_close(boxes, expected, atol=4 if smoothing else 0, rtol=0)
    assert not boxes.requires_grad
    assert len(SalientRegions(Backbone(), num_seeds=1)(bright)) == 2


def test_each_threshold_gives_a_region(bright):
    bright[:, 108:116, 204:212] = 8
    find = SalientRegions(Backbone(), thresholds=(0.2, 0.5, 0.6), smoothing=0)
    whole = [0, 0, 256, 160]
    # Of equal boxes one stays.
    core, around, other = [204, 108, 212, 116], [196, 100, 220, 124], [72, 40, 92, 60]
    assert find(bright).tolist() == [around, core, other, whole]


def test_salient_regions_without_a_seed():
    assert SalientRegions(Backbone())(torch.ones(3, 64, 96)).tolist() == [[0, 0, 96, 64]]


@pytest.mark.parametrize(
    "bad", [{"fine": "p2"}, {"last": "res9"}, {"thresholds": (0.2, 0)}, {"thresholds": ()}]
)
def test_salient_regions_bad_settings(bad):
    with pytest.raises(ValueError, match="must be"):
        SalientRegions(Backbone(), **bad)


def test_proposals_are_clipped_thinned_and_limited():
    boxes = torch.tensor(
        [[-5.0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 40, 70], [30, 5, 45, 9], [60, 0, 80, 9]]
    )
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1, 0.99])
    image = torch.zeros(3, 50, 50)
    found = ProposalRegions(lambda _: (boxes, scores), num_regions=2)(image)
    assert found.tolist() == [[0, 0, 10, 11], [20, 20, 40, 50], [0, 0, 50, 50]]
    with pytest.raises(ValueError, match="proposals must be"):
        ProposalRegions(lambda _: (boxes, scores[:2]))(image)
