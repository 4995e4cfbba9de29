"""From matches on the levels of a pyramid to detections of a query (OS2D spec 1.10)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from .geometry import ANCHOR
from .matchers import Matches
from .targets import BOX_CODER

# The limit of the box coding: no box is wider or higher.
_LONGEST = ANCHOR * math.exp(BOX_CODER.scale_clamp)


@dataclass
class Candidates:
    """Boxes before NMS.

    Attributes:
        boxes (Tensor[B, 4]), corners (Tensor[B, 8]): pixels of the query as it was given by its user.
        scores (Tensor[B]). classes (int64[B]): 0..K-1.
        images (int64[B]): numbers of the class images, which ascend with the classes.
    """

    boxes: Tensor
    corners: Tensor
    scores: Tensor
    classes: Tensor
    images: Tensor

    def __getitem__(self, index: Tensor) -> "Candidates":
        """Some of them."""
        return Candidates(*(tensor[index] for tensor in vars(self).values()))

    @classmethod
    def none(cls, device: torch.device) -> "Candidates":
        """Not one."""
        shapes = (0, 4), (0, 8), (0,)
        tensors = (torch.zeros(shape, device=device) for shape in shapes)
        numbers = (torch.zeros(0, dtype=torch.int64, device=device) for _ in range(2))
        return cls(*tensors, *numbers)

    @staticmethod
    def cat(parts: Sequence["Candidates"]) -> "Candidates":
        """Join."""
        return Candidates(
            *(
                torch.cat(tensors)
                for tensors in zip(*(vars(p).values() for p in parts), strict=True)
            )
        )


@dataclass(frozen=True)
class Merging:
    """How candidates become detections.

    Attributes:
        score_threshold, iou_threshold: what is above is left out or suppressed. chunk: boxes in NMS at once, 0 = all.
        before, after: best boxes a class before and after NMS, 0 = all.
    """

    score_threshold: float
    iou_threshold: float
    chunk: int
    before: int
    after: int

    def candidates(
        self,
        matches: Matches,
        classes: Tensor,
        images: Tensor,
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> Candidates:
        """The boxes of a level, clipped to its image; without empty and unlikely ones.

        Args:
            matches: of R class images. classes, images (int64[R]): class and number of each class image.
            size, original: (height, width) of the level's image and of the query.
        """
        boxes = Boxes(_limited(matches.boxes).flatten(0, 1).float())
        boxes.clip(size)
        scores = matches.scores.flatten().float()
        kept = (boxes.nonempty() & (scores > self.score_threshold)).nonzero()[:, 0]
        ratio = boxes.tensor.new_tensor([original[1] / size[1], original[0] / size[0]])
        image = kept // matches.scores.shape[1]
        return Candidates(
            boxes.tensor[kept] * ratio.repeat(2),
            matches.corners.flatten(0, 1)[kept] * ratio.repeat(4),
            scores[kept],
            classes[image],
            images[image],
        )

    def survivors(self, candidates: Candidates) -> Candidates:
        """What NMS class by class leaves; of each class all candidates must be there.

        In chunks of NMS class image follows class image, each with its levels, as in the original.
        """
        order = candidates.images.argsort(stable=True)
        _, counts = candidates.classes[order].unique_consecutive(return_counts=True)
        # One class's boxes say nothing of another's: joint NMS with shifted boxes would round them.
        kept = [self._best(candidates, rows) for rows in order.split(counts.tolist())]
        return candidates[torch.cat(kept)] if kept else candidates

    @staticmethod
    def detections(found: Candidates, image_size: tuple[int, int]) -> Instances:
        """Survivors as detectron2 has them, best scores first.

        Args:
            image_size: (height, width) of the query.

        Returns:
            Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_corners`` (Tensor[B, 8]).
        """
        found = found[found.scores.argsort(descending=True, stable=True)]
        return Instances(
            image_size,
            pred_boxes=Boxes(found.boxes),
            scores=found.scores,
            pred_classes=found.classes,
            pred_corners=found.corners,
        )

    def _best(self, candidates: Candidates, rows: Tensor) -> Tensor:
        """Those of the rows that NMS leaves."""
        scores = candidates.scores[rows]
        if self.before and len(rows) > self.before:
            best = scores.topk(self.before).indices.sort().values
            rows, scores = rows[best], scores[best]
        kept = rows[chunked_nms(candidates.boxes[rows], scores, self.iou_threshold, self.chunk)]
        if self.after:
            kept = kept[candidates.scores[kept].argsort(descending=True, stable=True)[: self.after]]
        return kept


def chunked_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, chunk: int) -> Tensor:
    """NMS in chunks in the given order, then of the survivors, until one chunk is left or nothing goes.

    Args:
        boxes (Tensor[B, 4]), scores (Tensor[B]). chunk: boxes at once; 0 = all, plain NMS.

    Returns:
        int64[survivors].
    """
    kept = torch.arange(len(boxes), device=boxes.device)
    while True:
        parts = kept.split(chunk or max(len(kept), 1))
        survivors = torch.cat(
            [part[nms(boxes[part], scores[part], iou_threshold)] for part in parts]
        )
        if len(parts) <= 1 or len(survivors) == len(kept):
            return survivors
        kept = survivors


def _limited(boxes: Tensor) -> Tensor:
    """Boxes (Tensor[..., 4]) at most as large as the box coding can say, about their centres."""
    sides = boxes[..., 2:] - boxes[..., :2]
    excess = (sides - _LONGEST).clamp(min=0) / 2
    return boxes + torch.cat([excess, -excess], dim=-1)
