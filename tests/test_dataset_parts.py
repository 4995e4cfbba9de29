"""Parts of a data set that share no image, and the tool that writes them."""

import copy
import importlib.util
import json
import random

import pytest
from detectron2.data import DatasetCatalog
from factories import CATEGORIES, ROOT, registered_set, write_set

from fewshot_d2.data.dataset_parts import split_images


def run_tool(*arguments):
    path = ROOT / "tools/split_dataset.py"
    spec = importlib.util.spec_from_file_location("split_dataset", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(argument) for argument in arguments])


@pytest.fixture
def content(tmp_path):
    write_set(tmp_path)
    return {**json.loads((tmp_path / "instances.json").read_text()), "info": "kept"}


def ids(part):
    return [image["id"] for image in part["images"]]


def test_parts_make_up_the_whole(content):
    before = copy.deepcopy(content)
    parts = split_images(content, {"train": None, "val": 2, "test": 3}, seed=1)
    assert {name: len(part["images"]) for name, part in parts.items()} == {
        "train": 7,
        "val": 2,
        "test": 3,
    }
    assert sorted(i for part in parts.values() for i in ids(part)) == ids(content)
    every = [a for part in parts.values() for a in part["annotations"]]
    assert sorted(a["id"] for a in every) == [a["id"] for a in content["annotations"]]
    for part in parts.values():
        assert {a["image_id"] for a in part["annotations"]} <= set(ids(part))
        assert ids(part) == sorted(ids(part))
        assert part["categories"] == content["categories"] and part["info"] == "kept"
    assert content == before


def test_images_that_no_part_asks_for_are_left_out(content):
    parts = split_images(content, {"a": 2, "b": 4}, seed=1)
    assert [len(part["images"]) for part in parts.values()] == [2, 4]
    assert not set(ids(parts["a"])) & set(ids(parts["b"]))


def test_draw_depends_on_ids_and_seed_alone(content):
    sizes = {"train": None, "test": 5}
    draws = {seed: tuple(ids(split_images(content, sizes, seed=seed)["test"])) for seed in range(8)}
    assert len(set(draws.values())) > 5
    random.Random(0).shuffle(content["images"])
    shuffled = {seed: sorted(ids(split_images(content, sizes, seed)["test"])) for seed in range(8)}
    assert shuffled == {seed: list(draw) for seed, draw in draws.items()}
    # Each image gets its turn.
    turns = [i for seed in range(60) for i in ids(split_images(content, sizes, seed)["test"])]
    assert set(turns) == set(ids(content))
    assert max(map(turns.count, set(turns))) < 45


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "at least one"),
        ({"a": None, "b": None}, "one of them the rest at most"),
        ({"a": 13}, r"of 12 images together.* got \{'a': 13\}"),
        ({"a": 12, "b": None}, "of 12 images together"),
        ({"a": 0, "b": None}, "at least one image, got {'a': 0, 'b': 12}"),
    ],
)
def test_sizes_that_do_not_fit(content, sizes, words):
    with pytest.raises(ValueError, match=words):
        split_images(content, sizes, seed=0)


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_one_photo_under_two_names_is_refused(content, key):
    content["images"][3][key] = content["images"][8][key]
    with pytest.raises(ValueError, match="ids and files of their own, got .* 12 images"):
        split_images(content, {"a": 6, "b": 6}, seed=0)


def test_tool_writes_files_that_can_be_registered(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    run_tool("--json", "instances.json", "--parts", "train", "test=4", "--output", "parts")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        str(tmp_path / "parts" / f"instances_{name}.json") for name in ("train", "test")
    ]
    assert "  sha256 " in lines[1] and "  4 images, " in lines[1]
    expected = split_images(
        json.loads((tmp_path / "instances.json").read_text()), {"train": None, "test": 4}, 0
    )
    for name in ("train", "test"):
        written = json.loads((tmp_path / "parts" / f"instances_{name}.json").read_text())
        assert written == expected[name]
    (tmp_path / "instances.json").write_text(json.dumps(expected["test"]))
    with registered_set("part_set", tmp_path):
        assert len(DatasetCatalog.get("part_set")) == 4
        assert len(expected["test"]["categories"]) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "a=x"], "split_dataset: --parts must be name=number or name"),
        (["--parts", "a", "a=2"], "each name once, got a a=2"),
        (["--parts", "../a=2"], "each name once"),
        (["--parts", "a=99"], "of 12 images together"),
        (["--json", "none.json", "--parts", "a=2"], "annotation file must exist, got .*none.json"),
    ],
)
def test_tool_ends_with_one_line_on_bad_input(content, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match=words):
        run_tool("--json", "instances.json", "--output", "parts", *arguments)
    assert not (tmp_path / "parts").exists()
