"""Training patches: windows and boxes against loops, pixels and masks under one transform, and the mapper."""

import dataclasses

import numpy as np
import pytest
import torch
from factories import CATEGORIES, registered_set, tiny_config, write_set
from PIL import Image

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_factory, build_mapper
from fewshot_d2.data.patches import PatchRule, coverage, pil_filter, window_transform

RULE = PatchRule(60, 0.9, 0.7, 100, 0.7, 0.3, 0.7, ("bilinear", "nearest"))


def naive_coverage(box, window):
    """Share of the box's pixels, counted."""
    pixels = [(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])]
    inside = [1 for x, y in pixels if window[0] <= x < window[2] and window[1] <= y < window[3]]
    return len(inside) / len(pixels) if pixels else 0.0


def random_boxes(rng, number=30, side=40):
    low = rng.integers(0, side, (number, 2))
    return np.concatenate([low, low + rng.integers(0, 20, (number, 2))], axis=1)


def test_coverage_counts_pixels(rng):
    generator = np.random.default_rng(0)
    boxes = random_boxes(generator)
    for window in ((0, 0, 60, 60), (10, 5, 30, 45), (-5, -5, 12, 100), (50, 50, 51, 51)):
        expected = [naive_coverage(box, window) for box in boxes.tolist()]
        np.testing.assert_allclose(coverage(boxes, window), expected)
    assert coverage(np.zeros((0, 4)), (0, 0, 1, 1)).shape == (0,)


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(80, 120, 1.0), (40, 300, 0.5), (5, 4, 2.0)]
)
def test_windows_are_inside_and_of_the_drawn_shape(height, width, scale):
    generator = np.random.default_rng(1)
    nothing = np.zeros((0, 4))
    for _ in range(200):
        x0, y0, x1, y1 = RULE.draw(generator, nothing, height=height, width=width, scale=scale)
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        largest, least = 60 / (0.7 * scale), 60 / (scale / 0.7)
        assert min(int(least), width) <= x1 - x0 <= largest
        w, h = x1 - x0, y1 - y0
        # Rounded down, and cut where the image ends.
        assert h <= w / 0.9 + 1 and (h == height or h + 1 >= w / (1 / 0.9) - 1)


def test_windows_hold_enough_of_a_box_or_lie_in_the_corner():
    generator = np.random.default_rng(2)
    boxes = np.array([[150.0, 150.0, 170.0, 190.0], [30.0, 20.0, 70.0, 60.0]])
    seen = set()
    for _ in range(100):
        window = RULE.draw(generator, boxes, height=200, width=200, scale=1.0)
        inside = coverage(boxes, window)
        assert inside.max() >= 0.7
        seen.add(int(inside.argmax()))
    assert seen == {0, 1}
    # No window of 86 pixels at most holds 0.7 of such a box.
    large = np.array([[0.0, 0.0, 200.0, 200.0]])
    assert RULE.draw(generator, large, height=200, width=200, scale=1.0) == (0, 0, 60, 60)
    assert RULE.draw(generator, large, height=50, width=200, scale=1.0) == (0, 0, 60, 50)


def test_cut_boxes_are_difficult_and_then_gone():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 100, 10], [0, 0, 200, 10], [70, 0, 90, 10.0]])
    kept, difficult = RULE.states(boxes, (0, 0, 60, 60))
    assert kept.tolist() == [True, True, True, False]
    assert difficult.tolist() == [False, True, True, True]
    kept, difficult = RULE.states(np.array([[0, 0, 10, 10.0]]), (3, 0, 60, 60))
    assert kept.all() and not difficult.any(), "0.7 is enough"


