"""The detector of SILCO: an SSD on maps of the query that supports without boxes enhance (paper 3.2).

N queries, K classes, S supports, P (query, class) pairs, A priors; C,H,W a query map.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDHead

from ...modeling.detector import FewShotDetector, Pairs
from ...modeling.losses import hard_negatives, mean_over_ranks
from ...structures import SupportFeatures, SupportSet, cat_padded
from ...transforms import ResizeByRule
from .priors import PriorBoxes, assigned, best_boxes
from .reweighting import FeatureReweighting
from .similarity import SIMILARITIES, PooledFusion, SimilarityFusion, uniform

logger = logging.getLogger(__name__)

# Of cosines in attention: below it, exponents are all or nothing.
_LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Selection:
    """Which detections are given; see MODEL.SILCO in ``config``."""

    threshold: float
    top_k: int
    nms_iou: float


@META_ARCH_REGISTRY.register()
class SILCO(FewShotDetector):
    """Figure 1 of the paper. Boxes of supports, if there are any, are not looked at."""

    @configurable
    def __init__(
        self,
        *,
        fusions: dict[str, nn.Module],
        priors: PriorBoxes,
        resize: ResizeByRule,
        separate_trunks: bool,
        match_iou: float,
        negative_ratio: int,
        selection: Selection,
        **kwargs: Any,
    ):
        """Add to the shell what enhances the maps, and the heads.

        Args:
            fusions: of each map of the backbone that is used, a ``PooledFusion`` or ``SimilarityFusion``.
            priors: of these maps. resize: of support images, as that of test queries.
            separate_trunks, match_iou, negative_ratio, selection: see MODEL.SILCO in ``config``.
        """
        super().__init__(**kwargs)
        shapes = self.backbone.output_shape()
        self.trains_all = set(fusions) == set(shapes)
        channels = [shapes[name].channels for name in fusions]
        self.support_backbone = copy.deepcopy(self.backbone) if separate_trunks else None
        self.fusions = nn.ModuleDict(fusions)
        self.mixes = nn.ModuleDict(
            {name: nn.Conv2d(c, c, 1) for name, c in zip(fusions, channels, strict=True)}
        )
        self.head = SSDHead(channels, priors.per_cell, num_classes=2)
        self.priors, self.resize = priors, resize
        # Variances of .1 and .2; enlargement is limited, as in detectron2 everywhere.
        self.coder = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        self.match_iou, self.negative_ratio = match_iou, negative_ratio
        self.selection = selection

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        _check_keys(cfg)
        parts, node = super().from_config(cfg), cfg.MODEL.SILCO
        shapes = list(parts["backbone"].output_shape().items())
        different = set(node.SOURCES) & set(range(len(shapes)))
        if not node.SOURCES or len(different) < len(node.SOURCES):
            raise ValueError(
                f"SILCO.SOURCES must be different ones of the trunk's maps 0 to {len(shapes) - 1}, got {node.SOURCES}"
            )
        _check_numbers(node, max(node.SOURCES) + 1)
        sources = [shapes[i] for i in node.SOURCES]
        return {
            **parts,
            "fusions": {name: build_fusion(node, shape.channels) for name, shape in sources},
            "priors": PriorBoxes(
                [node.STEPS[i] for i in node.SOURCES],
                [tuple(node.SIZES[i : i + 2]) for i in node.SOURCES],
                [node.ASPECT_RATIOS[i] for i in node.SOURCES],
            ),
            "resize": ResizeByRule.from_cfg(cfg, is_train=False),
            "separate_trunks": node.SEPARATE_TRUNKS,
            "match_iou": node.MATCH_IOU,
            "negative_ratio": node.NEGATIVE_RATIO,
            "selection": Selection(node.SCORE_THRESH, node.PRE_NMS_TOPK, node.NMS_IOU),
        }

    @property
    def object_levels(self) -> list[str]:
        """The maps that are used."""
        return list(self.fusions)

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """Tensors of each used map, {"scale0.keys": Tensor[K, S, h * w, D], ...}, and "is_shot" (bool[K, S])."""
        images, num_shots = self.support_images(support_sets)
        trunk = self.backbone if self.support_backbone is None else self.support_backbone
        # In training norms may look at the batch, and gradients need all of it anyway.
        parts = [images] if self.training else images.split(self.pairs_per_chunk)
        of_parts = [trunk(part) for part in parts]
        is_shot = cat_padded([images.new_ones(1, number, dtype=torch.bool) for number in num_shots])
        tensors = {"is_shot": is_shot}
        for name, fusion in self.fusions.items():
            maps = torch.cat([maps[name] for maps in of_parts])
            of_classes = cat_padded([m[None] for m in maps.split(num_shots)])
            for key, tensor in fusion.encode(of_classes, is_shot).items():
                tensors[f"{name}.{key}"] = tensor
        return self.support_features(tensors, support_sets)

    def support_images(self, support_sets: Sequence[SupportSet]) -> tuple[Tensor, list[int]]:
        """The positive supports, resized and normalised as queries, Tensor[sum of shots, 3, side, side]; the shots."""
        classes = [shots for support_set in support_sets for shots in support_set.positives()]
        images = []
        for shot in (shot for shots in classes for shot in shots):
            pixels = shot.image.permute(1, 2, 0).numpy()
            pixels = self.resize.get_transform(pixels).apply_image(pixels)
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
            images.append({"image": image.flip(0) if self.input_format == "BGR" else image})
        return self.preprocess(images).tensor, [len(shots) for shots in classes]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Losses in training, ``[{"instances": Instances}]`` in inference; see ``structures``."""
        queries = self.preprocess(batched_inputs)
        maps = self.backbone(queries.tensor)
        support, pairs = self.gather_supports(batched_inputs)
        if not self.training:
            results = self.detect(queries, maps, support, pairs)
            return self.postprocess(results, pairs, batched_inputs)
        fused = self.fuse(self.describe_maps(maps), support, pairs)
        return self.losses(queries, fused, pairs.targets(batched_inputs, self.device))

    def describe_maps(self, maps: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What does not depend on a class, of each used map."""
        return {name: fusion.describe(maps[name]) for name, fusion in self.fusions.items()}

    def fuse(
        self, queries: dict[str, dict[str, Tensor]], support: SupportFeatures, pairs: Pairs
    ) -> list[Tensor]:
        """The enhanced maps (Tensor[P, C, H, W]) of the pairs; ``queries`` is of ``describe_maps``."""
        rows = support[pairs.support].tensors
        fused = []
        for name, fusion in self.fusions.items():
            query = {key: pairs.of_query(tensor) for key, tensor in queries[name].items()}
            prefix = f"{name}."
            of_map = {k.removeprefix(prefix): t for k, t in rows.items() if k.startswith(prefix)}
            fused.append(F.relu(self.mixes[name](fusion(query, of_map, rows["is_shot"]))))
        return fused

    def losses(
        self, queries: ImageList, fused: list[Tensor], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Both losses, summed over positives and hard negatives, by the positives of the whole batch (spec A6)."""
        predicted = self.head(fused)
        logits, deltas = predicted["cls_logits"].float(), predicted["bbox_regression"].float()
        priors = Boxes(self.priors(fused, tuple(queries.tensor.shape[-2:])))
        found = torch.stack(
            [assigned(pairwise_iou(t.gt_boxes, priors), self.match_iou) for t in targets]
        )
        positive = found >= 0
        class_loss = F.cross_entropy(
            logits.flatten(0, 1), positive.long().flatten(), reduction="none"
        )
        class_loss = class_loss.view_as(positive)
        learned = positive | hard_negatives(class_loss.detach(), positive, self.negative_ratio)
        wanted = torch.cat(
            [t.gt_boxes.tensor[row[row >= 0]] for t, row in zip(targets, found, strict=True)]
        )
        sources = priors.tensor.expand(len(targets), -1, -1)[positive]
        box_loss = F.smooth_l1_loss(
            deltas[positive], self.coder.get_deltas(sources, wanted), reduction="sum"
        )
        count = max(mean_over_ranks(positive.sum().item(), self.device), 1.0)
        return {"loss_class": class_loss[learned].sum() / count, "loss_box": box_loss / count}

    def detect(
        self,
        queries: ImageList,
        maps: dict[str, Tensor],
        support: SupportFeatures,
        pairs: Pairs,
    ) -> list[Instances]:
        """Detections of each pair, in pixels of the network's image; ``pairs_per_chunk`` at a time."""
        described, results = self.describe_maps(maps), []
        for chunk in pairs.chunks(self.pairs_per_chunk):
            fused = self.fuse(described, support, chunk)
            predicted = self.head(fused)
            scores = predicted["cls_logits"].float().softmax(dim=2)[..., 1]
            priors = self.priors(fused, tuple(queries.tensor.shape[-2:]))
            for query, deltas, of_pair in zip(
                chunk.query, predicted["bbox_regression"].float(), scores, strict=True
            ):
                boxes = self.coder.apply_deltas(deltas, priors)
                size = queries.image_sizes[query]
                results.append(best_boxes(boxes, of_pair, size, **vars(self.selection)))
        return results

    def describe_queries(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The maps of each query, for any number of later searches."""
        queries = self.preprocess(batched_inputs)
        maps = self.backbone(queries.tensor)
        return [
            {
                "queries": ImageList(queries.tensor[i : i + 1], queries.image_sizes[i : i + 1]),
                "maps": {name: maps[name][i : i + 1] for name in self.fusions},
                "height": x["height"],
                "width": x["width"],
            }
            for i, x in enumerate(batched_inputs)
        ]

    def search(self, query: dict[str, Any], support: SupportFeatures) -> Instances:
        """Detect all classes of ``support`` in a query of ``describe_queries``, in original query pixels."""
        classes = list(range(len(support)))
        pairs = Pairs([0] * len(classes), classes, classes)
        results = self.detect(query["queries"], query["maps"], support, pairs)
        return self.postprocess(results, pairs, [query])[0]["instances"]

    def explain(self, query: dict[str, Any], support: SupportFeatures) -> dict[str, Tensor]:
        """What happens to the finest map of a query of ``describe_queries``; see ``FewShotDetector``.

        Returns:
            "attention" (Tensor[H, W, S, h, w]), unless supports are pooled, and of Tensor[H, W] "query map",
            "with equal weights", where supports have weights, and "enhanced map" (fig. 4), means over channels, and
            "score", the best of each cell.
        """
        name, fusion = next(iter(self.fusions.items()))
        described, pairs = self.describe_maps(query["maps"]), Pairs([0], [0], [0])
        fused = self.fuse(described, support, pairs)
        before = query["maps"][name][0]
        cells = before.shape[1] * before.shape[2]
        logits = self.head(fused)["cls_logits"][0, : cells * self.priors.per_cell[0]]
        shown = {"query map": before.mean(dim=0)}
        is_attending = isinstance(fusion, SimilarityFusion)
        if is_attending and fusion.reweighting is not None:
            equal = equally_weighted(support, f"{name}.weights")
            shown["with equal weights"] = self.fuse(described, equal, pairs)[0][0].mean(dim=0)
        shown["enhanced map"] = fused[0][0].mean(dim=0)
        shown["score"] = logits.softmax(dim=1)[:, 1].view(*before.shape[1:], -1).amax(dim=2)
        if is_attending:
            keys = support.tensors[f"{name}.keys"][:1, support.tensors["is_shot"][0]]
            looked_at = fusion.attention(described[name]["theta"], keys)[0]
            # Supports are square.
            side = math.isqrt(looked_at.shape[-1])
            looked_at = looked_at.unflatten(2, (side, side)).unflatten(1, before.shape[1:])
            shown["attention"] = looked_at.movedim(0, 2)
        return shown


def equally_weighted(support: SupportFeatures, name: str) -> SupportFeatures:
    """The same supports, with the sum of their weights (Tensor[K, S]) shared out equally."""
    weights = support.tensors[name].sum(dim=1, keepdim=True) * uniform(support.tensors["is_shot"])
    return replace(support, tensors={**support.tensors, name: weights})


def build_fusion(node: CfgNode, channels: int) -> nn.Module:
    """What enhances a map of so many channels, by the keys MODEL.SILCO."""
    if node.SIMILARITY == "gap":
        return PooledFusion()
    reweighting = None
    if node.REWEIGHTING:
        reweighting = FeatureReweighting(
            channels,
            blocks=node.REWEIGHTING_BLOCKS,
            width=node.REWEIGHTING_WIDTH,
            dropout=node.REWEIGHTING_DROPOUT,
        )
    return SimilarityFusion(
        channels,
        dropout=node.DROPOUT,
        is_global=node.SIMILARITY == "global",
        reweighting=reweighting,
        normalize_weights=node.NORMALIZE_WEIGHTS,
        temperature=node.TEMPERATURE,
    )


def _check_numbers(node: CfgNode, maps: int) -> None:
    """Refuse keys of priors that do not reach the last map that is used."""
    numbers = len(node.STEPS), len(node.SIZES) - 1, len(node.ASPECT_RATIOS)
    if min(numbers) < maps:
        raise ValueError(
            f"SILCO.STEPS, SIZES (with one more) and ASPECT_RATIOS must be of {maps} maps, got of {numbers}"
        )


def _check_keys(cfg: CfgNode) -> None:
    """Refuse keys that contradict each other."""
    node = cfg.MODEL.SILCO
    if node.SIMILARITY not in SIMILARITIES:
        raise ValueError(f"SILCO.SIMILARITY must be one of {SIMILARITIES}, got {node.SIMILARITY!r}")
    if node.REWEIGHTING and node.SIMILARITY != "image":
        raise ValueError(
            "SILCO.REWEIGHTING must be False unless SIMILARITY is 'image', which alone has a weight a support, got "
            f"{node.SIMILARITY!r}"
        )
    if node.TEMPERATURE and node.TEMPERATURE < _LEAST_TEMPERATURE:
        raise ValueError(
            f"SILCO.TEMPERATURE must be 0 or at least {_LEAST_TEMPERATURE}, got {node.TEMPERATURE}"
        )
    if cfg.FEWSHOT.RESIZE_RULE != "stretch":
        raise ValueError(
            f"FEWSHOT.RESIZE_RULE must be 'stretch' for SILCO, got {cfg.FEWSHOT.RESIZE_RULE!r}"
        )
    if node.SEPARATE_TRUNKS and cfg.FEWSHOT.PRETRAIN.MAX_ITER:
        raise ValueError(
            "FEWSHOT.PRETRAIN.MAX_ITER must be 0 with SILCO.SEPARATE_TRUNKS, as it trains one trunk only, got "
            f"{cfg.FEWSHOT.PRETRAIN.MAX_ITER}"
        )
    if cfg.FEWSHOT.PRETRAIN.MAX_ITER and cfg.FEWSHOT.PRETRAIN.TASK != "objects":
        raise ValueError(
            "FEWSHOT.PRETRAIN.TASK must be 'objects' for SILCO, whose supports have no boxes, got "
            f"{cfg.FEWSHOT.PRETRAIN.TASK!r}"
        )
    if cfg.FEWSHOT.SUPPORT.FORM == "crop":
        logger.warning("SILCO takes whole pictures as supports, and FEWSHOT.SUPPORT.FORM is 'crop'")
