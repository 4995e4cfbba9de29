"""Cluttered Omniglot, the single-target protocol of Michaelis et al. (2018, arXiv 1803.09597).

A scene holds ``level`` characters on black; the target lies on top and is the only one annotated, although another
may be of its class. The reference is the same drawing with another rotation, shear and colour, unscaled. Numbers are
not those of the published files, bit by bit: affine and reduction to 32/105 are one nearest-neighbour step here, and
a glyph that the crop leaves without ink is warped anew (the original keeps some empty masks).
"""

from dataclasses import dataclass, fields

import cv2
import numpy as np
from detectron2.data import DatasetCatalog

from ..coco_json import dataset_categories
from ..plans import EvaluationPlan, PlannedEpisode
from .generated import GlyphObject, Picture, categories_of
from .glyphs import GlyphSource
from .rendering import affine_matrix, crop_to_ink

LEVELS = (4, 8, 16, 32, 64, 128, 256)
_SCENE_SIZE = 96
_REFERENCE_SIZE = 32
# A drawing of 105 pixels becomes one of 32.
_REDUCTION = 32 / 105
_MAX_ROTATION, _MAX_SHEAR, _MAX_LOG2_SCALE = 20.0, 10.0, 1.0
_WARP_TRIES = 1000


@dataclass(frozen=True)
class ClutteredSpec:
    """What determines the scenes of one level.

    Attributes:
        source: where the characters come from.
        classes, drawings: half-open ranges of class and drawing indices, for target and distractors alike.
        level: number of characters in a scene, target included.
        num_images: number of scenes.
        seed: of the set.
    """

    source: GlyphSource
    classes: tuple[int, int]
    drawings: tuple[int, int]
    level: int
    num_images: int
    seed: int

    def __post_init__(self) -> None:
        if self.level < 1:
            raise ValueError(f"level must be at least 1 character, got {self.level}")

    def categories(self) -> list[dict]:
        """COCO categories."""
        return categories_of(self.source, self.classes)

    def target(self, index: int) -> tuple[int, int]:
        """Class and drawing index of the target of scene ``index``."""
        return self._any_drawing(np.random.default_rng((self.seed, self.level, index, 0)))

    def picture(self, index: int) -> Picture:
        """Scene ``index``, 96 x 96, with its target."""
        rng = np.random.default_rng((self.seed, self.level, index, 1))
        image = np.zeros((_SCENE_SIZE, _SCENE_SIZE, 3), np.uint8)
        for _ in range(self.level - 1):
            _paste(rng, image, self.source.drawing(*self._any_drawing(rng)))
        target = self.target(index)
        mask = _paste(rng, image, self.source.drawing(*target))
        return Picture(image, [GlyphObject(target[0] + 1, mask, z_order=self.level - 1)])

    def _any_drawing(self, rng: np.random.Generator) -> tuple[int, int]:
        return int(rng.integers(*self.classes)), int(rng.integers(*self.drawings))


@dataclass(frozen=True)
class ReferenceSpec(ClutteredSpec):
    """The references of the scenes of the ``ClutteredSpec`` with equal fields; number i belongs to scene i."""

    @classmethod
    def of(cls, scenes: ClutteredSpec) -> "ReferenceSpec":
        """The references of these scenes."""
        return cls(**{f.name: getattr(scenes, f.name) for f in fields(scenes)})

    def picture(self, index: int) -> Picture:
        """Reference of scene ``index``, 32 x 32."""
        rng = np.random.default_rng((self.seed, self.level, index, 2))
        target = self.target(index)
        ink = _warped_until_inked(rng, self.source.drawing(*target), scaled=False)
        mask = _centred(ink, _REFERENCE_SIZE)
        image = mask[..., None] * _flat_colour(rng)
        return Picture(image, [GlyphObject(target[0] + 1, mask, z_order=0)])


