"""Backbones by config: shapes, padding, weights, ReLU."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from factories import tiny_config
from torch.testing import assert_close
from torchvision import models

from fewshot_d2.modeling.backbones import (
    TFSameConv2d,
    timm_features,
    torchvision_features,
    use_tf_padding,
)

FOUR_MAPS = ["res2", "res3", "res4", "res5"]
TORCHVISION = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone")


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        ("MODEL.RESNETS.DEPTH", 18),
        ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
        (*TORCHVISION, "MODEL.TORCHVISION.NAME", "mobilenet_v2"),
        (*TORCHVISION, "MODEL.TORCHVISION.NAME", "resnet18"),
        (*TORCHVISION, "MODEL.TORCHVISION.NAME", "convnext_tiny", "MODEL.TORCHVISION.NORM", "BN"),
    ],
)
def test_levels_and_strides(overrides):
    maps_by_key = ("MODEL.FPN.IN_FEATURES", FOUR_MAPS, "MODEL.RESNETS.OUT_FEATURES", FOUR_MAPS)
    backbone = build_backbone(tiny_config(*maps_by_key, *overrides)).eval()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    for level, shape in backbone.output_shape().items():
        expected = (1, shape.channels, -(-64 // shape.stride), -(-96 // shape.stride))
        assert maps[level].shape == expected


def test_fewer_maps_by_key():
    levels = build_backbone(tiny_config("MODEL.FPN.IN_FEATURES", ["res2", "res3"])).output_shape()
    assert {name: shape.stride for name, shape in levels.items()} == {"p2": 4, "p3": 8, "p4": 16}


@torch.no_grad()
def test_timm_backbone():
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    timm = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t")
    backbone = build_backbone(tiny_config(*timm, "MODEL.FPN.IN_FEATURES", FOUR_MAPS)).eval()
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2, 1]


@torch.no_grad()
def test_frozen_timm_backbone_keeps_its_activations(rng):
    """Norms of this model hold its activations, which a plain frozen norm would lose."""
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    images, maps = torch.randn(1, 3, 64, 64, generator=rng), []
    for norm in ("BN", "FrozenBN"):
        torch.manual_seed(0)
        features = timm_features("mobilenetv3_small_050", weights="", norm=norm).eval()
        maps.append(features(images))
    assert maps[0]["res5"].abs().max() > 0
    for name, expected in maps[0].items():
        assert_close(maps[1][name], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_relu_makes_every_map_non_negative(rng):
    images = torch.randn(1, 3, 64, 64, generator=rng)
    for relu in (True, False):
        torch.manual_seed(0)
        maps = build_backbone(tiny_config("MODEL.FPN.RELU", relu)).eval()(images)
        assert all((m >= 0).all() for m in maps.values()) == relu


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_tf_padding_equals_explicit_padding(kernel, rng):
    """TensorFlow's SAME for even sides: total = kernel - stride, the smaller half first."""
    conv = torch.nn.Conv2d(2, 3, kernel, stride=2, padding=kernel // 2)
    images = torch.randn(1, 2, 8, 8, generator=rng)
    total = max(kernel - 2, 0)
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(images, [before, after] * 2), conv.weight, conv.bias, stride=2)
    result = TFSameConv2d.from_conv(conv)(images)
    assert result.shape[-2:] == (4, 4)
    assert_close(result, expected)


def test_tf_padding_changes_only_strided_convolutions_and_no_name():
    plain, padded = models.mobilenet_v2(weights=None), models.mobilenet_v2(weights=None)
    use_tf_padding(padded)
    assert list(padded.state_dict()) == list(plain.state_dict())
    replaced = [m for m in padded.modules() if isinstance(m, TFSameConv2d)]
    strided = [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(replaced) == len(strided) == 5


def test_weights_errors_name_the_file(tmp_path):
    options = {"norm": "BN", "tf_padding": False}
    with pytest.raises(ValueError, match="none.pth"):
        torchvision_features("mobilenet_v2", weights=str(tmp_path / "none.pth"), **options)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth must fit"):
        torchvision_features("mobilenet_v2", weights=str(tmp_path / "other.pth"), **options)
    with pytest.raises(ValueError, match="torchvision model"):
        torchvision_features("no_such_net", weights="", **options)


@torch.no_grad()
def test_imagenet_weights_give_the_classifiers_features(shared_data, rng):
    """The cut model's last map, pooled and classified, is the classifier's own output."""
    path = str(shared_data / "weights" / "mobilenet_v2_imagenet.pth")
    features = torchvision_features("mobilenet_v2", weights=path, norm="FrozenBN", tf_padding=True)
    model = models.mobilenet_v2(weights=None).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    use_tf_padding(model)
    images = torch.rand(1, 3, 96, 96, generator=rng) * 2 - 1
    logits = model.classifier(features.eval()(images)["res5"].mean(dim=(2, 3)))
    assert_close(logits, model(images), atol=1e-4, rtol=1e-4)


def test_maps_by_name_and_frozen_stages(rng):
    options = {"weights": "", "norm": "BN", "tf_padding": False}
    torch.manual_seed(0)
    whole = torchvision_features("mobilenet_v2", **options).eval()
    torch.manual_seed(0)
    cut = torchvision_features("mobilenet_v2", **options, out_features=("res4",), freeze_at=3)
    assert cut.output_shape().keys() == {"res4"} and cut.output_shape()["res4"].stride == 16
    images = torch.randn(2, 3, 64, 64, generator=rng)
    assert_close(cut.eval()(images)["res4"], whole(images)["res4"])
    # What is before res3 keeps weights and statistics, what comes after learns.
    cut.train()
    before = {name: value.clone() for name, value in cut.state_dict().items()}
    cut(images)["res4"].square().sum().backward()
    with torch.no_grad():
        for parameter in cut.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    changed = {
        name.split(".")[2]
        for name, value in cut.state_dict().items()
        if not value.equal(before[name])
    }
    # Block 7 is the first whose expansion is at stride 8 and whose output is at stride 16.
    assert {int(block) for block in changed} == set(range(7, 15))
    with pytest.raises(ValueError, match="'res9'"):
        torchvision_features("mobilenet_v2", **options, out_features=("res9",))
