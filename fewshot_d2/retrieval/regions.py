"""Regions of an image that may hold an instance, and one vector for each.

Boxes are XYXY in pixels of the network's input here. A region source is called on one image (Tensor[3, H, W],
normalised) and returns Tensor[R, 4]; the last region always is the whole image.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes, roi_align

from .excitation import ExcitationRule, excite


def describe_regions(
    features: Tensor, boxes: Tensor, stride: float, *, power: float = 1.0
) -> Tensor:
    """Mean of a map inside each box, with L2 norm 1.

    Args:
        features (Tensor[N, C, h, w]): of one image, or of one for each box (N = R).
        boxes (Tensor[R, 4]): XYXY in pixels of the network's input, each with an area.
        stride: pixels of the network's input in a cell.
        power: of the generalised mean (mean of x^p)^(1/p) of the positive part (GeM); 1 = the mean of all.

    Returns:
        Tensor[R, C]; zero where the map is zero in the whole box.

    Raises:
        ValueError: wrong shape, a box without area or a power below 1.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"boxes must be XYXY [R, 4] with an area, got {boxes.tolist()}")
    if features.dim() != 4 or len(features) not in (1, len(boxes)):
        raise ValueError(
            f"features must be of one image [1, C, h, w] or one for each of {len(boxes)} boxes, "
            f"got {list(features.shape)}"
        )
    if power < 1:
        raise ValueError(f"power must be at least 1, got {power}")
    of_image = [boxes] if len(features) == 1 else boxes.split(1)
    if power != 1:
        features = features.clamp(min=0) ** power
    pooled = roi_align(features, [b.to(features) for b in of_image], 1, 1 / stride, aligned=True)
    return F.normalize(pooled.flatten(1) ** (1 / power), dim=1)


