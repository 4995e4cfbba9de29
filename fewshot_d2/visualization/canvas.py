"""Drawing primitives on a PIL image: enlarge it, outline masks and boxes, place labels.

Coordinates are pixels of the image at its drawing size, XYXY. Colours are Okabe and Ito's, which colour-blind
readers can tell apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

# Sky blue, orange, bluish green, yellow, purple, vermillion, blue.
CLASS_COLORS: tuple[Color, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
DARK, PAPER = (20, 20, 20), (255, 255, 255)

_MIN_SIDE, _MAX_SIDE = 384, 1024
_MASK_ALPHA = 0.3
_DASH, _DASH_PERIOD = 7.0, 12.0
# Pixels that a mask's outline is wide.
_OUTLINE = 3


@dataclass(frozen=True)
class Mark:
    """One instance: XYXY box, bool mask (H, W) of the canvas or None, colour and text."""

    box: tuple[float, float, float, float]
    mask: np.ndarray | None
    color: Color
    label: str
    dashed: bool = False


def at_drawing_size(image: np.ndarray) -> tuple[Image.Image, float]:
    """An RGB uint8 image (H, W, 3) at a size on which lines and text can be read, and the scale."""
    height, width = image.shape[:2]
    scale = min(max(1.0, _MIN_SIDE / min(height, width)), _MAX_SIDE / max(height, width))
    picture = Image.fromarray(np.ascontiguousarray(image))
    if scale == 1.0:
        return picture, scale
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return picture.resize(size, Image.Resampling.BICUBIC), scale


def draw_marks(canvas: Image.Image, marks: Sequence[Mark]) -> None:
    """Draw on the canvas: masks below boxes below labels, large instances below small ones."""
    marks = sorted(marks, key=lambda m: -(m.box[2] - m.box[0]) * (m.box[3] - m.box[1]))
    pixels = np.array(canvas)
    for mark in marks:
        if mark.mask is not None:
            _draw_mask(pixels, mark)
    canvas.paste(Image.fromarray(pixels))
    draw = ImageDraw.Draw(canvas)
    for mark in marks:
        # A dark line around the coloured one keeps it visible on any background.
        _draw_box(draw, mark, margin=3, width=4, color=DARK)
        _draw_box(draw, mark, margin=2, width=2, color=mark.color)
    labels: list[tuple[float, ...]] = []
    for mark in marks:
        if mark.label:
            place = _label_place(draw, mark, canvas.size, labels, [m.box for m in marks])
            if place is not None:
                _draw_label(draw, mark, place, font_for(canvas.size))
                labels.append(place)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings a font with it that knows most scripts; Pillow's own knows ASCII only.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def font_for(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """A font that is readable on a picture of this (width, height)."""
    return _font(max(14, round(min(size) / 26)))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Common area of two XYXY rectangles."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _draw_mask(pixels: np.ndarray, mark: Mark) -> None:
    """Tint a mask and draw its outline, in place; only the part of the picture around it is touched."""
    rows, columns = np.flatnonzero(mark.mask.any(1)), np.flatnonzero(mark.mask.any(0))
    if not len(rows):
        return
    window = tuple(
        slice(max(of_axis[0] - _OUTLINE, 0), of_axis[-1] + _OUTLINE + 1)
        for of_axis in (rows, columns)
    )
    mask, part = mark.mask[window], pixels[window]
    color = np.array(mark.color)
    part[mask] = (1 - _MASK_ALPHA) * part[mask] + _MASK_ALPHA * color
    # The outline lies outside the mask: thin strokes would otherwise disappear below it.
    inner, outer = (
        cv2.dilate(mask.astype(np.uint8), np.ones((k, k), np.uint8)) > 0 for k in (5, 7)
    )
    part[outer & ~inner] = DARK
    part[inner & ~mask] = color


def _draw_box(
    draw: ImageDraw.ImageDraw, mark: Mark, *, margin: int, width: int, color: Color
) -> None:
    """Draw around the box, so that a small object is not hidden by its own frame."""
    x0, y0, x1, y1 = mark.box
    x0, y0, x1, y1 = x0 - margin, y0 - margin, max(x1, x0) + margin, max(y1, y0) + margin
    if not mark.dashed:
        draw.rectangle((x0, y0, x1, y1), outline=color, width=width)
        return
    half = width / 2 - 0.5
    left, top, right, bottom = x0 + half, y0 + half, x1 - half, y1 - half
    for y in (top, bottom):
        for x in np.arange(left, right, _DASH_PERIOD):
            draw.line(((x, y), (min(x + _DASH, right), y)), fill=color, width=width)
    for x in (left, right):
        for y in np.arange(top, bottom, _DASH_PERIOD):
            draw.line(((x, y), (x, min(y + _DASH, bottom))), fill=color, width=width)


def _label_place(
    draw: ImageDraw.ImageDraw,
    mark: Mark,
    size: tuple[int, int],
    labels: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
) -> tuple[float, float, float, float] | None:
    """The rectangle beside a box that hides least; None where it would lie on another label."""
    font = font_for(size)
    left, top, right, bottom = draw.textbbox((0, 0), mark.label, font=font)
    width, height = right - left + 6, bottom - top + 6
    x0, y0, x1, y1 = mark.box
    above, below = y0 - 3 - height, y1 + 3
    corners = [
        (x0 - 3, above),
        (x1 + 3 - width, above),
        (x0 - 3, below),
        (x1 + 3 - width, below),
        (x1 + 3, y0),
        (x0 - 3 - width, y0),
        (x0, y0),
    ]
    places = []
    for x, y in corners:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        places.append((x, y, x + width, y + height))
    # In a crowd of instances some scores stay unwritten; a label on a label tells neither.
    free = [p for p in places if not any(_overlap(p, other) for other in labels)]
    return min(free, key=lambda p: sum(_overlap(p, box) for box in boxes), default=None)


def _draw_label(
    draw: ImageDraw.ImageDraw, mark: Mark, place: Sequence[float], font: ImageFont.FreeTypeFont
) -> None:
    draw.rectangle(tuple(place), fill=mark.color)
    is_light = np.dot(mark.color, (0.299, 0.587, 0.114)) > 110
    middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    draw.text(middle, mark.label, fill=DARK if is_light else PAPER, font=font, anchor="mm")
