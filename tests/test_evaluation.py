"""Scores against naive loops, and the evaluator's border."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from evaluation_cases import (
    CLASS_NAMES,
    HEIGHT,
    WIDTH,
    box_mask,
    detection,
    perfect_detections,
    plan_of,
    random_detections,
    random_dicts,
    truth_of,
)
from pycocotools import mask as mask_api

from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.evaluation import EpisodicCOCOEvaluator, evaluate_detections, score_detections
from fewshot_d2.evaluation.assignment import assign_pairs, best_threshold, precision_by_class
from fewshot_d2.evaluation.coco_scoring import GroundTruth, planned_pairs
from fewshot_d2.structures import Support, SupportSet

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
IOUS = [0.5 + 0.05 * i for i in range(10)]


def naive_iou(shape_a, shape_b, crowd_b):
    """IoU of two bool masks or two XYWH boxes."""
    if isinstance(shape_a, np.ndarray):
        common = float((shape_a & shape_b).sum())
        area_a, area_b = float(shape_a.sum()), float(shape_b.sum())
    else:
        (ax, ay, aw, ah), (bx, by, bw, bh) = shape_a, shape_b
        common = max(min(ax + aw, bx + bw) - max(ax, bx), 0.0)
        common *= max(min(ay + ah, by + bh) - max(ay, by), 0.0)
        area_a, area_b = aw * ah, bw * bh
    return common / (area_a if crowd_b else area_a + area_b - common)


def naive_ap(truth, detections, class_id, task, iou, area):
    """(average precision, recall) of a class over truth = [(image, shape, area, crowd)]."""
    num_wanted, outcomes = 0, []
    for image in sorted({row[0] for row in truth}):
        instances = [row for row in truth if row[0] == image]
        ignored = [crowd or not area[0] <= size <= area[1] for _, _, size, crowd in instances]
        num_wanted += ignored.count(False)
        taken = set()
        found = [d for d in detections if d[0] == image]
        for _, shape, size, score in sorted(found, key=lambda d: -d[3])[:100]:
            best, best_rank = None, (False, 0.0)
            for index, (_, other, _, crowd) in enumerate(instances):
                overlap = naive_iou(shape, other, crowd)
                rank = (not ignored[index], overlap)
                if overlap >= iou and (crowd or index not in taken) and rank > best_rank:
                    best, best_rank = index, rank
            if best is None:
                if area[0] <= size <= area[1]:
                    outcomes.append((score, False))
                continue
            taken.add(best)
            if not ignored[best]:
                outcomes.append((score, True))
    if not num_wanted:
        return None
    outcomes.sort(key=lambda pair: -pair[0])
    points, right = [], 0
    for number, (_, hit) in enumerate(outcomes, start=1):
        right += hit
        points.append((right / num_wanted, right / number))
    total = 0.0
    for step in range(101):
        total += max((p for r, p in points if r >= step / 100 - 1e-12), default=0.0)
    return total / 101, right / num_wanted


def naive_metrics(dicts, detections, plan, task):
    """The metrics that COCO reports for 100 detections, by loops over everything."""
    ids = list(CLASS_NAMES)
    pairs = [(e.image_id, c) for e in plan.episodes for c in e.class_ids]
    collected = {}
    for class_id in plan.class_ids:
        images = [i for i, c in pairs if c == class_id]
        truth, found = [], []
        for record in dicts:
            if record["image_id"] not in images:
                continue
            truth.append((record["image_id"], None, None, None))
            for a in record["annotations"]:
                if ids[a["category_id"]] == class_id:
                    mask = mask_api.decode(a["segmentation"]).astype(bool)
                    shape = mask if task == "segm" else tuple(a["bbox"])
                    truth.append((record["image_id"], shape, mask.sum(), bool(a["iscrowd"])))
        for d in detections:
            if d["image_id"] in images and d["category_id"] == class_id:
                mask = mask_api.decode(d["segmentation"]).astype(bool)
                size = mask.sum() if task == "segm" else d["bbox"][2] * d["bbox"][3]
                shape = mask if task == "segm" else tuple(d["bbox"])
                found.append((d["image_id"], shape, size, d["score"]))
        for name, area in AREAS.items():
            for iou in IOUS:
                value = naive_class(truth, found, images, task, iou, area)
                if value is not None:
                    collected.setdefault(name, {}).setdefault(class_id, {})[round(iou, 2)] = value
    return collected


def naive_class(truth, found, images, task, iou, area):
    """Images without an instance count too: the marker rows of ``truth`` name them."""
    rows = [row for row in truth if row[1] is not None]
    empty = set(images) - {row[0] for row in rows}
    # A crowd that nothing overlaps makes an image known without adding anything to be found.
    nowhere = np.zeros((HEIGHT, WIDTH), bool) if task == "segm" else (-9.0, -9.0, 1.0, 1.0)
    rows += [(image, nowhere, 1, True) for image in empty]
    return naive_ap(rows, found, None, task, iou, area)


def mean(values):
    values = list(values)
    return 100 * sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("protocol", ["present", "open"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_naive_loops(protocol, task, seed):
    rng = np.random.default_rng(seed)
    dicts = random_dicts(rng)
    detections = random_detections(rng, dicts)
    plan = plan_of(dicts, protocol=protocol)
    naive = naive_metrics(dicts, detections, plan, task)
    scores = score_detections(truth_of(dicts), detections, plan, task)
    expected = {
        "AP": mean(v[0] for c in naive[""].values() for v in c.values()),
        "AP50": mean(c[0.5][0] for c in naive[""].values()),
        "AP75": mean(c[0.75][0] for c in naive[""].values()),
        "AR100": mean(v[1] for c in naive[""].values() for v in c.values()),
    }
    for size in "sml":
        of_size = naive.get(size, {}).values()
        expected[f"AP{size}"] = mean(v[0] for c in of_size for v in c.values())
    for name, value in expected.items():
        assert scores.metrics[name] == pytest.approx(value, nan_ok=True, abs=1e-9), name
    assert scores.class_ids == tuple(sorted(naive[""]))
    for index, class_id in enumerate(scores.class_ids):
        by_iou = naive[""][class_id]
        assert scores.ap50[index] == pytest.approx(100 * by_iou[0.5][0])
        assert scores.ap[index] == pytest.approx(mean(v[0] for v in by_iou.values()))
    own = precision_by_class(assign_pairs(truth_of(dicts), detections, plan, task))
    np.testing.assert_allclose(np.array(list(own.values())), scores.precision50, atol=1e-12)


def test_perfect_detections_score_100_and_none_0():
    dicts = random_dicts(np.random.default_rng(0), crowd=0.0)
    plan = plan_of(dicts, protocol="open")
    for task in ("bbox", "segm"):
        perfect = score_detections(truth_of(dicts), perfect_detections(dicts), plan, task).metrics
        assert perfect["AP"] == pytest.approx(100) and perfect["AR100"] == pytest.approx(100)
        nothing = score_detections(truth_of(dicts), [], plan, task).metrics
        assert nothing["AP"] == nothing["AP50"] == nothing["AR100"] == 0


def test_only_searched_pairs_count():
    dicts = random_dicts(np.random.default_rng(1), crowd=0.0)
    truth, detections = truth_of(dicts), perfect_detections(dicts)
    plan = plan_of(dicts, class_ids=(3, 7))
    before = score_detections(truth, detections, plan, "bbox").metrics
    pairs = planned_pairs(plan)
    noise = [
        detection(r["image_id"], c, [1, 1, 20, 20], 0.99)
        for r in dicts
        for c in CLASS_NAMES
        if (r["image_id"], c) not in pairs
    ]
    assert noise
    assert score_detections(truth, detections + noise, plan, "bbox").metrics == before
    # Ground truth of class 20 is not searched, so not finding it costs nothing.
    of_plan = [d for d in detections if d["category_id"] != 20]
    assert score_detections(truth, of_plan, plan, "bbox").metrics == before


def test_false_alarms_on_absent_classes_count_in_the_open_protocol_only():
    dicts = random_dicts(np.random.default_rng(2), num_images=8, max_instances=2, crowd=0.0)
    truth, detections = truth_of(dicts), perfect_detections(dicts)
    absent = [
        detection(r["image_id"], c, [5, 5, 30, 30], 0.99)
        for r in dicts
        for c in (3, 7, 20)
        if truth.is_present(r["image_id"], c) is False
    ]
    for protocol, changes in (("present", False), ("open", True)):
        plan = plan_of(dicts, protocol=protocol)
        clean = evaluate_detections(truth, detections, plan)
        alarmed = evaluate_detections(truth, detections + absent, plan)
        assert clean["bbox"]["AP"] == pytest.approx(100)
        assert (alarmed["bbox"]["AP"] < 99) == changes
        assert ("presence" in clean) == changes
    assert clean["presence"]["AUROC"] == 100
    assert clean["presence"]["false_positives_per_image"] == 0
    assert alarmed["presence"]["AUROC"] == 0
    assert alarmed["presence"]["false_positives_per_image"] == len(absent) / len(dicts)
    assert alarmed["presence"]["false_alarm_rate"] == 100


def test_a_class_without_ground_truth_has_no_score():
    dicts = random_dicts(np.random.default_rng(3), crowd=0.0)
    plan = plan_of(dicts, class_ids=(3, 21), protocol="open")
    scores = score_detections(truth_of(dicts), perfect_detections(dicts), plan, "bbox")
    assert scores.class_ids == (3,) and scores.metrics["AP"] == pytest.approx(100)
    alone = plan_of(dicts, class_ids=(21,), protocol="open")
    scores = score_detections(truth_of(dicts), [], alone, "bbox")
    assert scores.class_ids == () and math.isnan(scores.metrics["AP"])


def test_masks_that_are_not_there():
    dicts = random_dicts(np.random.default_rng(4), masks=False, crowd=0.0)
    plan = plan_of(dicts)
    boxes_only = perfect_detections(dicts, masks=False)
    assert set(evaluate_detections(truth_of(dicts), boxes_only, plan)) == {
        *("bbox", "num_pairs", "num_missing_pairs")
    }
    with_masks = evaluate_detections(truth_of(dicts), perfect_detections(dicts), plan)
    assert math.isnan(with_masks["segm"]["AP"])
    with pytest.raises(ValueError, match="image 1"):
        evaluate_detections(truth_of(dicts), boxes_only[:1] + perfect_detections(dicts)[1:], plan)


def test_empty_plan_repeated_pair_and_unknown_task():
    dicts = random_dicts(np.random.default_rng(5))
    with pytest.raises(ValueError, match="must have an episode"):
        score_detections(truth_of(dicts), [], plan_of([]), "bbox")
    with pytest.raises(ValueError, match="image 1 must be searched for class"):
        planned_pairs(plan_of_twice(dicts))
    with pytest.raises(ValueError, match="task must be"):
        score_detections(truth_of(dicts), [], plan_of(dicts), "keypoints")


def plan_of_twice(dicts):
    import dataclasses

    plan = plan_of(dicts)
    again = dataclasses.replace(plan.episodes[0], id=99)
    return dataclasses.replace(plan, episodes=(*plan.episodes, again))


def test_best_threshold_against_all_thresholds():
    rng = np.random.default_rng(6)
    dicts = random_dicts(rng)
    detections = random_detections(rng, dicts)
    assignments = assign_pairs(truth_of(dicts), detections, plan_of(dicts, protocol="open"))

    def f1(threshold):
        right, wrong, missed = np.sum([a.counts(threshold) for a in assignments.values()], axis=0)
        return 2 * right / (2 * right + wrong + missed)

    best = max(f1(d["score"]) for d in detections)
    assert f1(best_threshold(assignments)) == pytest.approx(best)
    nothing = assign_pairs(truth_of(dicts), [], plan_of(dicts))
    assert best_threshold(nothing) == 0.5


def test_ground_truth_from_polygons_and_missing_areas():
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    record = random_dicts(np.random.default_rng(0), num_images=1)[0]
    common = {"bbox": (10, 10, 20, 20), "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record["annotations"] = [
        {"id": 0, **common, "segmentation": [square]},
        {"id": 1, **common, "area": 7.5},
        {"id": 2, **common},
    ]
    polygon, annotated, box = GroundTruth([record], CLASS_NAMES).instances(1, 3)
    assert (polygon.area, annotated.area, box.area) == (400.0, 7.5, 400.0)
    assert mask_api.decode(polygon.rle)[10:30, 10:30].all() and box.rle is None


@pytest.fixture
def registered(tmp_path, request):
    """A COCO json on disk, registered under a name of its own; gives (name, dicts)."""
    dicts = random_dicts(np.random.default_rng(7), num_images=5, crowd=0.1)
    ids = list(CLASS_NAMES)
    content = {
        "images": [{k: r[k] for k in ("height", "width")} for r in dicts],
        "categories": [{"id": i, "name": n} for i, n in CLASS_NAMES.items()],
        "annotations": [
            {
                **{key: a[key] for key in ("id", "bbox", "iscrowd", "segmentation")},
                "category_id": ids[a["category_id"]],
                "image_id": r["image_id"],
                "area": int(mask_api.area(a["segmentation"])),
            }
            for r in dicts
            for a in r["annotations"]
        ],
    }
    for image, record in zip(content["images"], dicts, strict=True):
        image.update(id=record["image_id"], file_name=f"{record['image_id']}.png")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    name = f"evaluation_{request.node.name}"
    register_instances(name, tmp_path / "instances.json", tmp_path)
    yield name, dicts
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def query_of(record, episode):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    names = [CLASS_NAMES[c] for c in episode.class_ids]
    return {
        "file_name": record["file_name"],
        "image_id": episode.image_id,
        "height": HEIGHT,
        "width": WIDTH,
        "episode_id": episode.id,
        "support": SupportSet(list(episode.class_ids), names, [[Support(image)] for _ in names]),
    }


def output_of(rows, episode, masks=True):
    """COCO rows of one image -> the model's output with episode-local classes."""
    boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes))
    instances.scores = torch.tensor([r["score"] for r in rows], dtype=torch.float64)
    local = [episode.class_ids.index(r["category_id"]) for r in rows]
    instances.pred_classes = torch.tensor(local, dtype=torch.int64)
    if masks:
        shapes = [box_mask(r["bbox"]) for r in rows]
        instances.pred_masks = torch.from_numpy(np.array(shapes, bool).reshape(-1, HEIGHT, WIDTH))
    return {"instances": instances}


