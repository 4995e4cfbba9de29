"""Trunks of six maps (spec A2): VGG16 as SSD300 has it, or any torchvision classifier or ResNet, with extra layers.

N images; sizes of maps are those for images of 300 pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from torch import Tensor, nn

from ...checkpoint import load_weights
from ...modeling.backbones import torchvision_part
from .weights import trunk_state

# Convolutions between the five poolings of VGG16: (number, channels).
_STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# Layers of VGG16 up to the ReLU of conv4_3.
_CONV4_3 = 23
_SCALE = 20.0


class VGG16Reduced(Backbone):
    """VGG16 whose fully connected layers are convolutions: conv4_3 (512, 38x38) and fc7 (1024, 19x19).

    Names of the weights in ``features`` are torchvision's.
    """

    def __init__(self):
        """Random weights, as torchvision draws them."""
        super().__init__()
        layers, channels = [], 3
        for stage, (number, width) in enumerate(_STAGES):
            for _ in range(number):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            # Rounded up once, so that 300 pixels end in 38 cells.
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=stage == 2))
        self.features = nn.Sequential(*layers[:-1])
        for conv in self.features:
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        _init_xavier(self.fc6, self.fc7)
        self._out_features = ["conv4_3", "fc7"]
        self._out_feature_channels = {"conv4_3": 512, "fc7": 1024}
        self._out_feature_strides = {"conv4_3": 8, "fc7": 16}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (Tensor[N, 3, H, W]) -> the two maps."""
        conv4_3 = self.features[:_CONV4_3](images)
        x = F.max_pool2d(self.features[_CONV4_3:](conv4_3), 3, stride=1, padding=1)
        return {"conv4_3": conv4_3, "fc7": F.relu(self.fc7(F.relu(self.fc6(x))))}


class ExtraLayer(nn.Sequential):
    """1x1 and 3x3 convolution, each with a ReLU: halves the map (stride 2), or takes off its border (stride 1)."""

    def __init__(self, in_channels: int, between: int, out_channels: int, stride: int):
        """Channels of the input, between the two and of the output."""
        super().__init__(
            nn.Conv2d(in_channels, between, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(between, out_channels, 3, stride=stride, padding=stride - 1),
            nn.ReLU(inplace=True),
        )
        _init_xavier(self[0], self[2])

    def forward(self, x: Tensor) -> Tensor:
        """Map (Tensor[N, C, H, W]) -> the next one, of at least one cell: smaller images have it too."""
        if self[2].padding == (0, 0):
            missing = [max(3 - side, 0) for side in (x.shape[3], x.shape[2])]
            x = F.pad(x, (0, missing[0], 0, missing[1]))
        return super().forward(x)


class SSDTrunk(Backbone):
    """The maps of a bottom-up and of extra layers, "scale0" ..., the first one normalised per cell (spec A2)."""

    def __init__(self, bottom_up: Backbone, extras: Sequence[tuple[int, int, int]]):
        """Take the bottom-up, whose maps are used in their order, and (between, channels, stride) of the extras."""
        super().__init__()
        self.bottom_up = bottom_up
        shapes = list(bottom_up.output_shape().values())
        self.scale = nn.Parameter(torch.full((shapes[0].channels,), _SCALE))
        self.extras = nn.ModuleList()
        for between, channels, stride in extras:
            self.extras.append(ExtraLayer(shapes[-1].channels, between, channels, stride))
            shapes.append(ShapeSpec(channels=channels, stride=shapes[-1].stride * stride))
        self._out_features = [f"scale{i}" for i in range(len(shapes))]
        for attribute, values in (
            ("_out_feature_channels", [shape.channels for shape in shapes]),
            ("_out_feature_strides", [shape.stride for shape in shapes]),
        ):
            setattr(self, attribute, dict(zip(self._out_features, values, strict=True)))

    @property
    def size_divisibility(self) -> int:
        """That of the bottom-up."""
        return self.bottom_up.size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (Tensor[N, 3, H, W]) -> {"scale0": Tensor[N, C, H, W], ...}."""
        maps = list(self.bottom_up(images).values())
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        # Out of place: the next layers see the map as it was.
        maps[0] = F.normalize(maps[0], dim=1, eps=1e-10) * self.scale[:, None, None]
        return dict(zip(self._out_features, maps, strict=True))


def _init_xavier(*convolutions: nn.Conv2d) -> None:
    for conv in convolutions:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)


@BACKBONE_REGISTRY.register()
def build_ssd_vgg16_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDTrunk:
    """SSD300's trunk; TORCHVISION.WEIGHTS in one of the layouts of ``weights``. Everything is trained.

    Raises:
        ValueError: layers are to be frozen.
    """
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT must be 0 for VGG16, got {cfg.MODEL.BACKBONE.FREEZE_AT}"
        )
    trunk = SSDTrunk(VGG16Reduced(), cfg.MODEL.SILCO.EXTRAS)
    load_weights(trunk, cfg.MODEL.TORCHVISION.WEIGHTS, trunk_state)
    return trunk


@BACKBONE_REGISTRY.register()
def build_ssd_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDTrunk:
    """The maps TORCHVISION.OUT_FEATURES of MODEL.TORCHVISION, and extra layers."""
    bottom_up = torchvision_part(cfg, cfg.MODEL.TORCHVISION.OUT_FEATURES)
    return SSDTrunk(bottom_up, cfg.MODEL.SILCO.EXTRAS)


@BACKBONE_REGISTRY.register()
def build_ssd_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDTrunk:
    """The maps RESNETS.OUT_FEATURES of detectron2's ResNet, and extra layers."""
    return SSDTrunk(build_resnet_backbone(cfg, input_shape), cfg.MODEL.SILCO.EXTRAS)
