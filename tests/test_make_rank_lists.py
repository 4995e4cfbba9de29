"""tools/make_rank_lists.py on a registered set, on a folder of images, and on lists of another search."""

import importlib.util
import json

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import (
    ROOT,
    TINY_SPIL,
    TINY_SPIL_OVERRIDES,
    registered_set,
    write_set,
)
from retrieval_cases import TINY_RETRIEVAL, TINY_RETRIEVAL_OVERRIDES

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_index, build_training_episodes
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.data.search_queries import annotated_queries

CONFIG = ["--config-file", TINY_RETRIEVAL]


def run_tool(*arguments):
    path = ROOT / "tools/make_rank_lists.py"
    spec = importlib.util.spec_from_file_location("make_rank_lists", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    # The networks are untrained: equal ones at each call.
    torch.manual_seed(0)
    tool.main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    write_set(path, num_images=5)
    with registered_set("lists_set", path):
        yield path
    DatasetCatalog.pop("photos", None)
    MetadataCatalog.pop("photos", None)


def test_tool_searches_a_data_set(folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [*CONFIG, "--dataset", "lists_set", "--output", output]
    run_tool(*arguments, *TINY_RETRIEVAL_OVERRIDES)
    lists = RankLists.load(output / "rank_lists.json")
    index = build_index("lists_set")
    queries = annotated_queries(index)
    assert [(q.query_id, q.box, q.label) for q in lists] == [
        (q.query_id, q.box, q.label) for q in queries
    ]
    assert all(len(row.candidates) == 4 for row in lists)
    lists.check(index, index)
    printed = capsys.readouterr().out
    assert f"{output / 'rank_lists.json'}  sha256 {lists.sha256}" in printed
    assert "3 queries of lists_set, 4 to 4 candidates each, 5 images of lists_set" in printed
    run_tool("--import", output / "rank_lists.json")
    assert f"sha256 {lists.sha256}" in capsys.readouterr().out

    run_tool(*arguments, "--queries", "all", *TINY_RETRIEVAL_OVERRIDES)
    assert len(RankLists.load(output / "rank_lists.json")) == len(annotated_queries(index, "all"))
    assert len(list(output.glob("regions-*"))) == 1, "regions are read again"


def test_tool_searches_a_folder_and_says_how_to_train_on_it(folder, tmp_path, capsys):
    output = tmp_path / "out"
    (folder / "bad.png").write_bytes(b"no picture")
    queries = ["--query", "1.png:5,5,30,30:cup", "--query", "2.png:0,0,60,40"]
    arguments = [*CONFIG, "--images", folder, *queries, "--output", output]
    run_tool(*arguments, *TINY_RETRIEVAL_OVERRIDES)
    printed = capsys.readouterr().out
    assert "left out, cannot be read: bad.png" in printed
    assert "instances.json  5 images, 1 left out" in printed
    lists = RankLists.load(output / "rank_lists.json")
    assert [row.box for row in lists] == [(5, 5, 35, 35), (0, 0, 60, 40)]
    assert (lists.dataset, lists.query_dataset) == ("photos", "photos")
    assert all(len(row.candidates) == 4 for row in lists)

    # A process that knows nothing but the printed lines trains on the lists.
    DatasetCatalog.remove("photos")
    MetadataCatalog.remove("photos")
    lines = printed.split("train_self_paced.py:\n")[1]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"_BASE_": str(TINY_SPIL), **yaml.safe_load(lines)}))
    cfg = load_config(str(own), [*TINY_SPIL_OVERRIDES, "FEWSHOT.NUM_SHOTS", 2])
    cfg.FEWSHOT.SUPERPIXELS.FOLDER = str(tmp_path / "superpixels")
    assert "instances" in build_training_episodes(cfg)[0]


@pytest.fixture
def foreign(folder, tmp_path):
    """A file as another program writes it."""
    candidates = [{"image_id": 103, "score": 2, "box": [0, 0, 9, 9]}]
    query = {"query_id": 1, "image_id": 101, "box": [5, 5, 30, 30], "label": 1}
    content = {
        "format": "fewshot_d2/rank_lists",
        "version": 1,
        "dataset": "lists_set",
        "query_dataset": "lists_set",
        "method": "by hand",
        "lists": [{**query, "candidates": candidates}],
    }
    return tmp_path / "foreign.json", content


def test_tool_checks_lists_of_another_search(foreign, capsys):
    path, content = foreign
    path.write_text(json.dumps(content))
    run_tool("--import", path)
    printed = capsys.readouterr().out
    assert "1 queries of lists_set, 1 to 1 candidates each" in printed and "by hand" in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "nobody"}, "data set must be registered, got 'nobody'"),
        ({"lists": []}, "foreign.json must be a rank-list file"),
        ("image", "query 1 of the rank lists must fit the data sets: .*99"),
        ("box", "query 1 .* in image 103 must have an area inside its 60 x 40"),
    ],
)
def test_tool_names_what_is_wrong_in_other_lists(foreign, change, words):
    path, content = foreign
    (candidate,) = content["lists"][0]["candidates"]
    if change == "image":
        candidate["image_id"] = 99
    elif change == "box":
        candidate["box"] = [70, 0, 90, 9]
    else:
        content.update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=words):
        run_tool("--import", path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "nobody"], "data set must be registered, got 'nobody'"),
        (["--dataset", "lists_set", "--query-dataset", "nobody"], "got 'nobody'"),
        (
            ["--images", "{folder}", "--query", "1.png:1,2,3"],
            "a query must be .* got '1.png:1,2,3'",
        ),
        (["--images", "{folder}", "--query", "9.png:1,2,3,4"], "readable one of .* got '9.png'"),
        (["--images", "{folder}", "--query", "1.png:1,2,99,4"], "inside the 60 x 40 pixels of 1.p"),
        (["--images", "{folder}/no", "--query", "1.png:1,2,3,4"], "folder that exists, got .*no"),
        (
            ["--images", "{folder}", "--name", "lists_set", "--query", "1.png:1,2,3,4"],
            "--name must be a new one, got 'lists_set'",
        ),
    ],
)
def test_tool_ends_with_one_line_on_bad_input(folder, tmp_path, arguments, words):
    arguments = [a.format(folder=folder) for a in arguments]
    with pytest.raises(SystemExit, match=f"make_rank_lists: .*{words}"):
        run_tool(*CONFIG, *arguments, "--output", tmp_path / "out", *TINY_RETRIEVAL_OVERRIDES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["--dataset", "x"], "--config-file and --output must be given"),
        (["--images", "x", "--config-file", "y", "--output", "z"], "--images and --query"),
        (["--dataset", "x", "--images", "y"], "not allowed"),
        (["--dataset", "x", "--queries", "best"], "invalid choice"),
    ],
)
def test_tool_refuses_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        run_tool(*arguments)
    assert words in capsys.readouterr().err
