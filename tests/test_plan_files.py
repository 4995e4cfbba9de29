"""Plan files: the same seed gives the same hash everywhere, and a broken file is refused by name."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan_cases import make_index, plan_of

from fewshot_d2.data.plans import EvaluationPlan

ROOT = Path(__file__).resolve().parent.parent
# Of ``plan_of(make_index())``. It must not change: published numbers are known by their plans' hashes.
STORED_SHA256 = "e6f75d4689216add18e22a6968a042b225313662bd282545c2bc614fa8b1e520"


def test_same_seed_gives_the_same_hash_in_every_process():
    assert plan_of(make_index()).sha256 == STORED_SHA256
    code = "import plan_cases as t; print(t.plan_of(t.make_index()).sha256)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": path}
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
        (edited(protocol="closed"), "protocol must be one of .* got 'closed'"),
        (edited(class_ids=3), "class_ids must be integers, got 3"),
        (edited(class_ids=[3, 7, 20, 7]), "class_ids must be unique"),
        (edited(class_ids=[7]), "episode 0: class_ids must be unique and among the plan's"),
        (edited(episodes={}), "episodes must be a list, got dict"),
        (edited(episodes=["x"]), r"episodes\[0\] must be an object"),
        (edited(episodes=[{}]), r"episodes\[0\]: keys of PlannedEpisode .*'image_id'"),
        (edited(episode_id=1), "episode ids must be unique, got 1 twice"),
        (edited(episode_image_id=None), r"episodes\[0\]: image_id must be integers"),
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
