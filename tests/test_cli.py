"""The command line: what it refuses and how it says so; the doctor; the check of examples."""

import csv
import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from factories import random_support
from inference_cases import write_model, write_photos

import fewshot_d2_doctor
from fewshot_d2 import FewShotPredictor, Support, SupportFeatures, SupportSet
from fewshot_d2.cli.common import read_thresholds, table
from fewshot_d2.cli.main import main
from fewshot_d2.inference.exemplar_check import (
    ShotCheck,
    check_examples,
    picture_of,
    suggested_threshold,
)
from fewshot_d2.support_files import read_features
from fewshot_d2_doctor.checks import BROKEN, KNOWN_PROBLEMS, OK, known_fix, module_finding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 1)
    write_model(tmp_path)
    return tmp_path


MODEL = ["--config-file", "config.yaml", "--weights", "model_final.pth"]
SUPPORT = ["--support", "photos/photo_0.jpg::cup"]
SEARCH = ["--images", "photos", "--output", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, *SEARCH], "an example must be given"),
        ([*SUPPORT, *SEARCH], "trained by `make demo`"),
        ([*SUPPORT, *SEARCH, "--weights", "model_final.pth"], "must have its --config-file"),
        ([*SUPPORT, *SEARCH, "--config-file", "config.yaml"], "--weights must be a checkpoint"),
        ([*SUPPORT, *SEARCH, "--config-file", "none.yaml"], "--config-file must be a file"),
        (
            [*SUPPORT, *SEARCH, "--config-file", "photos/photo_0.jpg"],
            "photo_0.jpg must be a config",
        ),
        ([*SUPPORT, *SEARCH, *MODEL, "--opts", "NO.KEY", "1"], "config.yaml must be a config"),
        ([*SUPPORT, *SEARCH, *MODEL, "--threshold", "nan"], r"threshold of 'cup' must be in"),
        ([*SUPPORT, *SEARCH, *MODEL, "--precision", "amp", "--device", "cpu"], "needs a GPU"),
        (["--support", "x.jpg::cup", *SEARCH, *MODEL], "x.jpg must be a readable image"),
        (["--supports", "config.yaml", *SEARCH, *MODEL], "config.yaml must be a support-set file"),
        ([*SUPPORT, *MODEL, "--images", "photos", "--output", "photos"], "new or empty folder"),
        ([*SUPPORT, *MODEL, "--images", "nowhere", "--output", "out"], "images must be"),
    ],
)
def test_find_refuses_with_one_line(folder, capsys, arguments, message):
    before = sorted(p.name for p in folder.iterdir())
    assert main(["find", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert sorted(p.name for p in folder.iterdir()) == before


def test_find_shows_progress_and_a_table(folder, capsys):
    write_photos(folder / "photos", 3)
    (folder / "photos" / "bad.jpg").write_bytes(b"no")
    assert main(["find", *SUPPORT, *SEARCH, *MODEL, "--threshold", "0"]) == 0
    out, bar = capsys.readouterr()
    # tqdm: done of all, time taken and time left.
    assert "4/4 [" in bar and "images" in bar and "<" in bar
    head, _, row, *rest = out.splitlines()
    assert head.split() == ["class", "found", "images", "with", "it"]
    counts = list(csv.DictReader((folder / "out" / "counts.csv").open()))
    found = [int(line["cup"]) for line in counts]
    assert len(found) == 3 and sum(found) > 0
    assert row.split() == ["cup", str(sum(found)), str(sum(n > 0 for n in found))]
    assert rest[0].startswith("3 images in") and "1 skipped" in rest[1] and "bad.jpg" in rest[2]


def test_find_uses_the_features_of_a_file(folder, monkeypatch):
    assert main(["support", "create", "set.zip", "photos/photo_0.jpg::cup"]) == 0
    assert main(["support", "encode", "set.zip", *MODEL]) == 0
    encode = FewShotPredictor._encoded
    monkeypatch.setattr(FewShotPredictor, "_encoded", lambda *_: pytest.fail("encoded again"))
    assert main(["find", "--supports", "set.zip", *SEARCH, *MODEL]) == 0
    monkeypatch.setattr(FewShotPredictor, "_encoded", encode)
    assert sorted(read_features("out/supports.zip")) == sorted(read_features("set.zip")) != []


def test_an_interrupted_find_keeps_what_was_found(folder, monkeypatch, capsys):
    write_photos(folder / "photos", 6)
    detect, done = FewShotPredictor._detect, []

    def interrupted(self, batch):
        done.append(len(batch))
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return detect(self, batch)

    monkeypatch.setattr(FewShotPredictor, "_detect", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["find", *SUPPORT, *SEARCH, *MODEL]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "only 3 of 6 images were searched" in capsys.readouterr().out
    images = json.loads((folder / "out" / "images.json").read_text())["images"]
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [image["id"] for image in images] == [1, 2, 3]
    assert {row["image_id"] for row in results} <= {1, 2, 3}
    assert not list((folder / "out").rglob("*.tmp"))


def test_find_of_a_broken_video_alone_says_so(folder, capsys):
    (folder / "a.mp4").write_bytes(b"no video")
    assert main(["find", *SUPPORT, *MODEL, "--images", "a.mp4", "--output", "out"]) == 1
    assert "a.mp4 must be a video" in capsys.readouterr().out


def test_thresholds_of_a_file_come_before_the_default(tmp_path):
    (tmp_path / "t.json").write_text('{"thresholds": {"b": 0.25}}')
    assert read_thresholds(str(tmp_path / "t.json"), 0.5, ["a", "b"]) == (0.5, 0.25)
    for text in ("[]", "{}", "no", '{"thresholds": 3}', '{"thresholds": {"a": "x"}}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ValueError, match=r"t.json must be|threshold of 'a'"):
            read_thresholds(str(tmp_path / "t.json"), 0.5, ["a"])


def test_table_shows_what_a_terminal_can():
    text = table([("a\x1b[31m", 0.125, math.nan)], ["name", "x", "y"])
    assert "\x1b" not in text and text.splitlines()[-1].split() == [r"a\x1b[31m", "0.12", "-"]
    assert table([], ["a"]).startswith("a")


def test_support_files_are_never_written_over(folder, capsys):
    assert main(["support", "create", "config.yaml", "photos/photo_0.jpg::cup"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert main(["support", "create", "new.zip"]) == 2
    assert main(["support", "create", "new.zip", "photos/photo_0.jpg::cup"]) == 0
    content = (folder / "new.zip").read_bytes()
    assert main(["support", "inspect", "new.zip", "--sheet", "new.zip"]) == 2
    assert "--sheet must be a file name that ends in .png" in capsys.readouterr().err
    assert (folder / "new.zip").read_bytes() == content


@pytest.mark.parametrize(
    ("module", "error", "fix"),
    [
        (
            "detectron2",
            "ModuleNotFoundError: No module named 'detectron2'",
            "install_detectron2.py",
        ),
        ("detectron2", "ModuleNotFoundError: No module named 'pkg_resources'", "setuptools<81"),
        ("detectron2", "AttributeError: module 'PIL.Image' has no attribute 'LINEAR'", "uninstall"),
        ("detectron2", "ImportError: _C.so: undefined symbol: _ZN2at", "another torch"),
        ("torchvision", "RuntimeError: operator torchvision::nms does not exist", "one index"),
        ("cv2", "ImportError: libGL.so.1: cannot open shared object file", "headless"),
        ("pycocotools", "ValueError: numpy.dtype size changed", "--no-cache-dir pycocotools"),
        (
            "fewshot_d2",
            "ModuleNotFoundError: No module named 'detectron2'",
            "install_detectron2.py",
        ),
        (
            "fewshot_d2",
            "ModuleNotFoundError: No module named 'yacs.config'",
            "--force-reinstall yacs",
        ),
    ],
)
def test_doctor_knows_the_fix(module, error, fix):
    assert fix in known_fix(module, error)


def test_doctor_survives_what_cannot_be_imported(monkeypatch, capsys):
    assert module_finding("no_such_module", lambda _: "").state == BROKEN

    def import_module(name):
        if name == "detectron2":
            raise ImportError("No module named 'detectron2'")
        return ModuleType(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert fewshot_d2_doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  detectron2" in out and "-> python tools/install_detectron2.py" in out
    assert len(KNOWN_PROBLEMS) >= 10


def test_a_command_that_cannot_start_never_ends_with_success(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fewshot-d2", "find"])
    monkeypatch.setitem(sys.modules, "tabulate", None)
    for name in [n for n in sys.modules if n.startswith("fewshot_d2.cli")]:
        monkeypatch.delitem(sys.modules, name)
    assert fewshot_d2_doctor.command() == 1
    out, err = capsys.readouterr()
    assert "cannot start" in err and "tabulate" in err
    assert "BROKEN  fewshot_d2" in out and "1 must be mended" in out


def test_command_says_nothing_of_what_its_libraries_deprecate():
    code = "import sys, fewshot_d2_doctor; sys.argv = ['fewshot-d2', '--help']; fewshot_d2_doctor.command()"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "usage: fewshot-d2" in run.stdout and run.stderr == ""


def test_doctor_finds_this_installation_whole(capsys):
    assert fewshot_d2_doctor.main(["--data-sets"]) == 0
    out = capsys.readouterr().out
    assert f"{OK:8s}{'torchvision':14s}" in out and "scenes_glyphs_train" in out


class Finder:
    """A predictor that finds in a picture what has the same mean colour, and says how sure it is."""

    def __init__(self, sharpness=0.0):
        """``sharpness``: of a softmax over classes and background (0.5); 0 = each class has a score of its own."""
        self.sharpness = sharpness

    def set_support(self, support):
        if isinstance(support, SupportSet):
            means = [
                torch.tensor([[float(shot.image.float().mean()) for shot in shots]])
                for shots in support.positives()
            ]
            parts = [
                SupportFeatures({"means": m, "real": torch.ones_like(m)}, [i], system="Finder")
                for i, m in enumerate(means)
            ]
            support = SupportFeatures.cat(parts)
        means, real = support.tensors["means"], support.tensors["real"] > 0
        self.classes = [row[kept].tolist() for row, kept in zip(means, real, strict=True)]
        return support

    def predict(self, image):
        mean = float(image.mean())
        found = Instances(image.shape[:2])
        scores = [max(1 - abs(mean - m) / 100 for m in means) for means in self.classes]
        found.pred_boxes = Boxes(torch.tensor([[1.0, 1, 5, 5]] * len(scores)))
        found.scores = torch.tensor(scores).clamp(min=0)
        if self.sharpness:
            logits = torch.cat([found.scores, torch.tensor([0.5])])
            found.scores = (self.sharpness * logits).softmax(0)[:-1]
        found.pred_classes = torch.arange(len(scores))
        return found

    def search(self, images):
        return []


def shot(value):
    """A small part of a picture of one colour."""
    return Support(torch.full((3, 8, 8), value, dtype=torch.uint8), torch.tensor([1.0, 1, 5, 5]))


def test_check_names_the_odd_one_out_and_the_confusable_class():
    classes = [[shot(10), shot(20), shot(240)], [shot(60)], [shot(75)]]
    checks = check_examples(Finder(), SupportSet([1, 2, 3], ["a", "b", "c"], classes))
    [first, second, odd], [b], [c] = (check.shots for check in checks)
    assert [first.verdict, second.verdict, odd.verdict] == ["good", "good", "unlike the others"]
    assert first.other_score == pytest.approx(0.9) and odd.other_score == 0
    assert b.self_score == 1 and math.isnan(b.other_score)
    assert (b.confusable, c.confusable) == ("c", "b")
    assert b.confusable_score == pytest.approx(0.85)
    # c's examples score 1 on their own and at most 0.85 on others.
    assert 0.85 < checks[2].threshold < 1


def test_thresholds_are_of_scores_with_all_classes_where_classes_compete():
    classes = [[shot(10)], [shot(30)], [shot(50)]]
    support_set = SupportSet([1, 2, 3], ["a", "b", "c"], classes)
    finder = Finder(sharpness=3.0)
    checks = check_examples(finder, support_set)
    finder.set_support(support_set)
    for k, check in enumerate(checks):
        score = float(finder.predict(np.full((8, 8, 3), 10 + 20 * k, np.uint8)).scores[k])
        assert check.shots[0].self_score == pytest.approx(score)
        assert check.threshold <= score


def test_an_example_that_fills_its_image_is_searched_on_paper(rng):
    image = torch.randint(0, 256, (3, 6, 9), generator=rng, dtype=torch.uint8)
    image[:, [0, -1]] = 200
    for box in (None, torch.tensor([1.0, 0, 9, 6])):
        example = Support(image, box)
        picture, region = picture_of(example)
        assert picture.shape == (18, 27, 3) and (picture[0] == 200).all()
        assert np.array_equal(picture[6:12, 9:18, ::-1], image.permute(1, 2, 0))
        assert region.tolist() == (example.region + torch.tensor([9, 6, 9, 6])).tolist()
    part = Support(image, torch.tensor([1.0, 1, 5, 5]))
    picture, region = picture_of(part)
    assert np.array_equal(picture[:, :, ::-1], image.permute(1, 2, 0))
    assert torch.equal(region, part.box)
    picture, region = picture_of(Support(torch.zeros(3, 100, 2000, dtype=torch.uint8)))
    assert picture.shape == (150, 3000, 3) and region.tolist() == [1000, 50, 2000, 100]


def test_check_counts_examples_as_the_contact_sheet_does():
    negative = dataclasses.replace(shot(0), negative=True)
    [check] = check_examples(Finder(), SupportSet([1], ["a"], [[negative, shot(9), shot(12)]]))
    assert [s.number for s in check.shots] == [2, 3]


def test_verdicts():
    assert ShotCheck(1, 0.0).verdict == "not found again"
    assert ShotCheck(1, 0.5, 0.0).verdict == "unlike the others"
    assert ShotCheck(1, 0.9, 0.4, "cup", 0.5).verdict == "like cup"
    assert ShotCheck(1, 0.9, math.nan, "cup", 0.5).verdict == "good"


def test_suggested_threshold():
    assert suggested_threshold([], [0.3]) == 0.5
    assert suggested_threshold([0.0, 0.8], []) == 0.4
    assert suggested_threshold([0.8, 0.9], [0.2, 0.4]) == pytest.approx(0.6)
    # One of four right scores lies below the best cut.
    assert 0.5 < suggested_threshold([0.3, 0.7, 0.8, 0.9], [0.1, 0.4, 0.5]) < 0.7
    # Background of unlabelled pictures raises it, but never above what is right.
    assert suggested_threshold([0.9], [], [0.6, 0.62, 0.61, 0.91]) == pytest.approx(0.76, abs=0.01)
    assert suggested_threshold([0.5], [], [0.1, 0.99, 0.98]) <= 0.5


def test_suggested_threshold_leaves_something_to_be_found():
    # Wrong ones score higher: above all is no better than below all.
    assert suggested_threshold([0.05], [0.5]) <= 0.05
    assert suggested_threshold([0.49996], [], [0.1, 0.99, 0.98]) <= 0.49996


def test_suggested_threshold_makes_the_fewest_errors_of_all():
    random = np.random.default_rng(0)
    for _ in range(50):
        right, wrong = random.random(5).round(2) + 0.01, random.random(4).round(2) + 0.01

        def errors(threshold, right=right, wrong=wrong):
            return (right < threshold).mean() + (wrong >= threshold).mean()

        best = min(errors(t) for t in np.linspace(0, 1.02, 2041))
        assert errors(suggested_threshold(right, wrong)) == pytest.approx(best)


def test_check_runs_with_a_model(folder, rng, capsys):
    SupportSet([1], ["a"], [[random_support(rng), random_support(rng)]]).save("set.zip")
    arguments = ["--supports", "set.zip", "--images", "photos", "--output", "t.json"]
    assert main(["check", *MODEL, *arguments]) in (0, 1)
    assert "suggested threshold" in capsys.readouterr().out
    [threshold] = read_thresholds("t.json", 0.9, ["a"])
    assert 0 <= threshold <= 1
