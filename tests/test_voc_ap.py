"""VOC's average precision: naive loops over all detections, cases by hand, and its place in the evaluation."""

import math

import numpy as np
import pytest
from evaluation_cases import (
    CLASS_NAMES,
    detection,
    perfect_detections,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)
from factories import registered_set, tiny_config, tiny_model, write_set

from fewshot_d2.data.coco_json import load_instances_json
from fewshot_d2.data.loaders import build_factory
from fewshot_d2.engine.evaluate import evaluate_plan, evaluation_plans
from fewshot_d2.evaluation.coco_scoring import GroundTruth
from fewshot_d2.evaluation.pooled_ap import PooledPrecision, eleven_point_precision, pixel_iou
from fewshot_d2.evaluation.voc_ap import voc_scores

IDS = list(CLASS_NAMES)


def naive_iou(a, b, extent):
    """Of two XYWH boxes, corner by corner."""
    corners = [(x, y, x + w + extent, y + h + extent) for x, y, w, h in (a, b)]
    sides = []
    for axis in (0, 1):
        low, high = max(c[axis] for c in corners), min(c[axis + 2] for c in corners)
        sides.append(max(high - low, 0))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in corners]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def naive_curve(marks, num_truth):
    """(recall, precision) after each detection; ``marks`` are 1, 0 or -1 = ignored, best first."""
    right = wrong = 0
    points = []
    for mark in marks:
        right, wrong = right + (mark == 1), wrong + (mark == 0)
        if right + wrong:
            points.append((right / num_truth, right / (right + wrong)))
    return points


def naive_area(points):
    area, recall = 0.0, 0.0
    for i, (r, _) in enumerate(points):
        area += (r - recall) * max(p for _, p in points[i:])
        recall = r
    return area


def naive_eleven(points):
    # Recalls of the data are multiples of 1/n: a little slack stands for exact fractions.
    best = [max([p for r, p in points if r >= t / 10 - 1e-9], default=0.0) for t in range(11)]
    return sum(best) / 11


def naive_voc(dicts, detections, plan, threshold, extent):
    """{class: (marks with scores, number of boxes)} by going through everything once."""
    outcome = {c: ([], 0) for e in plan.episodes for c in e.class_ids}
    for episode in plan.episodes:
        (record,) = [d for d in dicts if d["image_id"] == episode.image_id]
        for class_id in episode.class_ids:
            truth = [a for a in record["annotations"] if IDS[a["category_id"]] == class_id]
            easy = [not (a.get("difficult") or a["iscrowd"]) for a in truth]
            own = [
                d
                for d in detections
                if (d["image_id"], d["category_id"]) == (episode.image_id, class_id)
            ]
            taken, marks = set(), []
            for row in sorted(own, key=lambda d: -d["score"]):
                overlaps = [naive_iou(row["bbox"], a["bbox"], extent) for a in truth]
                best = max(range(len(truth)), key=lambda g: overlaps[g], default=None)
                if best is None or overlaps[best] < threshold:
                    marks.append((row["score"], 0))
                elif not easy[best]:
                    marks.append((row["score"], -1))
                else:
                    marks.append((row["score"], int(best not in taken)))
                    taken.add(best)
            outcome[class_id] = outcome[class_id][0] + marks, outcome[class_id][1] + sum(easy)
    return outcome


def ranked(marks):
    return [mark for _, mark in sorted(marks, key=lambda m: -m[0])]


