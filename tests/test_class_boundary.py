"""The border between base and novel classes where a run has several data sets: ids and names must mean the same."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import CATEGORIES, registered_set, set_fixture, tiny_config, write_set

from fewshot_d2 import Support
from fewshot_d2.data.benchmark_plans import build_benchmark_plans
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.loaders import build_factory, build_plans, build_training_episodes
from fewshot_d2.data.support_pairs import SupportPairs
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
        # CL-COCO and the like have loaders of their own.
        for train in (OTHER, "nobody", "cl_coco_train"):
            options = ("DATASETS.TRAIN", (train,), "OUTPUT_DIR", str(folder))
            caplog.clear()
            assert evaluation_plans(config(*options, "FEWSHOT.SPLIT", "every_4th:1"))
            assert f"the same classes in {train} is not known" in caplog.text
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


def test_one_set_under_two_names_never_has_supports_out_of_the_query(dataset):
    """Training, its pairs, and plans of both kinds: images are told by their files."""
    options = ("FEWSHOT.SUPPORT.DATASET_TRAIN", OTHER, "FEWSHOT.SUPPORT.EXCLUDE_QUERY", True)
    with registered_set(OTHER, dataset):
        episodes = build_training_episodes(config(*options))
        factory = build_factory(NAME, OTHER)
        shared = {"split": "all", "sides": ("all",), "seed": 0}
        names = {"dataset": NAME, "support_dataset": OTHER}
        plans = build_plans(**names, **shared, runs=2, protocol="present", shots=1)
        benchmark = {"ways": 2, "shots": [2], "queries_per_class": 9, "num_episodes": 20}
        plans += build_benchmark_plans(**names, **shared, **benchmark)
        with pytest.raises(ValueError, match="shares no image with the queries, got 12 of both"):
            build_plans(**names, **shared, runs=1, protocol="open", shots=1, fixed_supports=True)
    assert factory.query_index is not factory.support_index
    for number in range(60):
        episode = episodes.sample(number)
        files = {record["file_name"] for shots in episode.supports for record, _ in shots}
        assert episode.query["file_name"] not in files
    taken, pairs = [], SupportPairs(episodes, 4)

    def crop(index, image_index, position):
        taken.append(index.dicts[image_index]["file_name"])
        return Support(torch.zeros(3, 4, 4, dtype=torch.uint8))

    for number in range(30):
        pairs.pair(number, crop)
    assert len(taken) > 100 and all(a != b for a, b in zip(taken[::2], taken[1::2], strict=True))
    for plan in plans:
        for episode in plan.episodes:
            queries = getattr(episode, "query_image_ids", None) or (episode.image_id,)
            drawn = [factory.support_index.locate(i)[0] for ids in episode.supports for i in ids]
            images = {factory.support_index.dicts[i]["image_id"] for i in drawn}
            assert not images & set(queries)
