"""Co-attention: masks of an instance from what query and examples have in common (paper 3.2, eq. 5 and 6).

Shapes: S examples of the instance, C,H,W query map and C,h,w example maps of one layer, B boxes in the query. Boxes
are XYXY in pixels of the network's image, whose size is (height, width).
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Instances
from torch import Tensor, nn

from ...modeling.co_localization import enlarged, first_component
from .lookalikes import set_lookalikes


def co_attention(
    query: Tensor, shots: Tensor, boxes: Tensor, stride: int, size: tuple[int, int]
) -> Tensor:
    """How much each pixel of the query belongs to what it has in common with the examples.

    The first component has no sign of its own: the boxes must have more of it than the rest (spec B3, item 24).
    Negative values are no attention, and the largest is 1 (item 25: scaled from least to most, three quarters of the
    background would be above the threshold).

    Args:
        query (Tensor[C, H, W]), shots (Tensor[S, C, h, w]): maps. boxes (Tensor[B, 4]): at least one.
        stride: pixels of a cell. size: of the query's image, without padding.

    Returns:
        Tensor[height, width]: in [0, 1].
    """
    # Cells of the padding show nothing.
    query = query[:, : math.ceil(size[0] / stride), : math.ceil(size[1] / stride)]
    points = torch.cat([query.flatten(1).T, shots.transpose(0, 1).flatten(1).T])
    component = first_component(points)
    projected = torch.einsum("chw,c->hw", query, component) - points.mean(dim=0) @ component
    inside = box_pixels(boxes, size).any(dim=0)
    pixels = enlarged(projected, stride, size)
    # A box around the whole image has no rest; zero is the mean of all.
    rest = pixels[~inside].mean() if not inside.all() else 0.0
    positive = (projected if pixels[inside].mean() >= rest else -projected).clamp(min=0)
    peak = positive.max()
    return enlarged(positive / peak if peak > 0 else positive, stride, size)


def box_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centres are in a box, bool[B, height, width]; of a thin box those next to its middle."""
    parts = []
    for axis, side in ((1, size[0]), (0, size[1])):
        centre = torch.arange(side, device=boxes.device) + 0.5
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        nearest = ((start + end) / 2).floor().clamp(0, side - 1) + 0.5
        parts.append((centre >= start) & (centre < end) | (centre == nearest))
    rows, columns = parts
    return rows[:, :, None] & columns[:, None, :]


def merged_superpixels(attention: Tensor, superpixels: Tensor, threshold: float) -> Tensor:
    """The superpixels whose mean attention is above ``threshold``, joined.

    Args:
        attention (Tensor[H, W]), superpixels (int64[H, W]): labels from 0 on.

    Returns:
        bool[H, W].
    """
    labels = superpixels.flatten()
    counts = torch.bincount(labels)
    sums = torch.bincount(labels, weights=attention.flatten().double())
    return (sums / counts.clamp(min=1) > threshold)[superpixels]


def pseudo_masks(attention: Tensor, selected: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Masks of the boxes' instances: selected superpixels in the box, or else its attentive pixels (items 28, 30).

    Args:
        attention (Tensor[H, W]), selected (bool[H, W]), boxes (Tensor[B, 4]).

    Returns:
        bool[B, H, W]: one without a pixel says nothing of the instance.
    """
    inside = box_pixels(boxes, tuple(attention.shape))
    masks, attentive = inside & selected, inside & (attention > threshold)
    return torch.where(masks.any(dim=(1, 2), keepdim=True), masks, attentive)


class CoAttention(nn.Module):
    """Labels targets with masks and look-alikes by the backbone as it was before training (spec B3, item 23).

    A backbone that is not trained serves itself; of another one a copy is kept, in checkpoints too, so that later
    stages compare with the same features.
    """

    def __init__(self, *, backbone: Backbone, layer: str, threshold: float):
        """Choose the trunk.

        Args:
            backbone: of the detector. layer: a map of it, or of its bottom-up where it is an FPN.
            threshold: of superpixels.

        Raises:
            ValueError: there is no such map.
        """
        super().__init__()
        source = getattr(backbone, "bottom_up", backbone)
        shapes = source.output_shape()
        if layer not in shapes:
            raise ValueError(f"SPIL.ATTENTION_LAYER must be one of {list(shapes)}, got {layer!r}")
        is_shared = source is backbone and not any(p.requires_grad for p in source.parameters())
        self.layer, self.stride, self.threshold = layer, shapes[layer].stride, threshold
        self.trunk = None if is_shared else copy.deepcopy(source).requires_grad_(False)
        self.register_buffer("_is_kept", torch.tensor(is_shared))

    @property
    def is_kept(self) -> bool:
        """Whether the trunk has the weights that it is to keep."""
        return bool(self._is_kept)

    def keep(self, backbone: Backbone) -> None:
        """Copy the weights of the detector's backbone, the first time only."""
        if not self.is_kept:
            self.trunk.load_state_dict(getattr(backbone, "bottom_up", backbone).state_dict())
            self._is_kept.fill_(True)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As of any module, but without a trunk that has yet to be copied.

        detectron2 matches files of ImageNet weights by the ends of names, which are the same in trunk and backbone, and
        refuses a file that fits both.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if not self.is_kept:
            for name in [name for name in state if name.startswith(f"{prefix}trunk.")]:
                del state[name]
        return state

    def train(self, mode: bool = True) -> "CoAttention":
        """Stay in inference mode: norms of the copy must not move."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor, maps: dict[str, Tensor]) -> Tensor:
        """The compared map of normalised images (Tensor[N, 3, H, W]); ``maps`` are the detector's own of them."""
        return (maps if self.trunk is None else self.trunk(images))[self.layer]

    @torch.no_grad()
    def label(
        self,
        target: Instances,
        query: Tensor,
        shots: Sequence[Tensor] | Tensor,
        superpixels: Tensor,
    ) -> None:
        """Set ``gt_masks`` and look-alikes of a target with at least one box.

        Args:
            target: ground truth of one pair. query (Tensor[C, H, W]), shots (Tensor[S, C, h, w]): of ``features``.
            superpixels (int64[height, width]): of the query's image.
        """
        boxes = target.gt_boxes.tensor
        attention = co_attention(query, shots, boxes, self.stride, target.image_size)
        selected = merged_superpixels(attention, superpixels, self.threshold)
        target.gt_masks = BitMasks(pseudo_masks(attention, selected, boxes, self.threshold))
        set_lookalikes(target, selected & ~box_pixels(boxes, target.image_size).any(dim=0))


class KeepTrunk(HookBase):
    """Gives co-attention its trunk once the weights that training starts from are loaded."""

    def __init__(self, attention: CoAttention, backbone: Backbone):
        """Take both."""
        self.attention, self.backbone = attention, backbone

    def before_train(self) -> None:
        """Copy unless an earlier stage or the interrupted run has done so."""
        self.attention.keep(self.backbone)
