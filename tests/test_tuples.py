"""Tuples of common localization: what is drawn in training and in plans, guards, and filters of ground truth."""

import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from factories import CATEGORIES, registered_set, set_fixture, tiny_config, write_set
from PIL import Image

from fewshot_d2 import load_config
from fewshot_d2.data.ground_truth import KEEP_ALL, GroundTruthFilter
from fewshot_d2.data.index import InstanceIndex
from fewshot_d2.data.loaders import build_factory, build_index, build_training_episodes
from fewshot_d2.data.tuple_plans import TuplePlan, build_tuple_plans, make_tuple_plan
from fewshot_d2.data.tuples import TupleSampler, _drawn, largest_instance

NAME = "tuples_test_set"


dataset = set_fixture(NAME, num_images=16)


def config(*overrides):
    own = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "FEWSHOT.TRAIN_ON", "tuples"]
    own += ["FEWSHOT.SUPPORT.DATASET_TRAIN", "", "FEWSHOT.SUPPORT.DATASETS_TEST", ()]
    own += ["FEWSHOT.SUPPORT.FORM", "whole", "FEWSHOT.NUM_SHOTS", 3]
    return tiny_config(*own, *overrides)


def record(image_id, classes, size=(40, 60), file_name=None):
    annotations = [
        {"id": 100 * image_id + i, "category_id": c, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
        for i, (c, box) in enumerate(classes)
    ]
    return {
        "file_name": file_name or f"{image_id}.png",
        "image_id": image_id,
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
    }


def index_of(classes_of_images, first=0):
    """An index of images with one box of each given class; category ids are contiguous ids."""
    dicts = [
        record(first + i, [(c, [0, 0, 10, 10]) for c in classes])
        for i, classes in enumerate(classes_of_images)
    ]
    return InstanceIndex(dicts, {c: c for c in range(5)})


def plan_options(**changes):
    options = {"dataset": "a", "support_dataset": "a", "split": "all", "side": "all", "seed": 3}
    return {**options, "shots": 2, "max_shots": 4, "num_episodes": 50, **changes}


def test_images_of_a_novel_class_can_be_left_out(dataset, tmp_path_factory):
    """Of queries and of supports, whether or not the object is ground truth; the data sets themselves stay whole."""
    other, folder = "tuples_test_supports", tmp_path_factory.mktemp("supports")
    write_set(folder, num_images=16, seed=1)
    label = list(CATEGORIES).index(90)
    with registered_set(other, folder):
        whole, clean = {}, {}
        for name in (NAME, other):
            dicts = DatasetCatalog.get(name)
            whole[name] = {r["file_name"] for r in dicts}
            shown = {r["file_name"]: [a["category_id"] for a in r["annotations"]] for r in dicts}
            clean[name] = {file_name for file_name, ids in shown.items() if label not in ids}
            assert clean[name] < whole[name]
        keys = ("FEWSHOT.SPLIT", "novel:d", "FEWSHOT.NUM_SHOTS", 1)
        keys += ("FEWSHOT.SUPPORT.DATASET_TRAIN", other, "FEWSHOT.EXCLUDE_NOVEL_IMAGES")
        for excludes, wanted in ((True, clean), (False, whole)):
            factory = build_training_episodes(config(*keys, excludes)).factory
            for name, index in ((NAME, factory.query_index), (other, factory.support_index)):
                assert {r["file_name"] for r in index.dicts} == wanted[name]
        none = build_index(NAME, None, GroundTruthFilter(min_area=0.2), hidden_ids=[90])
        assert {r["file_name"] for r in none.dicts} == clean[NAME]
        assert not any(r["annotations"] for r in none.dicts)
        assert {r["file_name"] for r in DatasetCatalog.get(NAME)} == whole[NAME]


def test_rank_lists_know_of_no_novel_images():
    keys = ("FEWSHOT.TRAIN_ON", "rank_lists", "FEWSHOT.SPLIT", "novel:d")
    with pytest.raises(ValueError, match="EXCLUDE_NOVEL_IMAGES must be False"):
        load_config("", [*keys, "FEWSHOT.EXCLUDE_NOVEL_IMAGES", True])


def test_training_tuples_are_of_base_classes_and_of_different_images(dataset):
    """Novel classes are provably never sampled: no annotation of theirs is left to be found."""
    tuples = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b,d"))
    index = tuples.factory.query_index
    novel = {11, 90}
    contiguous = {c: i for i, c in enumerate(CATEGORIES)}
    for dicts in (index.dicts, tuples.factory.support_index.dicts):
        left = {a["category_id"] for r in dicts for a in r["annotations"]}
        assert left and not left & {contiguous[c] for c in novel}
    assert not novel & set(tuples.class_ids)
    seen = Counter()
    for number in range(400):
        episode = tuples.sample(number)
        (class_id,) = episode.class_ids
        seen[class_id] += 1
        images = [r["file_name"] for r, _ in episode.supports[0]]
        assert len({*images, episode.query["file_name"]}) == 4
        for shown, annotation in episode.supports[0]:
            assert annotation in shown["annotations"]
            assert annotation["category_id"] == contiguous[class_id]
        assert contiguous[class_id] in {a["category_id"] for a in episode.query["annotations"]}
    assert set(seen) == {5, 12}
    # Uniform over classes whatever the images: 400 throws of a coin.
    assert abs(seen[5] - 200) < 50


def test_supports_are_whole_images_without_boxes(dataset):
    tuples = build_training_episodes(config("INPUT.RANDOM_FLIP", "horizontal"))
    query, again = tuples[7], tuples[7]
    assert query["support"].class_names == again["support"].class_names
    (shots,) = query["support"].examples
    assert len(shots) == 3 and all(s.box is None and s.mask is None for s in shots)
    # 60 x 40 pixels at the size of a query.
    assert {s.image_size for s in shots} == {(43, 64)} == {tuple(query["image"].shape[1:])}
    assert set(query["instances"].gt_classes.tolist()) == {0}
    for shot, same in zip(shots, again["support"].examples[0], strict=True):
        assert (shot.image == same.image).all()


def test_pictures_of_any_kind_are_trained_on(tmp_path):
    """Of one pixel or one row, grey and with transparency, with all augmentations."""
    rng, shapes = np.random.default_rng(0), [(1, 1, 3), (40, 60), (30, 50, 4), (1, 50, 3)]
    images, annotations = [], []
    for i, shape in enumerate(shapes):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        height, width = shape[:2]
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        row = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, width, height]}
        annotations.append({**row, "area": width * height, "iscrowd": 0})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    keys = ["FEWSHOT.RESIZE_RULE", "stretch", "FEWSHOT.AUGMENT.PHOTOMETRIC", True]
    keys += ["FEWSHOT.AUGMENT.EXPAND", 4.0, "FEWSHOT.AUGMENT.CROPS", ("none", 0.5, "random")]
    with registered_set(NAME, tmp_path):
        tuples = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b", *keys))
        queries = [tuples[number] for number in range(60)]
    assert {query["file_name"] for query in queries} == {
        str(tmp_path / f"{i}.png") for i in range(4)
    }
    for query in queries:
        boxes = query["instances"].gt_boxes
        assert query["image"].shape == (3, 64, 64) and len(boxes) == 1
        assert boxes.area() > 0 and boxes.tensor.min() >= 0 and boxes.tensor.max() <= 64
        assert all(shot.image.shape == (3, 64, 64) for shot in query["support"].examples[0])


