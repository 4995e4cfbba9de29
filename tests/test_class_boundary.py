"""The border between base and novel classes where a run has several data sets: ids and names must mean the same."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import CATEGORIES, registered_set, set_fixture, tiny_config, write_set

from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_training_episodes
from fewshot_d2.engine.benchmark import benchmark_plans
from fewshot_d2.engine.evaluate import evaluation_plans

NAME, OTHER = "boundary_train_set", "boundary_other_set"

dataset = set_fixture(NAME)


def config(*overrides):
    sets = (
        "DATASETS.TRAIN",
        (NAME,),
        "DATASETS.TEST",
        (NAME,),
        "FEWSHOT.SUPPORT.DATASET_TRAIN",
        "",
    )
    return tiny_config(*sets, "FEWSHOT.SUPPORT.DATASETS_TEST", (), *overrides)


def write_renamed(folder, names):
    """The set of ``write_set`` with other names for some classes: {old: new}."""
    write_set(folder)
    file = folder / "instances.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["name"] = names.get(category["name"], category["name"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("plans", [evaluation_plans, benchmark_plans])
def test_tests_alone_refuse_a_split_that_means_other_classes(dataset, plans, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_renamed(other, {"d": "z"})
    output = ("OUTPUT_DIR", str(other / "output"))
    cfg = config("FEWSHOT.SPLIT", "every_4th:1", "DATASETS.TEST", (OTHER,), *output)
    with registered_set(OTHER, other), pytest.raises(ValueError, match="same categories"):
        plans(cfg)
    assert not (other / "output").exists()


def test_missing_annotations_of_training_are_warned_of(dataset, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("output")
    register_instances(OTHER, str(folder / "none.json"), str(folder))
    try:
        for train in (OTHER, "nobody"):
            options = ("DATASETS.TRAIN", (train,), "OUTPUT_DIR", str(folder))
            caplog.clear()
            assert evaluation_plans(config(*options, "FEWSHOT.SPLIT", "every_4th:1"))
            assert f"Annotations of {train} are not here" in caplog.text
    finally:
        DatasetCatalog.remove(OTHER)
        MetadataCatalog.remove(OTHER)


def test_supports_under_the_id_of_another_class_are_refused(dataset, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_renamed(other, {"a": "b", "b": "a"})
    options = ("FEWSHOT.SUPPORT.DATASET_TRAIN", OTHER, "FEWSHOT.SPLIT", "novel:b")
    with (
        registered_set(OTHER, other),
        pytest.raises(
            ValueError, match=f"{OTHER} must have .* names of {NAME}, got 5: 'b' for 'a'"
        ),
    ):
        build_training_episodes(config(*options))


def test_base_classes_without_supports_are_not_trained(dataset, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_set(other)
    file = other / "instances.json"
    # Category 90 is another one's name and id no more: the support set does not have it.
    file.write_text(file.read_text().replace('{"id": 90, "name": "d"}', '{"id": 7, "name": "e"}'))
    file.write_text(file.read_text().replace('"category_id": 90', '"category_id": 5'))
    options = ("FEWSHOT.SUPPORT.DATASET_TRAIN", OTHER, "FEWSHOT.SPLIT", "novel:b")
    with registered_set(OTHER, other):
        episodes = build_training_episodes(config(*options))
    assert episodes.class_ids == sorted(set(CATEGORIES) - {11, 90})
