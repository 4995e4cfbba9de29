"""From pictures to files: sources, order, results as COCO reads them, and nothing outside the folder."""

import csv
import itertools
import json
import os
import threading
from contextlib import redirect_stdout
from io import StringIO

import cv2
import numpy as np
import pytest
import torch
from factories import random_support_set, tiny_config
from inference_cases import (
    same_instances,
    small_config,
    system_configs,
    write_photos,
)
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fewshot_d2 import FewShotPredictor, SupportSet
from fewshot_d2.inference import find as find_module
from fewshot_d2.inference import sources
from fewshot_d2.inference.find import find
from fewshot_d2.inference.pipeline import mapped_ahead
from fewshot_d2.inference.result_folder import ResultFolder, file_safe, rle_of_mask
from fewshot_d2.inference.sources import Pictures


def test_results_are_in_order_and_only_a_few_are_ahead():
    started, barrier = [], threading.Barrier(2)

    def slow_first(item):
        started.append(item)
        if item < 2:
            barrier.wait(timeout=10)
        return item * 10

    results = mapped_ahead(slow_first, itertools.count(), ahead=3, workers=2)
    assert list(itertools.islice(results, 4)) == [0, 10, 20, 30]
    results.close()
    assert len(started) <= 4 + 3
    assert list(mapped_ahead(str, [], ahead=1)) == []
    with pytest.raises(ValueError, match="invalid literal"):
        list(mapped_ahead(int, ["1", "x"], ahead=5))
    with pytest.raises(ValueError, match="at least 1"):
        list(mapped_ahead(int, [], ahead=0))


def test_folders_patterns_and_files(tmp_path):
    photos = write_photos(tmp_path / "a" / "b", 3)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    odd = photos[0].rename(tmp_path / "a" / "[x].JPG")
    everything = [str(odd), *map(str, photos[1:])]
    assert Pictures([str(tmp_path / "a")]).files == everything
    assert Pictures([str(odd)]).files == [str(odd)]
    assert Pictures([str(tmp_path / "**" / "*_1.jpg")]).files == [str(photos[1])]
    assert [p.stem for p in Pictures([str(tmp_path / "a")])] == ["[x]", "photo_1", "photo_2"]
    for pattern in (tmp_path / "missing", tmp_path / "*.gif"):
        with pytest.raises(ValueError, match="images must be"):
            Pictures([str(pattern)])


def write_clip(path, frames):
    """A video whose frame i has the grey value 30 i, at most 255."""
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(frames):
        video.write(np.full((48, 64, 3), min(30 * i, 255), np.uint8))
    video.release()
    return path


def test_frames_of_a_video(tmp_path):
    path = str(write_clip(tmp_path / "clip.avi", 7))
    pictures = Pictures([path], every=3)
    found = list(pictures)
    assert len(pictures) == 3 and [p.name for p in found] == [f"{path}#{i}" for i in (0, 3, 6)]
    assert [round(float(p.read().mean()) / 30) for p in found] == [0, 3, 6]
    with pytest.raises(ValueError, match="every must be"):
        Pictures([path], every=0)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    low = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 6)
    return FewShotPredictor(tiny_config(*low))


def run(predictor, support_set, patterns, output, threshold):
    predictor.set_support(support_set)
    folder = ResultFolder(
        output,
        class_ids=support_set.class_ids,
        class_names=support_set.class_names,
        thresholds=[threshold] * len(support_set),
    )
    return find(predictor, Pictures(patterns), folder)


