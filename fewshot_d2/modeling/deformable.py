"""FPN-DCN: a ResNet with deformable convolutions in chosen blocks, by torchvision's operator (RepMet spec 1.6).

detectron2 makes whole stages deformable, and needs its compiled operators for it.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from .backbones import build_fpn


class DeformableConv2d(nn.Module):
    """A convolution that samples where a second convolution tells it to; version 1, without modulation.

    Weights keep their names, so those of a plain ResNet load; offsets start at zero, where both networks are equal.
    """

    def __init__(self, conv: Conv2d, groups: int):
        """Take the place of ``conv``; ``groups`` of its input channels have offsets of their own."""
        super().__init__()
        if conv.in_channels % groups:
            raise ValueError(
                f"MODEL.DEFORMABLE.GROUPS must divide {conv.in_channels} channels, got {groups}"
            )
        self.weight, self.bias = conv.weight, conv.bias
        self.norm, self.activation = conv.norm, conv.activation
        self.geometry = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
        }
        height, width = conv.kernel_size
        self.offset = nn.Conv2d(
            conv.in_channels, 2 * height * width * groups, conv.kernel_size, **self.geometry
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        # A frozen stage stays frozen.
        self.offset.requires_grad_(conv.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (Tensor[N, C, H, W]) -> Tensor[N, C', H', W'].

        Raises:
            FloatingPointError: offsets that are not finite; the operator would read outside its memory.
        """
        offsets = self.offset(x)
        if not torch.isfinite(offsets).all():
            raise FloatingPointError("offsets must be finite, got others: training has diverged")
        x = deform_conv2d(x, offsets, self.weight, self.bias, **self.geometry)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def deform_blocks(resnet: nn.Module, blocks: Sequence[str], groups: int) -> None:
    """Make the second convolution, the 3x3 one, of the named blocks deformable, in place.

    Args:
        resnet: of detectron2, with stages "res2", "res3", ...
        blocks: each "stage:all", "stage:last" or "stage:number".

    Raises:
        ValueError: no such stage or block.
    """
    for spec in blocks:
        stage, _, which = spec.partition(":")
        found = list(getattr(resnet, stage, ()))
        places = {"all": range(len(found)), "last": [len(found) - 1]}.get(which)
        if places is None:
            places = [int(which)] if which.isdecimal() else [len(found)]
        if not found or max(places) >= len(found):
            raise ValueError(
                "MODEL.DEFORMABLE.BLOCKS must be 'stage:all', 'stage:last' or 'stage:number' of blocks that "
                f"exist, got {spec!r} with {len(found)} blocks"
            )
        for place in places:
            found[place].conv2 = DeformableConv2d(found[place].conv2, groups)


@BACKBONE_REGISTRY.register()
def build_deformable_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN on detectron2's ResNet with deformable convolutions in MODEL.DEFORMABLE.BLOCKS."""
    resnet = build_resnet_backbone(cfg, input_shape)
    deform_blocks(resnet, cfg.MODEL.DEFORMABLE.BLOCKS, cfg.MODEL.DEFORMABLE.GROUPS)
    return build_fpn(cfg, resnet)
