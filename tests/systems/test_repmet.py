"""RepMet as a few-shot detector: what represents a class, many classes at once, trained ones beside novel ones."""

import logging

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from factories import (
    TINY_REPMET,
    TINY_REPMET_OVERRIDES,
    random_query,
    random_support_set,
    tiny_model,
    tiny_repmet,
)
from torch.testing import assert_close

from fewshot_d2 import Support, SupportFeatures, SupportSet, load_config
from fewshot_d2.systems.repmet.supports import SupportImage, chosen_rois, support_images
from fewshot_d2.transforms import ResizeByRule


@pytest.fixture(scope="module")
def model():
    return tiny_repmet()


def boxed(rng, *boxes):
    image = torch.randint(0, 256, (3, 40, 50), generator=rng, dtype=torch.uint8)
    return [Support(image, torch.tensor(box, dtype=torch.float32)) for box in boxes]


def boxed_set(rng):
    return SupportSet(
        [7, 3],
        ["seven", "three"],
        [boxed(rng, [2, 2, 20, 20], [22, 5, 40, 30]), boxed(rng, [10, 10, 30, 38])],
    )


PROPOSALS = torch.tensor(
    [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 5]]
)


def picture(*boxes, rows=None):
    return SupportImage(
        torch.zeros(3, 40, 40), torch.tensor(boxes), torch.tensor(rows or list(range(len(boxes))))
    )


def test_best_iou_is_the_proposal_that_overlaps_most():
    example = picture([0.0, 0, 10, 9.2], [21.0, 20, 30, 30])
    boxes, rows, uncovered = chosen_rois(PROPOSALS, example, "best_iou", 0.7)
    assert boxes.tolist() == [PROPOSALS[1].tolist(), PROPOSALS[3].tolist()]
    assert rows.tolist() == [0, 1] and uncovered == 0


def test_all_iou_takes_every_proposal_from_the_threshold_up():
    example = picture([0.0, 0, 10, 10], rows=[4])
    boxes, rows, uncovered = chosen_rois(PROPOSALS, example, "all_iou", 0.8)
    overlaps = pairwise_iou(Boxes(PROPOSALS), Boxes(example.boxes))[:, 0]
    assert boxes.tolist() == PROPOSALS[overlaps >= 0.8].tolist() and len(boxes) == 3
    assert rows.tolist() == [4, 4, 4] and uncovered == 0


@pytest.mark.parametrize("rule", ["best_iou", "all_iou"])
@pytest.mark.parametrize("proposals", [PROPOSALS, PROPOSALS[:0]])
def test_an_example_that_no_proposal_covers_stands_for_itself(rule, proposals):
    far = [30.0, 0, 39, 9]
    boxes, rows, uncovered = chosen_rois(proposals, picture(far), rule, 0.7)
    assert boxes.tolist() == [far] and rows.tolist() == [0] and uncovered == 1


def test_gt_box_is_the_box():
    example = picture([1.0, 2, 10, 9])
    boxes, _, uncovered = chosen_rois(PROPOSALS, example, "gt_box", 0.7)
    assert boxes.tolist() == example.boxes.tolist() and uncovered == 0


@torch.no_grad()
@pytest.mark.parametrize(("modes", "expected"), [(3, 3), (6, 5)])
def test_covering_proposals_of_a_class_become_clusters_where_there_are_too_many(
    rng, monkeypatch, modes, expected
):
    # Five proposals for one shot.
    monkeypatch.setattr(
        "fewshot_d2.systems.repmet.detector.chosen_rois",
        lambda proposals, picture, rule, iou: (proposals[:5], picture.rows[[0] * 5], 0),
    )
    model = tiny_repmet("MODEL.REPMET.SUPPORT_MODES", modes)
    features = model.encode_support([random_support_set(rng, ways=1)])
    assert features.tensors["filled"].sum() == expected


def test_uncovered_examples_are_told(rng, caplog):
    model = tiny_repmet("MODEL.REPMET.SUPPORT_IOU", 1.01)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        features = model.encode_support([boxed_set(rng)])
    assert "3 supports are covered by no proposal" in caplog.text
    boxes = tiny_repmet("MODEL.REPMET.SUPPORT_ROIS", "gt_box")
    with torch.no_grad():
        expected = boxes.encode_support([boxed_set(rng.manual_seed(0))])
    for name, tensor in expected.tensors.items():
        assert torch.equal(features.tensors[name], tensor)