def test_a_class_with_too_few_images_is_left_out_with_its_name(caplog):
    index = index_of([[0]] * 5 + [[1]] * 3)
    with caplog.at_level(logging.WARNING):
        sampler = TupleSampler(index, index, [0, 1, 4], shots=3)
    assert sampler.class_ids == (0,)
    assert "2 of 3 classes have too few images for 3 supports and a query" in caplog.text
    assert "[1, 4]" in caplog.text
    with pytest.raises(ValueError, match="must have a class with 5 support images and another"):
        TupleSampler(index, index, [0, 1], shots=5)
    with pytest.raises(ValueError, match="at least 1 support"):
        TupleSampler(index, index, [0], shots=0)


def test_a_query_that_is_among_the_supports_of_another_set_is_no_support():
    """Two data sets that share files; with as many supports as needed and one of them the query, the class is out."""
    queries, supports = index_of([[0], [0]]), index_of([[0], [0], [0]])
    sampler = TupleSampler(queries, supports, [0], shots=2)
    for seed in range(30):
        query, places = sampler.draw(np.random.default_rng(seed), 0)
        assert query not in [i for i, _ in places] and len({i for i, _ in places}) == 2
    with pytest.raises(ValueError, match="3 support images and another image"):
        TupleSampler(queries, supports, [0], shots=3)
    others = index_of([[0], [0], [0]], first=10)
    assert TupleSampler(queries, others, [0], shots=3).class_ids == (0,)


