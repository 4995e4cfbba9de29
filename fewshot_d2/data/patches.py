"""Windows of training images that are cut out as patches, and what of the boxes is in them (OS2D spec 1.14).

Windows and boxes are XYXY in pixels of one image; windows are whole numbers. n = boxes.
"""

from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, PadTransform
from PIL import Image

Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class PatchRule:
    """How patches are drawn and what happens to boxes that they cut.

    Attributes:
        size (int): side of the square patch in pixels. aspect, scale, tries, cover, gone, difficult, filters: see
            ``patch_config``.
    """

    size: int
    aspect: float
    scale: float
    tries: int
    cover: float
    gone: float
    difficult: float
    filters: tuple[str, ...]

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "PatchRule":
        """Read FEWSHOT.PATCHES."""
        node = cfg.FEWSHOT.PATCHES
        return cls(
            size=node.SIZE,
            aspect=node.ASPECT,
            scale=node.SCALE,
            tries=node.TRIES,
            cover=node.COVER,
            gone=node.GONE,
            difficult=node.DIFFICULT,
            filters=tuple(node.FILTERS),
        )

    def draw(
        self, rng: np.random.Generator, boxes: np.ndarray, *, height: int, width: int, scale: float
    ) -> Window:
        """A window inside the image that holds enough of some box, any window where there are no boxes.

        Args:
            boxes (float[n, 4]): of the classes that are searched.
            height, width: of the image. scale: pixels of the patch in one of the image, before it is varied.

        Returns:
            The first accepted one of ``tries``, else the window of that scale in the top left corner.
        """
        for _ in range(self.tries):
            window = self._propose(rng, height, width, scale)
            if not len(boxes) or (coverage(boxes, window) >= self.cover).any():
                return window
        side = max(int(self.size / scale), 1)
        return 0, 0, min(side, width), min(side, height)

    def _propose(self, rng: np.random.Generator, height: int, width: int, scale: float) -> Window:
        aspect = rng.uniform(self.aspect, 1 / self.aspect)
        side = self.size / (rng.uniform(self.scale, 1 / self.scale) * scale)
        w = max(int(min(side, width)), 1)
        h = max(int(min(w / aspect, height)), 1)
        x0, y0 = (int(rng.integers(0, room, endpoint=True)) for room in (width - w, height - h))
        return x0, y0, x0 + w, y0 + h

    def draw_filter(self, rng: np.random.Generator) -> int:
        """One of PIL's filters."""
        return pil_filter(self.filters[int(rng.integers(len(self.filters)))])

    def states(self, boxes: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Which boxes are still there, and which of all are difficult because they are cut: bool[n] each."""
        inside = coverage(boxes, window)
        return inside >= self.gone, inside < self.difficult


def coverage(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Share of each box's area that is inside the window (float[n]); 0 for a box without area."""
    low = np.maximum(boxes[:, :2], window[:2])
    high = np.minimum(boxes[:, 2:], window[2:])
    inside = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.divide(inside, areas, out=np.zeros(len(boxes)), where=areas > 0)


def window_transform(
    window: Window, *, height: int, width: int, size: int, interp: int
) -> T.TransformList:
    """Cut a window out of an image, black where it leaves it, and resize it to ``size`` x ``size``.

    Coordinates are shifted and scaled, not clipped.
    """
    x0, y0, x1, y1 = window
    left, top = max(-x0, 0), max(-y0, 0)
    right, bottom = max(x1 - width, 0), max(y1 - height, 0)
    return T.TransformList(
        [
            PadTransform(left, top, right, bottom),
            CropTransform(x0 + left, y0 + top, x1 - x0, y1 - y0),
            T.ResizeTransform(y1 - y0, x1 - x0, size, size, interp),
        ]
    )


def pil_filter(name: str) -> int:
    """PIL's number of a filter."""
    return Image.Resampling[name.upper()]
