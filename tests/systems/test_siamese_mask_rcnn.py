"""What Siamese Mask R-CNN promises: one pass for all classes, averaged shots, the paper's losses."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from factories import random_query, random_support, random_support_set, tiny_model
from torch.testing import assert_close

from fewshot_d2 import Support, SupportFeatures, SupportSet


@pytest.fixture(scope="module")
def model():
    return tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def single_class(support: SupportSet, k: int) -> SupportSet:
    return SupportSet([support.class_ids[k]], [support.class_names[k]], [support.examples[k]])


def sorted_rows(instances: Instances):
    order = instances.scores.argsort(descending=True, stable=True)
    return instances[order]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_many_classes_equal_one_at_a_time(model, rng, chunk):
    support = random_support_set(rng, ways=5)
    query = random_query(rng, support)
    model.pairs_per_chunk = chunk
    together = model([query])[0]["instances"]
    assert len(together), "the comparison needs detections"
    for k in range(5):
        alone = model([{**query, "support": single_class(support, k)}])[0]["instances"]
        of_class = sorted_rows(together[together.pred_classes == k])
        alone = sorted_rows(alone)
        assert (alone.pred_classes == 0).all()
        assert_close(of_class.scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert_close(of_class.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
        # A pixel may sit on the 0.5 threshold; anything systematic would change far more of them.
        assert (of_class.pred_masks ^ alone.pred_masks).float().mean() < 1e-3


@torch.no_grad()
def test_queries_of_a_batch_do_not_mix(model, rng):
    supports = [random_support_set(rng, ways=2), random_support_set(rng, ways=3)]
    queries = [random_query(rng, support) for support in supports]
    batch = model(queries)
    for query, output in zip(queries, batch, strict=True):
        alone = model([query])[0]["instances"]
        assert_close(output["instances"].scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(output["instances"].pred_classes, alone.pred_classes)


@torch.no_grad()
def test_precomputed_features_equal_supports(model, rng, tmp_path):
    support = random_support_set(rng, ways=3)
    query = random_query(rng, support)
    features = model.encode_support([support])
    features.save(tmp_path / "features.pt")
    loaded = SupportFeatures.load(tmp_path / "features.pt")
    expected = model([query])[0]["instances"]
    del query["support"]
    result = model([{**query, "support_features": loaded}])[0]["instances"]
    assert torch.equal(result.scores, expected.scores)
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)


@torch.no_grad()
def test_shots_are_averaged_and_their_order_does_not_matter(model, rng):
    shots = [random_support(rng) for _ in range(3)]
    singles = [model.encode_support([SupportSet([1], ["a"], [[shot]])]) for shot in shots]
    joined = model.encode_support([SupportSet([1], ["a"], [shots])])
    turned = model.encode_support([SupportSet([1], ["a"], [shots[::-1]])])
    for level, tensor in joined.tensors.items():
        expected = torch.stack([single.tensors[level] for single in singles]).mean(0)
        assert_close(tensor, expected, atol=1e-5, rtol=1e-4)
        assert_close(tensor, turned.tensors[level], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_support_with_a_box_equals_its_crop(model, rng):
    image = torch.randint(0, 256, (3, 40, 50), generator=rng, dtype=torch.uint8)
    boxed = Support(image, torch.tensor([10.0, 5.0, 30.0, 35.0]))
    cropped = Support(image[:, 5:35, 10:30].clone())
    first, second = (
        model.encode_support([SupportSet([1], ["a"], [[s]])]) for s in (boxed, cropped)
    )
    for level in first.tensors:
        assert torch.equal(first.tensors[level], second.tensors[level])


@torch.no_grad()
def test_pooling_valid_cells_ignores_the_padding(rng):
    """With valid-only pooling the vector is the mean over the crop's cells alone."""
    model = tiny_model("MODEL.MATCH.POOL_VALID_ONLY", True)
    support = SupportSet([1], ["a"], [[random_support(rng, (32, 16))]])
    images, sizes, _ = model.preprocess_supports([support])
    features = model.backbone(images)
    encoded = model.encode_support([support])
    assert sizes == [(32, 16)]
    for level, pooled in encoded.tensors.items():
        cells = features[level][0]
        half = max(1, cells.shape[2] // 2)
        expected = cells[:, :, :half].mean(dim=(1, 2))
        assert_close(pooled[0], expected, atol=1e-5, rtol=1e-4)


def test_weights_multiply_the_losses(rng):
    batch = [random_query(rng, random_support_set(rng)) for _ in range(2)]

    def losses(weights):
        model = tiny_model("MODEL.MATCH.LOSS_WEIGHTS", weights).train()
        torch.manual_seed(1)
        with EventStorage(0):
            return model(batch)

    plain, weighted = losses((1, 1, 1, 1, 1)), losses((2, 0.1, 3, 0.5, 4))
    factors = dict(zip(plain, (2, 0.1, 3, 0.5, 4), strict=True))
    assert list(plain) == [
        "loss_rpn_cls",
        "loss_rpn_loc",
        "loss_cls",
        "loss_box_reg",
        "loss_mask",
    ]
    for name, loss in plain.items():
        assert weighted[name].item() == pytest.approx(factors[name] * loss.item(), rel=1e-5)


@pytest.mark.parametrize("preset", ["detectron2", "original"])
def test_query_without_instances_trains(rng, preset):
    """No ground truth: finite losses, zero box and mask loss, finite gradients."""
    query = random_query(rng, random_support_set(rng))
    empty = Instances((64, 64))
    empty.gt_boxes, empty.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
    empty.gt_masks = BitMasks(torch.zeros(0, 64, 64, dtype=torch.bool))
    negatives = "fill" if preset == "detectron2" else "proportional"
    model = tiny_model(
        "MODEL.MATCH.LOSS_REDUCTION", preset, "MODEL.MATCH.NEGATIVES", negatives
    ).train()
    with EventStorage(0):
        losses = model([{**query, "instances": empty}])
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == losses["loss_mask"] == losses["loss_rpn_loc"] == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


@torch.no_grad()
def test_no_proposal_above_the_threshold_gives_an_empty_result(rng):
    model = tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999)
    result = model([random_query(rng, random_support_set(rng))])[0]["instances"]
    assert len(result) == 0
    assert result.pred_masks.shape == (0, 64, 64)


@torch.no_grad()
def test_results_are_in_original_query_pixels(model, rng):
    query = random_query(rng, random_support_set(rng))
    large = model([{**query, "height": 128, "width": 192}])[0]["instances"]
    small = model([query])[0]["instances"]
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * scale, atol=1e-3, rtol=1e-4)
    assert large.pred_masks.shape[1:] == (128, 192)


def test_input_is_not_modified(rng):
    query = random_query(rng, random_support_set(rng))
    before = query["image"].clone(), query["instances"].gt_classes.clone()
    model = tiny_model().train()
    with EventStorage(0):
        model([query])
    assert torch.equal(query["image"], before[0])
    assert torch.equal(query["instances"].gt_classes, before[1])


def test_query_without_support_is_an_error(model, rng):
    query = random_query(rng, random_support_set(rng))
    with pytest.raises(ValueError, match="random.png"):
        model([{**query, "support": None}])


def test_features_of_another_system_are_refused(model, rng):
    query = random_query(rng, random_support_set(rng))
    features = model.encode_support([query["support"]])
    features.system = "OtherSystem"
    with pytest.raises(ValueError, match="OtherSystem"):
        model([{**query, "support_features": features}])
