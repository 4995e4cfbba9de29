"""A box head of the layers that MODEL.TORCHVISION has left after the map that ROIs are pooled from ("C4").

What Res5ROIHeads is for detectron2's ResNets, for any torchvision classifier and as a box head: the trained layers of
the classifier describe ROIs, none starts from random weights. R = ROIs.
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from torch import Tensor, nn

from .backbones import FeatureBackbone, torchvision_part


@ROI_BOX_HEAD_REGISTRY.register()
class TorchvisionHead(nn.Module):
    """The last map of a classifier, averaged over the ROI; for build_torchvision_backbone with one map.

    BACKBONE.FREEZE_AT of 5 freezes it. With TORCHVISION.TF_PADDING the POOLER_RESOLUTION should be even.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, bottom_up: FeatureBackbone):
        """Take the shape of pooled ROIs and the layers that read them, for which the solver has keys of its own."""
        super().__init__()
        self.bottom_up = bottom_up
        ((self._name, shape),) = bottom_up.output_shape().items()
        self._channels = shape.channels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the keys.

        Raises:
            ValueError: ROIs are pooled from several maps, or from one that is none of the classifier's.
        """
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(in_features) != 1 or in_features[0] not in cfg.MODEL.TORCHVISION.OUT_FEATURES:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES must be one of TORCHVISION.OUT_FEATURES "
                f"{list(cfg.MODEL.TORCHVISION.OUT_FEATURES)} for TorchvisionHead, got {list(in_features)}"
            )
        bottom_up = torchvision_part(cfg, ("res5",), after=in_features[0])
        return {"input_shape": input_shape, "bottom_up": bottom_up}

    @property
    def output_shape(self) -> ShapeSpec:
        """Channels of the last map."""
        return ShapeSpec(channels=self._channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled ROIs (Tensor[R, C, h, w]) -> Tensor[R, D]."""
        return self.bottom_up(x)[self._name].mean(dim=(2, 3))
