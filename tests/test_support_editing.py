"""What a user types for an example, and changing support sets, which are never changed in place."""

import numpy as np
import pytest
import torch
from factories import random_support, random_support_set
from PIL import Image

from fewshot_d2 import SupportSet
from fewshot_d2.inference.support_editing import (
    SupportSpecification,
    merged,
    renamed,
    support_set_of,
    with_negatives,
    without,
)
from fewshot_d2.visualization.contact_sheet import contact_sheet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cup.jpg:1,2,3,4:cup", ("cup.jpg", "cup", (1, 2, 3, 4), None)),
        ("cup.jpg: 1, 2.5 ,3,4 : my cup ", ("cup.jpg", "my cup", (1, 2.5, 3, 4), None)),
        ("cup.jpg::cup", ("cup.jpg", "cup", None, None)),
        ("C:\\a.jpg::cup", ("C:\\a.jpg", "cup", None, None)),
        ("a:b.jpg:mask=m.png:cup", ("a:b.jpg", "cup", None, "m.png")),
    ],
)
def test_specification(text, expected):
    found = SupportSpecification.parse(text)
    assert (found.image, found.class_name, found.box, found.mask) == expected


@pytest.mark.parametrize(
    "text", ["", "cup.jpg", "cup.jpg:cup", "::cup", "a::", "a:1,2,3:b", "a:1,2,3,x:b", "a:mask=:b"]
)
def test_what_is_no_specification_is_shown(text):
    with pytest.raises(ValueError, match="support must be IMAGE") as error:
        SupportSpecification.parse(text)
    assert text in str(error.value)


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_box_is_turned_into_corners_and_clipped(photo):
    [[shot]] = support_set_of([f"{photo}:15,2,30,4:cup"]).examples
    assert shot.box.tolist() == [15, 2, 20, 6]


@pytest.mark.parametrize("box", ["20,0,5,5", "0,0,0,5", "0,0,-3,5", "nan,0,5,5", "0,0,inf,5"])
def test_box_of_no_use_names_its_image(photo, box):
    with pytest.raises(ValueError, match="a.png: support box must"):
        support_set_of([f"{photo}:{box}:cup"])


def test_mask_gives_box_and_mask(photo, tmp_path):
    mask = np.zeros((10, 20), np.uint8)
    mask[3:5, 6:11] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    [[shot]] = support_set_of([f"{photo}:mask={tmp_path / 'm.png'}:cup"]).examples
    assert shot.box.tolist() == [6, 3, 11, 5]
    assert np.array_equal(shot.mask.numpy(), mask > 0)
    for wrong, message in (
        (np.zeros((10, 20), np.uint8), "white pixel"),
        (mask[:5], "support mask must"),
    ):
        Image.fromarray(wrong).save(tmp_path / "m.png")
        with pytest.raises(ValueError, match=f"a.png with mask .*m.png: .*{message}"):
            support_set_of([f"{photo}:mask={tmp_path / 'm.png'}:cup"])


def test_classes_are_in_the_order_of_their_first_example(photo):
    made = support_set_of([f"{photo}::b", f"{photo}::a", f"{photo}:1,1,3,3:b"])
    assert made.class_names == ["b", "a"] and made.class_ids == [1, 2]
    assert [len(shots) for shots in made.examples] == [2, 1]


def test_merging_joins_names_and_keeps_ids_where_it_can(rng):
    one = SupportSet([5, 7], ["a", "b"], [[random_support(rng)], [random_support(rng)]])
    two = SupportSet([9, 7], ["b", "c"], [[random_support(rng)], [random_support(rng)]])
    both = merged([one, two])
    assert dict(zip(both.class_names, both.class_ids, strict=True)) == {"a": 5, "b": 7, "c": 8}
    assert both.examples[1] == [one.examples[1][0], two.examples[0][0]]
    assert [len(shots) for shots in one.examples] == [1, 1]


def test_removing_and_renaming(rng):
    original = random_support_set(rng, ways=2, shots=2)
    less = without(original, "class 0", 1)
    assert less.examples[0] == original.examples[0][1:] and len(original.examples[0]) == 2
    assert without(original, "class 0").class_ids == [20]
    assert renamed(original, "class 1", "cup").class_names == ["class 0", "cup"]
    for call, message in (
        (lambda: without(original, "cup"), "class must be one of"),
        (lambda: without(original, "class 0", 3), r"in 1\.\.2"),
        (lambda: without(without(less, "class 0", 1), "class 0"), "at least one positive"),
        (lambda: without(without(original, "class 0"), "class 1"), "must keep a class"),
        (lambda: renamed(original, "class 0", "class 1"), "new name must be"),
        (lambda: renamed(original, "class 0", "a:b"), "new name must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_negatives_join_classes_that_are_there(rng, photo):
    original = random_support_set(rng)
    more = with_negatives(original, [f"{photo}::class 1"])
    assert [shot.negative for shot in more.examples[1]] == [False, True]
    with pytest.raises(ValueError, match="class must be one of"):
        with_negatives(original, [f"{photo}::cup"])


def test_contact_sheet_shows_every_example(rng):
    support_set = random_support_set(rng, ways=2, shots=3)
    for k, shots in enumerate(support_set.examples):
        for i, shot in enumerate(shots):
            shot.image[:] = torch.tensor([40 * (k + 1), 60 * (i + 1), 7])[:, None, None]
    sheet = contact_sheet(support_set).reshape(-1, 3)
    for k in range(2):
        for i in range(3):
            wanted = np.array([40 * (k + 1), 60 * (i + 1), 7])
            assert (np.abs(sheet.astype(int) - wanted).max(axis=1) <= 1).sum() > 5000


def test_transparent_parts_of_a_mask_are_not_the_example(photo, tmp_path):
    mask = np.zeros((10, 20, 4), np.uint8)
    mask[3:5, 6:11] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    [[shot]] = support_set_of([f"{photo}:mask={tmp_path / 'm.png'}:cup"]).examples
    assert shot.box.tolist() == [6, 3, 11, 5]


def test_a_name_of_a_million_letters_is_cut(rng):
    long = SupportSet([1], ["w" * 1_000_000], [[random_support(rng)]])
    short = SupportSet([1], ["w" * 300], [[random_support(rng)]])
    assert contact_sheet(long).shape == contact_sheet(short).shape
