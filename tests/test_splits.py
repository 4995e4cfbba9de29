"""Splits of classes, and the boundary that novel labels must not cross."""

import copy
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.splits import (
    ClassSplit,
    classes_of_side,
    resolve_split,
    restrict_to_classes,
    split_of,
)

IDS = [90, 4, 17, 1, 30]
NAMES = ["zebra", "ant", "traffic light", "17", "dog"]


def resolve(spec):
    return resolve_split(spec, IDS, NAMES)


def test_all_has_no_novel_class():
    assert resolve("all") == ClassSplit(base=(1, 4, 17, 30, 90), novel=())
    assert resolve_split("all", [], []) == ClassSplit((), ())


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_4th_counts_classes_not_ids(number):
    # COCO's 80 ids have ten holes; the paper's split i holds the classes 4k + i, k = 0..19.
    holes = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in holes]
    assert len(ids) == 80
    expected = {ids[4 * k + number - 1] for k in range(20)}
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    split = resolve_split(f"every_4th:{number}", shuffled, [str(i) for i in shuffled])
    assert set(split.novel) == expected
    assert sorted(split.base + split.novel) == ids


def test_every_4th_of_coco_photos(shared_data):
    content = json.loads((shared_data / "coco482" / "instances.json").read_bytes())
    names = {c["id"]: c["name"] for c in content["categories"]}
    split = resolve_split("every_4th:1", list(names), list(names.values()))
    # Table 3 of the paper: split 1 holds out person, airplane, boat, ...
    assert [names[i] for i in split.novel[:4]] == ["person", "airplane", "boat", "parking meter"]
    assert (len(split.novel), len(split.base)) == (20, 60)


def test_listed_classes_are_names_or_ids_and_names_win():
    assert resolve("novel:dog, traffic light").novel == (17, 30)
    assert resolve("novel:4,90").novel == (4, 90)
    # A class is called "17"; its id is 1.
    assert resolve("novel:17").novel == (1,)
    assert resolve("novel:17").base == (4, 17, 30, 90)
    assert resolve("novel:dog,30,dog").novel == (30,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"novel": ["dog", 4]}, ClassSplit((1, 17, 90), (4, 30))),
        ({"novel": [17]}, ClassSplit((1, 4, 30, 90), (17,))),
        ({"novel": ["17"]}, ClassSplit((4, 17, 30, 90), (1,))),
        ({"novel": ["dog"], "base": ["ant", 90]}, ClassSplit((4, 90), (30,))),
        ({"novel": []}, ClassSplit((1, 4, 17, 30, 90), ())),
    ],
)
def test_split_file(tmp_path, content, expected):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    assert resolve(f"file:{path}") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be a JSON file"),
        ("[]", "must have a list 'novel'"),
        ('{"base": []}', "must have a list 'novel'"),
        ('{"novel": [], "nvel": []}', "must have a list 'novel'"),
        ('{"novel": "dog"}', "'novel' must be a list"),
        ('{"novel": [true]}', "'novel' must be a list"),
        ('{"novel": ["dgo"]}', "got 'dgo' .*dog"),
        ('{"novel": ["dog"], "base": [30]}', r"must be disjoint, got \[30\]"),
    ],
)
def test_bad_split_file_is_named(tmp_path, content, words):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"split\.json.*{words}"):
        resolve(f"file:{path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "split must be .*every_4th:1"),
        ("some", "split must be"),
        ("every_4th", "split must be"),
        ("every_4th:0", "split must be"),
        ("every_4th:5", "split must be"),
        ("every_4th:x", "split must be"),
        ("novel:", "split must be"),
        ("file:", "split must be"),
        ("novel:dog,zebr", "split 'novel:dog,zebr': .* got 'zebr' .*close: zebra"),
        ("novel:dog,,ant", "got ''"),
        ("novel:2", "got '2'"),
        ("novel:Dog", "close: dog"),
        ("novel:unicorn9999", "there are 5 others"),
    ],
)
def test_bad_spec_names_the_culprit(spec, words):
    with pytest.raises(ValueError, match=words):
        resolve(spec)


def test_name_of_two_classes_needs_the_id():
    with pytest.raises(ValueError, match=r"'dog' must be one, got ids \[3, 5\]"):
        resolve_split("novel:dog", [3, 5], ["dog", "dog"])
    assert resolve_split("novel:5", [3, 5], ["dog", "dog"]).novel == (5,)


def test_missing_split_file_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        resolve("file:nowhere.json")


def test_sides_of_a_registered_data_set(tmp_path):
    name, path = "test_splits", tmp_path / "x.json"
    categories = [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_instances(name, path, tmp_path)
    try:
        assert split_of(name, "novel:dog") == resolve("novel:dog")
        assert classes_of_side(name, "novel:dog", "novel") == (30,)
        assert classes_of_side(name, "novel:dog", "base") == (1, 4, 17, 90)
        assert classes_of_side(name, "novel:dog", "all") == (1, 4, 17, 30, 90)
        with pytest.raises(ValueError, match="side must be one of"):
            classes_of_side(name, "novel:dog", "old")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def marked_dicts(rng):
    """Dicts in which each annotation's numbers contain a mark of its own, and the marks by class."""
    dicts, marks = [], {}
    for image_id in range(rng.integers(0, 12)):
        annotations = []
        for _ in range(rng.integers(0, 6)):
            mark = 1_000_000 + sum(map(len, marks.values()))
            class_id = int(rng.integers(0, 10))
            marks.setdefault(class_id, []).append(str(mark))
            annotations.append(
                {
                    "id": mark,
                    "bbox": [mark + 0.25, 1.0, 2.0, 3.0],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_id,
                    "iscrowd": int(rng.integers(0, 2)),
                    "segmentation": [[mark + 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]],
                }
            )
        dicts.append(
            {
                "file_name": f"{image_id}.jpg",
                "height": 9,
                "width": 9,
                "image_id": image_id,
                "annotations": annotations,
                "segments_info": [mark for of_class in marks.values() for mark in of_class],
            }
        )
    return dicts, marks


@pytest.mark.parametrize("seed", range(100))
def test_no_trace_of_a_novel_class_reaches_training(seed):
    rng = np.random.default_rng(seed)
    dicts, marks = marked_dicts(rng)
    base = {c for c in range(10) if rng.random() < 0.6}
    before = copy.deepcopy(dicts)
    result = restrict_to_classes(dicts, base)
    text = repr(result)
    for class_id, of_class in marks.items():
        # Every base annotation is there with all its numbers, nothing of any other one is.
        assert all((mark in text) == (class_id in base) for mark in of_class)
    assert [r["image_id"] for r in result] == [d["image_id"] for d in dicts]
    expected = [[a for a in d["annotations"] if a["category_id"] in base] for d in dicts]
    assert [r["annotations"] for r in result] == expected
    for record in result:
        record["annotations"].append("changed")
        for annotation in record["annotations"][:-1]:
            annotation["category_id"] = 0
    assert dicts == before


def test_restricting_to_nothing_leaves_bare_images():
    dicts = [{"file_name": "a.jpg", "image_id": 1, "annotations": [{"category_id": 0}]}]
    assert restrict_to_classes(dicts, ()) == [
        {"file_name": "a.jpg", "image_id": 1, "annotations": []}
    ]
    assert restrict_to_classes([{"file_name": "a.jpg"}], (0,)) == [
        {"file_name": "a.jpg", "annotations": []}
    ]
    assert restrict_to_classes([], (0,)) == []
