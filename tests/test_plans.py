"""Evaluation plans: the same seed gives the same file everywhere, and a plan fits its data or is refused."""

import dataclasses
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fewshot_d2.data.coco_json import load_instances_json
from fewshot_d2.data.index import InstanceIndex
from fewshot_d2.data.plans import EvaluationPlan, PlannedEpisode, make_plan
from fewshot_d2.data.splits import classes_of_side

ROOT = Path(__file__).resolve().parent.parent
DATASET_IDS = {0: 3, 1: 7, 2: 20, 3: 21}
# Of ``plan_of(make_index())``. It must not change: published numbers are known by their plans' hashes.
STORED_SHA256 = "e6f75d4689216add18e22a6968a042b225313662bd282545c2bc614fa8b1e520"


def make_index(num_images=12, first_id=0, num_classes=3):
    """Images with up to four instances; class 21 has none. Written with arithmetic, not a generator."""
    dicts, number = [], first_id
    for i in range(num_images):
        annotations = []
        for k in range(i * 7 % 5):
            number += 1
            annotations.append(
                {
                    "id": number,
                    "bbox": [1, 1, 5, 5],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": (i * i + k * 3 + k * k) % num_classes,
                    "iscrowd": int((i + k) % 6 == 5),
                }
            )
        image = {"file_name": f"{i}.jpg", "height": 9, "width": 9, "image_id": 1000 + 3 * i}
        dicts.append({**image, "annotations": annotations})
    return InstanceIndex(dicts, DATASET_IDS)


def plan_of(query_index, support_index=None, **changes):
    values = {"dataset": "a", "support_dataset": "a", "split": "all", "side": "all", "run": 0}
    values |= {"class_ids": (20, 3, 7), "protocol": "present", "shots": 2, "seed": 5, **changes}
    return make_plan(query_index, support_index or query_index, **values)


def support_images(plan, index):
    """(query image index, class, its support images, all images with the class) of every pair."""
    for episode in plan.episodes:
        query = index.image_index(episode.image_id)
        for class_id, ids in zip(episode.class_ids, episode.supports, strict=True):
            places = [index.locate(number) for number in ids]
            yield query, class_id, {i for i, _ in places}, set(index.images_with(class_id))


def test_present_protocol_asks_for_what_is_there():
    index = make_index()
    plan = plan_of(index)
    assert plan.class_ids == (3, 7, 20)
    expected = {
        d["image_id"]: sorted(
            {DATASET_IDS[a["category_id"]] for a in d["annotations"] if not a["iscrowd"]}
        )
        for d in index.dicts
    }
    expected = {image_id: tuple(classes) for image_id, classes in expected.items() if classes}
    assert {e.image_id: e.class_ids for e in plan.episodes} == expected
    assert [e.id for e in plan.episodes] == list(range(len(expected)))
    assert plan.num_pairs == sum(map(len, expected.values()))
    assert all(len(ids) == 2 for e in plan.episodes for ids in e.supports)
    plan.check(index, index, "a")
    narrow = plan_of(index, class_ids=(7,))
    assert [e.image_id for e in narrow.episodes] == [i for i, c in expected.items() if 7 in c]


def test_open_protocol_asks_every_image_for_every_class(caplog):
    index = make_index()
    plan = plan_of(index, protocol="open", class_ids=(3, 7, 20, 21))
    # Class 21 has no instance that could be shown.
    assert "1 of 4 classes" in caplog.text
    assert "[21]" in caplog.text
    assert [e.image_id for e in plan.episodes] == [d["image_id"] for d in index.dicts]
    assert all(e.class_ids == (3, 7, 20) for e in plan.episodes)
    plan.check(index, index, "a")


def test_pair_has_the_same_supports_in_both_protocols_and_any_selection():
    index = make_index()

    def pairs(plan):
        return {(e.image_id, c): s for e in plan.episodes for c, s in zip(e.class_ids, e.supports)}

    everything = pairs(plan_of(index, protocol="open"))
    for other in (plan_of(index), plan_of(index, class_ids=(7,)), plan_of(index, max_images=3)):
        assert pairs(other).items() <= everything.items()


@pytest.mark.parametrize("run", range(10))
def test_supports_come_from_other_images(run):
    index = make_index()
    for protocol in ("present", "open"):
        for query, _, images, candidates in support_images(
            plan_of(index, run=run, protocol=protocol, shots=3), index
        ):
            assert images <= candidates
            assert query not in images


