"""The episodic benchmark end to end: numbers against a second way to get them, and what may go wrong."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from factories import (
    TINY_REPMET,
    TINY_REPMET_OVERRIDES,
    registered_set,
    tiny_model,
    tiny_repmet,
    write_set,
)
from PIL import Image
from torchvision.ops import box_iou

from fewshot_d2 import Support, SupportSet, load_config
from fewshot_d2.data.benchmark_plans import build_benchmark_plans
from fewshot_d2.data.loaders import build_factory, build_mapper
from fewshot_d2.engine.benchmark import named_plans
from fewshot_d2.engine.episode_runner import EpisodeRunner, Outcome, truth_of
from fewshot_d2.engine.evaluate import evaluate
from fewshot_d2.engine.finetune import FineTuning
from fewshot_d2.evaluation.benchmark_page import shot_curves

NAME = "benchmarked"
TUNING = FineTuning("last_layer", 2, 0.01, 0.9, 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_set(folder, num_images=24)
    with registered_set(NAME, folder):
        yield folder


@pytest.fixture(scope="module")
def plan(folder):
    (plan,) = build_benchmark_plans(
        dataset=NAME,
        support_dataset=NAME,
        split="all",
        sides=("all",),
        shots=(2,),
        ways=3,
        queries_per_class=2,
        num_episodes=3,
        seed=0,
    )
    return plan


def config(*overrides):
    own = ["DATASETS.TEST", (NAME,), "FEWSHOT.BENCHMARK.EPISODES", 2, "FEWSHOT.BENCHMARK.WAYS", 2]
    own += ["FEWSHOT.BENCHMARK.SHOTS", (1, 2), "FEWSHOT.BENCHMARK.QUERIES_PER_CLASS", 2]
    return load_config(str(TINY_REPMET), [*TINY_REPMET_OVERRIDES, *own, *overrides])


def runner_of(model, *, kept_queries=100):
    mapper = build_mapper(config(), is_train=False)
    return EpisodeRunner(model, build_factory(NAME, NAME), mapper, kept_queries=kept_queries)


def voc_by_hand(model, plan, folder):
    """Joint AP with one-to-one matching, from the json and plain ``forward`` calls."""
    content = json.loads((folder / "instances.json").read_text())
    annotations = {a["id"]: a for a in content["annotations"]}
    files = {i["id"]: i["file_name"] for i in content["images"]}

    def pixels(image_id):
        array = np.array(Image.open(folder / files[image_id]).convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1)

    def xyxy(annotation):
        x, y, w, h = annotation["bbox"]
        return torch.tensor([x, y, x + w, y + h], dtype=torch.float32)

    entries, num_truth = [], 0
    for episode in plan.episodes:
        examples = [
            [Support(pixels(annotations[i]["image_id"]), xyxy(annotations[i])) for i in ids]
            for ids in episode.supports
        ]
        names = [str(c) for c in episode.class_ids]
        support = SupportSet(list(episode.class_ids), names, examples)
        for image_id in episode.query_image_ids:
            image = pixels(image_id)
            resized = model.resize.get_transform(image.permute(1, 2, 0).numpy())
            array = resized.apply_image(image.permute(1, 2, 0).numpy())
            query = {"image": torch.from_numpy(array.copy()).permute(2, 0, 1), "support": support}
            with torch.no_grad():
                found = model([{**query, "height": 40, "width": 60}])[0]["instances"]
            for k, class_id in enumerate(episode.class_ids):
                truth = [
                    xyxy(a)
                    for a in content["annotations"]
                    if a["image_id"] == image_id
                    and a["category_id"] == class_id
                    and not a["iscrowd"]
                ]
                num_truth += len(truth)
                own = found[found.pred_classes == k]
                own = own[own.scores.argsort(descending=True, stable=True)]
                taken = set()
                for box, score in zip(own.pred_boxes.tensor, own.scores.tolist(), strict=True):
                    right = False
                    if truth:
                        best, g = box_iou(box[None], torch.stack(truth))[0].max(dim=0)
                        right = best >= 0.5 and g.item() not in taken
                        taken |= {g.item()} if right else set()
                    entries.append((score, bool(right)))
    entries.sort(key=lambda e: (-e[0], e[1]))
    hits, points = 0, []
    for rank, (_, right) in enumerate(entries, start=1):
        hits += right
        if right:
            points.append(hits / rank)
    return sum(max(points[i:]) for i in range(len(points))) / num_truth, len(entries)


def test_numbers_equal_those_of_another_way(plan, folder):
    # A random model hits something if it looks at many places.
    model = tiny_repmet("MODEL.RPN.POST_NMS_TOPK_TEST", 150)
    outcome = runner_of(model).run(plan, None)
    expected, num_entries = voc_by_hand(model, plan, folder)
    summary = outcome.pooled["voc"].summary()
    assert summary["num_entries"] == num_entries
    assert 0 < expected < 1
    assert summary["joint"] == pytest.approx(expected, abs=1e-4)
    assert outcome.metrics()["AP_voc"] == pytest.approx(100 * expected, abs=1e-2)
    assert outcome.metrics()["episodes"] == 3 and outcome.unread == []


class FixedSummary:
    """A pooled precision whose numbers tell where they come from."""

    def __init__(self, offset):
        names = ("joint", "per_episode_mean", "per_class_mean")
        self.values = {name: (offset + i) / 100 for i, name in enumerate(names)}
        self.values |= {f"{name}_ci95": v / 10 for name, v in self.values.items()}
        self.values["num_episodes"] = 7

    def summary(self):
        return self.values

    def recall_at(self, rank):
        return rank / 1000


def test_each_number_has_its_own_name():
    pooled = {"official": FixedSummary(10), "voc": FixedSummary(20), "searched": FixedSummary(30)}
    metrics = Outcome(pooled, unread=["a", "a"], seconds=5.0, support_seconds=[1.0, 2.0]).metrics()
    expected = {
        "AP": 10,
        "AP_episodes": 11,
        "AP_classes": 12,
        "AP_voc": 20,
        "AP_voc_classes": 22,
        "AP_searched": 30,
    }
    expected |= {f"{name}_ci95": value / 10 for name, value in expected.items()}
    expected |= {"R10": 1, "R100": 10, "episodes": 7, "unread_queries": 2}
    assert metrics == pytest.approx({**expected, "support_seconds": 1.5, "seconds": 5.0})


def test_objects_of_other_classes_can_be_left_out_of_the_count(plan):
    class EveryBox(torch.nn.Module):
        """Finds all objects of the data set, each as the first class of the episode."""

        def describe_queries(self, queries):
            return queries

        def encode_support(self, support_sets):
            return None

        def search(self, query, features):
            image = factory.query_index.image_index(query["image_id"])
            class_ids = factory.query_index.class_ids
            boxes = truth_of(runner.factory.query_index, query["image_id"], class_ids).gt_boxes
            found = Instances((query["height"], query["width"]), pred_boxes=boxes)
            found.scores = torch.ones(len(boxes))
            found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
            counts.append({c: len(factory.query_index.instances(image, c)) for c in class_ids})
            return found

    factory, mapper = build_factory(NAME, NAME), build_mapper(config(), is_train=False)
    runner, counts = EpisodeRunner(EveryBox(), factory, mapper, kept_queries=0), []
    pooled = runner.run(plan, None).pooled
    entries = {name: p.summary()["num_entries"] for name, p in pooled.items()}
    queries = [e for e in plan.episodes for _ in e.query_image_ids]
    searched = sum(c[i] for e, c in zip(queries, counts, strict=True) for i in e.class_ids)
    everything = sum(sum(c.values()) for c in counts)
    assert searched == entries["searched"] < entries["official"] <= entries["voc"] == everything


@pytest.mark.parametrize("tuning", [None, TUNING, dataclasses.replace(TUNING, layers="head")])
def test_keeping_queries_changes_nothing(plan, tuning):
    model = tiny_repmet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kept, anew = (runner_of(model, kept_queries=n).run(plan, tuning).metrics() for n in (100, 0))
    for name in ("AP", "AP_voc", "R10", "AP_ci95"):
        assert kept[name] == anew[name]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_tuned_queries_are_described_anew(plan):
    model, tuning = tiny_repmet(), dataclasses.replace(TUNING, layers="head", base_lr=0.05)
    runner = runner_of(model)
    runner.run(plan, None)
    before = runner.kept.cache_info()
    runner.run(plan, tuning)
    assert runner.kept.cache_info() == before and before.misses > 0
    runner.run(plan, TUNING)
    assert runner.kept.cache_info().hits > before.hits


def test_detectors_without_tuning_run_as_well(plan):
    metrics = runner_of(tiny_model("MODEL.MASK_ON", False)).run(plan, None).metrics()
    assert 0 <= metrics["AP"] <= 100 and metrics["episodes"] == 3
    with pytest.raises(ValueError, match="fine-tuning needs a detector"):
        runner_of(tiny_model("MODEL.MASK_ON", False)).run(plan, TUNING)


def test_detectors_without_tuning_are_refused_before_anything_runs(folder, tmp_path):
    with pytest.raises(ValueError, match=r"FINE_TUNE must be \(False,\) for SiameseMaskRCNN"):
        evaluate(config("OUTPUT_DIR", str(tmp_path)), tiny_model("MODEL.MASK_ON", False))
    assert not list(tmp_path.iterdir())


def test_class_without_supports_counts_as_missed(plan):
    model = tiny_repmet()
    whole = runner_of(model).run(plan, None).pooled["official"].summary()
    episodes = [dataclasses.replace(e, supports=((), *e.supports[1:])) for e in plan.episodes]
    partial = dataclasses.replace(plan, episodes=tuple(episodes))
    found = runner_of(model).run(partial, None).pooled["official"].summary()
    assert found["num_truth"] == whole["num_truth"]
    assert found["num_entries"] < whole["num_entries"]


def test_unreadable_pictures_count_as_missed_and_are_named(plan, folder, caplog):
    model, runner = tiny_repmet(), runner_of(tiny_repmet())
    query = plan.episodes[0].query_image_ids[0]
    support = runner.factory.support_index.locate(plan.episodes[1].supports[0][0])[0]
    names = [f"{query - 100}.png", f"{support}.png"]
    whole = runner.run(plan, None).pooled
    originals = {name: (folder / name).read_bytes() for name in names}
    try:
        for name in names:
            (folder / name).write_bytes(b"no picture")
        with caplog.at_level(logging.ERROR):
            outcome = runner_of(model).run(plan, None)
    finally:
        for name, content in originals.items():
            (folder / name).write_bytes(content)
    assert all(name in caplog.text for name in names)
    unread = " ".join(outcome.unread)
    assert "episode 1:" in unread and f"query {query}:" in unread
    assert outcome.metrics()["unread_queries"] == len(outcome.unread)
    for name, part in outcome.pooled.items():
        found, expected = part.summary(), whole[name].summary()
        assert found["num_truth"] == expected["num_truth"] and found["num_episodes"] == 3
        assert found["num_entries"] < expected["num_entries"]


def test_config_runs_every_plan_without_and_with_tuning(folder, tmp_path):
    cfg = config("OUTPUT_DIR", str(tmp_path))
    model = tiny_repmet().train()
    results = evaluate(cfg, model)
    assert model.training, "training goes on after a test"
    names = [f"{NAME}/all/2way-{n}shot{end}" for n in (1, 2) for end in ("", "/fine-tuned")]
    assert list(results) == names
    assert json.loads((tmp_path / "results.json").read_text()).keys() == set(names)
    hashes = json.loads((tmp_path / "plans.json").read_text())
    assert len(hashes) == 2 and all((tmp_path / "plans" / h["file"]).is_file() for h in hashes)
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    assert all((tmp_path / "pictures" / name / "episode_1.png").is_file() for name in names)
    files = [str(tmp_path / "plans" / h["file"]) for h in hashes]
    again = evaluate(
        config("OUTPUT_DIR", str(tmp_path / "again"), "FEWSHOT.BENCHMARK.PLANS", files),
        tiny_repmet(),
    )
    assert all(again[n]["AP"] == results[n]["AP"] for n in names)


def test_plans_with_one_name_are_refused(plan):
    assert [name for _, name in named_plans([plan])] == [f"{NAME}/all/3way-2shot"]
    with pytest.raises(ValueError, match="must differ in data set, side, ways or shots"):
        named_plans([plan, dataclasses.replace(plan, seed=1)])


def test_diagram_has_a_curve_for_each_number_of_ways():
    names = [f"a/novel/{ways}way-{n}shot" for ways in (2, 5) for n in (1, 10)]
    names.append("a/novel/5way-10shot/fine-tuned")
    results = {name: {"AP": i, "AP_ci95": 0.1} for i, name in enumerate(names)}
    assert shot_curves(results, "AP") == {
        "a/novel/2way": {1: (0, 0.1), 10: (1, 0.1)},
        "a/novel/5way": {1: (2, 0.1), 10: (3, 0.1)},
        "a/novel/5way/fine-tuned": {10: (4, 0.1)},
    }


def test_plan_of_another_split_is_refused(folder, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    cfg = config(
        "FEWSHOT.BENCHMARK.PLANS", (str(tmp_path / "plan.json"),), "FEWSHOT.SPLIT", "novel:b"
    )
    with pytest.raises(
        ValueError, match="must be a plan of DATASETS.TEST .* FEWSHOT.SPLIT 'novel:b'"
    ):
        evaluate(cfg, tiny_repmet())
