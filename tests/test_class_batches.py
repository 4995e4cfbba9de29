"""Class-balanced batches and where their images come from."""

import io
import zipfile

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from factories import CATEGORIES, registered_set, write_set
from PIL import Image

from fewshot_d2 import load_config
from fewshot_d2.data.class_batches import (
    ClassBatches,
    ClassBatchLoader,
    SquareMapper,
    build_classification_test_loader,
)
from fewshot_d2.data.classified_images import (
    ClassifiedImages,
    box_crops,
    class_folders,
    classified_images,
    omniglot_characters,
)
from fewshot_d2.data.datasets.omniglot import OmniglotGlyphs

COUNTS = {"ant": 5, "bee": 3, "cat": 1, "dog": 4}


def write_folders(root, counts):
    """Noise, so that an image is known by its pixels."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "readme.txt").write_text("no class")
    (root / next(iter(counts)) / "notes.txt").write_text("no picture")


@pytest.fixture
def folder(tmp_path):
    write_folders(tmp_path / "train", COUNTS)
    return tmp_path


def config(folder, *more):
    return load_config(
        "",
        [
            *("FEWSHOT.CLASSIFY.TRAIN", str(folder / "train"), "MODEL.DML.NUM_CLASSES", 4),
            *("FEWSHOT.CLASSIFY.TEST", str(folder / "train"), "FEWSHOT.CLASSIFY.IMAGE_SIZE", 16),
            *("FEWSHOT.CLASSIFY.CLASSES_PER_BATCH", 3, "FEWSHOT.CLASSIFY.EXAMPLES_PER_CLASS", 4),
            *("SOLVER.IMS_PER_BATCH", 12, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
            *("SEED", 7, "INPUT.FORMAT", "RGB", *more),
        ],
    )


def first_batches(cfg, count, start=0):
    loader = ClassBatchLoader(cfg)
    with EventStorage(start):
        batches = iter(loader)
        return [next(batches) for _ in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert [x["label"] for x in batch] == [x["label"] for x in other]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(batch, other, strict=True))


def test_batches_are_balanced_and_images_repeat_only_when_all_are_drawn(folder):
    seen = set()
    for batch in first_batches(config(folder), 12):
        labels = [x["label"] for x in batch]
        assert sorted(labels.count(c) for c in set(labels)) == [4, 4, 4]
        seen |= set(labels)
        for label in set(labels):
            pixels = {x["image"].numpy().tobytes() for x in batch if x["label"] == label}
            # A flip is another picture of the same image.
            count = list(COUNTS.values())[label]
            assert min(count, 4) <= len(pixels) or count < 4
    assert seen == {0, 1, 2, 3}
    places = ClassBatchLoader(config(folder)).episodes.draw(0)
    for label in {label for label, _ in places}:
        own = [place for c, place in places if c == label]
        assert len(set(own)) == min(4, list(COUNTS.values())[label])


def test_images_have_the_class_of_their_folder(folder):
    known = {
        Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR).tobytes(): name
        for name in COUNTS
        for path in (folder / "train" / name).glob("*.png")
    }
    names = class_folders(folder / "train").class_names
    assert names == tuple(COUNTS)
    for batch in first_batches(config(folder, "INPUT.RANDOM_FLIP", "none"), 3):
        for x in batch:
            assert known[x["image"].permute(1, 2, 0).numpy().tobytes()] == names[x["label"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(folder, workers):
    alone = first_batches(config(folder), 5)
    assert_same(alone, first_batches(config(folder, "DATALOADER.NUM_WORKERS", workers), 5))


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(folder):
    assert_same(first_batches(config(folder), 5)[3:], first_batches(config(folder), 2, start=3))


def test_seeds_differ_and_processes_share_a_batch(folder, monkeypatch):
    whole = first_batches(config(folder), 2)
    other = first_batches(config(folder, "SEED", 8), 1)[0]
    assert [x["label"] for x in whole[0]] != [x["label"] for x in other]
    parts = []
    for rank in range(2):
        for module in ("utils.comm", "data.build"):
            monkeypatch.setattr(f"detectron2.{module}.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        parts.append(first_batches(config(folder), 2))
    assert_same(whole, [a + b for a, b in zip(*parts, strict=True)])


def test_flips_are_by_key_and_in_training_only(folder):
    plain = first_batches(config(folder, "INPUT.RANDOM_FLIP", "none"), 4)
    flipped = first_batches(config(folder, "INPUT.RANDOM_FLIP", "horizontal"), 4)
    pairs = [p for a, b in zip(plain, flipped, strict=True) for p in zip(a, b, strict=True)]
    changed = [not torch.equal(x["image"], y["image"]) for x, y in pairs]
    assert 0.2 < np.mean(changed) < 0.8
    for (x, y), moved in zip(pairs, changed, strict=True):
        image = x["image"].flip(-1) if moved else x["image"]
        # Resizing is not exactly symmetric.
        assert (image.int() - y["image"].int()).abs().max() <= 1
    mapper = SquareMapper(config(folder, "INPUT.RANDOM_FLIP", "horizontal"), is_train=False)
    assert mapper.flip_probability == 0


def test_channels_follow_the_key(folder):
    read = class_folders(folder / "train").images[0][0]
    rgb, bgr = (
        SquareMapper(size=16, image_format=f, flip_probability=0.0)(read, 0)["image"]
        for f in ("RGB", "BGR")
    )
    assert torch.equal(rgb, bgr.flip(0)) and rgb.dtype == torch.uint8 and rgb.shape == (3, 16, 16)
    with pytest.raises(ValueError, match="INPUT.FORMAT must be"):
        SquareMapper(size=16, image_format="YUV", flip_probability=0.0)


def test_test_loader_has_every_image_once_with_the_labels_of_training(folder):
    write_folders(folder / "test", {"cat": 2, "bee": 3})
    cfg = config(folder, "FEWSHOT.CLASSIFY.TEST", str(folder / "test"), "SOLVER.IMS_PER_BATCH", 4)
    loader, names = build_classification_test_loader(cfg)
    assert names == tuple(COUNTS)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 1]
    assert [x["label"] for batch in batches for x in batch] == [1, 1, 1, 2, 2]


def test_class_that_was_not_trained_is_refused(folder):
    write_folders(folder / "test", {"cat": 1, "eel": 1})
    with pytest.raises(ValueError, match=r"classes of training only, got also \['eel'\]"):
        build_classification_test_loader(
            config(folder, "FEWSHOT.CLASSIFY.TEST", str(folder / "test"))
        )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"ant": 3}, "at least 2 classes"),
        ({"ant": 3, "bee": 0}, r"an image of every class, got none of \['bee'\]"),
    ],
)
def test_folders_that_cannot_be_classified(tmp_path, counts, message):
    write_folders(tmp_path / "set", counts)
    with pytest.raises(ValueError, match=message):
        class_folders(tmp_path / "set")


def test_fields_must_fit():
    with pytest.raises(ValueError, match="of different names"):
        ClassifiedImages(name="x", class_names=("a", "a"), images=((None,), (None,)))
    with pytest.raises(ValueError, match="each of 2 classes, got 1"):
        ClassifiedImages(name="x", class_names=("a", "b"), images=((None,),))


@pytest.mark.parametrize("content", [b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(folder, content):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cat/0\.png must be a readable image"):
        class_folders(folder / "train").images[2][0]()
    path.unlink()
    cfg = config(folder, "FEWSHOT.CLASSIFY.CLASSES_PER_BATCH", 4, "SOLVER.IMS_PER_BATCH", 16)
    with pytest.raises(ValueError, match="an image of every class"):
        first_batches(cfg, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("SOLVER.IMS_PER_BATCH", 10), "EXAMPLES_PER_CLASS = 12, got 10"),
        (("FEWSHOT.SPLIT", "novel:cat"), "SPLIT must be 'all' for a classifier.* got 'novel:cat'"),
        (("MODEL.DML.NUM_CLASSES", 5), "must be the 4 classes of .*got 5"),
        (("FEWSHOT.CLASSIFY.TRAIN", ""), "a folder, got ''"),
        (("FEWSHOT.CLASSIFY.TRAIN", "nowhere"), "a folder, got 'nowhere'"),
        (("FEWSHOT.CLASSIFY.CLASSES_PER_BATCH", 6, "SOLVER.IMS_PER_BATCH", 24), "must be 2..4"),
        (("FEWSHOT.CLASSIFY.CLASSES_PER_BATCH", 1), "must be 2..4"),
    ],
)
def test_keys_that_do_not_fit(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ClassBatchLoader(config(folder, *options))


def test_box_crops_are_the_pixels_of_the_boxes(tmp_path):
    write_set(tmp_path)
    with registered_set("crops_test_set", tmp_path):
        images = classified_images("crops_test_set")
        records = DatasetCatalog.get("crops_test_set")
        contiguous = MetadataCatalog.get("crops_test_set").thing_dataset_id_to_contiguous_id
    assert images.class_names == tuple(CATEGORIES.values())
    # Image 1 holds a crowd only.
    of_class = {i: name for name, i in zip(CATEGORIES.values(), contiguous.values(), strict=True)}
    expected = {name: [] for name in CATEGORIES.values()}
    for record in records:
        for annotation in record["annotations"]:
            if annotation["iscrowd"]:
                continue
            x, y, width, height = map(int, annotation["bbox"])
            pixels = np.asarray(Image.open(record["file_name"]))[y : y + height, x : x + width]
            expected[of_class[annotation["category_id"]]].append(pixels)
    assert len(images) == sum(map(len, expected.values())) == 40
    for name, own in zip(images.class_names, images.images, strict=True):
        for read, pixels in zip(own, expected[name], strict=True):
            assert (read() == pixels).all()


def test_crop_of_a_box_beyond_the_image_has_a_pixel(tmp_path):
    write_set(tmp_path)
    with registered_set("crops_test_set", tmp_path):
        read = box_crops("crops_test_set").images[0][0]
    annotation = {**read.args[1], "bbox": [59.9, 39.9, 30, 30]}
    assert read.func(read.args[0], annotation).shape == (1, 1, 3)


def write_omniglot(path, characters=3, drawers=20):
    """A zip whose drawings have their character and drawer written into two rows."""
    with zipfile.ZipFile(path, "w") as file:
        for part in ("background", "evaluation"):
            for c in range(characters):
                for d in range(drawers):
                    pixels = np.full((105, 105), 255, dtype=np.uint8)
                    pixels[0, : c + 1], pixels[1, : d + 1] = 0, 0
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).convert("1").save(buffer, format="PNG")
                    name = f"images_{part}/Abc/character{c:02}/{c:04}_{d:02}.png"
                    file.writestr(name.replace("Abc", f"{part}_abc"), buffer.getvalue())
    return OmniglotGlyphs(str(path), (characters, characters))


def test_drawings_of_training_and_test_are_by_other_people(tmp_path):
    source = write_omniglot(tmp_path / "omniglot.zip")
    train, test = (
        omniglot_characters(source, (1, 5), drawers=drawers) for drawers in ((0, 14), (14, 20))
    )
    assert train.class_names == test.class_names and len(train.class_names) == 4
    assert (len(train), len(test)) == (4 * 14, 4 * 6)
    drawn = []
    for images, drawers in ((train, range(14)), (test, range(14, 20))):
        for c, own in zip((1, 2, 0, 1), images.images, strict=True):
            pixels = [read() for read in own]
            assert all(p.shape == (105, 105, 3) and p.dtype == np.uint8 for p in pixels)
            assert all((p[0] == 0).sum() == 3 * (c + 1) for p in pixels)
            assert [(p[1] == 0).sum() // 3 - 1 for p in pixels] == list(drawers)
        drawn.append({(r.args[1], r.args[2]) for own in images.images for r in own})
    assert not drawn[0] & drawn[1]


def test_omniglot_is_named_by_a_text(tmp_path, monkeypatch):
    write_omniglot(tmp_path / "omniglot.zip")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(
        "fewshot_d2.data.classified_images.OmniglotGlyphs",
        lambda: OmniglotGlyphs(characters=(3, 3)),
    )
    images = classified_images("omniglot:0-2:0-5")
    assert images.name == "omniglot:0-2:0-5" and len(images) == 10
    with pytest.raises(ValueError, match="an image of every class"):
        classified_images("omniglot:0-2:20-25")
    with pytest.raises(ValueError, match="at least 2 classes"):
        classified_images("omniglot:6-9:0-5")


def test_a_mapper_is_called_with_the_image_its_label_and_randomness(folder):
    calls = []
    images = class_folders(folder / "train")
    batches = ClassBatches(
        images, lambda *call: calls.append(call), num_classes=2, per_class=3, seed=0
    )
    for number in range(6):
        batches[number]
    for (label, place), (read, called_label, _) in zip(batches.draw(0), calls, strict=True):
        assert called_label == label and read is images.images[label][place]
    assert len({call[2].random() for call in calls}) == 6
