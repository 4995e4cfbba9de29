"""COCO and LVIS json files: what is read, what is mended with one warning, what is refused."""

import copy
import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from fewshot_d2.data.coco_json import dataset_categories, load_instances_json, register_instances

HEIGHT, WIDTH = 40, 60
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 5.0, 8.0]
# 10 pixels of background, 20 of foreground, ... column by column, covering the image exactly.
COUNTS = [10, 20, 370, 1000, HEIGHT * WIDTH - 1400]


def content(*annotations):
    """Two images, three categories with holes in their ids, and the annotations (ids 1, 2, ...)."""
    rows = [
        {"id": i, "image_id": 7, "category_id": 4, "bbox": [1, 2, 10, 10], "iscrowd": 0, **row}
        for i, row in enumerate(annotations, start=1)
    ]
    images = [
        {"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 3, "file_name": "sub/b.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    names = {90: "zebra", 4: "ant", 17: "never seen"}
    categories = [{"id": i, "name": name} for i, name in names.items()]
    return {"images": images, "annotations": rows, "categories": categories}


@pytest.fixture
def name():
    """A data set name that is forgotten afterwards."""
    name = "test_coco_json"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


@pytest.fixture
def load(tmp_path, name):
    """Write content to a file and read it."""

    def load(data):
        path = tmp_path / "instances.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return load_instances_json(path, "photos", name)

    return load


def naive_decode(counts):
    """Uncompressed RLE -> bool (HEIGHT, WIDTH), run by run."""
    flat = [i % 2 for i, count in enumerate(counts) for _ in range(count)]
    return np.array(flat, bool).reshape(WIDTH, HEIGHT).T


def test_dicts_have_the_detectron2_form(load, name):
    dicts = load(content({"segmentation": [TRIANGLE], "area": 28.0, "category_id": 90}))
    assert dicts == [
        {
            "file_name": "photos/a.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "image_id": 7,
            "annotations": [
                {
                    "id": 1,
                    "bbox": [1, 2, 10, 10],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 2,
                    "iscrowd": 0,
                    "area": 28.0,
                    "segmentation": [TRIANGLE],
                }
            ],
        },
        # An image without annotations stays.
        {
            "file_name": "photos/sub/b.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "image_id": 3,
            "annotations": [],
        },
    ]
    # Holes in the ids close up in ascending order; the class without instances stays.
    assert dataset_categories(name) == {4: "ant", 17: "never seen", 90: "zebra"}
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 17: 1, 90: 2}


def test_file_without_images_or_annotations_is_empty(load):
    assert [d["annotations"] for d in load(content())] == [[], []]
    assert load({**content(), "images": []}) == []


def test_lvis_v1_names_images_by_url_and_has_no_crowds(load):
    data = content({"segmentation": [TRIANGLE]})
    for image in data["images"]:
        image["coco_url"] = f"http://images.example/train2017/{image.pop('file_name')[-5:]}"
    del data["annotations"][0]["iscrowd"]
    dicts = load(data)
    assert dicts[0]["file_name"] == "photos/train2017/a.jpg"
    assert dicts[0]["annotations"][0]["iscrowd"] == 0


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_rle_can_be_decoded_and_crowds_keep_theirs(load, caplog, compressed, iscrowd):
    rle = {"size": [HEIGHT, WIDTH], "counts": COUNTS}
    if compressed:
        rle = mask_util.frPyObjects(rle, HEIGHT, WIDTH)
        rle["counts"] = rle["counts"].decode("ascii")
    annotation = load(content({"segmentation": rle, "iscrowd": iscrowd}))[0]["annotations"][0]
    assert annotation["iscrowd"] == iscrowd
    segmentation = annotation["segmentation"]
    if iscrowd or compressed:
        assert segmentation == rle
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, HEIGHT, WIDTH)
    assert (mask_util.decode(segmentation).astype(bool) == naive_decode(COUNTS)).all()
    assert not caplog.records


