"""Siamese Mask R-CNN (Michaelis et al., "One-Shot Instance Segmentation").

One backbone sees query and supports (4.2); each pyramid level is matched with the pooled support by absolute
difference, concatenation and a 1x1 convolution to 384 channels (4.3, appendix 1.2); RPN, box and mask heads then
see the matched pyramid only and tell match from no match (4.4). C channels of the FPN, D = 384 matched channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..modeling.detector import FewShotDetector, Pairs
from ..modeling.matching import absolute_difference, average_pool, mean_over_shots
from ..structures import SupportFeatures, SupportSet

_LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")


def add_config(cfg: CfgNode) -> None:
    """Keys of this system; MODEL.MATCH also serves other systems with match heads."""
    cfg.MODEL.MATCH = CfgNode()
    # Channels after matching; 3 / 2 of the FPN's 256 in the paper.
    cfg.MODEL.MATCH.CHANNELS = 384
    # Pool a support over its own cells only, not over the padding of its canvas.
    cfg.MODEL.MATCH.POOL_VALID_ONLY = False
    # "detectron2" or "original": what loss sums are divided by.
    cfg.MODEL.MATCH.LOSS_REDUCTION = "detectron2"
    # Weights of RPN class, RPN box, ROI class, ROI box and mask loss. Paper 5.1, for its own reduction:
    # 2, 0.1, 2, 0.5, 1.
    cfg.MODEL.MATCH.LOSS_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)
    # Boxes of this size in pixels are pooled from p4, half of it from p3, ... The level is rounded down;
    # 224 / sqrt(2) rounds it, as the original does. Small images need a smaller one.
    cfg.MODEL.MATCH.CANONICAL_BOX_SIZE = 224.0
    # "fill" up to ROI_HEADS.BATCH_SIZE_PER_IMAGE, or "proportional" to the positives (original).
    cfg.MODEL.MATCH.NEGATIVES = "fill"
    # Top-k and NMS of proposals over all levels together (original).
    cfg.MODEL.MATCH.JOINT_PROPOSALS = False


@dataclass
class SplitMap:
    """A matched map x = W1 P + b + W2 D, D = |P - r|, before the RPN's convolution is applied to it.

    Both convolutions are linear, so what they make of the first part is computed once a query, and of the second
    with one kernel from C channels instead of two over D channels.

    Attributes:
        query_hidden (Tensor[P, hidden, H, W]): convolution of W1 P + b, without activation.
        difference (Tensor[P, C, H, W]): |P - r|.
        kernel (Tensor[hidden, C, 3, 3]): the RPN's convolution after W2.
    """

    query_hidden: Tensor
    difference: Tensor
    kernel: Tensor

    @property
    def shape(self) -> torch.Size:
        """As a tensor's; anchors are placed by its last two numbers."""
        return self.difference.shape

    def hidden(self, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Tensor[P, hidden, H, W]: the RPN's hidden map of every pair."""
        of_difference = F.conv2d(self.difference, self.kernel, padding=1)
        return activation(of_difference.add_(self.query_hidden))


@dataclass
class SharedQueries:
    """What all classes searched in a batch of queries have in common; {level: ...}.

    Attributes:
        pyramid (Tensor[N, C, H, W]): P.
        half (Tensor[N, D, H, W]): W1 P + b.
        hidden (Tensor[N, hidden, H, W]), kernels (Tensor[hidden, C, 3, 3]): see ``SplitMap``; empty where
            there are too few classes to gain by them.
    """

    pyramid: dict[str, Tensor]
    half: dict[str, Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)
    kernels: dict[str, Tensor] = field(default_factory=dict)


class PyramidMatching(nn.Module):
    """W [P, |P - r|] + b on every level, each with its own W = [W1, W2] and b."""

    def __init__(self, *, levels: Sequence[str], in_channels: int, out_channels: int):
        """One 1x1 convolution a level, from 2 C to D channels."""
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.reduce = nn.ModuleDict(
            {level: nn.Conv2d(2 * in_channels, out_channels, 1) for level in levels}
        )
        for convolution in self.reduce.values():
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def is_worth_sharing(self, classes: float) -> bool:
        """Whether the RPN's share saves more than it costs: C channels once, D - C less for each class."""
        return classes * (self.out_channels - self.in_channels) > self.in_channels

    def share(self, pyramid: dict[str, Tensor], rpn_conv: nn.Conv2d | None = None) -> SharedQueries:
        """Compute the parts that do not depend on a class; with ``rpn_conv`` also its share."""
        shared = SharedQueries(pyramid, {})
        for level, conv in self.reduce.items():
            first, second = conv.weight.split(self.in_channels, dim=1)
            shared.half[level] = F.conv2d(pyramid[level], first, conv.bias)
            if rpn_conv is not None:
                shared.hidden[level] = _convolved_sum(pyramid[level], first, conv.bias, rpn_conv)
                shared.kernels[level] = _composed(rpn_conv.weight, second)
        return shared

    def forward(
        self, shared: SharedQueries, vectors: dict[str, Tensor], pairs: Pairs
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | SplitMap]]:
        """Match the pairs; vectors {level: Tensor[K, C]}.

        Returns:
            The matched pyramid {level: Tensor[P, D, H, W]}, and the same as the RPN takes it.
        """
        matched, for_rpn = {}, {}
        for level, conv in self.reduce.items():
            difference = absolute_difference(
                pairs.of_query(shared.pyramid[level]), vectors[level][pairs.support]
            )
            of_support = F.conv2d(difference, conv.weight[:, self.in_channels :])
            # In place: these maps are large, and writing new ones costs as much as filling them.
            matched[level] = of_support.add_(pairs.of_query(shared.half[level]))
            for_rpn[level] = matched[level]
            if level in shared.hidden:
                hidden = pairs.of_query(shared.hidden[level])
                for_rpn[level] = SplitMap(hidden, difference, shared.kernels[level])
        return matched, for_rpn


