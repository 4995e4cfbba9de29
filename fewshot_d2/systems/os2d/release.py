"""Weights of the original release of OS2D, and of weakalign, which its V2 starts from, by our names (spec 1.2, 1.5).

Only names differ: torchvision's ResNet is detectron2's with the stride in the 3x3 convolutions, and TransformNet has
its submodules' original names.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import write_tensors

_TRANSFORM = "matcher.transform_net."
# Prefixes of the release and of weakalign: the shared extractor (the release has it twice) and the regressor.
_EXTRACTOR = "net_feature_maps."
_EXTRACTOR_AGAIN = "net_label_features.net_class_features."
_REGRESSOR = "os2d_head_creator.aligner.parameter_regressor."
_ALIGN_EXTRACTOR, _ALIGN_REGRESSOR = "FeatureExtraction.model.", "FeatureRegression."
# Places of torchvision's parts in weakalign's sequence.
_ALIGN_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}
_AFFINE, _HIDDEN, _KERNEL = 6, 64, 5


def convert_file(path: str | Path, output: str | Path) -> int:
    """Convert a checkpoint; returns the number of its tensors.

    Raises:
        ValueError: the file is no checkpoint of either kind; names it.
        OSError: it cannot be read, or the output not be written.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = convert(_state_of(content))
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} must be a checkpoint of OS2D or weakalign, got: {error}"
        ) from error
    write_tensors(output, {"model": state, "system": "OS2D"})
    return len(state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the release or of weakalign by our names.

    Raises:
        ValueError: a name that belongs to neither, the two copies of the extractor differ, or a part is missing.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = _new_name(name.removeprefix("module."))
        if new in converted and not torch.equal(converted[new], tensor):
            raise ValueError(f"both branches must have the same weights, got others for {name}")
        converted[new] = tensor
    for part in ("backbone.stem.", _TRANSFORM):
        if not any(name.startswith(part) for name in converted):
            raise ValueError(f"weights of {part}* must be there, got {len(converted)} others")
    return _convolutional(converted)


def _state_of(content: Any) -> Mapping[str, Tensor]:
    """The weights in a checkpoint: all of it, or one of its entries."""
    if isinstance(content, Mapping):
        for key in ("net", "state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                return content[key]
        if all(isinstance(value, Tensor) for value in content.values()):
            return content
    raise ValueError(f"a dict of weights expected in a {type(content).__name__}")


def _new_name(name: str) -> str:
    for prefix in (_EXTRACTOR, _EXTRACTOR_AGAIN):
        if name.startswith(prefix):
            return "backbone." + _resnet_name(name.removeprefix(prefix))
    if name.startswith(_ALIGN_EXTRACTOR):
        part, _, rest = name.removeprefix(_ALIGN_EXTRACTOR).partition(".")
        if part in _ALIGN_PARTS:
            return "backbone." + _resnet_name(f"{_ALIGN_PARTS[part]}.{rest}")
    for prefix in (_REGRESSOR, _ALIGN_REGRESSOR):
        if name.startswith(prefix):
            return _TRANSFORM + name.removeprefix(prefix)
    raise ValueError(f"a weight of the release or of weakalign expected, {name} is none")


def _resnet_name(name: str) -> str:
    """Torchvision's name of a ResNet's weight -> detectron2's."""
    name = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _convolutional(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weakalign's last, fully connected layer as the convolution that it is."""
    name = f"{_TRANSFORM}linear.weight"
    weight = state.get(name)
    if weight is not None and weight.dim() == 2:
        state[name] = weight.view(_AFFINE, _HIDDEN, _KERNEL, _KERNEL)
    return state
