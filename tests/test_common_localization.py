"""CL-VOC, CL-COCO and CL-VID from tiny trees of files, and the groups of their classes."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from test_imagenet_loc import annotation

from fewshot_d2.data.coco_json import dataset_categories
from fewshot_d2.data.datasets.common_localization import (
    VID_CLASSES,
    load_cl_coco,
    load_cl_vid,
    load_cl_vid_support,
    load_cl_voc,
    shared_out,
    vid_class_ids,
)
from fewshot_d2.data.ground_truth import GroundTruthFilter
from fewshot_d2.data.splits import resolve_split

NAME = "common_localization_test"


@pytest.fixture(autouse=True)
def forget():
    yield
    MetadataCatalog.pop(NAME, None)


@pytest.fixture
def voc(tmp_path):
    """Three training and ten validation images; the last object of each is difficult."""
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"2008_{i:06d}" for i in range(13)]
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        objects = [("dog", 0, 1, 1, 10, 20), ("head", 0, 1, 1, 4, 4), ("tvmonitor", 1, 3, 3, 9, 9)]
        (tmp_path / "Annotations" / f"{name}.xml").write_text(annotation(*objects[: 1 + i % 3]))
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n".join(names[:3]) + "\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(names[3:]) + "\n")
    return tmp_path


def test_voc_images_are_of_the_official_lists_and_val_and_test_are_disjoint(voc):
    sets = {which: load_cl_voc(voc, which, NAME) for which in ("train", "val", "test")}
    ids = {which: {r["image_id"] for r in dicts} for which, dicts in sets.items()}
    assert ids["train"] == {2008000000, 2008000001, 2008000002}
    assert [len(ids[which]) for which in ("val", "test")] == [4, 6]
    assert len(ids["train"] | ids["val"] | ids["test"]) == 13
    assert list(dataset_categories(NAME))[:2] == [1, 2] and len(dataset_categories(NAME)) == 20
    assert (
        dataset_categories(NAME)[1] == "aeroplane" and dataset_categories(NAME)[20] == "tvmonitor"
    )
    last = sets["train"][2]
    assert last["file_name"].endswith("JPEGImages/2008_000002.jpg")
    assert [(a["category_id"], a["bbox"], a.get("difficult", 0)) for a in last["annotations"]] == [
        (11, [0, 0, 10, 20], 0),
        (19, [2, 2, 7, 7], 1),
    ]
    kept = GroundTruthFilter(keep_difficult=False)([last])[0]["annotations"]
    assert [a["category_id"] for a in kept] == [11]


def test_images_are_shared_out_by_their_names_alone():
    names = [f"{i:06d}" for i in range(2510)]
    val, test = shared_out(names, "val"), shared_out(names, "test")
    # Of VOC 2007 as many as in the authors' later lists, within a few.
    assert (len(val), len(test)) == (1004, 1506) and not set(val) & set(test)
    assert set(shared_out(reversed(names), "val")) == set(val)
    assert shared_out([], "val") == []


def test_coco_keeps_its_ids(tmp_path):
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in range(10)]
    annotations = [
        {"id": 50 + i, "image_id": i, "category_id": 18, "bbox": [0, 0, 4, 4]} for i in range(10)
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 18, "name": "dog"}]
    for official in ("train2014", "val2014"):
        (tmp_path / f"annotations/instances_{official}.json").write_text(json.dumps(content))
    train, val, test = (load_cl_coco(tmp_path, which, NAME) for which in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [10, 4, 6]
    assert {r["image_id"] for r in val} | {r["image_id"] for r in test} == set(range(10))
    assert all(r["annotations"][0]["id"] == 50 + r["image_id"] for r in val + test)
    assert "train2014/" in train[0]["file_name"] and "val2014/" in val[0]["file_name"]


ZEBRA, FOX, DOG = "n02391049", "n02118333", "n02084071"


def test_vid_keeps_snippets_of_one_class_that_voc_does_not_have(tmp_path):
    base = tmp_path / "Annotations/VID/train/ILSVRC2015_VID_train_0000"
    snippets = {"zebra": [ZEBRA] * 4, "dog": [DOG] * 4, "both": [ZEBRA, FOX, ZEBRA, FOX]}
    for snippet, classes in snippets.items():
        (base / snippet).mkdir(parents=True)
        for i, wnid in enumerate(classes):
            text = annotation((wnid, 0, 1, 1, 10, 20))
            (base / snippet / f"{i:06d}.xml").write_text(text)
    (base / "zebra/000004.xml").write_text(annotation())
    every = load_cl_vid(tmp_path, 1, NAME)
    assert [len(r["annotations"]) for r in every] == [1, 1, 1, 1, 0]
    assert every[0]["file_name"].endswith(
        "Data/VID/train/ILSVRC2015_VID_train_0000/zebra/000000.JPEG"
    )
    assert dataset_categories(NAME)[30] == "zebra" and len(dataset_categories(NAME)) == 17
    # Two frames of "both" are read, both of zebras.
    assert len(load_cl_vid(tmp_path, 2, NAME)) == 3 + 2


def test_vid_supports_are_images_of_det(tmp_path):
    folder = tmp_path / "Annotations/DET/val"
    folder.mkdir(parents=True)
    for name, wnids in {"a": [ZEBRA, DOG], "b": [DOG], "c": [FOX]}.items():
        (folder / f"{name}.xml").write_text(annotation(*((w, 0, 1, 1, 9, 9) for w in wnids)))
    dicts = load_cl_vid_support(tmp_path, NAME)
    assert [r["file_name"].rpartition("/")[2] for r in dicts] == ["a.JPEG", "c.JPEG"]
    assert [len(r["annotations"]) for r in dicts] == [1, 1]


def test_vid_classes_are_thirty_in_the_order_of_their_names():
    """The order is alphabetical; those that VOC has were left without a name."""
    assert len(VID_CLASSES) == 30 and len(vid_class_ids()) == 17
    names = [name for name in VID_CLASSES.values() if name]
    assert names == sorted(names) and vid_class_ids()[ZEBRA] == 30


def test_groups_and_folds_are_parts_of_the_official_order():
    categories = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
    coco = list(categories), list(categories.values())
    groups = [resolve_split(f"part:{g}/2", *coco) for g in (1, 2)]
    assert [categories[g.novel[0]] for g in groups] == ["person", "wine glass"]
    assert [categories[g.novel[-1]] for g in groups] == ["bottle", "toothbrush"]
    assert groups[0].base == groups[1].novel and len(groups[0].novel) == 40
    folds = [resolve_split(f"part:{f}/4", *coco).novel for f in (1, 2, 3, 4)]
    ends = [(categories[fold[0]], categories[fold[-1]]) for fold in folds]
    assert ends == [
        ("person", "cow"), ("elephant", "bottle"), ("wine glass", "bed"),
        ("dining table", "toothbrush"),
    ]  # fmt: skip
    assert sorted(c for fold in folds for c in fold) == sorted(categories)
    # Parts are as equal as can be where they cannot be equal.
    assert [resolve_split(f"part:{i}/3", range(5), "abcde").novel for i in (1, 2, 3)] == [
        (0,), (1, 2), (3, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "spec", ["part:0/2", "part:3/2", "part:1", "part:a/2", "part:1/0", "part:"]
)
def test_parts_that_are_none(spec):
    with pytest.raises(ValueError, match="split must be"):
        resolve_split(spec, [1, 2], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("cl_voc07_train", "VOC2007/ImageSets/Main/train.txt"),
        ("cl_voc12_test", "VOC2012/ImageSets/Main/val.txt"),
        ("cl_coco_val", "coco/annotations/instances_val2014.json"),
        ("cl_vid_test", "ILSVRC/Annotations/VID/train"),
        ("cl_vid_test_30th", "ILSVRC/Annotations/VID/train"),
        ("cl_vid_support", "ILSVRC/Annotations/DET/val"),
    ],
)
def test_registered_sets_name_the_file_that_is_missing(name, missing):
    assert name in DatasetCatalog.list()
    with pytest.raises(FileNotFoundError, match=missing):
        DatasetCatalog.get(name)


def test_an_annotation_that_is_missing_is_named(voc):
    (voc / "Annotations/2008_000001.xml").unlink()
    with pytest.raises(FileNotFoundError, match="2008_000001.xml"):
        load_cl_voc(voc, "train", NAME)
