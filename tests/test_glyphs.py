"""Glyph sources: procedural strokes and Omniglot from a zip or a folder."""

import io
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from fewshot_d2.data.datasets import omniglot
from fewshot_d2.data.datasets.glyphs import ProceduralGlyphs, Stroke, render_strokes, stroke_classes
from fewshot_d2.data.datasets.omniglot import OmniglotGlyphs

GLYPHS = ProceduralGlyphs(classes=120, seed=7)


def thumbnail(ink):
    small = cv2.resize(ink, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64)
    small = cv2.GaussianBlur(small, (5, 5), 0).ravel()
    small -= small.mean()
    return small / np.linalg.norm(small)


def naive_bezier(points, t):
    points = [np.asarray(p) for p in points]
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in zip(points, points[1:])]
    return points[0]


def test_curve_is_a_bezier_curve():
    points = np.random.default_rng(0).normal(size=(4, 2))
    path = Stroke("curve", points).path()
    expected = [naive_bezier(points, t) for t in np.linspace(0, 1, len(path))]
    np.testing.assert_allclose(path, expected, atol=1e-12)


def test_arc_lies_on_its_ellipse_and_spans_its_sweep():
    path = Stroke("arc", np.array([[0.4, 0.6], [0.3, 0.2], [0.5, np.pi]])).path()
    unit = (path - [0.4, 0.6]) / [0.3, 0.2]
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1)
    np.testing.assert_allclose(unit[-1], -unit[0], atol=1e-12)


def test_line_is_its_corners_and_a_shake_of_nothing_changes_nothing():
    stroke = Stroke("line", np.array([[0.0, 0.0], [1.0, 0.5]]))
    assert (stroke.path() == stroke.points).all()
    assert (stroke.shaken(np.random.default_rng(0), 0.0).points == stroke.points).all()
    assert (stroke.shaken(np.random.default_rng(0), 0.1).points != stroke.points).all()


def test_rendered_strokes_fill_the_square_and_are_not_cut():
    strokes = [Stroke("line", np.array([[3.0, 3.0], [7.0, 3.0], [7.0, 5.0]]))]
    ink = render_strokes(strokes, size=64, width=6)
    _, _, width, height = cv2.boundingRect(ink)
    assert 58 <= width <= 64 and abs(height - (width + 6) / 2) <= 3
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert border.max() < 128


def test_a_drawing_is_determined_by_seed_class_and_index():
    again = ProceduralGlyphs(classes=120, seed=7)
    other = ProceduralGlyphs(classes=120, seed=8)
    drawing = GLYPHS.drawing(5, 3)
    assert drawing.dtype == np.uint8 and drawing.shape == (64, 64) and drawing.max() == 255
    assert (drawing == again.drawing(5, 3)).all()
    for different in (GLYPHS.drawing(5, 4), GLYPHS.drawing(6, 3), other.drawing(5, 3)):
        assert (drawing != different).any()


def test_more_classes_keep_the_first_ones():
    short, long = stroke_classes(10, 7), stroke_classes(40, 7)
    for a, b in zip(short, long[:10]):
        assert all((s.points == t.points).all() for s, t in zip(a, b))


def test_no_two_classes_look_alike():
    looks = np.stack(
        [thumbnail(render_strokes(list(c), size=64, width=8)) for c in stroke_classes(120, 7)]
    )
    similarity = looks @ looks.T - 2 * np.eye(len(looks))
    assert similarity.max() < 0.9


def test_a_drawing_resembles_its_own_class_most():
    first = np.stack([thumbnail(GLYPHS.drawing(c, 0)) for c in range(GLYPHS.num_classes)])
    second = np.stack([thumbnail(GLYPHS.drawing(c, 1)) for c in range(GLYPHS.num_classes)])
    nearest = (second @ first.T).argmax(axis=1)
    assert (nearest == np.arange(GLYPHS.num_classes)).mean() > 0.9


def test_every_drawing_has_a_shape():
    for class_index in range(GLYPHS.num_classes):
        _, _, width, height = cv2.boundingRect(GLYPHS.drawing(class_index, 2))
        assert min(width, height) > 0.3 * max(width, height)


@pytest.mark.parametrize(("class_index", "drawing_index"), [(-1, 0), (120, 0), (0, -1), (0, 100)])
def test_an_index_outside_is_refused(class_index, drawing_index):
    with pytest.raises(IndexError, match="index must be in 0..(119|99), got"):
        GLYPHS.drawing(class_index, drawing_index)


def png(ink):
    buffer = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def tiny_drawing(number):
    """Six rows of ink; row r is inked where bit r of ``number`` is set."""
    ink = np.zeros((105, 105), bool)
    for row in range(6):
        ink[20 + 10 * row : 25 + 10 * row, 30:70] = number >> row & 1
    return ink


