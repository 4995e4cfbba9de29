"""Presence, intervals, clutter and confusion against other libraries and closed forms."""

import dataclasses
import math

import numpy as np
import pytest
from evaluation_cases import (
    detection,
    perfect_detections,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)

from fewshot_d2.evaluation import confidence_interval, score_detections, summarize_runs
from fewshot_d2.evaluation.assignment import assign_pairs, match_greedily
from fewshot_d2.evaluation.metrics import (
    INSTANCE_BINS,
    ap50_by_instances,
    auroc,
    confusion_matrix,
    false_positives_per_image,
    presence_metrics,
)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_equals_counting_pairs(levels):
    rng = np.random.default_rng(levels)
    scores, present = rng.integers(0, levels, 60) / levels, rng.random(60) < 0.3
    wins = [(p > a) + 0.5 * (p == a) for p in scores[present] for a in scores[~present]]
    assert auroc(scores, present) == pytest.approx(sum(wins) / len(wins))


def test_auroc_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, present = rng.integers(0, 9, 200) / 9, rng.random(200) < 0.5
    assert auroc(scores, present) == pytest.approx(metrics.roc_auc_score(present, scores))


def test_auroc_of_one_kind_only_is_undefined():
    assert math.isnan(auroc([0.1, 0.2], [True, True])) and math.isnan(auroc([], []))


def test_intervals_in_closed_form():
    mean, half_width, num_runs = confidence_interval([1.0, 2.0, 3.0])
    assert (mean, num_runs) == (2.0, 3) and half_width == pytest.approx(1.96 / math.sqrt(3))
    assert confidence_interval([4.0]) == (4.0, None, 1)
    assert confidence_interval([4.0, math.nan]) == (4.0, None, 1)
    assert math.isnan(confidence_interval([]).mean)
    assert str(confidence_interval([1.0, 2.0, 3.0])) == "2.0 ± 1.1"
    assert (str(confidence_interval([4.0])), str(confidence_interval([]))) == ("4.0", "-")


def test_runs_are_summarized_key_by_key():
    runs = [{"bbox": {"AP": 1.0}, "num_missing": 0}, {"bbox": {"AP": 3.0, "APl": math.nan}}]
    summary = summarize_runs(runs)
    assert summary["bbox"]["AP"] == (2.0, pytest.approx(1.96), 2)
    assert summary["num_missing"] == (0.0, None, 1) and math.isnan(summary["bbox"]["APl"].mean)
    with pytest.raises(ValueError, match="at least one"):
        summarize_runs([])


def test_a_crowd_takes_many_but_only_what_fits_nothing_else():
    # Detection 0 fits the instance better, 1 only the crowd, 2 both but the instance is taken.
    ious = np.array([[0.6, 0.9], [0.1, 0.8], [0.7, 0.7]])
    matched = match_greedily(ious, np.array([False, True]), 0.5)
    assert matched.tolist() == [0, 1, 1]
    assert match_greedily(np.zeros((0, 2)), np.array([False, True]), 0.5).shape == (0,)
    assert match_greedily(np.zeros((3, 0)), np.zeros(0, bool), 0.5).tolist() == [-1, -1, -1]


def test_false_positives_and_presence_by_hand():
    dicts = random_dicts(np.random.default_rng(0), num_images=2, max_instances=1, crowd=0.0)
    for record, contiguous in zip(dicts, (0, 1), strict=True):
        record["annotations"][0].update(category_id=contiguous, bbox=[10, 10, 20, 20])
    truth, plan = truth_of(dicts), plan_of(dicts, class_ids=(3, 7), protocol="open")
    detections = [
        detection(1, 3, [10, 10, 20, 20], 0.9),
        detection(1, 3, [60, 40, 20, 20], 0.8),
        detection(1, 7, [10, 10, 20, 20], 0.95),
        detection(2, 7, [60, 40, 20, 20], 0.3),
    ]
    assignments = assign_pairs(truth, detections, plan)
    assert false_positives_per_image(assignments) == 1.0
    assert false_positives_per_image(assignments, 0.2) == 1.5
    # Present pairs score 0.9 and 0.3, absent ones 0.95 and 0.
    assert presence_metrics(truth, assignments) == {
        "AUROC": 50.0,
        "false_positives_per_image": 1.0,
        "hit_rate": 50.0,
        "false_alarm_rate": 50.0,
    }
    assert math.isnan(false_positives_per_image({}))


