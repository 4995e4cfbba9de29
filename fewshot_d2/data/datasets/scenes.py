"""Multi-instance scenes of glyphs, and sets of exemplars to search them with.

Only shape tells classes apart: colours are drawn without regard to the class. Every glyph of a scene is annotated,
so that any class that occurs can be the one to search for and all others are distractors with complete ground truth.
Masks are the visible ink, boxes are tight around it. Picture ``index`` depends on (spec, index) alone.
"""

from dataclasses import dataclass

import numpy as np

from .generated import GlyphObject, Picture, categories_of
from .glyphs import GlyphSource
from .rendering import (
    add_clutter,
    add_pixel_noise,
    affine_matrix,
    contrasting_colour,
    crop_to_ink,
    noisy_background,
    warp_glyph,
)

_SCENE_TRIES = 100
_PLACING_TRIES = 8
_DRAWING_TRIES = 8


@dataclass(frozen=True)
class SceneSpec:
    """What determines a set of scenes; ranges include both ends, except ``classes`` and ``drawings``.

    Attributes:
        source: where the glyphs come from.
        classes: first class index of the source and one past the last.
        drawings: first drawing index and one past the last.
        num_images, seed: number of scenes and their seed.
        image_size: side of the square scene in pixels.
        glyph_size: longer side of an unscaled glyph in pixels.
        scene_classes: number of classes in a scene.
        instances: number of instances of each of them, cut where one class would outnumber all others.
        rotation, shear: largest angle in degrees, either way.
        scale: largest factor of the glyph's size; the smallest is its inverse.
        min_visible: share of its ink that later glyphs leave of an instance.
        max_overlap: largest share of the smaller of two boxes that lies inside the other.
        contrast: RGB distance of a glyph's colour from the mean of what it covers.
    """

    source: GlyphSource
    classes: tuple[int, int]
    drawings: tuple[int, int]
    num_images: int
    seed: int
    image_size: int = 128
    glyph_size: float = 30.0
    scene_classes: tuple[int, int] = (2, 4)
    instances: tuple[int, int] = (1, 3)
    rotation: float = 20.0
    shear: float = 10.0
    scale: float = 2.0
    min_visible: float = 0.5
    max_overlap: float = 0.4
    contrast: float = 120.0

    def __post_init__(self) -> None:
        check_ranges(self.source, self.classes, self.drawings)
        for name in ("scene_classes", "instances"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must rise from at least 1, got ({low}, {high})")
        if self.scene_classes[0] < 2:
            raise ValueError(
                f"scene_classes must start at 2 for distractors, got {self.scene_classes}"
            )
        if self.classes[1] - self.classes[0] < self.scene_classes[1]:
            raise ValueError(
                f"classes must hold at least {self.scene_classes[1]} for one scene, got {self.classes}"
            )

    def categories(self) -> list[dict]:
        """COCO categories."""
        return categories_of(self.source, self.classes)

    def picture(self, index: int) -> Picture:
        """Scene number ``index``."""
        # A crowded draw that cannot be placed is drawn anew as a whole.
        for attempt in range(_SCENE_TRIES):
            rng = np.random.default_rng((self.seed, index, attempt))
            picture = compose_scene(self, rng)
            if picture is not None:
                return picture
        raise ValueError(
            f"a scene must have room for its glyphs, got no place in scene {index} of {self}"
        )


@dataclass(frozen=True)
class ExemplarSpec:
    """What determines a set of exemplars: one glyph a picture, on a noisy background without clutter.

    Attributes:
        source, classes, drawings, seed, rotation, contrast: as in ``SceneSpec``.
        per_class: number of exemplars of each class.
        image_size: side of the square picture in pixels.
        fill: smallest and largest share of the picture's side that the glyph takes.
    """

    source: GlyphSource
    classes: tuple[int, int]
    drawings: tuple[int, int]
    per_class: int
    seed: int
    image_size: int = 64
    fill: tuple[float, float] = (0.6, 0.8)
    rotation: float = 20.0
    contrast: float = 140.0

    def __post_init__(self) -> None:
        check_ranges(self.source, self.classes, self.drawings)

    @property
    def num_images(self) -> int:
        """Number of pictures."""
        return (self.classes[1] - self.classes[0]) * self.per_class

    def categories(self) -> list[dict]:
        """COCO categories."""
        return categories_of(self.source, self.classes)

    def picture(self, index: int) -> Picture:
        """Exemplar number ``index``; those of a class follow each other and differ in their drawing."""
        rng = np.random.default_rng((self.seed, index))
        offset, shot = divmod(index, self.per_class)
        class_index = self.classes[0] + offset
        first, end = self.drawings
        ink = self.source.drawing(class_index, first + shot % (end - first))
        side = self.image_size * rng.uniform(*self.fill)
        rotation = rng.uniform(-self.rotation, self.rotation)
        opacity = _fitted(ink, side, rotation, 0.0, self.source)
        while max(opacity.shape) > self.image_size:
            # The corners of a full square stick out when it is turned.
            side *= 0.9
            opacity = _fitted(ink, side, rotation, 0.0, self.source)
        canvas = noisy_background(rng, self.image_size)
        y, x = (np.array([self.image_size] * 2) - opacity.shape) // 2
        _paint(rng, canvas, opacity, y, x, self.contrast)
        mask = np.zeros(canvas.shape[:2], bool)
        mask[y : y + opacity.shape[0], x : x + opacity.shape[1]] = opacity >= 0.5
        image = add_pixel_noise(rng, canvas)
        return Picture(image, [GlyphObject(class_index + 1, mask, z_order=0)])


def check_ranges(source: GlyphSource, classes: tuple[int, int], drawings: tuple[int, int]) -> None:
    """Raise unless both half-open ranges are non-empty and begin at 0 or later."""
    for what, (first, end) in {"classes": classes, "drawings": drawings}.items():
        if not 0 <= first < end:
            raise ValueError(f"{what} of {source} must be a non-empty range, got ({first}, {end})")


def compose_scene(spec: SceneSpec, rng: np.random.Generator) -> Picture | None:
    """One scene, or None where a glyph found no place."""
    class_indices = _draw_classes(spec, rng)
    size = spec.image_size
    canvas = noisy_background(rng, size)
    add_clutter(rng, canvas, int(rng.integers(4, 11)))
    pile = _Pile(size)
    # Painted from the bottom to the top, so that later glyphs occlude earlier ones.
    for class_index in class_indices:
        placed = _place(spec, rng, class_index, pile)
        if placed is None:
            return None
        _paint(rng, canvas, *placed, spec.contrast)
        pile.add(*placed)
    objects = [
        GlyphObject(class_index + 1, pile.owner == z_order, z_order)
        for z_order, class_index in enumerate(class_indices)
    ]
    return Picture(add_pixel_noise(rng, canvas), objects)


def _draw_classes(spec: SceneSpec, rng: np.random.Generator) -> list[int]:
    """Class index of every glyph from the bottom to the top."""
    num_classes = int(rng.integers(*spec.scene_classes, endpoint=True))
    drawn = rng.integers(*spec.instances, num_classes, endpoint=True)
    # Whichever class is searched has at least as many distractors as targets.
    counts = np.minimum(drawn, drawn.sum() - drawn)
    population = spec.classes[1] - spec.classes[0]
    chosen = spec.classes[0] + rng.choice(population, num_classes, replace=False)
    return rng.permutation(np.repeat(chosen, counts)).tolist()


class _Pile:
    """Glyphs that lie on each other; remembers what is still seen of each.

    Attributes:
        owner: int (size, size), number of the glyph seen at a pixel, -1 = background.
    """

    def __init__(self, size: int) -> None:
        self.owner = np.full((size, size), -1, np.int64)
        self._inks = np.zeros(0, int)
        self._visible = np.zeros(0, int)
        self._boxes = np.zeros((0, 4), int)

    def add(self, opacity: np.ndarray, y: int, x: int) -> None:
        """Put a glyph on top, its top left corner at (y, x)."""
        ink = opacity >= 0.5
        self._visible = np.append(self._visible - self._covered(ink, y, x), ink.sum())
        self._inks = np.append(self._inks, ink.sum())
        self._boxes = np.vstack([self._boxes, _box(opacity, y, x)])
        self._region(ink, y, x)[ink] = len(self._inks) - 1

    def has_place(
        self, opacity: np.ndarray, y: int, x: int, *, min_visible: float, max_overlap: float
    ) -> bool:
        """Whether a glyph put there leaves the earlier ones visible and apart from it."""
        if not len(self._inks):
            return True
        if _box_overlaps(_box(opacity, y, x), self._boxes).max() > max_overlap:
            return False
        left = self._visible - self._covered(opacity >= 0.5, y, x)
        return bool((left >= min_visible * self._inks).all())

    def _region(self, ink: np.ndarray, y: int, x: int) -> np.ndarray:
        return self.owner[y : y + ink.shape[0], x : x + ink.shape[1]]

    def _covered(self, ink: np.ndarray, y: int, x: int) -> np.ndarray:
        """Int (n,): visible pixels of each earlier glyph that the new ink would cover."""
        owners = self._region(ink, y, x)[ink]
        return np.bincount(owners + 1, minlength=len(self._inks) + 1)[1:]


def _place(
    spec: SceneSpec, rng: np.random.Generator, class_index: int, pile: _Pile
) -> tuple[np.ndarray, int, int] | None:
    """Opacity, top and left of a new glyph of the class, or None where no place was found."""
    limits = {"min_visible": spec.min_visible, "max_overlap": spec.max_overlap}
    for _ in range(_DRAWING_TRIES):
        ink = spec.source.drawing(class_index, int(rng.integers(*spec.drawings)))
        side = spec.glyph_size * spec.scale ** rng.uniform(-1, 1)
        rotation, shear = rng.uniform(-1, 1, 2) * (spec.rotation, spec.shear)
        opacity = _fitted(ink, side, rotation, shear, spec.source)
        room = spec.image_size - np.array(opacity.shape)
        if room.min() < 0:
            continue
        for y, x in rng.integers(0, room, (_PLACING_TRIES, 2), endpoint=True).tolist():
            if pile.has_place(opacity, y, x, **limits):
                return opacity, y, x
    return None


def _fitted(
    ink: np.ndarray, side: float, rotation: float, shear: float, source: GlyphSource
) -> np.ndarray:
    """Opacity of a drawing whose ink had a longer side of ``side`` pixels before rotation and shear."""
    # A character that is but a dot stays small.
    smallest = max(ink.shape) / 3
    ink = crop_to_ink(ink)
    scale = side / max(*ink.shape, smallest)
    matrix = affine_matrix(rotation, shear, (scale, scale))
    return warp_glyph(ink, matrix, stroke_width=source.stroke_width)


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    opacity: np.ndarray,
    y: int,
    x: int,
    contrast: float,
) -> None:
    """Blend a glyph of a fresh random colour into ``canvas`` at (y, x), in place."""
    region = canvas[y : y + opacity.shape[0], x : x + opacity.shape[1]]
    region += opacity[..., None] * (contrasting_colour(rng, region, contrast) - region)


def _box(opacity: np.ndarray, y: int, x: int) -> np.ndarray:
    return np.array([x, y, x + opacity.shape[1], y + opacity.shape[0]])


def _box_overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Float (n,): overlap of one XYXY box with n others, as a share of the smaller box."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return sides.clip(min=0).prod(axis=1) / np.minimum(areas, (box[2:] - box[:2]).prod())
