"""OS2D: correlation, TransformNet's input, resampling and pooling against loops, on friendly and on odd maps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fewshot_d2.modeling.matching import dense_correlation, resample_channels, unit_vectors
from fewshot_d2.systems.os2d import geometry
from fewshot_d2.systems.os2d.matchers import AlignedMatcher, WindowMatcher, unit_maps
from fewshot_d2.systems.os2d.transform_net import TransformNet

# Signed numbers, numbers about the epsilons, maps a cell wide, high or both.
KINDS = [(1.0, (3, 4)), (1e-6, (3, 4)), (1.0, (1, 5)), (1.0, (4, 1)), (1.0, (1, 1))]


def matcher(kind="simple", inverse=False):
    torch.manual_seed(0)
    made = AlignedMatcher(form=kind, inverse=inverse, is_norm_frozen=False).eval()
    if made.transform_net is not None:
        nn.init.normal_(made.transform_net.linear.weight, std=0.02)
    return made


def naive_sample(plane, x, y):
    """Bilinear, coordinates clamped to the cells; float64."""
    height, width = plane.shape
    x, y = min(max(x, 0.0), width - 1), min(max(y, 0.0), height - 1)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    top = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def naive(made, maps, features):
    """Scores, and the parameters they come from, of one query; all steps by loops in float64."""
    maps, features = maps.double(), features.double()
    resized = F.interpolate(maps, (15, 15), mode="bilinear", align_corners=True)
    height, width = features.shape[1:]
    correlation = torch.zeros(len(maps), 225, height, width, dtype=torch.float64)
    for k, row, column, y, x in itertools.product(
        range(len(maps)), range(15), range(15), range(height), range(width)
    ):
        cell, place = resized[k, :, row, column], features[:, y, x]
        product = (cell @ place) / ((cell.norm() + 1e-5) * (place.norm() + 1e-5))
        correlation[k, column * 15 + row, y, x] = product
    if made.transform_net is None:
        parameters = torch.tensor([1.0, 0, 1, 0]).double().view(1, 4, 1, 1)
        parameters = parameters.expand(len(maps), 4, height, width)
    else:
        positive = correlation.clamp(min=0)
        positive = positive / (positive.square().sum(1, keepdim=True).sqrt() + 1e-6)
        net = made.transform_net.double()
        parameters = net.linear(net.conv(positive))
        net.float()
    scores = torch.zeros(len(maps), height * width, dtype=torch.float64)
    line = torch.linspace(-1, 1, 15).double().tolist()
    for k, y, x in itertools.product(range(len(maps)), range(height), range(width)):
        p = parameters[k, :, y, x]
        if len(p) == 4:
            matrix = torch.stack([p[0], 0 * p[0], p[1], 0 * p[0], p[2], p[3]]).view(2, 3)
        else:
            matrix = p.view(2, 3)
        if made.inverse:
            matrix = torch.linalg.inv(torch.cat([matrix, torch.tensor([[0.0, 0, 1]]).double()]))[:2]
        for row, column in itertools.product(range(2, 13), range(2, 13)):
            local = matrix @ torch.tensor([line[column], line[row], 1.0]).double()
            place = (7.5 * local + torch.tensor([x + 0.5, y + 0.5])).tolist()
            plane = correlation[k, column * 15 + row]
            scores[k, y * width + x] += naive_sample(plane, *place) / 121
    return correlation, parameters, scores


@pytest.mark.parametrize(("scale", "size"), KINDS)
@pytest.mark.parametrize(
    ("kind", "inverse"), [("simple", False), ("affine", True), ("affine", False), ("none", False)]
)
@torch.no_grad()
def test_scores_are_those_of_loops(rng, kind, inverse, scale, size):
    made = matcher(kind, inverse)
    maps = scale * torch.randn(2, 6, 4, 9, generator=rng)
    features = scale * torch.randn(1, 6, *size, generator=rng)
    encoded = made.encode(maps, (64, 144))
    units = unit_maps(features)
    correlation, parameters, scores = naive(made, maps, features[0])
    found = made(encoded, units, [2])
    assert_close(
        dense_correlation(encoded["cells"], units, [2]).double(), correlation, atol=3e-6, rtol=0
    )
    if made.transform_net is not None:
        computed = made.transform_net(correlation.float()).double()
        assert_close(computed, parameters, atol=1e-5, rtol=1e-4)
    assert_close(found.scores.double(), scores, atol=1e-6, rtol=0)
    assert found.scores is found.fixed_scores
    expected = geometry.to_matrices(parameters.flatten(2), inverse=inverse)
    assert_close(found.boxes.double(), geometry.to_boxes(expected, size), atol=2e-2, rtol=1e-4)


def test_half_a_cell_of_the_original_is_there(rng):
    """Identity: samples from column - 7 to column + 8."""
    identity = torch.tensor(geometry.IDENTITY["affine"]).view(1, 6, 1).expand(1, 6, 30 * 30)
    points = geometry.template_points(torch.device("cpu"))
    places = geometry.sampled_places(identity, points, (30, 30))
    columns = (places[0, :, 10 * 30 + 9, 0] + 1) / 2 * 29
    assert_close(columns.view(15, 15)[:, 0], torch.linspace(9 - 7, 9 + 8, 15), atol=1e-4, rtol=0)


def test_resampling_is_a_loop_and_empty_for_nothing(rng):
    maps = torch.randn(2, 3, 4, 5, generator=rng)
    places = 1.5 * torch.randn(2, 3, 7, 2, generator=rng)
    found = resample_channels(maps, places)
    for r, m, n in itertools.product(range(2), range(3), range(7)):
        x, y = ((places[r, m, n] + 1) / 2 * torch.tensor([4.0, 3.0])).tolist()
        expected = naive_sample(maps[r, m].double(), x, y)
        assert_close(found[r, m, n].double(), expected, atol=1e-5, rtol=1e-5)
    assert resample_channels(maps[:0], places[:0]).shape == (0, 3, 7)


def test_correlation_of_several_queries_is_that_of_each(rng):
    cells = torch.randn(5, 7, 6, generator=rng)
    features = torch.randn(3, 6, 2, 4, generator=rng)
    joined = dense_correlation(cells, features, [2, 0, 3])
    assert_close(joined[:2], torch.einsum("kmc,chw->kmhw", cells[:2], features[0]))
    assert_close(joined[2:], torch.einsum("kmc,chw->kmhw", cells[2:], features[2]))
    assert dense_correlation(cells[:0], features[:1], [0]).shape == (0, 7, 2, 4)


def test_unit_vectors_of_nothing_are_zero():
    assert not unit_vectors(torch.zeros(2, 3, 4), dim=1, epsilon=1e-5).any()
    small = unit_vectors(torch.tensor([[3e-5, 4e-5]]), dim=1, epsilon=5e-5)
    assert_close(small, torch.tensor([[0.3, 0.4]]))


def test_transform_net_starts_as_the_identity_and_large_maps_go_through_frequencies(rng):
    for kind, values in geometry.IDENTITY.items():
        if values:
            fresh = TransformNet(form=kind, is_norm_frozen=False).eval()
            output = fresh(torch.randn(2, 225, 3, 3, generator=rng))
            assert torch.equal(output, torch.tensor(values).view(1, -1, 1, 1).expand_as(output))
    net = matcher("affine").transform_net
    correlation = torch.randn(1, 225, 14, 13, generator=rng)
    direct = net(correlation)
    with torch.no_grad():
        assert_close(net(correlation), direct, atol=1e-5, rtol=1e-4)
        net.conv[0].weight.mul_(0.5)
        changed = net(correlation)
    assert_close(changed, net(correlation), atol=1e-5, rtol=1e-4)
    assert (changed - direct).abs().max() > 1e-3


def test_frozen_norms_of_the_transformation_stay(rng):
    correlation = torch.randn(1, 225, 3, 3, generator=rng)
    for is_frozen in (False, True):
        net = TransformNet(form="affine", is_norm_frozen=is_frozen).train()
        before = net.conv[1].running_mean.clone()
        net(correlation)
        assert torch.equal(before, net.conv[1].running_mean) == is_frozen


def test_gradients_are_those_of_differences(rng):
    """In float64; the transformation learns from scores, and from fixed scores not at all."""
    made = matcher("affine", inverse=True).double()
    cells = torch.randn(1, 225, 2, dtype=torch.float64, generator=rng, requires_grad=True)
    parameters = torch.tensor(geometry.IDENTITY["affine"]).double().view(1, 6, 1)
    parameters = parameters + 0.05 * torch.rand(1, 6, 6, generator=rng)
    features = torch.randn(1, 2, 2, 3, dtype=torch.float64, generator=rng)

    def scores_and_boxes(cells, parameters):
        matrices = geometry.to_matrices(parameters, inverse=True)
        correlation = dense_correlation(cells, features, [1])
        scores, fixed = made._scores(correlation, matrices)
        return scores, geometry.to_boxes(matrices, (2, 3)) / 100

    assert torch.autograd.gradcheck(
        scores_and_boxes, (cells, parameters.double().requires_grad_()), fast_mode=True
    )
    with torch.enable_grad():
        made.transform_net.float()
        matches = made({"cells": cells.float()}, features.float(), [1])
    matches.fixed_scores.sum().backward(retain_graph=True)
    assert cells.grad.abs().sum() > 0
    assert made.transform_net.linear.weight.grad is None
    matches.scores.sum().backward()
    assert made.transform_net.linear.weight.grad.abs().sum() > 0


def naive_window(maps, size, features):
    """Scores and boxes of one class image, by loops."""
    cells, places = unit_maps(maps)[0], unit_maps(features)[0]
    h, w = cells.shape[1:]
    height, width = places.shape[1:]
    b, a = (min(2, (side - 1) // 2) for side in (h, w))
    scores, boxes = [], []
    for y, x in itertools.product(range(height), range(width)):
        products = []
        for row, column in itertools.product(range(b, h - b), range(a, w - a)):
            i = min(max(y + row - h // 2, 0), height - 1)
            j = min(max(x + column - w // 2, 0), width - 1)
            products.append(cells[:, row, column] @ places[:, i, j])
        scores.append(torch.stack(products).mean())
        left, top = 16 * (x - w // 2), 16 * (y - h // 2)
        boxes.append([left, top, left + size[1], top + size[0]])
    return torch.stack(scores), torch.tensor(boxes).float()


@pytest.mark.parametrize("shape", [(6, 9), (5, 5), (1, 3), (2, 70)])
@torch.no_grad()
def test_window_is_a_loop(rng, shape):
    made = WindowMatcher()
    maps, features = (
        torch.randn(1, 4, *shape, generator=rng),
        torch.randn(1, 4, 5, 6, generator=rng),
    )
    size = (16 * shape[0] - 3, 16 * shape[1])
    found = made(made.encode(maps, size), unit_maps(features), [1])
    scores, boxes = naive_window(maps, size, features)
    assert_close(found.scores[0], scores, atol=1e-6, rtol=1e-5)
    assert_close(found.boxes[0], boxes)
    assert_close(found.corners[0, :, [0, 1, 6, 7]], boxes)


@torch.no_grad()
def test_windows_have_one_shape_however_long(rng):
    made = WindowMatcher()
    shapes = [
        {n: t.shape[1:] for n, t in made.encode(torch.randn(2, 4, *s), (16, 16)).items()}
        for s in ((15, 15), (475, 1), (1, 1))
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    weights = made.encode(torch.randn(2, 4, 475, 1), (7589, 7))["weights"]
    assert_close(weights.sum(dim=1), torch.ones(2))
