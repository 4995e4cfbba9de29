"""The single-target protocol: glyph pipeline, scenes, references, plan."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fewshot_d2.data.coco_json import dataset_categories
from fewshot_d2.data.datasets import cluttered_omniglot as cluttered
from fewshot_d2.data.datasets import generated
from fewshot_d2.data.datasets.cluttered_omniglot import (
    ClutteredSpec,
    ReferenceSpec,
    cluttered_omniglot_plan,
    warp_character,
)
from fewshot_d2.data.datasets.omniglot import BACKGROUND, TRAIN_DRAWERS, OmniglotGlyphs
from fewshot_d2.data.index import InstanceIndex


@dataclass(frozen=True)
class Blocks:
    """Class c is a frame of 30 + 10 c pixels; a drawing shifts it."""

    num_classes: int = 5

    @property
    def class_names(self):
        return [f"block_{index}" for index in range(self.num_classes)]

    @property
    def stroke_width(self):
        return 8.0

    def num_drawings(self, class_index):
        return 4

    def drawing(self, class_index, drawing_index):
        ink = np.zeros((105, 105), np.uint8)
        start, end = 5 + 3 * drawing_index, 35 + 10 * class_index + 3 * drawing_index
        ink[start:end, start:end] = 255
        ink[start + 8 : end - 8, start + 8 : end - 8] = 0
        return ink


SPEC = ClutteredSpec(Blocks(), classes=(1, 5), drawings=(0, 3), level=6, num_images=40, seed=3)
REFERENCES = ReferenceSpec.of(SPEC)


def test_warp_without_reduction_is_a_crop_that_lacks_the_last_row_and_column():
    ink = np.random.default_rng(0).random((105, 105)) < 0.01
    ys, xs = np.nonzero(ink)
    warped = warp_character(
        np.where(ink, 255, 0).astype(np.uint8), rotation=0, shear=0, scale=(105 / 32, 105 / 32)
    )
    assert (warped == ink[ys.min() : ys.max(), xs.min() : xs.max()]).all()


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 0.5)])
def test_warp_equals_a_loop_over_target_pixels(scale):
    ink = Blocks().drawing(3, 0)
    angle, shear = 17.0, -6.0
    plus, minus = np.deg2rad(angle + shear), np.deg2rad(angle - shear)
    forward = np.array([[np.cos(plus), np.sin(minus)], [-np.sin(plus), np.cos(minus)]])
    backward = np.linalg.inv(forward * scale * 32 / 105)
    size = 121
    expected = np.zeros((size, size), bool)
    for y in range(size):
        for x in range(size):
            source_x, source_y = np.rint(backward @ [x - 60, y - 60] + 52).astype(int)
            if 0 <= source_x < 105 and 0 <= source_y < 105:
                expected[y, x] = ink[source_y, source_x] > 0
    ys, xs = np.nonzero(expected)
    expected = expected[ys.min() : ys.max(), xs.min() : xs.max()]
    warped = warp_character(ink, rotation=angle, shear=shear, scale=scale)
    assert warped.shape == expected.shape
    # The sides of a frame may round to either pixel.
    assert (warped != expected).mean() < 0.02


def test_ink_of_one_row_vanishes_in_the_crop():
    ink = np.zeros((105, 105), np.uint8)
    ink[52, 30:70] = 255
    assert warp_character(ink, rotation=0, shear=0, scale=(105 / 32, 105 / 32)).shape == (0, 39)


def test_scene_has_its_target_on_top():
    for index in range(SPEC.num_images):
        picture = SPEC.picture(index)
        (target,) = picture.objects
        assert picture.image.shape == (96, 96, 3) and target.mask.any()
        assert target.category_id == SPEC.target(index)[0] + 1
        assert len(np.unique(picture.image[target.mask], axis=0)) == 1
        colours = np.unique(picture.image.reshape(-1, 3), axis=0)
        assert len(colours) <= SPEC.level + 1


def test_reference_is_the_unscaled_drawing_of_the_target():
    for index in range(REFERENCES.num_images):
        picture = REFERENCES.picture(index)
        (glyph,) = picture.objects
        assert picture.image.shape == (32, 32, 3)
        assert glyph.category_id == SPEC.target(index)[0] + 1
        assert ((picture.image > 0).any(axis=2) <= glyph.mask).all()
        side = (30 + 10 * SPEC.target(index)[0]) * 32 / 105
        drawn = np.sqrt((Blocks().drawing(*SPEC.target(index)) > 0).sum()) * 32 / 105
        # Rotation keeps the area, shear hardly changes it; the crop takes a row and a column.
        assert np.sqrt(glyph.mask.sum()) == pytest.approx(drawn, rel=0.25)
        ys, xs = np.nonzero(glyph.mask)
        assert max(np.ptp(ys), np.ptp(xs)) <= min(32, 1.6 * side)
        assert (
            abs((ys.min() + ys.max()) / 2 - 15.5) <= 1
            and abs((xs.min() + xs.max()) / 2 - 15.5) <= 1
        )


def test_a_reference_too_large_is_cut_on_both_sides():
    ink = np.zeros((40, 10), bool)
    ink[4:36] = True
    assert cluttered._centred(ink, 32).sum(axis=0).tolist() == [0] * 11 + [32] * 10 + [0] * 11


def test_targets_cover_classes_and_drawings():
    targets = {SPEC.target(index) for index in range(200)}
    assert targets == {(c, d) for c in range(1, 5) for d in range(3)}


def test_scenes_of_other_levels_and_seeds_differ():
    for other in (replace(SPEC, level=7), replace(SPEC, seed=4)):
        assert [other.target(i) for i in range(20)] != [SPEC.target(i) for i in range(20)]
    assert (SPEC.picture(3).image == replace(SPEC).picture(3).image).all()


def test_a_level_of_one_has_the_target_alone():
    picture = replace(SPEC, level=1).picture(0)
    assert ((picture.image > 0).any(axis=2) <= picture.objects[0].mask).all()
    with pytest.raises(ValueError, match="level must be at least 1 character, got 0"):
        replace(SPEC, level=0)


def test_a_drawing_without_ink_is_refused():
    with pytest.raises(ValueError, match="must keep some ink at 32/105 of its size, got 0 px"):
        empty = np.zeros((105, 105), np.uint8)
        cluttered._warped_until_inked(np.random.default_rng(0), empty, scaled=True)


def test_plan_pairs_every_scene_with_its_own_reference(tmp_path):
    names = ("test_cluttered", "test_cluttered_support")
    for name, spec in zip(names, (SPEC, REFERENCES)):
        generated.register_generated(name, spec, tmp_path)
    try:
        plan = cluttered_omniglot_plan("test_cluttered")
        indices = []
        for name in names:
            dicts, ids = DatasetCatalog.get(name), list(dataset_categories(name))
            assert ids == [2, 3, 4, 5]
            indices.append(InstanceIndex(dicts, dict(enumerate(ids))))
        plan.check(*indices, "test_cluttered")
        assert len(plan.episodes) == SPEC.num_images
        for index, episode in enumerate(plan.episodes):
            ((support,),) = episode.supports
            assert episode.image_id == index + 1 and episode.class_ids == (
                SPEC.target(index)[0] + 1,
            )
            assert indices[1].locate(support) == (index, 0)
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_all_sets_are_registered():
    names = {name for name in DatasetCatalog.list() if name.startswith("cluttered_omniglot_L")}
    assert len(names) == 7 * 5 * 2 and "cluttered_omniglot_L4_test_one_shot_support" in names


@pytest.mark.parametrize(("level", "scenes", "occupied"), [(4, 80, 0.037), (32, 30, 0.24)])
def test_scenes_of_real_characters_are_as_full_as_the_published_ones(
    shared_data, level, scenes, occupied
):
    path = shared_data / "omniglot.zip"
    if not path.exists():
        pytest.skip(f"no Omniglot at {path}")
    spec = ClutteredSpec(OmniglotGlyphs(str(path)), BACKGROUND, TRAIN_DRAWERS, level, scenes, 1)
    pictures = [spec.picture(index) for index in range(scenes)]
    covered = np.mean([picture.image.any(axis=2).mean() for picture in pictures])
    assert covered == pytest.approx(occupied, rel=0.15)
    ink = np.mean([picture.objects[0].mask.sum() for picture in pictures])
    assert 60 < ink < 110
