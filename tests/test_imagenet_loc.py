"""ImageNet-LOC: the published class lists, the XML of VOC, and a small tree of files."""

import hashlib

import pytest
from factories import ROOT

from fewshot_d2.data.coco_json import dataset_categories
from fewshot_d2.data.datasets.imagenet_loc import class_list, load_imagenet_loc
from fewshot_d2.data.voc_xml import VocObject, read_voc_xml

OBJECT = """<object><name>{}</name><difficult>{}</difficult><truncated>0</truncated><bndbox><xmin>{}</xmin>
<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def annotation(*objects):
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(OBJECT.format(*o) for o in objects)}</annotation>"


def test_lists_are_those_of_the_benchmark():
    train, test = class_list("train101"), class_list("test214")
    assert (len(train), len(test)) == (101, 214) and not set(train) & set(test)
    # From the specification.
    assert [
        hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest() for ids in (train, test)
    ] == [
        "01fb6e4bfc76b80fb281599570e83c6cad89c462713d551f01479b86fcfcab60",
        "1b76ec3fa5d2b01570c6c021561d12c888b51c0b923239ff1542d8b637db4706",
    ]
    assert train[0] == "n02119789" and train[-1] == "n02364673"


def test_boxes_of_voc_are_one_based_and_include_their_last_pixel(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(annotation(("cat", 1, 1, 2, 10, 20), ("dog", 0, 5, 5, 5, 5)))
    image = read_voc_xml(path)
    assert (image.height, image.width) == (30, 40)
    assert image.objects == (
        VocObject("cat", (0, 1, 10, 20), True, False),
        VocObject("dog", (4, 4, 5, 5), False, False),
    )
    assert read_voc_xml(path, first_pixel=0).objects[0].box == (1, 2, 11, 21)


@pytest.mark.parametrize(
    "content",
    [
        "<annotation",
        "<annotation/>",
        annotation().replace("30", "tall"),
        annotation(("cat", 0, 1, 1, 9, "x")),
        annotation().replace("<annotation>", "<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>"),
        annotation(("cat", 0, 1, 1, 9, 9)).replace("<name>cat</name>", ""),
    ],
)
def test_other_xml_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.xml").write_text(content)
    with pytest.raises(ValueError, match="broken.xml must be"):
        read_voc_xml(tmp_path / "broken.xml")


def test_a_tree_becomes_dataset_dicts(tmp_path):
    for wnid, stem, objects in (
        ("n1", "n1_5", [("n1", 0, 0, 0, 9, 9), ("n9", 0, 1, 1, 5, 5), ("n2", 0, 3, 3, 12, 12)]),
        ("n2", "n2_7", [("n2", 0, 2, 4, 41, 8)]),
    ):
        folder = tmp_path / "Annotations/CLS-LOC/train" / wnid
        folder.mkdir(parents=True)
        (folder / f"{stem}.xml").write_text(annotation(*objects))
    dicts = load_imagenet_loc(tmp_path, ["n2", "n1"], "tiny_imagenet_loc")
    assert dataset_categories("tiny_imagenet_loc") == {1: "n2", 2: "n1"}
    files = [d["file_name"] for d in dicts]
    assert files == [f"{tmp_path}/Data/CLS-LOC/train/{f}.JPEG" for f in ("n2/n2_7", "n1/n1_5")]
    found = [(a["category_id"], a["bbox"]) for d in dicts for a in d["annotations"]]
    # Another class is left out; what sticks out of its image is clipped.
    assert found == [(0, [2, 4, 38, 5]), (1, [0, 0, 10, 10]), (0, [3, 3, 10, 10])]
    assert len({a["id"] for d in dicts for a in d["annotations"]}) == 3
    with pytest.raises(FileNotFoundError, match="n3; see datasets/README.md"):
        load_imagenet_loc(tmp_path, ["n3"], "tiny_imagenet_loc")


def test_layout_is_documented():
    text = (ROOT / "datasets/README.md").read_text()
    assert "imagenet_loc/" in text and "imagenet_loc_repmet_train101" in text