def test_a_picture_with_several_examples_is_read_once(rng):
    resize = ResizeByRule(max_size=100, min_size=1, rule="paper")
    pictures = support_images([boxed_set(rng)], resize, "RGB")
    assert [p.rows.tolist() for p in pictures] == [[0, 0], [1]]
    assert pictures[0].image.shape == (3, 80, 100)
    assert_close(pictures[0].boxes, 2 * torch.tensor([[2.0, 2, 20, 20], [22, 5, 40, 30]]))
    bgr = support_images([boxed_set(rng.manual_seed(0))], resize, "BGR")
    assert torch.equal(bgr[0].image, pictures[0].image.flip(0))


@torch.no_grad()
def test_features_are_the_embeddings_of_the_boxes(rng):
    model = tiny_repmet("MODEL.REPMET.SUPPORT_ROIS", "gt_box")
    support = boxed_set(rng)
    features = model.encode_support([support])
    assert features.tensors["filled"].tolist() == [[True, True], [True, False]]
    for row, shots in enumerate(support.examples):
        for mode, shot in enumerate(shots):
            (image,) = support_images([SupportSet([1], ["a"], [[shot]])], model.resize, "RGB")
            maps = model.backbone(model.support_batch([image]).tensor)
            x = model.roi_heads.describe(model.roi_heads.pool(maps, [Boxes(image.boxes)]))
            expected = F.normalize(model.predictor.embedding(x), dim=1)[0]
            assert_close(
                features.tensors["representatives"][row, mode], expected, atol=1e-5, rtol=1e-4
            )


@torch.no_grad()
def test_batches_of_sets_equal_one_set_at_a_time(model, rng):
    sets = [random_support_set(rng, ways=3, shots=2), random_support_set(rng, ways=1, shots=1)]
    queries = [random_query(rng, s) for s in sets]
    together = model(queries)
    for query, output in zip(queries, together, strict=True):
        alone = model([query])[0]["instances"]
        assert len(alone), "the comparison needs detections"
        assert_close(output["instances"].scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert_close(
            output["instances"].pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-2, rtol=1e-4
        )
        assert torch.equal(output["instances"].pred_classes, alone.pred_classes)


@torch.no_grad()
def test_features_equal_supports_also_from_a_file(model, rng, tmp_path):
    support = random_support_set(rng, ways=3, shots=2)
    query = random_query(rng, support)
    model.encode_support([support]).save(tmp_path / "features.pt")
    loaded = SupportFeatures.load(tmp_path / "features.pt")
    expected = model([query])[0]["instances"]
    actual = model([{**query, "support_features": loaded}])[0]["instances"]
    assert torch.equal(actual.scores, expected.scores)


@torch.no_grad()
def test_sets_with_other_numbers_of_shots_join(model, rng):
    few, many = random_support_set(rng, ways=1, shots=1), random_support_set(rng, ways=1, shots=3)
    query = random_query(rng, few)
    joined = SupportFeatures.cat([model.encode_support([s]) for s in (few, many)])
    assert joined.tensors["filled"].sum(dim=1).tolist() == [1, 3]
    found = model([{**query, "support_features": joined[[0]]}])[0]["instances"]
    expected = model([query])[0]["instances"]
    assert_close(found.scores, expected.scores)


@torch.no_grad()
def test_trained_classes_beside_novel_ones(model, rng):
    novel = random_support_set(rng, ways=1)
    query = random_query(rng, novel)
    trained = model.trained_features([90, 91], ["cat", "dog"])
    together = SupportFeatures.cat([trained, model.encode_support([novel])])
    assert together.class_names == ["cat", "dog", "class 0"]
    found = model([{**query, "support_features": together}])[0]["instances"]
    assert set(found.pred_classes.tolist()) == {0, 1, 2}
    without_support = {k: v for k, v in query.items() if k != "support"}
    alone = model([without_support])[0]["instances"]
    expected = model([{**query, "support_features": trained}])[0]["instances"]
    assert torch.equal(alone.scores, expected.scores) and len(alone)


@torch.no_grad()
def test_a_described_query_can_be_searched_again_and_again(model, rng):
    sets = [random_support_set(rng, ways=2), random_support_set(rng, ways=1)]
    query = random_query(rng, sets[0])
    (described,) = model.describe_queries([query])
    for support in sets:
        features = model.encode_support([support])
        expected = model([{**query, "support_features": features}])[0]["instances"]
        assert torch.equal(model.search(described, features).scores, expected.scores)
    siamese = tiny_model()
    (described,) = siamese.describe_queries([query])
    found = siamese.search(described, siamese.encode_support([sets[0]]))
    assert torch.equal(found.scores, siamese([query])[0]["instances"].scores)


def test_masks_of_novel_classes(rng):
    model = tiny_repmet(
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
        *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False, "TEST.DETECTIONS_PER_IMAGE", 7),
    )
    query = random_query(rng, random_support_set(rng, ways=5))
    with torch.no_grad():
        instances = model([query])[0]["instances"]
    assert instances.pred_masks.shape == (7, 64, 64)


