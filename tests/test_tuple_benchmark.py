"""Tuples evaluated end to end with a model whose answers are known: pooled AP, ground truth, shots and page."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from factories import TINY, TINY_OVERRIDES, registered_set, write_set
from torch import nn

from fewshot_d2 import load_config
from fewshot_d2.data.tuple_plans import TuplePlan
from fewshot_d2.engine.evaluate import evaluate
from fewshot_d2.evaluation.benchmark_page import parse_name, shot_csv
from fewshot_d2.evaluation.pooled_ap import PooledPrecision, in_square, pixel_iou
from fewshot_d2.structures import SupportFeatures

NAME = "tuple_benchmark_set"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_set(folder, num_images=16)
    with registered_set(NAME, folder):
        yield folder


def config(folder, *overrides):
    own = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)]
    own += ["FEWSHOT.SUPPORT.DATASETS_TEST", (), "MODEL.MASK_ON", False]
    own += ["FEWSHOT.TEST.PROTOCOL", "episodes", "FEWSHOT.TEST.SIDES", ("novel",)]
    own += ["FEWSHOT.SPLIT", "novel:b,c", "FEWSHOT.SUPPORT.FORM", "whole"]
    own += ["FEWSHOT.BENCHMARK.SUPPORTS", "images", "FEWSHOT.BENCHMARK.EPISODES", 12]
    own += ["FEWSHOT.BENCHMARK.SHOTS", (1, 3), "FEWSHOT.BENCHMARK.FINE_TUNE", (False,)]
    own += ["FEWSHOT.BENCHMARK.PICTURES", 2, "OUTPUT_DIR", str(folder.parent / "out")]
    return load_config(str(TINY), [*TINY_OVERRIDES, *own, *overrides])


class Knowing(nn.Module):
    """Knows where everything is, by image: finds ``found(truths)`` of the class that it is asked for."""

    def __init__(self, folder, found=lambda boxes: boxes, explains=True):
        super().__init__()
        self.found, self.explains, self.shots, self.forms = found, explains, [], set()
        content = json.loads((folder / "instances.json").read_text())
        self.boxes = {}
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            key = a["image_id"], a["category_id"]
            if not a["iscrowd"]:
                self.boxes.setdefault(key, []).append([x, y, x + w, y + h])

    def tunes_description(self, layers):
        return False

    def encode_support(self, support_sets):
        (support_set,) = support_sets
        (shots,) = support_set.examples
        self.shots.append(len(shots))
        self.forms |= {shot.box is None for shot in shots}
        return SupportFeatures({"n": torch.tensor([[len(shots)]])}, support_set.class_ids)

    def describe_queries(self, batched_inputs):
        return batched_inputs

    def search(self, query, features):
        boxes = self.found(self.boxes.get((query["image_id"], features.class_ids[0]), []))
        result = Instances((query["height"], query["width"]))
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.scores = torch.linspace(0.9, 0.6, len(boxes))
        result.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        return result

    def explain(self, query, features):
        if not self.explains:
            return {}
        shots = int(features.tensors["n"])
        maps = torch.rand(4, 6, shots, 3, 5)
        return {
            "attention": maps / maps.sum(dim=(3, 4), keepdim=True),
            "with reweighting": torch.rand(4, 6),
        }


def test_who_finds_all_has_it_all(folder):
    model = Knowing(folder)
    results = evaluate(config(folder), model)
    assert list(results) == [f"{NAME}/novel/1way-{shots}shot" for shots in (1, 3)]
    for metrics in results.values():
        assert metrics["AP_voc"] == metrics["AP_voc_classes"] == metrics["AP"] == 100
        assert metrics["episodes"] == 12 and metrics["unread_queries"] == 0
    assert model.shots == [1] * 12 + [3] * 12 and model.forms == {True}
    out = folder.parent / "out"
    plans = [TuplePlan.load(path) for path in sorted((out / "plans").iterdir())]
    assert [plan.shots for plan in plans] == [1, 3]
    for few, more in zip(*(plan.episodes for plan in plans), strict=True):
        assert few.query_image_ids == more.query_image_ids
        assert more.supports[0][:1] == few.supports[0] and few.class_ids[0] in (11, 12)
    page = (out / "report.html").read_text()
    assert all(plan.sha256 in page for plan in plans)
    assert page.count("<img") == 1 + 2 * 2 * 3
    assert "episode 1 attention" in page and "episode 0 heat" in page
    rows = list(csv.DictReader((out / "by_shots.csv").open()))
    assert [(row["name"], row["shots"]) for row in rows] == [
        (f"{NAME}/novel/1way", "1"),
        (f"{NAME}/novel/1way", "3"),
    ]
    assert float(rows[0]["AP_voc"]) == 100


def test_missed_and_repeated_objects_count(folder):
    """Every box twice, the second right behind the first: only RepMet's matching forgives it."""
    twice = Knowing(folder, lambda boxes: sorted([*boxes, *boxes]), explains=False)
    twice = evaluate(config(folder), twice)
    none = evaluate(config(folder), Knowing(folder, lambda b: [], explains=False))
    assert 50 < twice[f"{NAME}/novel/1way-1shot"]["AP_voc"] < 100
    assert twice[f"{NAME}/novel/1way-1shot"]["AP"] == 100
    assert none[f"{NAME}/novel/1way-1shot"]["AP_voc"] == 0
    pictures = folder.parent / "out/pictures" / NAME / "novel/1way-1shot"
    assert len(list(pictures.glob("*.png"))) == 2


