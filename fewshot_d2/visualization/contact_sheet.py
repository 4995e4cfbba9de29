"""A support set on one sheet: a row of examples a class, numbered as they are removed."""

import numpy as np
from PIL import Image

from ..structures import Support, SupportSet
from .canvas import CLASS_COLORS, PAPER
from .pictures import WRONG, captioned, thumbnail

_SIDE, _GAP = 160, 12
_PER_ROW, _MAX_SHOTS = 8, 400


def contact_sheet(support_set: SupportSet) -> np.ndarray:
    """Draw the examples, at most 400 of them; negative ones are framed in vermillion.

    Returns:
        ndarray[H, W, 3]: RGB, uint8.
    """
    rows: list[list[Image.Image]] = []
    left = _MAX_SHOTS
    for k, (name, shots) in enumerate(
        zip(support_set.class_names, support_set.examples, strict=True)
    ):
        tiles = [
            _tile(shot, f"{name} {number}", k) for number, shot in enumerate(shots[:left], start=1)
        ]
        left -= len(tiles)
        rows += [tiles[i : i + _PER_ROW] for i in range(0, len(tiles), _PER_ROW)]
    width = max(sum(tile.width + _GAP for tile in row) for row in rows) + _GAP
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), PAPER)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for tile in row:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += height
    return np.asarray(sheet)


def _tile(shot: Support, name: str, k: int) -> Image.Image:
    frame = thumbnail(shot, _SIDE, WRONG if shot.negative else CLASS_COLORS[k % len(CLASS_COLORS)])
    tile = Image.new("RGB", (max(frame.width, _SIDE), frame.height), PAPER)
    tile.paste(frame, (0, 0))
    form = "mask" if shot.mask is not None else "image" if shot.box is None else "box"
    return captioned(captioned(tile, f"not, {form}" if shot.negative else form), name)
