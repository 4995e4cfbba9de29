"""The best checkpoint of a run: which one it is, and that the run stays as it was."""

import csv
import json
import runpy
import sys

import pytest
import torch
from factories import ROOT, TINY, TINY_OVERRIDES, registered_set, tiny_config, write_set

from fewshot_d2.engine import EpisodicTrainer, select_checkpoint, selection

NAME = "selection_test_set"
DATA = [
    *("DATASETS.TEST", (NAME,), "FEWSHOT.SUPPORT.DATASETS_TEST", (), "FEWSHOT.TEST.NUM_RUNS", 1),
    *("FEWSHOT.TEST.BASELINES", ("gt_shift",), "TEST.EXPECTED_RESULTS", [["bbox", "AP", 1, 1]]),
]


def write_checkpoints(folder, iterations):
    """Files that hold nothing but their iteration, by name."""
    folder.mkdir(exist_ok=True)
    for name, iteration in iterations.items():
        torch.save({"model": {}, "iteration": iteration}, folder / f"{name}.pth")


def scripted(monkeypatch, values):
    """Evaluations whose AP is that of the checkpoint's name; returns the configs that they had."""
    seen = []

    def evaluate_only(cfg):
        seen.append(cfg)
        ap = values[cfg.MODEL.WEIGHTS.rpartition("/")[2].removesuffix(".pth")]
        return {"a/bbox": {"AP": ap - 1, "AP50": 0.0}, "b/bbox": {"AP": ap + 1}, "c": {"x": 5.0}}

    monkeypatch.setattr(selection, "evaluate_only", evaluate_only)
    return seen


def test_highest_mean_is_copied_and_of_equal_ones_the_earliest(tmp_path, monkeypatch):
    run = tmp_path / "run"
    # By name the last of these comes first; the final checkpoint is another one's copy.
    write_checkpoints(run, {"model_0000099": 99, "model_0000199": 199, "model_0000299": 299})
    write_checkpoints(run, {"model_final": 299, "model_1000000": 49, "model_best": 7})
    values = {"model_1000000": 3.0, "model_0000099": 8.0, "model_0000199": 8.0, "model_final": 2.0}
    seen = scripted(monkeypatch, values)
    cfg = tiny_config(*DATA, "OUTPUT_DIR", str(tmp_path / "out"))
    assert select_checkpoint(cfg, run, "AP") == run / "model_best.pth"
    assert (run / "model_best.pth").read_bytes() == (run / "model_0000099.pth").read_bytes()
    with (tmp_path / "out/checkpoints.csv").open() as file:
        rows = [["iteration", "AP"], ["49", "3.0"], ["99", "8.0"], ["199", "8.0"], ["299", "2.0"]]
        assert list(csv.reader(file)) == rows
    assert (tmp_path / "out/checkpoints.png").read_bytes().startswith(b"\x89PNG")
    assert [c.OUTPUT_DIR for c in seen] == [str(tmp_path / "out" / name) for name in values]
    assert not any(c.TEST.EXPECTED_RESULTS or c.FEWSHOT.TEST.BASELINES for c in seen)
    assert cfg.TEST.EXPECTED_RESULTS and cfg.FEWSHOT.TEST.BASELINES


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        ("AP", r"AP must be defined.* got \[nan, nan\]"),
        ("mAP", r"one of \['AP', 'AP50', 'x'\], got 'mAP'"),
    ],
)
def test_undefined_and_unknown_numbers(metric, match, tmp_path, monkeypatch):
    assert selection.mean_metric({"a": {"AP": float("nan")}, "b": {"AP": 3.0}}, "AP") == 3.0
    write_checkpoints(tmp_path, {"model_final": 9})
    scripted(monkeypatch, {"model_final": float("nan")})
    with pytest.raises(ValueError, match=match):
        select_checkpoint(tiny_config("OUTPUT_DIR", str(tmp_path / "out")), tmp_path, metric)
    assert not (tmp_path / "model_best.pth").exists()


def test_choice_on_what_the_run_tests_is_warned_of(tmp_path, monkeypatch, caplog):
    write_checkpoints(tmp_path, {"model_final": 9})
    scripted(monkeypatch, {"model_final": 1.0})
    for tested, warned in (("another", False), (NAME, True)):
        (tmp_path / "config.yaml").write_text(tiny_config("DATASETS.TEST", (tested,)).dump())
        cfg = tiny_config(*DATA, "OUTPUT_DIR", str(tmp_path / "out"))
        caplog.clear()
        select_checkpoint(cfg, tmp_path, "AP")
        assert ("will be too good" in caplog.text) is warned


def test_no_checkpoint_or_one_of_no_run(tmp_path):
    cfg = tiny_config("OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="must have checkpoints model_"):
        select_checkpoint(cfg, tmp_path, "AP")
    (tmp_path / "model_final.pth").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"model_final\.pth must be a readable checkpoint"):
        select_checkpoint(cfg, tmp_path, "AP")
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    with pytest.raises(
        ValueError, match=r"model_final\.pth must be a checkpoint of a training run"
    ):
        select_checkpoint(cfg, tmp_path, "AP")


def test_tool_evaluates_a_trained_run_and_leaves_its_config(tmp_path, monkeypatch):
    write_set(tmp_path)
    run = tmp_path / "run"
    options = ["FEWSHOT.REGISTER", [[NAME, str(tmp_path / "instances.json"), str(tmp_path)]]]
    options += [*DATA, "DATASETS.TRAIN", (NAME,), "FEWSHOT.SUPPORT.DATASET_TRAIN", ""]
    options += ["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "OUTPUT_DIR", str(run)]
    with registered_set(NAME, tmp_path):
        untested = ("DATASETS.TEST", (), "TEST.EXPECTED_RESULTS", [], "SOLVER.IMS_PER_BATCH", 1)
        cfg = tiny_config(*options, *untested)
        EpisodicTrainer(cfg).train()
        (run / "config.yaml").write_text(cfg.dump())
        arguments = ["--metric", "AP50", "--config-file", str(TINY), *TINY_OVERRIDES, *options]
        monkeypatch.setattr(sys, "argv", ["select_checkpoint.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools/select_checkpoint.py"), run_name="__main__")
    assert (run / "config.yaml").read_text() == cfg.dump()
    with (run / "selection/checkpoints.csv").open() as file:
        (_, metric), *rows = csv.reader(file)
    assert metric == "AP50" and [iteration for iteration, _ in rows] == ["1", "2"]
    for (_, value), name in zip(rows, ("model_0000001", "model_final"), strict=True):
        results = json.loads((run / "selection" / name / "results.json").read_text())
        assert selection.mean_metric(results, "AP50") == float(value)
        assert not any("gt_shift" in task for task in results)
    best = torch.load(run / "model_best.pth", weights_only=True)
    assert best["iteration"] == int(max(rows, key=lambda row: float(row[1]))[0])
