"""The support-set file: a zip of PNG images, a JSON index and, optionally, encoded features. No pickle, no extraction.

``support_set.json`` lists classes and examples; ``features.json`` lists, by the hash of a model, raw little-endian
tensors. A file may come from anywhere: members are read by the exact names of an index, after their declared sizes, and
the sum of all pixels, were found harmless.
"""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import open_image, printable
from .files import atomic_path

_FORMAT = "fewshot_d2/support_set"
_VERSION = 1
_INDEX, _FEATURES = "support_set.json", "features.json"
# A member larger than this is refused unread: a few kilobytes of zip can declare terabytes.
MAX_MEMBER_BYTES = 64 << 20
_MAX_INDEX_BYTES = 16 << 20
# Of an image: as large as a PNG of ``decoding.MAX_PIXELS`` can be.
_MAX_PNG_BYTES = 200 << 20
# Of all tensors that are read together.
_MAX_FEATURE_BYTES = 1 << 30
# Of all images of a file together; a black PNG is a thousand times smaller than its pixels.
_MAX_PIXELS_IN_ALL = 400_000_000

# What reading a broken zip, JSON, PNG or tensor raises.
_BROKEN = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OverflowError),
    *(RuntimeError, RecursionError, MemoryError, SyntaxError, struct.error, zlib.error),
    *(zipfile.BadZipFile, NotImplementedError, Image.DecompressionBombError),
)

# One example as the fields of a ``Support``: image, box, mask, negative.
Example = dict[str, Any]


