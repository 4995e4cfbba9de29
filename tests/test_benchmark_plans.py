"""Benchmark plans: shots are boxes, supports and queries never meet, the same episodes for any number of shots."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from detectron2.structures import BoxMode
from factories import CATEGORIES, registered_set, write_set

from fewshot_d2.data.benchmark_plans import (
    BenchmarkEpisode,
    BenchmarkPlan,
    build_benchmark_plans,
    make_benchmark_plan,
)
from fewshot_d2.data.index import InstanceIndex

IDS = {k: 10 * (k + 1) for k in range(8)}
# Of ``plan_of(make_index())``. It must not change: published numbers are known by their plans' hashes.
STORED_SHA256 = "287d6c7ad46ccd1fb468a2ad285b6e0d93ea5b7e71a8aa45afc46636d43dbe8c"


def make_index(num_images=60, first_id=0, folder=""):
    """Images with one to four instances of eight classes; the last class has three images only."""
    rng, dicts = np.random.default_rng(0), []
    for i in range(num_images):
        classes = rng.integers(0, 7, rng.integers(1, 5)).tolist() + [7] * (i < 3)
        annotations = [
            {
                "id": first_id + 100 * i + n,
                "bbox": [n, n, 5, 5],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": c,
            }
            for n, c in enumerate(classes)
        ]
        image = {"file_name": f"{folder}{i}.jpg", "height": 9, "width": 9, "image_id": 7 * i}
        dicts.append({**image, "annotations": annotations})
    return InstanceIndex(dicts, IDS)


def plan_of(index, support_index=None, **changes):
    values = {"dataset": "a", "support_dataset": "a", "split": "all", "side": "all", "seed": 9001}
    values |= {"class_ids": list(IDS.values()), "ways": 3, "shots": 2, "max_shots": 5}
    values |= {"queries_per_class": 4, "num_episodes": 20, **changes}
    return make_benchmark_plan(index, support_index or index, **values)


def test_hash_is_stored():
    assert plan_of(make_index()).sha256 == STORED_SHA256


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_shots_are_boxes_of_their_class_and_never_in_a_query(shots):
    index = make_index()
    plan = plan_of(index, shots=shots)
    assert len(plan.episodes) == 20 and plan.class_ids == tuple(list(IDS.values())[:7])
    plan.check(index, index, "a")
    for episode in plan.episodes:
        assert len(set(episode.class_ids)) == 3
        support_images = set()
        for class_id, ids in zip(episode.class_ids, episode.supports, strict=True):
            assert len(set(ids)) == shots
            assert {index.class_of(i) for i in ids} == {class_id}
            support_images |= {index.locate(i)[0] for i in ids}
        queries = {index.image_index(i) for i in episode.query_image_ids}
        assert len(queries) == len(episode.query_image_ids) == 12
        assert not queries & support_images
        for image in queries:
            assert set(index.classes_in(image)) & set(episode.class_ids)


def test_other_shots_have_the_same_classes_and_queries_and_share_examples():
    index = make_index()
    few, many = plan_of(index, shots=1), plan_of(index, shots=5)
    for a, b in zip(few.episodes, many.episodes, strict=True):
        assert a.class_ids == b.class_ids and a.query_image_ids == b.query_image_ids
        assert all(x == y[:1] for x, y in zip(a.supports, b.supports, strict=True))


def test_every_box_in_a_drawn_image_counts_for_its_class():
    # One image holds all examples of two classes; no other image may be drawn for the second.
    boxes = {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYWH_ABS}
    layout = [[0, 0, 1, 1], [0], [1], [0], [1], [0], [1]]
    dicts = [
        {
            "image_id": i,
            "file_name": f"{i}.jpg",
            "annotations": [
                {**boxes, "id": 10 * i + n, "category_id": c} for n, c in enumerate(row)
            ],
        }
        for i, row in enumerate(layout)
    ]
    index = InstanceIndex(dicts, {0: 1, 1: 2})
    plan = plan_of(index, class_ids=(1, 2), ways=2, shots=2, max_shots=2, num_episodes=60)
    together = [e for e in plan.episodes if {i // 10 for s in e.supports for i in s} == {0}]
    assert together, "some episode draws the rich image first"
    for episode in together:
        assert sorted(i for s in episode.supports for i in s) == [0, 1, 2, 3]
        assert set(episode.query_image_ids) == {1, 2, 3, 4, 5, 6}


def test_episodes_depend_on_seed_and_number_alone():
    index = make_index()
    plan, shorter = plan_of(index), plan_of(index, num_episodes=5)
    assert plan.episodes[:5] == shorter.episodes
    assert plan_of(index, seed=1).episodes[:5] != shorter.episodes
    assert plan_of(make_index()).sha256 == plan.sha256


def test_classes_are_drawn_evenly():
    plan = plan_of(make_index(), num_episodes=400)
    counts = [sum(c in e.class_ids for e in plan.episodes) for c in plan.class_ids]
    # Binomial, p = 3 / 7: five standard deviations.
    assert max(abs(n - 400 * 3 / 7) for n in counts) < 5 * (400 * 3 / 7 * 4 / 7) ** 0.5


def test_rare_classes_are_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        plan = plan_of(make_index())
    assert 80 not in plan.class_ids and "1 of 8 classes have too few boxes" in caplog.text
    assert 80 in plan_of(make_index(), shots=2, max_shots=2).class_ids
    with pytest.raises(ValueError, match="3 classes with 3 boxes and a query, got .* 0 classes"):
        plan_of(make_index(), class_ids=(80,), shots=3, max_shots=3)


def test_too_few_queries_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        plan = plan_of(make_index(), queries_per_class=30)
    assert "20 of 20 episodes have fewer than 90 queries" in caplog.text
    assert all(len(e.query_image_ids) > 12 for e in plan.episodes)


def test_supports_of_another_data_set_leave_all_queries():
    index, supports = make_index(), make_index(first_id=100_000, folder="b/")
    plan = plan_of(index, supports, support_dataset="b", queries_per_class=100)
    plan.check(index, supports, "a")
    for episode in plan.episodes:
        with_class = {i for c in episode.class_ids for i in index.images_with(c)}
        assert {index.image_index(i) for i in episode.query_image_ids} == with_class


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shots": 0}, "must be at least 1"),
        ({"ways": 0}, "must be at least 1"),
        ({"shots": 3, "max_shots": 2}, "max_shots at least shots"),
        ({"seed": -1}, "seed at least 0"),
        ({"num_episodes": 0}, "at least 1 episode"),
        ({"ways": 8}, "8 classes with 5 boxes and a query, got .* 7 classes"),
        ({"side": "old"}, "side must be one of"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan_of(make_index(), **changes)


def test_saved_plan_loads_as_it_was(tmp_path):
    plan = plan_of(make_index())
    plan.save(tmp_path / "plan.json")
    assert BenchmarkPlan.load(tmp_path / "plan.json") == plan
    assert plan.file_name == "a-all-all-3way-2of5shot-4queries-20episodes-seed9001.json"


def edited(**changes):
    content = {"format": "fewshot_d2/benchmark_plan", "version": 1}
    content |= json.loads(json.dumps(dataclasses.asdict(plan_of(make_index(), num_episodes=2))))
    for key, value in changes.items():
        target = content["episodes"][0] if key.startswith("episode_") else content
        target[key.removeprefix("episode_")] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "fewshot_d2/evaluation_plan"}, "format must be fewshot_d2/benchmark_plan"),
        (edited(shots=0), "at least 1"),
        (edited(episode_class_ids=[10, 10, 20]), "class_ids must be unique"),
        (edited(episode_class_ids=[10, 20, 99]), "among the plan's"),
        (edited(episode_supports=[[1, 2], [3, 4]]), "classes and supports must be 3 each"),
        (edited(episode_supports=[[1, 2, 3], [4], [5]]), "at most 2 a class"),
        (edited(episode_supports=[[], [], []]), "not all 0"),
        (edited(episode_query_image_ids=[]), "at least 1, each once"),
        (edited(episode_query_image_ids=[7, 7]), "each once"),
        (edited(episode_query_image_ids="7"), r"episodes\[0\]: query_image_ids must be integers"),
        (edited(episode_id=1), "episode ids must be unique"),
    ],
)
def test_malformed_file_is_named(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"broken\.json must be a benchmark plan, got: .*{words}"):
        BenchmarkPlan.load(path)


def test_plan_of_other_data_is_refused():
    index = make_index()
    plan = plan_of(index, num_episodes=1)
    with pytest.raises(ValueError, match="plan of another data set"):
        plan.check(index, index, "b")
    (episode,) = plan.episodes
    for changes, words in (
        ({"query_image_ids": (99999,)}, "image id must be one of the data set"),
        ({"supports": ((99999,), *episode.supports[1:])}, "annotation id must be"),
        ({"supports": episode.supports[::-1]}, "must be of class"),
    ):
        wrong = dataclasses.replace(plan, episodes=(dataclasses.replace(episode, **changes),))
        with pytest.raises(ValueError, match=words):
            wrong.check(index, index, "a")


def test_novel_plans_have_novel_classes_only(tmp_path, caplog):
    write_set(tmp_path, num_images=60)
    options = {"ways": 1, "queries_per_class": 3, "num_episodes": 4, "seed": 0, "shots": (1, 2)}
    with registered_set("for_benchmark", tmp_path):
        plans = build_benchmark_plans(
            dataset="for_benchmark",
            support_dataset="for_benchmark",
            split="novel:b",
            sides=("novel", "base"),
            **options,
        )
        assert [(p.side, p.shots) for p in plans] == [
            *(("novel", 1), ("novel", 2), ("base", 1), ("base", 2))
        ]
        for plan in plans:
            used = {c for e in plan.episodes for c in e.class_ids}
            assert used <= ({11} if plan.side == "novel" else set(CATEGORIES) - {11})
        none = build_benchmark_plans(
            dataset="for_benchmark",
            support_dataset="for_benchmark",
            split="all",
            sides=("novel",),
            **options,
        )
    assert none == [] and "has no novel class" in caplog.text


def test_episode_is_hashable():
    assert (
        len({BenchmarkEpisode(0, (1,), ((2,),), (3,)), BenchmarkEpisode(0, (1,), ((2,),), (3,))})
        == 1
    )