def feed(evaluator, dicts, plan, detections, skip=()):
    pairs = planned_pairs(plan)
    for episode in plan.episodes:
        if episode.id in skip:
            continue
        rows = [
            d
            for d in detections
            if d["image_id"] == episode.image_id and (d["image_id"], d["category_id"]) in pairs
        ]
        record = next(r for r in dicts if r["image_id"] == episode.image_id)
        evaluator.process([query_of(record, episode)], [output_of(rows, episode)])


@pytest.mark.parametrize("protocol", ["present", "open"])
def test_evaluator_gives_the_scores_of_its_plan(registered, tmp_path, protocol):
    name, dicts = registered
    plan = plan_of(dicts, protocol=protocol, dataset=name)
    detections = random_detections(np.random.default_rng(8), dicts)
    evaluator = EpisodicCOCOEvaluator(name, plan, output_dir=str(tmp_path / "out"))
    feed(evaluator, dicts, plan, detections)
    results = evaluator.evaluate()
    assert (results["num_episodes"], results["num_missing"]) == (len(plan.episodes), 0)
    expected = evaluate_detections(truth_of(dicts), detections, plan)
    for task in ("bbox", "segm"):
        assert results[task] == pytest.approx(expected[task], nan_ok=True)
        assert f"AP50-{CLASS_NAMES[3]}" in results[task]
    assert ("presence" in results) == (protocol == "open")
    saved = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert saved == evaluator.detections and len(list((tmp_path / "out").iterdir())) == 1
    assert {d["category_id"] for d in saved} <= {3, 7, 20}
    # What was saved scores the same when it is read again.
    assert evaluate_detections(truth_of(dicts), saved, plan)["bbox"] == pytest.approx(
        results["bbox"], nan_ok=True
    )
    evaluator.reset()
    assert evaluator.evaluate()["num_missing"] == len(plan.episodes)