def test_a_file_that_is_listed_twice_is_refused(tmp_path):
    """It could be the query and a support of one tuple, under two numbers."""
    (tmp_path / "0.png").touch()
    (tmp_path / "again.png").symlink_to(tmp_path / "0.png")
    names = ["0.png", "1.png", "2.png", "again.png"]
    dicts = [
        record(i, [(1, [0, 0, 9, 9])], file_name=str(tmp_path / n)) for i, n in enumerate(names)
    ]
    index = InstanceIndex(dicts, {1: 1})
    for sets in ((index, index), (index_of([[1]] * 4), index), (index, index_of([[1]] * 4))):
        with pytest.raises(ValueError, match="every file once, got .*again.png as images 0 and 3"):
            TupleSampler(*sets, [1], shots=2)


def test_draws_are_a_uniform_shuffle():
    counts = Counter(tuple(_drawn(np.random.default_rng(i), "abc", 2)) for i in range(3000))
    assert set(counts) == {(a, b) for a in "abc" for b in "abc" if a != b}
    assert all(abs(count - 500) < 100 for count in counts.values())
    assert sorted(_drawn(np.random.default_rng(0), range(9), 9)) == list(range(9))


def test_the_largest_instance_stands_for_its_image():
    dicts = [
        record(1, [(0, [0, 0, 5, 5]), (1, [0, 0, 40, 40]), (0, [1, 1, 9, 9]), (0, [2, 2, 9, 9])])
    ]
    assert largest_instance(InstanceIndex(dicts, {0: 0, 1: 1}), 0, 0) == 2


def test_the_largest_instance_is_neither_the_widest_nor_the_tallest():
    """Areas of 60, 60 and 80, whether boxes are written with sides or with corners."""
    boxes = [[30, 10, 20, 3], [0, 0, 3, 20], [5, 6, 8, 10]]
    dicts = [record(1, [(0, box) for box in boxes]), record(2, [(0, box) for box in boxes])]
    for annotation in dicts[1]["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation.update(bbox=[x, y, x + w, y + h], bbox_mode=BoxMode.XYXY_ABS)
    index = InstanceIndex(dicts, {0: 0})
    assert [largest_instance(index, image, 0) for image in (0, 1)] == [2, 2]


def test_plans_are_uniform_over_classes_whatever_their_images():
    """600 tuples of three classes: 200 each, with a standard deviation of 11.5."""
    index = index_of([[0]] * 5 + [[1]] * 60 + [[2]] * 12)
    plan = make_tuple_plan(index, index, class_ids=[0, 1, 2], **plan_options(num_episodes=600))
    classes = Counter(class_id for episode in plan.episodes for class_id in episode.class_ids)
    assert set(classes) == {0, 1, 2}
    assert all(abs(number - 200) < 50 for number in classes.values())
    # So are the queries over the images of a class: 40 each of the first.
    queries = Counter(e.query_image_ids[0] for e in plan.episodes if e.class_ids == (0,))
    assert set(queries) == set(range(5)) and min(queries.values()) > 20


@pytest.mark.parametrize(
    ("split", "novel"),
    [
        *(("part:1/2", {5, 11}), ("part:2/2", {12, 90})),
        *((f"part:{number}/4", {c}) for number, c in enumerate((5, 11, 12, 90), 1)),
    ],
)
def test_plans_of_a_part_are_of_its_classes_alone(dataset, split, novel):
    options = {"dataset": NAME, "support_dataset": NAME, "num_episodes": 40, "seed": 1}
    options |= {"split": split, "sides": ("novel", "base"), "shots": (1, 2)}
    plans = build_tuple_plans(**options, ground_truth=KEEP_ALL)
    assert [(plan.side, plan.shots) for plan in plans] == [
        (side, shots) for side in ("novel", "base") for shots in (1, 2)
    ]
    for plan in plans:
        expected = novel if plan.side == "novel" else set(CATEGORIES) - novel
        assert set(plan.class_ids) == expected and plan.split == split
        assert {c for episode in plan.episodes for c in episode.class_ids} == expected


def test_plans_with_more_shots_share_queries_and_first_supports(dataset):
    options = {"dataset": NAME, "support_dataset": NAME, "split": "novel:b", "sides": ("base",)}
    plans = build_tuple_plans(
        **options, shots=(1, 3, 5), num_episodes=40, seed=1, ground_truth=KEEP_ALL
    )
    factory = build_factory(NAME, NAME)
    for plan in plans:
        plan.check(factory.query_index, factory.support_index, NAME)
    for one, three, five in zip(*(plan.episodes for plan in plans), strict=True):
        assert one.class_ids == three.class_ids == five.class_ids != (11,)
        assert one.query_image_ids == three.query_image_ids == five.query_image_ids
        assert (
            five.supports[0][:3] == three.supports[0] and three.supports[0][:1] == one.supports[0]
        )
    assert len({plan.file_name for plan in plans}) == 3
    assert "tuples-3of5shot-40-seed1" in plans[1].file_name


def test_a_plan_survives_its_file_and_another_kind_is_refused(tmp_path):
    index = index_of([[0, 1]] * 7)
    plan = make_tuple_plan(index, index, class_ids=[0, 1], **plan_options(), ground_truth="x")
    plan.save(tmp_path / "plan.json")
    assert TuplePlan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    content["ways"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be a tuple plan"):
        TuplePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 5}, "max_shots of at least shots"),
        ({"num_episodes": 0}, "at least 1 tuple"),
        ({"seed": -1}, "seed of at least 0"),
        ({"max_shots": 7}, "class with 7 support images"),
    ],
)
def test_plans_that_cannot_be_made(changes, message):
    index = index_of([[0, 1]] * 7)
    with pytest.raises(ValueError, match=message):
        make_tuple_plan(index, index, class_ids=[0, 1], **plan_options(**changes))


