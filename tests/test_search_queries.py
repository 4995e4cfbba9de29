"""Queries of a search: out of annotations, and drawn by a user in a folder of images."""

import json

import numpy as np
import pytest
from factories import registered_set, write_set
from PIL import Image

from fewshot_d2.data.coco_json import load_instances_json
from fewshot_d2.data.loaders import build_index
from fewshot_d2.data.search_queries import FolderQuery, annotated_queries, folder_dataset


@pytest.fixture
def index(tmp_path):
    """Image 100 has nothing, 101 crowds alone; 102 has two boxes of one size, 103 a larger one of another class."""
    write_set(tmp_path, num_images=5)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 102] + [
        {"id": 90, "image_id": 102, "category_id": 12, "bbox": [1, 2, 10, 20]},
        {"id": 80, "image_id": 102, "category_id": 90, "bbox": [3, 4, 20, 10]},
        {"id": 91, "image_id": 103, "category_id": 5, "bbox": [0, 0, 30, 8]},
        {"id": 92, "image_id": 103, "category_id": 12, "bbox": [0, 0, 30, 9]},
    ]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with registered_set("queries_set", tmp_path):
        yield build_index("queries_set")


def test_annotated_queries(index):
    found = {c: annotated_queries(index, c) for c in ("largest", "all")}
    assert [(q.query_id, q.image_id, q.box, q.label) for q in found["largest"]] == [
        (80, 102, (3.0, 4.0, 23.0, 14.0), 90),
        (92, 103, (0.0, 0.0, 30.0, 9.0), 12),
    ]
    assert sorted(q.query_id for q in found["all"]) == [80, 90, 91, 92]
    assert not any(q.candidates for q in found["all"])
    # Of category 12 there are two.
    assert {q.query_id for q in found["all"]} - {
        q.query_id for q in annotated_queries(index, "all", per_label=1)
    } == {92}


def test_annotated_queries_bad_input(index):
    with pytest.raises(ValueError, match="one of .* got 'best'"):
        annotated_queries(index, "best")
    with pytest.raises(ValueError, match="at least 1 of a label, got 'all' and 0"):
        annotated_queries(index, "all", per_label=0)
    with pytest.raises(ValueError, match="must have annotations, got none in 5 images"):
        annotated_queries(build_index("queries_set", class_ids=()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cup.jpg:1,2,30,40", ("cup.jpg", (1, 2, 31, 42), "")),
        ("a b/c:d.png: 0, .5 ,3,4.5:My cup ", ("a b/c:d.png", (0, 0.5, 3, 5), "My cup")),
        ("1,2,3,4:5,6,7,8:9", ("1,2,3,4", (5, 6, 12, 14), "9")),
    ],
)
def test_query_text(text, expected):
    assert FolderQuery.parse(text) == FolderQuery(*expected)


@pytest.mark.parametrize(
    "text", ["", "cup.jpg", "cup.jpg:1,2,3", "cup.jpg:1,2,3,4,5", ":1,2,3,4", "cup.jpg:1,2,x,4"]
)
def test_query_text_bad_input(text):
    with pytest.raises(ValueError, match="a query must be file:x,y,w,h"):
        FolderQuery.parse(text)


@pytest.fixture
def photos(tmp_path):
    """A folder with an image that is shown turned, one below, two broken ones and a text."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in "ab"]
    pictures[0].save(folder / "b.JPG")
    exif = Image.Exif()
    exif[274] = 6
    pictures[1].save(folder / "below" / "a.jpg", exif=exif)
    (folder / "bad.png").write_bytes(b"no picture")
    content = (folder / "b.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("cup")
    return folder


def test_folder_dataset(photos, tmp_path):
    texts = ("b.JPG:1,2,30,38:cup", "below/a.jpg:0,0,40,60", "b.JPG:5,6,7,8:cup", "b.JPG:0,0,9,9")
    content, queries, broken = folder_dataset(photos, [FolderQuery.parse(t) for t in texts])
    assert broken == ["bad.png", "cut.jpg"]
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("b.JPG", 60, 40),
        ("below/a.jpg", 40, 60),
    ]
    ids = {i["file_name"]: i["id"] for i in content["images"]}
    first, turned, second, last = queries
    assert (first.image_id, first.box) == (ids["b.JPG"], (1, 2, 31, 40))
    assert (turned.image_id, turned.box) == (ids["below/a.jpg"], (0, 0, 40, 60))
    assert first.label == second.label
    assert len({first.label, turned.label, last.label}) == 3
    # The json is one that every other tool reads, and gives the same queries back.
    (tmp_path / "own.json").write_text(json.dumps(content))
    dicts = load_instances_json(tmp_path / "own.json", photos, "folder_set")
    boxes = {a["id"]: (d["image_id"], a["bbox"]) for d in dicts for a in d["annotations"]}
    assert boxes == {
        q.query_id: (q.image_id, [*q.box[:2], q.box[2] - q.box[0], q.box[3] - q.box[1]])
        for q in queries
    }
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert [names[q.label] for q in queries] == ["cup", "query 2", "cup", "query 4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.jpg:1,2,3,4", "query 1 must be a readable one of .*photos, got 'none.jpg'"),
        ("cut.jpg:1,2,3,4", "must be a readable one .* got 'cut.jpg'"),
        (
            "b.JPG:50,2,11,4",
            "query 1 must have an area inside the 60 x 40 pixels of b.JPG, got x 50",
        ),
        ("b.JPG:-1,2,11,4", "inside"),
        ("b.JPG:1,2,0,4", "an area"),
        ("b.JPG:1,2,-5,4", "an area"),
        # The sides before it is turned.
        ("below/a.jpg:0,0,60,40", "inside the 40 x 60"),
    ],
)
def test_folder_dataset_bad_queries(photos, text, message):
    with pytest.raises(ValueError, match=message):
        folder_dataset(photos, [FolderQuery.parse(text)])


def test_folder_without_images(photos, tmp_path):
    for name in ("b.JPG", "below/a.jpg"):
        (photos / name).unlink()
    query = FolderQuery.parse("b.JPG:1,2,3,4")
    with pytest.raises(ValueError, match="photos must have images that can be read, got 2 that"):
        folder_dataset(photos, [query])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must have images"):
        folder_dataset(tmp_path / "empty", [query])
    with pytest.raises(ValueError, match="folder.*nowhere"):
        folder_dataset(tmp_path / "nowhere", [query])
