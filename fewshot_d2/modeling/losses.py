"""Losses: normalisers of detectron2 and of the original Siamese Mask R-CNN, hard examples, a contrast of supports.

detectron2 divides sums of box losses by *all* sampled anchors or ROIs, the original by the positives x 4. Published
loss weights mean something only together with their own normalisers (spec 2.7), so both are here. All counts are
averaged over processes: then several processes give the gradient of one process with the same global batch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

REDUCTIONS = ("detectron2", "original")


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
