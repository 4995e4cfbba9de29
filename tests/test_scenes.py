"""Multi-instance scenes: what is drawn, what is annotated, and how sets are written."""

import json
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from fewshot_d2.data.datasets import builtin, generated, rendering, scenes
from fewshot_d2.data.datasets.generated import GlyphObject, Picture, annotation_of, generate
from fewshot_d2.data.datasets.glyphs import ProceduralGlyphs
from fewshot_d2.data.datasets.scenes import ExemplarSpec, SceneSpec
from fewshot_d2.files import canonical_sha256

GLYPHS = ProceduralGlyphs(classes=60, seed=7)
SCENES = SceneSpec(GLYPHS, classes=(0, 40), drawings=(0, 10), num_images=60, seed=5)
EXEMPLARS = ExemplarSpec(GLYPHS, classes=(0, 40), drawings=(10, 20), per_class=8, seed=5)


@pytest.fixture(scope="module")
def pictures():
    return [SCENES.picture(index) for index in range(SCENES.num_images)]


def naive_box(mask):
    ys = [y for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs = [x for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    return [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]


def test_annotation_is_tight_and_complete():
    mask = np.random.default_rng(0).random((9, 12)) < 0.05
    row = annotation_of(GlyphObject(3, mask, z_order=2))
    assert row["bbox"] == naive_box(mask) and row["area"] == mask.sum()
    assert row["category_id"] == 3 and row["z_order"] == 2 and row["iscrowd"] == 0
    assert (generated.coco_mask.decode(row["segmentation"]) == mask).all()


def test_visible_masks_are_disjoint_and_inside(pictures):
    for picture in pictures:
        assert picture.image.shape == (128, 128, 3) and picture.image.dtype == np.uint8
        stack = np.stack([glyph.mask for glyph in picture.objects])
        assert stack.sum(axis=0).max() == 1 and stack.any(axis=(1, 2)).all()
        assert [glyph.z_order for glyph in picture.objects] == list(range(len(picture.objects)))


def test_counts_of_targets_and_distractors(pictures):
    seen, numbers = set(), set()
    for picture in pictures:
        classes = [glyph.category_id for glyph in picture.objects]
        counts = np.unique(classes, return_counts=True)[1]
        assert set(counts) <= {1, 2, 3} and set(classes) <= set(range(1, 41))
        # Whichever class is searched, the others are at least as many.
        assert (len(classes) - counts >= counts).all()
        numbers.add(len(counts))
        seen |= set(counts.tolist())
    assert seen == {1, 2, 3} and numbers == {2, 3, 4}


def test_pile_equals_a_simulation():
    rng = np.random.default_rng(1)
    pile, layers = scenes._Pile(40), []
    for _ in range(60):
        opacity = rng.random(rng.integers(3, 15, 2)).astype(np.float32)
        y, x = (int(rng.integers(0, 40 - side + 1)) for side in opacity.shape)
        layer = np.zeros((40, 40), bool)
        layer[y : y + opacity.shape[0], x : x + opacity.shape[1]] = opacity >= 0.5
        box = (x, y, x + opacity.shape[1], y + opacity.shape[0])
        apart = all(naive_overlap(box, other) <= 0.6 for _, other in layers)
        trial = [layer_ for layer_, _ in layers] + [layer]
        enough = all(
            naive_visible(trial, i).sum() >= 0.6 * trial[i].sum() for i in range(len(layers))
        )
        assert pile.has_place(opacity, y, x, min_visible=0.6, max_overlap=0.6) == (apart and enough)
        if apart and enough:
            pile.add(opacity, y, x)
            layers.append((layer, box))
            for i in range(len(layers)):
                assert ((pile.owner == i) == naive_visible(trial, i)).all()
    assert len(layers) >= 5


def naive_visible(layers, index):
    visible = layers[index].copy()
    for above in layers[index + 1 :]:
        visible &= ~above
    return visible


def naive_overlap(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / smaller


def test_warp_turns_and_scales_as_told():
    bar = np.zeros((61, 61), np.uint8)
    bar[28:33, 10:51] = 255
    for angle in (-20, 0, 15):
        for scale in (0.5, 1.0, 2.0):
            matrix = rendering.affine_matrix(angle, 0, (scale, scale))
            ys, xs = np.nonzero(rendering.warp_glyph(bar, matrix, stroke_width=5) >= 0.5)
            axes = np.linalg.svd(
                np.stack([xs, ys], 1) - [xs.mean(), ys.mean()], full_matrices=False
            )[2]
            # Image rows grow downwards, so a positive rotation lifts the right end.
            assert np.rad2deg(np.arctan(-axes[0][1] / axes[0][0])) == pytest.approx(angle, abs=2)
            along = np.ptp(np.stack([xs, ys], 1) @ axes[0])
            assert along == pytest.approx(41 * scale, abs=2.5)


def test_affine_matrix_in_closed_form():
    matrix = rendering.affine_matrix(0, 0, (2, 3))
    np.testing.assert_allclose(matrix, [[2, 0], [0, 3]])
    np.testing.assert_allclose(
        rendering.affine_matrix(90, 0, (1, 1)), [[0, 1], [-1, 0]], atol=1e-12
    )
    # A symmetric shear by t turns the x axis by t one way and the y axis by t the other way.
    t = np.deg2rad(10)
    expected = [[np.cos(t), -np.sin(t)], [-np.sin(t), np.cos(t)]]
    np.testing.assert_allclose(rendering.affine_matrix(0, 10, (1, 1)), expected)


def test_warped_glyph_is_cropped_to_its_ink_and_never_fades():
    ink = GLYPHS.drawing(3, 1)
    for scale in (0.15, 0.4, 1.7):
        opacity = rendering.warp_glyph(ink, np.eye(2) * scale, stroke_width=GLYPHS.stroke_width)
        mask = opacity >= 0.5
        assert opacity.dtype == np.float32 and opacity.min() >= 0 and opacity.max() == 1
        assert all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def test_ranges_of_rotation_shear_and_scale(monkeypatch):
    calls = []

    def spy(rotation, shear, scale):
        calls.append((rotation, shear, scale[0]))
        assert scale[0] == scale[1]
        return rendering.affine_matrix(rotation, shear, scale)

    monkeypatch.setattr(scenes, "affine_matrix", spy)
    for index in range(40):
        SCENES.picture(index)
    rotation, shear, _ = np.array(calls).T
    for values, limit in ((rotation, 20), (shear, 10)):
        assert -limit <= values.min() < -0.9 * limit and 0.9 * limit < values.max() <= limit
    # The drawings fill 60 to 64 of 64 pixels, so that the scale gives the size of the glyph.
    side = np.array(calls)[:, 2] * 62 / SCENES.glyph_size
    assert 0.47 < side.min() < 0.55 and 1.7 < side.max() < 2.15


def ink_colours(pictures):
    """Float (n, 4): category id and mean RGB of every glyph."""
    return np.array(
        [
            [glyph.category_id, *picture.image[glyph.mask].mean(axis=0)]
            for picture in pictures
            for glyph in picture.objects
        ]
    )


def test_colours_tell_nothing_about_the_class():
    rows = ink_colours([EXEMPLARS.picture(i) for i in range(EXEMPLARS.num_images)])
    groups = rows[:, 1:].reshape(40, 8, 3)
    between = 8 * groups.mean(axis=1).var(axis=0, ddof=1)
    within = groups.var(axis=1, ddof=1).mean(axis=0)
    # The F statistic with 39 and 280 degrees of freedom; 1.8 is exceeded once in 250 times by chance.
    assert (between / within < 1.8).all()
    assert (within > 50**2).all()


def test_colours_of_scene_glyphs_are_independent_of_each_other(pictures):
    same = []
    for picture in pictures:
        rows = ink_colours([picture])
        for class_id in np.unique(rows[:, 0]):
            colours = rows[rows[:, 0] == class_id, 1:]
            if len(colours) > 1:
                same.append(colours[0] - colours[1])
    # Two instances of a class are no more alike than two uniform draws, whose variance is 2 * 255^2 / 12 a channel.
    assert np.mean(np.square(same)) > 0.5 * 255**2 / 6


def test_contrasting_colour():
    surroundings = np.full((4, 5, 3), 128.0)
    for seed in range(20):
        colour = rendering.contrasting_colour(np.random.default_rng(seed), surroundings, 100)
        assert np.linalg.norm(colour - 128) >= 100 and (colour >= 0).all() and (colour <= 255).all()
    # No colour is that far away: the farthest of the draws is taken.
    rng = np.random.default_rng(0)
    draws = rng.uniform(0, 255, (24, 3))
    farthest = draws[np.linalg.norm(draws - 128, axis=1).argmax()]
    colour = rendering.contrasting_colour(np.random.default_rng(0), surroundings, 1000)
    np.testing.assert_allclose(colour, farthest, rtol=1e-6)


def test_glyphs_differ_from_what_surrounds_them(pictures):
    contrasts = []
    for picture in pictures[:20]:
        occupied = np.any([glyph.mask for glyph in picture.objects], axis=0)
        for glyph in picture.objects:
            ring = cv2.dilate(glyph.mask.astype(np.uint8), np.ones((9, 9))) > 0
            ring &= ~(cv2.dilate(occupied.astype(np.uint8), np.ones((3, 3))) > 0)
            if ring.any():
                difference = picture.image[glyph.mask].mean(axis=0) - picture.image[ring].mean(
                    axis=0
                )
                contrasts.append(np.linalg.norm(difference))
    assert np.percentile(contrasts, 5) > 60


def test_exemplars_show_one_glyph_each():
    for index in range(0, EXEMPLARS.num_images, 7):
        picture = EXEMPLARS.picture(index)
        (glyph,) = picture.objects
        assert picture.image.shape == (64, 64, 3) and glyph.category_id == 1 + index // 8
        _, _, width, height = annotation_of(glyph)["bbox"]
        assert 28 <= max(width, height) <= 64
    assert EXEMPLARS.num_images == 320


class FullSquare(ProceduralGlyphs):
    """Ink everywhere."""

    def drawing(self, class_index, drawing_index):
        return np.full((64, 64), 255, np.uint8)


def test_an_exemplar_that_sticks_out_is_made_smaller():
    spec = replace(EXEMPLARS, source=FullSquare(classes=60), fill=(0.95, 1.0))
    for index in range(10):
        (glyph,) = spec.picture(index).objects
        assert 45 <= max(annotation_of(glyph)["bbox"][2:]) <= 64


def test_scenes_are_what_they_were():
    """Guards against an unnoticed change: raise ``_VERSION`` when the pictures are meant to change."""
    rows = [[annotation_of(glyph) for glyph in SCENES.picture(index).objects] for index in range(4)]
    boxes = [[row["category_id"], row["z_order"], *row["bbox"]] for scene in rows for row in scene]
    assert (
        canonical_sha256(boxes)
        == "51794bdefb2454bbc794133726a698e6a4dc69a56fe4a9c3506bfcd69c9ba4d0"
    )


@pytest.mark.parametrize(
    "spec", [SCENES, replace(EXEMPLARS, per_class=2)], ids=["scenes", "exemplars"]
)
def test_any_number_of_processes_writes_the_same_set(spec, tmp_path):
    for processes in (1, 3):
        generate(tmp_path / str(processes), spec, num_processes=processes)
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "1", tmp_path / "3")
    ]
    assert len(files[0]) == spec.num_images + 1 and files[0] == files[1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_written_set_is_valid_coco(tmp_path):
    spec = replace(SCENES, num_images=3)
    generate(tmp_path / "set", spec, num_processes=1)
    coco = COCO(str(tmp_path / "set" / "instances.json"))
    assert coco.getCatIds() == list(range(1, 41)) and coco.getImgIds() == [1, 2, 3]
    for image_id in coco.getImgIds():
        picture = spec.picture(image_id - 1)
        image = cv2.imread(str(tmp_path / "set" / "images" / coco.imgs[image_id]["file_name"]))
        assert (image[:, :, ::-1] == picture.image).all()
        rows = coco.imgToAnns[image_id]
        assert len(rows) == len(picture.objects)
        for row, glyph in zip(rows, picture.objects):
            assert (coco.annToMask(row) == glyph.mask).all() and row["z_order"] == glyph.z_order


def test_registered_set_is_written_once(tmp_path):
    spec, name = replace(SCENES, num_images=2), "test_scenes_once"
    generated.register_generated(name, spec, tmp_path)
    try:
        assert not list(tmp_path.iterdir())
        dicts = DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        written = json.loads(
            (generated.set_folder(name, spec, tmp_path) / "instances.json").read_text()
        )
        assert metadata.json_file == str(
            generated.set_folder(name, spec, tmp_path) / "instances.json"
        )
        assert len(dicts) == 2 and metadata.thing_classes == GLYPHS.class_names[:40]
        assert sum(len(d["annotations"]) for d in dicts) == len(written["annotations"])
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert DatasetCatalog.get(name) == dicts
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_another_spec_gets_another_folder(tmp_path):
    folders = {
        generated.set_folder("name", spec, tmp_path)
        for spec in (
            SCENES,
            replace(SCENES, seed=6),
            replace(SCENES, source=replace(GLYPHS, seed=8)),
            EXEMPLARS,
        )
    }
    assert len(folders) == 4
    assert generated.set_folder("name", replace(SCENES), tmp_path) in folders


@dataclass(frozen=True)
class FailingSpec:
    """Fails at picture 30."""

    num_images: int = 60

    def categories(self):
        return [{"id": 1, "name": "one"}]

    def picture(self, index):
        if index == 30:
            raise RuntimeError("picture 30 failed")
        mask = np.ones((4, 4), bool)
        return Picture(np.zeros((4, 4, 3), np.uint8), [GlyphObject(1, mask, 0)])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_leaves_nothing_behind(tmp_path, processes):
    with pytest.raises(RuntimeError, match="picture 30 failed"):
        generate(tmp_path / "set", FailingSpec(), num_processes=processes)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        generate(tmp_path / "set", FailingSpec(0))


def test_two_writers_of_one_set_agree(tmp_path, monkeypatch):
    """The second finds the folder of the first when it is about to rename its own."""
    folder = tmp_path / "set"
    write = generated._write_pictures

    def first_another(place, spec, num_processes):
        content = write(place, spec, num_processes)
        if not folder.exists():
            monkeypatch.setattr(generated, "_write_pictures", write)
            generate(folder, spec, 1)
        return content

    monkeypatch.setattr(generated, "_write_pictures", first_another)
    generate(folder, FailingSpec(20), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((folder / "images").iterdir())) == 20


def test_impossible_specs_are_refused():
    with pytest.raises(
        ValueError, match="drawings of .* must be a non-empty range, got \\(3, 3\\)"
    ):
        replace(SCENES, drawings=(3, 3))
    with pytest.raises(ValueError, match="classes must hold at least 4 for one scene"):
        replace(SCENES, classes=(0, 3))
    with pytest.raises(ValueError, match="scene_classes must start at 2"):
        replace(SCENES, scene_classes=(1, 3))
    with pytest.raises(ValueError, match="instances must rise from at least 1"):
        replace(SCENES, instances=(0, 2))
    with pytest.raises(ValueError, match="a scene must have room for its glyphs, .* scene 0"):
        replace(SCENES, image_size=8).picture(0)
    with pytest.raises(ValueError, match="classes of .* must be a non-empty range"):
        replace(EXEMPLARS, classes=(-1, 3))


@pytest.mark.parametrize("kind", ["glyphs", "omniglot"])
def test_catalogue_keeps_base_and_novel_apart(kind):
    parts = {part.name: part for part in builtin.multi_instance_parts()}
    train, base, novel = (
        parts[f"scenes_{kind}_{end}"] for end in ("train", "val_base", "val_novel")
    )
    assert train.classes[1] <= novel.classes[0] and base.classes[1] <= train.classes[1]
    assert train.source == base.source == novel.source
    used = []
    for part in (train, base, novel):
        assert {part.name, f"{part.name}_support"} <= set(DatasetCatalog.list())
        used.append(set(range(*part.drawings)))
        used.append(set(range(*part.support_drawings)))
        assert not used[-1] & used[-2]
    # Drawings of the training set are used in no evaluation.
    assert not (used[0] | used[1]) & (used[2] | used[3] | used[4] | used[5])
