"""What a detector by alignment found: boxes, the transformed grids, and the map of scores (OS2D, figure 2)."""

import numpy as np
from PIL import Image, ImageDraw

from .canvas import CLASS_COLORS, Mark, at_drawing_size, draw_marks
from .pictures import captioned, in_a_row

_BOX, _GRID = CLASS_COLORS[3], CLASS_COLORS[5]
_GAP = 8


def alignment_panel(
    image: np.ndarray,
    boxes: np.ndarray,
    corners: np.ndarray,
    scores: np.ndarray,
    score_map: np.ndarray,
    *,
    lines: int = 6,
) -> np.ndarray:
    """Detections of one class with the grids that gave them, beside the map of scores.

    Args:
        image (uint8[H, W, 3]): RGB. boxes (float[B, 4]), scores (float[B]): XYXY in its pixels.
        corners (float[B, 8]): x, y of the class image's top left, top right, bottom left and bottom right.
        score_map (float[h, w]): light = high; stretched over the image.
        lines: of a grid in each direction, at least 2.

    Returns:
        uint8[H', W', 3], RGB.

    Raises:
        ValueError: fewer than two lines, or a map without a cell.
    """
    if lines < 2 or not score_map.size:
        raise ValueError(
            f"a grid must have at least 2 lines and a score map a cell, got {lines} and {score_map.shape}"
        )
    left, scale = at_drawing_size(image)
    draw = ImageDraw.Draw(left)
    for quad in np.asarray(corners, dtype=float).reshape(-1, 4, 2) * scale:
        for line in grid_lines(quad, lines):
            draw.line([tuple(point) for point in line], fill=_GRID, width=2)
    draw_marks(
        left,
        [
            Mark(tuple(scale * box), None, _BOX, f"{score:.2f}")
            for box, score in zip(np.asarray(boxes, dtype=float), scores, strict=True)
        ],
    )
    right = Image.fromarray(_grey(score_map)).resize(left.size, Image.Resampling.NEAREST)
    low, high = float(score_map.min()), float(score_map.max())
    tiles = [
        captioned(left, "boxes and transformed grids"),
        captioned(right.convert("RGB"), f"scores, {low:.2f} (black) to {high:.2f} (white)"),
    ]
    return np.array(in_a_row(tiles, gap=_GAP))


def grid_lines(quad: np.ndarray, lines: int) -> np.ndarray:
    """Ends of the lines of a grid over a parallelogram.

    Args:
        quad (float[4, 2]): x, y of top left, top right, bottom left and bottom right.

    Returns:
        float[2 lines, 2, 2]: first those across, from top to bottom, then those down, from left to right.
    """
    top_left, top_right, bottom_left, bottom_right = quad
    t = np.linspace(0, 1, lines)[:, None]
    across = np.stack(
        [top_left + t * (bottom_left - top_left), top_right + t * (bottom_right - top_right)], 1
    )
    down = np.stack(
        [top_left + t * (top_right - top_left), bottom_left + t * (bottom_right - bottom_left)], 1
    )
    return np.concatenate([across, down])


def _grey(values: np.ndarray) -> np.ndarray:
    """Least to greatest as uint8; one value alone is black."""
    values = np.asarray(values, dtype=float)
    spread = values.max() - values.min()
    scaled = (values - values.min()) / (spread or 1.0)
    return np.round(255 * scaled).astype(np.uint8)
