"""Making evaluation plans, and checking that a plan fits its data."""

import dataclasses
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from plan_cases import DATASET_IDS, make_index, plan_of

from fewshot_d2.data.coco_json import load_instances_json
from fewshot_d2.data.index import InstanceIndex
from fewshot_d2.data.splits import classes_of_side


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


def test_open_protocol_without_foreign_images():
    """Images of other classes alone are left out, empty ones stay; in the present protocol there are none."""
    index = make_index()
    plan = plan_of(index, protocol="open", class_ids=(3,), foreign_images=False)
    expected = [
        d["image_id"]
        for d in index.dicts
        if not d["annotations"]
        or any(a["category_id"] == 0 and not a["iscrowd"] for a in d["annotations"])
    ]
    assert [e.image_id for e in plan.episodes] == expected
    empty = [d["image_id"] for d in index.dicts if not d["annotations"]]
    assert 0 < len(empty) < len(expected) < len(index.dicts) and set(empty) <= set(expected)
    present = [plan_of(index, class_ids=(3,), foreign_images=f).sha256 for f in (True, False)]
    assert present[0] == present[1]


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
    index, supports = make_index(7), make_index(7, first_id=800, num_classes=2, folder="b/")
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
        ({"protocol": "closed"}, "protocol must be one of .* got 'closed'"),
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