def test_missing_and_broken_outputs_are_counted(registered, caplog):
    name, dicts = registered
    plan = plan_of(dicts, protocol="open", dataset=name)
    perfect = perfect_detections(dicts)
    evaluator = EpisodicCOCOEvaluator(name, plan)
    feed(evaluator, dicts, plan, perfect, skip=(0, 1, 2))
    broken = output_of([d for d in perfect if d["image_id"] == 1], plan.episodes[0])
    broken["instances"].scores[0] = math.nan
    evaluator.process([query_of(dicts[0], plan.episodes[0])], [broken])
    evaluator.process([query_of(dicts[1], plan.episodes[1])], [{}])
    evaluator.skip({"episode_id": 2, "file_name": "x.png"}, "truncated")
    results = evaluator.evaluate()
    assert results["num_missing"] == 3 and results["num_missing_pairs"] == 9
    # Their instances are still to be found.
    assert results["bbox"]["AP"] < 99
    assert "not finite" in caplog.text and "x.png" in caplog.text


def test_evaluator_refuses_what_does_not_fit(registered):
    name, dicts = registered
    plan = plan_of(dicts, dataset=name)
    with pytest.raises(ValueError, match="plan of other"):
        EpisodicCOCOEvaluator(name, plan_of(dicts, dataset="other"))
    with pytest.raises(ValueError, match="must have an episode"):
        EpisodicCOCOEvaluator(name, plan_of([], dataset=name))
    far = [{**dicts[0], "image_id": 77}]
    with pytest.raises(ValueError, match="episode 0 .*image 77"):
        EpisodicCOCOEvaluator(name, plan_of(far, dataset=name))
    evaluator = EpisodicCOCOEvaluator(name, plan)
    episode = plan.episodes[0]
    query, output = query_of(dicts[0], episode), output_of([], episode)
    with pytest.raises(ValueError, match="episode 44"):
        evaluator.process([{**query, "episode_id": 44}], [output])
    rows = [detection(1, episode.class_ids[0], [1, 1, 9, 9], 0.5)]
    wrong = output_of(rows, episode)
    wrong["instances"].pred_classes += len(episode.class_ids)
    with pytest.raises(ValueError, match="pred_classes of episode 0"):
        evaluator.process([query], [wrong])
    evaluator.process([query, query], [output, output])
    with pytest.raises(ValueError, match="once"):
        evaluator.evaluate()


