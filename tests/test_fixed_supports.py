"""Plans whose episodes share their supports: how they are drawn, and that encoding them once changes nothing."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from factories import CATEGORIES, registered_set, tiny_config, tiny_model, write_set
from plan_cases import make_index, plan_of

from fewshot_d2.data.loaders import EpisodicTestLoader, build_factory, build_mapper, build_plans
from fewshot_d2.data.plans import EvaluationPlan
from fewshot_d2.engine.evaluate import evaluate_plan

# The package gives the function of that name.
evaluation = importlib.import_module("fewshot_d2.engine.evaluate")


def supports_of(plan):
    return {(c, s) for e in plan.episodes for c, s in zip(e.class_ids, e.supports, strict=True)}


def other_index(**changes):
    """Images of other files than those of ``make_index()``, under the same ids."""
    return make_index(first_id=800, folder="other/", **changes)


def fixed_plan(**changes):
    values = {"support_dataset": "b", "fixed_supports": True, "protocol": "open", **changes}
    return plan_of(make_index(), other_index(), **values)


def test_all_episodes_have_the_same_supports():
    plan = fixed_plan()
    assert len(plan.episodes) == 12 and len(supports_of(plan)) == 3
    assert dict(supports_of(plan)) == plan.fixed_supports
    assert min(i for ids in plan.fixed_supports.values() for i in ids) > 800
    plan.check(make_index(), other_index(), "a")
    # Neither the protocol nor the other classes or images matter.
    for changes in ({"protocol": "present"}, {"class_ids": (7, 3)}, {"max_images": 4}):
        assert supports_of(fixed_plan(**changes)) <= supports_of(plan)
    draws = {json.dumps(sorted(supports_of(fixed_plan(run=run, shots=1)))) for run in range(12)}
    assert len(draws) > 6
    assert fixed_plan(seed=6).fixed_supports != plan.fixed_supports


def test_other_plans_have_no_fixed_supports(tmp_path):
    plan = plan_of(make_index(), other_index(), support_dataset="b", protocol="open")
    assert len(supports_of(plan)) > 3 and plan.fixed_supports is None
    fixed = fixed_plan()
    assert fixed.file_name.replace("-fixed", "") == plan.file_name != fixed.file_name
    fixed.save(tmp_path / "plan.json")
    loaded = EvaluationPlan.load(tmp_path / "plan.json")
    assert loaded == fixed and loaded.sha256 == fixed.sha256
    assert dict(loaded.fixed_supports) == dict(fixed.fixed_supports)


def test_fixed_supports_of_the_queries_are_refused():
    with pytest.raises(ValueError, match="no image with the queries, got 12 of both.* 0.jpg"):
        plan_of(make_index(), fixed_supports=True)
    # The same photo under another id.
    supports = other_index()
    supports.dicts[4]["file_name"] = "./3.jpg"
    with pytest.raises(ValueError, match="got 1 of both, for example 3.jpg"):
        plan_of(make_index(), supports, support_dataset="b", fixed_supports=True)


@pytest.fixture
def sets(tmp_path):
    """Two registered sets of other photos; the queries' one is small."""
    for name, seed, size in (("fixed_queries", 1, 4), ("fixed_supports", 2, 9)):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, num_images=size, seed=seed)
    with (
        registered_set("fixed_queries", tmp_path / "fixed_queries"),
        registered_set("fixed_supports", tmp_path / "fixed_supports"),
    ):
        yield tmp_path


def plan_of_sets(protocol="present", is_fixed=True):
    (plan,) = build_plans(
        dataset="fixed_queries",
        support_dataset="fixed_supports",
        split="all",
        sides=("all",),
        runs=1,
        protocol=protocol,
        shots=3,
        seed=0,
        fixed_supports=is_fixed,
    )
    return plan


