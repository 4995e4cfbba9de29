"""Superpixels are computed once an image, kept whole, and follow resizing and flips."""

import builtins
import io
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from PIL import Image

from fewshot_d2.data import superpixels
from fewshot_d2.data.superpixels import SuperpixelCache, felzenszwalb_labels, resize_labels

RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.fixture
def image_path(tmp_path):
    """Red, with a blue rectangle in the right two fifths."""
    pixels = np.full((40, 100, 3), RED, np.uint8)
    pixels[:, 60:] = BLUE
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def calls(monkeypatch):
    """The images that labels were computed of; labels are 0 above and 1 below, without scikit-image."""
    images = []

    def fake(image, **parameters):
        images.append((image, parameters))
        labels = np.zeros(image.shape[:2], np.int32)
        labels[len(labels) // 2 :] = 1
        return labels

    monkeypatch.setattr(superpixels, "felzenszwalb_labels", fake)
    return images


def test_two_colours_are_two_superpixels(tmp_path, image_path):
    pytest.importorskip("skimage")
    labels = SuperpixelCache(tmp_path / "cache")(image_path)
    assert labels.dtype == np.int32 and labels.shape == (40, 100)
    expected = np.zeros((40, 100), int)
    expected[:, 60:] = 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(("sigma", "number"), [(0.0, 2), (0.5, 6)])
def test_blur_makes_superpixels_of_long_edges(sigma, number):
    """The method's way: the blurred columns of an edge are kept once they have ``min_size`` pixels."""
    pytest.importorskip("skimage")
    image = np.full((60, 100, 3), RED, np.uint8)
    image[:, 60:] = BLUE
    labels = felzenszwalb_labels(image, scale=100, sigma=sigma, min_size=50)
    assert np.unique(labels).tolist() == list(range(number))
    assert len(np.unique(labels[:, :55])) == len(np.unique(labels[:, 65:])) == 1


def test_labels_are_those_of_scikit_image_on_the_reduced_image(tmp_path):
    segmentation = pytest.importorskip("skimage.segmentation")
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.jpg"
    blocks = Image.fromarray(rng.integers(0, 255, (5, 8, 3), np.uint8))
    blocks.resize((160, 100)).save(path)
    cache = SuperpixelCache(tmp_path / "cache", short_side=50, scale=40, sigma=0.8, min_size=9)
    reduced = Image.open(path).convert("RGB").resize((80, 50), Image.Resampling.BILINEAR)
    expected = segmentation.felzenszwalb(np.asarray(reduced), scale=40, sigma=0.8, min_size=9)
    for _ in range(2):
        np.testing.assert_array_equal(cache(path), expected)
    assert sorted(np.unique(expected)) == list(range(expected.max() + 1)) and expected.max() > 4


def test_one_pixel(tmp_path):
    pytest.importorskip("skimage")
    image = np.zeros((1, 1, 3), np.uint8)
    labels = felzenszwalb_labels(image, scale=100, sigma=0.5, min_size=50)
    assert labels.tolist() == [[0]]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((40, 30), 30, (30, 40)), ((40, 20), 30, (20, 40)), ((41, 20), 10, (10, 21))],
)
def test_reduced_but_never_enlarged(tmp_path, calls, size, short_side, expected):
    path = tmp_path / "image.png"
    Image.new("L", size, 9).save(path)
    labels = SuperpixelCache(tmp_path / "cache", short_side=short_side)(path)
    assert labels.shape == expected
    image, parameters = calls[0]
    assert image.shape == (*expected, 3) and image.dtype == np.uint8
    assert parameters == {"scale": 100.0, "sigma": 0.5, "min_size": 50}


def test_orientation_is_that_of_read_image(tmp_path, calls):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((40, 20)).save(path, exif=exif)
    labels = SuperpixelCache(tmp_path / "cache")(path)
    assert labels.shape == read_image(str(path), "RGB").shape[:2]
    np.testing.assert_array_equal(calls[0][0], read_image(str(path), "RGB"))


def test_second_call_reads_the_file(tmp_path, image_path, calls):
    folder = tmp_path / "cache"
    first = SuperpixelCache(folder)(image_path)
    second = SuperpixelCache(folder)(str(image_path))
    assert len(calls) == 1 and len(list(folder.iterdir())) == 1
    assert second.dtype == np.int32
    np.testing.assert_array_equal(first, second)
    # The same picture under another name is the same entry; other parameters or bytes are not.
    copied = tmp_path / "copy.png"
    copied.write_bytes(image_path.read_bytes())
    SuperpixelCache(folder, scale=100)(copied)
    assert len(calls) == 1
    for other in ({"short_side": 20}, {"scale": 50}, {"sigma": 0.6}, {"min_size": 20}):
        SuperpixelCache(folder, **other)(image_path)
    Image.new("RGB", (9, 9)).save(copied)
    SuperpixelCache(folder)(copied)
    assert len(calls) == 6 and len(list(folder.iterdir())) == 6


