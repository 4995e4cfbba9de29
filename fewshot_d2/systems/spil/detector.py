"""The detector of SPIL: a Siamese C4 network whose kernel, the pooled examples, is correlated with the query (3.1).

RPN, box and mask heads see the correlated map. A query is learned with the examples of its own instance and, in a
second pass of the heads, with those of another one, whose ground truth is empty (contrastive training). N queries,
K classes, S shots, P (query, class) pairs; C,H,W query map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ...modeling.detector import FewShotDetector, Pairs
from ...modeling.matching import average_pool, depthwise_correlation, mean_over_shots
from ...structures import SupportFeatures, SupportSet
from .attention import CoAttention, KeepTrunk
from .lookalikes import LookalikeRPN, without_lookalikes

KERNEL_NORMS = ("none", "channel_mean", "batch_norm")
ROI_FEATURES = ("correlated", "query")


@dataclass
class SupportCrops:
    """The examples of all classes of a batch, class after class.

    Attributes:
        images (Tensor[sum of shots, 3, size, size]): normalised. maps (dict[str, Tensor[sum of shots, C, h, w]]): what
            the backbone makes of them. num_shots (list[int]): of each class.
    """

    images: Tensor
    maps: dict[str, Tensor]
    num_shots: list[int]


@META_ARCH_REGISTRY.register()
class SPIL(FewShotDetector):
    """Correlation Mask R-CNN, figure 2 of the paper."""

    @configurable
    def __init__(
        self,
        *,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        kernel_norm: str,
        roi_features: str,
        co_attention: CoAttention | None,
        lookalike_coverage: float,
        **kwargs: Any,
    ):
        """Add to the shell.

        Args:
            proposal_generator: gives losses pair by pair, as ``LookalikeRPN`` alone does.
            roi_heads: any of detectron2's, with one class.
            kernel_norm: one of ``KERNEL_NORMS``. roi_features: one of ``ROI_FEATURES``.
            co_attention: makes the masks; None = those of the data set are used, if masks are learned at all.
            lookalike_coverage: of ``without_lookalikes``.

        Raises:
            ValueError: a part or a choice is another.
        """
        super().__init__(**kwargs)
        if not isinstance(proposal_generator, LookalikeRPN):
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME must be LookalikeRPN for SPIL, got "
                f"{type(proposal_generator).__name__}"
            )
        if roi_heads.num_classes != 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES must be 1 for SPIL, got {roi_heads.num_classes}"
            )
        if kernel_norm not in KERNEL_NORMS:
            raise ValueError(f"SPIL.KERNEL_NORM must be one of {KERNEL_NORMS}, got {kernel_norm!r}")
        if roi_features not in ROI_FEATURES:
            raise ValueError(
                f"SPIL.ROI_FEATURES must be one of {ROI_FEATURES}, got {roi_features!r}"
            )
        self.proposal_generator, self.roi_heads = proposal_generator, roi_heads
        self.kernel_batch_norms = nn.ModuleDict()
        if kernel_norm == "batch_norm":
            for name, shape in self.backbone.output_shape().items():
                self.kernel_batch_norms[name] = nn.BatchNorm1d(shape.channels, affine=False)
        self.kernel_norm, self.roi_features = kernel_norm, roi_features
        self.co_attention, self.lookalike_coverage = co_attention, lookalike_coverage

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        parts, node = super().from_config(cfg), cfg.MODEL.SPIL
        backbone = parts["backbone"]
        attention = None
        if node.CO_ATTENTION:
            attention = CoAttention(
                backbone=backbone, layer=node.ATTENTION_LAYER, threshold=node.ATTENTION_THRESHOLD
            )
        return {
            **parts,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "roi_heads": build_roi_heads(cfg, backbone.output_shape()),
            "kernel_norm": node.KERNEL_NORM,
            "roi_features": node.ROI_FEATURES,
            "co_attention": attention,
            "lookalike_coverage": node.LOOKALIKE_COVERAGE,
        }

    def training_hooks(self, episodes: Any, batch_size: int) -> list[HookBase]:
        """The trunk of co-attention is kept as it is before the first step."""
        return [] if self.co_attention is None else [KeepTrunk(self.co_attention, self.backbone)]

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """One kernel a class and map: {name: Tensor[K, C]}."""
        return self._kernels(support_sets, self._crops(support_sets))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Losses in training, ``[{"instances": Instances}]`` in inference; see ``structures``.

        Training queries may have ``weights`` (list[float]), a class's omega each (paper eq. 1), default 1.
        """
        queries = self.preprocess(batched_inputs)
        maps = self.backbone(queries.tensor)
        if not self.training:
            return self._inference(batched_inputs, queries, maps)
        support_sets, pairs = self.distinct_supports(batched_inputs, "support")
        crops = self._crops(support_sets)
        kernels = self._kernels(support_sets, crops).tensors
        targets = pairs.targets(batched_inputs, self.device)
        if self.co_attention is not None:
            self._label(batched_inputs, targets, pairs, (queries.tensor, maps), crops)
        correlated = self.correlate(maps, kernels, pairs)
        images = pairs.images(queries)
        proposals, losses = self.proposal_generator(images, correlated, targets)
        seen = self._seen_by_heads(maps, correlated, pairs)
        losses |= self._head_losses(images, seen, proposals, targets)
        weights = self._weights(batched_inputs, pairs)
        return {name: (weights * of_pairs).mean() for name, of_pairs in losses.items()}

    def correlate(
        self, maps: dict[str, Tensor], kernels: dict[str, Tensor], pairs: Pairs
    ) -> dict[str, Tensor]:
        """Maps of the queries (Tensor[N, C, H, W]) times kernels (Tensor[K, C]): {name: Tensor[P, C, H, W]}."""
        return {
            name: depthwise_correlation(pairs.of_query(features), kernels[name][pairs.support])
            for name, features in maps.items()
        }

    def _inference(
        self, batched_inputs: list[dict[str, Any]], queries: ImageList, maps: dict[str, Tensor]
    ) -> list[dict]:
        """Detect all pairs, ``pairs_per_chunk`` at a time."""
        support, pairs = self.gather_supports(batched_inputs)
        results = []
        for chunk in pairs.chunks(self.pairs_per_chunk):
            correlated = self.correlate(maps, support.tensors, chunk)
            images = chunk.images(queries)
            proposals, _ = self.proposal_generator(images, correlated)
            seen = self._seen_by_heads(maps, correlated, chunk)
            results += self.roi_heads(images, seen, proposals)[0]
        return self.postprocess(results, pairs, batched_inputs)

    def _crops(self, support_sets: Sequence[SupportSet]) -> SupportCrops:
        images, _, num_shots = self.preprocess_supports(support_sets)
        return SupportCrops(images, self.backbone(images), num_shots)

    def _kernels(self, support_sets: Sequence[SupportSet], crops: SupportCrops) -> SupportFeatures:
        """Paper eq. 3: the mean over space and examples."""
        kernels = {
            name: mean_over_shots(average_pool(features), crops.num_shots)
            for name, features in crops.maps.items()
        }
        if self.kernel_norm == "channel_mean":
            kernels = {name: _divided_by_mean(kernel) for name, kernel in kernels.items()}
        for name, norm in self.kernel_batch_norms.items():
            kernels[name] = norm(kernels[name])
        return self.support_features(kernels, support_sets)

    def _label(
        self,
        batched_inputs: list[dict[str, Any]],
        targets: list[Instances],
        pairs: Pairs,
        queries: tuple[Tensor, dict[str, Tensor]],
        crops: SupportCrops,
    ) -> None:
        """Give every target with an instance its masks and look-alikes; queries and crops are images with maps."""
        of_queries = self.co_attention.features(*queries)
        of_shots = self.co_attention.features(crops.images, crops.maps).split(crops.num_shots)
        for target, query, row in zip(targets, pairs.query, pairs.support, strict=True):
            x = batched_inputs[query]
            if "superpixels" not in x:
                raise ValueError(
                    "queries must have superpixels for co-attention (FEWSHOT.MAPPER: SuperpixelMapper), got none for "
                    f"{x.get('file_name', 'a query')}"
                )
            # A mask of the data set, if there is one, must not be seen.
            target.remove("gt_masks") if target.has("gt_masks") else None
            if len(target):
                superpixels = x["superpixels"].to(self.device)
                self.co_attention.label(target, of_queries[query], of_shots[row], superpixels)

    def _seen_by_heads(
        self, maps: dict[str, Tensor], correlated: dict[str, Tensor], pairs: Pairs
    ) -> dict[str, Tensor]:
        """What the ROI heads pool: {name: Tensor[P, C, H, W]}."""
        if self.roi_features == "correlated":
            return correlated
        return {name: pairs.of_query(features) for name, features in maps.items()}

    def _head_losses(
        self,
        images: ImageList,
        seen: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances],
    ) -> dict[str, Tensor]:
        """Losses of the ROI heads, {name: Tensor[P]}.

        detectron2's are means over all ROIs that are given, so one pair at a time: each has a weight of its own.
        """
        of_pairs = []
        for p, target in enumerate(targets):
            features = {name: m[p : p + 1] for name, m in seen.items()}
            kept = without_lookalikes(proposals[p], target, self.lookalike_coverage)
            _, losses = self.roi_heads(images, features, [kept], [target])
            if "loss_mask" in losses and target.has("gt_masks"):
                losses["loss_mask"] = losses["loss_mask"] * float(target.gt_masks.tensor.any())
            of_pairs.append(losses)
        return {name: torch.stack([losses[name] for losses in of_pairs]) for name in of_pairs[0]}

    def _weights(self, batched_inputs: list[dict[str, Any]], pairs: Pairs) -> Tensor:
        """Omega of each pair, Tensor[P]."""
        every = (x.get("weights", [1.0] * len(x["support"])) for x in batched_inputs)
        of_queries = list(every)
        chosen = zip(pairs.query, pairs.episode_class, strict=True)
        return torch.tensor([of_queries[q][k] for q, k in chosen], device=self.device)


def _divided_by_mean(kernels: Tensor) -> Tensor:
    """Kernels (Tensor[K, C]) by the mean size of their numbers, which maps without a ReLU have of both signs."""
    return kernels / kernels.abs().mean(dim=1, keepdim=True).clamp(min=1e-12)
