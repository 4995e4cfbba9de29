"""SSD's augmentation: boxes follow their pixels, the crops keep their promise, and nothing depends on global state."""

import colorsys
import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from factories import ROOT, tiny_config
from PIL import Image
from torchvision.ops import box_iou

from fewshot_d2 import load_config
from fewshot_d2.data.augmentation import (
    CROP_OPTIONS,
    AugmentationRule,
    RandomColors,
    RandomCropByIoU,
    RandomExpand,
    centres_inside,
    is_valid_crop,
)
from fewshot_d2.data.dataset_mapper import EpisodicDatasetMapper
from fewshot_d2.data.episodes import Episode
from fewshot_d2.data.superpixel_mapper import SuperpixelMapper

FILL = (11.0, 22.4, 33.6)


def scene(seed):
    """A dark image with up to three white boxes of their own brightness, and the boxes."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 120, 2)
    image, boxes = np.full((height, width, 3), 20, np.uint8), []
    for level in range(int(rng.integers(1, 4))):
        w, h = rng.integers(8, width // 2), rng.integers(8, height // 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        image[y : y + h, x : x + w] = 200 + level
        boxes.append([x, y, x + w, y + h])
    return image, np.array(boxes, dtype=np.float64)


def extent(image, level):
    """XYXY of the pixels of a brightness, or None."""
    rows, columns = np.nonzero((image == level).all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


@pytest.mark.parametrize("seed", range(30))
def test_boxes_follow_their_pixels(seed):
    image, boxes = scene(seed)
    rule = AugmentationRule(expand=4.0, crops=CROP_OPTIONS, fill=FILL)
    source = T.AugInput(image, boxes=boxes)
    source.apply_augmentations(rule.augmentations(np.random.default_rng(seed)))
    height, width = source.image.shape[:2]
    # The last box is not covered by others.
    found = extent(source.image, 200 + len(boxes) - 1)
    expected = source.boxes[-1].clip(0, [width, height, width, height])
    if found is None:
        assert (expected[2:] <= expected[:2]).any()
    else:
        assert found == expected.tolist()


@pytest.mark.parametrize("option", CROP_OPTIONS)
def test_crops_keep_the_least_iou_and_a_centre(option):
    rng, cropped = np.random.default_rng(1), 0
    for seed in range(60):
        image, boxes = scene(seed)
        height, width = image.shape[:2]
        # Large enough for an IoU of 0.9 to be found by chance.
        boxes = np.vstack([boxes, [0, 0, 0.97 * width, 0.97 * height]])
        transform = RandomCropByIoU(rng, options=[option]).get_transform(image, boxes)
        if isinstance(transform, T.NoOpTransform):
            continue
        cropped += 1
        x, y, w, h = transform.x0, transform.y0, transform.w, transform.h
        assert x >= 0 and y >= 0 and x + w <= image.shape[1] and y + h <= image.shape[0]
        assert transform.apply_image(image).shape == (h, w, 3)
        ious = box_iou(torch.tensor([[x, y, x + w, y + h]]).double(), torch.from_numpy(boxes))
        if option != "random":
            assert ious.max() >= option - 1e-9
        assert centres_inside(boxes, transform, (h, w)).any()
        # At least 0.3 of a side in the geometric mean, up to whole pixels.
        assert ((w + 1) * (h + 1) / image.shape[0] / image.shape[1]) ** 0.5 > 0.3
    assert (cropped == 0) == (option == "none")


def test_a_crop_that_no_attempt_finds_is_given_up():
    image, boxes = np.zeros((100, 100, 3), np.uint8), np.array([[50.0, 50, 51, 51]])
    rng = np.random.default_rng(0)
    assert isinstance(
        RandomCropByIoU(rng, options=[0.9]).get_transform(image, boxes), T.NoOpTransform
    )
    # Another option is drawn instead.
    crops = [
        RandomCropByIoU(rng, options=[0.9, "random"]).get_transform(image, boxes) for _ in range(20)
    ]
    assert all(isinstance(crop, T.CropTransform) for crop in crops)
    empty = np.zeros((0, 4))
    assert isinstance(
        RandomCropByIoU(rng, options=["random"]).get_transform(image, empty), T.NoOpTransform
    )


@pytest.mark.parametrize(
    ("scale", "aspect", "size"),
    [
        # 0.3 of a side, from half as wide as high to twice.
        (0, 0, (0.3 * 0.5**0.5, 0.3 / 0.5**0.5)),
        (0, 1, (0.3 * 2**0.5, 0.3 / 2**0.5)),
        # The same halfway: 0.65 with 1.25, the middle of 0.5 and 2.
        (0.5, 0.5, (0.65 * 1.25**0.5, 0.65 / 1.25**0.5)),
        # At 0.8 the aspect is at least 0.64 and at most its inverse: the crop fits.
        (5 / 7, 0, (0.64, 1.0)),
        (5 / 7, 1, (1.0, 0.64)),
        (1, 0.5, (1.0, 1.0)),
    ],
)
def test_crops_at_both_ends_of_the_spec_s_ranges(scale, aspect, size):
    """Relative to an image of 2000 x 1000 pixels (width x height)."""
    image, box = np.zeros((1000, 2000, 3), np.uint8), np.array([[0.0, 0, 10, 10]])
    script = Scripted(None, places=[scale, aspect])
    crop = RandomCropByIoU(script, options=["random"]).get_transform(image, box)
    assert (crop.w, crop.h) == (
        pytest.approx(2000 * size[0], abs=1),
        pytest.approx(1000 * size[1], abs=1),
    )


def test_every_option_has_fifty_attempts():
    """Two numbers are drawn for each attempt; the last one is still taken."""
    image, box = np.zeros((100, 100, 3), np.uint8), np.array([[0.0, 0, 100, 100]])
    script = Scripted(0)
    crop = RandomCropByIoU(script, options=[0.9, 0.9]).get_transform(image, box)
    assert isinstance(crop, T.NoOpTransform) and script.draws == 2 * 2 * 50
    for misses, kind in ((49, T.CropTransform), (50, T.NoOpTransform)):
        script = Scripted(1, places=[0] * 2 * misses)
        crop = RandomCropByIoU(script, options=[0.9]).get_transform(image, box)
        assert isinstance(crop, kind)


@pytest.mark.parametrize(
    ("least", "expected"), [(0.0, True), (0.25, True), (0.26, False), (1.0, False)]
)
def test_one_box_above_the_least_iou_is_enough(least, expected):
    """The second box has an IoU of 0.25 with the crop, the first one none; the known bug accepts everything."""
    crop, boxes = np.array([0, 0, 20, 20]), np.array([[30.0, 30, 40, 40], [0, 0, 10, 10]])
    assert is_valid_crop(crop, boxes, least) is expected


def test_a_crop_without_any_centre_is_refused():
    assert not is_valid_crop(np.array([0, 0, 20, 20]), np.array([[15.0, 15, 35, 35]]), 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_expanding_keeps_the_picture_and_fills_with_the_mean(seed):
    image, boxes = scene(seed)
    transform = RandomExpand(np.random.default_rng(seed), largest=4.0, fill=FILL).get_transform(
        image
    )
    if isinstance(transform, T.NoOpTransform):
        return
    canvas = transform.apply_image(image)
    height, width = image.shape[:2]
    ratio = canvas.shape[0] / height, canvas.shape[1] / width
    assert min(ratio) >= 1 and max(ratio) <= 4 and abs(ratio[0] - ratio[1]) < 0.05
    inside = np.zeros(canvas.shape[:2], bool)
    inside[transform.y0 : transform.y0 + height, transform.x0 : transform.x0 + width] = True
    assert (canvas[inside].reshape(image.shape) == image).all()
    assert (canvas[~inside] == [11, 22, 34]).all()
    assert (transform.inverse().apply_image(canvas) == image).all()
    assert (transform.apply_box(boxes) == boxes + [transform.x0, transform.y0] * 2).all()


@pytest.mark.parametrize(("place", "ratio"), [(0, 1), (0.5, 2.5), (1, 4)])
def test_canvases_are_up_to_four_times_as_large_and_of_the_mean(place, ratio):
    """As VOC is trained on: the mean of its config, wherever the picture is not."""
    cfg = load_config(str(ROOT / "configs/silco/vgg16_voc07_ssm_frm.yaml"))
    rule = AugmentationRule.from_cfg(cfg)
    step = rule.augmentations(Scripted(place, [0.499]))[1]
    canvas = step.get_transform(np.full((20, 30, 3), 255, np.uint8)).apply_image(
        np.full((20, 30, 3), 255, np.uint8)
    )
    assert canvas.shape == (20 * ratio, 30 * ratio, 3)
    outside = np.ones(canvas.shape[:2], bool)
    outside[:20, :30] = False
    assert (canvas[outside] == [123, 117, 104]).all() and (canvas[~outside] == 255).all()


def test_the_spec_s_augmentation_is_that_of_voc():
    cfg = load_config(str(ROOT / "configs/silco/vgg16_voc07_ssm_frm.yaml"))
    rule = AugmentationRule.from_cfg(cfg)
    assert rule.photometric and rule.expand == 4 and rule.image_format == "RGB"
    assert rule.crops == ("none", 0.1, 0.3, 0.5, 0.7, 0.9, "random") == CROP_OPTIONS
    steps = [type(step) for step in rule.augmentations(np.random.default_rng(0))]
    assert steps == [RandomColors, RandomExpand, RandomCropByIoU]


def test_half_of_the_images_are_expanded():
    rng, image = np.random.default_rng(0), np.zeros((20, 20, 3), np.uint8)
    step = RandomExpand(rng, largest=4.0, fill=FILL)
    kept = sum(isinstance(step.get_transform(image), T.NoOpTransform) for _ in range(400))
    assert 150 < kept < 250


def test_colours_change_and_coordinates_do_not():
    image = np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    changed = 0
    for seed in range(40):
        transform = RandomColors(np.random.default_rng(seed), image_format="RGB").get_transform(
            image
        )
        result = transform.apply_image(image)
        assert result.dtype == np.uint8 and result.shape == image.shape
        assert (transform.apply_image(image) == result).all()
        changed += bool((result != image).any())
        points = np.array([[3.0, 4.0]])
        assert (transform.apply_coords(points.copy()) == points).all()
    # All five are left out once in 32 times.
    assert 30 <= changed < 40


class Scripted:
    """A generator that draws given chances and, of every range, a place between its lower end (0) and upper one (1)."""

    def __init__(self, place, chances=(), places=()):
        self.place, self.chances, self.places = place, iter(chances), iter(places)
        self.draws = 0

    def uniform(self, low, high):
        self.draws += 1
        return low + (high - low) * next(self.places, self.place)

    def random(self):
        return next(self.chances)

    def integers(self, number):
        return 0

    def permutation(self, n):
        return np.arange(n)[::-1]


def colours_of(pixel, rng, image_format="RGB"):
    """A pixel after ``RandomColors``."""
    image = np.full((1, 1, 3), pixel, np.uint8)
    return (
        RandomColors(rng, image_format=image_format).get_transform(image).apply_image(image)[0, 0]
    )


def naive_colours(pixel, brightness, contrast, saturation, hue, *, contrast_first):
    """With Python's own colour conversion."""
    values = [value + brightness for value in pixel]
    if contrast_first:
        values = [value * contrast for value in values]
    values = [min(max(value, 0), 255) / 255 for value in values]
    h, s, v = colorsys.rgb_to_hsv(*values)
    values = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)
    values = [255 * value * (1 if contrast_first else contrast) for value in values]
    return [min(max(value, 0), 255) for value in values]


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize(
    ("place", "numbers"), [(0, (-32, 0.5, 0.5, -18)), (1, (32, 1.5, 1.5, 18)), (0.5, (0, 1, 1, 0))]
)
def test_colours_at_both_ends_of_the_spec_s_ranges(place, numbers, contrast_first):
    """Contrast before or after what is limited to 0..255 is not the same."""
    pixel, chances = (40, 90, 190), [0.1] * 4 + [0.1 if contrast_first else 0.9, 0.9]
    result = colours_of(pixel, Scripted(place, chances))
    expected = naive_colours(pixel, *numbers, contrast_first=contrast_first)
    assert result.tolist() == pytest.approx(expected, abs=1)
    other = naive_colours(pixel, *numbers, contrast_first=not contrast_first)
    assert place != 1 or max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 5


