"""The trunk against torchvision's SSD300, priors against the spec's numbers, matching against torchvision."""

import math

import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from factories import ROOT
from silco_cases import small_silco
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.vgg import cfgs, make_layers

from fewshot_d2 import load_config
from fewshot_d2.checkpoint import load_weights
from fewshot_d2.systems.silco.priors import PriorBoxes, assigned, best_boxes
from fewshot_d2.systems.silco.trunk import ExtraLayer, SSDTrunk, VGG16Reduced
from fewshot_d2.systems.silco.weights import trunk_state

BASE = ROOT / "configs/silco/Base-SILCO.yaml"
SIZES = (38, 19, 10, 5, 3, 1)


@pytest.fixture(scope="module")
def node():
    return load_config(str(BASE)).MODEL.SILCO


@pytest.fixture(scope="module")
def trunk(node):
    torch.manual_seed(1)
    return SSDTrunk(VGG16Reduced(), node.EXTRAS).eval()


@pytest.fixture(scope="module")
def torchvision_layers():
    torch.manual_seed(2)
    return make_layers(cfgs["D"], batch_norm=False)


@torch.no_grad()
def test_equals_torchvision_s_ssd300(trunk, torchvision_layers, rng, tmp_path):
    theirs = SSDFeatureExtractorVGG(torchvision_layers, highres=False).eval()
    nn.init.uniform_(theirs.scale_weight, 10, 30)
    state = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    # A whole detector's file has heads, too.
    state["head.regression_head.module_list.0.bias"] = torch.zeros(16)
    torch.save(state, tmp_path / "ssd300.pth")
    load_weights(trunk, str(tmp_path / "ssd300.pth"), trunk_state)
    images = 60 * torch.randn(1, 3, 300, 300, generator=rng)
    maps, expected = trunk(images), theirs(images)
    assert len(maps) == len(expected) == 6
    for (name, features), other, side in zip(maps.items(), expected.values(), SIZES, strict=True):
        assert features.shape == (1, trunk.output_shape()[name].channels, side, side)
        assert other.std() > 0, "maps of zeros would show nothing"
        # The file's random weights shrink the signal from map to map.
        assert_close(features / other.std(), other / other.std(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_of_vgg16_fill_its_layers_alone(trunk, torchvision_layers, tmp_path):
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    state = {f"features.{name}": t for name, t in torchvision_layers.state_dict().items()}
    state["classifier.0.weight"] = torch.full((4, 4), float("nan"))
    torch.save(state, tmp_path / "vgg16.pth")
    load_weights(trunk, str(tmp_path / "vgg16.pth"), trunk_state)
    for name, tensor in trunk.state_dict().items():
        key = name.removeprefix("bottom_up.")
        assert torch.equal(tensor, state.get(key, before[name])), name
    assert sum(key.startswith("features.") for key in state) == 26


@torch.no_grad()
def test_weights_of_the_reduced_vgg16(trunk, torchvision_layers):
    """Numbers are those of its 35 layers: 31 and 33 were fully connected."""
    state = dict(torchvision_layers.state_dict())
    for number, layer in ((31, trunk.bottom_up.fc6), (33, trunk.bottom_up.fc7)):
        state[f"{number}.weight"] = torch.full_like(layer.weight, number)
        state[f"{number}.bias"] = torch.full_like(layer.bias, number)
    own = trunk.state_dict()
    converted = trunk_state(state, own)
    assert converted.keys() == own.keys()
    assert converted["bottom_up.fc6.bias"][0] == 31 and converted["bottom_up.fc7.bias"][0] == 33
    assert torch.equal(converted["bottom_up.features.28.weight"], state["28.weight"])


def test_weights_of_something_else_are_refused(trunk, tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth must fit SSDTrunk.*vgg16.*conv1.weight"):
        load_weights(trunk, str(tmp_path / "resnet.pth"), trunk_state)


def test_frozen_layers_are_refused():
    cfg = load_config(str(BASE), ["MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match="FREEZE_AT must be 0 for VGG16, got 2"):
        build_backbone(cfg)


@torch.no_grad()
def test_new_layers_begin_as_in_the_original():
    """Extra layers and heads: Xavier, uniform, without bias; fusions: as torch draws them; scale: 20 (spec A2)."""
    new = [m for extra in SSDTrunk(VGG16Reduced(), [(8, 24, 2)]).extras for m in extra]
    new += small_silco().head.modules()
    convolutions = [m for m in new if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 2 + 4
    for conv in convolutions:
        cells = conv.kernel_size[0] * conv.kernel_size[1]
        bound = math.sqrt(6 / (cells * (conv.in_channels + conv.out_channels)))
        assert not conv.bias.any() and 0.95 * bound < conv.weight.abs().max() <= bound
    for mix in small_silco().mixes.values():
        bound = 1 / math.sqrt(mix.in_channels)
        assert mix.bias.any() and 0.95 * bound < mix.weight.abs().max() <= bound
    assert torch.equal(SSDTrunk(VGG16Reduced(), []).scale, torch.full((512,), 20.0))


@torch.no_grad()
def test_first_map_is_normalised_and_the_next_layers_do_not_see_it(trunk, rng):
    images = torch.randn(1, 3, 64, 64, generator=rng)
    maps, plain = trunk(images), trunk.bottom_up(images)
    norms = plain["conv4_3"].square().sum(dim=1, keepdim=True).sqrt()
    expected = plain["conv4_3"] / norms * trunk.scale[:, None, None]
    assert_close(maps["scale0"], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(maps["scale1"], plain["fc7"])


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
def test_extra_layer_of_a_small_map(size):
    for stride in (1, 2):
        shape = ExtraLayer(4, 2, 6, stride)(torch.randn(1, 4, *size)).shape
        expected = [max(s - 2, 1) if stride == 1 else (s + 1) // 2 for s in size]
        assert list(shape) == [1, 6, *expected]


def priors_of(node, sources, image_size=(300, 300)):
    layout = PriorBoxes(
        [node.STEPS[i] for i in sources],
        [tuple(node.SIZES[i : i + 2]) for i in sources],
        [node.ASPECT_RATIOS[i] for i in sources],
    )
    return layout([torch.zeros(1, 1, SIZES[i], SIZES[i]) for i in sources], image_size)


def test_number_and_order_of_priors(node):
    assert len(priors_of(node, range(6))) == 8732
    five = priors_of(node, range(5))
    assert len(five) == 8728
    assert torch.equal(five, priors_of(node, range(6))[:8728])
    by_hand = [
        (j + 0.5, i + 0.5, size)
        for side, step, size in ((3, 100, 213), (1, 300, 264))
        for i in range(side)
        for j in range(side)
        for _ in range(4)
    ]
    last = priors_of(node, (4, 5))
    centres = (last[:, :2] + last[:, 2:]) / 2
    steps = torch.tensor([100.0] * 36 + [300.0] * 4)[:, None]
    assert_close(centres, torch.tensor([row[:2] for row in by_hand]) * steps)


def test_priors_of_one_cell_by_hand(node):
    """Row 2, column 7 of the second map: centre (120, 40), sides of 60 to 111 pixels."""
    cell = priors_of(node, range(6))[4 * 38**2 + 6 * (2 * 19 + 7) :][:6]
    middle, two, three = math.sqrt(60 * 111), math.sqrt(2), math.sqrt(3)
    sides = [
        *((60, 60), (middle, middle), (60 * two, 60 / two), (60 / two, 60 * two)),
        *((60 * three, 60 / three), (60 / three, 60 * three)),
    ]
    expected = [[120 - w / 2, 40 - h / 2, 120 + w / 2, 40 + h / 2] for w, h in sides]
    assert_close(cell, torch.tensor(expected))


def test_centres_and_sides_are_at_most_the_image(node):
    priors = priors_of(node, range(6))
    # Third map: the last centre would be at 304 pixels; last map: a side of 373.
    start = 4 * 38**2 + 6 * 19**2
    corner = priors[start + 6 * 99]
    assert_close((corner[:2] + corner[2:]) / 2, torch.tensor([300.0, 300.0]))
    assert_close(priors[-2, 2] - priors[-2, 0], torch.tensor(300.0))
    sides = priors[:, 2:] - priors[:, :2]
    assert sides.min() > 0 and sides.max() <= 300 + 1e-3


def test_coding_is_undone_and_has_the_variances(node, rng):
    priors = priors_of(node, range(6))
    corner = 200 * torch.rand(len(priors), 2, generator=rng)
    truth = torch.cat([corner, corner + 5 + 90 * torch.rand(len(priors), 2, generator=rng)], dim=1)
    coder = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    deltas = coder.get_deltas(priors, truth)
    assert_close(coder.apply_deltas(deltas, priors), truth, atol=1e-2, rtol=1e-4)
    (px0, py0, px1, py1), (x0, y0, x1, y1) = priors[0].tolist(), truth[0].tolist()
    expected = [
        ((x0 + x1) / 2 - (px0 + px1) / 2) / (px1 - px0) / 0.1,
        ((y0 + y1) / 2 - (py0 + py1) / 2) / (py1 - py0) / 0.1,
        math.log((x1 - x0) / (px1 - px0)) / 0.2,
        math.log((y1 - y0) / (py1 - py0)) / 0.2,
    ]
    assert_close(deltas[0], torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_assignment_equals_torchvision_s(node, rng, number):
    corner = 200 * torch.rand(number, 2, generator=rng)
    truth = torch.cat([corner, corner + 5 + 90 * torch.rand(number, 2, generator=rng)], dim=1)
    overlaps = pairwise_iou(Boxes(truth), Boxes(priors_of(node, range(6))))
    found, expected = assigned(overlaps, 0.5), SSDMatcher(0.5)(overlaps)
    assert torch.equal(found, expected.clamp(min=-1))
    assert set(found.tolist()) == {-1, *range(number)}


def test_assignment_by_hand():
    overlaps = torch.tensor([[0.6, 0.5, 0.1, 0.0], [0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.2, 0.1]])
    # The first prior is best for two boxes, and the later one has it; the third is below the threshold.
    assert assigned(overlaps, 0.5).tolist() == [1, 0, 2, -1]
    assert assigned(torch.zeros(0, 4), 0.5).tolist() == [-1] * 4


def test_best_boxes_come_before_nms():
    """Of three boxes the two best are one object: with two before NMS the third is never seen."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [50.0, 50, 60, 60]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    options = {"threshold": 0.0, "nms_iou": 0.45}
    assert best_boxes(boxes, scores, (100, 100), top_k=2, **options).scores.tolist() == [
        pytest.approx(0.9)
    ]
    found = best_boxes(boxes, scores, (100, 100), top_k=200, **options)
    assert torch.equal(found.pred_boxes.tensor, boxes[[0, 2]])
    assert found.pred_classes.tolist() == [0, 0]
    # At an IoU of 3 / 7 both stay.
    near = torch.tensor([[0.0, 0, 10, 10], [4.0, 0, 14, 10]])
    assert len(best_boxes(near, scores[:2], (100, 100), top_k=200, **options)) == 2
    assert not len(best_boxes(boxes, scores, (9, 9), top_k=3, threshold=0.95, nms_iou=0.45))
