"""Encoded supports kept in their support-set file, and the hashes that say for whom they are good.

Features are reused only if the model (weights and all settings that can change them) and the examples are the same, to
the last bit. The names and ids of classes may have changed: features do not depend on them.
"""

import hashlib
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..files import canonical_sha256
from ..structures import SupportFeatures, SupportSet
from ..support_files import MAX_MEMBER_BYTES, read_features, write_archive

# To be raised when the code changes so that old features are of no use.
_VERSION = 1


def model_sha256(model: nn.Module, cfg: CfgNode) -> str:
    """Hash of the weights, of MODEL and of how images are read; device and file names do not count."""
    settings = cfg.clone()
    settings.defrost()
    for key in ("DEVICE", "WEIGHTS"):
        settings.MODEL.pop(key)
    parts = {
        "version": _VERSION,
        "system": type(model).__name__,
        "weights": _tensors_sha256(model.state_dict()),
        "settings": [
            node.dump() for node in (settings.MODEL, settings.INPUT, settings.FEWSHOT.SUPPORT)
        ],
        "resize_rule": settings.FEWSHOT.RESIZE_RULE,
    }
    return canonical_sha256(parts)


def examples_sha256(support_set: SupportSet) -> str:
    """Hash of the examples, class by class, without names and ids."""
    digests = [
        [
            _tensors_sha256({name: value for name, value in fields.items() if name != "negative"})
            + str(fields["negative"])
            for fields in shots
        ]
        for _, _, shots in support_set.rows()
    ]
    return canonical_sha256(digests)


def _tensors_sha256(tensors: dict[str, Tensor | None]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(
            f"{name} {None if tensor is None else (tensor.dtype, tuple(tensor.shape))};".encode()
        )
        if tensor is not None and tensor.numel():
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def load_features(
    path: str | Path, support_set: SupportSet, model_hash: str
) -> SupportFeatures | None:
    """The features of a model in a support-set file, if there are any and they are of these examples.

    Raises:
        ValueError: the file is broken.
    """
    entry = read_features(path).get(model_hash)
    if entry is None or entry.get("examples_sha256") != examples_sha256(support_set):
        return None
    return SupportFeatures(
        entry["tensors"],
        list(support_set.class_ids),
        list(support_set.class_names),
        str(entry.get("system", "")),
    )


def save_with_features(
    path: str | Path, support_set: SupportSet, features: SupportFeatures, model_hash: str
) -> None:
    """Write the support set with its features, atomically; those of other models in that file stay if still good.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is too large for the file.
    """
    sizes = {name: t.numel() * t.element_size() for name, t in features.tensors.items()}
    if max(sizes.values(), default=0) > MAX_MEMBER_BYTES:
        raise ValueError(f"features must be at most {MAX_MEMBER_BYTES} bytes each, got {sizes}")
    examples_hash = examples_sha256(support_set)
    others = read_features(path) if Path(path).exists() else {}
    kept = {
        model: entry
        for model, entry in others.items()
        if entry.get("examples_sha256") == examples_hash
    }
    kept[model_hash] = {
        "system": features.system,
        "examples_sha256": examples_hash,
        "tensors": features.tensors,
    }
    write_archive(path, support_set.rows(), kept)
