"""Detector and retrieval as a few-shot detector: its scores by hand, its pooling, and the same plans as any system."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from factories import ROOT, random_query, random_support_set, registered_set, write_set

from fewshot_d2 import Support, SupportSet, load_config
from fewshot_d2.data.loaders import build_factory
from fewshot_d2.engine.evaluate import evaluate_plan, evaluation_plans
from fewshot_d2.retrieval.detector import similarity_to_examples
from fewshot_d2.retrieval.regions import describe_regions

CONFIG = ROOT / "configs/os2d/flickrlogos27_retrieval.yaml"
SMALL = [
    *("MODEL.TORCHVISION.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
    *("MODEL.RPN.CONV_DIMS", [8], "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "INPUT.MAX_SIZE_TEST", 64),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "FEWSHOT.RETRIEVAL.NUM_REGIONS", 5),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "FEWSHOT.SUPPORT.SIZE", 64),
    *("FEWSHOT.RETRIEVAL.CROP_SIZE", 64, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.9),
]
SALIENT = ["FEWSHOT.RETRIEVAL.REGIONS", "salient", "FEWSHOT.RETRIEVAL.FINE", "res4"]


def detector(*overrides, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(str(CONFIG), [*SMALL, *overrides])).eval()


def query_of(image):
    size = {"height": image.shape[1], "width": image.shape[2]}
    return {"image": image, **size, "image_id": 1, "file_name": "q", "episode_id": 0}


@pytest.mark.parametrize("power", [1.0, 3.0, 5.5])
def test_generalised_mean_equals_loops(rng, power):
    features = torch.rand(1, 3, 6, 8, generator=rng) - 0.3
    boxes = torch.tensor([[0, 0, 32, 24], [8, 4, 16, 20.0]])
    expected = []
    for x0, y0, x1, y1 in (boxes / 4).int().tolist():
        cells = [features[0, :, y, x] for y in range(y0, y1) for x in range(x0, x1)]
        positive = [c.clamp(min=0) if power != 1 else c for c in cells]
        mean = sum(c**power for c in positive) / len(cells)
        expected.append(mean ** (1 / power))
    expected = torch.stack(expected)
    found = describe_regions(features, boxes, 4, power=power)
    torch.testing.assert_close(found, F.normalize(expected, dim=1))
    # One map for each box.
    each = describe_regions(features.repeat(2, 1, 1, 1), boxes, 4, power=power)
    torch.testing.assert_close(each, found)


def test_bad_pooling_is_refused():
    box = torch.tensor([[0, 0, 4, 4.0]])
    with pytest.raises(ValueError, match="power must be at least 1, got 0.5"):
        describe_regions(torch.ones(1, 1, 4, 4), box, 1, power=0.5)
    with pytest.raises(ValueError, match="one for each of 1 boxes"):
        describe_regions(torch.ones(2, 1, 4, 4), box, 1)


def test_best_example_of_a_class_counts():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    examples = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[0.0, -1.0], [0.0, 0.0]]])
    expected = [[1.0, 0.8, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(similarity_to_examples(vectors, examples), torch.tensor(expected))
    assert similarity_to_examples(vectors[:0], examples).shape == (2, 0)


@pytest.mark.parametrize("keys", [[], SALIENT, ["FEWSHOT.RETRIEVAL.REGIONS", "proposals"]])
@pytest.mark.parametrize("crop_size", [0, 64])
def test_scores_are_cosines_of_crop_and_example(rng, keys, crop_size):
    model = detector(*keys, "FEWSHOT.RETRIEVAL.CROP_SIZE", crop_size)
    image = torch.randint(0, 256, (3, 64, 64), generator=rng, dtype=torch.uint8)
    support = random_support_set(rng, ways=3, shots=2)
    with torch.no_grad():
        found = model([{**query_of(image), "support": support}])[0]["instances"]
        assert len(found) and found.pred_classes.unique().tolist() == [0, 1, 2]
        for box, score, k in zip(
            found.pred_boxes.tensor, found.scores, found.pred_classes.tolist(), strict=True
        ):
            vector = model.describer.vectors(query_of(image), box[None])
            examples = [model._describe(shot) for shot in support.examples[k]]
            cosine = max(F.cosine_similarity(vector, e).item() for e in examples)
            assert score.item() == pytest.approx(max(cosine, 0), abs=1e-4)
    for k in range(3):
        own = found[found.pred_classes == k]
        overlap = pairwise_iou(own.pred_boxes, own.pred_boxes) - torch.eye(len(own))
        assert not len(own) or overlap.max() <= 0.9 + 1e-6


def test_crop_is_described_like_an_example(rng):
    """A region of the query and the same pixels as a support have one vector, so the score is 1."""
    model = detector(*SALIENT)
    image = torch.randint(0, 256, (3, 64, 64), generator=rng, dtype=torch.uint8)
    box = torch.tensor([8.0, 16.0, 40.0, 56.0])
    support = SupportSet([4], ["part"], [[Support(image, box)]])
    with torch.no_grad():
        features = model.encode_support([support])
        vector = model.describer.vectors(query_of(image), box[None])
    assert similarity_to_examples(vector, features.tensors["vectors"]).item() == pytest.approx(
        1, abs=1e-5
    )


def test_training_merges_all_classes(rng):
    model = detector().train()
    query = random_query(rng, random_support_set(rng, ways=2))
    with EventStorage(0):
        losses = model([query])
    sum(losses.values()).backward()
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} == set(losses)
    assert query["instances"].gt_classes.tolist() == [0, 1], "the batch is not changed"
    assert all(p.grad is None for p in model.backbone.parameters())
    with pytest.raises(ValueError, match="REGIONS 'proposals' or 'detections', got a trunk"):
        detector(*SALIENT).train()([query])


def test_same_plan_as_other_systems(tmp_path):
    write_set(tmp_path, num_images=5)
    with registered_set("retrieval_photos", tmp_path):
        keys = ["DATASETS.TEST", ("retrieval_photos",), "FEWSHOT.SUPPORT.DATASETS_TEST", ()]
        keys += ["FEWSHOT.SPLIT", "novel:b,c", "FEWSHOT.TEST.FIXED_SUPPORTS", False]
        keys += ["FEWSHOT.TEST.NUM_RUNS", 1, "OUTPUT_DIR", str(tmp_path / "out")]
        cfg = load_config(str(CONFIG), [*SMALL, *keys])
        (plan,) = evaluation_plans(cfg)
        factory = build_factory("retrieval_photos", "retrieval_photos")
        run = evaluate_plan(cfg, detector(), plan, factory)[""]
    assert len(run.detections) > 5 and run.results["num_missing"] == 0
    assert {d["category_id"] for d in run.detections} == {11, 12}
    assert 0 <= run.results["voc"]["mAP"] <= 100


def test_checkpoint_brings_its_detector(tmp_path):
    """Weights of a detector trained elsewhere are read by key; those of the whole come from MODEL.WEIGHTS."""
    whole = detector(seed=1)
    torch.save({"model": whole.describer.network.state_dict()}, tmp_path / "detector.pth")
    loaded = detector("FEWSHOT.RETRIEVAL.DETECTOR_WEIGHTS", str(tmp_path / "detector.pth"))
    other = detector()
    for name, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert any(not torch.equal(v, whole.state_dict()[n]) for n, v in other.state_dict().items())


def test_detector_of_itself_is_refused():
    with pytest.raises(ValueError, match="RETRIEVAL.DETECTOR must be another one"):
        detector("FEWSHOT.RETRIEVAL.DETECTOR", "RetrievalDetector")
