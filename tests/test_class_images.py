"""Data sets with an image of each class: CSV files of shelves and INSTRE's Matlab file, on a few small pictures."""

import csv

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import ROOT
from PIL import Image
from scipy.io import savemat

from fewshot_d2 import load_config
from fewshot_d2.data.class_images import read_csv
from fewshot_d2.data.coco_json import dataset_categories
from fewshot_d2.data.datasets.instre import boxes_of, register_instre
from fewshot_d2.data.datasets.retail import SETS, register_retail
from fewshot_d2.engine.evaluate import evaluation_plans

HEADER = "imageid,classid,gtbboxid,difficult,lx,ty,rx,by,split"
# Images of 80 x 40 pixels; class 12 is in two images, 40 and 7 in the validation only, 7 is a new class.
ROWS = [
    "3,12,100,0,0.25,0.5,0.5,1.0,train",
    "3,40,101,1,0.0,0.0,0.125,0.25,train",
    "9,12,102,0,0.5,0.25,0.75,0.5,val-old-cl",
    "9,7,103,1,0.0,0.5,0.25,0.75,val-new-cl",
    "5,7,104,0,0.1,0.1,0.4,0.6,val-new-cl",
]


def picture(path, width=80, height=40, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def catalogue(monkeypatch):
    """Lets a test register the sets again, for its own files."""
    names = {*DatasetCatalog.list()}
    kept = {
        n: DatasetCatalog.data[n]
        for n in names
        if n.startswith(("grozi", "dairy", "paste", "instre"))
    }
    for name in kept:
        DatasetCatalog.data.pop(name)
        MetadataCatalog.data.pop(name, None)
    yield
    for name in kept:
        MetadataCatalog.data.pop(name, None)
    DatasetCatalog.data.update(kept)


@pytest.fixture
def shelves(tmp_path, catalogue):
    for folder, images in (
        ("grozi", "src/3264"),
        ("dairy", "src/original"),
        ("paste", "src/original"),
    ):
        base = tmp_path / folder
        for number in (3, 9, 5):
            picture(base / images / f"{number}.jpg")
        for number in (12, 40, 7):
            picture(base / "classes/images" / f"{number}.jpg", width=number + 1, height=20)
        (base / "classes" / f"{folder}.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    register_retail(tmp_path)
    return tmp_path


def annotations(name):
    """{annotation id: (image id, class id, XYWH, difficult)} of a registered set."""
    classes = list(dataset_categories(name))
    return {
        a["id"]: (d["image_id"], classes[a["category_id"]], a["bbox"], a.get("difficult", 0))
        for d in DatasetCatalog.get(name)
        for a in d["annotations"]
    }


def test_shelves_are_read_as_released(shelves):
    assert annotations("grozi_train") == {
        100: (3, 12, [20, 20, 20, 20], 0),
        101: (3, 40, [0, 0, 10, 10], 1),
    }
    assert list(dataset_categories("grozi_train").items()) == [(12, "12"), (40, "40")]
    assert [d["image_id"] for d in DatasetCatalog.get("grozi_train")] == [3]
    # Sets of validation share their images, not their classes and boxes.
    for name, ids in (("old_cl", {102}), ("new_cl", {103, 104}), ("all", {102, 103, 104})):
        assert set(annotations(f"grozi_val_{name}")) == ids
        assert [d["image_id"] for d in DatasetCatalog.get(f"grozi_val_{name}")] == [9, 5]
    assert set(dataset_categories("grozi_val_new_cl")) == {7}
    for record in DatasetCatalog.get("dairy"):
        assert (
            Image.open(record["file_name"]).size == (record["width"], record["height"]) == (80, 40)
        )
        assert "/dairy/src/original/" in record["file_name"]
    assert len(annotations("dairy")) == 5
    # In paste_v some orientations are difficult, in paste_f nothing is.
    assert [a[3] for a in annotations("paste_v").values()] == [0, 1, 0, 1, 0]
    assert not any(a[3] for a in annotations("paste_f").values())
    assert all(name in DatasetCatalog.list() for name in SETS)


def test_each_class_brings_its_exemplar(shelves):
    records = DatasetCatalog.get("dairy_support")
    assert list(dataset_categories("dairy_support")) == [7, 12, 40]
    for record, (image_id, class_id, box, difficult) in zip(
        records, annotations("dairy_support").values(), strict=True
    ):
        assert record["file_name"].endswith(f"dairy/classes/images/{class_id}.jpg")
        assert box == [0, 0, class_id + 1, 20] and not difficult and record["image_id"] == image_id
    assert [c for _, c, _, _ in annotations("grozi_val_new_cl_support").values()] == [7]


def test_plan_searches_with_the_exemplars(shelves, tmp_path):
    config = ROOT / "configs/os2d/Base-grozi-data.yaml"
    (plan,) = evaluation_plans(load_config(str(config), ["OUTPUT_DIR", str(tmp_path / "out")]))
    assert plan.class_ids == (7,) and dict(plan.fixed_supports) == {7: (0,)}
    assert [e.image_id for e in plan.episodes] == [9, 5]


def test_names_of_files_may_be_given(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*HEADER.split(",")[:-1], "imagefilename", "classfilename"])
        writer.writerow([1, 2, 3, 0, 0, 0, 1, 1, "shelf, left.png", "tea.png"])
        writer.writerow([1, 2, 4, "True", 0, 0, 1, 1, "", ""])
    (first, class_file), (second, other_file) = read_csv(path)
    assert (first.image_file, class_file, first.difficult) == ("shelf, left.png", "tea.png", False)
    assert (second.image_file, other_file, second.difficult) == ("1.jpg", "2.jpg", True)
    assert first.split == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imageid,classid\n1,2\n", "own.csv must have the columns .* got none of .*gtbboxid"),
        ("", "must have the columns"),
        (f"{HEADER}\n1,a,3,0,0,0,1,1,train\n", "own.csv, line 2 must have whole ids"),
        (f"{HEADER}\n1,2,3,maybe,0,0,1,1,train\n", "line 2 must have .* difficult 0 or 1"),
        (f"{HEADER}\n1,2,3,0,0,0,1\n", "line 2 must have .* four corners"),
    ],
)
def test_bad_csv_is_refused(tmp_path, text, message):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "own.csv")


