"""Training episodes, their stream, the mapper, and the border between base and novel classes."""

import io
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from factories import CATEGORIES, registered_set, set_fixture, tiny_config, write_set
from PIL import Image

from fewshot_d2.data import dataset_mapper
from fewshot_d2.data.coco_json import register_instances
from fewshot_d2.data.episodes import EpisodeStream
from fewshot_d2.data.loaders import (
    EpisodicTestLoader,
    EpisodicTrainLoader,
    build_factory,
    build_training_episodes,
)
from fewshot_d2.data.plans import make_plan
from fewshot_d2.decoding import read_rgb

NAME = "episodes_test_set"


dataset = set_fixture(NAME)


def config(*overrides):
    own = ("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "FEWSHOT.SUPPORT.DATASET_TRAIN", "")
    return tiny_config(*own, "FEWSHOT.SUPPORT.DATASETS_TEST", (), *overrides)


def described(query):
    """What identifies an episode, pixels included."""
    support = query["support"]
    return (
        query["image_id"],
        query["episode_id"],
        tuple(support.class_ids),
        tuple(shot.image.sum().item() for shots in support.examples for shot in shots),
        query["image"].sum().item(),
        query["instances"].gt_classes.tolist(),
    )


def first_batches(cfg, number, iteration=0):
    with EventStorage(iteration):
        return list(itertools.islice(iter(EpisodicTrainLoader(cfg)), number))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_batches_for_any_number_of_workers(dataset, workers):
    overrides = ("SOLVER.IMS_PER_BATCH", 3, "INPUT.RANDOM_FLIP", "horizontal")
    alone = first_batches(config(*overrides), 5)
    shared = first_batches(config(*overrides, "DATALOADER.NUM_WORKERS", workers), 5)
    assert [[described(q) for q in batch] for batch in alone] == [
        [described(q) for q in batch] for batch in shared
    ]


def test_resumed_loader_continues_the_stream(dataset):
    cfg = config("SOLVER.IMS_PER_BATCH", 2)
    whole = first_batches(cfg, 6)
    rest = first_batches(cfg, 2, iteration=4)
    assert [[described(q) for q in b] for b in whole[4:]] == [
        [described(q) for q in b] for b in rest
    ]


def test_processes_share_the_global_batch(dataset, monkeypatch):
    """Two processes with batch 2 see, together, what one with batch 4 sees."""
    episodes = build_training_episodes(config())
    whole = list(itertools.islice(iter(EpisodeStream(episodes, start=8, batch_size=4)), 8))
    parts = []
    for rank in (0, 1):
        stream = EpisodeStream(episodes, start=8, batch_size=2)
        stream.rank, stream.world_size = rank, 2
        parts.append([described(q) for q in itertools.islice(iter(stream), 4)])
    first, second = parts
    expected = [described(q) for q in whole]
    assert first[:2] + second[:2] + first[2:] + second[2:] == expected


def test_seeds_differ_and_every_image_is_visited_once_an_epoch(dataset):
    episodes = build_training_episodes(config())
    other = build_training_episodes(config("SEED", 1))
    count = len(episodes.images)
    assert count == 10
    visited = [episodes.sample(t).query["image_id"] for t in range(count)]
    assert sorted(visited) == sorted(set(visited))
    assert visited != [other.sample(t).query["image_id"] for t in range(count)]
    again = [episodes.sample(t).query["image_id"] for t in reversed(range(count))]
    assert again[::-1] == visited


def test_class_is_uniform_over_the_classes_of_the_image(dataset):
    """Spec 2.2(3): not over instances."""
    episodes = build_training_episodes(config())
    counts = {}
    for t in range(2000):
        episode = episodes.sample(t)
        row = counts.setdefault(episode.query["image_id"], {})
        row[episode.class_ids[0]] = row.get(episode.class_ids[0], 0) + 1
    for row in counts.values():
        expected = sum(row.values()) / len(row)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in row.values())


def test_supports_come_from_another_image_with_the_class(dataset):
    episodes = build_training_episodes(config("FEWSHOT.NUM_SHOTS", 2, "FEWSHOT.NUM_WAYS", 3))
    for t in range(100):
        episode = episodes.sample(t)
        assert len(set(episode.class_ids)) == len(episode.class_ids)
        for contiguous, shots in zip(episode.contiguous_ids, episode.supports, strict=True):
            assert len(shots) == 2
            for record, annotation in shots:
                assert record["image_id"] != episode.query["image_id"]
                assert annotation["category_id"] == contiguous and not annotation["iscrowd"]


