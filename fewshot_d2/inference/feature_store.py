"""Encoded supports kept in their support-set file, and the hashes that say for whom they are good.

Features are reused only if the model (weights and all settings that can change them) and the examples are the same, to
the last bit. The names and ids of classes may have changed: features do not depend on them.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..decoding import printable
from ..files import canonical_sha256
from ..structures import SupportFeatures, SupportSet
from ..support_files import MAX_MEMBER_BYTES, read_features, write_archive

logger = logging.getLogger(__name__)

# To be raised when the code changes so that old features are of no use.
_VERSION = 1


def model_sha256(model: nn.Module, cfg: CfgNode) -> str:
    """Hash of the weights, of MODEL and of how images are read; device and file names do not count."""
    settings = cfg.clone()
    settings.defrost()
    settings.MODEL.pop("DEVICE")
    for node in (settings.MODEL, settings.MODEL.TORCHVISION, settings.MODEL.TIMM):
        node.pop("WEIGHTS")
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
    entry = read_features(path, model_hash).get(model_hash)
    if entry is None or entry.get("examples_sha256") != examples_sha256(support_set):
        return None
    ids, names = list(support_set.class_ids), list(support_set.class_names)
    try:
        return SupportFeatures(entry["tensors"], ids, names, str(entry.get("system", "")))
    # Of no axis, or of another number of classes.
    except (ValueError, TypeError) as error:
        raise ValueError(f"{printable(path)} must be a support-set file, got: {error}") from error


def save_keeping_features(
    path: str | Path, support_set: SupportSet, added: Mapping[str, SupportFeatures] | None = None
) -> None:
    """Write the support set, atomically, with those features of an older file of that name that are still good.

    Features that are too large for a file are left out, with a warning.

    Args:
        added: {hash of a model: its features}.

    Raises:
        OSError: the file cannot be written.
        ValueError: the older file is broken.
    """
    examples_hash = examples_sha256(support_set)
    older = read_features(path) if Path(path).exists() else {}
    kept = {m: entry for m, entry in older.items() if entry.get("examples_sha256") == examples_hash}
    for model, features in (added or {}).items():
        largest = max((t.numel() * t.element_size() for t in features.tensors.values()), default=0)
        if largest > MAX_MEMBER_BYTES:
            logger.warning("Features of %d bytes are not kept in %s", largest, path)
            continue
        kept[model] = {
            "system": features.system,
            "examples_sha256": examples_hash,
            "tensors": features.tensors,
        }
    write_archive(path, support_set.rows(), kept)
