"""tools/make_episodes.py on a json of one's own."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fewshot_d2.data.benchmark_plans import BenchmarkPlan
from fewshot_d2.data.plans import EvaluationPlan
from fewshot_d2.data.tuple_plans import TuplePlan

ROOT = Path(__file__).resolve().parent.parent


def run_tool(*arguments):
    spec = importlib.util.spec_from_file_location("make_episodes", ROOT / "tools/make_episodes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(argument) for argument in arguments])


@pytest.fixture
def own_json(tmp_path, monkeypatch):
    """A small json below DETECTRON2_DATASETS and the arguments that name it."""
    name = "test_plans_own"
    rng = np.random.default_rng(0)
    annotations = [
        {"id": i, "image_id": i % 9, "category_id": int(rng.choice([5, 8])), "bbox": [0, 0, 4, 4]}
        for i in range(30)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in range(9)]
    categories = [{"id": 5, "name": "cup"}, {"id": 8, "name": "fork"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield ["--dataset", name, "--json", "own.json", "--images", "photos"]
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_tool_writes_and_names_one_plan_a_run(own_json, tmp_path, capsys):
    output = tmp_path / "plans"
    run_tool(*own_json, "--split", "novel:fork", "--runs", 3, "--max-images", 4, "--output", output)
    lines = capsys.readouterr().out.splitlines()
    plans = [EvaluationPlan.load(line.split("  ")[0]) for line in lines]
    assert [plan.run for plan in plans] == [0, 1, 2]
    assert {plan.class_ids for plan in plans} == {(8,)}
    for line, plan in zip(lines, plans, strict=True):
        assert f"sha256 {plan.sha256}" in line
        assert line.endswith(f"{len(plan.episodes)} episodes, {plan.num_pairs} pairs")
    assert len(list(output.iterdir())) == 3


def test_tool_writes_tuples_that_differ_in_their_shots_alone(own_json, tmp_path, capsys):
    options = ["--side", "all", "--tuples", 6, "--shots", 1, 2, "--min-area", 0.1]
    run_tool(*own_json, *options, "--output", tmp_path / "plans")
    lines = capsys.readouterr().out.splitlines()
    one, two = (TuplePlan.load(line.split("  ")[0]) for line in lines)
    assert (one.shots, two.shots, one.max_shots, one.seed) == (1, 2, 2, 9001)
    assert one.ground_truth == "area at least 0.1" and len(one.episodes) == 6
    for few, more in zip(one.episodes, two.episodes, strict=True):
        assert few.query_image_ids == more.query_image_ids
        assert few.supports[0] == more.supports[0][:1]
    with pytest.raises(SystemExit, match="must have a class with 20 support images"):
        run_tool(*own_json[:2], "--side", "all", "--tuples", 6, "--shots", 20, "--output", tmp_path)
    with pytest.raises(SystemExit):
        run_tool(*own_json[:2], "--tuples", 6, "--ways", 2, "--output", tmp_path)
    assert "--tuples are of one class" in capsys.readouterr().err


def test_tool_fixes_the_supports_of_a_plan(own_json, tmp_path, capsys):
    """Data sets of a config; parts of one json whose images are others."""
    content = json.loads((tmp_path / "own.json").read_text())
    names = ["test_plans_queries", "test_plans_shots"]
    rows = []
    for name, start in zip(names, (0, 5)):
        images = [i for i in content["images"] if start <= i["id"] < start + 4]
        ids = {i["id"] for i in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        part = {**content, "images": images, "annotations": annotations}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        rows.append([name, f"{name}.json", "photos"])
    config = tmp_path / "own.yaml"
    config.write_text(f"FEWSHOT:\n  REGISTER: {json.dumps(rows)}\n")
    arguments = ["--config-file", config, "--dataset", names[0], "--support-dataset", names[1]]
    options = ["--fixed-supports", "--protocol", "open", "--side", "all", "--shots", 2, "--runs", 1]
    try:
        run_tool(*arguments, *options, "--output", tmp_path / "plans")
    finally:
        for name in names:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
    (path,) = (tmp_path / "plans").iterdir()
    plan = EvaluationPlan.load(path)
    assert f"sha256 {plan.sha256}  4 episodes, 8 pairs" in capsys.readouterr().out
    assert set(plan.fixed_supports) == {5, 8} and "-fixed-" in path.name


def test_tool_writes_a_benchmark_plan_for_each_number_of_shots(own_json, tmp_path, capsys):
    arguments = ["--side", "all", "--ways", 2, "--shots", 1, 3, "--queries-per-class", 2]
    run_tool(*own_json, *arguments, "--episodes", 4, "--output", tmp_path / "plans")
    lines = capsys.readouterr().out.splitlines()
    plans = [BenchmarkPlan.load(line.split("  ")[0]) for line in lines]
    assert [(plan.shots, plan.max_shots, plan.seed) for plan in plans] == [
        (1, 3, 9001),
        (3, 3, 9001),
    ]
    for line, plan in zip(lines, plans, strict=True):
        assert line.endswith(f"sha256 {plan.sha256}  4 episodes")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--side", "all", "--ways", 3],
            "1 episode and 3 classes .* got 500 episodes and 2 classes",
        ),
        (["--side", "all", "--ways", 2, "--shots", 0], "must be at least 1"),
        (["--split", "novel:frok"], "make_episodes: split .* got 'frok' .*fork"),
        (["--split", "all"], "make_episodes: --split all must have novel classes, got none"),
        (["--support-dataset", "nobody"], "data set must be registered, got 'nobody'"),
        (["--side", "all", "--fixed-supports"], "shares no image with the queries, got 9 of both"),
        (["--json", "none.json"], "annotation file must exist, got .*none.json"),
    ],
)
def test_tool_ends_with_one_line_on_bad_input(own_json, tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        run_tool(*own_json, "--output", tmp_path / "plans", *arguments)
    assert not (tmp_path / "plans").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--json", "x"], ["--runs", "0"], ["--side", "old"], ["--fixed-supports", "--ways", "5"]),
        *(["--runs", "2", "--tuples", "9"], ["--episodes", "7"], ["--max-boxes", "3"]),
        *(["--ways", "2", "--tuples", "9"], ["--no-foreign-images", "--ways", "5"]),
    ],
)
def test_tool_refuses_bad_options(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        run_tool("--dataset", "x", "--output", tmp_path, *arguments)
    assert arguments[0] in capsys.readouterr().err
