"""Glyph sources: where the shapes of embedded scenes come from.

A source is a frozen dataclass, so that its fields identify it in the name of a generated folder.
``ProceduralGlyphs`` needs no files: a class is a random arrangement of strokes, a drawing of it is the
same arrangement by a slightly unsteady hand. ``omniglot.py`` has real handwriting.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

_ARC_STEPS = np.linspace(0.0, 1.0, 28)
_CURVE_STEPS = np.linspace(0.0, 1.0, 20)[:, None]
_BEZIER_WEIGHTS = (
    np.array([1, 3, 3, 1]) * _CURVE_STEPS ** np.arange(4) * (1 - _CURVE_STEPS) ** np.arange(4)[::-1]
)
# Fixed-point bits of the polyline coordinates, for strokes that do not snap to pixels.
_SHIFT = 4


class GlyphSource(Protocol):
    """What scenes need of a source; implementations are frozen dataclasses of plain values."""

    @property
    def num_classes(self) -> int:
        """Number of classes; class indices are 0..num_classes-1."""

    @property
    def class_names(self) -> list[str]:
        """One unique name a class."""

    @property
    def stroke_width(self) -> float:
        """Typical stroke width in pixels of a drawing."""

    def num_drawings(self, class_index: int) -> int:
        """Number of different drawings of the class."""

    def drawing(self, class_index: int, drawing_index: int) -> np.ndarray:
        """Uint8 (S, S) ink, 0 = paper and 255 = ink."""


@dataclass(frozen=True)
class Stroke:
    """One movement of the pen.

    Attributes:
        kind: "line" (corner points), "curve" (4 Bezier points) or "arc".
        points: float (n, 2), xy in units of the glyph. An arc has rows centre, radii, (start, sweep) in radians.
    """

    kind: str
    points: np.ndarray

    def path(self) -> np.ndarray:
        """Float (m, 2): points along the stroke, xy in units of the glyph."""
        return _PATHS[self.kind](self.points)

    def shaken(self, rng: np.random.Generator, amount: float) -> "Stroke":
        """The same stroke with every control value moved a little."""
        noise = rng.normal(0.0, amount, self.points.shape)
        if self.kind == "arc":
            # The last row is angles, of which a few hundredths would not be seen.
            noise[2] *= 4.0
        return Stroke(self.kind, self.points + noise)


def _line_path(points: np.ndarray) -> np.ndarray:
    return points


def _curve_path(points: np.ndarray) -> np.ndarray:
    return _BEZIER_WEIGHTS @ points


def _arc_path(points: np.ndarray) -> np.ndarray:
    centre, radii, (start, sweep) = points
    angle = start + sweep * _ARC_STEPS
    return centre + radii * np.stack([np.cos(angle), np.sin(angle)], axis=1)


_PATHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "line": _line_path,
    "curve": _curve_path,
    "arc": _arc_path,
}


@dataclass(frozen=True)
class ProceduralGlyphs:
    """Random stroke glyphs, all determined by the seed.

    No two classes look alike: a candidate too similar to an earlier class is thrown away, so a range of classes
    for training and another for testing are disjoint in shape, not only in name.

    Attributes:
        classes: number of classes.
        seed: seed of the classes and their drawings.
        drawings: number of different drawings of a class.
        size: side of a drawing in pixels.
        stroke: mean stroke width as a fraction of the glyph's longer side.
        unsteadiness: standard deviation of a drawing's control points, in units of the glyph.
    """

    classes: int = 2200
    seed: int = 0
    drawings: int = 100
    size: int = 64
    stroke: float = 0.1
    unsteadiness: float = 0.025

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classes

    @property
    def class_names(self) -> list[str]:
        """Names "glyph_0000", "glyph_0001", ..."""
        return [f"glyph_{index:04d}" for index in range(self.classes)]

    @property
    def stroke_width(self) -> float:
        """Typical stroke width in pixels of a drawing."""
        return self.stroke * self.size / (1 + 2 * self.stroke)

    def num_drawings(self, class_index: int) -> int:
        """Number of drawings, the same for every class."""
        _check_index("class", class_index, self.classes)
        return self.drawings

    def drawing(self, class_index: int, drawing_index: int) -> np.ndarray:
        """Uint8 (size, size) ink of one drawing."""
        _check_index("class", class_index, self.classes)
        _check_index("drawing", drawing_index, self.drawings)
        rng = np.random.default_rng((self.seed, 1, class_index, drawing_index))
        strokes = stroke_classes(self.classes, self.seed)[class_index]
        shaken = [stroke.shaken(rng, self.unsteadiness) for stroke in strokes]
        width = self.stroke_width * rng.uniform(0.75, 1.3)
        return render_strokes(shaken, size=self.size, width=width)


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"{what} index must be in 0..{count - 1}, got {index}")


def render_strokes(strokes: list[Stroke], *, size: int, width: float) -> np.ndarray:
    """Uint8 (size, size): the strokes, antialiased, scaled so that the whole ink fits the square."""
    paths = [stroke.path() for stroke in strokes]
    everything = np.concatenate(paths)
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = (size - 2 - 1.2 * width) / max((high - low).max(), 1e-6)
    middle = (low + high) / 2
    canvas = np.zeros((size, size), np.uint8)
    fixed = [
        np.rint(((path - middle) * scale + (size - 1) / 2) * (1 << _SHIFT)).astype(np.int32)
        for path in paths
    ]
    cv2.polylines(canvas, fixed, False, 255, max(1, round(width)), cv2.LINE_AA, _SHIFT)
    return canvas


@functools.lru_cache(maxsize=8)
def stroke_classes(count: int, seed: int) -> tuple[tuple[Stroke, ...], ...]:
    """``count`` mutually distinct stroke arrangements; a longer list begins with the shorter one."""
    rng = np.random.default_rng((seed, 0))
    accepted: list[tuple[Stroke, ...]] = []
    looks = np.zeros((count, _LOOK_SIZE**2), np.float32)
    while len(accepted) < count:
        candidate = _random_strokes(rng)
        look = _look(candidate)
        similarity = looks[: len(accepted)] @ look
        if look.any() and similarity.max(initial=-1.0) < _MAX_SIMILARITY:
            looks[len(accepted)] = look
            accepted.append(candidate)
    return tuple(accepted)


# Two classes whose blurred thumbnails correlate more than this are hard to tell apart after a rotation and a shake.
_MAX_SIMILARITY = 0.8
_LOOK_SIZE = 12
# Ink of all strokes together, in longer sides of the glyph: shorter ones are mere ticks.
_MIN_LENGTH = 2.0


def _look(strokes: tuple[Stroke, ...]) -> np.ndarray:
    """Float32 (n,): blurred thumbnail of zero mean and unit norm; all zero where the glyph is too plain."""
    paths = [stroke.path() for stroke in strokes]
    extent = np.ptp(np.concatenate(paths), axis=0)
    length = sum(np.linalg.norm(np.diff(path, axis=0), axis=1).sum() for path in paths)
    if extent.min() < 0.45 * extent.max() or length < _MIN_LENGTH * extent.max():
        return np.zeros(_LOOK_SIZE**2, np.float32)
    picture = render_strokes(list(strokes), size=48, width=6)
    small = cv2.resize(picture, (_LOOK_SIZE, _LOOK_SIZE), interpolation=cv2.INTER_AREA)
    look = cv2.GaussianBlur(small.astype(np.float32), (3, 3), 0).ravel()
    look -= look.mean()
    return look / np.linalg.norm(look)


def _random_strokes(rng: np.random.Generator) -> tuple[Stroke, ...]:
    strokes: list[Stroke] = []
    for _ in range(rng.integers(2, 5)):
        # Strokes that start on earlier ones read as one sign, not as a heap of pieces.
        attached = bool(strokes) and rng.random() < 0.85
        if attached:
            path = strokes[rng.integers(len(strokes))].path()
            start = path[rng.choice([0, len(path) // 2, len(path) - 1])]
        else:
            start = _anchor(rng)
        strokes.append(_random_stroke(rng, start))
    return tuple(strokes)


def _random_stroke(rng: np.random.Generator, start: np.ndarray) -> Stroke:
    kind = rng.choice(["line", "corner", "curve", "arc"], p=[0.3, 0.2, 0.25, 0.25])
    if kind == "arc":
        radii = rng.uniform(0.12, 0.4) * rng.uniform(0.6, 1.0, 2)
        sweep = 2 * np.pi if rng.random() < 0.35 else rng.uniform(0.8, 1.6) * np.pi
        angles = np.array([rng.uniform(0, 2 * np.pi), sweep * rng.choice([-1, 1])])
        centre = start - radii * [np.cos(angles[0]), np.sin(angles[0])]
        return Stroke("arc", np.stack([np.clip(centre, 0.1, 0.9), radii, angles]))
    end = _anchor(rng, away_from=start)
    if kind == "line":
        return Stroke("line", np.stack([start, end]))
    if kind == "corner":
        return Stroke("line", np.stack([start, end, _anchor(rng, away_from=end)]))
    between = np.stack([start + (end - start) / 3, start + (end - start) * 2 / 3])
    return Stroke("curve", np.vstack([start, between + rng.normal(0, 0.35, (2, 2)), end]))


def _anchor(rng: np.random.Generator, away_from: np.ndarray | None = None) -> np.ndarray:
    """A point near one of 3x3 grid positions, as the ends of written strokes align; not close to ``away_from``."""
    for _ in range(20):
        point = rng.choice([0.1, 0.5, 0.9], 2) + rng.uniform(-0.1, 0.1, 2)
        if away_from is None or np.hypot(*(point - away_from)) > 0.35:
            break
    return point
