"""Convolution in the frequency domain against the direct one in float64."""

import pytest
import torch
import torch.nn.functional as F

from fewshot_d2.modeling.fourier_conv import (
    FourierKernel,
    fourier_conv2d,
    is_worth_transforming,
)


@pytest.mark.parametrize(
    ("maps", "channels", "outputs", "size", "side"),
    [(2, 5, 3, (38, 38), 7), (1, 3, 4, (12, 41), 7), (3, 2, 2, (1, 50), 5), (1, 2, 1, (3, 1), 1)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_is_the_direct_convolution(rng, maps, channels, outputs, size, side, with_bias):
    x = torch.randn(maps, channels, *size, generator=rng)
    weight = torch.randn(outputs, channels, side, side, generator=rng) / side
    bias = torch.randn(outputs, generator=rng) if with_bias else None
    before = x.clone()
    result = fourier_conv2d(x, FourierKernel.of(weight), bias)
    double = None if bias is None else bias.double()
    expected = F.conv2d(x.double(), weight.double(), double, padding=side // 2)
    assert (result - expected).abs().max() < 5e-6
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 3, 5), (2, 3, 27, 27)])
def test_kernels_without_a_middle_or_too_large_are_refused(shape):
    with pytest.raises(ValueError, match="kernel must be square"):
        FourierKernel.of(torch.zeros(shape))


def test_serves_inference_in_float32_on_maps_that_are_not_tiny():
    maps = torch.zeros(1, 2, 20, 20)
    assert not is_worth_transforming(maps)
    with torch.no_grad():
        assert is_worth_transforming(maps)
        assert not is_worth_transforming(maps.double())
        assert not is_worth_transforming(maps[:, :, :11])
