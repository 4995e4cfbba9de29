"""Co-attention of SPIL: component, sign, scale, superpixels, masks; and the share of look-alikes in a box."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from fewshot_d2.systems.spil.attention import (
    CoAttention,
    box_pixels,
    co_attention,
    enlarged,
    first_component,
    merged_superpixels,
    pseudo_masks,
)
from fewshot_d2.systems.spil.lookalikes import covered_share


@pytest.mark.parametrize("channels", [1, 2, 30])
def test_component_is_the_first_eigenvector(rng, channels):
    spread = torch.linspace(3, 1, channels)
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, generator=rng))
    points = torch.randn(500, channels, generator=rng) * spread @ rotation + 5
    _, vectors = torch.linalg.eigh(torch.cov(points.T.double()).reshape(channels, channels))
    component = first_component(points).double()
    assert_close(component.norm(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    assert abs(component @ vectors[:, -1]) > 1 - 1e-4


def test_points_without_a_direction():
    """Nothing differs, or all directions alike: no NaN and an end."""
    assert torch.equal(first_component(torch.ones(4, 3)), torch.zeros(3))
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert_close(first_component(square).norm(), torch.tensor(1.0))


def scene(rng, *, noise=0.1, channels=16):
    """A query of 12 x 16 cells with an object in cells 2-5 x 4-9, and examples full of the same."""
    common = torch.randn(channels, generator=rng)
    query = noise * torch.randn(channels, 12, 16, generator=rng)
    query[:, 2:6, 4:10] += common[:, None, None]
    shots = noise * torch.randn(5, channels, 3, 3, generator=rng) + common[None, :, None, None]
    # In pixels of cells of 8.
    return query, shots, torch.tensor([[32.0, 16.0, 80.0, 48.0]])


def test_attention_is_on_the_object_whatever_the_features_sign(rng):
    query, shots, box = scene(rng)
    attention = co_attention(query, shots, box, 8, (96, 128))
    inside = box_pixels(box, (96, 128))[0]
    assert attention.min() >= 0 and attention.max() <= 1 and attention.max() > 0.9
    assert attention[inside].mean() > 0.7 and attention[~inside].mean() < 0.1
    # The rest lies below the mean, so that clamping leaves almost nothing of it (spec B3, item 25).
    assert (attention[~inside] > 0.1).float().mean() < 0.1
    # Pixels touch no object cell here.
    assert attention[60:, 100:].max() < 0.05
    assert_close(co_attention(-query, -shots, box, 8, (96, 128)), attention, atol=1e-4, rtol=1e-3)


def test_attention_does_not_see_the_padding(rng):
    query, shots, box = scene(rng)
    padded = torch.full((16, 14, 20), 1e3)
    padded[:, :12, :16] = query
    expected = co_attention(query, shots, box, 8, (93, 125))
    assert expected.shape == (93, 125)
    assert_close(co_attention(padded, shots, box, 8, (93, 125)), expected)


def test_attention_of_degenerate_queries(rng):
    query, shots, _ = scene(rng)
    everything = torch.tensor([[0.0, 0.0, 128.0, 96.0]])
    assert torch.isfinite(co_attention(query, shots, everything, 8, (96, 128))).all()
    flat = co_attention(torch.ones(4, 2, 2), torch.ones(1, 4, 2, 2), everything, 8, (16, 16))
    assert torch.equal(flat, torch.zeros(16, 16))


def test_enlarged_is_bilinear_about_cell_centres(rng):
    cells = torch.randn(3, 4, generator=rng)
    pixels = enlarged(cells, 4, (11, 15))
    assert pixels.shape == (11, 15)
    for y in range(11):
        for x in range(15):
            row = min(max((y + 0.5) / 4 - 0.5, 0), 2)
            column = min(max((x + 0.5) / 4 - 0.5, 0), 3)
            r, c = math.floor(row), math.floor(column)
            below, right = min(r + 1, 2), min(c + 1, 3)
            top = cells[r, c] + (column - c) * (cells[r, right] - cells[r, c])
            bottom = cells[below, c] + (column - c) * (cells[below, right] - cells[below, c])
            assert_close(pixels[y, x], top + (row - r) * (bottom - top), atol=1e-5, rtol=1e-4)


def test_two_superpixels_of_two_colours_are_merged_exactly():
    from fewshot_d2.data.superpixels import felzenszwalb_labels

    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:30, 15:45] = (200, 30, 30)
    labels = felzenszwalb_labels(image, scale=100.0, sigma=0.0, min_size=20)
    superpixels = torch.from_numpy(labels).long()
    # High on a part of the rectangle only, and a little everywhere.
    attention = torch.full((40, 60), 0.05)
    attention[12:20, 20:30] = 0.9
    selected = merged_superpixels(attention, superpixels, 0.1)
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[10:30, 15:45] = True
    assert torch.equal(selected, expected)


def test_merging_equals_loops(rng):
    superpixels = torch.randint(0, 9, (20, 30), generator=rng)
    superpixels[superpixels == 4] = 5
    attention = torch.rand(20, 30, generator=rng)
    selected = merged_superpixels(attention, superpixels, 0.5)
    for label in superpixels.unique():
        members = superpixels == label
        assert (selected[members] == (attention[members].double().mean() > 0.5)).all()


def test_masks_are_superpixels_in_the_box_or_else_attentive_pixels():
    attention = torch.zeros(10, 10)
    attention[1, 1], attention[8, 8] = 0.5, 0.5
    selected = torch.zeros(10, 10, dtype=torch.bool)
    selected[0:4, 0:4] = True
    boxes = torch.tensor([[0.0, 0.0, 3.0, 3.0], [7.0, 7.0, 10.0, 10.0], [4.0, 4.0, 6.0, 6.0]])
    masks = pseudo_masks(attention, selected, boxes, 0.1)
    assert masks[0].nonzero().tolist() == [[y, x] for y in range(3) for x in range(3)]
    assert masks[1].nonzero().tolist() == [[8, 8]]
    assert not masks[2].any()
    assert pseudo_masks(attention, selected, boxes[:0], 0.1).shape == (0, 10, 10)


def test_box_pixels():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 5.0], [4.6, 0.0, 4.9, 6.0], [-9.0, -9.0, -8.0, -8.0]])
    pixels = box_pixels(boxes, (6, 7))
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[2:5, 1:3] = True
    assert torch.equal(pixels[0], expected)
    # Thinner than a pixel, but not nothing.
    assert pixels[1].nonzero().tolist() == [[y, 4] for y in range(6)]
    # A box outside the image is taken to its nearest pixel.
    assert pixels[2].nonzero().tolist() == [[0, 0]]


def test_share_of_a_box_equals_counting_small_cells(rng):
    pixels = torch.rand(9, 11, generator=rng) > 0.5
    # On a grid of quarter pixels, where counting is exact.
    corners = torch.randint(-8, 52, (40, 2, 2), generator=rng) / 4
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    fine = pixels.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    for box, share in zip(boxes, covered_share(pixels, boxes), strict=True):
        x0, y0, x1, y1 = (box * 4).long().tolist()
        part = fine[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        assert share == pytest.approx(part.double().mean().item() if part.numel() else 0.0)
    assert covered_share(pixels, boxes[:0]).shape == (0,)


def test_labelling_a_target(rng):
    """Masks inside the boxes, look-alikes outside of them."""
    query, shots, box = scene(rng)
    # A second object without a box.
    query[:, 8:11, 12:15] = query[:, 2:5, 4:7]
    target = Instances((96, 128), gt_boxes=Boxes(box), gt_classes=torch.zeros(1, dtype=torch.int64))
    rows, columns = torch.arange(96) // 8, torch.arange(128) // 8
    superpixels = rows[:, None] * 16 + columns

    class Trunk(torch.nn.Module):
        def output_shape(self):
            from detectron2.layers import ShapeSpec

            return {"res4": ShapeSpec(channels=16, stride=8)}

    CoAttention(backbone=Trunk(), layer="res4", threshold=0.1).label(
        target, query, shots, superpixels
    )
    mask, lookalikes = target.gt_masks.tensor[0], target.lookalikes[0]
    inside = box_pixels(box, (96, 128))[0]
    assert (mask & inside).sum() > 0.95 * inside.sum() and not (mask & ~inside).any()
    assert lookalikes[64:88, 96:120].float().mean() > 0.95 and not (lookalikes & inside).any()