@pytest.mark.parametrize("protocol", ["present", "open"])
@pytest.mark.parametrize(("threshold", "extent"), [(0.5, 1.0), (0.5, 0.0), (0.7, 1.0)])
def test_scores_equal_loops(protocol, threshold, extent):
    rng = np.random.default_rng(4)
    ignored = 0
    for _ in range(6):
        dicts = random_dicts(rng, masks=False)
        for annotation in (a for d in dicts for a in d["annotations"]):
            annotation["difficult"] = int(rng.random() < 0.25)
        detections = random_detections(rng, dicts, masks=False)
        plan = plan_of(dicts, protocol=protocol)
        scores = voc_scores(
            truth_of(dicts), detections, plan, iou_threshold=threshold, extent=extent
        )
        naive = naive_voc(dicts, detections, plan, threshold, extent)
        curves = {c: naive_curve(ranked(m), n) for c, (m, n) in naive.items() if n}
        counts = {c: naive[c][1] for c in curves}
        areas = {c: naive_area(points) for c, points in curves.items()}
        joint = naive_curve(
            ranked([m for own, _ in naive.values() for m in own]), sum(counts.values())
        )
        found = sum(mark == 1 for own, _ in naive.values() for _, mark in own)
        ignored += sum(mark == -1 for own, _ in naive.values() for _, mark in own)
        expected = {
            "mAP": np.mean(list(areas.values())),
            "mAP_11point": np.mean([naive_eleven(points) for points in curves.values()]),
            "mAP_weighted": np.average(list(areas.values()), weights=list(counts.values())),
            "AP_joint": naive_area(joint),
            "recall": found / sum(counts.values()),
            **{f"AP-{CLASS_NAMES[c]}": area for c, area in areas.items()},
        }
        assert {k: scores[k] for k in expected} == pytest.approx(
            {k: 100 * v for k, v in expected.items()}
        )
        assert scores["num_classes"] == len(areas)
        assert scores["num_boxes"] == sum(counts.values())
    assert ignored > 5


def one_image(boxes, found, difficult=()):
    """Scores of class 3 in one image with ``boxes`` and detections [(box, score)]."""
    rows = [
        {
            "id": i,
            "bbox": b,
            "bbox_mode": 1,
            "category_id": 0,
            "iscrowd": 0,
            "difficult": int(i in difficult),
        }
        for i, b in enumerate(boxes)
    ]
    size = {"height": 90, "width": 120}
    dicts = [{"file_name": "", "image_id": 1, **size, "annotations": rows}]
    detections = [detection(1, 3, box, score, masks=False) for box, score in found]
    plan = plan_of(dicts, class_ids=(3,), protocol="open")
    return voc_scores(truth_of(dicts), detections, plan)


