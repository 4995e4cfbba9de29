"""SPIL: correlation, losses of pairs, look-alikes and the kept trunk."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from factories import random_query, random_support_set, tiny_spil
from torch.testing import assert_close

from fewshot_d2.checkpoint import FewShotCheckpointer
from fewshot_d2.modeling.matching import depthwise_correlation
from fewshot_d2.systems.spil.lookalikes import is_covered, set_lookalikes, without_lookalikes

# All anchors and ROIs count, so that no loss depends on a draw.
NO_SAMPLING = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10**4),
    *("MODEL.RPN.POSITIVE_FRACTION", 1.0, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
]


def losses_of(model, *queries):
    with EventStorage(0):
        return model(list(queries))


def only_class_of(support, k):
    return type(support)([support.class_ids[k]], [support.class_names[k]], [support.examples[k]])


def only_class(query, k):
    """The query with class ``k`` of its support alone."""
    part = only_class_of(query["support"], k)
    instances = query["instances"][query["instances"].gt_classes == k]
    instances.gt_classes = torch.zeros_like(instances.gt_classes)
    return {**query, "support": part, "instances": instances}


def without_instances(query):
    return {**query, "instances": query["instances"][[]]}


def test_correlation_is_grouped_convolution_and_a_naive_loop(rng):
    features = torch.randn(3, 5, 4, 6, generator=rng)
    kernels = torch.randn(3, 5, generator=rng)
    result = depthwise_correlation(features, kernels)
    grouped = F.conv2d(features.reshape(1, 15, 4, 6), kernels.reshape(15, 1, 1, 1), groups=15)
    assert_close(result, grouped.reshape(3, 5, 4, 6))
    for p in range(3):
        for c in range(5):
            for y in range(4):
                for x in range(6):
                    assert result[p, c, y, x] == features[p, c, y, x] * kernels[p, c]


@pytest.mark.parametrize("norm", ["none", "channel_mean"])
@torch.no_grad()
def test_kernels_are_means_over_crop_and_shots(rng, norm):
    model = tiny_spil("MODEL.SPIL.KERNEL_NORM", norm)
    support = random_support_set(rng, ways=2, shots=3)
    encoded = model.encode_support([support]).tensors["res4"]
    for k, shots in enumerate(support.examples):
        means = []
        for shot in shots:
            crop = model.support_crop(shot).image
            assert crop.shape == (3, 32, 32)
            image = (crop - model.pixel_mean) / model.pixel_std
            means.append(model.backbone(image[None])["res4"][0].mean(dim=(1, 2)))
        expected = torch.stack(means).mean(dim=0)
        if norm == "channel_mean":
            expected = expected / (sum(map(abs, expected.tolist())) / len(expected))
        assert_close(encoded[k], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_kernel_of_an_empty_map_is_zero_and_not_nan(rng, monkeypatch):
    model = tiny_spil("MODEL.SPIL.KERNEL_NORM", "channel_mean")
    empty = torch.zeros(1, 96, 2, 2)
    monkeypatch.setattr(model.backbone, "forward", lambda images: {"res4": empty})
    (kernel,) = model.encode_support([random_support_set(rng, ways=1)]).tensors["res4"]
    assert torch.equal(kernel, torch.zeros(96))


@torch.no_grad()
def test_kernels_normalised_over_the_step(rng):
    support = random_support_set(rng, ways=3)
    plain = tiny_spil().encode_support([support]).tensors["res4"]
    model = tiny_spil("MODEL.SPIL.KERNEL_NORM", "batch_norm")
    mean, variance = plain.mean(dim=0), plain.var(dim=0, unbiased=False)
    expected = (plain - mean) / (variance + 1e-5).sqrt()
    assert_close(model.encode_support([support]).tensors["res4"], expected, atol=1e-4, rtol=1e-3)
    # In inference by what training has seen, so that a class's kernel depends on it alone.
    model.eval()
    tracked = 0.9 + 0.1 * plain.var(dim=0)
    expected = (plain - 0.1 * mean) / (tracked + 1e-5).sqrt()
    alone = model.encode_support([only_class_of(support, 1)]).tensors["res4"]
    assert_close(alone[0], expected[1], atol=1e-4, rtol=1e-3)


# The heads of the original C4 network, on its trunk.
RES5 = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STRIDE_IN_1X1", False),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 4, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
]


@pytest.mark.parametrize("heads", [[], RES5], ids=["standard", "res5"])
def test_negative_pass_has_no_box_and_mask_loss_and_finite_gradients(rng, heads):
    model = tiny_spil(*heads)
    losses = losses_of(model, without_instances(random_query(rng, random_support_set(rng))))
    for name in ("loss_rpn_loc", "loss_box_reg", "loss_mask"):
        assert losses[name] == 0
    assert losses["loss_rpn_cls"] > 0 and losses["loss_cls"] > 0
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_omega_scales_all_losses_of_its_pair(rng):
    model = tiny_spil(*NO_SAMPLING)
    query = random_query(rng, random_support_set(rng))
    whole = losses_of(model, query)
    assert all(loss > 0 for loss in whole.values())
    nothing = losses_of(model, {**query, "weights": [0.0, 0.0]})
    assert all(loss == 0 for loss in nothing.values())
    first, second = (losses_of(model, {**query, "weights": w}) for w in ([0.3, 0.0], [0.0, 0.7]))
    alone = [losses_of(model, only_class(query, k)) for k in (0, 1)]
    for name in whole:
        assert_close(first[name], 0.3 * alone[0][name] / 2)
        assert_close(second[name], 0.7 * alone[1][name] / 2)
        assert_close(whole[name], (alone[0][name] + alone[1][name]) / 2)


def test_batch_is_the_mean_over_its_pairs(rng):
    model = tiny_spil(*NO_SAMPLING)
    queries = [random_query(rng, random_support_set(rng, ways=1)) for _ in range(2)]
    together, alone = losses_of(model, *queries), [losses_of(model, q) for q in queries]
    for name, loss in together.items():
        assert_close(loss, (alone[0][name] + alone[1][name]) / 2)


@pytest.mark.parametrize("roi_features", ["correlated", "query"])
@torch.no_grad()
def test_all_classes_in_one_pass_equal_one_at_a_time(rng, roi_features):
    model = tiny_spil("MODEL.SPIL.ROI_FEATURES", roi_features).eval()
    query = random_query(rng, random_support_set(rng, ways=3))
    together = model([query])[0]["instances"]
    assert len(together) and together.has("pred_masks")
    for k in range(3):
        alone = model([only_class(query, k)])[0]["instances"]
        part = together[together.pred_classes == k]
        assert_close(part.scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert_close(part.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_heads_see_the_support_only_as_the_key_says(rng):
    """With plain ROI features another support changes proposals, but not what the heads say of the same ROI."""
    query = random_query(rng, random_support_set(rng, ways=1))
    for roi_features, differs in (("correlated", True), ("query", False)):
        model = tiny_spil("MODEL.SPIL.ROI_FEATURES", roi_features).eval()
        images = model.preprocess([query])
        maps = model.backbone(images.tensor)
        seen = []
        for _ in range(2):
            support, pairs = model.gather_supports(
                [{**query, "support": random_support_set(rng, ways=1)}]
            )
            correlated = model.correlate(maps, support.tensors, pairs)
            seen.append(model._seen_by_heads(maps, correlated, pairs)["res4"])
        assert torch.equal(*seen) != differs


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="KERNEL_NORM"):
        tiny_spil("MODEL.SPIL.KERNEL_NORM", "l2")
    with pytest.raises(ValueError, match="ATTENTION_LAYER must be one of"):
        tiny_spil("MODEL.SPIL.ATTENTION_LAYER", "res5")
    # Both are defaults of detectron2, and would train something else in silence.
    with pytest.raises(ValueError, match="must be LookalikeRPN for SPIL, got RPN"):
        tiny_spil("MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    with pytest.raises(ValueError, match="NUM_CLASSES must be 1 for SPIL, got 80"):
        tiny_spil("MODEL.ROI_HEADS.NUM_CLASSES", 80)


def test_missing_superpixels_are_named(rng):
    query = random_query(rng, random_support_set(rng))
    del query["superpixels"]
    with pytest.raises(ValueError, match="SuperpixelMapper.*random.png"):
        losses_of(tiny_spil(), query)


def test_masks_of_the_data_set_are_not_used(rng):
    """Other true masks change nothing; without co-attention they would."""
    query = random_query(rng, random_support_set(rng))
    model = tiny_spil(*NO_SAMPLING)
    before = losses_of(model, query)
    query["instances"].gt_masks.tensor.logical_not_()
    after = losses_of(model, query)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pair_without_any_mask_pixel_has_no_mask_loss(rng, monkeypatch):
    model = tiny_spil(*NO_SAMPLING)
    query = random_query(rng, random_support_set(rng, ways=1))
    assert losses_of(model, query)["loss_mask"] > 0
    monkeypatch.setattr(
        "fewshot_d2.systems.spil.attention.co_attention",
        lambda query, shots, boxes, stride, size: torch.zeros(size),
    )
    losses = losses_of(model, query)
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] > 0


def target_with_lookalikes():
    """A box on the left, look-alike pixels in the middle."""
    target = Instances((40, 60))
    target.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))
    target.gt_classes = torch.zeros(1, dtype=torch.int64)
    pixels = torch.zeros(40, 60, dtype=torch.bool)
    pixels[10:20, 20:30] = True
    set_lookalikes(target, pixels)
    return target


def test_proposals_on_lookalikes_are_left_out():
    target = target_with_lookalikes()
    proposals = Instances((40, 60))
    proposals.proposal_boxes = Boxes(
        torch.tensor(
            [
                [0.0, 0.0, 10.0, 10.0],  # the object
                [20.0, 10.0, 30.0, 20.0],  # the look-alike
                [20.0, 10.0, 30.0, 30.0],  # half of it
                [20.0, 10.0, 30.0, 31.0],  # less than half of it
                [40.0, 20.0, 50.0, 30.0],  # background
            ]
        )
    )
    kept = without_lookalikes(proposals, target, 0.5).proposal_boxes.tensor
    assert torch.equal(kept, proposals.proposal_boxes.tensor[[0, 3, 4]])
    assert len(without_lookalikes(proposals, target, 1.5)) == 5
    # The negative pass has no instance, and all is background there.
    assert len(without_lookalikes(proposals, target[[]], 0.5)) == 5


def test_anchors_on_lookalikes_are_ignored():
    rpn = tiny_spil("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6).proposal_generator
    anchors = rpn.anchor_generator([torch.zeros(1, 576, 3, 4)])
    target = target_with_lookalikes()
    # Larger than the smallest anchors.
    pixels = torch.zeros(40, 60, dtype=torch.bool)
    pixels[8:32, 16:44] = True
    set_lookalikes(target, pixels)
    plain = Instances((40, 60), gt_boxes=target.gt_boxes)
    (labels,), _ = rpn.label_and_sample_anchors(anchors, [target])
    (without,), _ = rpn.label_and_sample_anchors(anchors, [plain])
    covered = is_covered(target, Boxes.cat(anchors), 0.5)
    assert (covered & (without == 0)).any()
    assert torch.equal(labels, torch.where(covered & (without == 0), -1, without))


def test_trunk_that_is_not_trained_serves_as_it_is():
    model = tiny_spil()
    assert model.co_attention.trunk is None and model.co_attention.is_kept


def test_trained_trunk_is_kept_once(rng):
    model = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0)
    (hook,) = model.training_hooks(None, 1)
    images = torch.randn(1, 3, 64, 64, generator=rng)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=rng)
    hook.before_train()
    kept = model.co_attention.features(images, {})
    assert torch.equal(kept, model.backbone(images)["res4"])
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.01
    hook.before_train()
    assert torch.equal(model.co_attention.features(images, {}), kept)
    # A later stage or a resumed run reads it from the checkpoint and keeps it.
    again = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0, seed=1)
    again.load_state_dict(model.state_dict())
    again.training_hooks(None, 1)[0].before_train()
    assert torch.equal(again.co_attention.features(images, {}), kept)
    assert not any(p.requires_grad for p in again.co_attention.parameters())


def test_imagenet_weights_are_for_the_backbone_alone(tmp_path):
    """A file that detectron2 matches by the ends of names, which trunk and backbone share."""
    source = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0, seed=1).backbone.state_dict()
    content = {"model": {k: v.numpy() for k, v in source.items()}, "__author__": "somebody"}
    (tmp_path / "imagenet.pkl").write_bytes(pickle.dumps(content))
    model = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0)
    FewShotCheckpointer(model).load(str(tmp_path / "imagenet.pkl"))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source[name]), name
    assert not any("trunk" in name for name in model.state_dict())
    model.training_hooks(None, 1)[0].before_train()
    for name, value in model.co_attention.trunk.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_checkpoints_have_the_kept_trunk(tmp_path):
    model = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0)
    model.training_hooks(None, 1)[0].before_train()
    FewShotCheckpointer(model, str(tmp_path)).save("kept")
    again = tiny_spil("MODEL.BACKBONE.FREEZE_AT", 0, seed=1)
    FewShotCheckpointer(again).load(str(tmp_path / "kept.pth"))
    kept = model.co_attention.trunk.state_dict()
    assert again.co_attention.is_kept
    assert kept and all(
        torch.equal(value, kept[name])
        for name, value in again.co_attention.trunk.state_dict().items()
    )


def test_fpn_by_key(rng):
    model = tiny_spil(
        *("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"]),
        *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
    )
    query = random_query(rng, random_support_set(rng))
    sum(losses_of(model, query).values()).backward()
    assert set(model.encode_support([query["support"]]).tensors) == {"p3", "p4", "p5"}
    assert len(model.eval()([query])[0]["instances"])
