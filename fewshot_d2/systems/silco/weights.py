"""Weights of others for the VGG16 trunk, by names: torchvision's SSD300 and VGG16, and ``vgg16_reducedfc``."""

from collections.abc import Mapping

from torch import Tensor

# Layers of torchvision's first extra block, which begins with the fourth pooling, and of the reduced VGG16.
_SSD300_FC = {"extra.0.7.1": "fc6", "extra.0.7.3": "fc7"}
_REDUCED_FC = {"31": "fc6", "33": "fc7"}


def trunk_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an ``SSDTrunk`` on VGG16; a classifier's layers without a place in it are left out.

    What the file has not, the extra layers and for ``vgg16`` fc6 and fc7, stays as in ``own``.

    Args:
        state: of ``ssd300_vgg16``, of ``vgg16`` or of its reduced form. own: state dict of the trunk.

    Raises:
        ValueError: it is none of them.
    """
    if "backbone.scale_weight" in state:
        named = {_from_ssd300(n.removeprefix("backbone.")): n for n in state if "backbone." in n}
    elif "features.0.weight" in state:
        named = {f"bottom_up.{n}": n for n in state if n.startswith("features.")}
    elif "0.weight" in state:
        named = {_from_reduced(n): n for n in state}
    else:
        raise ValueError(
            "names of the weights must be those of ssd300_vgg16, vgg16 or vgg16_reducedfc, got for example "
            f"{sorted(state)[:2]}"
        )
    return {**own, **{name: state[source] for name, source in named.items()}}


def _from_ssd300(name: str) -> str:
    """Name in the trunk of a weight of torchvision's SSD300, without "backbone."."""
    if name == "scale_weight":
        return "scale"
    if name.startswith("features."):
        return f"bottom_up.{name}"
    layer, _, kind = name.rpartition(".")
    if layer in _SSD300_FC:
        return f"bottom_up.{_SSD300_FC[layer]}.{kind}"
    _, block, position = layer.split(".")
    if block == "0":
        return f"bottom_up.features.{23 + int(position)}.{kind}"
    return f"extras.{int(block) - 1}.{position}.{kind}"


def _from_reduced(name: str) -> str:
    layer, _, kind = name.partition(".")
    return f"bottom_up.{_REDUCED_FC.get(layer, f'features.{layer}')}.{kind}"