def test_supports_come_from_the_query_only_if_no_other_image_has_the_class(caplog):
    rows = [make_index().dicts[4], {**make_index(first_id=99).dicts[5], "annotations": []}]
    index = InstanceIndex(rows, DATASET_IDS)
    plan = plan_of(index, shots=1)
    assert all(images == {query} for query, _, images, _ in support_images(plan, index))
    assert f"{plan.num_pairs} pairs have supports out of the query" in caplog.text


def test_another_support_data_set_excludes_nothing():
    index, supports = make_index(7), make_index(7, first_id=800, num_classes=2)
    plan = plan_of(index, supports, support_dataset="b", protocol="open")
    assert plan.class_ids == (3, 7)
    assert min(n for e in plan.episodes for ids in e.supports for n in ids) > 800
    plan.check(index, supports, "a")
    # Both sets call their images 1000, 1003, ...; they are different images all the same.
    assert any(query in images for query, _, images, _ in support_images(plan, supports))


def test_runs_and_seeds_differ_in_supports_only():
    index = make_index()
    plans = [plan_of(index, run=run) for run in range(5)] + [plan_of(index, seed=6)]
    assert len({plan.sha256 for plan in plans}) == 6
    assert len({json.dumps([e.supports for e in plan.episodes]) for plan in plans}) == 6
    assert len({tuple((e.image_id, e.class_ids) for e in plan.episodes) for plan in plans}) == 1


def test_subset_of_images_is_the_same_for_all_runs_and_nested():
    index = make_index(num_images=40)
    chosen = {
        n: [e.image_id for e in plan_of(index, max_images=n).episodes] for n in (1, 5, 12, 99)
    }
    assert [len(images) for images in chosen.values()] == [1, 5, 12, len(plan_of(index).episodes)]
    assert set(chosen[1]) <= set(chosen[5]) <= set(chosen[12]) <= set(chosen[99])
    assert all(images == sorted(images) for images in chosen.values())
    again = plan_of(index, max_images=5, run=3)
    assert [e.image_id for e in again.episodes] == chosen[5]
    other_seeds = {
        tuple(e.image_id for e in plan_of(index, max_images=5, seed=seed).episodes)
        for seed in range(4)
    }
    assert len(other_seeds) == 4


def test_same_seed_gives_the_same_hash_in_every_process():
    assert plan_of(make_index()).sha256 == STORED_SHA256
    code = "import test_plans as t; print(t.plan_of(t.make_index()).sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split()[-1] == STORED_SHA256


def test_saved_plan_loads_as_it_was(tmp_path):
    plan = plan_of(make_index())
    plan.save(tmp_path / "new" / "plan.json")
    loaded = EvaluationPlan.load(tmp_path / "new" / "plan.json")
    assert loaded == plan
    assert loaded.sha256 == plan.sha256
    content = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert (content["format"], content["version"]) == ("fewshot_d2/evaluation_plan", 1)


def test_layout_leaves_the_hash_and_an_edit_changes_it(tmp_path):
    plan, path = plan_of(make_index()), tmp_path / "plan.json"
    plan.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    assert EvaluationPlan.load(path).sha256 == plan.sha256
    content["episodes"][1]["supports"][0][0] += 1
    path.write_text(json.dumps(content))
    edited = EvaluationPlan.load(path)
    assert edited.sha256 != plan.sha256
    assert edited.episodes[0] == plan.episodes[0]