def test_check_refuses_a_query_among_the_supports_and_one_without_the_class():
    index = index_of([[0]] * 6 + [[1]] * 6)
    plan = make_tuple_plan(index, index, class_ids=[0], **plan_options(num_episodes=1))
    plan.check(index, index, "a")
    (episode,) = plan.episodes
    own = index.locate(episode.supports[0][0])[0]
    for query, message in ((own, "different images"), (7, "a query with class 0")):
        bad = dataclasses.replace(episode, query_image_ids=(query,))
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(plan, episodes=(bad,)).check(index, index, "a")
    twice = dataclasses.replace(episode, supports=(episode.supports[0][:1] * 2,))
    with pytest.raises(ValueError, match="different images"):
        dataclasses.replace(plan, episodes=(twice,)).check(index, index, "a")


def test_tuples_refuse_keys_that_would_do_nothing():
    with pytest.raises(ValueError, match="NUM_WAYS must be 1"):
        config("FEWSHOT.NUM_WAYS", 2)
    with pytest.raises(ValueError, match='PROTOCOL is "episodes"'):
        config("FEWSHOT.GROUND_TRUTH.MAX_BOXES", 30)


def test_filters_drop_difficult_small_and_crowded_boxes():
    big, small = [0, 0, 20, 20], [0, 0, 4, 5]
    dicts = [record(0, [(0, big), (0, small), (1, big), (0, big), (0, big)]), record(1, [])]
    dicts[0]["annotations"][2]["difficult"] = 1
    dicts[0]["annotations"][4]["iscrowd"] = 1

    def kept(**options):
        return [a["id"] for a in GroundTruthFilter(**options)(dicts)[0]["annotations"]]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(keep_difficult=False) == [0, 1, 3, 4]
    # 20 of 2400 pixels.
    assert kept(min_area=20 / 2400) == [0, 1, 2, 3, 4]
    assert kept(min_area=21 / 2400) == [0, 2, 3, 4]
    assert kept(max_boxes=3) == [2]
    assert kept(max_boxes=4) == [0, 1, 2, 3, 4]
    assert kept(max_boxes=3, min_area=0.1) == [0, 2, 3, 4]
    assert len(dicts[0]["annotations"]) == 5
    assert [len(r["annotations"]) for r in GroundTruthFilter(max_boxes=1)(dicts)] == [0, 0]


def test_filters_say_what_they_remove():
    assert str(KEEP_ALL) == "all"
    assert str(GroundTruthFilter(False, 0.001, 30)) == (
        "not difficult, area at least 0.001, below 30 boxes"
    )
    with pytest.raises(ValueError, match="MIN_AREA in"):
        GroundTruthFilter(min_area=1.0)
