"""Resize rules of queries and supports, and the support crop; used by the mapper and by the detectors alike.

Rules: ``paper`` (Siamese Mask R-CNN, spec section 2.3) scales the long side to the given size; ``code``, that of the
original implementation, never shrinks except to fit the maximum and enlarges only until the short side reaches the
minimum; ``shortest_edge``, detectron2's own, scales the short side to the minimum unless the long one then passes the
maximum; ``stretch`` makes both sides the maximum (SSD).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from .structures import Support

RESIZE_RULES = ("paper", "code", "shortest_edge", "stretch")


def resized_shape(
    height: int, width: int, *, max_size: int, min_size: int, rule: str
) -> tuple[int, int]:
    """(height, width) after the resize rule; each side is at least one pixel.

    Raises:
        ValueError: unknown ``rule``.
    """
    long_side, short_side = max(height, width), min(height, width)
    if rule not in RESIZE_RULES:
        raise ValueError(f"resize rule must be one of {RESIZE_RULES}, got {rule!r}")
    if rule == "stretch":
        return max_size, max_size
    scale = max_size / long_side
    if rule != "paper":
        wanted = min_size / short_side
        wanted = max(1.0, wanted) if rule == "code" else wanted
        scale = wanted if round(long_side * wanted) <= max_size else scale
    return max(1, round(height * scale)), max(1, round(width * scale))


class ResizeByRule(T.Augmentation):
    """detectron2 augmentation for ``resized_shape``; for query images."""

    def __init__(self, *, max_size: int, min_size: int, rule: str):
        super().__init__()
        self.max_size, self.min_size, self.rule = max_size, min_size, rule

    @classmethod
    def from_cfg(cls, cfg: CfgNode, *, is_train: bool) -> "ResizeByRule":
        """The query's rule for training or testing."""
        sizes = cfg.INPUT
        if not is_train:
            return cls(
                max_size=sizes.MAX_SIZE_TEST,
                min_size=sizes.MIN_SIZE_TEST,
                rule=cfg.FEWSHOT.RESIZE_RULE,
            )
        return cls(
            max_size=sizes.MAX_SIZE_TRAIN,
            min_size=sizes.MIN_SIZE_TRAIN[0],
            rule=cfg.FEWSHOT.RESIZE_RULE,
        )

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform for an image (H, W, C)."""
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, *self.shape(height, width))

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image after resizing."""
        return resized_shape(
            height, width, max_size=self.max_size, min_size=self.min_size, rule=self.rule
        )


@dataclass(frozen=True)
class SupportCrop:
    """Cut the example out of its image and resize it to fit a square canvas.

    Doing it twice changes nothing, so the mapper crops early (small tensors between processes) and a detector
    that gets a user's raw support crops it then.

    Attributes:
        size (int): side of the square canvas in pixels. min_size (int): of the rules with a minimum.
        rule (str): one of ``RESIZE_RULES``.
        context (int or None): None = the box alone (Siamese Mask R-CNN, paper 5.1). Otherwise a square window
            centred on the box, larger than its long side by this many pixels at both ends, black outside the image,
            fills the canvas (SPIL, spec B2); a support without a box is already such a window, but for the padding.
    """

    size: int
    min_size: int
    rule: str
    context: int | None = None

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "SupportCrop":
        """The support rule of a config."""
        node = cfg.FEWSHOT.SUPPORT
        return cls(
            size=node.SIZE,
            min_size=node.MIN_SIZE,
            rule=cfg.FEWSHOT.RESIZE_RULE,
            context=None if node.CONTEXT < 0 else node.CONTEXT,
        )

    def __call__(self, support: Support) -> Support:
        """Return the crop as a support without box, both sides at most ``size``."""
        image, mask = support.image, support.mask
        x0, y0, x1, y1 = self._window(support)
        image = _cut(image, x0, y0, x1, y1)
        mask = None if mask is None else _cut(mask, x0, y0, x1, y1)
        height, width = image.shape[1:]
        shape = resized_shape(
            height, width, max_size=self.size, min_size=self.min_size, rule=self.rule
        )
        if self.context is not None:
            shape = self.size, self.size
        if shape != (height, width):
            resize = T.ResizeTransform(height, width, *shape)
            image = _apply(resize.apply_image, image.permute(1, 2, 0)).permute(2, 0, 1)
            mask = None if mask is None else _apply(resize.apply_segmentation, mask.byte()).bool()
        return replace(support, image=image.contiguous(), box=None, mask=mask)

    def _window(self, support: Support) -> tuple[int, int, int, int]:
        """XYXY in whole pixels, end-exclusive and never empty, however thin the box is; may leave the image."""
        box = support.region
        x0, y0 = box[:2].floor().long().tolist()
        x1, y1 = box[2:].ceil().long().tolist()
        if self.context is None:
            return x0, y0, x1, y1
        margin = 0 if support.box is None else self.context
        side = max(x1 - x0, y1 - y0) + 2 * margin
        left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
        return left, top, left + side, top + side


def _cut(pixels: Tensor, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    """The window of a (..., H, W) image, zero outside of it."""
    height, width = pixels.shape[-2:]
    inside = pixels[..., max(y0, 0) : y1, max(x0, 0) : x1]
    padding = max(-x0, 0), max(x1 - width, 0), max(-y0, 0), max(y1 - height, 0)
    return F.pad(inside, padding) if any(padding) else inside


def _apply(transform, pixels: Tensor) -> Tensor:
    return torch.from_numpy(np.array(transform(pixels.numpy())))
