"""Few-shot detection by search: shots of a plan as queries, and found instances as further ones."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import CATEGORIES, ROOT, registered_set, write_set
from rank_list_cases import labels_of, listed, random_labels, random_rank_lists
from retrieval_cases import TINY_RETRIEVAL, TINY_RETRIEVAL_OVERRIDES, retrieval_config

from fewshot_d2.data.loaders import build_index, build_plans
from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.query_expansion import found_instances
from fewshot_d2.data.rank_lists import RankLists
from fewshot_d2.data.search_queries import planned_queries
from fewshot_d2.engine import query_expansion
from fewshot_d2.engine.query_expansion import expand_rank_lists


def run_tool(*arguments):
    path = ROOT / "tools/make_rank_lists.py"
    spec = importlib.util.spec_from_file_location("make_rank_lists", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    torch.manual_seed(0)
    tool.main([*map(str, ["--config-file", TINY_RETRIEVAL, *arguments, *TINY_RETRIEVAL_OVERRIDES])])


@pytest.fixture
def sets(tmp_path):
    """Registered test and training photos, and a plan with fixed supports."""
    for name, seed, size in (("shots_test", 1, 3), ("shots_train", 2, 8)):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, num_images=size, seed=seed)
    with (
        registered_set("shots_test", tmp_path / "shots_test"),
        registered_set("shots_train", tmp_path / "shots_train"),
    ):
        make_plan().save(tmp_path / "plan.json")
        yield tmp_path


def make_plan(**changes):
    values = {"fixed_supports": True, "protocol": "open", "shots": 2, **changes}
    (plan,) = build_plans(
        dataset="shots_test",
        support_dataset="shots_train",
        split="novel:a,b",
        sides=("novel",),
        runs=1,
        seed=0,
        **values,
    )
    return plan


def test_shots_of_a_plan_are_queries(sets):
    plan = make_plan(shots=30)
    queries = planned_queries(plan, build_index("shots_train", plan.class_ids))
    content = json.loads((sets / "shots_train" / "instances.json").read_text())
    novel = [c for c, name in CATEGORIES.items() if name in "ab"]
    # More shots than boxes: each box once, whatever the plan repeats.
    expected = {
        a["id"]: (a["image_id"], a["category_id"], a["bbox"])
        for a in content["annotations"]
        if a["category_id"] in novel and not a["iscrowd"]
    }
    assert len(queries) == len(expected) < 30 * len(novel)
    for query in queries:
        image, label, (x, y, w, h) = expected[query.query_id]
        assert (query.image_id, query.label, query.candidates) == (image, label, ())
        assert query.box == (x, y, x + w, y + h)
    few = planned_queries(make_plan(), build_index("shots_train"))
    ids = [i for shots in make_plan().fixed_supports.values() for i in shots]
    assert [query.query_id for query in few] == ids and len(ids) == 4


def test_plans_that_cannot_be_searched_for(sets):
    with pytest.raises(
        ValueError, match="the same in all episodes .*--fixed-supports.* 3 episodes"
    ):
        planned_queries(make_plan(fixed_supports=False), build_index("shots_train"))
    with pytest.raises(ValueError, match="annotation id must be of .* known here"):
        planned_queries(make_plan(), build_index("shots_train", class_ids=()))


def test_no_other_annotation_reaches_the_lists(sets):
    """Other boxes and classes in the json, the same lists: bit by bit."""
    lists = []
    path = sets / "shots_train" / "instances.json"
    for folder in ("before", "after"):
        run_tool("--plan", sets / "plan.json", "--output", sets / folder)
        lists.append((sets / folder / "rank_lists.json").read_bytes())
        content = json.loads(path.read_text())
        shots = {i for ids in make_plan().fixed_supports.values() for i in ids}
        others = [a for a in content["annotations"] if a["id"] not in shots]
        assert len(others) > 20
        for number, annotation in enumerate(others):
            annotation.update(bbox=[1, 2, 3, 4], category_id=[5, 11, 12][number % 3], iscrowd=0)
        path.write_text(json.dumps(content))
    assert lists[0] == lists[1]
    loaded = RankLists.load(sets / "after" / "rank_lists.json")
    assert (loaded.dataset, loaded.query_dataset, len(loaded)) == ("shots_train", "shots_train", 4)
    assert {row.label for row in loaded} == {5, 11}


def places(lists, labels, row):
    """Confident boxes of a list, naively."""
    rank_list = lists.lists[row]
    return [
        (candidate.image_id, scored.box)
        for candidate, boxes in zip(rank_list.candidates, labels.found[row], strict=True)
        for scored in boxes
        if scored.score > labels.threshold
    ]


@pytest.mark.parametrize("seed", range(5))
def test_instances_are_confident_boxes(seed):
    rng = np.random.default_rng(seed)
    lists = random_rank_lists(rng)
    labels = random_labels(rng, lists)
    found = found_instances(lists, labels, number=4, seed=seed)
    every = [query for queries in found.values() for query in queries]
    assert [query.query_id for query in every] == list(range(len(every)))
    for row, rank_list in enumerate(lists):
        there = places(lists, labels, row)
        queries = found.get(rank_list.query_id, ())
        assert len(queries) == min(4, len(there))
        drawn = [(query.image_id, query.box) for query in queries]
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(there)
        assert all(q.label == rank_list.label and q.candidates == () for q in queries)
    assert found == found_instances(lists, labels, number=4, seed=seed)


def test_every_instance_can_be_drawn():
    lists = listed((1, 2, 3, 4), (5, 6))
    labels = labels_of(lists, (0.9, 0.8, 0.7), ())
    drawn = [found_instances(lists, labels, number=1, seed=seed) for seed in range(60)]
    assert {rows[70][0].image_id for rows in drawn} == {1, 2, 3}
    assert all(list(rows) == [70] for rows in drawn)


def test_instances_bad_input():
    lists = listed((1, 2), (3,))
    labels = labels_of(lists, (0.9,), ())
    for number, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"got {number} and {seed}"):
            found_instances(lists, labels, number=number, seed=seed)
    with pytest.raises(ValueError, match="other rank lists"):
        found_instances(listed((1, 2), (4,)), labels)


@pytest.fixture
def searched(sets):
    """Rank lists of the plan's shots, and a box in the two first candidates of the first one."""
    run_tool("--plan", sets / "plan.json", "--output", sets / "out", "FEWSHOT.RETRIEVAL.DEPTH", 4)
    lists = RankLists.load(sets / "out" / "rank_lists.json")
    found = tuple(
        tuple(
            (ScoredBox((2.0, 3.0, 30.0, 33.0), 0.95 if row == 0 and position < 2 else 0.5),)
            for position in range(len(rank_list.candidates))
        )
        for row, rank_list in enumerate(lists)
    )
    labels = PseudoLabels(1, 0.9, lists.sha256, found)
    labels.save(sets / "stage_1.json")
    return lists, labels