def archive(labels):
    file = io.BytesIO()
    np.savez_compressed(file, labels=np.array(labels))
    return file.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"nonsense",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"labels", b"label5"),
        lambda content: content[:90] + bytes([content[90] ^ 255]) + content[91:],
        lambda content: archive(np.ones(2, np.uint8)),
        lambda content: archive([[-1, 2]]),
    ],
    ids=["empty", "nonsense", "half", "name", "bit", "vector", "signed"],
)
def test_broken_entry_is_computed_anew(tmp_path, image_path, calls, caplog, monkeypatch, spoil):
    cache = SuperpixelCache(tmp_path / "cache")
    good = cache(image_path)
    entry = cache.entry(image_path)
    entry.write_bytes(spoil(entry.read_bytes()))
    # detectron2's logger setup may have stopped propagation in another test.
    monkeypatch.setattr(logging.getLogger("fewshot_d2"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cache(image_path), good)
    assert "is broken" in caplog.text and str(entry) in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(cache(image_path), good)
    assert len(calls) == 2 and not caplog.text


def test_entry_with_a_wrong_bit_is_the_same_or_broken():
    """Whatever the archive makes of it: unknown versions and encryptions too."""
    labels = np.arange(600, dtype=np.int32).reshape(20, 30) // 40
    whole, num_broken = superpixels._packed(labels), 0
    for place in range(8 * len(whole)):
        spoiled = bytearray(whole)
        spoiled[place // 8] ^= 1 << place % 8
        try:
            np.testing.assert_array_equal(superpixels._unpacked(bytes(spoiled)), labels)
        except superpixels._BROKEN:
            num_broken += 1
    assert num_broken > len(whole)


def test_writers_of_one_entry_do_not_disturb_each_other(tmp_path, image_path, calls):
    caches = [SuperpixelCache(tmp_path / "cache") for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda cache: cache(image_path), caches))
    assert all((labels == results[0]).all() for labels in results)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"]


def test_many_labels_survive_the_file():
    labels = np.arange(300 * 300, dtype=np.int32).reshape(300, 300)
    np.testing.assert_array_equal(superpixels._unpacked(superpixels._packed(labels)), labels)


def test_without_scikit_image(tmp_path, image_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("skimage"):
            raise ImportError("none")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="scikit-image must be installed"):
        SuperpixelCache(tmp_path / "cache")(image_path)


@pytest.mark.parametrize(
    "wrong", [{"short_side": 0}, {"scale": 0}, {"sigma": -1}, {"min_size": -1}]
)
def test_wrong_parameters(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be positive"):
        SuperpixelCache(tmp_path, **wrong)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (3, 20), (14, 18), (31, 4)])
def test_resize_is_the_nearest_neighbour(shape, flip):
    labels = np.random.default_rng(1).integers(0, 99, (7, 9)).astype(np.int32)
    result = resize_labels(labels, shape, flip=flip)
    assert result.dtype == torch.int64 and result.shape == shape
    expected = np.empty(shape, int)
    for y in range(shape[0]):
        for x in range(shape[1]):
            # Both sides of the fraction times two, so that all is exact.
            row = (2 * y + 1) * 7 // (2 * shape[0])
            column = (2 * x + 1) * 9 // (2 * shape[1])
            expected[y, shape[1] - 1 - x if flip else x] = labels[row, column]
    np.testing.assert_array_equal(result.numpy(), expected)


def test_resize_is_that_of_pillow():
    labels = np.random.default_rng(2).integers(0, 255, (30, 47)).astype(np.uint8)
    expected = Image.fromarray(labels).resize((101, 67), Image.Resampling.NEAREST)
    result = resize_labels(labels, (67, 101), flip=False)
    np.testing.assert_array_equal(result.numpy(), np.asarray(expected))
    mirrored = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    result = resize_labels(labels, (67, 101), flip=True)
    np.testing.assert_array_equal(result.numpy(), np.asarray(mirrored))


@pytest.mark.parametrize(
    ("labels", "shape"), [(np.zeros((0, 3)), (2, 2)), (np.zeros(3), (2, 2)), (np.eye(2), (0, 2))]
)
def test_resize_refuses_what_has_no_pixels(labels, shape):
    with pytest.raises(ValueError, match="must be two-dimensional and not empty"):
        resize_labels(labels, shape, flip=False)