def test_absent_ways_are_absent_and_have_no_ground_truth(dataset):
    episodes = build_training_episodes(config("FEWSHOT.NUM_ABSENT_WAYS", 1))
    seen = False
    for t in range(60):
        query, episode = episodes[t], episodes.sample(t)
        for k, contiguous in enumerate(episode.contiguous_ids):
            present = any(a["category_id"] == contiguous for a in episode.query["annotations"])
            assert present == bool((query["instances"].gt_classes == k).any())
            seen |= not present
    assert seen


def test_novel_labels_never_reach_training(dataset):
    """Neither as class, support, ground truth nor hidden in a dict that training holds."""
    episodes = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b", "FEWSHOT.NUM_WAYS", 4))
    novel = sorted(CATEGORIES).index(11)
    for index in (episodes.factory.query_index, episodes.factory.support_index):
        assert 11 not in index.class_ids
        assert all(a["category_id"] != novel for d in index.dicts for a in d["annotations"])
    for t in range(200):
        episode = episodes.sample(t)
        assert 11 not in episode.class_ids and novel not in episode.contiguous_ids
        for shots in episode.supports:
            for record, annotation in shots:
                assert annotation["category_id"] != novel
                assert all(a["category_id"] != novel for a in record["annotations"])
    assert any(
        a["category_id"] == novel for d in DatasetCatalog.get(NAME) for a in d["annotations"]
    )


def test_images_with_novel_classes_only_are_not_trained_on(dataset):
    episodes = build_training_episodes(config("FEWSHOT.SPLIT", "novel:b,c,d"))
    with_a = {
        record["image_id"]
        for record in DatasetCatalog.get(NAME)
        if any(a["category_id"] == 0 and not a["iscrowd"] for a in record["annotations"])
    }
    assert {episodes.factory.query_index.dicts[i]["image_id"] for i in episodes.images} == with_a


def test_no_base_instance_at_all_is_an_error(dataset):
    with pytest.raises(ValueError, match="at least one image"):
        build_training_episodes(config("FEWSHOT.SPLIT", "novel:a,b,c,d"))


def test_ground_truth_is_the_episodes_class_only(dataset):
    episodes = build_training_episodes(config())
    for t in range(20):
        episode, query = episodes.sample(t), episodes[t]
        expected = [
            a
            for a in episode.query["annotations"]
            if a["category_id"] == episode.contiguous_ids[0] and not a["iscrowd"]
        ]
        assert len(query["instances"]) == len(expected)
        assert (query["instances"].gt_classes == 0).all()
        height, width = query["image"].shape[1:]
        scale = torch.tensor([width / 60, height / 40]).repeat(2)
        boxes = torch.tensor([a["bbox"] for a in expected], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(query["instances"].gt_boxes.tensor, boxes * scale)


def test_flip_turns_query_truth_and_support_together(dataset):
    plain = build_training_episodes(config())
    flipping = build_training_episodes(config("INPUT.RANDOM_FLIP", "horizontal"))
    turned = 0
    for t in range(20):
        a, b = plain[t], flipping[t]
        if torch.equal(a["image"], b["image"]):
            continue
        turned += 1
        width = a["image"].shape[2]
        boxes = a["instances"].gt_boxes.tensor
        mirrored = torch.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
        )
        torch.testing.assert_close(b["instances"].gt_boxes.tensor, mirrored)
        first, second = (q["support"].examples[0][0].image for q in (a, b))
        assert torch.equal(first.flip(-1), second)
    assert 3 < turned < 17


def test_support_forms(dataset):
    crop = build_training_episodes(config())[0]["support"].examples[0][0]
    whole = build_training_episodes(config("FEWSHOT.SUPPORT.FORM", "image"))[0]["support"]
    shot = whole.examples[0][0]
    assert crop.box is None and max(crop.image_size) == 32
    assert shot.image_size == (40, 60) and (shot.box[2:] - shot.box[:2]).tolist() == [20, 15]


def test_mask_box_equals_the_rectangle_it_was_drawn_from(dataset):
    from_mask = build_training_episodes(config("FEWSHOT.SUPPORT.BOX", "mask"))
    from_box = build_training_episodes(config())
    for t in range(5):
        a, b = (e[t]["support"].examples[0][0].image for e in (from_mask, from_box))
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other size", "bomb"])
def test_training_names_the_broken_image(dataset, damage):
    episodes = build_training_episodes(config())
    record = episodes.sample(0).query
    break_image(record["file_name"], damage)
    with pytest.raises(ValueError, match=record["file_name"]):
        episodes[0]