def expanded(sets, lists, labels, *overrides):
    cfg = retrieval_config(*overrides)
    return expand_rank_lists(cfg, lists, labels, folder=sets / "out")


def test_lists_are_joined_with_what_the_instances_find(sets, searched):
    """Against each new query's own search, at two depths."""
    lists, labels = searched
    seven = ("FEWSHOT.RETRIEVAL.DEPTH", 7)
    new = [query for queries in found_instances(lists, labels).values() for query in queries]
    assert len(new) == 2
    cfg = retrieval_config(*seven)
    alone = query_expansion.search_regions(
        cfg,
        dataset="shots_train",
        query_dataset="shots_train",
        queries=new,
        folder=sets / "out",
    )
    joined = expanded(sets, lists, labels, *seven)
    assert joined.lists[1:] == lists.lists[1:]
    best = {}
    for row in (lists.lists[0], *alone):
        for candidate in row.candidates:
            if candidate.image_id != lists.lists[0].image_id:
                known = best.get(candidate.image_id)
                best[candidate.image_id] = max(known or candidate, candidate, key=lambda c: c.score)
    first = joined.lists[0]
    assert set(first.candidates) == set(best.values()) and len(best) == 7
    assert replace(first, candidates=()) == replace(lists.lists[0], candidates=())
    short = expanded(sets, lists, labels, "FEWSHOT.RETRIEVAL.DEPTH", 4)
    assert short.lists[0].candidates == first.candidates[:4] != lists.lists[0].candidates
    assert "expanded by 2 instances above 0.9 of stage 1" in joined.method
    assert lists.method in joined.method and lists.sha256[:16] in joined.method


