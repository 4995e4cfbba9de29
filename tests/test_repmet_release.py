"""The converter of RepMet's pickles: both forms of episodes, and files that must not be trusted."""

import json
import pickle
import runpy
import sys

import numpy as np
import pytest
from factories import ROOT

from fewshot_d2.data.benchmark_plans import BenchmarkPlan
from fewshot_d2.data.coco_json import contiguous_ids, load_instances_json
from fewshot_d2.data.index import InstanceIndex
from fewshot_d2.data.repmet_release import convert_release

PREFIX = "/somewhere/ILSVRC/"


def roidb():
    boxes = [[[0, 0, 9, 9], [10, 10, 19, 29]], [[5, 5, 14, 14]], [[1, 2, 10, 20]], [[0, 0, 4, 4]]]
    classes = [[1, 2], [2], [1], [3]]
    entries = [
        {
            "image": f"{PREFIX}Data/{i}.JPEG",
            "boxes": np.array(b, np.uint16),
            "gt_classes": np.array(c),
            "width": 40,
            "height": 30,
        }
        for i, (b, c) in enumerate(zip(boxes, classes, strict=True))
    ]
    return {"roidb": entries, "cls2img": {}, "classes": ["__background__", "fox", "dog", "cat"]}


def by_index():
    return [
        {
            "epi_cats": [1, 2],
            "train_nImg": {1: [0], 2: [0]},
            "query_images": {1: [2], 2: np.array([1])},
        },
        {"epi_cats": [2, 3], "train_nImg": {2: [1], 3: []}, "query_images": {2: [0], 3: [3]}},
    ]


def by_path():
    path = f"{PREFIX}Data/{{}}.JPEG".format
    return [
        {
            "epi_cats": [1, 2],
            "epi_cats_names": ["fox", "dog"],
            "train_boxes": [
                [1, "fox", path(0), [0, 0, 9, 9]],
                [2, "dog", path(0), [10, 10, 19, 29]],
            ],
            "query_images": [path(2), path(1)],
            "query_gt": [],
        },
        {
            "epi_cats": [2, 3],
            "train_boxes": [[2, "dog", path(1), [5, 5, 14, 14]]],
            "query_images": [path(0), path(3)],
        },
    ]


@pytest.fixture
def convert(tmp_path):
    def run(episodes, images=None, **options):
        for name, content in (("roidb.pkl", images or roidb()), ("episodes.npz", episodes)):
            data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            (tmp_path / name).write_bytes(data)
        values = {"dataset": "released", "prefix": PREFIX, "shots": 1, **options}
        files = tmp_path / "roidb.pkl", tmp_path / "episodes.npz", tmp_path / "out"
        return convert_release(*files, **values)

    return run


@pytest.mark.parametrize("episodes", [by_index, by_path])
def test_both_forms_give_the_same_plan_on_the_same_boxes(convert, tmp_path, episodes):
    plan = convert(episodes())
    assert BenchmarkPlan.load(tmp_path / "out" / plan.file_name) == plan
    dicts = load_instances_json(tmp_path / "out/instances.json", "photos", "released_test")
    index = InstanceIndex(dicts, {i: c for c, i in contiguous_ids("released_test").items()})
    plan.check(index, index, "released")
    assert [e.class_ids for e in plan.episodes] == [(1, 2), (2, 3)]
    assert [e.query_image_ids for e in plan.episodes] == [(2, 1), (0, 3)]
    assert plan.episodes[1].supports[1] == ()

    def place(annotation_id):
        image, position = index.locate(annotation_id)
        return dicts[image]["file_name"], dicts[image]["annotations"][position]["bbox"]

    (fox,), (dog,) = plan.episodes[0].supports
    assert place(fox) == ("photos/Data/0.JPEG", [0, 0, 10, 10])
    assert place(dog) == ("photos/Data/0.JPEG", [10, 10, 10, 20])
    ((other,), _) = plan.episodes[1].supports
    assert place(other) == ("photos/Data/1.JPEG", [5, 5, 10, 10])


def test_ids_count_from_one_with_or_without_a_name_for_background(convert, tmp_path):
    named = {}
    for classes in (["__background__", "fox", "dog", "cat"], ["fox", "dog", "cat"]):
        convert(by_index(), {**roidb(), "classes": classes})
        content = json.loads((tmp_path / "out/instances.json").read_text())
        named[len(classes)] = {c["id"]: c["name"] for c in content["categories"]}
    assert named[3] == named[4] == {1: "fox", 2: "dog", 3: "cat"}


