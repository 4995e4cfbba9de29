"""GroZi-3.2k, dairy and paste (OS2D 6.1 and A.1): packages on shelves, an image of each product, boxes in CSV files.

Files lie as in the release of OS2D. Of GroZi the sets of validation share their images, and each has the classes and
boxes of its own part: "old" classes are trained on, "new" ones are not.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...files import dataset_path
from ..class_images import OneShotSet, classes_of, images_of, read_csv, register_one_shot


@dataclass(frozen=True)
class RetailSet:
    """One row of the catalogue.

    Attributes:
        folder: below the folder of data sets, has classes/<folder>.csv and classes/images. images: below ``folder``.
        parts: values of the column ``split`` whose boxes count. image_parts: those whose images count. Empty = all.
        ignore_difficult: take all boxes as ordinary ones.
    """

    folder: str
    images: str
    parts: tuple[str, ...] = ()
    image_parts: tuple[str, ...] = ()
    ignore_difficult: bool = False


_VALIDATION = ("val-old-cl", "val-new-cl")
SETS = {
    "grozi_train": RetailSet("grozi", "src/3264", ("train",), ("train",)),
    "grozi_val_old_cl": RetailSet("grozi", "src/3264", _VALIDATION[:1], _VALIDATION),
    "grozi_val_new_cl": RetailSet("grozi", "src/3264", _VALIDATION[1:], _VALIDATION),
    "grozi_val_all": RetailSet("grozi", "src/3264", _VALIDATION, _VALIDATION),
    "dairy": RetailSet("dairy", "src/original"),
    "paste_v": RetailSet("paste", "src/original"),
    "paste_f": RetailSet("paste", "src/original", ignore_difficult=True),
}


def read_retail(root: Path, which: RetailSet) -> OneShotSet:
    """Read the annotations of a set below ``root``.

    Raises:
        FileNotFoundError, ValueError: as ``read_csv``; or no row is of the set.
    """
    folder = root / which.folder
    path = folder / "classes" / f"{which.folder}.csv"
    pairs = read_csv(path)
    own = [(r, file) for r, file in pairs if not which.parts or r.split in which.parts]
    if not own:
        raise ValueError(f"{path} must have rows of {which.parts or 'some image'}, got none")
    rows = [replace(r, difficult=r.difficult and not which.ignore_difficult) for r, _ in own]
    images = images_of(r for r, _ in pairs if not which.image_parts or r.split in which.image_parts)
    files = [(row.class_id, file) for row, file in own]
    classes = classes_of(files, folder / "classes" / "images")
    return OneShotSet(tuple(rows), images, classes, folder / which.images, is_relative=True)


def register_retail(root: Path) -> None:
    """Register all sets and their companions."""
    for name, which in SETS.items():
        register_one_shot(
            name, partial(read_retail, root, which), root / which.folder / which.images
        )


register_retail(dataset_path("."))
