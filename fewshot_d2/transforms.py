"""Resize rules of queries and supports, and the support crop; used by the mapper and by the detectors alike.

Two rules (spec section 2.3): ``paper`` scales the long side to the given size; ``code`` never shrinks except to fit
the maximum and enlarges only until the short side reaches the minimum, as the original implementation does.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from .structures import Support

RESIZE_RULES = ("paper", "code")


def resized_shape(
    height: int, width: int, *, max_size: int, min_size: int, rule: str
) -> tuple[int, int]:
    """(height, width) after the resize rule; each side is at least one pixel.

    Raises:
        ValueError: unknown ``rule``.
    """
    long_side, short_side = max(height, width), min(height, width)
    if rule == "paper":
        scale = max_size / long_side
    elif rule == "code":
        scale = max(1.0, min_size / short_side)
        if round(long_side * scale) > max_size:
            scale = max_size / long_side
    else:
        raise ValueError(f"resize rule must be one of {RESIZE_RULES}, got {rule!r}")
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
        new_height, new_width = resized_shape(
            height, width, max_size=self.max_size, min_size=self.min_size, rule=self.rule
        )
        return T.ResizeTransform(height, width, new_height, new_width)


@dataclass(frozen=True)
class SupportCrop:
    """Cut the example out of its image and resize it to fit a square canvas (paper 5.1, reference image).

    Doing it twice changes nothing, so the mapper crops early (small tensors between processes) and a detector
    that gets a user's raw support crops it then.

    Attributes:
        size (int): side of the square canvas in pixels. min_size (int): of the ``code`` rule.
        rule (str): one of ``RESIZE_RULES``.
    """

    size: int
    min_size: int
    rule: str

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "SupportCrop":
        """The support rule of a config."""
        return cls(
            size=cfg.FEWSHOT.SUPPORT.SIZE,
            min_size=cfg.FEWSHOT.SUPPORT.MIN_SIZE,
            rule=cfg.FEWSHOT.RESIZE_RULE,
        )

    def __call__(self, support: Support) -> Support:
        """Return the crop as a support without box, both sides at most ``size``."""
        image, mask = support.image, support.mask
        if support.box is not None:
            # Integer, end-exclusive and never empty, however thin the box is.
            x0, y0 = support.box[:2].floor().long().tolist()
            x1, y1 = support.box[2:].ceil().long().tolist()
            image = image[:, y0:y1, x0:x1]
            mask = None if mask is None else mask[y0:y1, x0:x1]
        height, width = image.shape[1:]
        shape = resized_shape(
            height, width, max_size=self.size, min_size=self.min_size, rule=self.rule
        )
        if shape != (height, width):
            resize = T.ResizeTransform(height, width, *shape)
            image = _apply(resize.apply_image, image.permute(1, 2, 0)).permute(2, 0, 1)
            mask = None if mask is None else _apply(resize.apply_segmentation, mask.byte()).bool()
        return replace(support, image=image.contiguous(), box=None, mask=mask)


def _apply(transform, pixels: Tensor) -> Tensor:
    return torch.from_numpy(np.array(transform(pixels.numpy())))