def test_own_image_stays_out_where_queries_are_of_another_data_set(sets, searched):
    """The same photos under two names: ids say nothing."""
    lists, labels = searched
    path = sets / "shots_train" / "instances.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] += 1000
    content["annotations"] = []
    other = sets / "other"
    other.mkdir()
    for image in content["images"]:
        image["file_name"] = str(sets / "shots_train" / image["file_name"])
    (other / "instances.json").write_text(json.dumps(content))
    renamed = tuple(replace(row, image_id=row.image_id + 1000) for row in lists)
    with registered_set("shots_renamed", other):
        moved = RankLists("shots_train", "shots_renamed", lists.method, renamed)
        labels = replace(labels, rank_lists_sha256=moved.sha256)
        joined = expanded(sets, moved, labels, "FEWSHOT.RETRIEVAL.DEPTH", 8)
    own = lists.lists[0].image_id
    assert own not in {c.image_id for c in joined.lists[0].candidates}
    assert len(joined.lists[0].candidates) == 7


def test_tool_expands(sets, searched, capsys):
    lists, labels = searched
    source = sets / "out" / "rank_lists.json"
    before = source.read_bytes()
    arguments = ["--expand", source, "--labels", sets / "stage_1.json", "--output", sets / "out"]
    run_tool(*arguments)
    written = RankLists.load(sets / "out" / "expanded_lists.json")
    assert written == expanded(sets, lists, labels)
    assert f"sha256 {written.sha256}" in capsys.readouterr().out
    assert source.read_bytes() == before
    assert len(list((sets / "out").glob("regions-*"))) == 1, "regions are read again"
    run_tool(*arguments, "--instances", 1)
    assert RankLists.load(sets / "out" / "expanded_lists.json").method.count("by 1 instances")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nothing sure", "must have boxes above their threshold 0.99, got none in 4 lists"),
        ("other lists", "other rank lists"),
        ("no plan", "plan"),
        ("fresh supports", "--fixed-supports"),
    ],
)
def test_tool_ends_with_one_line_on_bad_input(sets, searched, change, words):
    lists, labels = searched
    expand = ["--expand", sets / "out" / "rank_lists.json", "--labels", sets / "stage_1.json"]
    if change == "nothing sure":
        replace(labels, threshold=0.99).save(sets / "stage_1.json")
    elif change == "other lists":
        replace(labels, rank_lists_sha256="0").save(sets / "stage_1.json")
    elif change == "no plan":
        expand = ["--plan", sets / "stage_1.json"]
    else:
        make_plan(fixed_supports=False).save(sets / "plan.json")
        expand = ["--plan", sets / "plan.json"]
    with pytest.raises(SystemExit, match=f"make_rank_lists: .*{words}"):
        run_tool(*expand, "--output", sets / "out")


@pytest.mark.parametrize("arguments", [["--expand", "x"], ["--plan", "x", "--labels", "y"]])
def test_tool_refuses_bad_options(arguments, capsys):
    with pytest.raises(SystemExit):
        run_tool(*arguments, "--output", "z")
    assert "--expand and --labels must be given together" in capsys.readouterr().err