def _composed(outer: Tensor, inner: Tensor) -> Tensor:
    """Kernel (O, C, 3, 3) of a 1x1 convolution (D, C, 1, 1) followed by a 3x3 one (O, D, 3, 3)."""
    return torch.einsum("odhw,dc->ochw", outer, inner[:, :, 0, 0])


def _convolved_sum(features: Tensor, weight: Tensor, bias: Tensor, rpn_conv: nn.Conv2d) -> Tensor:
    """The RPN's convolution of W F + b, on F's own fewer channels.

    The padding is of W F + b and not of F: b is a channel of ones, which the padding ends as it must.
    """
    ones = torch.ones_like(features[:, :1])
    kernel = _composed(rpn_conv.weight, torch.cat([weight, bias[:, None, None, None]], dim=1))
    return F.conv2d(torch.cat([features, ones], dim=1), kernel, rpn_conv.bias, padding=1)


@META_ARCH_REGISTRY.register()
class SiameseMaskRCNN(FewShotDetector):
    """Matched-FPN Mask R-CNN, figure 2 and 3 of the paper."""

    @configurable
    def __init__(
        self,
        *,
        matching: PyramidMatching,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        pool_valid_only: bool,
        loss_weights: Sequence[float],
        **kwargs: Any,
    ):
        """Add to the shell the matching, the heads on D channels, and the five loss weights."""
        super().__init__(**kwargs)
        self.matching = matching
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.pool_valid_only = pool_valid_only
        self.loss_weights = dict(zip(_LOSSES, loss_weights, strict=True))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        parts = super().from_config(cfg)
        shapes = parts["backbone"].output_shape()
        channels = cfg.MODEL.MATCH.CHANNELS
        matched = {
            level: ShapeSpec(channels=channels, stride=shape.stride)
            for level, shape in shapes.items()
        }
        return {
            **parts,
            "matching": PyramidMatching(
                levels=list(shapes),
                in_channels=next(iter(shapes.values())).channels,
                out_channels=channels,
            ),
            "proposal_generator": build_proposal_generator(cfg, matched),
            "roi_heads": build_roi_heads(cfg, matched),
            "pool_valid_only": cfg.MODEL.MATCH.POOL_VALID_ONLY,
            "loss_weights": cfg.MODEL.MATCH.LOSS_WEIGHTS,
        }

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """One pooled vector a class and level: {level: Tensor[K, C]}."""
        images, sizes, num_shots = self.preprocess_supports(support_sets)
        vectors = {}
        for level, features in self.backbone(images).items():
            valid = self._valid_cells(sizes, features) if self.pool_valid_only else None
            vectors[level] = mean_over_shots(average_pool(features, valid), num_shots)
        return self.support_features(vectors, support_sets)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Losses in training, ``[{"instances": Instances}]`` in inference; see ``structures``."""
        queries = self.preprocess(batched_inputs)
        support, pairs = self.gather_supports(batched_inputs)
        pyramid = self.backbone(queries.tensor)
        if not self.training:
            return self.inference(batched_inputs, queries, pyramid, support, pairs)
        matched, for_rpn = self.matching(self.matching.share(pyramid), support.tensors, pairs)
        images, targets = pairs.images(queries), pairs.targets(batched_inputs, self.device)
        proposals, rpn_losses = self.proposal_generator(images, for_rpn, targets)
        _, roi_losses = self.roi_heads(images, matched, proposals, targets)
        losses = {**rpn_losses, **roi_losses}
        return {name: self.loss_weights[name] * loss for name, loss in losses.items()}

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        queries: ImageList,
        pyramid: dict[str, Tensor],
        support: SupportFeatures,
        pairs: Pairs,
    ) -> list[dict]:
        """All classes of all queries, a chunk of pairs at a time."""
        rpn_conv = self.proposal_generator.rpn_head.conv
        if not self.matching.is_worth_sharing(len(pairs) / len(queries)):
            rpn_conv = None
        shared = self.matching.share(pyramid, rpn_conv)
        results = []
        for chunk in pairs.chunks(self.pairs_per_chunk):
            matched, for_rpn = self.matching(shared, support.tensors, chunk)
            images = chunk.images(queries)
            proposals, _ = self.proposal_generator(images, for_rpn)
            results += self.roi_heads(images, matched, proposals)[0]
        return self.postprocess(results, pairs, batched_inputs)

    def _valid_cells(self, sizes: list[tuple[int, int]], features: Tensor) -> Tensor:
        """Tensor[B, h, w]: cells whose corner lies in the crop and not in the padding."""
        height, width = features.shape[-2:]
        size = torch.tensor(sizes, device=features.device) / self.support_crop.size
        rows = torch.arange(height, device=features.device) / height < size[:, :1]
        columns = torch.arange(width, device=features.device) / width < size[:, 1:]
        return rows[:, :, None] & columns[:, None, :]
