"""Data sets that bring an image of each class as its exemplar (OS2D spec 1.15 and 5): rows of a CSV as COCO content.

Each set has a companion ``<name>_support`` with the same category ids and one example a class, so that plans draw
nothing else. Sizes of images are read from their headers when the set is first used.
"""

import csv
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from .coco_json import DatasetDict, records_of

COLUMNS = ("imageid", "classid", "gtbboxid", "difficult", "lx", "ty", "rx", "by")
_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "": False}


@dataclass(frozen=True)
class BoxRow:
    """One box.

    Attributes:
        box_id (int), image_id (int), class_id (int): unique, and not below 0.
        image_file (str): below the folder of images.
        box (tuple[float, ...]): XYXY, relative to the image's sides or in pixels, as the set says.
        difficult (bool): need not be found. split (str): part of the set that it belongs to, may be empty.
    """

    box_id: int
    image_id: int
    class_id: int
    image_file: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    split: str = ""


@dataclass(frozen=True)
class ClassImage:
    """The exemplar of a class.

    Attributes:
        class_id (int), name (str): of the class. file (Path): absolute, or below the working folder.
        box (tuple[float, ...] or None): XYXY in pixels; None = the whole image.
    """

    class_id: int
    name: str
    file: Path
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class OneShotSet:
    """Everything about one set but the sizes of its images.

    Attributes:
        rows (tuple[BoxRow, ...]): what is annotated. images (tuple[tuple[int, str], ...]): ids and files of all
            images, those without a box of the set among them.
        classes (tuple[ClassImage, ...]): one a class. folder (Path): of images. is_relative (bool): boxes of rows are.
    """

    rows: tuple[BoxRow, ...]
    images: tuple[tuple[int, str], ...]
    classes: tuple[ClassImage, ...]
    folder: Path
    is_relative: bool


def register_one_shot(name: str, read: Callable[[], OneShotSet], image_root: Path) -> None:
    """Register a set and its companion; ``read`` is called on first use of either."""
    for full_name, records in ((name, _query_records), (f"{name}_support", _support_records)):
        DatasetCatalog.register(full_name, functools.partial(_load, read, records, full_name))
        MetadataCatalog.get(full_name).set(image_root=str(image_root), evaluator_type="fewshot")


def read_csv(path: Path) -> list[tuple[BoxRow, str]]:
    """Rows of an annotation file, each with the file of its class image.

    Columns are ``COLUMNS`` and, where they are not "<id>.jpg", ``imagefilename`` and ``classfilename``; a column
    ``split`` may say which part a row belongs to. Corners are relative to the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or a value is not what it must be; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotation file must exist, got {path}; see datasets/README.md")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must have the columns {COLUMNS}, got none of {missing}")
        return [_parsed(row, f"{path}, line {reader.line_num}") for row in reader]


def _parsed(row: dict[str, str], where: str) -> tuple[BoxRow, str]:
    try:
        image_id, class_id, box_id = (int(row[k]) for k in ("imageid", "classid", "gtbboxid"))
        box = tuple(float(row[key]) for key in ("lx", "ty", "rx", "by"))
        difficult = _FLAGS[row["difficult"].strip().lower()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where} must have whole ids, four corners and difficult 0 or 1, got {row}"
        ) from error
    image_file = row.get("imagefilename") or f"{image_id}.jpg"
    class_file = row.get("classfilename") or f"{class_id}.jpg"
    split = row.get("split") or ""
    return BoxRow(box_id, image_id, class_id, image_file, box, difficult, split), class_file


def images_of(rows: Iterable[BoxRow]) -> tuple[tuple[int, str], ...]:
    """(id, file) of the images of rows, each once, in their order."""
    return tuple({row.image_id: row.image_file for row in rows}.items())


def _load(
    read: Callable[[], OneShotSet],
    records: Callable[[OneShotSet], tuple[list[dict], list[dict], Path]],
    name: str,
) -> list[DatasetDict]:
    content = read()
    images, annotations, folder = records(content)
    categories = [{"id": c.class_id, "name": c.name} for c in content.classes]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return records_of(document, folder, name, name)


def _query_records(content: OneShotSet) -> tuple[list[dict], list[dict], Path]:
    images = {i: _image(i, file, content.folder) for i, file in content.images}
    annotations = []
    for row in content.rows:
        image = images[row.image_id]
        sides = (image["width"], image["height"]) * 2 if content.is_relative else (1,) * 4
        x0, y0, x1, y1 = (value * side for value, side in zip(row.box, sides, strict=True))
        annotations.append(
            {
                **{"id": row.box_id, "image_id": row.image_id, "category_id": row.class_id},
                **{"bbox": [x0, y0, x1 - x0, y1 - y0], "difficult": int(row.difficult)},
            }
        )
    return list(images.values()), annotations, content.folder


def _support_records(content: OneShotSet) -> tuple[list[dict], list[dict], Path]:
    images, annotations = [], []
    for number, example in enumerate(content.classes):
        image = _image(number, str(example.file), Path())
        x0, y0, x1, y1 = example.box or (0, 0, image["width"], image["height"])
        row = {"id": number, "image_id": number, "category_id": example.class_id}
        images.append(image)
        annotations.append({**row, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return images, annotations, Path()


def _image(image_id: int, file: str, folder: Path) -> dict[str, Any]:
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"image must exist, got {path}; see datasets/README.md")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise ValueError(f"{path} must be a readable image, got: {error}") from error
    return {"id": image_id, "file_name": file, "height": height, "width": width}


def classes_of(files: Sequence[tuple[int, str]], folder: Path) -> tuple[ClassImage, ...]:
    """Whole images as exemplars, from pairs of class id and file, of which a class may have several alike.

    Raises:
        ValueError: a class has two different files.
    """
    found: dict[int, str] = {}
    for class_id, file in files:
        if found.setdefault(class_id, file) != file:
            raise ValueError(
                f"class {class_id} must have one image, got {found[class_id]} and {file}"
            )
    return tuple(ClassImage(c, Path(file).stem, folder / file) for c, file in sorted(found.items()))
