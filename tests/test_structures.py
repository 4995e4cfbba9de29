"""Supports, their portable file, and features."""

import json
import zipfile

import numpy as np
import pytest
import torch
from factories import random_support, random_support_set

from fewshot_d2 import Support, SupportFeatures, SupportSet, support_files
from fewshot_d2.decoding import MAX_PIXELS

IMAGE = torch.zeros(3, 10, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(10, 20, 3, dtype=torch.uint8),
        torch.zeros(3, 10, 20),
        torch.zeros(3, 0, 20, dtype=torch.uint8),
        torch.zeros(1, 10, 20, dtype=torch.uint8),
    ],
)
def test_support_refuses_what_is_no_rgb_image(image):
    with pytest.raises(ValueError, match="support image must be"):
        Support(image)


@pytest.mark.parametrize(
    "box",
    [[5, 5, 5, 8], [5, 5, 3, 8], [20, 0, 30, 5], [0, 0, float("nan"), 5], [0, 0, float("inf"), 5]],
)
def test_support_refuses_a_box_without_area_inside(box):
    with pytest.raises(ValueError, match="support box must"):
        Support(IMAGE, torch.tensor(box))


def test_support_box_is_clipped_to_the_image():
    assert Support(IMAGE, torch.tensor([-5.0, 2.0, 100.0, 8.0])).box.tolist() == [0, 2, 20, 8]


def test_region_is_the_box_or_the_whole_image():
    assert Support(IMAGE).region.tolist() == [0, 0, 20, 10]
    assert Support(IMAGE, torch.tensor([1, 2, 3, 4])).region.tolist() == [1, 2, 3, 4]


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="support mask must be"):
        Support(IMAGE, mask=torch.ones(5, 5, dtype=torch.bool))


def test_support_without_an_image_and_set_without_a_class_are_refused():
    with pytest.raises(ValueError, match="support must have an image"):
        Support(None)
    with pytest.raises(ValueError, match="at least one class"):
        SupportSet([], [], [])


def test_set_needs_a_positive_example_a_class():
    with pytest.raises(ValueError, match="'cup' must have at least one positive"):
        SupportSet([1], ["cup"], [[Support(IMAGE, negative=True)]])
    with pytest.raises(ValueError, match="equally long"):
        SupportSet([1, 2], ["cup"], [[Support(IMAGE)]])
    with pytest.raises(ValueError, match="unique"):
        SupportSet([1, 1], ["a", "b"], [[Support(IMAGE)]] * 2)


def test_file_round_trip(rng, tmp_path):
    mask = torch.zeros(30, 24, dtype=torch.bool)
    mask[3:9, 4:5] = True
    shots = [
        Support(random_support(rng).image, torch.tensor([1.5, 2, 9, 9]), mask),
        Support(random_support(rng).image, negative=True),
    ]
    original = SupportSet([7, 3], ["dög", "../cat"], [shots, [random_support(rng)]])
    original.save(tmp_path / "set.zip")
    loaded = SupportSet.load(tmp_path / "set.zip")
    assert loaded.class_ids == [7, 3] and loaded.class_names == ["dög", "../cat"]
    assert [len(shots) for shots in loaded.positives()] == [1, 1]
    for before, after in zip(sum(original.examples, []), sum(loaded.examples, []), strict=True):
        assert torch.equal(before.image, after.image) and before.negative == after.negative
        assert (before.box is None) == (after.box is None)
        if before.box is not None:
            assert torch.equal(before.box, after.box) and torch.equal(before.mask, after.mask)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.zip"]


def broken_file(kind, path, rng):
    random_support_set(rng).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["support_set.json"])
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
        return
    if kind == "no index":
        del members["support_set.json"]
    elif kind == "other format":
        header["format"] = "else"
    elif kind == "missing image":
        del members["0_0.png"]
    elif kind == "half a PNG":
        members["0_0.png"] = members["0_0.png"][:60]
    elif kind == "box of NaN":
        header["classes"][0]["examples"][0]["box"] = [0, 0, float("nan"), 3]
    elif kind == "pickle":
        members["0_0.png"] = b"\x80\x04cos\nsystem\n."
    if "support_set.json" in members:
        members["support_set.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "no index",
        "other format",
        "missing image",
        "half a PNG",
        "box of NaN",
        "pickle",
    ],
)
def test_broken_file_is_named(kind, rng, tmp_path):
    path = tmp_path / "broken.zip"
    broken_file(kind, path, rng)
    with pytest.raises(ValueError, match="broken.zip must be a support-set file"):
        SupportSet.load(path)


def test_every_image_that_is_read_can_be_kept():
    # Noise in a PNG: three bytes a pixel, a thousandth more for its blocks, and a byte a row.
    assert support_files._MAX_PNG_BYTES > 3.003 * MAX_PIXELS + 8000


def test_decompression_bomb_is_refused_unread(rng, tmp_path):
    path = tmp_path / "bomb.zip"
    random_support_set(rng).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(201 << 20) if name == "0_0.png" else content)
    with pytest.raises(ValueError, match="0_0.png must be at most"):
        SupportSet.load(path)


def features(ids, seed=0):
    values = np.random.default_rng(seed).normal(size=(len(ids), 4))
    return SupportFeatures({"p2": torch.tensor(values)}, list(ids), system="S")


def test_features_index_and_join():
    both = SupportFeatures.cat([features([1, 2]), features([3], seed=1)])
    assert both.class_ids == [1, 2, 3] and len(both) == 3
    part = both[[2, 0]]
    assert part.class_ids == [3, 1]
    assert torch.equal(part.tensors["p2"], both.tensors["p2"][[2, 0]])
    assert len(both[[]]) == 0


def test_features_round_trip_and_errors(tmp_path):
    features([1, 2]).save(tmp_path / "f.pt")
    loaded = SupportFeatures.load(tmp_path / "f.pt")
    assert loaded.class_ids == [1, 2] and loaded.system == "S"
    assert torch.equal(loaded.tensors["p2"], features([1, 2]).tensors["p2"])
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.pt"):
        SupportFeatures.load(tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="2 classes"):
        SupportFeatures({"p2": torch.zeros(3, 4)}, [1, 2])
    with pytest.raises(ValueError, match="one system"):
        SupportFeatures.cat([features([1]), SupportFeatures({"p2": torch.zeros(1, 4)}, [2])])
