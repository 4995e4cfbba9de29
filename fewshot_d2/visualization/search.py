"""Instance search in pictures: recall against IoU, and how a candidate's box moves from stage to stage.

Images are RGB uint8 (H, W, 3); boxes are XYXY in absolute pixels of the image that is given.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .canvas import CLASS_COLORS, DARK, PAPER, Color, Mark, draw_marks, font_for
from .pictures import TRUTH, captioned
from .plots import add_legend, as_png, line_style, new_figure

# First to last stage: vermillion, sky blue, green, purple, blue, orange; yellow is the truth's.
_STAGE_COLORS: tuple[Color, ...] = tuple(CLASS_COLORS[i] for i in (5, 0, 2, 4, 6, 1))
# Pixels of a picture's longer side, and between pictures.
_TILE, _GAP = 400, 10


def recall_iou_figure(
    curves: Mapping[str, np.ndarray], thresholds: np.ndarray, title: str = ""
) -> bytes:
    """Draw the recall of boxes against the IoU from which on they count (SPIL fig. 6).

    Args:
        curves: name -> float[T], in [0, 1], NaN = undefined.
        thresholds (float[T]): IoU, rising.
        title: above the diagram.

    Returns:
        A PNG file.

    Raises:
        ValueError: a curve has another length than the thresholds.
    """
    figure, axes = new_figure(title, "IoU", "recall of true images in the list")
    for i, (name, recall) in enumerate(curves.items()):
        if len(recall) != len(thresholds):
            raise ValueError(
                f"curve {name!r} must have a recall for each of {len(thresholds)} thresholds, got {len(recall)}"
            )
        axes.plot(thresholds, recall, label=name, **line_style(i))
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    add_legend(figure, axes, len(curves))
    return as_png(figure)


def stages_panel(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    truth: Sequence[np.ndarray] | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 4,
) -> np.ndarray:
    """Draw candidates with their boxes of every stage, one colour a stage (SPIL fig. 4).

    Args:
        images (sequence of N, uint8[H, W, 3]): the candidates, of any sizes.
        boxes (sequence of N, float[S, 4]): a box a stage; a row of NaN = none.
        labels (sequence of S): names of the stages, for the line above the pictures.
        truth (sequence of N, float[G, 4]): dashed boxes, or None.
        captions (sequence of N): a text above each picture, or None.
        columns: pictures side by side.

    Returns:
        uint8[H', W', 3].

    Raises:
        ValueError: no image, or counts that differ.
    """
    _check_panel(images, boxes, labels, truth, captions, columns)
    tiles = []
    for i, image in enumerate(images):
        tile = _drawn(image, boxes[i], truth[i] if truth is not None else np.empty((0, 4)))
        tiles.append(captioned(tile, captions[i]) if captions is not None else tile)
    grid = _grid(tiles, columns)
    names = dict(zip(labels, map(_color, range(len(labels))), strict=True))
    if truth is not None:
        names["truth"] = TRUTH
    return np.asarray(_with_legend(grid, names))


def _check_panel(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[str],
    truth: Sequence[np.ndarray] | None,
    captions: Sequence[str] | None,
    columns: int,
) -> None:
    if not len(images) or columns < 1:
        raise ValueError(
            f"images and columns must be at least one, got {len(images)} and {columns}"
        )
    for name, rows in {"boxes": boxes, "truth": truth, "captions": captions}.items():
        if rows is not None and len(rows) != len(images):
            raise ValueError(f"{name} must be one an image, {len(images)}, got {len(rows)}")
    for row in boxes:
        if np.shape(row) != (len(labels), 4):
            raise ValueError(f"boxes must be ({len(labels)}, 4), one a stage, got {np.shape(row)}")


def _color(stage: int) -> Color:
    return _STAGE_COLORS[stage % len(_STAGE_COLORS)]


def _drawn(image: np.ndarray, boxes: np.ndarray, truth: np.ndarray) -> Image.Image:
    """One candidate at the panel's size with its boxes."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    scale = _TILE / max(picture.size)
    size = [max(round(side * scale), 1) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    found = [(box, _color(stage), False) for stage, box in enumerate(np.asarray(boxes, float))]
    true = [(box, TRUTH, True) for box in np.asarray(truth, float).reshape(-1, 4)]
    marks = [
        Mark(tuple((box * scale).tolist()), None, color, "", dashed)
        for box, color, dashed in [*true, *found]
        if not np.isnan(box).any()
    ]
    draw_marks(picture, marks)
    return picture


def _grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles row by row; each row is as high as its highest tile."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    width = max(tile.width for tile in tiles) + _GAP
    size = width * min(columns, len(tiles)) - _GAP, sum(heights) - _GAP
    panel = Image.new("RGB", size, PAPER)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            panel.paste(tile, (c * width, sum(heights[:r])))
    return panel


def _with_legend(panel: Image.Image, names: Mapping[str, Color]) -> Image.Image:
    """The panel below a line of colours and names; the line breaks where the panel ends."""
    font = font_for((_TILE, _TILE))
    side, line = font.size, round(font.size * 1.7)
    x, y, places = 0, 0, []
    for name in names:
        width = round(side * 2.2 + font.getlength(name))
        if x and x + width > panel.width:
            x, y = 0, y + line
        places.append((x, y))
        x += width
    top = y + line if names else 0
    result = Image.new("RGB", (panel.width, panel.height + top), PAPER)
    result.paste(panel, (0, top))
    draw = ImageDraw.Draw(result)
    for (name, color), (x, y) in zip(names.items(), places, strict=True):
        middle = y + line / 2
        draw.rectangle((x, middle - side / 2, x + side, middle + side / 2), color, DARK)
        draw.text((x + side * 1.4, middle), name, fill=DARK, font=font, anchor="lm")
    return result