class SalientRegions:
    """Boxes around what makes the strongest places of the last map respond; needs no training and no classes.

    After DASR (arXiv 2002.00185), whose constants are not published: each seed is a peak of the last map, its
    excitation goes back to a fine map, and the connected part there that holds the seed gives the box.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        fine: str = "res2",
        last: str = "res5",
        num_seeds: int = 8,
        thresholds: Sequence[float] = (0.2,),
        smoothing: float = 1.0,
        nms_iou: float = 0.5,
    ):
        """Take a detectron2 backbone in eval mode.

        Args:
            fine, last: names of its maps. num_seeds: at most, strongest first.
            thresholds: share of the excitation's maximum that belongs to the region; of several, each gives one.
            smoothing: sigma in cells of the fine map; without it strided convolutions leave a grid that cuts regions
                into specks. 0 for none.
            nms_iou: a region that overlaps one of a stronger seed, or of an earlier threshold, by more is dropped.

        Raises:
            ValueError: the backbone has no such map, or a threshold is not between 0 and 1.
        """
        shapes = backbone.output_shape()
        if not {fine, last} <= shapes.keys():
            raise ValueError(f"maps must be among {sorted(shapes)}, got {fine!r} and {last!r}")
        if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds must be above 0 and at most 1, got {list(thresholds)}")
        self._backbone, self._fine, self._last = backbone, fine, last
        self._strides = shapes[fine].stride, shapes[last].stride
        self._num_seeds, self._nms_iou = num_seeds, nms_iou
        self._thresholds, self._smoothing = tuple(thresholds), smoothing

    def __call__(self, image: Tensor) -> Tensor:
        """Image (Tensor[3, H, W], normalised) -> boxes (Tensor[R, 4]), strongest seed first, whole image last."""
        with torch.enable_grad(), ExcitationRule():
            maps = self._backbone(image.detach()[None].requires_grad_())
        fine, last = maps[self._fine], maps[self._last]
        activation = last[0].detach().clamp(min=0)
        seeds, strengths = find_seeds(activation.sum(dim=0), self._num_seeds)
        if not len(seeds):
            return _best_and_whole(image.new_zeros(0, 4), strengths, image, 1.0, 0)
        energy = excite(last, fine, _starts(activation, seeds)).sum(dim=1)
        places = (seeds + 0.5) * (self._strides[1] / self._strides[0]) - 0.5
        boxes = self._boxes(energy.cpu().numpy(), places.cpu().numpy()).to(image)
        strengths = strengths.repeat_interleave(len(self._thresholds))
        return _best_and_whole(boxes, strengths, image, self._nms_iou, len(boxes))

    def _boxes(self, energy: np.ndarray, places: np.ndarray) -> Tensor:
        """Energy maps (float[S, h, w]) and seeds (float[S, 2], row and column there) -> Tensor[S * T, 4]."""
        if self._smoothing:
            energy = ndimage.gaussian_filter(energy, (0, self._smoothing, self._smoothing))
        cells = [
            seed_box(e, p, threshold)
            for e, p in zip(energy, places, strict=True)
            for threshold in self._thresholds
        ]
        return torch.tensor(cells, dtype=torch.float32) * self._strides[0]


class ProposalRegions:
    """The best boxes of any proposal generator, such as a class-agnostic RPN."""

    def __init__(
        self,
        propose: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        num_regions: int = 32,
        nms_iou: float = 0.5,
    ):
        """Take the generator.

        Args:
            propose: image (Tensor[3, H, W], normalised) -> boxes (Tensor[P, 4]) and scores (Tensor[P]).
            num_regions: at most, the whole image not counted. nms_iou: as of ``SalientRegions``.
        """
        self._propose, self._num_regions, self._nms_iou = propose, num_regions, nms_iou

    def __call__(self, image: Tensor) -> Tensor:
        """Image (Tensor[3, H, W], normalised) -> boxes (Tensor[R, 4]), best first, whole image last.

        Raises:
            ValueError: the generator's boxes and scores do not fit each other.
        """
        boxes, scores = self._propose(image)
        if boxes.shape != (len(scores), 4):
            raise ValueError(
                f"proposals must be boxes [P, 4] and scores [P], "
                f"got {list(boxes.shape)} and {list(scores.shape)}"
            )
        boxes, scores = boxes.detach().to(image), scores.detach().to(image)
        return _best_and_whole(boxes, scores, image, self._nms_iou, self._num_regions)


def find_seeds(strength: Tensor, num_seeds: int) -> tuple[Tensor, Tensor]:
    """The highest of a map's 3x3 maxima that are above its median.

    Args:
        strength (Tensor[H, W]).

    Returns:
        (int64[S, 2] rows and columns, Tensor[S] strengths), highest first; of equal ones the first in the map.
    """
    around = F.max_pool2d(strength[None], 3, stride=1, padding=1)[0]
    seeds = ((strength == around) & (strength > strength.median())).nonzero()
    strengths = strength[seeds[:, 0], seeds[:, 1]]
    order = strengths.argsort(descending=True, stable=True)[:num_seeds]
    return seeds[order], strengths[order]


def seed_box(
    energy: np.ndarray, place: np.ndarray, threshold: float
) -> tuple[float, float, float, float]:
    """The box of the 8-connected part of a map, of at least ``threshold`` x its maximum, that holds a place.

    A place outside takes the part with the highest sum: excitation may lie beside its seed.

    Args:
        energy (float[h, w]), place (float[2]): row and column, cell centres being whole numbers.

    Returns:
        XYXY in cells, the last row and column included; (0, 0, 0, 0) if the map is not positive anywhere.
    """
    if not energy.max() > 0:
        return 0.0, 0.0, 0.0, 0.0
    parts, number = ndimage.label(energy >= threshold * energy.max(), np.ones((3, 3)))
    row, column = np.clip(np.rint(place).astype(int), 0, np.array(energy.shape) - 1)
    part = parts[row, column]
    if not part:
        part = 1 + np.argmax(ndimage.sum(energy, parts, np.arange(1, number + 1)))
    rows, columns = ndimage.find_objects(parts)[part - 1]
    return float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)


def _starts(activation: Tensor, seeds: Tensor) -> Tensor:
    """All channels at each seed, in proportion to their activation (Tensor[C, H, W]); each start sums to 1."""
    starts = activation.new_zeros(len(seeds), *activation.shape)
    numbers = torch.arange(len(seeds), device=seeds.device)
    values = activation[:, seeds[:, 0], seeds[:, 1]].T
    starts[numbers, :, seeds[:, 0], seeds[:, 1]] = values / values.sum(dim=1, keepdim=True)
    return starts


def _best_and_whole(
    boxes: Tensor, scores: Tensor, image: Tensor, nms_iou: float, number: int
) -> Tensor:
    """The best ``number`` boxes (Tensor[P, 4]) that are left by NMS inside the image, best first; whole image last."""
    height, width = image.shape[1:]
    boxes = clip_boxes_to_image(boxes, (height, width))
    kept = remove_small_boxes(boxes, 1)
    boxes, scores = boxes[kept], scores[kept]
    best = boxes[nms(boxes, scores, nms_iou)[:number]]
    return torch.cat([best, boxes.new_tensor([[0, 0, width, height]])])