def test_image_that_stands_there_again_flipped_is_its_first_self(convert):
    images = roidb()
    for entry in images["roidb"][:]:
        boxes = 39 - entry["boxes"][:, [2, 1, 0, 3]]
        images["roidb"].append({**entry, "boxes": boxes, "flipped": True})
    assert convert(by_path(), images) == convert(by_path())


def test_image_without_boxes_is_an_image(convert, tmp_path):
    images = roidb()
    images["roidb"][2] |= {"boxes": np.zeros((0, 4)), "gt_classes": np.zeros(0, int)}
    convert(by_index(), images)
    content = json.loads((tmp_path / "out/instances.json").read_text())
    assert [i["id"] for i in content["images"]] == [0, 1, 2, 3]
    assert {a["image_id"] for a in content["annotations"]} == {0, 1, 3}


def damaged(**changes):
    images = roidb()
    images["roidb"][2] |= changes
    return images


def test_every_box_in_a_support_image_is_a_shot_of_its_class_up_to_the_limit(convert):
    episodes = [{**by_index()[0], "train_nImg": {1: [0, 2], 2: [0, 1]}, "query_images": {1: [3]}}]
    assert [len(ids) for ids in convert(episodes, shots=2).episodes[0].supports] == [2, 2]
    assert [len(ids) for ids in convert(episodes, shots=1).episodes[0].supports] == [1, 1]


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("episodes", "images", "words"),
    [
        ([Evil()], None, "episodes.npz must be a pickle of the release, got: only arrays"),
        (by_index(), {**roidb(), "x": Evil()}, "roidb.pkl must be a pickle of the release"),
        (b"no pickle", None, "episodes.npz must be a pickle of the release"),
        # A dtype that numpy does not know, and a codec that Python does not.
        (b"\x80\x02cnumpy\ndtype\n(X\x03\x00\x00\x00zzztR.", None, "must be a pickle .*zzz"),
        (
            b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x01\x00\x00\x00btR.",
            None,
            "must be a p",
        ),
        (by_index(), [1], "roidb.pkl must hold a dict with 'roidb'"),
        (by_index(), {**roidb(), "classes": 5}, "roidb.pkl must hold a dict with 'roidb'"),
        (by_index(), damaged(gt_classes=[1, 2]), "roidb.pkl: image 2 .* each of 1 boxes"),
        (by_index(), damaged(gt_classes=[4]), r"roidb.pkl: image 2 .* must be 1..3, got \[4\]"),
        (by_index(), damaged(width="wide"), "roidb.pkl: image 2 must be complete"),
        ([1], None, "episode 0 must fit .* dict with 'epi_cats' must be there, got int"),
        ([{**by_index()[0], "epi_cats": [0, 1]}], None, r"must be 1..3, got \[0, 1\]"),
        ([{**by_index()[0], "epi_cats": [1, 1]}], None, "episodes.npz must give .* unique"),
        ([{**by_index()[0], "query_images": [1]}], None, "episode 0 .* must be dicts by class"),
        ([{**by_index()[0], "query_images": {}}], None, "episodes.npz must give .* got 2, 1, 0"),
        ([], None, "episodes.npz must hold a list of episodes"),
        ([{"epi_cats": [1]}], None, "episode 0 must fit .*train_nImg"),
        ([{**by_index()[0], "query_images": {1: [99]}}], None, "episode 0 .* one of 4, got 99"),
        (
            [{**by_path()[0], "query_images": ["/else.JPEG"]}],
            None,
            "episode 0 must fit .*else.JPEG",
        ),
        (
            [
                {
                    **by_path()[0],
                    "train_boxes": [[1, "fox", f"{PREFIX}Data/0.JPEG", [10, 10, 19, 29]]],
                }
            ],
            None,
            "support must be a box of class 1",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(convert, capsys, episodes, images, words):
    with pytest.raises(ValueError, match=words):
        convert(episodes, images)
    assert "executed" not in capsys.readouterr().out


def test_tool_tells_the_true_number_of_episodes(convert, tmp_path, capsys, monkeypatch):
    convert(by_index())
    arguments = ["--roidb", "roidb.pkl", "--episodes", "episodes.npz", "--shots", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool", *arguments, "--prefix", PREFIX, "--output", "new"])
    runpy.run_path(str(ROOT / "tools/convert_repmet_episodes.py"), run_name="__main__")
    assert "2 episodes of 2 classes, 3 classes, 1 without an example" in capsys.readouterr().out
    content = json.loads((tmp_path / "new/instances.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["fox", "dog", "cat"]
    (tmp_path / "roidb.pkl").write_bytes(b"")
    with pytest.raises(SystemExit, match="convert_repmet_episodes: .*roidb.pkl"):
        runpy.run_path(str(ROOT / "tools/convert_repmet_episodes.py"), run_name="__main__")
