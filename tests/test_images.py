"""Training images without supports: balance, determinism, and the boundary to novel classes."""

from collections import Counter

import pytest
from detectron2.utils.events import EventStorage
from factories import CATEGORIES, TINY_REPMET, TINY_REPMET_OVERRIDES, registered_set, write_set

from fewshot_d2 import load_config
from fewshot_d2.data.images import TrainingImages
from fewshot_d2.data.loaders import EpisodicTrainLoader, build_factory, build_training_episodes

NOVEL = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_set(folder, num_images=30)
    with registered_set("balanced", folder):
        yield "balanced"


def config(dataset, *overrides):
    own = ["DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (), "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    return load_config(
        str(TINY_REPMET),
        [*TINY_REPMET_OVERRIDES, *own, "FEWSHOT.SPLIT", "novel:b", *overrides],
    )


def images_of(dataset, per_class=0, seed=0):
    base = [c for c in CATEGORIES if c != NOVEL]
    return TrainingImages(build_factory(dataset, "", base), None, per_class=per_class, seed=seed)


def test_an_epoch_without_limit_has_every_image_with_a_base_class_once(dataset):
    images = images_of(dataset)
    expected = {
        i
        for i, d in enumerate(images.factory.query_index.dicts)
        if images.factory.query_index.classes_in(i)
    }
    for epoch in range(3):
        numbers = range(epoch * len(expected), (epoch + 1) * len(expected))
        names = [images.sample(n).query["file_name"] for n in numbers]
        assert len(set(names)) == len(expected)
        assert {images.epoch_of(n) for n in numbers} == {epoch}


def test_balanced_epochs_charge_each_image_to_its_rarest_class(dataset):
    images, limit = images_of(dataset, per_class=4), 4
    index = images.factory.query_index
    number = 0
    for epoch in range(4):
        charged = Counter()
        seen = set()
        while images.epoch_of(number) == epoch:
            image = index.image_index(images.sample(number).query["image_id"])
            rarest = min(index.classes_in(image), key=lambda c: charged[c])
            charged[rarest] += 1
            seen.add(image)
            number += 1
        assert max(charged.values()) <= limit and sum(charged.values()) == len(seen)
        # The classes have enough images, so each one gets its share.
        assert set(charged) == {5, 12, 90} and min(charged.values()) == limit


def test_images_depend_on_seed_and_number_alone(dataset):
    forward, backward = images_of(dataset, per_class=3), images_of(dataset, per_class=3)
    numbers = range(40)
    first = [forward.sample(n).query["image_id"] for n in numbers]
    second = [backward.sample(n).query["image_id"] for n in reversed(numbers)]
    assert first == second[::-1]
    other = images_of(dataset, per_class=3, seed=1)
    assert first != [other.sample(n).query["image_id"] for n in numbers]


def test_no_novel_label_reaches_training(dataset):
    episodes = build_training_episodes(config(dataset))
    assert isinstance(episodes, TrainingImages) and episodes.class_ids == [5, 12, 90]
    labels = set()
    for number in range(60):
        query = episodes[number]
        assert "support" not in query
        labels |= set(query["instances"].gt_classes.tolist())
        record = episodes.sample(number).query
        assert {a["category_id"] for a in record["annotations"]} <= {0, 2, 3}
    assert labels == {0, 1, 2}


def test_labels_are_positions_of_the_base_classes(dataset):
    episodes = build_training_episodes(config(dataset))
    number = next(n for n in range(60) if len(episodes[n]["instances"]))
    record, instances = episodes.sample(number).query, episodes[number]["instances"]
    base = {0: 0, 2: 1, 3: 2}
    expected = [base[a["category_id"]] for a in record["annotations"]]
    assert instances.gt_classes.tolist() == expected


def test_wrong_number_of_classes_is_refused(dataset):
    with pytest.raises(ValueError, match="NUM_CLASSES must be the 3 base classes"):
        build_training_episodes(config(dataset, "MODEL.ROI_HEADS.NUM_CLASSES", 4))


def test_negative_number_of_images_is_refused(dataset):
    with pytest.raises(ValueError, match="IMAGES_PER_CLASS must be at least 0, got -1"):
        images_of(dataset, per_class=-1)


def test_without_any_instance_there_is_nothing_to_train_on(dataset):
    with pytest.raises(ValueError, match="at least one image"):
        TrainingImages(build_factory(dataset, "", []), None, per_class=0, seed=0)


def test_loader_gives_batches_without_supports(dataset):
    loader = EpisodicTrainLoader(config(dataset, "SOLVER.IMS_PER_BATCH", 3))
    with EventStorage(2):
        batch = next(iter(loader))
    assert [query["episode_id"] for query in batch] == [6, 7, 8]