def test_crops_as_supports_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_repmet()
        assert "SUPPORT.FORM" not in caplog.text
        tiny_repmet("FEWSHOT.SUPPORT.FORM", "crop")
    assert "FEWSHOT.SUPPORT.FORM should be 'image', is 'crop'" in caplog.text


def test_other_heads_are_refused():
    with pytest.raises(ValueError, match="ROI_HEADS.NAME must be RepMetROIHeads"):
        tiny_repmet("MODEL.ROI_HEADS.NAME", "StandardROIHeads")


@pytest.mark.parametrize(
    ("key", "value"), [("SUPPORT_ROIS", "mean"), ("CLASSIFIER", "nearest"), ("CLASS_LOSS", "mse")]
)
def test_unknown_values_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        tiny_repmet(f"MODEL.REPMET.{key}", value)


def test_weights_of_a_stock_detector_fit():
    own = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
    stock = build_model(load_config(str(TINY_REPMET), [*TINY_REPMET_OVERRIDES, *own])).state_dict()
    model = tiny_repmet(seed=1)
    missing, unexpected = model.load_state_dict(stock, strict=False)
    new = ("embedding.weight", "embedding.bias", "representatives")
    assert not unexpected
    assert set(missing) == {f"roi_heads.box_predictor.{name}" for name in new}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stock.items())


def test_training_on_episodes_is_refused(rng):
    query = random_query(rng, random_support_set(rng))
    with pytest.raises(ValueError, match="TRAIN_ON 'base_images', got queries with supports"):
        tiny_repmet().train()([query])


@torch.no_grad()
def test_queries_with_and_without_supports_do_not_mix(model, rng):
    support = random_support_set(rng)
    queries = [random_query(rng, support) for _ in range(2)]
    del queries[0]["support"]
    for mixed in (queries, queries[::-1]):
        with pytest.raises(ValueError, match="every query must have 'support'"):
            model(mixed)


@torch.no_grad()
def test_trained_classes_do_not_compete_with_themselves(rng):
    plain, rivals = tiny_repmet(), tiny_repmet("MODEL.REPMET.KEEP_BASE", True)
    query = random_query(rng, random_support_set(rng, ways=1))
    novel = rivals.encode_support([query["support"]])
    together = SupportFeatures.cat([novel, rivals.trained_features()])
    without_support = {k: v for k, v in query.items() if k != "support"}
    for searched in (without_support, {**query, "support_features": together}):
        expected, found = (m([searched])[0]["instances"] for m in (plain, rivals))
        assert len(found)
        assert torch.equal(found.scores, expected.scores)
    # One of two is searched, the other one is a rival.
    (described,) = plain.describe_queries([query])
    trained = plain.trained_features()
    both, one = plain.search(described, trained), rivals.search(described, trained[[1]])
    scores = both.scores[both.pred_classes == 1]
    assert len(one) == len(scores)
    assert_close(one.scores, scores)


def test_contrast_features_are_one_embedding_a_crop(model, rng):
    sets = [random_support_set(rng, ways=3), random_support_set(rng, ways=3)]
    features = model.contrast_features(sets)
    assert {name: tuple(t.shape) for name, t in features.items()} == {"embedding": (6, 6)}


def test_external_baseline_trains_its_embedding_alone(rng):
    model = tiny_repmet("MODEL.REPMET.CLASSIFIER", "external").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"roi_heads.box_predictor.embedding.{end}" for end in ("weight", "bias")}
    queries = [random_query(rng, random_support_set(rng, ways=2)) for _ in range(2)]
    for query in queries:
        del query["support"]
    with EventStorage():
        losses = model(queries)
    assert losses["loss_triplet"] > 0
    sum(losses.values()).backward()
    assert model.predictor.embedding.weight.grad.abs().sum() > 0
    # Without any object there is nothing to learn from, and a gradient of zero.
    for query in queries:
        query["instances"] = query["instances"][:0]
    model.zero_grad()
    with EventStorage():
        losses = model(queries)
    sum(losses.values()).backward()
    assert losses["loss_triplet"] == 0 and (model.predictor.embedding.weight.grad == 0).all()
