"""The predictor equals the model on the mapped query, and tells what is missing."""

import numpy as np
import pytest
import torch
from factories import (
    TINY_REPMET,
    TINY_REPMET_OVERRIDES,
    TINY_SPIL,
    TINY_SPIL_OVERRIDES,
    random_support_set,
    tiny_config,
)
from inference_cases import same_instances, write_model
from PIL import Image

from fewshot_d2 import FewShotPredictor, Support, load_config


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return FewShotPredictor(tiny_config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))


def test_predicting_without_support_names_the_missing_call():
    predictor = FewShotPredictor(tiny_config())
    with pytest.raises(RuntimeError, match="set_support"):
        predictor.predict(np.zeros((20, 30, 3), np.uint8))


@torch.no_grad()
def test_equals_the_model_and_uses_original_pixels(predictor, rng):
    support = random_support_set(rng)
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    predictor.set_support(support)
    result = predictor.predict(image)
    pixels = predictor.resize.get_transform(image).apply_image(image[:, :, ::-1].copy())
    query = {
        "image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "height": 32,
        "width": 48,
        "support": support,
    }
    expected = predictor.model([query])[0]["instances"]
    assert result.image_size == (32, 48) and len(result)
    assert torch.equal(result.scores, expected.scores)
    assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert result.pred_boxes.tensor[:, 2].max() <= 48


def test_encoded_support_can_be_set_again(predictor, rng):
    features = predictor.set_support(random_support_set(rng))
    image = np.full((32, 48, 3), 90, np.uint8)
    first = predictor.predict(image)
    predictor.set_support(features)
    assert torch.equal(first.scores, predictor.predict(image).scores)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(predictor, rng, image):
    predictor.set_support(random_support_set(rng))
    with pytest.raises(ValueError, match="image must be"):
        predictor.predict(image)


def test_support_from_file_turns_by_exif_and_converts(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    support = Support.from_file(tmp_path / "turned.png", box=[1, 1, 3, 5])
    assert support.image_size == (6, 4)
    assert (support.image[0, :, -1] == 255).all() and (support.image[0, :, :-1] == 0).all()
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    assert Support.from_file(tmp_path / "grey.png").image.shape == (3, 4, 6)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match=name):
            Support.from_file(tmp_path / name)


def test_predicts_with_a_tuned_model_within_the_context_alone(rng):
    overrides = [*TINY_REPMET_OVERRIDES, "FEWSHOT.FINETUNE.BASE_LR", 0.01]
    torch.manual_seed(0)
    predictor = FewShotPredictor(load_config(str(TINY_REPMET), overrides))
    support, image = random_support_set(rng), np.full((40, 40, 3), 99, np.uint8)
    predictor.set_support(support)
    before = predictor.predict(image)
    with predictor.fine_tuned(support) as features:
        assert features.class_ids == support.class_ids
        tuned = predictor.predict(image)
    assert len(before) and not torch.equal(tuned.scores, before.scores)
    with pytest.raises(RuntimeError, match="set_support"):
        predictor.predict(image)
    predictor.set_support(support)
    assert torch.equal(predictor.predict(image).scores, before.scores)


def test_iterables_give_what_single_images_give(predictor, rng, tmp_path):
    predictor.set_support(random_support_set(rng))
    sizes = [(32, 48), (32, 48), (48, 32), (32, 48), (40, 40)]
    images = [
        np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        for i, size in enumerate(sizes)
    ]
    singles = [predictor.predict(image) for image in images]
    path = tmp_path / "last.png"
    Image.fromarray(images[4][:, :, ::-1]).save(path)
    for batch_size in (1, 2, 8):
        predictor.batch_size = batch_size
        found = list(predictor.predict(iter([*images[:4], path])))
        assert [f.image_size for f in found] == sizes
        for one, other in zip(singles, found, strict=True):
            assert torch.allclose(one.scores, other.scores, atol=1e-5)
            assert torch.allclose(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=1e-3)
    predictor.batch_size = 1
    assert torch.equal(predictor.predict(str(path)).scores, singles[4].scores)
    assert list(predictor.predict([])) == []


