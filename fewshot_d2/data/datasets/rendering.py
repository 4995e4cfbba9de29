"""Drawing of scenes: the affine of a glyph, its colour, and noisy backgrounds. Pure functions of arrays."""

import cv2
import numpy as np

# Strokes are drawn at least this wide (pixels of the scene): a thinner one fades into the background.
_MIN_STROKE = 1.6
# Paper around a drawing, in its own pixels, so that blurred strokes are not cut.
_MARGIN = 4


def affine_matrix(rotation: float, shear: float, scale: tuple[float, float]) -> np.ndarray:
    """Float (2, 2) that maps source xy to target xy; the shear acts on both axes symmetrically.

    Args:
        rotation, shear: degrees.
        scale: factors of x and y, applied first.
    """
    plus, minus = np.deg2rad(rotation + shear), np.deg2rad(rotation - shear)
    turned = np.array([[np.cos(plus), np.sin(minus)], [-np.sin(plus), np.cos(minus)]])
    return turned * np.asarray(scale)


def crop_to_ink(ink: np.ndarray) -> np.ndarray:
    """The rows and columns between the first and last that hold ink; (0, 0) where there is none."""
    x, y, width, height = cv2.boundingRect(ink)
    return ink[y : y + height, x : x + width]


def warp_glyph(ink: np.ndarray, matrix: np.ndarray, *, stroke_width: float) -> np.ndarray:
    """Opacity of a drawing after an affine, antialiased and cropped to its ink.

    Args:
        ink: uint8 (S, S), 255 = ink.
        matrix: float (2, 2), source xy to target xy.
        stroke_width: typical stroke width of ``ink`` in pixels.

    Returns:
        Float32 (h, w) in [0, 1]; pixels of at least 0.5 are ink and touch all four sides.
    """
    scale = float(np.sqrt(abs(np.linalg.det(matrix))))
    ink = cv2.copyMakeBorder(ink, *[_MARGIN] * 4, cv2.BORDER_CONSTANT)
    if scale < 1:
        # Each target pixel becomes the mean of the source pixels below it.
        ink = cv2.blur(ink, [round(1 / scale)] * 2)
    height, width = ink.shape
    reach = np.abs(matrix) @ [width / 2, height / 2]
    out_width, out_height = (2 * np.ceil(reach)).astype(int)
    source, target = (
        (np.array([width, height]) - 1) / 2,
        (np.array([out_width, out_height]) - 1) / 2,
    )
    offset = target - matrix @ source
    opacity = cv2.warpAffine(ink, np.column_stack([matrix, offset]), (out_width, out_height))
    # A stroke thinner than a pixel covers none of them fully.
    gain = max(1.0, _MIN_STROKE / (stroke_width * scale)) / 255
    opacity = np.minimum(opacity.astype(np.float32) * gain, 1)
    x, y, width, height = cv2.boundingRect((opacity >= 0.5).astype(np.uint8))
    return opacity[y : y + height, x : x + width]


def contrasting_colour(
    rng: np.random.Generator, surroundings: np.ndarray, contrast: float
) -> np.ndarray:
    """Float32 (3,) RGB, random, at least ``contrast`` away from the mean of ``surroundings`` (..., 3), 0..255."""
    # A fixed number of draws, so that the random stream does not depend on the background.
    colours = rng.uniform(0, 255, (24, 3)).astype(np.float32)
    distance = np.linalg.norm(colours - surroundings.reshape(-1, 3).mean(axis=0), axis=1)
    enough = distance >= contrast
    return colours[enough.argmax() if enough.any() else distance.argmax()]


def noisy_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Float32 (size, size, 3), 0..255: a random colour that varies slowly over the picture."""
    coarse = rng.uniform(20, 235, 3) + rng.normal(0, rng.uniform(10, 32), (5, 5, 3))
    return cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def add_clutter(rng: np.random.Generator, canvas: np.ndarray, count: int) -> None:
    """Draw thin, faint, random strokes on ``canvas`` (float32 (H, W, 3)) in place: things that are no glyphs."""
    size = canvas.shape[0]
    for _ in range(count):
        points = rng.uniform(0, size, 2) + rng.normal(0, size / 6, (4, 2))
        stroke = np.zeros(canvas.shape[:2], np.uint8)
        fixed = np.rint(points * 16).astype(np.int32)
        cv2.polylines(stroke, [fixed], False, 255, int(rng.integers(1, 3)), cv2.LINE_AA, 4)
        colour, strength = rng.uniform(0, 255, 3), rng.uniform(0.2, 0.6)
        x, y, width, height = cv2.boundingRect(stroke)
        region = canvas[y : y + height, x : x + width]
        opacity = stroke[y : y + height, x : x + width, None] * np.float32(strength / 255)
        region += opacity * (colour.astype(np.float32) - region)


def add_pixel_noise(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Uint8 copy of ``canvas`` (float32, 0..255) with Gaussian noise on every channel."""
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(3, 12))
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)
