"""The instance index against naive loops, and how supports are drawn."""

from collections import Counter

import numpy as np
import pytest
from detectron2.structures import BoxMode

from fewshot_d2.data.index import InstanceIndex

# Contiguous id -> dataset category id; not in the same order.
DATASET_IDS = {0: 40, 1: 3, 2: 17, 3: 90}


def annotation(number, category_id=0, **changes):
    row = {"id": number, "bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYWH_ABS}
    return {**row, "category_id": category_id, "iscrowd": 0, **changes}


def dicts_of(*images):
    """One image for each list of annotations; image ids are 100, 101, ..."""
    return [
        {"file_name": f"{i}.jpg", "image_id": 100 + i, "annotations": list(annotations)}
        for i, annotations in enumerate(images)
    ]


def index_of(*images):
    return InstanceIndex(dicts_of(*images), DATASET_IDS)


def random_dicts(rng, num_images=30):
    number = iter(range(500, 5000))
    return dicts_of(
        *(
            [
                annotation(
                    next(number),
                    int(rng.integers(0, 3)),
                    bbox=[0, 0, *rng.integers(0, 4, 2).tolist()],
                    iscrowd=int(rng.random() < 0.2),
                )
                for _ in range(rng.integers(0, 6))
            ]
            for _ in range(num_images)
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_look_ups_agree_with_naive_loops(seed):
    dicts = random_dicts(np.random.default_rng(seed))
    index = InstanceIndex(dicts, DATASET_IDS)
    rows = [
        (i, p, DATASET_IDS[a["category_id"]], a["id"])
        for i, d in enumerate(dicts)
        for p, a in enumerate(d["annotations"])
        if not a["iscrowd"] and a["bbox"][2] * a["bbox"][3] > 0
    ]
    assert index.dicts is dicts
    assert index.category_ids == [3, 17, 40, 90]
    assert index.class_ids == sorted({c for _, _, c, _ in rows})
    for i in range(len(dicts)):
        assert index.classes_in(i) == tuple(sorted({c for j, _, c, _ in rows if j == i}))
        assert index.image_index(100 + i) == i
        for c in DATASET_IDS.values():
            assert index.instances(i, c) == tuple(p for j, p, d, _ in rows if (j, d) == (i, c))
    for c in DATASET_IDS.values():
        assert index.images_with(c) == tuple(sorted({i for i, _, d, _ in rows if d == c}))
    usable = {number: (i, p) for i, p, _, number in rows}
    for d in dicts:
        for a in d["annotations"]:
            if a["id"] in usable:
                assert index.locate(a["id"]) == usable[a["id"]]
                assert index.annotation_id(*usable[a["id"]]) == a["id"]
                assert index.class_of(a["id"]) == DATASET_IDS[a["category_id"]]
            else:
                with pytest.raises(ValueError, match=f"got {a['id']}"):
                    index.locate(a["id"])


def test_empty_index():
    index = InstanceIndex([], DATASET_IDS)
    assert index.class_ids == []
    assert index.images_with(3) == ()
    with pytest.raises(ValueError, match="image id must be one of the data set, got 5"):
        index.image_index(5)
    with pytest.raises(ValueError, match="non-crowd instance"):
        index.locate(5)


def test_corner_boxes_and_dicts_without_annotations_or_iscrowd():
    row = annotation(1, bbox=[5, 5, 4, 9], bbox_mode=BoxMode.XYXY_ABS)
    good = annotation(2, bbox=[5, 5, 6, 9], bbox_mode=BoxMode.XYXY_ABS)
    del good["iscrowd"]
    index = InstanceIndex([{"file_name": "a"}, *dicts_of([row, good])], DATASET_IDS)
    assert index.classes_in(0) == ()
    assert index.instances(1, 40) == (1,)


def test_bad_dicts_are_named():
    with pytest.raises(ValueError, match=r"0\.jpg: category_id .* got \[9\]"):
        index_of([annotation(1, 9)])
    with pytest.raises(ValueError, match="annotation ids must be unique in the data set, got 1"):
        index_of([annotation(1)], [annotation(1)]).locate(1)
    nameless = annotation(1)
    del nameless["id"]
    with pytest.raises(ValueError, match=r"0\.jpg: annotations must have an 'id'"):
        index_of([nameless]).locate(1)
    twice = InstanceIndex([*dicts_of([]), *dicts_of([])], DATASET_IDS)
    with pytest.raises(ValueError, match="image ids must be unique in the data set, got 100"):
        twice.image_index(100)


def uneven_index():
    """Class 40 in the images 0 (1 instance), 2 (4 instances) and 3 (2 instances)."""
    return index_of(
        [annotation(1), annotation(2, 1)],
        [annotation(3, 1)],
        [annotation(n) for n in (4, 5, 6, 7)],
        [annotation(8, 1), annotation(9), annotation(10)],
    )


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        # Uniform over images, then over the instances there: not uniform over instances.
        ((), {(0, 0): 4, **{(2, p): 1 for p in range(4)}, (3, 1): 2, (3, 2): 2}),
        ((0, 1), {**{(2, p): 1 for p in range(4)}, (3, 1): 2, (3, 2): 2}),
        ((2,), {(0, 0): 2, (3, 1): 1, (3, 2): 1}),
        ((3, 0, 3), {(2, p): 1 for p in range(4)}),
    ],
)
def test_support_is_uniform_over_images_then_instances(exclude, expected):
    index, rng, num_draws = uneven_index(), np.random.default_rng(0), 6000
    drawn = Counter(index.draw_support(rng, 40, 1, exclude)[0] for _ in range(num_draws))
    assert drawn.keys() == expected.keys()
    total = sum(expected.values())
    for place, weight in expected.items():
        share = weight / total
        # Five standard deviations of a binomial share.
        assert abs(drawn[place] / num_draws - share) < 5 * np.sqrt(share * (1 - share) / num_draws)


def test_second_shot_follows_the_images_that_are_left():
    index, rng, num_draws = uneven_index(), np.random.default_rng(0), 6000
    pairs = Counter()
    for _ in range(num_draws):
        (first, _), (second, _) = index.draw_support(rng, 40, 2)
        pairs[first, second] += 1
    # Image 0 has one instance: after it only 2 and 3 are left, after the others all three.
    expected = {(0, 2): 1 / 6, (0, 3): 1 / 6}
    expected |= {(first, second): 1 / 9 for first in (2, 3) for second in (0, 2, 3)}
    assert pairs.keys() == expected.keys()
    for pair, share in expected.items():
        assert abs(pairs[pair] / num_draws - share) < 5 * np.sqrt(share * (1 - share) / num_draws)


@pytest.mark.parametrize("seed", range(30))
def test_instances_repeat_only_when_all_are_used(seed):
    index, rng = uneven_index(), np.random.default_rng(seed)
    everything = {(i, p) for i in (0, 2, 3) for p in index.instances(i, 40)}
    drawn = index.draw_support(rng, 40, 17)
    assert len(drawn) == 17
    assert set(drawn[:7]) == set(drawn[7:14]) == everything
    assert len(set(drawn[14:])) == 3
    # The excluded image stays out even if the others must repeat.
    drawn = index.draw_support(rng, 40, 6, exclude_images={2})
    assert set(drawn[:3]) == set(drawn[3:]) == {(0, 0), (3, 1), (3, 2)}


def test_excluded_image_serves_if_there_is_no_other():
    index = index_of([annotation(1), annotation(2)], [annotation(3, 1)])
    drawn = index.draw_support(np.random.default_rng(0), 40, 2, (0,))
    assert set(drawn) == {(0, 0), (0, 1)}


def test_same_generator_gives_same_support():
    index = uneven_index()
    first, second = (
        [index.draw_support(np.random.default_rng((s, 1)), 40, 3) for s in range(20)] for _ in "ab"
    )
    assert first == second
    assert len({str(drawn) for drawn in first}) > 10


def test_support_of_nothing_is_refused():
    index = uneven_index()
    with pytest.raises(ValueError, match="got 1 shots of class 90, which 0 images have"):
        index.draw_support(np.random.default_rng(0), 90, 1)
    with pytest.raises(ValueError, match="at least 1 shot .* got 0 shots"):
        index.draw_support(np.random.default_rng(0), 40, 0)