TINY = {
    "images_evaluation/Aaa/character01": 1,
    "images_background/Zzz/character02": 2,
    "images_background/Bbb/character01": 3,
    "images_evaluation/Ccc/character01": 4,
    "images_background/Zzz/character01": 5,
}
TINY_ORDER = [
    "Bbb/character01",
    "Zzz/character01",
    "Zzz/character02",
    "Aaa/character01",
    "Ccc/character01",
]


@pytest.fixture
def tiny_members():
    members = {
        "__MACOSX/images_background/Zzz/character09/0001_01.png": b"no image",
        "README.md": b"text",
    }
    for place, number in TINY.items():
        for drawer in (2, 1):
            members[f"{place}/{number:04d}_{drawer:02d}.png"] = png(
                tiny_drawing(number + 8 * drawer)
            )
    return members


@pytest.fixture
def tiny_zip(tmp_path, tiny_members):
    path = tmp_path / "omniglot.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in tiny_members.items():
            archive.writestr(member, data)
    return path


@pytest.fixture
def tiny_folder(tmp_path, tiny_members):
    for member, data in tiny_members.items():
        if not member.startswith("__MACOSX"):
            path = tmp_path / "omniglot" / "python" / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path / "omniglot"


@pytest.mark.parametrize("kind", ["tiny_zip", "tiny_folder"])
def test_omniglot_from_zip_and_folder(kind, request):
    source = OmniglotGlyphs(str(request.getfixturevalue(kind)), characters=(3, 2))
    assert source.num_classes == 5 and source.class_names == TINY_ORDER
    for class_index, name in enumerate(TINY_ORDER):
        number = next(n for place, n in TINY.items() if place.endswith(name))
        assert source.num_drawings(class_index) == 2
        for drawing_index in (0, 1):
            expected = np.where(tiny_drawing(number + 8 * (drawing_index + 1)), 255, 0)
            for _ in range(2):
                ink = source.drawing(class_index, drawing_index)
                assert ink.dtype == np.uint8 and (ink == expected).all()


def test_omniglot_is_found_below_the_data_folder(tiny_zip, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_zip.parent))
    assert OmniglotGlyphs(characters=(3, 2)).class_names == TINY_ORDER
    # Where it lies does not change what it is.
    assert OmniglotGlyphs() == OmniglotGlyphs("elsewhere")


def test_missing_omniglot_names_the_places(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        OmniglotGlyphs().drawing(0, 0)
    for part in ("DETECTRON2_DATASETS", str(tmp_path / "omniglot.zip"), str(tmp_path / "omniglot")):
        assert part in str(error.value)


def test_incomplete_omniglot_is_refused(tiny_zip):
    with pytest.raises(
        ValueError, match=r"omniglot.zip must hold 964 background and 659 .* got 3 and 2"
    ):
        OmniglotGlyphs(str(tiny_zip)).drawing(0, 0)


def test_broken_files_are_named(tmp_path, tiny_zip):
    member = "images_background/Bbb/character01/0003_00.png"
    with zipfile.ZipFile(tiny_zip, "a") as archive:
        archive.writestr(member, b"no png")
    with pytest.raises(ValueError, match=f"omniglot.zip: {member} must be a readable PNG"):
        OmniglotGlyphs(str(tiny_zip), (3, 2)).drawing(0, 0)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="broken.zip must be a zip file"):
        OmniglotGlyphs(str(broken)).drawing(0, 0)


def test_omniglot_index_outside_is_refused(tiny_zip):
    source = OmniglotGlyphs(str(tiny_zip), (3, 2))
    with pytest.raises(IndexError, match=r"class index of .*omniglot.zip must be in 0..4, got 5"):
        source.drawing(5, 0)
    with pytest.raises(IndexError, match=r"drawing index of .*class 0 must be in 0..1, got 2"):
        source.drawing(0, 2)


def test_class_ranges_of_real_omniglot(shared_data):
    path = shared_data / "omniglot.zip"
    if not path.exists():
        pytest.skip(f"no Omniglot at {path}")
    source = OmniglotGlyphs(str(path))
    names = source.class_names
    assert len(names) == len(set(names)) == source.num_classes == 1623
    alphabets = {
        part: {name.split("/")[0] for name in names[slice(*part)]}
        for part in (omniglot.BACKGROUND, omniglot.VAL_ONE_SHOT, omniglot.TEST_ONE_SHOT)
    }
    assert [len(found) for found in alphabets.values()] == [30, 10, 10]
    assert not set.intersection(*alphabets.values())
    assert {"Angelic", "Keble"} <= alphabets[omniglot.VAL_ONE_SHOT]
    assert {"Malayalam", "ULOG"} <= alphabets[omniglot.TEST_ONE_SHOT]
    assert source.num_drawings(0) == 20
    ink = source.drawing(1000, 19) > 0
    assert ink.shape == (105, 105) and 0.01 < ink.mean() < 0.3