def test_boxes_are_clipped_like_pixels(load, caplog):
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.integers(-40, 80, (300, 2)), rng.integers(-3, 60, (300, 2))])
    annotations = load(content(*({"bbox": box} for box in boxes.tolist())))[0]["annotations"]
    found = {a["id"]: a["bbox"] for a in annotations}
    canvas = np.zeros((200, 200), bool)
    num_changed = 0
    for number, (x, y, w, h) in enumerate(boxes.tolist(), start=1):
        canvas[:] = False
        canvas[y + 50 : y + 50 + max(h, 0), x + 50 : x + 50 + max(w, 0)] = True
        rows, columns = np.nonzero(canvas[50 : 50 + HEIGHT, 50 : 50 + WIDTH])
        expected = None
        if len(rows):
            corner, end = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
            expected = [*corner, end[0] - corner[0], end[1] - corner[1]]
        assert found.get(number) == expected
        num_changed += expected != [x, y, w, h]
    (record,) = caplog.records
    counts = [int(part.split(" x ")[0].split()[-1]) for part in record.message.split("; ")]
    assert sum(counts) == num_changed


def test_rounding_at_the_border_is_clipped_without_a_word(load, caplog):
    annotations = load(content({"bbox": [50.5, 30.25, 9.51, 9.76]}))[0]["annotations"]
    assert annotations[0]["bbox"] == [50.5, 30.25, 9.5, 9.75]
    assert not caplog.records


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ({"bbox": [1, 2, 0, 5]}, "zero or negative area"),
        ({"bbox": [1, 2, 5, -5]}, "zero or negative area"),
        ({"bbox": [1, 2, float("nan"), 5]}, "NaN"),
        ({"bbox": [float("-inf"), 2, 5, 5]}, "infinity"),
        ({"bbox": [70, 2, 5, 5]}, "outside its image"),
        ({"bbox": [-9, 2, 5, 5]}, "outside its image"),
        ({"bbox": [1, 2, 3]}, "not four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "not four numbers"),
        ({"bbox": None}, "not four numbers"),
    ],
)
def test_annotation_with_a_useless_box_is_dropped(load, caplog, flaw, words):
    dicts = load(content({}, {**flaw, "segmentation": [[1, 2]]}, {}))
    assert [a["id"] for a in dicts[0]["annotations"]] == [1, 3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (words, "annotation 2 of photos/a.jpg", "1 x", "instances.json"):
        assert part in record.message
    assert "polygon" not in record.message


@pytest.mark.parametrize(
    ("segmentation", "kept", "words"),
    [
        ([[1, 1, 5, 5]], None, "fewer than 3 points"),
        ([[1, 1, 5, 5], TRIANGLE], [TRIANGLE], "fewer than 3 points"),
        ([TRIANGLE + [3.0], TRIANGLE], [TRIANGLE], "polygon dropped"),
        ([[1, 1, 5, 5, 3, float("nan")]], None, "polygon dropped"),
        ([[1, 1, 5, 5, 3, "x"]], None, "polygon dropped"),
        (TRIANGLE, None, "polygon dropped"),
        ("polygon", None, "neither polygons nor RLE"),
        ({"size": [WIDTH, HEIGHT], "counts": COUNTS}, None, "does not fit"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 2, 3]}, None, "does not fit"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 1, -1]}, None, "does not fit"),
        ({"size": [HEIGHT, WIDTH]}, None, "does not fit"),
    ],
)
def test_annotation_without_a_usable_outline_keeps_its_box(load, caplog, segmentation, kept, words):
    (annotation,) = load(content({"segmentation": segmentation}))[0]["annotations"]
    assert annotation["bbox"] == [1, 2, 10, 10]
    assert annotation.get("segmentation") == kept
    (record,) = caplog.records
    assert words in record.message
    assert "annotation 1 of photos/a.jpg" in record.message


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_boxes_alone_are_no_flaw(load, caplog, segmentation):
    (annotation,) = load(content({"segmentation": segmentation}))[0]["annotations"]
    assert "segmentation" not in annotation
    assert not caplog.records


def test_one_warning_counts_all_flaws_and_names_the_first(load, caplog):
    load(content(*[{"bbox": [1, 1, 0, 0]}] * 7, *[{"segmentation": [[1, 2]]}] * 2))
    (record,) = caplog.records
    assert "7 x box of zero" in record.message
    assert "annotation 3 of photos/a.jpg, ...)" in record.message
    assert "annotation 4 " not in record.message
    assert "2 x polygon" in record.message


def without(key):
    data = content({})
    del data[key]
    return data


