"""Patches around the places where a detector errs most, for training (OS2D spec 1.14, hard-patch mining)."""

import torch
from torch import Tensor

from ...modeling.losses import hinges
from .geometry import STRIDE
from .matchers import Matches
from .objective import Objective, Targets
from .targets import POSITIVE

# Kinds of losses: a score of a negative, a score of a positive, a box of a positive.
NEGATIVE_SCORE, POSITIVE_SCORE, POSITIVE_BOX = 0, 1, 2


def hard_patches(
    objective: Objective,
    matches: Matches,
    targets: Targets,
    anchors: Tensor,
    classes: Tensor,
    *,
    image_size: tuple[int, int],
    patch_size: int,
) -> dict[str, Tensor]:
    """A patch for each place and kind of loss that is not zero; all of one query, without reduction.

    Args:
        matches, targets: of R class images. anchors (Tensor[n, 4]). classes (int64[R]): of each class image.
        image_size: (height, width) of the query. patch_size: side of the patches.

    Returns:
        "boxes" (Tensor[M, 4]): XYXY in pixels of the query, corners on the grid of cells, larger than the query where
        that is smaller; "losses" (Tensor[M]); "kind" (int64[M]): 0 negative, 1 positive, 2 box of
        a positive; "classes" (int64[M]).
    """
    positive, negative = hinges(
        matches.scores, matches.fixed_scores, targets.labels, objective.margins
    )
    of_boxes = torch.zeros_like(positive)
    of_boxes[targets.of_anchors == POSITIVE] = objective.localization(
        matches.boxes, anchors.expand_as(matches.boxes), targets
    ).to(of_boxes)
    losses = torch.stack([negative, positive, of_boxes])
    kind, image, place = (losses > 0).nonzero(as_tuple=True)
    return {
        "boxes": patches_around(anchors, image_size, patch_size)[place],
        "losses": losses[kind, image, place],
        "kind": kind,
        "classes": classes[image],
    }


def patches_around(anchors: Tensor, image_size: tuple[int, int], patch_size: int) -> Tensor:
    """Square patches (Tensor[n, 4]) with the anchors (Tensor[n, 4]) in the middle, as far as the image allows."""
    corner = (anchors[:, :2] + anchors[:, 2:] - patch_size) / 2
    limit = corner.new_tensor([image_size[1], image_size[0]]) - patch_size
    # On the grid of cells, so that the patch's map is a part of the image's.
    corner = (corner.minimum(limit) / STRIDE).floor() * STRIDE
    corner = corner.clamp(min=0)
    return torch.cat([corner, corner + patch_size], dim=1)
