"""Few-shot detection by search from end to end (SPIL, section 4): plan, lists, stages, expansion, COCO results."""

import contextlib
import json

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from factories import ROOT, TINY_SPIL_OVERRIDES, registered_set, write_set
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from retrieval_cases import retrieval_config

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_index, build_plans, build_training_episodes
from fewshot_d2.data.pseudo_labels import PseudoLabels
from fewshot_d2.data.search_queries import planned_queries
from fewshot_d2.engine.evaluate import evaluate_only
from fewshot_d2.engine.query_expansion import expand_rank_lists
from fewshot_d2.engine.region_search import search_regions
from fewshot_d2.engine.self_paced import train_self_paced
from fewshot_d2.engine.trainer import EpisodicTrainer

CONFIGS = ROOT / "configs/spil"
SETS = {"coco482_train": 8, "coco482_test": 4}


@pytest.fixture
def folder(tmp_path):
    """Small sets under the names of the shipped configs."""
    with contextlib.ExitStack() as stack:
        for seed, (name, size) in enumerate(SETS.items()):
            (tmp_path / name).mkdir()
            write_set(tmp_path / name, num_images=size, seed=seed)
            stack.enter_context(registered_set(name, tmp_path / name))
        yield tmp_path


def config(name, folder, *overrides):
    return load_config(
        str(CONFIGS / f"{name}.yaml"),
        [
            *TINY_SPIL_OVERRIDES,
            *("FEWSHOT.SPLIT", "novel:a,b", "FEWSHOT.SUPERPIXELS.FOLDER", str(folder / "pixels")),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()),
            *("FEWSHOT.NUM_SHOTS", 2, *overrides),
        ],
    )


@pytest.fixture
def base(folder):
    """Weights of two steps on the base classes."""
    torch.manual_seed(0)
    trainer = EpisodicTrainer(config("coco482_base", folder, "OUTPUT_DIR", str(folder / "base")))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder / "base" / "model_final.pth"


@pytest.fixture
def plan(folder):
    (plan,) = build_plans(
        dataset="coco482_test",
        support_dataset="coco482_train",
        split="novel:a,b",
        sides=("novel",),
        runs=1,
        protocol="open",
        shots=3,
        seed=0,
        fixed_supports=True,
    )
    plan.save(folder / "plan.json")
    return plan


@pytest.fixture
def lists(folder, plan):
    found = search_regions(
        retrieval_config("FEWSHOT.RETRIEVAL.DEPTH", 4),
        dataset="coco482_train",
        query_dataset="coco482_train",
        queries=planned_queries(plan, build_index("coco482_train", plan.class_ids)),
        folder=folder / "lists",
    )
    found.save(folder / "lists.json")
    return found


def search_config(folder, base, *overrides):
    return config(
        "coco482_search",
        folder,
        *("FEWSHOT.SELF_PACED.RANK_LISTS", str(folder / "lists.json"), "MODEL.WEIGHTS", str(base)),
        # Untrained networks are sure of nothing.
        *("FEWSHOT.SELF_PACED.THRESHOLDS", (0.0, 0.0), "FEWSHOT.SELF_PACED.MAX_ITER", 2),
        *("FEWSHOT.SELF_PACED.STEPS", (), "OUTPUT_DIR", str(folder / "run"), *overrides),
    )


def test_from_shots_to_detections(folder, base, plan, lists):
    torch.manual_seed(0)
    cfg = search_config(folder, base)
    stages = train_self_paced(cfg, resume=False)
    assert [labels.stage for labels in stages] == [1, 2, 3]
    start = torch.load(base, weights_only=True)["model"]
    weights = torch.load(folder / "run" / "stage_0" / "model_final.pth", weights_only=True)["model"]
    # The trunk stays what it was, and stage 0 starts from the base classes' heads.
    assert all(torch.equal(start[k], weights[k]) for k in start if k.startswith("backbone."))
    heads = [k for k in start if k.endswith("weight") and not k.startswith("backbone.")]
    moved = [(start[k] - weights[k]).abs().max() / start[k].abs().max() for k in heads]
    assert 0 < max(moved) < 0.2
    for labels in stages:
        boxes = [found for of_list in labels.found for found in of_list]
        assert 1 < max(map(len, boxes)) <= cfg.FEWSHOT.SELF_PACED.BOXES_PER_IMAGE
        for found in boxes:
            corners = Boxes(torch.tensor([b.box for b in found]).reshape(-1, 4))
            assert (pairwise_iou(corners, corners).triu(1) <= 0.5 + 1e-6).all()

    # What the second search finds is ready for training.
    cfg = retrieval_config("FEWSHOT.RETRIEVAL.DEPTH", 4)
    joined = expand_rank_lists(cfg, lists, stages[0], folder=folder / "lists")
    joined.save(folder / "lists.json")
    assert joined.lists != lists.lists
    again = search_config(folder, base, "OUTPUT_DIR", str(folder / "again"))
    episodes = build_training_episodes(again)
    assert episodes[0]["support"].class_ids[0] in {row.query_id for row in lists}


def test_several_boxes_of_an_image_are_learned_from(folder, base, lists):
    """All confident ones, with the mean of their probabilities (spec B3, item 37)."""
    cfg = search_config(
        folder, base, "FEWSHOT.SELF_PACED.THRESHOLDS", (), "INPUT.RANDOM_FLIP", "none"
    )
    (labels,) = train_self_paced(cfg, resume=False)
    keys = ["FEWSHOT.SELF_PACED.LABELS", str(folder / "run" / "stage_1.json")]
    episodes = build_training_episodes(
        search_config(folder, base, *keys, "INPUT.RANDOM_FLIP", "none")
    )
    assert PseudoLabels.load(keys[1]) == labels
    numbers = set()
    for number in range(20):
        target, mapped = episodes.pool.sample(number).target, episodes[number]
        row = lists.lists[episodes.pool.sample(number).query_row]
        if not target.is_query:
            position = [c.image_id for c in row.candidates].index(target.image_id)
            found = labels.found[lists.lists.index(row)][position]
            least = cfg.FEWSHOT.SELF_PACED.MIN_SIDE
            large = [b for b in found if b.score > 0 and smaller_side(b.box) >= least]
            assert target.boxes == tuple(b.box for b in large)
            assert mapped["weights"][0] == pytest.approx(sum(b.score for b in large) / len(large))
            assert len(mapped["instances"]) == len(large)
            numbers.add(len(large))
    assert max(numbers) > 1


def smaller_side(box):
    return min(box[2] - box[0], box[3] - box[1])


def test_detections_are_scored_as_coco_detections(folder, base, plan):
    """pycocotools on the written file gives the reported AP, and no base class is in it."""
    cfg = search_config(
        folder,
        base,
        *("MODEL.WEIGHTS", str(base), "FEWSHOT.TEST.PLANS", (str(folder / "plan.json"),)),
        *("FEWSHOT.TEST.BASELINES", ()),
    )
    results = evaluate_only(cfg)["coco482_test/novel/bbox"]
    (path,) = (folder / "run" / "inference").rglob("*.json")
    detections = json.loads(path.read_text())
    assert {d["category_id"] for d in detections} == set(plan.class_ids)
    truth = COCO(str(folder / "coco482_test" / "instances.json"))
    scorer = COCOeval(truth, truth.loadRes(str(path)), "bbox")
    scorer.params.catIds = list(plan.class_ids)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    for name, value in zip(("AP", "AP50", "AP75"), scorer.stats):
        assert results[name] == pytest.approx(100 * value, abs=1e-6)
