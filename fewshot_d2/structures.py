"""The batch contract: ``Support``, ``SupportSet`` and ``SupportFeatures``.

Shape letters used in the whole package: N queries, K classes (ways), S shots, P (query, class) pairs,
R ROIs, L levels, C,H,W query map, h,w support map, D embedding dimension, M modes.

A *query dict* is detectron2's (``image, height, width, image_id, file_name, instances``) plus ``support``, a
``SupportSet``, and in evaluation ``episode_id``. ``instances.gt_classes`` are episode-local, 0..K-1, in the order of
``support.class_ids``. Of ours this module imports only what reads and writes files.
"""

import dataclasses
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decoding import printable, read_rgb
from .files import write_tensors
from .support_files import read_archive, write_archive


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
    def from_file(
        cls,
        path: str | Path,
        box: Sequence[float] | None = None,
        mask: str | Path | None = None,
        *,
        negative: bool = False,
    ) -> "Support":
        """Read an image of the user's, turned as its EXIF tag says.

        Args:
            path: see ``decoding.read_rgb``.
            box: XYXY in pixels of the image; None = the box around ``mask``, or the whole image without one.
            mask: an image of the same size, white (brighter than half) where the example is; transparent parts are not.
            negative: the example shows what must not be found.

        Raises:
            ValueError: missing, broken or too large, or a box or mask that does not fit; names the file.
        """
        image = torch.from_numpy(read_rgb(path)).permute(2, 0, 1).contiguous()
        inside, names = None, printable(path)
        if mask is not None:
            inside = torch.from_numpy(read_rgb(mask, paper=0).mean(axis=2) > 127)
            names = f"{names} with mask {printable(mask)}"
        try:
            corners = None if box is None else torch.tensor(box, dtype=torch.float32)
            if inside is not None and corners is None:
                corners = _box_of_mask(inside)
            return cls(image, corners, inside, negative)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{names}: {error}") from error

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


def _box_of_mask(mask: Tensor) -> Tensor:
    """The tight box (XYXY, pixels) around a bool mask (H, W)."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("support mask must have a white pixel, got none")
    ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return torch.stack(ends).float()


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

    def one_class(self, k: int, shots: Sequence[Support]) -> "SupportSet":
        """Class ``k`` alone, with these examples."""
        return SupportSet([self.class_ids[k]], [self.class_names[k]], [list(shots)])

    def save(self, path: str | Path) -> None:
        """Write one zip of PNG images and a JSON index, atomically.

        Raises:
            OSError: the file cannot be written; an older file of that name is left as it was.
        """
        write_archive(path, self.rows())

    def rows(self) -> list[tuple[int, str, list[dict[str, Any]]]]:
        """(id, name, fields of the examples) of each class, as ``support_files`` writes them."""
        fields = [[vars(shot) for shot in shots] for shots in self.examples]
        return list(zip(self.class_ids, self.class_names, fields, strict=True))

    @classmethod
    def load(cls, path: str | Path) -> "SupportSet":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is not a support set or a part of it is broken; the message names file and part.
        """
        rows = read_archive(path)
        try:
            examples = [[Support(**shot) for shot in shots] for _, _, shots in rows]
            return cls([row[0] for row in rows], [row[1] for row in rows], examples)
        except ValueError as error:
            raise ValueError(
                f"{printable(path)} must be a support-set file, got: {error}"
            ) from error


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

    Which of the M are real is for another tensor to say, a mask that is joined in the same way. A single tensor is not
    copied: features of a thousand classes are large.
    """
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dim() > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [
            t
            if t.shape[1] == longest
            else torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], dim=1)
            for t in tensors
        ]
    return torch.cat(list(tensors))
