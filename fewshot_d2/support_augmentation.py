"""More examples out of the given ones: turned by quarters and mirrored, for any system (OS2D spec 1.15).

They are shots of the same class, so every system takes them as it takes several examples. Image, box and mask turn
together; without interpolation, so four quarter turns give the example back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode

from .structures import Support, SupportSet

QUARTERS = (90, 180, 270)


def rotated(support: Support, degrees: int) -> Support:
    """Turn an example counter-clockwise.

    Args:
        support: image (3, H, W), box XYXY in its pixels, mask (H, W).
        degrees: a multiple of 90.

    Returns:
        A new example; of a quarter turn the image is (3, W, H).

    Raises:
        ValueError: another angle.
    """
    if degrees % 90:
        raise ValueError(f"degrees must be a multiple of 90, got {degrees}")
    turns = degrees // 90 % 4
    box, width, height = support.box, support.image.shape[2], support.image.shape[1]
    for _ in range(turns if box is not None else 0):
        x0, y0, x1, y1 = box
        box = torch.stack([y0, width - x1, y1, width - x0])
        width, height = height, width
    image = torch.rot90(support.image, turns, (1, 2)).contiguous()
    mask = None if support.mask is None else torch.rot90(support.mask, turns).contiguous()
    return replace(support, image=image, box=box, mask=mask)


def mirrored(support: Support) -> Support:
    """An example with left and right exchanged."""
    box, width = support.box, support.image.shape[2]
    if box is not None:
        box = torch.stack([width - box[2], box[1], width - box[0], box[3]])
    mask = None if support.mask is None else support.mask.flip(-1)
    return replace(support, image=support.image.flip(-1), box=box, mask=mask)


@dataclass(frozen=True)
class SupportAugmentation:
    """Adds turned and mirrored examples to every class.

    Attributes:
        rotations (tuple[int, ...]): angles of ``QUARTERS``, counter-clockwise, that are added.
        mirror (bool): add the mirror image too, and its rotations.
    """

    rotations: tuple[int, ...] = ()
    mirror: bool = False

    def __post_init__(self) -> None:
        wrong = [angle for angle in self.rotations if angle not in QUARTERS]
        if wrong or len(set(self.rotations)) < len(self.rotations):
            raise ValueError(
                f"FEWSHOT.SUPPORT.ROTATIONS must be different ones of {QUARTERS}, got {self.rotations}"
            )

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "SupportAugmentation":
        """Read the keys."""
        node = cfg.FEWSHOT.SUPPORT
        return cls(tuple(node.ROTATIONS), node.MIRROR)

    def __call__(self, support_set: SupportSet) -> SupportSet:
        """The same classes, each with its own examples first, then the new ones; negatives are turned like others."""
        examples = [self.shots(shots) for shots in support_set.examples]
        return replace(support_set, examples=examples)

    def shots(self, shots: Sequence[Support]) -> list[Support]:
        """The examples of one class and those made of them."""
        upright = [*shots, *(mirrored(shot) for shot in shots if self.mirror)]
        turned = [rotated(shot, angle) for angle in self.rotations for shot in upright]
        return [*upright, *turned]