def test_full_disk_leaves_the_older_plan(tmp_path, monkeypatch):
    old, new = plan_of(make_index()), plan_of(make_index(), run=1)
    path = tmp_path / "plan.json"
    old.save(path)

    def write_half(self, text, **options):
        with self.open("w", **options) as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match=r"plan\.json .*No space left") as caught:
        new.save(path)
    assert caught.value.errno == errno.ENOSPC
    assert EvaluationPlan.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def edited(**changes):
    """The content of a good plan with changes; "0.key" is a key of the first episode."""
    plan = plan_of(make_index())
    content = {"format": "fewshot_d2/evaluation_plan", "version": 1}
    content |= json.loads(json.dumps(dataclasses.asdict(plan)))
    for key, value in changes.items():
        target = content["episodes"][0] if key.startswith("episode_") else content
        target[key.removeprefix("episode_")] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ('{"format": "fewshot', "Unterminated string"),
        ([1], "format must be"),
        ({"format": "coco"}, "format must be fewshot_d2/evaluation_plan version 1, got 'coco'"),
        (edited(version=2), "version 1, got .* version 2"),
        ({k: v for k, v in edited().items() if k != "shots"}, r"got missing \['shots'\]"),
        (edited(shot=1), r"unknown \['shot'\]"),
        (edited(dataset=3), "dataset must be text, got 3"),
        (edited(seed="5"), r"seed must be integers, got \['5'\]"),
        (edited(seed=-1), "seed and run at least 0, got 2, -1 and 0"),
        (edited(shots=0), "shots must be at least 1"),
        (edited(shots=True), "shots must be integers"),
        (edited(side="old"), "side must be one of .* got 'old'"),
        (edited(protocol="closed"), "protocol one of .* got .*'closed'"),
        (edited(class_ids=3), "class_ids must be integers, got 3"),
        (edited(class_ids=[3, 7, 20, 7]), "class_ids must be unique"),
        (edited(class_ids=[7]), "episode 0: class_ids must be unique and among the plan's"),
        (edited(episodes={}), "episodes must be a list, got dict"),
        (edited(episodes=["x"]), r"episodes\[0\] must be an object"),
        (edited(episodes=[{}]), r"episodes\[0\]: keys of PlannedEpisode .*'image_id'"),
        (edited(episode_id=1), "episode ids must be unique, got 1 twice"),
        (edited(episode_image_id=None), r"episodes\[0\]: id and image_id must be integers"),
        (edited(episode_supports=[]), "episode 0: supports must be 2 for each of its"),
        (edited(episode_supports=7), r"episodes\[0\]: supports must be one list a class"),
        (edited(episode_supports=[[1, 2.5]]), r"episodes\[0\]: supports must be integers"),
        (edited(episode_class_ids=[7, 7]), "episode 0: class_ids must be unique"),
    ],
)
def test_malformed_file_is_named(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"broken\.json must be an evaluation plan, got: .*{words}"
    ):
        EvaluationPlan.load(path)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        EvaluationPlan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="binary.json must be an evaluation plan"):
        EvaluationPlan.load(tmp_path / "binary.json")


def replaced(plan, **changes):
    """The plan with its first episode changed."""
    first = dataclasses.replace(plan.episodes[0], **changes)
    return dataclasses.replace(plan, episodes=(first, *plan.episodes[1:]))


def test_plan_that_does_not_fit_its_data_is_refused():
    index = make_index()
    plan = plan_of(index)
    (class_id, *_), (shots, *rest) = plan.episodes[0].class_ids, plan.episodes[0].supports
    crowd = next(a["id"] for d in index.dicts for a in d["annotations"] if a["iscrowd"])
    other = next(c for c in plan.class_ids if c != class_id)
    stranger = index.annotation_id(
        index.images_with(other)[0], index.instances(index.images_with(other)[0], other)[0]
    )
    with pytest.raises(ValueError, match="plan of another data set: .* 'b', got one of 'a'"):
        plan.check(index, index, "b")
    for changes, words in [
        ({"image_id": 1}, "episode 0 .* image id must be one of the data set, got 1"),
        ({"supports": ((shots[0], 9999), *rest)}, "episode 0 .* annotation id .* got 9999"),
        ({"supports": ((shots[0], crowd), *rest)}, f"episode 0 .* non-crowd .* got {crowd}"),
        (
            {"supports": ((stranger, shots[1]), *rest)},
            f"support {stranger} must be of class {class_id}, got class {other}",
        ),
        ({"image_id": index.dicts[0]["image_id"]}, "must be present in image 1000, got also"),
    ]:
        with pytest.raises(ValueError, match=words):
            replaced(plan, **changes).check(index, index, "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "closed"}, "protocol one of .* got 'all' and 'closed'"),
        ({"side": "old"}, "side must be one of"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"seed": -1}, "seed and run at least 0"),
        ({"run": -1}, "seed and run at least 0"),
        ({"class_ids": (3, 4)}, r"class_ids must exist in the data set, got \[4\]"),
        ({"class_ids": ()}, "at least one episode, got none: 0 classes"),
        ({"class_ids": (21,)}, "at least one episode, got none: 0 classes .* 12 images of 'a'"),
    ],
)
def test_plan_that_cannot_be_made_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan_of(make_index(), **changes)


def test_plan_of_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one episode, got none: .* 0 images"):
        plan_of(make_index(num_images=0), make_index(), support_dataset="b")


