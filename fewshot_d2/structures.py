"""The batch contract: ``Support``, ``SupportSet`` and ``SupportFeatures``.

Shape letters used in the whole package: N queries, K classes (ways), S shots, P (query, class) pairs,
R ROIs, L levels, C,H,W query map, h,w support map, D embedding dimension, M modes.

A *query dict* is detectron2's (``image, height, width, image_id, file_name, instances``) plus ``support``, a
``SupportSet``, and in evaluation ``episode_id``. ``instances.gt_classes`` are episode-local, 0..K-1, in the order of
``support.class_ids``. This module imports nothing else of ours.
"""

import dataclasses
import io
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .files import atomic_path, write_tensors

_FORMAT = "fewshot_d2/support_set"
_VERSION = 1
# A member or an image larger than this is refused unread: a few kilobytes of zip can declare terabytes.
_MAX_MEMBER_BYTES = 64 << 20
_MAX_PIXELS = 64_000_000


@dataclass
class Support:
    """One example of a class.

    Attributes:
        image (Tensor[3, H, W]): uint8, RGB whatever ``INPUT.FORMAT`` says.
        box (Tensor[4] or None): XYXY, absolute pixels of ``image``, float32; None = the whole image is the example.
        mask (Tensor[H, W] or None): bool, in the frame of ``image``.
        negative (bool): the example shows what must *not* be found.
    """

    image: Tensor
    box: Tensor | None = None
    mask: Tensor | None = None
    negative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.image, Tensor):
            raise ValueError(f"support must have an image tensor, got {type(self.image).__name__}")
        shape = tuple(self.image.shape)
        if len(shape) != 3 or shape[0] != 3 or 0 in shape or self.image.dtype != torch.uint8:
            raise ValueError(
                f"support image must be a non-empty uint8 tensor (3, H, W), got {self.image.dtype} {shape}"
            )
        if self.box is not None:
            self.box = _checked_box(self.box, height=shape[1], width=shape[2])
        if self.mask is not None and (
            self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape[1:]
        ):
            raise ValueError(
                f"support mask must be a bool tensor {shape[1:]} like its image, "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )

    @classmethod
    def from_file(cls, path: str | Path, box: Sequence[float] | None = None) -> "Support":
        """Read an image of the user's, turned as its EXIF tag says.

        Args:
            path: any format that Pillow reads.
            box: XYXY in pixels of the image; None = the whole image is the example.

        Raises:
            ValueError: missing, broken or too large; names the file.
        """
        try:
            with Image.open(path) as image:
                _check_pixels(image)
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} must be a readable image, got: {error}") from error
        corners = None if box is None else torch.tensor(box, dtype=torch.float32)
        return cls(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), corners)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def region(self) -> Tensor:
        """Tensor[4]: the box, or the whole image where there is none. XYXY, absolute pixels."""
        if self.box is not None:
            return self.box
        height, width = self.image_size
        return torch.tensor([0.0, 0.0, width, height])


def _checked_box(box: Tensor, *, height: int, width: int) -> Tensor:
    """Clip ``box`` (XYXY, pixels) to the image; raise where nothing of it remains."""
    box = torch.as_tensor(box, dtype=torch.float32)
    if tuple(box.shape) != (4,) or not torch.isfinite(box).all():
        raise ValueError(f"support box must be 4 finite numbers XYXY, got {box.tolist()}")
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    clipped = torch.minimum(box.clamp(min=0), limit)
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise ValueError(
            f"support box must have an area inside its {width}x{height} image, got XYXY {box.tolist()}"
        )
    return clipped


