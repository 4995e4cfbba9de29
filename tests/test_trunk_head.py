"""A classifier in two parts: the trunk that ROIs are pooled from and the box head that describes them."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import build_box_head
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from factories import ROOT, random_query, random_support_set, tiny_config
from torch.testing import assert_close
from torchvision import models

from fewshot_d2 import load_config
from fewshot_d2.engine.solver import build_optimizer
from fewshot_d2.modeling.backbones import torchvision_features, use_tf_padding
from fewshot_d2.modeling.trunk_head import TorchvisionHead

C4 = [
    *("MODEL.BACKBONE.NAME", "build_torchvision_backbone", "MODEL.TORCHVISION.NORM", "BN"),
    *("MODEL.ROI_BOX_HEAD.NAME", "TorchvisionHead", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
]


def two_parts(*overrides: object):
    """Trunk and head of one config, in inference mode."""
    cfg = tiny_config(*C4, *overrides)
    torch.manual_seed(0)
    trunk = build_backbone(cfg)
    torch.manual_seed(0)
    return trunk.eval(), build_box_head(cfg, trunk.output_shape()["res4"]).eval()


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("mobilenet_v2", "features"),
        ("resnet18", "layer4"),
        # Here a block's first convolutions still have the stride of the block before, beside the skip connection.
        ("resnet50", "layer4"),
        # Its weights have names that torch.fx does not take as they are.
        ("regnet_y_400mf", "trunk_output"),
    ],
)
def test_head_after_trunk_is_the_whole_classifier(name, end, channels_last, rng):
    keys = ("MODEL.TORCHVISION.NAME", name, "MODEL.TORCHVISION.CHANNELS_LAST", channels_last)
    trunk, head = two_parts(*keys)
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    found = []
    model.get_submodule(end).register_forward_hook(lambda module, x, y: found.append(y))
    images = torch.randn(2, 3, 64, 96, generator=rng)
    model(images)
    (expected,) = found
    x = head(trunk(images)["res4"])
    assert x.shape == (2, head.output_shape.channels) and x.abs().max() > 0
    expected = expected.mean(dim=(2, 3))
    assert_close(x / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)
    # No layer is in both, and none of the features is in neither.
    parts = [sum(p.numel() for p in part.parameters()) for part in (trunk, head)]
    outside = sum(
        p.numel() for n, p in model.named_parameters() if n.split(".")[0] in ("fc", "classifier")
    )
    assert min(parts) > 0 and sum(parts) == sum(p.numel() for p in model.parameters()) - outside


@torch.no_grad()
def test_head_on_the_whole_image_is_the_trained_classifier(shared_data, rng):
    """Weights of ImageNet, through ROI pooling: a ROI that is the image gives the classifier's own logits."""
    path = str(shared_data / "weights" / "mobilenet_v2_imagenet.pth")
    keys = ["MODEL.TORCHVISION.WEIGHTS", path, "MODEL.TORCHVISION.TF_PADDING", True]
    cfg = load_config(str(ROOT / "configs/repmet/coco482_s1.yaml"), [*keys, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    plain = models.mobilenet_v2(weights=None).eval()
    plain.load_state_dict(torch.load(path, weights_only=True))
    use_tf_padding(plain)
    # As many cells as are pooled: every bin is a cell, but for the interpolation between four of it, which one
    # sample in the middle does without.
    images = torch.rand(2, 3, 128, 128, generator=rng) * 2 - 1
    model.roi_heads.box_pooler.level_poolers[0].sampling_ratio = 1
    boxes = [Boxes(torch.tensor([[0.0, 0, 128, 128]]))] * 2
    x = model.roi_heads.describe(model.roi_heads.pool(model.backbone(images), boxes))
    assert_close(plain.classifier(x), plain(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("freeze_at", "num_learning"), [(0, 2), (4, 1), (5, 0)])
def test_frozen_parts_keep_weights_and_statistics(freeze_at, num_learning, rng):
    trunk, head = two_parts("MODEL.BACKBONE.FREEZE_AT", freeze_at)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in (trunk, head)]
    x = head.train()(trunk.train()(torch.randn(2, 3, 64, 64, generator=rng))["res4"])
    assert x.requires_grad == (num_learning > 0)
    if x.requires_grad:
        x.square().sum().backward()
    learning = 0
    for part, old in zip((trunk, head), before, strict=True):
        with_gradient = [p.grad is not None for p in part.parameters() if p.requires_grad]
        moved = [not v.equal(old[k]) for k, v in part.state_dict().items() if "running" in k]
        assert all(with_gradient) and any(moved) == bool(with_gradient)
        learning += bool(with_gradient)
    assert learning == num_learning


def test_solver_sees_trained_layers_in_the_head(rng):
    cfg = load_config(
        str(ROOT / "configs/repmet/coco482_s1_baseline_ft.yaml"),
        [
            *("MODEL.TORCHVISION.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
            *("MODEL.BACKBONE.FREEZE_AT", 4, "SOLVER.BACKBONE_MULTIPLIER", 0.25),
        ],
    )
    model = build_model(cfg).train()
    of_group = {}
    for group in build_optimizer(cfg, model).param_groups:
        of_group.update({id(p): (group["lr"], group["bottom_up"]) for p in group["params"]})
    for name, parameter in model.named_parameters():
        is_head = name.startswith("roi_heads.box_head.")
        expected = cfg.SOLVER.BASE_LR * (0.25 if is_head else 1), is_head
        assert of_group.get(id(parameter), expected) == expected
        assert (id(parameter) in of_group) == (not name.startswith("backbone."))
    query = random_query(rng, random_support_set(rng))
    del query["support"]
    with EventStorage(0):
        sum(model([query]).values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.box_head.parameters())


@torch.no_grad()
def test_no_roi():
    _, head = two_parts()
    assert head(torch.zeros(0, 576, 8, 8)).shape == (0, head.output_shape.channels)


@pytest.mark.parametrize("features", [["res5"], ["res3"], ["res4", "res3"]])
def test_rois_of_another_map_are_refused(features):
    cfg = tiny_config(*C4, "MODEL.ROI_HEADS.IN_FEATURES", features)
    with pytest.raises(ValueError, match="ROI_HEADS.IN_FEATURES"):
        TorchvisionHead(cfg, ShapeSpec(channels=576))


def test_nothing_comes_after_the_last_map():
    options = {"weights": "", "norm": "BN", "tf_padding": False}
    with pytest.raises(ValueError, match=r"among \[\], got"):
        torchvision_features("resnet18", **options, out_features=("res5",), after="res5")


def test_predictor_alone_is_trained_and_tuned(rng):
    """Baseline-DML on a head that stays: an episode tunes its representatives, and queries are described once."""
    keys = [
        "MODEL.TORCHVISION.WEIGHTS",
        "",
        "MODEL.DEVICE",
        "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        2,
    ]
    for trained in ("predictor", "all"):
        path = ROOT / "configs/repmet/coco482_s1_baseline_dml.yaml"
        model = build_model(load_config(str(path), [*keys, "MODEL.REPMET.TRAINED", trained]))
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        of_predictor = {name for name in learning if name.startswith("roi_heads.box_predictor.")}
        assert of_predictor and (learning == of_predictor) == (trained == "predictor")
        assert model.tunes_description("last_layer") == (trained == "all")
    with pytest.raises(ValueError, match="REPMET.TRAINED"):
        build_model(load_config(str(path), [*keys, "MODEL.REPMET.TRAINED", "heads"]))