def test_file_names_tell_plans_apart():
    index = make_index()
    long = "novel:" + ",".join(f"name {i}" for i in range(100))
    plans = [
        plan_of(index),
        plan_of(index, run=1),
        plan_of(index, seed=1),
        plan_of(index, shots=1),
        plan_of(index, protocol="open"),
        plan_of(index, max_images=2),
        plan_of(index, support_dataset="b"),
        plan_of(index, split="every_4th:1", side="novel"),
        plan_of(index, split=long, side="novel"),
        plan_of(index, split=f"{long},x", side="novel"),
    ]
    names = [plan.file_name for plan in plans]
    assert names[7] == "a-every_4th_1-novel-present-2shot-9images-seed5-run0.json"
    assert len(set(names)) == len(plans)
    assert max(map(len, names)) < 200
    assert not any(set(name) & set('/\\: ,"') for name in names)


def test_plan_without_episodes_is_a_plan(tmp_path):
    plan = dataclasses.replace(plan_of(make_index()), episodes=())
    plan.save(tmp_path / "plan.json")
    assert EvaluationPlan.load(tmp_path / "plan.json") == plan
    assert plan.num_pairs == 0
    assert PlannedEpisode(0, 1, (), ()) == PlannedEpisode(0, 1, (), ())


@pytest.fixture
def photos(shared_data):
    """The real photos, registered for one test."""
    name, folder = "test_plans_photos", shared_data / "coco482"
    files = folder / "instances.json", folder / "images"
    DatasetCatalog.register(name, lambda: load_instances_json(*files, name))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_every_split_of_real_photos_can_be_planned(photos):
    dicts = DatasetCatalog.get(photos)
    contiguous = MetadataCatalog.get(photos).thing_dataset_id_to_contiguous_id
    index = InstanceIndex(dicts, {i: c for c, i in contiguous.items()})
    num_pairs = 0
    for number in range(1, 5):
        classes = classes_of_side(photos, f"every_4th:{number}", "novel")
        plan = plan_of(index, class_ids=classes, shots=5, dataset=photos, support_dataset=photos)
        plan.check(index, index, photos)
        for query, class_id, images, candidates in support_images(plan, index):
            assert query not in images or candidates == {query}, class_id
        num_pairs += plan.num_pairs
    # The four novel sides share out the classes, so their pairs are all pairs.
    assert num_pairs == sum(len(index.classes_in(i)) for i in range(len(dicts)))


def run_tool(*arguments):
    spec = importlib.util.spec_from_file_location("make_episodes", ROOT / "tools/make_episodes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(argument) for argument in arguments])


@pytest.fixture
def own_json(tmp_path, monkeypatch):
    """A small json below DETECTRON2_DATASETS and the arguments that name it."""
    name = "test_plans_own"
    rng = np.random.default_rng(0)
    annotations = [
        {"id": i, "image_id": i % 9, "category_id": int(rng.choice([5, 8])), "bbox": [0, 0, 4, 4]}
        for i in range(30)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in range(9)]
    categories = [{"id": 5, "name": "cup"}, {"id": 8, "name": "fork"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield ["--dataset", name, "--json", "own.json", "--images", "photos"]
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_tool_writes_and_names_one_plan_a_run(own_json, tmp_path, capsys):
    output = tmp_path / "plans"
    run_tool(*own_json, "--split", "novel:fork", "--runs", 3, "--max-images", 4, "--output", output)
    lines = capsys.readouterr().out.splitlines()
    plans = [EvaluationPlan.load(line.split("  ")[0]) for line in lines]
    assert [plan.run for plan in plans] == [0, 1, 2]
    assert {plan.class_ids for plan in plans} == {(8,)}
    for line, plan in zip(lines, plans, strict=True):
        assert f"sha256 {plan.sha256}" in line
        assert line.endswith(f"{len(plan.episodes)} episodes, {plan.num_pairs} pairs")
    assert len(list(output.iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "novel:frok"], "make_episodes: split .* got 'frok' .*fork"),
        (["--split", "all"], "make_episodes: plan must have at least one episode"),
        (["--support-dataset", "nobody"], "data set must be registered, got 'nobody'"),
        (["--json", "none.json"], "annotation file must exist, got .*none.json"),
    ],
)
def test_tool_ends_with_one_line_on_bad_input(own_json, tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        run_tool(*own_json, "--output", tmp_path / "plans", *arguments)
    assert not (tmp_path / "plans").exists()


@pytest.mark.parametrize("arguments", [["--json", "x"], ["--runs", "0"], ["--side", "old"]])
def test_tool_refuses_bad_options(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        run_tool("--dataset", "x", "--output", tmp_path, *arguments)
    assert arguments[0] in capsys.readouterr().err
