"""A trained network that describes regions of images for a search (SPIL spec B5).

Boxes are XYXY in pixels of the original image here. R = regions, D = numbers of a vector, all layers together.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..checkpoint import FewShotCheckpointer
from ..modeling.detector import FewShotDetector
from ..structures import Support
from ..transforms import SupportCrop
from .regions import ProposalRegions, SalientRegions, describe_regions

logger = logging.getLogger(__name__)

# Bounds the memory.
_CROPS_AT_ONCE = 16


class RegionDescriber(nn.Module):
    """Finds regions in an image and describes them, or boxes that are given, by the mean of its maps inside.

    A vector is that of each layer, of length 1, one after the other: a cosine is the mean of the layers' cosines.
    Images are query dicts of the mapper (``image``: uint8 Tensor[3, H, W], resized; ``height`` and ``width`` before).
    """

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        find_regions: Callable[[Tensor], Tensor],
        layers: Sequence[str],
        power: float = 1.0,
        crop_size: int = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """Take the parts.

        Args:
            network: all that finds and describes regions; its ``backbone`` is any of detectron2's.
            find_regions: a region source, see ``regions``.
            layers: names of the backbone's maps that describe.
            power: of the mean, see ``describe_regions``.
            crop_size: longer side of regions that are cut out and described one by one; 0 = by the image's maps.
            pixel_mean, pixel_std: of the channels, in the order in which images come.

        Raises:
            ValueError: the backbone has no such map.
        """
        super().__init__()
        shapes = network.backbone.output_shape()
        if not layers or not set(layers) <= shapes.keys():
            raise ValueError(
                f"FEWSHOT.RETRIEVAL.LAYERS must be among {sorted(shapes)}, got {list(layers)}"
            )
        self.network = network
        self._find_regions, self._power = find_regions, power
        self._crop = SupportCrop(crop_size, 1, "paper") if crop_size else None
        self._strides = {name: shapes[name].stride for name in layers}
        self.register_buffer("_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the network and its region source, with the weights of the config."""
        node = cfg.FEWSHOT.RETRIEVAL
        if node.REGIONS != "salient":
            network, find_regions = _proposals(cfg)
        else:
            network = _loaded(_Trunk(build_backbone(cfg)), cfg)
            find_regions = SalientRegions(
                network.backbone,
                fine=node.FINE,
                last=node.LAST,
                num_seeds=node.NUM_REGIONS,
                thresholds=node.THRESHOLDS,
                smoothing=node.SMOOTHING,
                nms_iou=node.NMS_IOU,
            )
        return {
            "network": network,
            "find_regions": find_regions,
            "layers": node.LAYERS,
            "power": node.POWER,
            "crop_size": node.CROP_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def backbone(self) -> nn.Module:
        """Its maps describe."""
        return self.network.backbone

    def regions(self, query: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The regions of an image and what they look like.

        Returns:
            boxes (float32[R, 4]) inside the image, the whole image last, and float32[R, D]. On the CPU.
        """
        image = self._normalised(query["image"])
        height, width = query["image"].shape[1:]
        boxes = self._find_regions(image)
        # The padding is no part of the image, though a region may reach into it.
        boxes = torch.stack(
            [*boxes[:, :2].T, boxes[:, 2].clamp(max=width), boxes[:, 3].clamp(max=height)], dim=1
        )
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)]
        vectors = self._described(query, image, boxes)
        return _clipped(boxes / self._scale(query), query).cpu(), vectors

    def vectors(self, query: Mapping[str, Any], boxes: Tensor) -> Tensor:
        """What boxes of an image look like.

        Args:
            boxes (float[n, 4]): clipped to the image.

        Returns:
            float32[n, D], on the CPU.

        Raises:
            ValueError: a box has no area inside the image.
        """
        boxes = _clipped(boxes, query)
        if not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ValueError(
                f"{query['file_name']}: boxes must have an area inside the image, got {boxes.tolist()}"
            )
        scaled = boxes.float().to(self._mean.device) * self._scale(query)
        return self._described(query, None, scaled)

    def state_sha256(self) -> str:
        """Hash of all weights of the network, wherever they are from."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _normalised(self, image: Tensor) -> Tensor:
        """uint8 Tensor[3, H, W] -> Tensor[3, H', W'], padded as the backbone needs it."""
        image = (image.to(self._mean.device) - self._mean) / self._std
        return ImageList.from_tensors([image], self.backbone.size_divisibility).tensor[0]

    def _scale(self, query: Mapping[str, Any]) -> Tensor:
        """What boxes of the original image are multiplied by (Tensor[4])."""
        height, width = query["image"].shape[1:]
        return self._mean.new_tensor([width / query["width"], height / query["height"]] * 2)

    @torch.no_grad()
    def _described(self, query: Mapping[str, Any], image: Tensor | None, boxes: Tensor) -> Tensor:
        """Vectors of boxes in pixels of the network's input; ``image``, if at hand, is the query's, normalised."""
        if self._crop is None or not len(boxes):
            image = self._normalised(query["image"]) if image is None else image
            return self._pooled(image[None], boxes)
        crops = [self._crop(Support(query["image"], box)).image for box in boxes.cpu()]
        parts = []
        for start in range(0, len(crops), _CROPS_AT_ONCE):
            some = [
                (c.to(self._mean.device) - self._mean) / self._std
                for c in crops[start:][:_CROPS_AT_ONCE]
            ]
            batch = ImageList.from_tensors(some, self.backbone.size_divisibility)
            sides = [[0, 0, width, height] for height, width in batch.image_sizes]
            parts.append(self._pooled(batch.tensor, self._mean.new_tensor(sides)))
        return torch.cat(parts)

    def _pooled(self, images: Tensor, boxes: Tensor) -> Tensor:
        maps = self.backbone(images)
        vectors = [
            describe_regions(maps[name], boxes, stride, power=self._power)
            for name, stride in self._strides.items()
        ]
        return torch.cat(vectors, dim=1).cpu()


def build_describer(cfg: CfgNode) -> RegionDescriber:
    """The describer of FEWSHOT.RETRIEVAL on MODEL.DEVICE, in inference mode.

    Raises:
        ValueError: weights are missing or do not fit, or the config names maps that the network has not.
    """
    model = cfg.MODEL
    if not (model.WEIGHTS or model.TORCHVISION.WEIGHTS or model.TIMM.WEIGHTS):
        logger.warning("Neither MODEL.WEIGHTS nor those of a backbone: the search is untrained")
    return RegionDescriber(cfg).to(model.DEVICE).eval()


def _clipped(boxes: Tensor, query: Mapping[str, Any]) -> Tensor:
    """Boxes of the original image without what is outside of it."""
    return torch.minimum(
        boxes.clamp(min=0), boxes.new_tensor([query["width"], query["height"]] * 2)
    )


class _Trunk(nn.Module):
    """Gives the backbone the name that it has in checkpoints of detectors."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone


def _loaded(model: nn.Module, cfg: CfgNode) -> nn.Module:
    FewShotCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model.eval()


def _proposals(cfg: CfgNode) -> tuple[nn.Module, ProposalRegions]:
    """An ordinary detector, whose classes do not matter, and its RPN's or its heads' boxes as a region source."""
    model, node = build_model(cfg), cfg.FEWSHOT.RETRIEVAL
    # Most few-shot detectors propose for examples, of which there are none yet.
    if isinstance(model, FewShotDetector) and not hasattr(model, "propose"):
        raise ValueError(
            f"FEWSHOT.RETRIEVAL.REGIONS {node.REGIONS!r} needs a MODEL.META_ARCHITECTURE that proposes without "
            f"examples, such as GeneralizedRCNN, got {cfg.MODEL.META_ARCHITECTURE}"
        )
    _loaded(model, cfg)

    @torch.no_grad()
    def propose(image: Tensor) -> tuple[Tensor, Tensor]:
        images, maps = ImageList.from_tensors([image]), model.backbone(image[None])
        proposals, _ = model.proposal_generator(images, maps, None)
        if node.REGIONS == "proposals":
            return proposals[0].proposal_boxes.tensor, proposals[0].objectness_logits
        (found,), _ = model.roi_heads(images, maps, proposals, None)
        return found.pred_boxes.tensor, found.scores

    return model, ProposalRegions(propose, num_regions=node.NUM_REGIONS, nms_iou=node.NMS_IOU)