def test_files_hold_what_the_predictor_finds(predictor, rng, tmp_path):
    photos = write_photos(tmp_path / "in", 4)
    photos[1].write_bytes(b"broken")
    support_set = random_support_set(rng)
    support_set.class_names[1] = "../../b/x"
    output = tmp_path / "out"
    predictor.set_support(support_set)
    expected = [predictor.predict(path) for path in photos if path != photos[1]]
    threshold = float(torch.cat([e.scores for e in expected]).median())
    summary = run(predictor, support_set, [str(tmp_path / "in")], output, threshold)
    with redirect_stdout(StringIO()):
        truth = COCO(output / "images.json")
        results = truth.loadRes(str(output / "results.json"))
    assert [truth.imgs[i]["file_name"] for i in (1, 3, 4)] == [
        str(p) for p in photos if p != photos[1]
    ]
    assert [truth.cats[c]["name"] for c in (10, 20)] == support_set.class_names
    for image_id, instances in zip((1, 3, 4), expected, strict=True):
        rows = results.loadAnns(results.getAnnIds(imgIds=[image_id]))
        assert [row["score"] for row in rows] == pytest.approx(instances.scores.tolist(), abs=1e-5)
        boxes = np.array([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        assert np.allclose(boxes, instances.pred_boxes.tensor, atol=0.02)
        assert [row["category_id"] for row in rows] == [
            support_set.class_ids[k] for k in instances.pred_classes.tolist()
        ]
        masks = np.stack([coco_mask.decode(row["segmentation"]) for row in rows])
        assert np.array_equal(masks.astype(bool), instances.pred_masks.numpy())
    above = sum(int((e.scores >= threshold).sum()) for e in expected)
    counts = list(csv.reader((output / "counts.csv").open()))
    assert counts[0] == ["file", "class 0", "../../b/x", "total"]
    assert sum(int(row[-1]) for row in counts[1:]) == above == sum(summary.counts)
    assert len(list((output / "crops").rglob("*.jpg"))) == above
    assert len(list((output / "pictures").iterdir())) == summary.num_images == 3
    [skipped] = list(csv.reader((output / "skipped.csv").open()))[1:]
    assert skipped[0] == str(photos[1]) and "must be a readable image" in skipped[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(ValueError, match="new or empty"):
        run(predictor, support_set, [str(tmp_path / "in")], output, 0.5)


def test_nothing_found_is_an_empty_result(predictor, rng, tmp_path):
    write_photos(tmp_path / "in", 1)
    summary = run(predictor, random_support_set(rng), [str(tmp_path / "in")], tmp_path / "o", 1.1)
    assert summary.counts == [0, 0] and summary.images_with == [0, 0]
    assert not (tmp_path / "o" / "crops").exists()
    assert isinstance(json.loads((tmp_path / "o" / "results.json").read_text()), list)


def test_rle_equals_that_of_pycocotools():
    random = np.random.default_rng(0)
    for _ in range(300):
        shape = random.integers(1, 9, 2)
        mask = random.random(shape) < random.choice([0, 0.1, 0.5, 0.9, 1])
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle_of_mask(mask) == {
            "size": expected["size"],
            "counts": expected["counts"].decode(),
        }


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../a", "a"),
        ("дом 1", "дом_1"),
        ("", "unnamed"),
        ("..", "unnamed"),
        ("x" * 99, "x" * 40),
    ],
)
def test_names_of_files(name, safe):
    assert file_safe(name) == safe


@pytest.mark.parametrize("system", sorted(system_configs()))
def test_one_support_set_file_serves_every_system(system, rng, tmp_path):
    support_set = random_support_set(rng, ways=2, shots=2)
    shot = support_set.examples[0][0]
    shot.box = torch.tensor([2.0, 3, 20, 21])
    support_set.examples[1][0].mask = torch.ones(30, 24, dtype=torch.bool)
    support_set.save(tmp_path / "set.zip")
    torch.manual_seed(0)
    predictor = FewShotPredictor(small_config(system))
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    predictor.set_support(SupportSet.load(tmp_path / "set.zip"))
    expected = predictor.predict(image)
    assert expected.image_size == (48, 64)
    predictor.save_support(tmp_path / "set.zip", support_set)
    predictor.set_support(tmp_path / "set.zip")
    assert same_instances(predictor.predict(image), expected)
    folder = ResultFolder(
        tmp_path / "out", class_ids=[10, 20], class_names=["a", "b"], thresholds=[0.5, 0.5]
    )
    write_photos(tmp_path / "in", 2)
    assert find(predictor, Pictures([str(tmp_path / "in")]), folder).num_images == 2


def test_broken_videos_are_listed_and_the_others_searched(tmp_path, monkeypatch):
    whole = str(write_clip(tmp_path / "a.avi", 7))
    (tmp_path / "no.mp4").write_bytes(b"no video")
    pictures = Pictures([str(tmp_path / "no.mp4"), whole], every=3)
    no, *frames = pictures
    assert len(pictures) == 4 and [p.reason for p in frames] == [""] * 3
    with pytest.raises(ValueError, match=r"no.mp4 must be a video that OpenCV can read"):
        no.read()
    # A header that promises more than there is.
    monkeypatch.setattr(sources, "_num_frames", lambda _: 9)
    *frames, cut = Pictures([whole], every=3)
    assert [p.name for p in frames] == [f"{whole}#{i}" for i in (0, 3, 6)]
    with pytest.raises(ValueError, match="a.avi must be a whole video, got 7 of 9 frames"):
        cut.read()


def test_frames_of_a_hostile_size_are_not_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.avi", 2)
    monkeypatch.setattr(sources, "MAX_PIXELS", 64 * 48 - 1)
    [picture] = Pictures([str(path)])
    assert picture.reason


def test_a_file_is_searched_once_and_what_cannot_be_listed_is_told(tmp_path, monkeypatch, caplog):
    photos = write_photos(tmp_path / "in", 2)
    again = [str(tmp_path / "in"), str(photos[1]), str(tmp_path / "in" / ".." / "in" / "*.jpg")]
    assert Pictures(again).files == list(map(str, photos))
    walk = os.walk

    def walked(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/locked"))
        yield from walk(folder)

    monkeypatch.setattr(os, "walk", walked)
    assert len(Pictures([str(tmp_path / "in")])) == 2
    assert "in/locked is passed over: Permission denied" in caplog.text


def test_pictures_of_one_name_do_not_overwrite_each_other(predictor, rng, tmp_path):
    for folder in ("a", "b", "a/c"):
        write_photos(tmp_path / "in" / folder, 1)
    predictor.set_support(random_support_set(rng, ways=1))
    summary = run(
        predictor, random_support_set(rng, ways=1), [str(tmp_path / "in")], tmp_path / "o", 0
    )
    assert summary.num_images == 3 == len(list((tmp_path / "o" / "pictures").iterdir()))
    assert len(list((tmp_path / "o" / "crops").rglob("*.jpg"))) == summary.counts[0] > 3


def test_large_masks_do_not_wait_and_give_the_same(predictor, rng, tmp_path, monkeypatch):
    write_photos(tmp_path / "in", 3)
    support_set = random_support_set(rng)
    run(predictor, support_set, [str(tmp_path / "in")], tmp_path / "a", 0.3)
    threads, draw = [], ResultFolder.draw

    def watched(*arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        return draw(*arguments)

    monkeypatch.setattr(ResultFolder, "draw", watched)
    monkeypatch.setattr(find_module, "_WAITING_MASKS", 1)
    seen = []
    predictor.set_support(support_set)
    folder = ResultFolder(
        tmp_path / "b", class_ids=[10, 20], class_names=["x" * 10**6, "b"], thresholds=[0.3] * 2
    )

    def progress(queries):
        for query in queries:
            seen.append(query)
            yield query

    find(predictor, Pictures([str(tmp_path / "in")]), folder, progress=progress)
    assert threads == [True] * 3 and all(q.instances is q.image is None for q in seen)
    a, b = ((tmp_path / name / "results.json").read_text() for name in "ab")
    assert a == b and len(json.loads(a)) > 3
