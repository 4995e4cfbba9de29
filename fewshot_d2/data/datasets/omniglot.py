"""Omniglot as a glyph source: 1623 handwritten characters of 50 alphabets, 20 drawings of each by 20 people.

The images (Lake et al., 2015, MIT licence) are read where they lie, from ``omniglot.zip`` or the folder ``omniglot``
below ``DETECTRON2_DATASETS``; within it ``images_background/alphabet/character/drawing.png`` and the same below
``images_evaluation``. Classes are in the order of these paths, so background characters come first.
"""

import functools
import io
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...files import dataset_path

# Half-open class ranges of the whole data set. The ten first and ten last evaluation alphabets are the two one-shot
# sets of cluttered Omniglot.
BACKGROUND = (0, 964)
EVALUATION = (964, 1623)
VAL_ONE_SHOT = (964, 1271)
TEST_ONE_SHOT = (1271, 1623)
# Drawers 1-10 are for training, 11-20 for evaluation.
TRAIN_DRAWERS = (0, 10)
VAL_DRAWERS = (10, 20)

_PLACES = ("omniglot.zip", "omniglot")
_MEMBER = re.compile(r"(?:^|/)images_(background|evaluation)/([^/]+)/([^/]+)/[^/]+\.png$")


@dataclass(frozen=True)
class OmniglotGlyphs:
    """Drawings of Omniglot, read one by one.

    Attributes:
        path: zip or folder; None looks for the usual places below ``DETECTRON2_DATASETS``. It is no part of the
            source's identity.
        characters: expected number of background and evaluation characters; with one missing, all class indices
            behind it would silently mean something else.
    """

    path: str | None = field(default=None, compare=False)
    characters: tuple[int, int] = (BACKGROUND[1], EVALUATION[1] - EVALUATION[0])

    @property
    def num_classes(self) -> int:
        """Number of characters."""
        return sum(self.characters)

    @property
    def class_names(self) -> list[str]:
        """Names "alphabet/character"."""
        return list(self._archive.drawings)

    @property
    def stroke_width(self) -> float:
        """Typical stroke width in pixels of a drawing."""
        return 5.0

    def num_drawings(self, class_index: int) -> int:
        """Number of drawings of the character."""
        return len(self._archive.members_of(class_index))

    def drawing(self, class_index: int, drawing_index: int) -> np.ndarray:
        """Uint8 (105, 105): 255 = ink."""
        members = self._archive.members_of(class_index)
        if not 0 <= drawing_index < len(members):
            raise IndexError(
                f"drawing index of {self._archive.path}, class {class_index} must be in "
                f"0..{len(members) - 1}, got {drawing_index}"
            )
        return self._archive.read_ink(members[drawing_index])

    @property
    def _archive(self) -> "_Archive":
        archive = _opened(find_omniglot() if self.path is None else Path(self.path))
        if archive.characters != self.characters:
            raise ValueError(
                f"{archive.path} must hold {self.characters[0]} background and {self.characters[1]} "
                f"evaluation characters, got {archive.characters[0]} and {archive.characters[1]}"
            )
        return archive


def find_omniglot() -> Path:
    """The zip or folder below ``DETECTRON2_DATASETS``.

    Raises:
        FileNotFoundError: it is in none of the usual places; the message names them.
    """
    candidates = [dataset_path(place) for place in _PLACES]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    tried = " and ".join(str(candidate.absolute()) for candidate in candidates)
    raise FileNotFoundError(
        f"Omniglot must be {' or '.join(_PLACES)} below the folder that the environment variable "
        f"DETECTRON2_DATASETS names (default 'datasets'), got neither; tried {tried}"
    )


class _Archive:
    """A zip or folder of drawings.

    Attributes:
        drawings: {"alphabet/character": sorted member names}, background characters first.
        characters: number of background and of evaluation characters.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self._zip = None
            files = path.glob("**/images_*/*/*/*.png")
            members = [file.relative_to(path).as_posix() for file in files]
        else:
            # In memory, because forked processes would share the position in one open file.
            self._zip = _read_zip(path)
            members = self._zip.namelist()
        found: dict[tuple[str, str, str], list[str]] = {}
        for member in members:
            match = _MEMBER.search(member)
            if match and not member.startswith("__MACOSX"):
                found.setdefault(match.groups(), []).append(member)
        keys = sorted(found)
        background = sum(part == "background" for part, _, _ in keys)
        self.characters = (background, len(keys) - background)
        self.drawings = {f"{key[1]}/{key[2]}": sorted(found[key]) for key in keys}
        self._members = list(self.drawings.values())
        self._decoded: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {}

    def members_of(self, class_index: int) -> list[str]:
        """Member names of a character's drawings, by drawer."""
        if not 0 <= class_index < len(self._members):
            raise IndexError(
                f"class index of {self.path} must be in 0..{len(self._members) - 1}, got {class_index}"
            )
        return self._members[class_index]

    def read_ink(self, member: str) -> np.ndarray:
        """Uint8 (S, S): 255 where the drawing is black."""
        if member not in self._decoded:
            ink = self._decode(member)
            # One bit a pixel: all of Omniglot takes 45 MB.
            self._decoded[member] = np.packbits(ink), ink.shape
        bits, shape = self._decoded[member]
        return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape) * np.uint8(255)

    def _decode(self, member: str) -> np.ndarray:
        try:
            data = self._zip.read(member) if self._zip else (self.path / member).read_bytes()
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                return np.array(image.convert("L")) < 128
        except (OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path}: {member} must be a readable PNG, got: {error}"
            ) from error


def _read_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} must be a zip file of Omniglot, got: {error}") from error


@functools.lru_cache(maxsize=2)
def _opened(path: Path) -> _Archive:
    return _Archive(path)