def write_archive(
    path: str | Path,
    classes: Sequence[tuple[int, str, Sequence[Example]]],
    features: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write (id, name, examples) of each class, and features, atomically.

    Args:
        features: {hash of a model: {"tensors": {name: Tensor}, and anything else that JSON can hold}}.

    Raises:
        OSError: the file cannot be written; an older file of that name is left as it was.
        ValueError: more pixels than ``read_archive`` takes.
    """
    pixels = sum(
        shot["image"][0].numel() * (1 if shot["mask"] is None else 2)
        for _, _, shots in classes
        for shot in shots
    )
    if pixels > _MAX_PIXELS_IN_ALL:
        raise ValueError(
            f"examples must have at most {_MAX_PIXELS_IN_ALL} pixels in all (cut them out, or make them "
            f"smaller), got {pixels} for {printable(path)}"
        )
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        index = [
            {
                "id": class_id,
                "name": name,
                "examples": [
                    _write_example(archive, f"{k}_{s}", shot) for s, shot in enumerate(shots)
                ],
            }
            for k, (class_id, name, shots) in enumerate(classes)
        ]
        header = {"format": _FORMAT, "version": _VERSION, "classes": index}
        archive.writestr(_INDEX, json.dumps(header, indent=1))
        if features:
            archive.writestr(_FEATURES, json.dumps(_write_features(archive, features), indent=1))


def read_archive(path: str | Path) -> list[tuple[int, str, list[Example]]]:
    """Read (id, name, examples) of each class.

    Raises:
        ValueError: it cannot be opened, is no support set, or a part of it is broken; the message names file and part.
    """
    with _opened(path) as archive:
        header = json.loads(_read_member(archive, _INDEX, _MAX_INDEX_BYTES))
        if (
            not isinstance(header, dict)
            or header.get("format") != _FORMAT
            or header["version"] != _VERSION
        ):
            raise ValueError(f"format must be {_FORMAT} version {_VERSION}")
        reader = _ImageReader(archive)
        return [
            (int(row["id"]), str(row["name"]), [reader.example(shot) for shot in row["examples"]])
            for row in header["classes"]
        ]


def read_features(path: str | Path, model: str | None = None) -> dict[str, dict[str, Any]]:
    """The features of ``write_archive``, of one model or of all; empty where the file has none."""
    with _opened(path) as archive:
        if _FEATURES not in archive.namelist():
            return {}
        index = json.loads(_read_member(archive, _FEATURES, _MAX_INDEX_BYTES))
        chosen = {str(name): entry for name, entry in index.items() if model in (None, name)}
        rows = [row for entry in chosen.values() for row in entry["tensors"].values()]
        # Each tensor may be small, and a member may serve any number of them.
        size = sum(archive.getinfo(row["member"]).file_size for row in rows)
        if size > _MAX_FEATURE_BYTES:
            raise ValueError(f"features must be at most {_MAX_FEATURE_BYTES} bytes, got {size}")
        return {
            name: {
                **entry,
                "tensors": {
                    str(key): _read_tensor(archive, row) for key, row in entry["tensors"].items()
                },
            }
            for name, entry in chosen.items()
        }


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        # A folder or a pipe is no zip, and a pipe would be waited for.
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, *_BROKEN) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = printable(reason)
        raise ValueError(f"{printable(path)} must be a support-set file, got: {reason}") from error


def _read_member(archive: zipfile.ZipFile, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Read a member by the exact name that the index gives; nothing is ever extracted to disk."""
    info = archive.getinfo(name)
    # Decoders of other methods raise errors of their own.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} must be stored or deflated, got method {info.compress_type}")
    if info.file_size > limit:
        raise ValueError(f"{name} must be at most {limit} bytes, got {info.file_size}")
    try:
        return archive.read(info)
    except _BROKEN as error:
        raise ValueError(f"{name} must be readable, got: {error}") from error


def _write_example(archive: zipfile.ZipFile, stem: str, shot: Example) -> dict[str, Any]:
    archive.writestr(f"{stem}.png", _png_bytes(shot["image"].permute(1, 2, 0).numpy()))
    if shot["mask"] is not None:
        archive.writestr(f"{stem}_mask.png", _png_bytes(shot["mask"].numpy()))
    return {
        "image": f"{stem}.png",
        "mask": None if shot["mask"] is None else f"{stem}_mask.png",
        "box": None if shot["box"] is None else shot["box"].tolist(),
        "negative": shot["negative"],
    }


def _png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class _ImageReader:
    """Reads the images of one archive and counts their pixels."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.pixels = 0

    def example(self, row: Mapping[str, Any]) -> Example:
        """The fields of one ``Support``."""
        box, mask = row["box"], row["mask"]
        return {
            "image": self._png(row["image"], "RGB").permute(2, 0, 1).contiguous(),
            "box": None if box is None else torch.tensor(box, dtype=torch.float32),
            "mask": None if mask is None else self._png(mask, "L") > 0,
            "negative": bool(row["negative"]),
        }

    def _png(self, name: str, mode: str) -> Tensor:
        content = _read_member(self.archive, name, _MAX_PNG_BYTES)
        try:
            with open_image(content, ("PNG",)) as image:
                self.pixels += image.width * image.height
                if self.pixels > _MAX_PIXELS_IN_ALL:
                    raise ValueError(
                        f"a file may have at most {_MAX_PIXELS_IN_ALL} pixels in all, got more"
                    )
                return torch.from_numpy(np.array(image.convert(mode)))
        except (OSError, *_BROKEN) as error:
            raise ValueError(f"{name} must be a readable PNG, got: {error}") from error


def _write_features(
    archive: zipfile.ZipFile, features: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the tensors and return their index."""
    index: dict[str, Any] = {}
    for model, entry in features.items():
        rows = {}
        for name, tensor in entry["tensors"].items():
            member = f"features/{len(index)}_{len(rows)}.bin"
            plain = tensor.detach().cpu().contiguous()
            archive.writestr(member, plain.reshape(-1).view(torch.uint8).numpy().tobytes())
            dtype = str(plain.dtype).removeprefix("torch.")
            rows[name] = {"member": member, "dtype": dtype, "shape": list(plain.shape)}
        index[model] = {**entry, "tensors": rows}
    return index


def _read_tensor(archive: zipfile.ZipFile, row: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, str(row["dtype"]), None)
    shape = [int(side) for side in row["shape"]]
    content = _read_member(archive, row["member"])
    if not isinstance(dtype, torch.dtype) or any(side < 0 for side in shape):
        raise ValueError(f"{row['member']} must have a dtype and a shape, got {dict(row)}")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(content):
        raise ValueError(
            f"{row['member']} must have the bytes of {dtype} {shape}, got {len(content)} bytes"
        )
    if not content:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
