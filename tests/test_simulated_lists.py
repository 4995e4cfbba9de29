"""Simulated rank lists: share of true images, IoU of the boxes, and what they never name."""

import numpy as np
import pytest
from factories import registered_set, write_set

from fewshot_d2.data.loaders import build_index
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.data.search_queries import annotated_queries
from fewshot_d2.data.simulated_lists import simulated_lists


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    write_set(folder, num_images=60)
    with registered_set("simulated_set", folder):
        yield build_index("simulated_set")


def made(index, **changes):
    quality = {"depth": 30, "precision": 0.6, "box_iou": 0.4, "seed": 0, **changes}
    return simulated_lists(index, annotated_queries(index), **quality)


def is_true(index, row, candidate):
    return row.label in index.classes_in(index.image_index(candidate.image_id))


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return common / (sum(areas) - common)


@pytest.mark.parametrize("precision", [0.0, 0.3, 0.6, 1.0])
def test_share_of_true_images(index, precision):
    lists = made(index, precision=precision, depth=8)
    share = np.mean([is_true(index, row, c) for row in lists for c in row.candidates])
    # About 60 lists of 8: three standard deviations are 0.07.
    assert share == pytest.approx(precision, abs=0.07)


@pytest.mark.parametrize("box_iou", [0.4, 1.0])
def test_boxes_are_parts_of_an_instance(index, box_iou):
    for row in made(index, box_iou=box_iou):
        for candidate in row.candidates:
            image = index.image_index(candidate.image_id)
            classes = [row.label] if is_true(index, row, candidate) else index.classes_in(image)
            boxes = [
                index.dicts[image]["annotations"][p]["bbox"]
                for c in classes
                for p in index.instances(image, c)
            ]
            whole = [(x, y, x + w, y + h) for x, y, w, h in boxes]
            # Parts of one instance may overlap another one more.
            assert max(iou(candidate.box, box) for box in whole) >= box_iou - 1e-6
            assert any(iou(candidate.box, b) == pytest.approx(box_iou) for b in whole)


def test_lists_name_no_image_twice_nor_the_query_and_fit_the_data_set(index):
    lists = made(index, depth=1000)
    for row in lists:
        assert row.image_id not in {c.image_id for c in row.candidates}
        # All other images that have an instance.
        assert len(row.candidates) == sum(bool(index.classes_in(i)) for i in range(60)) - 1
    RankLists("simulated_set", "simulated_set", "", lists).check(index, index)
    assert made(index) == made(index) != made(index, seed=1)


@pytest.mark.parametrize(
    "change", [{"precision": 1.1}, {"precision": -0.1}, {"box_iou": 0.0}, {"depth": 0}]
)
def test_bad_quality_is_refused(index, change):
    with pytest.raises(ValueError, match="must be in"):
        made(index, **change)
