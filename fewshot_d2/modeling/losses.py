"""Losses: normalisers of detectron2 and of the original Siamese Mask R-CNN, hard examples, contrasts, ranked lists.

detectron2 divides sums of box losses by *all* sampled anchors or ROIs, the original by the positives x 4. Published
loss weights mean something only together with their own normalisers (spec 2.7), so both are here. All counts are
averaged over processes: then several processes give the gradient of one process with the same global batch.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

REDUCTIONS = ("detectron2", "original")
# Weight of the negative with the highest loss, relative to one at the margin (OS2D, paper 4).
_WEIGHT_RATIO = 1000.0
# Largest losses and weights below these are rounding.
_LEAST_LOSS, _LEAST_WEIGHT = 1e-5, 1e-8


def check_reduction(reduction: str) -> str:
    """Return ``reduction`` if it is one of ``REDUCTIONS``, else raise ``ValueError``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"loss reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def mean_over_ranks(count: float, device: torch.device) -> float:
    """The count itself in one process, its mean over all processes otherwise."""
    if comm.get_world_size() == 1:
        return float(count)
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return total.item() / comm.get_world_size()


def rpn_normalizers(
    reduction: str, *, num_slots: float, num_sampled: float, num_positive: float
) -> tuple[float, float]:
    """What the *sums* of the RPN's (classification, box) losses are divided by.

    Args:
        num_slots: images x anchors wanted an image. num_sampled: anchors really sampled, positive or negative.
        num_positive: positive ones among them.
    """
    if reduction == "original":
        return max(num_sampled, 1.0), max(4.0 * num_positive, 1.0)
    return max(num_slots, 1.0), max(num_slots, 1.0)


def roi_normalizers(
    reduction: str, *, num_slots: float, num_sampled: float, num_positive: float
) -> tuple[float, float]:
    """What the *sums* of the ROI heads' (classification, box) losses are divided by.

    In the original the classification mean runs over all slots, empty ones included (spec 2.6), and the box mean
    over positives x 4; in detectron2 both over the ROIs that were sampled.
    """
    if reduction == "original":
        return max(num_slots, 1.0), max(4.0 * num_positive, 1.0)
    return max(num_sampled, 1.0), max(num_sampled, 1.0)


def hardest_rois(losses: Tensor, counts: Sequence[int], keep: int) -> Tensor:
    """Online hard example mining: the ``keep`` ROIs of each image with the highest loss.

    Args:
        losses (Tensor[R]): of all images, one after another. counts: ROIs of each image.

    Returns:
        bool Tensor[R].
    """
    kept = torch.zeros_like(losses, dtype=torch.bool)
    for part, chosen in zip(losses.split(list(counts)), kept.split(list(counts)), strict=True):
        chosen[part.topk(min(keep, len(part))).indices] = True
    return kept


def hard_negatives(losses: Tensor, positive: Tensor, ratio: int) -> Tensor:
    """The negatives of each row with the highest loss, ``ratio`` for each of its positives (SSD).

    Args:
        losses (Tensor[P, A]), positive (bool[P, A]).

    Returns:
        bool Tensor[P, A]; nothing in a row without a positive.
    """
    wanted = (ratio * positive.sum(dim=1)).clamp(max=positive.shape[1] - 1)
    order = losses.masked_fill(positive, float("-inf")).argsort(dim=1, descending=True)
    return (order.argsort(dim=1) < wanted[:, None]) & ~positive


def support_contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE: example k of one must find example k of the other among all K.

    Both are centred on their common mean, as a matching by differences does not see a common offset.

    Args:
        first, second (Tensor[K, ...]): features of two examples of each of K classes.
        temperature: divides the cosine similarities.

    Returns:
        Tensor[]: zero would be every example found with certainty; log K is chance.
    """
    joined = torch.cat([first, second]).flatten(1)
    first, second = F.normalize(joined - joined.mean(dim=0), dim=1).chunk(2)
    similarity = first @ second.T / temperature
    own = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def hinges(
    scores: Tensor, fixed_scores: Tensor, labels: Tensor, margins: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Losses of positives and of negatives by themselves, half the distances to the margins (OS2D spec 1.12).

    Args:
        scores, fixed_scores (Tensor[...]): those of positives and those of negatives, whose gradient stops before
            the transformation. labels (int[...]): 1, 0, or -1 = ignored. margins: of positives and of negatives.

    Returns:
        Two tensors like ``scores``; zero where the label is another.
    """
    zero = scores.new_zeros(())
    positive = torch.where(labels == 1, 0.5 * (margins[0] - scores).clamp(min=0), zero)
    negative = torch.where(labels == 0, 0.5 * (fixed_scores - margins[1]).clamp(min=0), zero)
    return positive, negative


def contrastive_loss(
    positive: Tensor, negative: Tensor, labels: Tensor, *, negatives_per_positive: int = 3
) -> tuple[Tensor, Tensor]:
    """Squared hinges over the number of positives, with the hardest negatives of the whole batch alone (eq. 3).

    Args:
        positive, negative (Tensor[...]): of ``hinges``. labels (int[...]).

    Returns:
        Two scalars: loss of the positives and of the negatives; zero where there is no positive.
    """
    num_positive = (labels == 1).sum()
    squares = negative.flatten().square().sort(descending=True).values
    kept = torch.arange(len(squares), device=squares.device) < (
        negatives_per_positive * num_positive
    )
    count = num_positive.clamp(min=1)
    return positive.square().sum() / count, (squares * kept).sum() / count


def ranked_list_loss(
    positive: Tensor, negative: Tensor, labels: Tensor, classes: Tensor, *, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Hinges with weights that grow with the loss of a negative, each class with its own temperature (eq. 5 and 6).

    Args:
        positive, negative (Tensor[B]): of ``hinges``. labels (int64[B]).
        classes (int64[B]): 0..num_classes-1; all images of a class are weighted together (OS2D spec 2, item 3).
        num_classes: or more.

    Returns:
        Two scalars: mean over the positives that have a loss, and mean over the classes with a negative that has one
        of their weighted sums. Without a positive the latter is zero, as in the original.
    """
    first = positive.sum() / (positive > 0).sum().clamp(min=1)
    losses = negative.detach()
    largest = losses.new_zeros(num_classes).scatter_reduce(0, classes, losses, reduce="amax")
    counts = largest > _LEAST_LOSS
    # From 1 at the largest loss down to 1 / ratio at the margin, where the loss is zero.
    temperature = math.log(_WEIGHT_RATIO) / largest.clamp(min=_LEAST_LOSS)
    weights = ((losses - largest[classes]) * temperature[classes]).exp()
    weights = weights * ((losses > 0) & counts[classes])
    totals = losses.new_zeros(num_classes).index_add(0, classes, weights)
    weights = weights / (totals * counts.sum()).clamp(min=_LEAST_WEIGHT)[classes]
    weights = weights * (weights * (labels == 1).sum() > _LEAST_WEIGHT)
    return first, (weights * negative).sum()