@dataclass
class SupportSet:
    """K classes with their examples; the same file serves every system.

    Attributes:
        class_ids (list[int]): ids of the classes, unique; category ids of the data set where there is one.
        class_names (list[str]): one name a class.
        examples (list[list[Support]]): at least one ``Support`` a class; shots may differ between classes.
    """

    class_ids: list[int]
    class_names: list[str]
    examples: list[list[Support]]

    def __post_init__(self) -> None:
        lengths = (len(self.class_ids), len(self.class_names), len(self.examples))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"class_ids, class_names and examples must be equally long, got {lengths}"
            )
        if not self.class_ids:
            raise ValueError("a support set must have at least one class, got none")
        if len(set(self.class_ids)) != len(self.class_ids):
            raise ValueError(f"class_ids must be unique, got {self.class_ids}")
        for name, shots in zip(self.class_names, self.examples, strict=True):
            if not any(not shot.negative for shot in shots):
                raise ValueError(
                    f"class {name!r} must have at least one positive support, got {len(shots)} in all"
                )

    def __len__(self) -> int:
        return len(self.class_ids)

    def positives(self) -> list[list[Support]]:
        """The examples without the negative ones, class by class."""
        return [[shot for shot in shots if not shot.negative] for shots in self.examples]

    def save(self, path: str | Path) -> None:
        """Write one zip of PNG images and a JSON index, atomically.

        Raises:
            OSError: the file cannot be written; an older file of that name is left as it was.
        """
        index, pngs = [], {}
        for class_id, name, shots in zip(
            self.class_ids, self.class_names, self.examples, strict=True
        ):
            rows = []
            for shot in shots:
                stem = f"{len(index)}_{len(rows)}"
                pngs[f"{stem}.png"] = _png_bytes(shot.image.permute(1, 2, 0).numpy())
                if shot.mask is not None:
                    pngs[f"{stem}_mask.png"] = _png_bytes(shot.mask.numpy())
                rows.append(
                    {
                        "image": f"{stem}.png",
                        "mask": None if shot.mask is None else f"{stem}_mask.png",
                        "box": None if shot.box is None else shot.box.tolist(),
                        "negative": shot.negative,
                    }
                )
            index.append({"id": class_id, "name": name, "examples": rows})
        header = {"format": _FORMAT, "version": _VERSION, "classes": index}
        with (
            atomic_path(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr("support_set.json", json.dumps(header, indent=1))
            for name, content in pngs.items():
                archive.writestr(name, content)

    @classmethod
    def load(cls, path: str | Path) -> "SupportSet":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is not a support set or a part of it is broken; the message names file and part.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                header = json.loads(_read_member(archive, "support_set.json"))
                if (
                    not isinstance(header, dict)
                    or header.get("format") != _FORMAT
                    or header["version"] != _VERSION
                ):
                    raise ValueError(f"format must be {_FORMAT} version {_VERSION}")
                classes = header["classes"]
                return cls(
                    class_ids=[int(row["id"]) for row in classes],
                    class_names=[str(row["name"]) for row in classes],
                    examples=[
                        [_read_support(archive, shot) for shot in row["examples"]]
                        for row in classes
                    ],
                )
        except (
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            zipfile.BadZipFile,
            NotImplementedError,
        ) as error:
            raise ValueError(f"{path} must be a support-set file, got: {error}") from error


def _png_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member by the exact name that the index gives; nothing is ever extracted to disk."""
    info = archive.getinfo(name)
    if info.file_size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name} must be at most {_MAX_MEMBER_BYTES} bytes, got {info.file_size}")
    return archive.read(info)


def _read_png(archive: zipfile.ZipFile, name: str, mode: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(_read_member(archive, name)), formats=("PNG",)) as image:
            _check_pixels(image)
            return torch.from_numpy(np.array(image.convert(mode)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} must be a readable PNG, got: {error}") from error


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"at most {_MAX_PIXELS} pixels are allowed, got {image.size}")


def _read_support(archive: zipfile.ZipFile, row: Mapping) -> Support:
    return Support(
        image=_read_png(archive, row["image"], "RGB").permute(2, 0, 1).contiguous(),
        box=None if row["box"] is None else torch.tensor(row["box"], dtype=torch.float32),
        mask=None if row["mask"] is None else _read_png(archive, row["mask"], "L") > 0,
        negative=bool(row["negative"]),
    )


@dataclass
class SupportFeatures:
    """What ``encode_support`` keeps of K classes; independent of any query.

    Attributes:
        tensors (dict[str, Tensor[K, ...]]): a system's own tensors, each with a leading class axis.
        class_ids (list[int]), class_names (list[str]): one a class.
        system (str): name of the meta-architecture that made them; another one refuses them.
    """

    tensors: dict[str, Tensor]
    class_ids: list[int]
    class_names: list[str] = field(default_factory=list)
    system: str = ""

    def __post_init__(self) -> None:
        self.class_names = self.class_names or [str(i) for i in self.class_ids]
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        wrong = {name: length for name, length in lengths.items() if length != len(self.class_ids)}
        if wrong or len(self.class_names) != len(self.class_ids):
            raise ValueError(
                f"support features must all have {len(self.class_ids)} classes on their first axis, got {lengths} "
                f"and {len(self.class_names)} names"
            )

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, index: Sequence[int]) -> "SupportFeatures":
        """The classes at the given positions, in that order."""
        index = list(index)
        return dataclasses.replace(
            self,
            tensors={name: tensor[index] for name, tensor in self.tensors.items()},
            class_ids=[self.class_ids[i] for i in index],
            class_names=[self.class_names[i] for i in index],
        )

    def to(self, device: torch.device | str) -> "SupportFeatures":
        """The same features on another device."""
        return dataclasses.replace(
            self, tensors={name: t.to(device) for name, t in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Iterable["SupportFeatures"]) -> "SupportFeatures":
        """Join along the class axis; all parts must come from one system. See ``cat_padded``."""
        parts = list(parts)
        kinds = {(part.system, tuple(sorted(part.tensors))) for part in parts}
        if len(kinds) != 1:
            raise ValueError(
                f"support features to be joined must be of one system, got {sorted(kinds)}"
            )
        return SupportFeatures(
            tensors={
                name: cat_padded([p.tensors[name] for p in parts]) for name in parts[0].tensors
            },
            class_ids=[i for p in parts for i in p.class_ids],
            class_names=[n for p in parts for n in p.class_names],
            system=parts[0].system,
        )

    def save(self, path: str | Path) -> None:
        """Write tensors and names with ``torch.save``, atomically."""
        write_tensors(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "SupportFeatures":
        """Read what ``save`` wrote (``weights_only=True``: no code is run)."""
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except (TypeError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} must be a support-features file, got: {error}") from error


def cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Join (K, M, ...) tensors along K; where M, say the number of shots, differs, zeros fill the shorter ones.

    Which of the M are real is for another tensor to say, a mask that is joined in the same way.
    """
    if tensors[0].dim() > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [
            torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], dim=1)
            for t in tensors
        ]
    return torch.cat(list(tensors))