def test_best_box_decides_even_if_it_is_difficult():
    # The detection covers both boxes enough, the difficult one more: it is ignored, and the other box is missed.
    scores = one_image([[0, 0, 40, 40], [2, 0, 40, 40]], [([2, 0, 40, 40], 0.9)], difficult={1})
    assert scores["recall"] == 0.0 and scores["AP_joint"] == 0.0
    scores = one_image([[0, 0, 40, 40], [2, 0, 40, 40]], [([2, 0, 40, 40], 0.9)])
    assert scores["recall"] == 50.0 and scores["mAP"] == 50.0
    # A second detection of a difficult box is not wrong either, one of an ordinary box is.
    twice = [([0, 0, 40, 40], 0.9), ([0, 0, 40, 40], 0.8)]
    far = [[0, 0, 40, 40], [60, 40, 30, 30]]
    late = ([60, 40, 30, 30], 0.5)
    assert one_image(far, [*twice, late], difficult={0})["mAP"] == 100.0
    assert one_image(far, [*twice, late])["mAP"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_pixel_decides_a_close_case():
    boxes = np.array([[0, 0, 10, 10.0]]), np.array([[0, 0, 10, 5.0]])
    assert pixel_iou(*boxes, 0.0) == 0.5 and pixel_iou(*boxes)[0, 0] == pytest.approx(66 / 121)
    assert pixel_iou(np.zeros((1, 4)), np.zeros((1, 4)), 0.0) == 0.0


def test_perfect_and_nothing_found_and_nothing_there():
    rng = np.random.default_rng(0)
    dicts = random_dicts(rng, masks=False, crowd=0.0)
    plan = plan_of(dicts)
    perfect = perfect_detections(dicts, masks=False)
    # Equal boxes of one class would hide each other.
    best = voc_scores(truth_of(dicts), perfect, plan)
    assert all(
        best[k] == 100.0 for k in ("mAP", "mAP_11point", "mAP_weighted", "AP_joint", "recall")
    )
    worst = voc_scores(truth_of(dicts), [], plan)
    assert all(
        worst[k] == 0.0 for k in ("mAP", "mAP_11point", "mAP_weighted", "AP_joint", "recall")
    )
    nothing = one_image([[0, 0, 9, 9]], [([0, 0, 9, 9], 0.9)], difficult={0})
    assert all(math.isnan(nothing[k]) for k in ("mAP", "mAP_11point", "mAP_weighted", "recall"))
    assert nothing["num_boxes"] == nothing["num_classes"] == 0


def test_eleven_points_of_known_curves():
    # Half of ten boxes found at full precision: recalls 0 to 0.5 have 1, the others 0.
    assert eleven_point_precision(np.ones(5), np.ones(5, bool), 10) == pytest.approx(6 / 11)
    # Three of ten: the recall 0.3 is reached exactly.
    assert eleven_point_precision(np.ones(3), np.ones(3, bool), 10) == pytest.approx(4 / 11)
    assert eleven_point_precision(np.zeros(0), np.zeros(0, bool), 3) == 0.0
    assert math.isnan(eleven_point_precision(np.zeros(0), np.zeros(0, bool), 0))


def test_benchmark_ignores_difficult_boxes_in_vocs_matching_only():
    row = {
        "boxes": np.array([[0, 0, 9, 9], [20, 20, 29, 29.0]]),
        "scores": np.array([0.9, 0.8]),
        "truth_boxes": np.array([[0, 0, 9, 9], [20, 20, 29, 29.0]]),
        "truth_classes": np.array([1, 1]),
        "truth_difficult": np.array([True, False]),
    }
    for matching, truths in (("voc", 1), ("official", 2)):
        precision = PooledPrecision(matching)
        precision.add(0, 1, **row)
        summary = precision.summary()
        assert summary["num_truth"] == truths == summary["num_entries"] and summary["joint"] == 1.0


def test_json_keeps_what_is_difficult(tmp_path):
    write_set(tmp_path)
    text = (tmp_path / "instances.json").read_text()
    (tmp_path / "hard.json").write_text(
        text.replace('"iscrowd": 0', '"iscrowd": 0, "difficult": 1', 2)
    )
    for name, number in (("instances", 0), ("hard", 2)):
        dicts = load_instances_json(tmp_path / f"{name}.json", tmp_path, "voc_json")
        assert sum(a.get("difficult", 0) for d in dicts for a in d["annotations"]) == number


def test_evaluation_reports_voc_by_key(tmp_path):
    write_set(tmp_path)
    with registered_set("voc_photos", tmp_path):
        values = ["DATASETS.TEST", ("voc_photos",), "OUTPUT_DIR", str(tmp_path / "out")]
        values += ["FEWSHOT.SUPPORT.DATASETS_TEST", ()]
        values += [
            "FEWSHOT.TEST.SIDES",
            ("all",),
            "FEWSHOT.TEST.NUM_RUNS",
            1,
            "MODEL.MASK_ON",
            False,
        ]
        model = tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.MASK_ON", False)
        factory = build_factory("voc_photos", "voc_photos")
        for wanted, pixel in ((True, True), (True, False), (False, True)):
            keys = ["FEWSHOT.TEST.VOC", wanted, "FEWSHOT.TEST.VOC_PIXEL", pixel]
            cfg = tiny_config(*values, *keys)
            (plan,) = evaluation_plans(cfg)
            runs = evaluate_plan(cfg, model, plan, factory)
            assert ("voc" in runs[""].results) == wanted == ("voc" in runs["gt_shift"].results)
            if wanted:
                again = voc_scores(
                    GroundTruth.of_dataset("voc_photos"),
                    runs[""].detections,
                    plan,
                    extent=float(pixel),
                )
                assert runs[""].results["voc"] == pytest.approx(again, nan_ok=True)
