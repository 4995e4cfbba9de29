"""Detector and retrieval in turn (OS2D 4.3 and C.1): the main baseline of one-shot detection.

A detector of anything gives boxes, whatever their class; each is described like the examples, and the cosine of the
two is its score for every class that is searched. Both halves are ``RegionDescriber``'s, so that any region source,
map and pooling of FEWSHOT.RETRIEVAL serves. Letters as in ``structures``; D = numbers of a vector.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from ..modeling.detector import FewShotDetector
from ..structures import Support, SupportFeatures, SupportSet
from .describer import RegionDescriber


@META_ARCH_REGISTRY.register()
class RetrievalDetector(FewShotDetector):
    """Trains its detector on all objects as one class; the description is not trained."""

    @configurable
    def __init__(self, *, describer: RegionDescriber, nms_iou: float, **kwargs: Any):
        """Add the describer to the shell; its backbone is the shell's.

        Args:
            describer: finds regions and describes them. nms_iou: of detections of one class.
        """
        super().__init__(backbone=describer.backbone, **kwargs)
        self.describer, self.nms_iou = describer, nms_iou

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        if cls.__name__ == cfg.FEWSHOT.RETRIEVAL.DETECTOR:
            raise ValueError(f"FEWSHOT.RETRIEVAL.DETECTOR must be another one, got {cls.__name__}")
        inner = cfg.clone()
        inner.defrost()
        inner.MODEL.META_ARCHITECTURE = cfg.FEWSHOT.RETRIEVAL.DETECTOR
        # Weights of the whole are loaded by whoever builds it.
        inner.MODEL.WEIGHTS = cfg.FEWSHOT.RETRIEVAL.DETECTOR_WEIGHTS
        return {
            "describer": RegionDescriber(inner),
            "nms_iou": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            **cls.input_from_config(cfg),
        }

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """``vectors``: Tensor[K, S, D], one of each example, zero where a class has fewer."""
        classes = [shots for s in support_sets for shots in s.positives()]
        vectors = [torch.cat([self._describe(shot) for shot in shots]) for shots in classes]
        padded = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        return self.support_features({"vectors": padded.to(self.device)}, support_sets)

    def describe_queries(self, batched_inputs: Sequence[dict[str, Any]]) -> list[Any]:
        """(query, boxes, vectors): regions in original pixels without the whole image, which is no detection."""
        return [
            (query, *(part[:-1].to(self.device) for part in self.describer.regions(query)))
            for query in batched_inputs
        ]

    def search(self, query: Any, support: SupportFeatures) -> Instances:
        """Every region with its score for every class, after NMS class by class; original pixels."""
        inputs, boxes, vectors = query
        scores = similarity_to_examples(vectors, support.tensors["vectors"])
        num_classes = len(support)
        classes = torch.arange(num_classes, device=boxes.device).repeat_interleave(len(boxes))
        found = Instances((inputs["height"], inputs["width"]))
        found.pred_boxes = Boxes(boxes.repeat(num_classes, 1))
        found.scores, found.pred_classes = scores.flatten(), classes
        kept = batched_nms(found.pred_boxes.tensor, found.scores, classes, self.nms_iou)
        return found[kept]

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Losses of the detector in training, else ``[{"instances": Instances}]``."""
        if self.training:
            return self._losses(batched_inputs)
        support, pairs = self.gather_supports(batched_inputs)
        return [
            {"instances": self.search(query, support[pairs.rows_of(number)])}
            for number, query in enumerate(self.describe_queries(batched_inputs))
        ]

    def _losses(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """All annotated objects are of class 0."""
        network = self.describer.network
        if not hasattr(network, "proposal_generator"):
            raise ValueError(
                "RetrievalDetector is trained with FEWSHOT.RETRIEVAL.REGIONS 'proposals' or 'detections', got a trunk"
            )
        merged = []
        for query in batched_inputs:
            instances = query["instances"][:]
            instances.gt_classes = torch.zeros_like(instances.gt_classes)
            merged.append({**query, "instances": instances})
        return network(merged)

    def _describe(self, support: Support) -> Tensor:
        """Support -> Tensor[1, D]."""
        crop = self.support_crop(support)
        height, width = crop.image_size
        image = crop.image.flip(0) if self.input_format == "BGR" else crop.image
        query = {"image": image, "height": height, "width": width, "file_name": "a support"}
        return self.describer.vectors(query, crop.region[None])


def similarity_to_examples(vectors: Tensor, examples: Tensor) -> Tensor:
    """Cosine of each region with the most similar example of each class, negative ones as 0.

    Args:
        vectors (Tensor[R, D]), examples (Tensor[K, S, D]): zero rows of ``examples`` are none.

    Returns:
        Tensor[K, R] in [0, 1].
    """
    cosines = F.normalize(examples, dim=2) @ F.normalize(vectors, dim=1).T
    return cosines.amax(dim=1).clamp(0, 1)