def test_a_crowd_alone_is_neither_present_nor_absent():
    dicts = random_dicts(np.random.default_rng(1), num_images=2, max_instances=1, crowd=0.0)
    dicts[1]["annotations"][0].update(iscrowd=1, category_id=0)
    dicts[0]["annotations"][0].update(category_id=0)
    truth = truth_of(dicts)
    assert (truth.is_present(1, 3), truth.is_present(2, 3), truth.is_present(1, 7)) == (
        *(True, None, False),
    )
    plan = plan_of(dicts, class_ids=(3,), protocol="open")
    values = presence_metrics(truth, assign_pairs(truth, [], plan))
    assert math.isnan(values["AUROC"]) and values["hit_rate"] == 0
    assert math.isnan(values["false_alarm_rate"])


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_clutter_equals_scores_on_the_images_of_each_bin(task):
    rng = np.random.default_rng(2)
    dicts = random_dicts(rng, num_images=14, max_instances=9)
    truth, plan = truth_of(dicts), plan_of(dicts, protocol="open")
    detections = random_detections(rng, dicts)
    rows = ap50_by_instances(truth, assign_pairs(truth, detections, plan, task))
    assert [r.label for r in rows] == ["1", "2–3", "4–7", "8–15", "≥ 16"]
    for row, (first, last) in zip(rows, INSTANCE_BINS, strict=True):
        inside = [
            r["image_id"]
            for r in dicts
            if first <= sum(not a["iscrowd"] for a in r["annotations"]) <= last
        ]
        episodes = tuple(e for e in plan.episodes if e.image_id in inside)
        assert row.num_images == len(episodes)
        expected = math.nan
        if episodes:
            of_bin = dataclasses.replace(plan, episodes=episodes)
            expected = score_detections(truth, detections, of_bin, task).metrics["AP50"]
        assert row.ap50 == pytest.approx(expected, nan_ok=True)
    assert math.isnan(rows[-1].ap50)


@pytest.mark.parametrize("protocol", ["present", "open"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_confusion_equals_relabelled_detections(protocol, task):
    rng = np.random.default_rng(3)
    dicts = random_dicts(rng, num_images=8)
    truth, plan = truth_of(dicts), plan_of(dicts, protocol=protocol)
    detections = random_detections(rng, dicts)
    matrix = confusion_matrix(truth, detections, plan, task)
    everywhere = confusion_matrix(truth, detections, plan, task, all_images=True)
    scores = score_detections(truth, detections, plan, task)
    assert scores.class_ids == plan.class_ids
    np.testing.assert_allclose(np.diag(matrix), scores.ap50)
    for i, class_i in enumerate(plan.class_ids):
        searched = [e for e in plan.episodes if class_i in e.class_ids]
        found = [
            d
            for d in detections
            if d["category_id"] == class_i and d["image_id"] in {e.image_id for e in searched}
        ]
        for j, class_j in enumerate(plan.class_ids):
            relabelled = [{**d, "category_id": class_j} for d in found]
            for result, episodes in ((matrix, searched), (everywhere, plan.episodes)):
                as_j = [
                    dataclasses.replace(e, class_ids=(class_j,), supports=((0,),)) for e in episodes
                ]
                plan_j = dataclasses.replace(plan, class_ids=(class_j,), episodes=tuple(as_j))
                expected = score_detections(truth, relabelled, plan_j, task).metrics["AP50"]
                assert result[i, j] == pytest.approx(expected, nan_ok=True), (class_i, class_j)


def test_confusion_without_detections_and_without_errors():
    dicts = random_dicts(np.random.default_rng(4), num_images=10, crowd=0.0)
    truth, plan = truth_of(dicts), plan_of(dicts, protocol="open")
    assert (confusion_matrix(truth, [], plan) == 0).all()
    perfect = confusion_matrix(truth, perfect_detections(dicts), plan)
    np.testing.assert_allclose(np.diag(perfect), 100)
    assert perfect[~np.eye(3, dtype=bool)].max() < 30