def test_only_a_few_images_are_in_memory(predictor, rng):
    predictor.set_support(random_support_set(rng))
    made = 0

    def images():
        nonlocal made
        for _ in range(50):
            made += 1
            yield np.zeros((20, 30, 3), np.uint8)

    found = predictor.predict(images())
    assert made == 0
    next(found)
    assert made <= 4
    found.close()


def test_a_broken_image_among_many_is_named_and_can_be_passed_over(predictor, rng, tmp_path):
    predictor.set_support(random_support_set(rng))
    good = np.zeros((20, 30, 3), np.uint8)
    (tmp_path / "bad.jpg").write_bytes(b"no")
    sources = [good, tmp_path / "bad.jpg", good, np.zeros((3, 3))]
    with pytest.raises(ValueError, match="bad.jpg"):
        list(predictor.predict(sources))
    queries = list(predictor.search(sources))
    assert [q.error is None for q in queries] == [True, False, True, False]
    assert queries[2].instances.image_size == (20, 30) and queries[1].instances is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "fp8"}, "precision must be"), ({"precision": "amp"}, "needs a GPU")],
)
def test_precisions_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FewShotPredictor(tiny_config(), device="cpu", **options)


def test_config_may_be_a_file_and_weights_an_argument(tmp_path, rng):
    write_model(tmp_path)
    from_files = FewShotPredictor(tmp_path / "config.yaml", tmp_path / "model_final.pth")
    support, image = random_support_set(rng), np.full((32, 48, 3), 90, np.uint8)
    from_files.set_support(support)
    low = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5)
    cfg = tiny_config(*low, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    from_config = FewShotPredictor(cfg)
    from_config.set_support(support)
    assert len(from_files.predict(image))
    assert same_instances(from_files.predict(image), from_config.predict(image))


def test_trained_model_needs_no_file_of_its_backbone(tmp_path, rng):
    """On another machine only the config and the checkpoint are there."""
    options = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    cfg = load_config(str(TINY_SPIL), [*TINY_SPIL_OVERRIDES, *options])
    trained, support = FewShotPredictor(cfg), random_support_set(rng)
    content = {"model": trained.model.state_dict(), "system": "SPIL"}
    torch.save(content, tmp_path / "model_final.pth")
    torch.save(content["model"], tmp_path / "weights_alone.pth")
    cfg.MODEL.TORCHVISION.WEIGHTS = str(tmp_path / "elsewhere.pth")
    found = []
    for predictor in (trained, FewShotPredictor(cfg, tmp_path / "model_final.pth")):
        predictor.set_support(support)
        found.append(predictor.predict(np.full((32, 48, 3), 90, np.uint8)))
    assert len(found[0]) and same_instances(*found)
    with pytest.raises(ValueError, match=r"elsewhere\.pth"):
        FewShotPredictor(cfg, tmp_path / "weights_alone.pth")


@pytest.mark.parametrize("device", ["foo", "mps", "cpu:-3"])
def test_devices_that_are_not_there_are_refused_in_one_line(device):
    with pytest.raises(
        ValueError, match=rf"device must be one that torch has, got '{device}'"
    ) as e:
        FewShotPredictor(tiny_config(), device=device)
    assert "\n" not in str(e.value)


def test_random_weights_and_unused_negatives_are_told(rng, caplog):
    predictor = FewShotPredictor(tiny_config())
    assert "what SiameseMaskRCNN finds is random" in caplog.text
    support = random_support_set(rng)
    predictor.set_support(support)
    assert "negative" not in caplog.text
    support.examples[0].append(Support(support.examples[0][0].image, negative=True))
    predictor.set_support(support)
    assert "SiameseMaskRCNN has no use for negative examples: 1 left out" in caplog.text


def test_features_of_a_tuned_model_are_not_those_of_its_weights(rng, tmp_path):
    overrides = [*TINY_REPMET_OVERRIDES, "FEWSHOT.FINETUNE.BASE_LR", 0.01]
    torch.manual_seed(0)
    predictor = FewShotPredictor(load_config(str(TINY_REPMET), overrides))
    support, before = random_support_set(rng), predictor.sha256
    with predictor.fine_tuned(support):
        assert predictor.sha256 != before
    assert predictor.sha256 == before