@pytest.mark.parametrize("window", [(10, 5, 40, 35), (-20, -10, 40, 50), (30, 20, 90, 80)])
def test_window_transform_pads_with_black_and_shifts(window):
    generator = np.random.default_rng(3)
    image = generator.integers(1, 256, (40, 60, 3), dtype=np.uint8)
    x0, y0, x1, y1 = window
    padded = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    for y in range(y0, y1):
        for x in range(x0, x1):
            if 0 <= y < 40 and 0 <= x < 60:
                padded[y - y0, x - x0] = image[y, x]
    transform = window_transform(window, height=40, width=60, size=90, interp=pil_filter("lanczos"))
    expected = np.asarray(Image.fromarray(padded).resize((90, 90), Image.Resampling.LANCZOS))
    assert np.array_equal(transform.apply_image(image), expected)
    box = transform.apply_box(np.array([[0.0, 0.0, 60.0, 40.0]]))[0]
    scale = 90 / (x1 - x0), 90 / (y1 - y0)
    corners = [-x0 * scale[0], -y0 * scale[1], (60 - x0) * scale[0], (40 - y0) * scale[1]]
    np.testing.assert_allclose(box, corners, rtol=1e-6)
    assert transform.apply_segmentation(image[:, :, 0]).shape == (90, 90)


NAME = "patches_set"


@pytest.fixture
def episode_of(tmp_path):
    """Episodes of all classes of an image."""
    write_set(tmp_path)
    with registered_set(NAME, tmp_path):
        factory = build_factory(NAME, NAME)

        def build(image_index, number=0):
            classes = factory.query_index.classes_in(image_index)
            return factory.build(image_index, classes, [], key=(0, number), episode_id=number)

        yield build


def mapper(*overrides, is_train=True):
    keys = ["FEWSHOT.MAPPER", "PatchMapper", "FEWSHOT.PATCHES.SIZE", 48, *overrides]
    return build_mapper(tiny_config(*keys), is_train=is_train)


@pytest.mark.parametrize("masks", [True, False])
def test_mapper_gives_patches_whose_boxes_are_where_their_pixels_are(episode_of, masks):
    own = mapper("MODEL.MASK_ON", masks, "INPUT.RANDOM_FLIP", "horizontal")
    sizes, difficult, left_out, outside, flipped = set(), 0, 0, 0, 0
    for number in range(60):
        episode = episode_of(2 + number % 8, number)
        query = own(episode)
        again = own(episode)
        assert torch.equal(query["image"], again["image"]), "only the key decides"
        assert tuple(query["image"].shape) == (3, 48, 48) and (query["height"], query["width"]) == (
            40,
            60,
        )
        instances = query["instances"]
        assert instances.image_size == (48, 48) and instances.has("gt_masks") == masks
        boxes = instances.gt_boxes.tensor
        inside = coverage(boxes.double().numpy(), (0, 0, 48, 48))
        assert (inside >= 0.3 - 1e-6).all()
        for is_difficult, share in zip(instances.gt_difficult.tolist(), inside, strict=True):
            # Boxes are of whole pixels, so exactly 0.7 of one may be inside.
            assert is_difficult == (share < 0.7) or abs(share - 0.7) < 1e-5
        if masks:
            for box, mask in zip(boxes, instances.gt_masks.tensor, strict=True):
                rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
                tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                # Masks end with the patch, boxes do not; nearest pixels are up to a pixel off.
                np.testing.assert_allclose(tight, box.clamp(0, 48), atol=1.6)
        sizes.add(tuple(boxes[0].tolist()) if len(boxes) else ())
        difficult += int(instances.gt_difficult.sum())
        left_out += len(own.searched_annotations(episode)) - len(instances)
        outside += int((boxes.min() < 0) or (boxes.max() > 48)) if len(boxes) else 0
        flipped += own.flips(episode)
    assert difficult > 5 and left_out > 5 and outside > 5 and 10 < flipped < 50
    assert len(sizes) > 40


