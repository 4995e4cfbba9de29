"""Resize rules and the support crop."""

import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge

from fewshot_d2 import Support
from fewshot_d2.transforms import SupportCrop, resized_shape


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        # Worked cases of spec section 2.3, query rule 800 / 1024.
        (480, 640, (768, 1024)),
        (427, 640, (683, 1024)),
        (640, 640, (800, 800)),
        (1000, 2000, (512, 1024)),
        (900, 1000, (900, 1000)),
    ],
)
def test_code_rule(height, width, expected):
    shape = resized_shape(height, width, max_size=1024, min_size=800, rule="code")
    assert shape == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(40, 40, (150, 150)), (160, 180, (160, 180))]
)
def test_code_rule_for_supports(height, width, expected):
    assert resized_shape(height, width, max_size=192, min_size=150, rule="code") == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(480, 640, (768, 1024)), (640, 640, (1024, 1024))]
)
def test_paper_rule_scales_the_long_side(height, width, expected):
    assert resized_shape(height, width, max_size=1024, min_size=800, rule="paper") == expected


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (1000, 2000), (900, 1000), (37, 1000), (2000, 1200)]
)
def test_shortest_edge_is_detectron2s(height, width):
    expected = ResizeShortestEdge.get_output_shape(height, width, 800, 1280)
    assert (
        resized_shape(height, width, max_size=1280, min_size=800, rule="shortest_edge") == expected
    )


def test_thin_images_keep_a_pixel_and_unknown_rules_fail():
    assert resized_shape(1, 5000, max_size=64, min_size=1, rule="stretch") == (64, 64)
    assert resized_shape(1, 5000, max_size=64, min_size=1, rule="paper") == (1, 64)
    with pytest.raises(ValueError, match="'papr'"):
        resized_shape(1, 1, max_size=1, min_size=1, rule="papr")


@pytest.mark.parametrize("context", [None, 0, 5])
@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("box", [None, [3.0, 4.0, 13.0, 34.0], [3.2, 4.7, 3.4, 34.0]])
def test_crop_twice_is_crop_once(rng, rule, box, context):
    image = torch.randint(0, 256, (3, 40, 60), generator=rng, dtype=torch.uint8)
    support = Support(image, None if box is None else torch.tensor(box), image[0] > 99)
    crop = SupportCrop(size=48, min_size=30, rule=rule, context=context)
    once = crop(support)
    twice = crop(once)
    assert once.box is None and max(once.image_size) <= 48
    assert torch.equal(once.image, twice.image) and torch.equal(once.mask, twice.mask)


def test_crop_takes_exactly_the_box(rng):
    image = torch.randint(0, 256, (3, 40, 60), generator=rng, dtype=torch.uint8)
    crop = SupportCrop(size=30, min_size=30, rule="code")
    result = crop(Support(image, torch.tensor([10.0, 5.0, 40.0, 35.0])))
    assert torch.equal(result.image, image[:, 5:35, 10:40])


@pytest.mark.parametrize(
    "box", [[10.0, 5.0, 40.0, 25.0], [0.0, 0.0, 6.0, 12.0], [50.0, 30.0, 60.0, 40.0]]
)
def test_context_is_a_square_window_black_outside_the_image(rng, box):
    """Pixel by pixel: window centred on the box, its long side plus the context at both ends."""
    image = torch.randint(1, 256, (3, 40, 60), generator=rng, dtype=torch.uint8)
    x0, y0, x1, y1 = map(int, box)
    side = max(x1 - x0, y1 - y0) + 2 * 4
    expected = torch.zeros(3, side, side, dtype=torch.uint8)
    for row in range(side):
        for column in range(side):
            y, x = (y0 + y1 - side) // 2 + row, (x0 + x1 - side) // 2 + column
            if 0 <= y < 40 and 0 <= x < 60:
                expected[:, row, column] = image[:, y, x]
    # As large as the window, so nothing is resized.
    crop = SupportCrop(size=side, min_size=1, rule="paper", context=4)
    result = crop(Support(image, torch.tensor(box), image[0] > 99))
    assert torch.equal(result.image, expected)
    assert torch.equal(result.mask, expected[0] > 99)
