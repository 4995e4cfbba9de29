"""Backbones by config: FPN on detectron2 ResNets, any torchvision classifier, any timm ``features_only`` model.

Levels are p2..p6 with strides 4..64, as detectron2's ``build_resnet_fpn_backbone`` gives them, or fewer by key. A
torchvision classifier also serves without FPN.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ..checkpoint import load_weights

_STRIDES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
# Any size works that has a whole cell at stride 32 and is not pooled to one by accident.
_PROBE_SIZE = 128


class FeatureBackbone(Backbone):
    """A model that returns its maps as a dict, seen as a detectron2 backbone."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, ShapeSpec]):
        """Take a model that returns ``{name: Tensor[N, C, H, W]}`` and the shapes of those maps."""
        super().__init__()
        self.model = model
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to whole cells of the coarsest map: TensorFlow's padding would cut off the last one."""
        return max(self._out_feature_strides.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (Tensor[N, 3, H, W]) -> the named maps."""
        return self.model(images)


class TFSameConv2d(nn.Conv2d):
    """Strided convolution with TensorFlow's SAME padding for even sides: the odd pixel goes right and bottom."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "TFSameConv2d":
        """Share the weights of an ordinary convolution."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Pad by kernel - stride in all, the smaller half first, and convolve."""
        pads = []
        for axis in (1, 0):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1 - self.stride[axis]
            total = max(total, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def use_tf_padding(model: nn.Module) -> None:
    """Replace every strided convolution of ``model`` by a ``TFSameConv2d``; names of weights stay."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1:
                setattr(module, name, TFSameConv2d.from_conv(child))


def torchvision_features(
    name: str,
    *,
    weights: str,
    norm: str,
    tf_padding: bool,
    out_features: Sequence[str] = tuple(_STRIDES.values()),
    after: str = "",
    freeze_at: int = 0,
    channels_last: bool = False,
) -> FeatureBackbone:
    """A torchvision classifier cut after its last map of each stride 4, 8, 16 and 32.

    Only maps count that all later layers hang on: the output of a block, not what is beside a skip connection.

    Args:
        name: of the model. weights, norm, tf_padding: see MODEL.TORCHVISION.
        out_features: of "res2" ... "res5", in this order.
        after: one of them that the result takes in place of images; only the layers after it remain.
        freeze_at: from 2 on, all up to res<freeze_at> keeps its weights.
        channels_last: layout of the weights, which convolutions give to their maps too.

    Raises:
        ValueError: the model is unknown, its weights do not fit or it lacks one of the strides.
    """
    try:
        model = models.get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"MODEL.TORCHVISION.NAME must be a torchvision model: {error}") from error
    load_weights(model, weights)
    if tf_padding:
        use_tf_padding(model)
    model = _with_norm(model, norm)
    tracer = {"leaf_modules": [FrozenBatchNorm2d]}
    nodes = {_STRIDES[s]: (s, *node) for s, node in _last_node_per_stride(model, tracer).items()}
    possible = [feature for feature in nodes if feature > after]
    if not out_features or not set(out_features) <= set(possible):
        raise ValueError(f"maps of {name} must be among {possible}, got {list(out_features)}")
    wanted = {*out_features, *([after] if after else []), f"res{max(freeze_at, 2)}"}
    returned = {nodes[feature][1]: feature for feature in wanted}
    graph = create_feature_extractor(model, returned, tracer_kwargs=tracer)
    if freeze_at >= 2:
        _freeze_until(graph, f"res{freeze_at}")
    _cut(graph, out_features, after)
    if channels_last:
        graph.to(memory_format=torch.channels_last)
    shapes = {
        feature: ShapeSpec(channels=nodes[feature][2], stride=nodes[feature][0])
        for feature in out_features
    }
    return FeatureBackbone(graph, shapes)


def _freeze_until(model: GraphModule, feature: str) -> None:
    """Freeze the modules of a traced model up to one of its maps."""
    last = model.graph.output_node().args[0][feature]
    for node in model.graph.nodes:
        if node.op == "call_module":
            parent, _, name = node.target.rpartition(".")
            frozen = model.get_submodule(node.target).requires_grad_(False)
            frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(frozen)
            setattr(model.get_submodule(parent), name, frozen)
        if node == last:
            return


def _cut(model: GraphModule, out_features: Sequence[str], after: str) -> None:
    """Leave of a traced model what leads from the map ``after``, or from images, to ``out_features``."""
    for graph in (model.train_graph, model.eval_graph):
        output = graph.output_node()
        maps = output.args[0]
        if after:
            (taken,) = (node for node in graph.nodes if node.op == "placeholder")
            maps[after].replace_all_uses_with(taken)
        output.args = ({feature: maps[feature] for feature in out_features},)
        graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


def timm_features(name: str, *, weights: str, norm: str) -> FeatureBackbone:
    """A timm model with ``features_only`` at strides 4, 8, 16 and 32; needs the extra ``timm``."""
    import timm
    import timm.layers

    model = timm.create_model(name, pretrained=False)
    load_weights(model, weights)
    features = timm.create_model(name, pretrained=False, features_only=True)
    indices = [i for i, r in enumerate(features.feature_info.reduction()) if r in _STRIDES]
    if len(indices) != len(_STRIDES):
        raise ValueError(f"timm model {name} must have strides {list(_STRIDES)}")
    features = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices)
    features.load_state_dict(model.state_dict(), strict=False)
    shapes = {
        _STRIDES[r]: ShapeSpec(channels=c, stride=r)
        for r, c in zip(
            features.feature_info.reduction(), features.feature_info.channels(), strict=True
        )
    }
    # timm's norms may hold an activation, which its own freezing keeps.
    features = _with_norm(features, norm, freeze=timm.layers.freeze_batch_norm_2d)
    return FeatureBackbone(_NamedOutputs(features, list(shapes)), shapes)


class _NamedOutputs(nn.Module):
    """Gives names to the list of maps that a timm model returns."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.model(images), strict=True))


def _with_norm(
    model: nn.Module,
    norm: str,
    freeze: Callable[[nn.Module], nn.Module] = FrozenBatchNorm2d.convert_frozen_batchnorm,
) -> nn.Module:
    if norm == "FrozenBN":
        return freeze(model)
    if norm == "BN":
        return model
    raise ValueError(f"norm of the backbone must be 'BN' or 'FrozenBN', got {norm!r}")


def _last_node_per_stride(model: nn.Module, tracer: dict) -> dict[int, tuple[str, int]]:
    """Stride -> (node name, channels), found by sending one image through the traced model."""
    names = get_graph_node_names(model, tracer_kwargs=tracer)[1]
    probe = create_feature_extractor(model, names, tracer_kwargs=tracer).eval()
    with torch.no_grad():
        maps = probe(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
    nodes, narrow = probe.graph.output_node().args[0], _nodes_without_bypass(probe.graph)
    found = {}
    for name in names:
        value = maps[name]
        if isinstance(value, Tensor) and value.dim() == 4 and nodes[name] in narrow:
            stride = _PROBE_SIZE // value.shape[-1]
            if stride in _STRIDES and value.shape[-1] * stride == _PROBE_SIZE:
                found[stride] = (name, value.shape[1])
    if set(found) != set(_STRIDES):
        raise ValueError(
            f"{type(model).__name__} must have maps at strides {list(_STRIDES)}, got {sorted(found)}"
        )
    return {stride: found[stride] for stride in _STRIDES}


def _nodes_without_bypass(graph: Graph) -> set[Node]:
    """The nodes through which all later ones see the image."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    narrow, furthest = set(), 0
    for node, number in position.items():
        # Weights are no way around.
        if node.op != "get_attr":
            if furthest <= number:
                narrow.add(node)
            furthest = max([furthest, *(position[u] for u in node.users if u.op != "output")])
    return narrow


class LastLevelConv(nn.Module):
    """One more level by a strided convolution of the bottom-up's last map (RepMet spec 1.6)."""

    num_levels = 1

    def __init__(self, in_feature: str, in_channels: int, out_channels: int):
        """Name of the bottom-up's map, its channels and those of the FPN."""
        super().__init__()
        self.in_feature = in_feature
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (Tensor[N, C, H, W]) -> [the level above]."""
        return [self.conv(x)]


def build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """detectron2's FPN on the maps FPN.IN_FEATURES of any bottom-up, with one more level made from the last."""
    in_features = cfg.MODEL.FPN.IN_FEATURES
    last = bottom_up.output_shape()[in_features[-1]]
    if cfg.MODEL.FPN.TOP_BLOCK == "conv":
        top_block = LastLevelConv(in_features[-1], last.channels, cfg.MODEL.FPN.OUT_CHANNELS)
    else:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{last.stride.bit_length() - 1}"
    fpn = FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    return add_fpn_relu(fpn) if cfg.MODEL.FPN.RELU else fpn


def add_fpn_relu(fpn: FPN) -> FPN:
    """ReLU after each lateral (before the top-down sum) and output convolution: all maps >= 0 (spec 1.3)."""
    for conv in (*fpn.lateral_convs, *fpn.output_convs):
        conv.activation = F.relu
    return fpn


@BACKBONE_REGISTRY.register()
def build_fewshot_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN on detectron2's ResNet of any depth."""
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN on MODEL.TORCHVISION."""
    return build_fpn(cfg, torchvision_part(cfg, tuple(_STRIDES.values())))


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FeatureBackbone:
    """The maps TORCHVISION.OUT_FEATURES of MODEL.TORCHVISION."""
    return torchvision_part(cfg, cfg.MODEL.TORCHVISION.OUT_FEATURES)


def torchvision_part(
    cfg: CfgNode, out_features: Sequence[str], *, after: str = ""
) -> FeatureBackbone:
    """``torchvision_features`` by MODEL.TORCHVISION and BACKBONE.FREEZE_AT."""
    node = cfg.MODEL.TORCHVISION
    return torchvision_features(
        node.NAME,
        weights=node.WEIGHTS,
        norm=node.NORM,
        tf_padding=node.TF_PADDING,
        out_features=out_features,
        after=after,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        # On CUDA, depth-wise convolutions in float32 would leave PyTorch's own kernels for slower ones.
        channels_last=node.CHANNELS_LAST and cfg.MODEL.DEVICE == "cpu",
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN on MODEL.TIMM."""
    node = cfg.MODEL.TIMM
    return build_fpn(cfg, timm_features(node.NAME, weights=node.WEIGHTS, norm=node.NORM))
