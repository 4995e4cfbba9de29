"""RepMet as a few-shot detector (paper 4.2, spec 2): supports replace the representatives of the trained classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ...modeling.detector import FewShotDetector
from ...structures import SupportFeatures, SupportSet
from ...transforms import ResizeByRule
from .predictors import EpisodicOutputLayers
from .refresh import RULES, RefreshRepresentatives
from .supports import SUPPORT_ROIS, SupportImage, chosen_rois, support_images
from .tuning import EpisodeTuner, tuned_modules

logger = logging.getLogger(__name__)

TRAINED = ("all", "predictor")


@dataclass
class DescribedQuery:
    """Everything about one query that does not depend on the classes searched in it.

    Attributes:
        proposals (Instances): with ``proposal_boxes``, XYXY in pixels of the resized query.
        x (Tensor[R, C]): their features.
        maps (dict): of the backbone, for masks; empty without.
        size (tuple): (height, width) that results are scaled to.
    """

    proposals: Instances
    x: Tensor
    maps: dict[str, Tensor]
    size: tuple[int, int]


@META_ARCH_REGISTRY.register()
class RepMet(FewShotDetector):
    """A GeneralizedRCNN with RepMet's ROI heads; its checkpoints and those of a plain GeneralizedRCNN interchange."""

    @configurable
    def __init__(
        self,
        *,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        resize: ResizeByRule,
        support_rois: str,
        support_iou: float,
        kmeans: str,
        trained: str,
        **kwargs: Any,
    ):
        """Add to the shell the heads and how a support image is read.

        Args:
            roi_heads: with ``pool``, ``describe`` and a ``box_predictor`` that takes episodes.
            resize: of support images, as that of test queries.
            support_rois, support_iou, kmeans, trained: see MODEL.REPMET in ``config``.
        """
        super().__init__(**kwargs)
        self.proposal_generator, self.roi_heads, self.resize = proposal_generator, roi_heads, resize
        for key, value, allowed in (
            ("SUPPORT_ROIS", support_rois, SUPPORT_ROIS),
            ("KMEANS", kmeans, RULES),
            ("TRAINED", trained, TRAINED),
        ):
            if value not in allowed:
                raise ValueError(f"REPMET.{key} must be one of {allowed}, got {value!r}")
        self.support_rois, self.support_iou, self.kmeans = support_rois, support_iou, kmeans
        if trained == "predictor" or self.predictor.trains_embedding_only:
            self.requires_grad_(False)
            embedding_only = self.predictor.trains_embedding_only
            (self.predictor.embedding if embedding_only else self.predictor).requires_grad_()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        parts = super().from_config(cfg)
        shapes = parts["backbone"].output_shape()
        heads = build_roi_heads(cfg, shapes)
        if cfg.FEWSHOT.SUPPORT.FORM != "image":
            logger.warning(
                "RepMet takes supports out of whole pictures: FEWSHOT.SUPPORT.FORM should be 'image', is %r",
                cfg.FEWSHOT.SUPPORT.FORM,
            )
        if not isinstance(getattr(heads, "box_predictor", None), EpisodicOutputLayers):
            raise ValueError(
                "MODEL.ROI_HEADS.NAME must be RepMetROIHeads or RepMetRes5ROIHeads for RepMet, got "
                f"{cfg.MODEL.ROI_HEADS.NAME!r}"
            )
        return {
            **parts,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": heads,
            "resize": ResizeByRule.from_cfg(cfg, is_train=False),
            "support_rois": cfg.MODEL.REPMET.SUPPORT_ROIS,
            "support_iou": cfg.MODEL.REPMET.SUPPORT_IOU,
            "kmeans": cfg.MODEL.REPMET.KMEANS,
            "trained": cfg.MODEL.REPMET.TRAINED,
        }

    @property
    def predictor(self) -> EpisodicOutputLayers:
        """The layers whose classes can be exchanged."""
        return self.roi_heads.box_predictor

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Losses of the base classes in training, ``[{"instances": Instances}]`` in inference; see ``structures``.

        In inference queries with neither ``support`` nor ``support_features`` are searched for the trained classes.

        Raises:
            ValueError: training queries with supports, whose labels are an episode's and not the base classes', or
                queries of which only some have supports.
        """
        if not self.training:
            return self.inference(batched_inputs)
        if any("support" in x for x in batched_inputs):
            raise ValueError(
                "RepMet must be trained with FEWSHOT.TRAIN_ON 'base_images', got queries with supports"
            )
        images = self.preprocess(batched_inputs)
        maps = self.backbone(images.tensor)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        proposals, rpn_losses = self.proposal_generator(images, maps, targets)
        _, roi_losses = self.roi_heads(images, maps, proposals, targets)
        return {**rpn_losses, **roi_losses}

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict]:
        """Describe each query once, then search all its classes together."""
        queries = self.describe_queries(batched_inputs)
        if all(x.keys().isdisjoint({"support", "support_features"}) for x in batched_inputs):
            trained = self.trained_features()
            return [{"instances": self.search(query, trained)} for query in queries]
        support, pairs = self.gather_supports(batched_inputs)
        return [
            {"instances": self.search(query, support[pairs.rows_of(number)])}
            for number, query in enumerate(queries)
        ]

    def describe_queries(self, batched_inputs: Sequence[dict[str, Any]]) -> list[DescribedQuery]:
        """Proposals and their features, for any number of later searches."""
        images = self.preprocess(batched_inputs)
        maps, proposals = self.propose(images)
        pooled = self.roi_heads.pool(maps, [p.proposal_boxes for p in proposals])
        features = self.roi_heads.describe(pooled).split([len(p) for p in proposals])
        if not self.roi_heads.mask_on:
            maps = {}
        return [
            DescribedQuery(
                proposals=proposals[i],
                x=features[i],
                maps={name: m[i : i + 1] for name, m in maps.items()},
                size=(query["height"], query["width"]),
            )
            for i, query in enumerate(batched_inputs)
        ]

    def propose(self, images: ImageList) -> tuple[dict[str, Tensor], list[Instances]]:
        """Maps of the backbone and class-agnostic proposals."""
        maps = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, maps)
        return maps, proposals

    def search(self, query: DescribedQuery, support: SupportFeatures) -> Instances:
        """Detect all classes of ``support``; boxes and masks in original query pixels."""
        predictions = self.predictor(query.x, support.tensors)
        instances, _ = self.predictor.inference(predictions, [query.proposals])
        instances = self.roi_heads.forward_with_given_boxes(query.maps, instances)
        return detector_postprocess(instances[0], *query.size)

    def trained_features(
        self, class_ids: Sequence[int] = (), class_names: Sequence[str] = ()
    ) -> SupportFeatures:
        """The trained classes as supports; joined to those of novel ones (``SupportFeatures.cat``) both are searched.

        Args:
            class_ids, class_names: of the trained classes in the order of their labels; default 0..N-1.
        """
        ids = list(class_ids) or list(range(self.predictor.num_classes))
        tensors = {name: t.detach() for name, t in self.predictor.trained_tensors().items()}
        return SupportFeatures(tensors, ids, list(class_names), type(self).__name__)

    def support_images(self, support_sets: Sequence[SupportSet]) -> list[SupportImage]:
        """The pictures of the supports as this detector reads them."""
        return support_images(support_sets, self.resize, self.input_format)

    def support_batch(self, pictures: Sequence[SupportImage]) -> ImageList:
        """Normalised and padded like queries."""
        return self.preprocess([{"image": picture.image} for picture in pictures])

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """Tensors of all classes of all sets; see ``episode_tensors`` of the predictor."""
        pictures = self.support_images(support_sets)
        features, rows = [], []
        for start in range(0, len(pictures), self.pairs_per_chunk):
            x, of_class = self._describe_examples(pictures[start : start + self.pairs_per_chunk])
            features.append(x)
            rows.append(of_class)
        x, of_class = torch.cat(features), torch.cat(rows)
        shots = [len(shots) for s in support_sets for shots in s.positives()]
        rois = [x[of_class == k] for k in range(len(shots))]
        return SupportFeatures(
            tensors=self.predictor.episode_tensors(rois, shots),
            class_ids=[c for s in support_sets for c in s.class_ids],
            class_names=[name for s in support_sets for name in s.class_names],
            system=type(self).__name__,
        )

    def episode_tuner(self, support_set: SupportSet, layers: str) -> EpisodeTuner:
        """What fine-tuning on an episode needs; ``layers`` are "last_layer", "head" or "all"."""
        return EpisodeTuner(self, support_set, layers)

    def tunes_description(self, layers: str) -> bool:
        """Whether fine-tuning ``layers`` changes what ``describe_queries`` gives."""
        head = {p for p in self.roi_heads.description_layers.parameters() if p.requires_grad}
        tuned = {p for module in tuned_modules(self, layers) for p in module.parameters()}
        return layers == "all" or not head.isdisjoint(tuned)

    def training_hooks(self, episodes: Any, batch_size: int) -> list[HookBase]:
        """K-means of the representatives, by key."""
        if self.kmeans == "none":
            return []
        return [RefreshRepresentatives(self, episodes, batch_size=batch_size, rule=self.kmeans)]

    def contrast_features(self, support_sets: Sequence[SupportSet]) -> dict[str, Tensor]:
        """Embeddings of whole crops: proposals are of no use before the detector has learned to make them."""
        crops, sizes, _ = self.preprocess_supports(support_sets)
        boxes = [Boxes(crops.new_tensor([[0, 0, width, height]])) for height, width in sizes]
        pooled = self.roi_heads.pool(self.backbone(crops), boxes)
        return {"embedding": self.predictor.embedding(self.roi_heads.describe(pooled))}

    def _describe_examples(self, pictures: Sequence[SupportImage]) -> tuple[Tensor, Tensor]:
        """Features (Tensor[C, ...]) of the chosen ROIs and the class row of each."""
        maps, proposals = self.propose(self.support_batch(pictures))
        chosen = [
            chosen_rois(p.proposal_boxes.tensor, picture, self.support_rois, self.support_iou)
            for p, picture in zip(proposals, pictures, strict=True)
        ]
        num_uncovered = sum(uncovered for _, _, uncovered in chosen)
        if num_uncovered:
            logger.info(
                "%d supports are covered by no proposal and stand for themselves", num_uncovered
            )
        pooled = self.roi_heads.pool(maps, [Boxes(boxes) for boxes, _, _ in chosen])
        return self.roi_heads.describe(pooled), torch.cat([rows for _, rows, _ in chosen])
