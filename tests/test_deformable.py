"""FPN-DCN: equal to the plain network at zero offsets, and to loops elsewhere; the right blocks."""

import itertools
import math

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import build_backbone
from torch.testing import assert_close

from fewshot_d2 import load_config
from fewshot_d2.modeling.deformable import DeformableConv2d

PLAIN, DEFORMABLE = (f"build_{kind}_resnet_fpn_backbone" for kind in ("fewshot", "deformable"))


def backbone(name, depth, *overrides):
    torch.manual_seed(0)
    narrow = ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    if depth < 50:
        narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    own = ["MODEL.BACKBONE.NAME", name, "MODEL.RESNETS.DEPTH", depth, "MODEL.FPN.OUT_CHANNELS", 8]
    own += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.DEVICE", "cpu"]
    own += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    return build_backbone(load_config("", [*narrow, *own, *overrides])).eval()


@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50, 101])
@pytest.mark.parametrize("top_block", ["maxpool", "conv"])
def test_zero_offsets_equal_the_plain_network(rng, depth, top_block):
    plain, deformable = (
        backbone(name, depth, "MODEL.FPN.TOP_BLOCK", top_block) for name in (PLAIN, DEFORMABLE)
    )
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(".conv2.offset." in name for name in missing) and not unexpected
    images = torch.randn(2, 3, 64, 96, generator=rng)
    expected, actual = plain(images), deformable(images)
    assert list(actual) == ["p2", "p3", "p4", "p5", "p6"]
    for level, maps in expected.items():
        scale = maps.abs().max()
        assert_close(actual[level] / scale, maps / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (50, ["res3.3", "res4.5", "res5.0", "res5.1", "res5.2"]),
        (101, ["res3.3", "res4.22", "res5.0", "res5.1", "res5.2"]),
    ],
)
def test_blocks_of_the_original(depth, expected):
    model = backbone(DEFORMABLE, depth, "MODEL.RESNETS.STRIDE_IN_1X1", False).bottom_up
    found = [n for n, m in model.named_modules() if isinstance(m, DeformableConv2d)]
    assert found == [f"{block}.conv2" for block in expected]
    assert model.res5[0].conv2.offset.out_channels == 72
    assert model.res5[0].conv2.offset.stride == (2, 2)


def bilinear(image, y, x):
    """Zero outside, as the operator has it."""
    total = 0.0
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return total


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_loops(rng, stride):
    groups, channels, size = 2, 4, 6
    conv = Conv2d(
        channels, 3, 3, stride=stride, padding=1, bias=False, norm=get_norm("BN", 3)
    ).eval()
    module = DeformableConv2d(conv, groups)
    module.offset.weight.normal_(generator=rng)
    module.offset.bias.normal_(generator=rng)
    x = torch.randn(1, channels, size, size, generator=rng)
    offsets, output = module.offset(x)[0], module(x)[0]
    for out, row, column in itertools.product(
        range(3), range(output.shape[1]), range(output.shape[2])
    ):
        total = 0.0
        for c, i, j in itertools.product(range(channels), range(3), range(3)):
            first = 2 * (c // (channels // groups) * 9 + 3 * i + j)
            y = row * stride - 1 + i + offsets[first, row, column].item()
            x_place = column * stride - 1 + j + offsets[first + 1, row, column].item()
            total += conv.weight[out, c, i, j].item() * bilinear(x[0, c], y, x_place)
        expected = total / math.sqrt(1 + conv.norm.eps)
        assert output[out, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_offsets_learn_and_frozen_stages_do_not(rng):
    model = backbone(DEFORMABLE, 50, "MODEL.BACKBONE.FREEZE_AT", 3)
    sum(
        maps.square().mean() for maps in model(torch.randn(1, 3, 64, 64, generator=rng)).values()
    ).backward()
    assert model.bottom_up.res5[1].conv2.offset.weight.grad.abs().sum() > 0
    assert not model.bottom_up.res3[3].conv2.offset.weight.requires_grad


def test_offsets_that_are_no_numbers_are_an_error(rng):
    module = DeformableConv2d(Conv2d(4, 4, 3, padding=1), 2)
    with pytest.raises(FloatingPointError, match="offsets must be finite"):
        module(torch.full((1, 4, 5, 5), torch.nan))


@pytest.mark.parametrize("block", ["res9:all", "res3:9", "res3", "res3:-1", "res3:first"])
def test_unknown_blocks_are_refused(block):
    with pytest.raises(ValueError, match="MODEL.DEFORMABLE.BLOCKS must be"):
        backbone(DEFORMABLE, 50, "MODEL.DEFORMABLE.BLOCKS", (block,))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="GROUPS must divide"):
        DeformableConv2d(Conv2d(6, 3, 3), 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_cuda_equals_cpu(rng):
    model, images = backbone(DEFORMABLE, 50), torch.randn(1, 3, 64, 64, generator=rng)
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            module.offset.weight.normal_(std=0.01)
    expected = model(images)
    # Offsets in TF32 are off by a thousandth of a pixel.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = model.to("cuda")(images.to("cuda"))
    for level, maps in expected.items():
        assert_close(actual[level].cpu(), maps, atol=1e-3, rtol=1e-3)
