"""What is compared with what: class maps with queries, aligned (V1, V2) or as sliding windows (paper 3 and 6.2).

A matcher turns the map of a class image into tensors of one shape, whatever the image's is, and these and the maps of
queries into scores and boxes. R class images, N queries, M cells, n = H W places row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling.matching import dense_correlation, resample_channels, unit_vectors
from . import geometry
from .geometry import BORDER, IDENTITY, SIDE, STRIDE
from .transform_net import TransformNet

# Added to the length of features before they are divided by it.
_EPSILON = 1e-5
# Cells that a sliding window keeps. Windows less than 25 times as long as wide have fewer behind their borders.
_WINDOW_CELLS = 144


@dataclass
class Matches:
    """What R class images have at the n places of their queries.

    Attributes:
        scores, fixed_scores (Tensor[R, n]): cosines; the same numbers, the latter without gradient to the alignment.
        boxes (Tensor[R, n, 4]): XYXY in pixels of the network's image, not clipped.
        corners (Tensor[R, n, 8]): x, y of the class image's top left, top right, bottom left and bottom right there.
    """

    scores: Tensor
    fixed_scores: Tensor
    boxes: Tensor
    corners: Tensor


def unit_maps(features: Tensor) -> Tensor:
    """Maps (Tensor[N, C, H, W]) in full precision with cells of length one; the same for queries and class images."""
    return unit_vectors(features.float(), dim=1, epsilon=_EPSILON)


class AlignedMatcher(nn.Module):
    """OS2D, or, without a transformation, the sliding window "square"."""

    tensors = ("cells",)

    def __init__(self, *, form: str, inverse: bool, is_norm_frozen: bool):
        """Choose the transformation.

        Args:
            form: one of ``geometry.IDENTITY``; "none" aligns nothing.
            inverse: whether it leads from the query to the class image and is to be inverted (V2).
            is_norm_frozen: of ``TransformNet``.
        """
        super().__init__()
        self.inverse = inverse
        self.transform_net = None
        if form != "none":
            self.transform_net = TransformNet(form=form, is_norm_frozen=is_norm_frozen)

    def encode(self, features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps of class images of one size (Tensor[B, C, h, w]) -> {"cells": Tensor[B, 225, C]}, unit vectors.

        Args:
            size: (height, width) of the images; says nothing here, maps are resized to squares.
        """
        resized = F.interpolate(features.float(), (SIDE, SIDE), mode="bilinear", align_corners=True)
        cells = unit_maps(resized)
        # Column by column, as the weights of the original's TransformNet expect the channels.
        return {"cells": cells.permute(0, 3, 2, 1).flatten(1, 2)}

    def forward(
        self, images: dict[str, Tensor], features: Tensor, counts: Sequence[int]
    ) -> Matches:
        """Match.

        Args:
            images: of ``encode``, R rows, those of the first query first.
            features (Tensor[N, C, H, W]): of ``unit_maps`` of the queries. counts: class images of each query.
        """
        correlation = dense_correlation(images["cells"], features, counts)
        parameters = self._alignment(correlation)
        size = tuple(features.shape[2:])
        # Places must be exact, also where the rest is in half precision.
        with torch.autocast(features.device.type, enabled=False):
            matrices = geometry.to_matrices(parameters.float().flatten(2), inverse=self.inverse)
            scores, fixed_scores = self._scores(correlation.float(), matrices)
            return Matches(
                scores,
                fixed_scores,
                geometry.to_boxes(matrices, size),
                geometry.to_corners(matrices, size),
            )

    def _alignment(self, correlation: Tensor) -> Tensor:
        if self.transform_net is not None:
            return self.transform_net(correlation)
        identity = correlation.new_tensor(IDENTITY["simple"])
        rows, _, height, width = correlation.shape
        return identity[:, None, None].expand(rows, -1, height, width)

    def _scores(self, correlation: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Scores twice, Tensor[R, n]; in inference they are one tensor."""
        inner = geometry.inner_points(correlation.device)
        points = geometry.template_points(correlation.device)[inner]
        places = geometry.sampled_places(matrices, points, tuple(correlation.shape[2:]))
        # A view: picked channels would cost a sort in the backward pass of CUDA.
        square = correlation.unflatten(1, (SIDE, SIDE))
        kept = slice(BORDER, SIDE - BORDER)
        maps = square[:, kept, kept].flatten(1, 2)
        scores = resample_channels(maps, places).mean(dim=1)
        if not torch.is_grad_enabled():
            return scores, scores
        return scores, resample_channels(maps, places.detach()).mean(dim=1)


class WindowMatcher(nn.Module):
    """The sliding window "target AR": the class map as it is, at every place of the query (paper 6.2).

    Resolved here, as nothing is published: the border of two cells is left out as far as the map has more, a map of an
    even number of cells is half a cell off its place, and its box with it; the box is as large as the class image.
    """

    tensors = ("cells", "offsets", "weights", "extents")

    def encode(self, features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps of class images of one size (Tensor[B, C, h, w]) -> tensors of one shape.

        Args:
            size: (height, width) of the images.

        Returns:
            "cells" (Tensor[B, 144, C]): unit vectors; "offsets" (Tensor[B, 144, 2]): x, y in cells from the place;
            "weights" (Tensor[B, 144]): of the mean, 0 = no cell; "extents" (Tensor[B, 4]): of the box, pixels from
            the corner of the place's cell.
        """
        height, width = features.shape[2:]
        cells = unit_maps(features)
        rows, columns = (
            torch.arange(side, device=cells.device)[_without_border(side)]
            for side in (height, width)
        )
        chosen = torch.cartesian_prod(rows, columns)
        # Of a very long window evenly chosen cells stand for all.
        kept = torch.linspace(0, len(chosen) - 1, min(len(chosen), _WINDOW_CELLS)).round().long()
        chosen = chosen[kept.to(chosen.device)]
        missing = _WINDOW_CELLS - len(chosen)
        values = cells[:, :, chosen[:, 0], chosen[:, 1]].transpose(1, 2)
        offsets = chosen.flip(1) - chosen.new_tensor([width // 2, height // 2])
        weights = F.pad(cells.new_full((len(chosen),), 1 / len(chosen)), (0, missing))
        left, top = -(width // 2) * STRIDE, -(height // 2) * STRIDE
        extent = cells.new_tensor([left, top, left + size[1], top + size[0]])
        return {
            "cells": F.pad(values, (0, 0, 0, missing)),
            "offsets": F.pad(offsets.float(), (0, 0, 0, missing)).expand(len(cells), -1, -1),
            "weights": weights.expand(len(cells), -1),
            "extents": extent.expand(len(cells), -1),
        }

    def forward(
        self, images: dict[str, Tensor], features: Tensor, counts: Sequence[int]
    ) -> Matches:
        """Match; arguments as of ``AlignedMatcher``."""
        correlation = dense_correlation(images["cells"], features, counts).float()
        height, width = correlation.shape[2:]
        place = geometry.centres(height, width, features.device) - 0.5
        last = place.new_tensor([max(width - 1, 1), max(height - 1, 1)])
        places = (place + images["offsets"][:, :, None]) * 2 / last - 1
        samples = resample_channels(correlation, places)
        scores = (samples * images["weights"][:, :, None]).sum(dim=1)
        boxes = STRIDE * place.repeat(1, 2) + images["extents"][:, None]
        corners = boxes[:, :, [0, 1, 2, 1, 0, 3, 2, 3]]
        return Matches(scores, scores, boxes, corners)


def _without_border(side: int) -> slice:
    """All but two cells at both ends, or as many as leave one."""
    border = min(BORDER, (side - 1) // 2)
    return slice(border, side - border)