def break_image(path, damage):
    with open(path, "rb") as file:
        content = file.read()
    if damage == "bomb":
        # The header of a bitmap declares its size.
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "BMP")
        content = picture.getvalue()
        content = content[:18] + struct.pack("<ii", 20000, 20000) + content[26:]
    if damage == "missing":
        Path(path).unlink()
        return
    if damage == "truncated":
        content = content[: len(content) // 2]
    with open(path, "wb") as file:
        file.write(content)
    if damage == "other size":
        Image.new("RGB", (10, 10)).save(path)


def make_test_plan(run=0):
    factory = build_factory(NAME, NAME)
    return make_plan(
        factory.query_index,
        factory.support_index,
        dataset=NAME,
        support_dataset=NAME,
        split="all",
        side="all",
        class_ids=tuple(CATEGORIES),
        protocol="present",
        shots=1,
        seed=0,
        run=run,
    )


@pytest.mark.parametrize("damage", ["truncated", "bomb"])
def test_evaluation_leaves_broken_images_out_and_goes_on(dataset, damage, caplog):
    plan = make_test_plan()
    victim = build_factory(NAME, NAME).query_index.dicts[5]
    break_image(victim["file_name"], damage)
    queries = [
        query
        for batch in EpisodicTestLoader(config(), plan, build_factory(NAME, NAME))
        for query in batch
    ]
    lost = {e.id for e in plan.episodes} - {query["episode_id"] for query in queries}
    planned = next(e.id for e in plan.episodes if e.image_id == victim["image_id"])
    assert planned in lost and len(queries) > 0
    assert victim["file_name"] in caplog.text and f"episode {planned} " in caplog.text


def test_planned_episodes_are_what_the_plan_says(dataset):
    plan = make_test_plan()
    queries = [
        query
        for batch in EpisodicTestLoader(config(), plan, build_factory(NAME, NAME))
        for query in batch
    ]
    assert [q["image_id"] for q in queries] == [e.image_id for e in plan.episodes]
    assert [tuple(q["support"].class_ids) for q in queries] == [e.class_ids for e in plan.episodes]
    assert all("instances" not in q and q["image"].shape[2] == 64 for q in queries)


def test_plan_of_another_dataset_is_refused(dataset, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_set(other, num_images=4, seed=3)
    plan = make_test_plan()
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    register_instances(NAME, str(other / "instances.json"), str(other))
    with pytest.raises(ValueError, match="plan"):
        EpisodicTestLoader(config(), plan, build_factory(NAME, NAME))


def test_split_of_other_categories_for_testing_is_refused(dataset, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_set(other, num_images=4)
    text = (other / "instances.json").read_text().replace('"name": "d"', '"name": "z"')
    (other / "instances.json").write_text(text)
    cfg = config("FEWSHOT.SPLIT", "every_4th:1", "DATASETS.TEST", ("other_test_set",))
    with (
        registered_set("other_test_set", other),
        pytest.raises(ValueError, match="same categories"),
    ):
        build_training_episodes(cfg)


def test_unknown_forms_are_refused(dataset):
    with pytest.raises(ValueError, match="'crops'"):
        build_training_episodes(config("FEWSHOT.SUPPORT.FORM", "crops"))


def test_outline_without_segmentation_is_the_box():
    annotation = {"bbox": [1, 2, 3, 4], "bbox_mode": 1, "segmentation": None}
    assert dataset_mapper.outline(annotation) == [[1, 2, 4, 2, 4, 6, 1, 6]]


def test_decode_mask_of_all_three_forms():
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:4, 2:5] = True
    runs, value = [0], False
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    uncompressed = {"size": [5, 6], "counts": [int(r) for r in runs]}
    compressed = dataset_mapper.coco_mask.frPyObjects(uncompressed, 5, 6)
    polygon = [[2, 1, 5, 1, 5, 4, 2, 4]]
    for form in (uncompressed, compressed, polygon):
        assert np.array_equal(dataset_mapper.decode_mask(form, 5, 6), mask)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_training_sees_pictures_as_find_does(tmp_path, image_format):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (4, 4), (9, 90, 200)).save(tmp_path / "plain.png")
    order = [0, 1, 2] if image_format == "RGB" else [2, 1, 0]
    for name in ("deep", "clear", "plain"):
        path = str(tmp_path / f"{name}.png")
        actual = dataset_mapper.read_image({"file_name": path}, image_format)
        np.testing.assert_array_equal(actual, read_rgb(path)[..., order])
    with pytest.raises(ValueError, match=r"plain\.png must have 5x4 pixels"):
        record = {"file_name": str(tmp_path / "plain.png"), "width": 5, "height": 4}
        dataset_mapper.read_image(record, image_format)