def test_each_change_of_colours_is_made_half_of_the_time():
    """All combinations of four changes, contrast before saturation and hue, and the order of channels."""
    pixel, changed = (40, 90, 190), (32, 1.5, 1.5, 18)
    for chances in itertools.product([True, False], repeat=6):
        # Just within and just beyond the half.
        script = Scripted(1, [0.499 if is_made else 0.501 for is_made in chances])
        *changes, contrast_first, is_shuffled = chances
        numbers = [
            new if is_made else old
            for is_made, old, new in zip(changes, (0, 1, 1, 0), changed, strict=True)
        ]
        expected = naive_colours(pixel, *numbers, contrast_first=contrast_first)
        expected = expected[::-1] if is_shuffled else expected
        assert colours_of(pixel, script).tolist() == pytest.approx(expected, abs=1), chances


@pytest.mark.parametrize(
    ("image_format", "code"), [("RGB", cv2.COLOR_RGB2HSV), ("BGR", cv2.COLOR_BGR2HSV)]
)
def test_hue_and_saturation_are_those_of_the_format(image_format, code):
    """Only saturation and hue are drawn: x 1.5 and + 18 degrees in OpenCV's own conversion."""
    image = np.full((2, 2, 3), (60, 90, 110), np.uint8)
    # Brightness, contrast, saturation, hue, contrast first, shuffle.
    chance = iter([0.9, 0.9, 0.1, 0.1, 0.9, 0.9])
    result = (
        RandomColors(Scripted(1, chance), image_format=image_format)
        .get_transform(image)
        .apply_image(image)
    )
    before, after = (cv2.cvtColor(i.astype(np.float32) / 255, code)[0, 0] for i in (image, result))
    assert after[0] == pytest.approx((before[0] + 18) % 360, abs=1.5)
    assert after[1] == pytest.approx(min(before[1] * 1.5, 1), abs=0.02)
    assert after[2] == pytest.approx(before[2], abs=0.01)