def _evaluate_in_process(rank, folder, name, plan, dicts, detections):
    """One of two gloo processes; each feeds every second episode."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    if name not in DatasetCatalog.list():
        register_instances(name, f"{folder}/instances.json", folder)
    evaluator = EpisodicCOCOEvaluator(name, plan, output_dir=f"{folder}/gathered")
    others = [e.id for e in plan.episodes if e.id % 2 != rank]
    feed(evaluator, dicts, plan, detections, skip=others)
    results = evaluator.evaluate()
    with open(f"{folder}/results{rank}.json", "w") as file:
        json.dump(results, file)


def test_two_processes_give_the_results_of_one(registered, tmp_path):
    name, dicts = registered
    plan = plan_of(dicts, dataset=name)
    detections = random_detections(np.random.default_rng(9), dicts)
    arguments = (str(tmp_path), name, plan, dicts, detections)
    torch.multiprocessing.start_processes(
        _evaluate_in_process, arguments, nprocs=2, start_method="fork"
    )
    alone = EpisodicCOCOEvaluator(name, plan, distributed=False)
    feed(alone, dicts, plan, detections)
    assert json.loads((tmp_path / "results1.json").read_text()) == {}
    gathered = json.loads((tmp_path / "results0.json").read_text())
    expected = json.loads(json.dumps(alone.evaluate()))
    assert gathered["num_missing"] == 0
    for task in ("bbox", "segm"):
        assert gathered[task] == pytest.approx(expected[task], nan_ok=True)
