"""ROI heads that turn any GeneralizedRCNN config into RepMet by their name (spec 1.1).

Only the predictor differs from detectron2's heads. Boxes and masks are class-agnostic whatever the config says: a
novel class has no regressor of its own.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from .metric import ExternalOutputLayers, RepMetOutputLayers
from .predictors import EpisodicOutputLayers, LinearOutputLayers

CLASSIFIERS = {
    "representatives": RepMetOutputLayers,
    "external": ExternalOutputLayers,
    "linear": LinearOutputLayers,
}


def build_predictor(cfg: CfgNode, input_shape: ShapeSpec) -> EpisodicOutputLayers:
    """The predictor of MODEL.REPMET.CLASSIFIER."""
    name = cfg.MODEL.REPMET.CLASSIFIER
    if name not in CLASSIFIERS:
        raise ValueError(f"REPMET.CLASSIFIER must be one of {list(CLASSIFIERS)}, got {name!r}")
    return CLASSIFIERS[name](cfg, input_shape)


def class_agnostic(cfg: CfgNode) -> CfgNode:
    """The config with class-agnostic boxes and masks."""
    cfg = cfg.clone()
    cfg.defrost()
    # Whatever the config says of them.
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    return cfg


@ROI_HEADS_REGISTRY.register()
class RepMetROIHeads(StandardROIHeads):
    """StandardROIHeads (FPN; boxes and, by MASK_ON, masks) with RepMet's predictor."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the keys."""
        return super().from_config(class_agnostic(cfg), input_shape)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = build_predictor(cfg, parts["box_head"].output_shape)
        return parts

    def pool(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Maps and boxes of each image -> the box head's input, Tensor[R, ...]."""
        return self.box_pooler([features[name] for name in self.box_in_features], boxes)

    def describe(self, pooled: Tensor) -> Tensor:
        """The box head's output, which the predictor reads."""
        return self.box_head(pooled)

    @property
    def description_layers(self) -> nn.Module:
        """The weights of ``describe``."""
        return self.box_head


@ROI_HEADS_REGISTRY.register()
class RepMetRes5ROIHeads(Res5ROIHeads):
    """Res5ROIHeads ("C4") with RepMet's predictor."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the keys."""
        cfg = class_agnostic(cfg)
        parts = super().from_config(cfg, input_shape)
        channels = parts["box_predictor"].cls_score.in_features
        parts["box_predictor"] = build_predictor(cfg, ShapeSpec(channels=channels))
        return parts

    def pool(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Maps and boxes of each image -> the input of res5, Tensor[R, ...]."""
        return self.pooler([features[name] for name in self.in_features], boxes)

    def describe(self, pooled: Tensor) -> Tensor:
        """What the predictor reads: the mean of res5's map."""
        return self.res5(pooled).mean(dim=[2, 3])

    @property
    def description_layers(self) -> nn.Module:
        """The weights of ``describe``."""
        return self.res5


class _NormedLinear(nn.Linear):
    """Linear layer and batch norm; the weights are named as without it, so those of a plain head load."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.norm = nn.BatchNorm1d(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@ROI_BOX_HEAD_REGISTRY.register()
class NormedFCHead(FastRCNNConvFCHead):
    """detectron2's box head with batch norm in its fully connected layers, as the paper has it (figure 3)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, child in list(self.named_children()):
            if isinstance(child, nn.Linear):
                setattr(self, name, _NormedLinear(child))