def test_brightness_contrast_and_order():
    chances = [0.1, 0.1, 0.9, 0.9, 0.1, 0.1]
    assert colours_of((10, 100, 200), Scripted(1, chances)).tolist() == [255, 198, 63]
    assert colours_of((10, 100, 200), Scripted(0, chances)).tolist() == [84, 34, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_images_of_a_pixel_s_width(size):
    rule = AugmentationRule(True, 4.0, CROP_OPTIONS, FILL)
    for seed in range(30):
        boxes = np.array([[0.0, 0, size[1], size[0]]])
        source = T.AugInput(np.full((*size, 3), 99, np.uint8), boxes=boxes)
        transform = source.apply_augmentations(rule.augmentations(np.random.default_rng(seed)))
        assert min(source.image.shape) >= 1
        assert centres_inside(boxes, transform, source.image.shape[:2]).all()


def test_superpixels_are_of_whole_images():
    cfg = tiny_config("FEWSHOT.AUGMENT.CROPS", ("random",))
    with pytest.raises(ValueError, match="no crops and EXPAND 1 with the SuperpixelMapper"):
        SuperpixelMapper(cfg, True)


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match="EXPAND must be at least 1"):
        AugmentationRule(expand=0.5)
    for option in ("some", 1.5, None):
        with pytest.raises(ValueError, match="CROPS must be"):
            AugmentationRule(crops=(option,))
    with pytest.raises(ValueError, match="CROPS must be"):
        tiny_config("FEWSHOT.AUGMENT.CROPS", ("most",))