def test_missing_files_are_named(shelves):
    (shelves / "dairy/src/original/9.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match="image must exist, got .*9.jpg; see datasets/README"
    ):
        DatasetCatalog.get("dairy")
    (shelves / "dairy/classes/images/40.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="40.jpg must be a readable image"):
        DatasetCatalog.get("dairy_support")
    (shelves / "paste/classes/paste.csv").unlink()
    with pytest.raises(FileNotFoundError, match="annotation file must exist, got .*paste.csv"):
        DatasetCatalog.get("paste_v")
    text = "\n".join([f"{HEADER},classfilename", f"{ROWS[0]},a.jpg", f"{ROWS[2]},b.jpg"])
    (shelves / "grozi/classes/grozi.csv").write_text(text)
    with pytest.raises(ValueError, match="must have rows of .*val-new-cl.* got none"):
        DatasetCatalog.get("grozi_val_new_cl")
    (shelves / "grozi/classes/grozi.csv").write_text(text.replace("val-old-cl", "train"))
    with pytest.raises(ValueError, match="class 12 must have one image, got a.jpg and b.jpg"):
        DatasetCatalog.get("grozi_train")


def cells(texts):
    """A Matlab cell array of texts."""
    array = np.empty((1, len(texts)), dtype=object)
    array[0, :] = texts
    return array


@pytest.fixture
def instre(tmp_path, catalogue):
    """Twenty queries of S1 with two true images each, one of M among all, and four queries of S2."""
    queries = [f"INSTRE-S1/{i // 5:02d}{'ab'[i // 5 % 2]}_thing/q{i}.jpg" for i in range(20)]
    queries += ["INSTRE-M/01_two/q.jpg"]
    queries += [f"INSTRE-S2/{i:02d}_house/q{i}.jpg" for i in range(4)]
    images = [f"INSTRE-S1/{i:02d}a_thing/{i}.jpg" for i in range(20)]
    images += ["INSTRE-M/01_two/x.jpg", "INSTRE-S2/00_house/y.jpg"]
    truth = np.empty((1, len(queries)), dtype=[("ok", object), ("bbx", object)])
    for i, query in enumerate(queries):
        # Numbers of Matlab: the image of the same number, and the last but one for S1.
        positives = [22] if query.startswith("INSTRE-S2") else [min(i, 19) + 1, 21]
        truth[0, i] = np.array([positives]), np.array([[4, 6, 24, 36]])
    for file in {*queries, *images}:
        picture(tmp_path / file)
    for i, file in enumerate(images):
        lines = ["1 2 30 20"] if "-M/" not in file else ["0 0 10 10", "40 20 20 10"]
        lines += [f"{i} 0 5 5"] if "S2" in file else []
        (tmp_path / file).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    savemat(
        tmp_path / "gnd_instre.mat",
        {"qimlist": cells(queries), "imlist": cells(images), "gnd": truth},
    )
    register_instre(tmp_path)
    return tmp_path


def test_queries_of_instre_are_classes_in_file_order(instre):
    classes = {
        part: list(dataset_categories(f"instre_s1_{part}")) for part in ("train", "val", "test")
    }
    assert classes == {"train": [*range(15)], "val": [15], "test": [16, 17, 18, 19]}
    assert dataset_categories("instre_s1_val") == {15: "00015_INSTRE-S1_03b_thing_q15"}
    found = annotations("instre_s1_test")
    # Images are numbered from 0; that of two objects has the query's one: here of folders "b".
    assert sorted(found.values()) == sorted(
        row
        for i in (16, 17, 18, 19)
        for row in ((i, i, [1, 2, 30, 20], 0), (20, i, [40, 20, 20, 10], 0))
    )
    of_a = {row for row in map(str, annotations("instre_s1_train").values()) if "[0" in row}
    assert len(of_a) == 10, "queries of folders 00a and 02a"
    support = annotations("instre_s1_test_support")
    assert [row[1:3] for row in support.values()] == [(i, [4, 6, 20, 30]) for i in (16, 17, 18, 19)]
    files = [d["file_name"] for d in DatasetCatalog.get("instre_s1_test_support")]
    assert files[0].endswith("INSTRE-S1/03b_thing/q16.jpg")
    # Several boxes of one image all count.
    assert [row[2] for row in annotations("instre_s2_train").values()][:2] == [
        [1, 2, 30, 20],
        [21, 0, 5, 5],
    ]
    assert list(dataset_categories("instre_s2_test")) == [24]


def test_bad_instre_is_refused(instre):
    with pytest.raises(ValueError, match="must have two boxes for objects a and b, got 1"):
        (instre / "INSTRE-M/01_two/x.txt").write_text("0 0 10 10\n")
        boxes_of(instre, "INSTRE-M/01_two/x.jpg", "INSTRE-S1/00a_thing/q.jpg")
    (instre / "INSTRE-M/01_two/x.txt").write_text("0 0 10 10\n0 0 10 10\n")
    (instre / "INSTRE-S1/19a_thing/19.txt").write_text("0 0 10\n")
    with pytest.raises(ValueError, match="19.txt must have lines 'x y width height'"):
        DatasetCatalog.get("instre_s1_test")
    (instre / "INSTRE-S1/19a_thing/19.txt").unlink()
    with pytest.raises(FileNotFoundError, match="boxes must exist, got .*19.txt"):
        DatasetCatalog.get("instre_s1_test")
    (instre / "gnd_instre.mat").write_bytes(b"no matlab file, " * 20)
    with pytest.raises(ValueError, match="gnd_instre.mat must be a Matlab file"):
        DatasetCatalog.get("instre_s2_test")
    (instre / "gnd_instre.mat").unlink()
    with pytest.raises(FileNotFoundError, match="annotation file must exist, got .*gnd_instre.mat"):
        DatasetCatalog.get("instre_s2_test_support")


def test_numbers_of_matlab_that_are_too_high_are_refused(instre):
    truth = np.empty((1, 1), dtype=[("ok", object), ("bbx", object)])
    truth[0, 0] = np.array([[3]]), np.array([[0, 0, 5, 5]])
    content = {"qimlist": cells(["INSTRE-S1/a.jpg"]), "imlist": cells(["b.jpg", "c.jpg"])}
    savemat(instre / "gnd_instre.mat", {**content, "gnd": truth})
    with pytest.raises(ValueError, match="true images of 2 for each of 1 queries"):
        DatasetCatalog.get("instre_s1_test")
    truth[0, 0] = np.array([[1]]), np.array([[0, 0, 5]])
    savemat(instre / "gnd_instre.mat", {**content, "gnd": truth})
    with pytest.raises(ValueError, match="a box of four numbers for each query"):
        DatasetCatalog.get("instre_s1_test")
