"""What ``find`` leaves behind: COCO json, pictures, crops and counts, written as they come and whole or not at all.

Nothing is written outside the folder, whatever files and classes are called. ``results.json`` has every detection, as
``COCO("images.json").loadRes("results.json")`` reads it; pictures, crops and counts those above a threshold.
"""

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as coco_mask

from ..decoding import printable
from ..files import atomic_path
from ..visualization import draw_instances

_JPEG_QUALITY = 90
# Letters of a class's name that are drawn; a stranger's file may have a million.
_MAX_LABEL = 40
# Pixels around a crop: what touches the object's edge helps to judge it.
_CROP_MARGIN = 2


@dataclass(frozen=True)
class Found:
    """What was found in one picture.

    Attributes:
        image_id (int): from 1. name, stem (str): see ``Picture``.
        size (tuple[int, int]): (width, height) in pixels.
        detections (list[dict]): rows of COCO results.
        counts (list[int]): of each class above its threshold.
    """

    image_id: int
    name: str
    size: tuple[int, int]
    detections: list[dict[str, Any]]
    counts: list[int]


class ResultFolder:
    """Writes a new folder. ``draw`` may be called by several threads, ``writing`` gives what one thread calls."""

    def __init__(
        self,
        folder: str | Path,
        *,
        class_ids: Sequence[int],
        class_names: Sequence[str],
        thresholds: Sequence[float],
        with_pictures: bool = True,
        with_crops: bool = True,
    ):
        """Make the folder.

        Args:
            folder: new or empty. class_ids, class_names: of the K classes searched.
            thresholds: least score, a class each, of what is drawn, cut out and counted.

        Raises:
            ValueError: the folder has something in it.
        """
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"output must be a new or empty folder, got {printable(folder)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.class_ids, self.class_names = list(class_ids), list(class_names)
        self.labels = [_shortened(printable(name)) for name in class_names]
        self.thresholds = np.asarray(thresholds, dtype=np.float64)
        self.with_pictures, self.with_crops = with_pictures, with_crops

    def draw(
        self, image_id: int, name: str, stem: str, image: np.ndarray, instances: Instances
    ) -> Found:
        """Write picture and crops of an image (uint8 (H, W, 3), BGR) and return the rows for the files."""
        detections = _coco_rows(image_id, self.class_ids, instances)
        limits = self.thresholds[instances.pred_classes.numpy()]
        shown = instances[[bool(s) for s in instances.scores.numpy() >= limits]]
        stem = f"{image_id:06d}_{file_safe(stem)}"
        pixels = image[:, :, ::-1]
        if self.with_pictures:
            drawn = draw_instances(pixels, shown, self.labels)
            _write_jpeg(self.folder / "pictures" / f"{stem}.jpg", drawn)
        if self.with_crops:
            self._write_crops(stem, pixels, shown)
        counts = np.bincount(shown.pred_classes.numpy(), minlength=len(self.class_ids)).tolist()
        return Found(image_id, name, (image.shape[1], image.shape[0]), detections, counts)

    def _write_crops(self, stem: str, pixels: np.ndarray, shown: Instances) -> None:
        height, width = pixels.shape[:2]
        for number, (box, k) in enumerate(
            zip(shown.pred_boxes.tensor.numpy(), shown.pred_classes.tolist(), strict=True), start=1
        ):
            x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - _CROP_MARGIN, 0)
            x1, y1 = np.minimum(np.ceil(box[2:]).astype(int) + _CROP_MARGIN, (width, height))
            folder = f"{self.class_ids[k]}_{file_safe(self.class_names[k])}"
            path = self.folder / "crops" / folder / f"{stem}_{number:03d}.jpg"
            _write_jpeg(path, pixels[y0:y1, x0:x1])

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[Callable[[Found], None], Callable[[str, str], None]]]:
        """Open the files; gives what takes a ``Found``, and what takes name and reason of a skipped picture."""
        categories = [
            {"id": class_id, "name": name}
            for class_id, name in zip(self.class_ids, self.class_names, strict=True)
        ]
        head = f'{{"categories": {json.dumps(categories)},\n"annotations": [],\n"images": ['
        with (
            _json_rows(self.folder / "results.json", "[", "]") as add_detection,
            _json_rows(self.folder / "images.json", head, "]}") as add_image,
            _csv_rows(self.folder / "counts.csv", self._columns()) as add_counts,
            _csv_rows(self.folder / "skipped.csv", ["file", "reason"]) as add_skipped,
        ):

            def add(found: Found) -> None:
                size = {"width": found.size[0], "height": found.size[1]}
                add_image({"id": found.image_id, "file_name": found.name, **size})
                for row in found.detections:
                    add_detection(row)
                add_counts([printable(found.name), *found.counts, sum(found.counts)])

            yield add, lambda name, reason: add_skipped([printable(name), printable(reason)])

    def _columns(self) -> list[str]:
        """One column a class; names that occur twice are told apart by their ids."""
        names = [printable(name) for name in self.class_names]
        unique = [
            name if names.count(name) == 1 else f"{name} ({class_id})"
            for name, class_id in zip(names, self.class_ids, strict=True)
        ]
        return ["file", *unique, "total"]


def file_safe(text: str) -> str:
    """A class's or file's name as a part of a file's name: letters, digits, dash and underline, at most 40."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:40] or "unnamed"


def _shortened(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[:_MAX_LABEL]}…"


def _coco_rows(
    image_id: int, class_ids: Sequence[int], instances: Instances
) -> list[dict[str, Any]]:
    """XYWH boxes in pixels, rounded to hundredths; masks as compressed RLE."""
    boxes = instances.pred_boxes.tensor.numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    rows = [
        {
            "image_id": image_id,
            "category_id": class_ids[k],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
        }
        for k, box, score in zip(
            instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist(), strict=True
        )
    ]
    if instances.has("pred_masks"):
        for row, mask in zip(rows, instances.pred_masks.numpy(), strict=True):
            row["segmentation"] = rle_of_mask(mask)
    return rows


def rle_of_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed RLE of a bool mask (H, W), the same as of ``pycocotools.mask.encode``.

    That one turns whole masks into other types and orders first; here only the columns of the object are looked at.
    """
    height, width = mask.shape
    columns = np.flatnonzero(mask.any(axis=0))
    first, end = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
    inside = np.zeros((end - first) * height + 2, dtype=bool)
    inside[1:-1] = mask[:, first:end].T.reshape(-1)
    changes = np.flatnonzero(inside[1:] != inside[:-1]) + first * height
    ends = changes.tolist()
    if not ends or ends[-1] < height * width:
        ends.append(height * width)
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def _write_jpeg(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path, durable=False) as temporary:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture.save(temporary, "JPEG", quality=_JPEG_QUALITY)


@contextlib.contextmanager
def _json_rows(path: Path, before: str, after: str) -> Iterator[Callable[[Any], None]]:
    """A JSON list written row by row, so that its length does not matter."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(before)
        separator = ""

        def add(row: Any) -> None:
            nonlocal separator
            file.write(f"{separator}\n{json.dumps(row, allow_nan=False)}")
            separator = ","

        yield add
        file.write(f"\n{after}\n")


@contextlib.contextmanager
def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Any]], Any]]:
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(columns)
        yield rows.writerow