def test_filtered_boxes_are_no_ground_truth(folder):
    """Images with two boxes of the class or more are none of its queries: whoever finds one box has it all."""
    key = "FEWSHOT.GROUND_TRUTH.MAX_BOXES"
    first = Knowing(folder, lambda boxes: boxes[:1], explains=False)
    results = evaluate(config(folder, key, 2), first)
    assert results[f"{NAME}/novel/1way-3shot"]["AP_voc"] == 100
    assert evaluate(config(folder), first)[f"{NAME}/novel/1way-3shot"]["AP_voc"] < 100


def test_plans_are_read_again_and_those_of_other_ground_truth_refused(folder):
    first = evaluate(config(folder), Knowing(folder, lambda b: b[:1]))
    files = sorted(map(str, (folder.parent / "out/plans").iterdir()))
    again = ["FEWSHOT.BENCHMARK.PLANS", files]
    second = evaluate(config(folder, *again), Knowing(folder, lambda b: b[:1]))
    assert all(second[n]["AP_voc"] == first[n]["AP_voc"] for n in first)
    with pytest.raises(ValueError, match="FEWSHOT.GROUND_TRUTH 'not difficult', got one of 'all'"):
        evaluate(
            config(folder, *again, "FEWSHOT.GROUND_TRUTH.KEEP_DIFFICULT", False), Knowing(folder)
        )
    boxes = [*again, "FEWSHOT.BENCHMARK.SUPPORTS", "boxes"]
    with pytest.raises(ValueError, match="must be a benchmark plan"):
        evaluate(config(folder, *boxes), Knowing(folder))


def test_a_query_that_cannot_be_read_counts_as_missed(folder):
    model = Knowing(folder)
    for path in list(folder.glob("*.png"))[:8]:
        path.write_bytes(b"no picture")
    metrics = evaluate(config(folder), model)[f"{NAME}/novel/1way-3shot"]
    assert metrics["unread_queries"] > 0 and metrics["AP_voc"] < 100


def test_boxes_in_the_square_are_whole_pixels():
    """An image of 400 x 200 (width x height) on 300 x 300: x three quarters, y one and a half."""
    boxes = np.array([[10.0, 10, 101, 51], [-3, 0, 400, 200]])
    assert in_square(boxes, (200, 400), 300).tolist() == [[7, 15, 75, 76], [-2, 0, 300, 300]]
    assert in_square(np.zeros((0, 4)), (200, 400), 300).shape == (0, 4)


def test_the_square_decides_where_pixels_and_sides_disagree(folder):
    """A box of 20 x 15 shifted by a third of its width: IoU 0.5 to the pixel, less on a coarse grid."""
    shift = 20 / 3
    truth, found = np.array([[0.0, 0, 20, 15]]), np.array([[shift, 0, 20 + shift, 15]])
    original = pixel_iou(found - [0, 0, 1, 1], truth - [0, 0, 1, 1])[0, 0]
    assert original == pytest.approx(0.5)
    coarse = pixel_iou(*(in_square(b, (40, 60), 12) for b in (found, truth)))[0, 0]
    # In twelfths of 60 x 40: x 0..4 and 1..5, y 0..4, each with its last pixel.
    assert coarse == pytest.approx(4 / 6)

    def moved(boxes):
        return [[x0 + 7, y0, x1 + 7, y1] for x0, y0, x1, y1 in boxes]

    model = Knowing(folder, moved, explains=False)
    plain = evaluate(config(folder), model)[f"{NAME}/novel/1way-1shot"]["AP_voc"]
    square = config(folder, "FEWSHOT.BENCHMARK.SQUARE", 12)
    assert plain < evaluate(square, model)[f"{NAME}/novel/1way-1shot"]["AP_voc"]


def test_pooled_ap_of_three_tuples_by_hand():
    """Each tuple its own image: the same box found in two tuples is right in both.

    Ranked: .9 right, .8 wrong, .7 right, .6 wrong, .5 right, of 4 objects: precision 1, 2/3, 3/5 at recalls of 1/4,
    2/4, 3/4; no later precision is higher.
    """
    pooled, box, far = PooledPrecision("voc"), [0.0, 0, 9, 9], [50.0, 50, 59, 59]
    tuples = [
        (1, [box], [0.9], [box]),
        (1, [box, far], [0.7, 0.8], [box]),
        (2, [far, box], [0.6, 0.5], [box, [20.0, 20, 29, 29]]),
    ]
    for episode, (class_id, boxes, scores, truth) in enumerate(tuples):
        pooled.add(
            episode, class_id, boxes=np.array(boxes), scores=np.array(scores),
            truth_boxes=np.array(truth), truth_classes=np.full(len(truth), class_id),
        )  # fmt: skip
    summary = pooled.summary()
    assert summary["joint"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    # Of class 1: right, wrong, right of 2; of class 2: wrong, right of 2.
    assert summary["per_class_mean"] == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2) / 2) / 2)


def test_table_of_shots_keeps_every_number():
    results = {
        "a/novel/1way-1shot": {"AP": 1.5},
        "a/novel/1way-10shot/fine-tuned": {"AP": 2, "R10": 3},
    }
    rows = list(csv.reader(shot_csv(results).splitlines()))
    assert rows == [
        ["name", "shots", "AP", "R10"],
        ["a/novel/1way", "1", "1.5", ""],
        ["a/novel/1way/fine-tuned", "10", "2", "3"],
    ]
    assert parse_name("x-way-shot/novel/5way-3shot") == ("x-way-shot/novel/5way", 3)
