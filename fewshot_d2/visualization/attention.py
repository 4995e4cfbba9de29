"""What a query's cell looks at in the supports (SILCO Fig. 3), and maps of responses (Fig. 4): numpy in, numpy out.

S supports. Images are RGB uint8 (H, W, 3) of any sizes; a map's cells cover the whole of its image, however large.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from .canvas import DARK, Mark, at_drawing_size, draw_marks
from .pictures import TRUTH, WRONG, captioned, in_a_row

_SIDE, _GAP = 320, 10
_GREEN = (60, 220, 60)
_HEAT_ALPHA = 0.5


def attention_panel(
    query: np.ndarray,
    supports: Sequence[np.ndarray],
    attention: np.ndarray,
    point: tuple[float, float],
    *,
    number: int = 20,
    is_joint: bool = False,
) -> np.ndarray:
    """Draw a point of the query and the cells of the supports that it looks at most, as dots.

    Args:
        query (ndarray[H, W, 3]), supports (S images).
        attention (ndarray[S, h, w]): of the point's cell.
        point: (x, y) in pixels of the query.
        number: dots in each support, or, if ``is_joint``, in all together, as attention over all at once has them.

    Returns:
        ndarray[H', W', 3]: the query, then the supports with the share of the attention that each has.

    Raises:
        ValueError: maps that are not one a support, or not of numbers.
    """
    attention = np.asarray(attention, dtype=np.float64)
    if attention.ndim != 3 or len(attention) != len(supports) or not len(supports):
        raise ValueError(
            f"attention must be one map (h, w) for each of {len(supports)} supports, got {attention.shape}"
        )
    if not np.isfinite(attention).all():
        raise ValueError("attention must be finite, got NaN or infinity")
    height, width = query.shape[:2]
    tiles = [_tile(query, [(point[0] / width, point[1] / height)], "query")]
    shares = attention.sum(axis=(1, 2)) / max(float(attention.sum()), 1e-12)
    for shown, cells, share in zip(
        supports, top_cells(attention, number, is_joint), shares, strict=True
    ):
        tiles.append(_tile(shown, cells, f"{100 * share:.0f} % of the attention"))
    return np.asarray(in_a_row(tiles, gap=_GAP))


def top_cells(
    attention: np.ndarray, number: int, is_joint: bool = False
) -> list[list[tuple[float, float]]]:
    """Middles of the cells with the most attention, (x, y) as shares of the support's sides, for each support.

    Args:
        attention (ndarray[S, h, w]). number, is_joint: as of ``attention_panel``.
    """
    num_supports, height, width = attention.shape
    flat = attention.reshape(1, -1) if is_joint else attention.reshape(num_supports, -1)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, :number]
    if not is_joint:
        chosen = chosen + height * width * np.arange(num_supports)[:, None]
    support, row, column = np.unravel_index(chosen.ravel(), attention.shape)
    middles = zip(((column + 0.5) / width).tolist(), ((row + 0.5) / height).tolist(), strict=True)
    cells: list[list[tuple[float, float]]] = [[] for _ in range(num_supports)]
    for s, middle in zip(support.tolist(), middles, strict=True):
        cells[s].append(middle)
    return cells


def heat_panel(
    query: np.ndarray,
    heats: Mapping[str, np.ndarray],
    *,
    truth: np.ndarray | None = None,
    found: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the query with its boxes and, beside it, each map over it: blue is low and red is high.

    Args:
        query (ndarray[H, W, 3]). heats: title -> ndarray[h, w], each scaled from its least to its largest value.
        truth, found (ndarray[N, 4]): XYXY, pixels of the query; yellow, and dashed vermillion.

    Raises:
        ValueError: something that is no map.
    """
    canvas, scale = at_drawing_size(query)
    tiles = []
    for title, heat in heats.items():
        heat = np.asarray(heat, dtype=np.float64)
        if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
            raise ValueError(f"heat {title!r} must be a map (h, w) of numbers, got {heat.shape}")
        tiles.append(captioned(_heated(canvas, heat), title))
    marks = [
        Mark(tuple(box), None, color, "", dashed)
        for boxes, color, dashed in ((truth, TRUTH, False), (found, WRONG, True))
        for box in (np.zeros((0, 4)) if boxes is None else np.asarray(boxes) * scale)
    ]
    draw_marks(canvas, marks)
    return np.asarray(in_a_row([captioned(canvas, "query"), *tiles], gap=_GAP))


def _heated(canvas: Image.Image, heat: np.ndarray) -> Image.Image:
    low, high = heat.min(), heat.max()
    level = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    level = Image.fromarray(level.astype(np.float32)).resize(canvas.size, Image.Resampling.BILINEAR)
    colors = matplotlib.colormaps["turbo"](np.asarray(level))[:, :, :3] * 255
    return Image.blend(canvas, Image.fromarray(colors.astype(np.uint8)), _HEAT_ALPHA)


def _tile(image: np.ndarray, places: Sequence[tuple[float, float]], caption: str) -> Image.Image:
    """The image at a fixed height with dots at places that are given as shares of its sides."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    width = min(max(round(picture.width * _SIDE / picture.height), 40), 3 * _SIDE)
    picture = picture.resize((width, _SIDE), Image.Resampling.BICUBIC)
    draw, radius = ImageDraw.Draw(picture), 5
    for x, y in places:
        middle = x * width, y * _SIDE
        draw.circle(middle, radius, fill=_GREEN, outline=DARK)
    return captioned(picture, caption)