def changed(key, position, **values):
    data = content({}, {})
    data[key][position].update(values)
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"images": [', "must be JSON, got: .*line 1 column 13"),
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ([], "must have a list 'images'"),
        (without("categories"), "must have a list 'categories', got NoneType"),
        (without("images"), "must have a list 'images'"),
        (without("annotations"), "must have a list 'annotations'"),
        ({**content(), "annotations": {}}, "must have a list 'annotations', got dict"),
        (changed("images", 1, id=7), "ids of images must be unique, got 7 twice"),
        (changed("categories", 1, id=90), "ids of categories must be unique, got 90 twice"),
        (changed("annotations", 1, id=1), "ids of annotations must be unique, got 1 twice"),
        (changed("annotations", 1, id="x"), r"annotations\[1\] must have an integer id"),
        (changed("images", 0, id=-1), r"images\[0\] must have an integer id >= 0, got -1"),
        ({**content(), "images": [5]}, r"images\[0\] must have an integer id"),
        (changed("annotations", 1, image_id=8), "annotation 2 must have the image_id .* got 8"),
        (changed("annotations", 0, image_id=[7]), "annotation 1 must have the image_id"),
        (changed("annotations", 1, category_id=5), "annotation 2 must have the category_id .*5"),
        (changed("images", 1, height=None), "image 3 must have .* height"),
        (changed("images", 1, width=0), "image 3 must have .* width"),
        (changed("images", 1, file_name=None), "image 3 must have a file_name or coco_url"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_by_name(load, data, words):
    with pytest.raises(ValueError, match=rf"instances\.json.* {words}"):
        load(data)


def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="must exist, got .*nowhere.json"):
        load_instances_json(tmp_path / "nowhere.json", tmp_path, name)


def test_registration_is_lazy_and_below_the_dataset_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_instances(name, "set/instances.json", "set/images")
    metadata = MetadataCatalog.get(name)
    assert metadata.json_file == str(tmp_path / "set/instances.json")
    assert metadata.image_root == str(tmp_path / "set/images")
    assert metadata.evaluator_type == "fewshot"
    with pytest.raises(FileNotFoundError):
        DatasetCatalog.get(name)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/instances.json").write_text(json.dumps(content({})))
    assert dataset_categories(name) == {4: "ant", 17: "never seen", 90: "zebra"}
    dicts = DatasetCatalog.get(name)
    assert dicts[0]["file_name"] == str(tmp_path / "set/images/a.jpg")
    with pytest.raises(AssertionError, match="already registered"):
        register_instances(name, "other.json", "other")


def test_coco_photos_read_like_detectron2_reads_them(shared_data, name, caplog):
    folder = shared_data / "coco482"
    ours = load_instances_json(folder / "instances.json", folder / "images", name)
    theirs = load_coco_json(
        str(folder / "instances.json"), str(folder / "images"), extra_annotation_keys=["id", "area"]
    )
    crowds = [a for d in ours for a in d["annotations"] if a["iscrowd"]]
    assert all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    assert (len(ours), sum(len(d["annotations"]) for d in ours), len(crowds)) == (482, 4211, 45)
    assert not [r for r in caplog.records if r.name.startswith("fewshot_d2")]
    category_ids = sorted(dataset_categories(name))
    ours = copy.deepcopy(ours)
    for record in ours:
        for annotation in record["annotations"]:
            # detectron2 compresses crowds, and without a data set's name it keeps the json's ids.
            annotation["category_id"] = category_ids[annotation["category_id"]]
            if annotation["iscrowd"]:
                rle = annotation["segmentation"]
                annotation["segmentation"] = mask_util.frPyObjects(rle, *rle["size"])
    by_id = {record["image_id"]: record for record in theirs}
    assert ours == [by_id[record["image_id"]] for record in ours]


def test_logos_have_boxes_only_and_images_without_any(shared_data, name):
    path = shared_data / "flickrlogos27" / "instances.json"
    dicts = load_instances_json(path, path.parent / "images", name)
    assert len(dicts) == 1079
    annotated = {a["image_id"] for a in json.loads(path.read_bytes())["annotations"]}
    assert {d["image_id"] for d in dicts if d["annotations"]} == annotated
    assert sum(len(d["annotations"]) for d in dicts) == 1260
    assert not any("segmentation" in a for d in dicts for a in d["annotations"])
