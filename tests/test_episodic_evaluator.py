"""The evaluator of a plan: equal to plain scoring and to detectron2's, and strict at its border."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
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
from fewshot_d2.evaluation import EpisodicCOCOEvaluator, evaluate_detections
from fewshot_d2.evaluation.coco_scoring import planned_pairs
from fewshot_d2.structures import Support, SupportSet


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
                # detectron2's evaluator, an oracle here, takes a match with annotation 0 for none.
                "id": a["id"] + 1,
                **{key: a[key] for key in ("bbox", "iscrowd", "segmentation")},
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


def test_open_search_of_all_classes_is_ordinary_coco_evaluation(registered):
    name, dicts = registered
    plan = plan_of(dicts, tuple(CLASS_NAMES), protocol="open", dataset=name)
    detections = random_detections(np.random.default_rng(10), dicts, tuple(CLASS_NAMES))
    ours = EpisodicCOCOEvaluator(name, plan)
    feed(ours, dicts, plan, detections)
    detectron2s = COCOEvaluator(name, tasks=("bbox", "segm"), use_fast_impl=False)
    detectron2s.reset()
    for episode in plan.episodes:
        rows = [d for d in detections if d["image_id"] == episode.image_id]
        # All classes are searched in order, so episode-local classes are contiguous ids.
        detectron2s.process([{"image_id": episode.image_id}], [output_of(rows, episode)])
    results, expected = ours.evaluate(), detectron2s.evaluate()
    for task in ("bbox", "segm"):
        for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog", "AP-bird"):
            assert results[task][metric] == pytest.approx(expected[task][metric], nan_ok=True)
    # What detectron2's hooks and loggers do with results.
    print_csv_format(results)
    assert all(isinstance(float(v), float) for v in flatten_results_dict(results).values())


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
    with pytest.raises(ValueError, match="episode 0 .*image 77 that is not there"):
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
