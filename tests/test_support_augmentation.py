"""Turned and mirrored supports: pixel by pixel, back to where they were, and in evaluation and prediction."""

import dataclasses

import numpy as np
import pytest
import torch
from factories import random_support_set, registered_set, tiny_config, tiny_model, write_set

from fewshot_d2 import FewShotPredictor, Support, load_config
from fewshot_d2.data.loaders import build_factory, build_mapper
from fewshot_d2.support_augmentation import SupportAugmentation, mirrored, rotated


def marked(height=5, width=7, box=(1, 0, 4, 2)):
    """An example whose box and mask are the white pixels of its image."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = 255
    image[0, y0, x0] = 254
    return Support(image, torch.tensor(box, dtype=torch.float32), image[1] > 0, negative=True)


def equal(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.box, other.box)
        and torch.equal(one.mask, other.mask)
        and one.negative == other.negative
    )


@pytest.mark.parametrize("degrees", [0, 90, 180, 270, -90, 450])
def test_quarter_turns_move_every_pixel(degrees):
    support = marked()
    turned = rotated(support, degrees)
    expected = support.image.numpy()
    for _ in range(degrees // 90 % 4):
        # Counter-clockwise: the last column becomes the first row.
        expected = np.stack([expected[:, :, x] for x in reversed(range(expected.shape[2]))], axis=1)
    assert np.array_equal(turned.image.numpy(), expected)
    # Box and mask are still those of the white pixels.
    assert torch.equal(turned.mask, turned.image[1] > 0)
    rows, columns = turned.mask.any(1).nonzero()[:, 0], turned.mask.any(0).nonzero()[:, 0]
    assert turned.box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert turned.negative


def test_four_turns_and_two_mirrors_are_nothing():
    support, turned = marked(), marked()
    seen = []
    for _ in range(4):
        turned = rotated(turned, 90)
        seen.append(turned)
    assert equal(turned, support) and not equal(seen[1], support)
    assert equal(seen[1], rotated(support, 180)) and equal(seen[2], rotated(support, 270))
    assert equal(mirrored(mirrored(support)), support)
    # A mirror and a half turn are the mirror upside down.
    flipped = mirrored(rotated(support, 180))
    assert torch.equal(flipped.image, support.image.flip(1))


def test_example_without_box_and_mask():
    support = Support(marked().image)
    turned = rotated(mirrored(support), 90)
    assert turned.box is None and turned.mask is None and turned.image_size == (7, 5)


@pytest.mark.parametrize(
    ("rotations", "mirror", "number"),
    [((), False, 1), ((90, 180, 270), False, 4), ((), True, 2), ((90, 180, 270), True, 8)],
)
def test_shots_of_a_class(rng, rotations, mirror, number):
    support_set = random_support_set(rng, ways=3, shots=2)
    more = SupportAugmentation(rotations, mirror)(support_set)
    assert more.class_ids == support_set.class_ids and more.class_names == support_set.class_names
    for shots, own in zip(more.examples, support_set.examples, strict=True):
        assert len(shots) == 2 * number and shots[:2] == own
        # All of them are different pictures of the same pixels.
        pictures = {(s.image_size, s.image.numpy().tobytes()) for s in shots}
        assert len(pictures) == 2 * number
        sums = sorted(int(s.image.sum()) for s in shots)
        assert sums == sorted(int(s.image.sum()) for s in own * number)


@pytest.mark.parametrize("rotations", [(45,), (90, 90), (360,), (0,)])
def test_bad_angles_are_refused(rotations):
    with pytest.raises(ValueError, match="FEWSHOT.SUPPORT.ROTATIONS must be different ones"):
        load_config("", ["FEWSHOT.SUPPORT.ROTATIONS", rotations])
    with pytest.raises(ValueError, match="multiple of 90, got 45"):
        rotated(marked(), 45)


KEYS = ["FEWSHOT.SUPPORT.ROTATIONS", (90, 180, 270), "FEWSHOT.SUPPORT.MIRROR", True]


@pytest.mark.parametrize("form", ["crop", "image"])
def test_mapper_adds_shots_in_testing_only(tmp_path, form):
    write_set(tmp_path)
    with registered_set("augmented", tmp_path):
        factory = build_factory("augmented", "augmented")
        place = (3, factory.support_index.instances(3, factory.support_index.classes_in(3)[0])[0])
        class_id = factory.support_index.classes_in(3)[0]
        episode = factory.build(4, (class_id,), [[place]], key=(0, 0), episode_id=0)
        cfg = tiny_config(*KEYS, "FEWSHOT.SUPPORT.FORM", form)
        (shots,) = build_mapper(cfg, is_train=False)(episode)["support"].examples
        assert len(shots) == 8 and (shots[0].box is None) == (form == "crop")
        assert shots[2].image_size == shots[0].image_size[::-1]
        (shots,) = build_mapper(cfg, is_train=True)(episode)["support"].examples
        assert len(shots) == 1


def test_predictor_encodes_the_augmented_set(rng, tmp_path):
    cfg = tiny_config(*KEYS)
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "weights.pth")
    predictor = FewShotPredictor(cfg, tmp_path / "weights.pth")
    support_set = random_support_set(rng, ways=2)
    found = predictor.set_support(support_set)
    by_hand = SupportAugmentation.from_cfg(cfg)(support_set)
    expected = predictor.model.encode_support([by_hand])
    plain = predictor.model.encode_support([support_set])
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])
        assert not torch.allclose(tensor, plain.tensors[name])
    # Features of other settings are not taken for these.
    other = FewShotPredictor(tiny_config(), tmp_path / "weights.pth")
    assert other.sha256 != predictor.sha256


def test_support_set_is_not_changed(rng):
    support_set = random_support_set(rng)
    before = dataclasses.replace(support_set)
    SupportAugmentation((90,))(support_set)
    assert [len(shots) for shots in support_set.examples] == [1, 1] == [*map(len, before.examples)]