def episode_of(folder, seed, key):
    image, boxes = scene(seed)
    path = folder / f"{seed}.png"
    Image.fromarray(image).save(path)
    height, width = image.shape[:2]
    annotations = [
        {"category_id": 2, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
        for box in boxes
    ]
    query = {"file_name": str(path), "image_id": 1, "height": height, "width": width}
    query["annotations"] = annotations
    return Episode(query, (9,), ("a",), (2,), (((query, annotations[0]),),), (0, key), 0)


@pytest.mark.parametrize("with_masks", [False, True])
def test_mapped_queries_have_their_boxes_on_their_pixels(tmp_path, with_masks):
    """Through the mapper at 64 pixels; boxes whose centre was cropped away are gone, and one is always left."""
    options = ["FEWSHOT.AUGMENT.EXPAND", 2.0, "FEWSHOT.AUGMENT.CROPS", CROP_OPTIONS]
    options += ["FEWSHOT.RESIZE_RULE", "stretch", "MODEL.MASK_ON", with_masks]
    options += ["INPUT.RANDOM_FLIP", "horizontal", "FEWSHOT.SUPPORT.FORM", "whole"]
    mapper, seen = EpisodicDatasetMapper(tiny_config(*options), True), 0
    for seed in range(25):
        query = mapper(episode_of(tmp_path, seed, seed))
        assert query["image"].shape == (3, 64, 64)
        instances = query["instances"]
        assert len(instances) >= 1
        box = instances.gt_boxes.tensor[-1]
        x0, y0, x1, y1 = box.round().int().clamp(0, 64).tolist()
        # The smallest crops, of 8 pixels, are enlarged to 64: an edge is then blurred over 4 on both of its sides.
        inner = query["image"][:, y0 + 4 : y1 - 4, x0 + 4 : x1 - 4]
        assert (inner >= 200).all()
        seen += bool(inner.numel())
        if with_masks:
            area = instances.gt_masks.tensor[-1].sum()
            assert area == pytest.approx(float((box[2] - box[0]) * (box[3] - box[1])), abs=80)
        # Supports are as they were.
        assert query["support"].examples[0][0].image.shape == (3, 64, 64)
    assert seen >= 12, "boxes too small to be looked into would show nothing"


def test_whole_supports_are_not_mirrored_with_their_query(tmp_path):
    """Here they are one picture, which is flipped as a query in training alone."""
    options = ["FEWSHOT.RESIZE_RULE", "stretch", "INPUT.RANDOM_FLIP", "horizontal"]
    cfg = tiny_config(*options, "FEWSHOT.SUPPORT.FORM", "whole")
    train, test = EpisodicDatasetMapper(cfg, True), EpisodicDatasetMapper(cfg, False)
    # The mapper for queries gives BGR, supports are RGB: the same for a picture without colours.
    plain, flips = test(episode_of(tmp_path, 3, 0))["image"], Counter()
    assert not torch.equal(plain, plain.flip(2))
    for key in range(20):
        query = train(episode_of(tmp_path, 3, key))
        ((support,),) = query["support"].examples
        assert torch.equal(support.image, plain)
        is_flipped = torch.equal(query["image"], plain.flip(2))
        assert is_flipped or torch.equal(query["image"], plain)
        flips[is_flipped] += 1
    assert min(flips[True], flips[False]) >= 4


def test_the_key_alone_decides_and_tests_are_not_augmented(tmp_path):
    options = ["FEWSHOT.AUGMENT.EXPAND", 4.0, "FEWSHOT.AUGMENT.CROPS", CROP_OPTIONS]
    options += ["FEWSHOT.AUGMENT.PHOTOMETRIC", True, "FEWSHOT.RESIZE_RULE", "stretch"]
    cfg = tiny_config(*options, "INPUT.RANDOM_FLIP", "none")
    train, test = EpisodicDatasetMapper(cfg, True), EpisodicDatasetMapper(cfg, False)
    np.random.seed(0)
    first = train(episode_of(tmp_path, 3, 5))["image"]
    np.random.seed(1)
    assert (train(episode_of(tmp_path, 3, 5))["image"] == first).all()
    images = {train(episode_of(tmp_path, 3, key))["image"].numpy().tobytes() for key in range(6)}
    assert len(images) > 3
    plain = EpisodicDatasetMapper(tiny_config("FEWSHOT.RESIZE_RULE", "stretch"), False)
    assert (
        test(episode_of(tmp_path, 3, 5))["image"] == plain(episode_of(tmp_path, 3, 5))["image"]
    ).all()
