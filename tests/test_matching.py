"""Matching functions against naive loops."""

import pytest
import torch
from torch.testing import assert_close

from fewshot_d2.modeling.detector import Pairs
from fewshot_d2.modeling.matching import (
    absolute_difference,
    average_pool,
    matched_features,
    mean_over_shots,
)
from fewshot_d2.systems.siamese_mask_rcnn import PyramidMatching


def naive_match(features, vector, weight, bias):
    """W [F, |F - r|] + b for one pair, one cell and one channel at a time."""
    channels, height, width = features.shape
    out = torch.zeros(len(weight), height, width)
    for d in range(len(weight)):
        for y in range(height):
            for x in range(width):
                total = bias[d].item()
                for c in range(channels):
                    value = features[c, y, x].item()
                    total += weight[d, c, 0, 0].item() * value
                    total += weight[d, channels + c, 0, 0].item() * abs(value - vector[c].item())
                out[d, y, x] = total
    return out


def test_matched_features_equal_loops(rng):
    features, vectors = torch.randn(3, 4, 2, 3, generator=rng), torch.randn(3, 4, generator=rng)
    weight, bias = torch.randn(5, 8, 1, 1, generator=rng), torch.randn(5, generator=rng)
    expected = [naive_match(f, v, weight, bias) for f, v in zip(features, vectors, strict=True)]
    assert_close(matched_features(features, vectors, weight, bias), torch.stack(expected))


@pytest.mark.parametrize("query", [[0, 1, 1, 0], [1, 1, 1, 1]], ids=["mixed", "one query"])
def test_pyramid_matching_equals_the_written_out_formula(rng, query):
    """Splitting W [P, D] into W1 P + W2 D must change neither values nor gradients, whichever pairs are asked for."""
    matching = PyramidMatching(levels=["p2", "p3"], in_channels=4, out_channels=5)
    pyramid = {
        "p2": torch.randn(2, 4, 6, 5, generator=rng, requires_grad=True),
        "p3": torch.randn(2, 4, 3, 3, generator=rng, requires_grad=True),
    }
    vectors = {level: torch.randn(3, 4, generator=rng, requires_grad=True) for level in pyramid}
    pairs = Pairs(query=query, episode_class=[0, 0, 1, 1], support=[0, 1, 2, 2])
    matched, _ = matching(matching.share(pyramid), vectors, pairs)
    for level, conv in matching.reduce.items():
        expected = matched_features(
            pyramid[level][pairs.query], vectors[level][pairs.support], conv.weight, conv.bias
        )
        assert_close(matched[level], expected)
        inputs = [pyramid[level], vectors[level], conv.weight, conv.bias]
        weight = torch.randn(expected.shape, generator=rng)
        gradients = [
            torch.autograd.grad((weight * result).sum(), inputs)
            for result in (matched[level], expected)
        ]
        for ours, written_out in zip(*gradients, strict=True):
            assert_close(ours, written_out, atol=1e-5, rtol=1e-4)


def test_sharing_is_worth_it_once_the_saved_channels_outnumber_the_shared_ones():
    matching = PyramidMatching(levels=["p2"], in_channels=256, out_channels=384)
    assert [matching.is_worth_sharing(k) for k in (1, 2, 3)] == [False, False, True]


def test_split_rpn_convolution_equals_the_plain_one(rng):
    """conv(W1 P + b + W2 D) in two parts, borders included."""
    matching = PyramidMatching(levels=["p2"], in_channels=4, out_channels=5)
    torch.nn.init.normal_(matching.reduce["p2"].bias)
    conv = torch.nn.Conv2d(5, 7, 3, padding=1)
    pyramid = {"p2": torch.randn(2, 4, 6, 5, generator=rng)}
    vectors = {"p2": torch.randn(3, 4, generator=rng)}
    pairs = Pairs(query=[1, 0, 1], episode_class=[0, 0, 1], support=[2, 0, 1])
    matched, for_rpn = matching(matching.share(pyramid, conv), vectors, pairs)
    assert for_rpn["p2"].shape[-2:] == (6, 5)
    hidden = for_rpn["p2"].hidden(torch.relu)
    assert_close(hidden, torch.relu(conv(matched["p2"])), atol=1e-5, rtol=1e-4)


def test_absolute_difference_is_zero_where_query_equals_support():
    vectors = torch.tensor([[1.0, -2.0]])
    features = vectors[:, :, None, None].expand(1, 2, 3, 3)
    assert absolute_difference(features, vectors).abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_average_pool_equals_loops(rng, channels):
    features = torch.randn(2, channels, 3, 4, generator=rng)
    valid = torch.rand(2, 3, 4, generator=rng) > 0.5
    for use in (None, valid):
        pooled = average_pool(features, use)
        for b in range(2):
            for c in range(channels):
                cells = [
                    features[b, c, y, x].item()
                    for y in range(3)
                    for x in range(4)
                    if use is None or use[b, y, x]
                ]
                assert pooled[b, c].item() == pytest.approx(sum(cells) / len(cells), abs=1e-6)


def test_average_pool_without_a_valid_cell_is_zero():
    features = torch.ones(1, 2, 3, 3)
    assert average_pool(features, torch.zeros(1, 3, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_mean_over_shots_equals_loops(rng):
    vectors = torch.randn(6, 2, 3, generator=rng)
    expected = torch.stack([vectors[0], vectors[1:4].mean(0), vectors[4:6].mean(0)])
    assert_close(mean_over_shots(vectors, [1, 3, 2]), expected)


def test_mean_over_shots_ignores_their_order(rng):
    vectors = torch.randn(4, 3, generator=rng)
    assert_close(mean_over_shots(vectors, [4]), mean_over_shots(vectors.flip(0), [4]))


def test_mean_over_shots_of_no_class():
    assert mean_over_shots(torch.zeros(0, 3), []).shape == (0, 3)