def test_mined_window_is_taken_as_it_is(episode_of):
    own = mapper("INPUT.RANDOM_FLIP", "horizontal")
    episode = dataclasses.replace(episode_of(3), window=(-24, -4, 24, 44))
    query = own(episode)
    # The window is as large as a patch: pixels are the image's own, with black beside it.
    pixels = np.asarray(Image.open(episode.query["file_name"])).transpose(2, 0, 1)
    assert np.array_equal(query["image"][:, 4:44, 24:].numpy(), pixels[:, :, :24])
    assert query["image"][:, :4].sum() == 0 == query["image"][:, :, :24].sum()
    assert not own.flips(episode)
    whole = own.scaled(episode, 1.0)["instances"].gt_boxes.tensor * 60 / 64
    for box in query["instances"].gt_boxes.tensor:
        distances = (whole + torch.tensor([24.0, 4.0, 24.0, 4.0]) - box).abs().amax(dim=1)
        assert distances.min() < 0.6


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.6])
def test_scaled_query_is_the_whole_image(episode_of, factor):
    own = mapper()
    episode = episode_of(4)
    query = own.scaled(episode, factor)
    # Training scale: the long side of 60 becomes 64.
    assert query["image"].shape[1] == pytest.approx(40 / 60 * 64 * factor, abs=1.5)
    assert query["image"].shape[2] == pytest.approx(64 * factor, abs=1.5)
    assert len(query["instances"]) == len(own.searched_annotations(episode))
    assert query["instances"].image_size == tuple(query["image"].shape[1:])
    assert not query["instances"].gt_difficult.any()


def test_difficult_annotations_stay_difficult_in_every_mapper(episode_of):
    episode = episode_of(5)
    rows = [{**a, "difficult": int(i == 1)} for i, a in enumerate(episode.query["annotations"])]
    episode = dataclasses.replace(episode, query={**episode.query, "annotations": rows})
    expected = [False, True, False, False]
    assert mapper().scaled(episode, 1.0)["instances"].gt_difficult.tolist() == expected
    plain = build_mapper(tiny_config(), is_train=True)
    assert plain(episode)["instances"].gt_difficult.tolist() == expected
    assert not plain(episode_of(5))["instances"].has("gt_difficult")


def test_testing_is_that_of_the_default_mapper(episode_of):
    own, plain = mapper(is_train=False), build_mapper(tiny_config(), is_train=False)
    episode = episode_of(3)
    assert torch.equal(own(episode)["image"], plain(episode)["image"])


def test_image_without_boxes_and_class_that_is_gone(episode_of):
    own = mapper()
    query = own(dataclasses.replace(episode_of(3), window=(200, 200, 248, 248)))
    assert len(query["instances"]) == 0 and query["image"].sum() == 0
    assert len(own(episode_of(0))["instances"]) == 0
    assert len(CATEGORIES) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("FEWSHOT.PATCHES.ASPECT", 1.2),
        ("FEWSHOT.PATCHES.SCALE", 0.0),
        ("FEWSHOT.PATCHES.GONE", 0.8),
        ("FEWSHOT.PATCHES.FILTERS", ("cubic",)),
        ("FEWSHOT.PATCHES.FILTERS", ()),
        ("FEWSHOT.PATCHES.SIZE", 0),
        ("FEWSHOT.MINING.SCALES", (1.6, 0.5)),
        ("FEWSHOT.MINING.NMS_IOU", 2.0),
        ("FEWSHOT.MINING.PERIOD", 5),
    ],
)
def test_bad_keys_are_refused(key, value):
    with pytest.raises(ValueError, match="FEWSHOT.(PATCHES|MINING)"):
        load_config("", [key, value])


@pytest.mark.parametrize("augment", [("PHOTOMETRIC", True), ("EXPAND", 2.0), ("CROPS", (0.5,))])
def test_patches_and_augmentation_are_refused_together(augment):
    key, value = augment
    cfg = load_config("", ["FEWSHOT.MAPPER", "PatchMapper", f"FEWSHOT.AUGMENT.{key}", value])
    with pytest.raises(ValueError, match="AUGMENT must be left as it is"):
        build_mapper(cfg, is_train=True)
