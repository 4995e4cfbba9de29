"""What MODEL.SILCO says arrives in the model: the spec's table (A2 to A6), other values, and MobileNetV2's maps."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from factories import ROOT, random_query, random_support_set
from torch import nn

from fewshot_d2 import load_config
from fewshot_d2.systems.silco.similarity import PooledFusion, SimilarityFusion

CONFIGS = ROOT / "configs/silco"
CHANNELS = [512, 1024, 512, 256, 256, 256]


def built(name, *overrides):
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *overrides])
    return build_model(cfg).eval()


@pytest.fixture(scope="module")
def paper():
    return built("vgg16_voc07_ssm_frm.yaml")


def test_priors_of_the_spec(paper):
    assert list(paper.priors.steps) == [8, 16, 32, 64, 100, 300]
    ends = [30, 60, 111, 162, 213, 264, 315]
    assert [tuple(size) for size in paper.priors.sizes] == list(zip(ends, ends[1:], strict=False))
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    assert [list(of_map) for of_map in paper.priors.aspect_ratios] == ratios
    assert paper.priors.per_cell == [4, 6, 6, 6, 4, 4]


def test_training_and_detections_of_the_spec(paper):
    assert paper.match_iou == 0.5 and paper.negative_ratio == 3
    assert vars(paper.selection) == {"threshold": 0.0, "top_k": 200, "nms_iou": 0.45}
    assert paper.support_backbone is None
    # Variances of .1 and .2.
    assert tuple(paper.coder.weights) == (10.0, 10.0, 5.0, 5.0)
    assert paper.resize.shape(50, 1000) == (300, 300)
    assert paper.pixel_mean.flatten().tolist() == [123.0, 117.0, 104.0]
    assert paper.pixel_std.flatten().tolist() == [1.0] * 3


def test_spatial_similarity_of_the_spec(paper):
    assert list(paper.fusions) == [f"scale{i}" for i in range(6)]
    for channels, fusion in zip(CHANNELS, paper.fusions.values(), strict=True):
        assert isinstance(fusion, SimilarityFusion) and not fusion.is_global
        assert fusion.dropout.p == 0.5 and fusion.normalize_weights is False
        assert not fusion.by_cosines
        assert fusion.attention_scale == pytest.approx((channels / 2) ** -0.5)
        for layer in (fusion.theta, fusion.phi, fusion.g):
            assert (layer.in_channels, layer.out_channels) == (channels, channels // 2)
            assert layer.kernel_size == (1, 1) and layer.bias is not None


def test_feature_reweighting_of_the_spec(paper):
    for channels, fusion in zip(CHANNELS, paper.fusions.values(), strict=True):
        graph = fusion.reweighting
        # Five blocks of 48 new features each and the last convolution.
        sizes = [channels + 48 * block for block in range(6)]
        assert [layer.in_features for layer in graph.convolutions] == [2 * f for f in sizes]
        assert [layer.out_features for layer in graph.convolutions] == [48] * 5 + [1]
        for features, adjacency in zip(sizes, graph.adjacencies, strict=True):
            assert adjacency.dropout.p == 0.3
            assert [layer.in_features for layer in adjacency.layers] == [features, 192, 192, 96]
            assert [layer.out_features for layer in adjacency.layers] == [192, 192, 96, 96]


def test_fusion_and_heads_of_the_spec(paper):
    mixes = [(m.in_channels, m.out_channels, m.kernel_size) for m in paper.mixes.values()]
    assert mixes == [(c, c, (1, 1)) for c in CHANNELS]
    for head, numbers in ((paper.head.regression_head, 4), (paper.head.classification_head, 2)):
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
        assert [layer.in_channels for layer in layers] == CHANNELS
        assert [layer.out_channels for layer in layers] == [
            numbers * per_cell for per_cell in (4, 6, 6, 6, 4, 4)
        ]
        assert {(layer.kernel_size, layer.padding) for layer in layers} == {((3, 3), (1, 1))}


def test_extra_layers_of_the_spec(paper):
    layers = [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        for extra in paper.backbone.extras
        for layer in extra
        if isinstance(layer, nn.Conv2d)
    ]
    assert layers == [
        *((1024, 256, 1, 1), (256, 512, 3, 2), (512, 128, 1, 1), (128, 256, 3, 2)),
        *((256, 128, 1, 1), (128, 256, 3, 1), (256, 128, 1, 1), (128, 256, 3, 1)),
    ]


SMALL = [
    *("INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64, "FEWSHOT.PRETRAIN.MAX_ITER", 0),
    *("MODEL.RESNETS.NORM", "BN"),
]


def test_other_values_of_each_key_arrive_in_the_model():
    keys = {
        "NORMALIZE_WEIGHTS": True,
        "TEMPERATURE": 0.25,
        "SOURCES": (3, 1),
        "SEPARATE_TRUNKS": True,
        "DROPOUT": 0.2,
        "REWEIGHTING_DROPOUT": 0.7,
        "REWEIGHTING_BLOCKS": 2,
        "REWEIGHTING_WIDTH": 10,
        "MATCH_IOU": 0.35,
        "NEGATIVE_RATIO": 7,
        "SCORE_THRESH": 0.125,
        "PRE_NMS_TOPK": 17,
        "NMS_IOU": 0.65,
        "EXTRAS": ((6, 20, 2),),
        "STEPS": (5, 9, 17, 33),
        "SIZES": (11, 21, 35, 49, 65),
        "ASPECT_RATIOS": ((2,), (4,), (2,), (3, 5)),
    }
    pairs = [part for key, value in keys.items() for part in (f"MODEL.SILCO.{key}", value)]
    model = built("omniglot_ssm_frm.yaml", *SMALL, *pairs)
    assert model.match_iou == 0.35 and model.negative_ratio == 7
    assert vars(model.selection) == {"threshold": 0.125, "top_k": 17, "nms_iou": 0.65}
    assert model.support_backbone is not None
    assert list(model.priors.steps) == [33, 9] and model.priors.per_cell == [6, 4]
    assert [tuple(size) for size in model.priors.sizes] == [(49, 65), (21, 35)]
    assert [tuple(ratios) for ratios in model.priors.aspect_ratios] == [(3, 5), (4,)]
    assert list(model.fusions) == ["scale3", "scale1"]
    assert [mix.in_channels for mix in model.mixes.values()] == [20, 128]
    for fusion in model.fusions.values():
        assert fusion.dropout.p == 0.2 and fusion.normalize_weights is True
        assert fusion.by_cosines and fusion.attention_scale == 4
        graph = fusion.reweighting
        assert [layer.out_features for layer in graph.convolutions] == [5, 5, 1]
        for adjacency in graph.adjacencies:
            assert adjacency.dropout.p == 0.7
            assert [layer.out_features for layer in adjacency.layers] == [20, 20, 10, 10]


@pytest.mark.parametrize("similarity", ["gap", "image", "global"])
def test_kind_of_similarity_and_no_reweighting_arrive_in_the_model(similarity):
    keys = ("MODEL.SILCO.SIMILARITY", similarity, "MODEL.SILCO.REWEIGHTING", False)
    for fusion in built("omniglot_ssm_frm.yaml", *SMALL, *keys).fusions.values():
        if similarity == "gap":
            assert isinstance(fusion, PooledFusion)
        else:
            assert fusion.is_global == (similarity == "global") and fusion.reweighting is None


@pytest.fixture(scope="module")
def mobile():
    return built("Base-mobilenet.yaml", "MODEL.TORCHVISION.WEIGHTS", "")


@torch.no_grad()
def test_maps_of_mobilenet_are_where_its_priors_are(mobile):
    """Of 320 pixels: 40 to 1 cells, whose distances are the steps, and priors as large in it as SILCO's in 300."""
    maps = mobile.backbone(torch.zeros(1, 3, 320, 320))
    shapes = mobile.backbone.output_shape()
    channels = {"scale0": 192, "scale1": 576, "scale2": 1280}
    channels |= {f"scale{i}": 256 for i in (3, 4, 5)}
    assert {name: shape.channels for name, shape in shapes.items()} == channels
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (c, side, side) for c, side in zip(channels.values(), (40, 20, 10, 5, 3, 1), strict=True)
    ]
    assert [shape.stride for shape in shapes.values()][:4] == [8, 16, 32, 64]
    assert list(mobile.priors.steps) == [round(320 / side) for side in (40, 20, 10, 5, 3, 1)]
    scales = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
    ends = [round(320 * scale) for scale in scales]
    assert [tuple(size) for size in mobile.priors.sizes] == list(zip(ends, ends[1:], strict=False))
    priors = mobile.priors(list(maps.values()), (320, 320))
    assert len(priors) == 4 * 1600 + 6 * 400 + 6 * 100 + 6 * 25 + 4 * 9 + 4 * 1 == 9590


def test_mobilenet_is_trained_and_finds(mobile, rng):
    query = random_query(rng, random_support_set(rng, ways=1), side=320)
    # One for the first map and one for the last.
    boxes = Boxes(torch.tensor([[20.0, 30, 50, 60], [5, 5, 315, 315]]))
    query["instances"] = Instances((320, 320), gt_boxes=boxes, gt_classes=torch.tensor([0, 0]))
    mobile.train()
    losses = mobile([query])
    sum(losses.values()).backward()
    assert set(losses) == {"loss_class", "loss_box"}
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    for name in ("extras.2.2.weight", "extras.0.0.weight", "scale"):
        assert mobile.backbone.get_parameter(name).grad.any(), name
    # What comes before these layers is still hidden behind their zeros.
    assert all(mobile.fusions[name].out.weight.grad.any() for name in ("scale0", "scale5"))
    with torch.no_grad():
        (output,) = mobile.eval()([query])
    found = output["instances"]
    assert 0 < len(found) <= 200 and set(found.pred_classes.tolist()) == {0}
    assert torch.isfinite(found.pred_boxes.tensor).all()
    assert ((found.scores > 0) & (found.scores < 1)).all()