def warp_character(
    ink: np.ndarray, *, rotation: float, shear: float, scale: tuple[float, float]
) -> np.ndarray:
    """Bool (h, w): a drawing after the protocol's affine and reduction, cropped.

    The crop lacks the last row and column that hold ink, as in the original, so it may be empty.

    Args:
        ink: uint8 (S, S), non-zero = ink.
        rotation, shear: degrees.
        scale: factors of x and y.
    """
    matrix = affine_matrix(rotation, shear, scale) * _REDUCTION
    half = (np.array(ink.shape[::-1]) - 1) / 2
    reach = np.ceil(np.abs(matrix) @ half)
    offset = reach - matrix @ half
    size = (2 * reach + 1).astype(int).tolist()
    warped = cv2.warpAffine(ink, np.column_stack([matrix, offset]), size, flags=cv2.INTER_NEAREST)
    return crop_to_ink(warped)[:-1, :-1] > 0


def _warped_until_inked(rng: np.random.Generator, ink: np.ndarray, *, scaled: bool) -> np.ndarray:
    """Bool (h, w): the drawing after a random affine that leaves some ink and fits a scene."""
    # Thin strokes can vanish in the crop, and large glyphs need not fit.
    for _ in range(_WARP_TRIES):
        rotation, shear = rng.uniform(-1, 1, 2) * (_MAX_ROTATION, _MAX_SHEAR)
        scale = 2 ** (rng.uniform(-1, 1, 2) * _MAX_LOG2_SCALE) if scaled else (1.0, 1.0)
        warped = warp_character(ink, rotation=rotation, shear=shear, scale=scale)
        if warped.any() and max(warped.shape) <= _SCENE_SIZE:
            return warped
    raise ValueError(
        f"a drawing must keep some ink at 32/105 of its size, got {(ink > 0).sum()} px"
    )


def _flat_colour(rng: np.random.Generator) -> np.ndarray:
    """Uint8 (3,): any colour, nearly black ones included."""
    return rng.uniform(0, 255, 3).astype(np.uint8)


def _paste(rng: np.random.Generator, image: np.ndarray, drawing: np.ndarray) -> np.ndarray:
    """Put a drawing on top, in place; returns the bool mask (H, W) of its ink."""
    ink = _warped_until_inked(rng, drawing, scaled=True)
    y, x = rng.integers(0, np.array(image.shape[:2]) - ink.shape, endpoint=True)
    mask = np.zeros(image.shape[:2], bool)
    mask[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
    image[mask] = _flat_colour(rng)
    return mask


def _centred(ink: np.ndarray, size: int) -> np.ndarray:
    """Bool (size, size): ``ink`` in the middle; what reaches beyond the square is cut."""
    excess = [max(0, side - size) // 2 for side in ink.shape]
    ink = ink[excess[0] :, excess[1] :][:size, :size]
    top, left = ((size - side) // 2 for side in ink.shape)
    mask = np.zeros((size, size), bool)
    mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return mask


def cluttered_omniglot_plan(name: str) -> EvaluationPlan:
    """The protocol as a plan: every scene of the data set with its own reference as the one support.

    Args:
        name: a registered set; its references are the set ``<name>_support``.
    """
    support_name = f"{name}_support"
    references = {
        record["image_id"]: record["annotations"][0] for record in DatasetCatalog.get(support_name)
    }
    class_ids = list(dataset_categories(support_name))
    episodes = []
    for index, record in enumerate(DatasetCatalog.get(name)):
        reference = references[record["image_id"]]
        class_id = class_ids[reference["category_id"]]
        episode = PlannedEpisode(index, record["image_id"], (class_id,), ((reference["id"],),))
        episodes.append(episode)
    return EvaluationPlan(
        dataset=name,
        support_dataset=support_name,
        split="all",
        side="all",
        protocol="present",
        shots=1,
        seed=0,
        run=0,
        class_ids=tuple(sorted({episode.class_ids[0] for episode in episodes})),
        episodes=tuple(episodes),
    )