@pytest.mark.parametrize("protocol", ["present", "open"])
def test_evaluation_with_supports_encoded_once(sets, tmp_path, monkeypatch, protocol):
    """Against an evaluation that reads and encodes them for every query."""
    cfg = tiny_config("DATASETS.TEST", ("fixed_queries",), "OUTPUT_DIR", str(tmp_path))
    model = tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    plan, factory = plan_of_sets(protocol), build_factory("fixed_queries", "fixed_supports")
    encoded = []
    encode = type(model).encode_support
    monkeypatch.setattr(
        type(model),
        "encode_support",
        lambda self, supports: encoded.append(len(supports)) or encode(self, supports),
    )
    once = evaluate_plan(cfg, model, plan, factory)
    assert len(encoded) == len(plan.fixed_supports)
    monkeypatch.setattr(evaluation, "_fixed_features", lambda *_: None)
    each = evaluate_plan(cfg, model, plan, factory)
    assert len(encoded) == len(plan.fixed_supports) + len(plan.episodes)
    assert len(once[""].detections) == len(each[""].detections) > 20
    for one, other in zip(once[""].detections, each[""].detections, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


@pytest.mark.parametrize("is_fixed", [True, False])
def test_a_pair_is_explained_by_the_search_that_was_evaluated(
    sets, tmp_path, monkeypatch, caplog, is_fixed
):
    cfg = tiny_config("DATASETS.TEST", ("fixed_queries",), "OUTPUT_DIR", str(tmp_path))
    model = tiny_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0).train()
    plan = plan_of_sets("open", is_fixed=is_fixed)
    factory = build_factory("fixed_queries", "fixed_supports")
    run = evaluate_plan(cfg, model, plan, factory)[""]
    shown, mapper = [], build_mapper(cfg, is_train=False)

    def panels(model, found, pixels):
        shown.append((found, model.training))
        return {"_score": pixels}

    monkeypatch.setattr("fewshot_d2.engine.episode_pictures.explanation_panels", panels)
    episode = plan.episodes[-1]
    for k, class_id in enumerate(episode.class_ids):
        picture = run.explain(episode.image_id, class_id)["_score"]
        (found, was_training), predictions = shown[-1], shown[-1][0].predictions
        record = factory.query_index.dicts[factory.query_index.image_index(episode.image_id)]
        assert picture.shape == (record["height"], record["width"], 3) and not was_training
        assert found.support_set.class_ids == [class_id]
        for shot, number in zip(found.support_set.examples[0], episode.supports[k], strict=True):
            image, position = factory.support_index.locate(number)
            example = factory.support_index.dicts[image]
            wanted = mapper.support(example, example["annotations"][position])
            assert shot.image.equal(wanted.image)
        assert len(found.truth) == sum(
            factory.contiguous_ids[class_id] == a["category_id"] for a in record["annotations"]
        )
        pair = [
            d for d in run.detections
            if (d["image_id"], d["category_id"]) == (episode.image_id, class_id)
        ]  # fmt: skip
        assert predictions.scores.tolist() == pytest.approx([d["score"] for d in pair], abs=1e-5)
    assert any(len(found.predictions) for found, _ in shown) and model.training
    Path(record["file_name"]).write_bytes(b"no picture")
    assert run.explain(episode.image_id, episode.class_ids[0]) == {}
    assert f"Not explained: image {episode.image_id}" in caplog.text


def test_queries_come_with_the_features_of_their_classes(sets):
    plan, factory = plan_of_sets(), build_factory("fixed_queries", "fixed_supports")
    model = tiny_model()
    cfg = tiny_config("DATASETS.TEST", ("fixed_queries",))
    features = evaluation._fixed_features(cfg, model, plan, factory)
    assert sorted(features.class_ids) == sorted(CATEGORIES) and model.training is False
    queries = [q for batch in EpisodicTestLoader(cfg, plan, factory, features) for q in batch]
    assert len(queries) == len(plan.episodes) >= 2
    for query, episode in zip(queries, plan.episodes, strict=True):
        assert "support" not in query
        assert tuple(query["support_features"].class_ids) == episode.class_ids
        for k, class_id in enumerate(episode.class_ids):
            row = features.class_ids.index(class_id)
            for name, tensor in query["support_features"].tensors.items():
                assert torch.equal(tensor[k], features.tensors[name][row])
    # A support that cannot be read is needed by all episodes with its class: it ends the run, by name.
    place, _ = factory.support_index.locate(plan.fixed_supports[plan.class_ids[0]][0])
    name = Path(factory.support_index.dicts[place]["file_name"])
    name.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{name.name} must be a readable image"):
        evaluation._fixed_features(cfg, model, plan, factory)
