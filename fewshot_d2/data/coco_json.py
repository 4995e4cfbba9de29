"""COCO and LVIS v1 json files as detectron2 dataset dicts, checked once at the border.

A file that cannot be trusted as a whole (no such list, ids that are not unique, annotations of
unknown images or categories) is an error that names the culprit. A single bad annotation is dropped
or mended, and one warning per file counts them. Boxes are XYWH, absolute pixels of the original
image.
"""

import functools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from ..files import dataset_path

logger = logging.getLogger(__name__)

DatasetDict = dict[str, Any]

_NUM_CULPRITS = 3
# Exporters round: a box that leaves its image by a fraction of a pixel is clipped without a word.
_ROUNDING_PIXELS = 1.0


def register_instances(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Register a COCO or LVIS json; ``DatasetCatalog.get(name)`` reads it.

    Args:
        name: the name for ``DATASETS.*``; one that is registered already is refused.
        json_file, image_root: absolute, or below ``DETECTRON2_DATASETS``. They need not exist yet.
    """
    json_file, image_root = dataset_path(json_file), dataset_path(image_root)
    DatasetCatalog.register(
        name, functools.partial(load_instances_json, json_file, image_root, name)
    )
    MetadataCatalog.get(name).set(
        json_file=str(json_file), image_root=str(image_root), evaluator_type="fewshot"
    )


def dataset_categories(name: str) -> dict[int, str]:
    """{dataset category id: class name} of a registered data set, in the contiguous ids' order.

    The data set is read if it was not read before, because only then its classes are known.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    names = metadata.thing_classes
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i: i for i in range(len(names))
    }
    return {
        class_id: names[i] for class_id, i in sorted(contiguous.items(), key=lambda pair: pair[1])
    }


def contiguous_ids(dataset: str) -> dict[int, int]:
    """Dataset category id -> ``category_id`` in the dicts."""
    return {c: i for i, c in enumerate(dataset_categories(dataset))}


def load_instances_json(
    json_file: str | Path, image_root: str | Path, name: str
) -> list[DatasetDict]:
    """Read a COCO or LVIS v1 instances file; sets the classes in the metadata of ``name``.

    Args:
        json_file: the file; LVIS images may have a ``coco_url`` in place of ``file_name``.
        image_root: folder that the file names are relative to.
        name: the data set's name, for its metadata and for messages.

    Returns:
        One dict an image, also of those without annotations: ``file_name, height, width,
        image_id, annotations``; an annotation has ``id, bbox`` (XYWH, absolute pixels),
        ``bbox_mode, category_id`` (contiguous), ``iscrowd``, ``difficult`` if it is (VOC) and, if usable,
        ``segmentation`` and ``area`` (pixels).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON or not an instances file; the message says where.
    """
    return records_of(read_json(Path(json_file)), image_root, name, json_file)


def records_of(
    content: Mapping[str, Any], image_root: str | Path, name: str, json_file: str | Path
) -> list[DatasetDict]:
    """``load_instances_json`` of content that is in memory already; ``json_file`` is where it is from, for messages."""
    categories = _by_id(content, "categories", json_file)
    contiguous = {class_id: i for i, class_id in enumerate(sorted(categories))}
    images = _by_id(content, "images", json_file)
    records = {i: _image_record(image, image_root, json_file) for i, image in images.items()}
    flaws: defaultdict[str, list[str]] = defaultdict(list)
    for annotation_id, annotation in _by_id(content, "annotations", json_file).items():
        record = _look_up(annotation, "image_id", records, json_file)
        category_id = _look_up(annotation, "category_id", contiguous, json_file)
        cleaned = _clean_annotation(annotation, record, flaws)
        if cleaned is not None:
            cleaned.update(id=annotation_id, category_id=category_id)
            record["annotations"].append(cleaned)
    MetadataCatalog.get(name).set(
        thing_classes=[str(categories[class_id].get("name", class_id)) for class_id in contiguous],
        thing_dataset_id_to_contiguous_id=contiguous,
    )
    _warn_of_flaws(flaws, name, json_file)
    return list(records.values())


def read_json(path: Path) -> dict[str, Any]:
    """Content of a COCO or LVIS json that has the lists a data set needs."""
    if not path.is_file():
        raise FileNotFoundError(
            f"annotation file must exist, got {path} (relative paths: below DETECTRON2_DATASETS)"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from error
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must have a list {key!r}, got {type(rows).__name__}")
    return content


def _by_id(
    content: Mapping[str, Any], key: str, json_file: str | Path
) -> dict[int, dict[str, Any]]:
    """The rows of one list by their ids, which must be unique non-negative integers."""
    rows: dict[int, dict[str, Any]] = {}
    for position, row in enumerate(content[key]):
        row_id = row.get("id") if isinstance(row, dict) else None
        if type(row_id) is not int or row_id < 0:
            raise ValueError(
                f"{json_file}: {key}[{position}] must have an integer id >= 0, got {row_id!r}"
            )
        if row_id in rows:
            raise ValueError(f"{json_file}: ids of {key} must be unique, got {row_id} twice")
        rows[row_id] = row
    return rows


def _image_record(
    image: Mapping[str, Any], image_root: str | Path, json_file: str | Path
) -> DatasetDict:
    file_name = image.get("file_name")
    if file_name is None:
        # LVIS v1 names its images by URL only; folder and file are the last two parts.
        file_name = "/".join(str(image.get("coco_url", "")).split("/")[-2:])
    size = image.get("height"), image.get("width")
    if not file_name or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(
            f"{json_file}: image {image['id']} must have a file_name or coco_url and a positive "
            f"integer height and width, got {file_name!r} and {size}"
        )
    return {
        "file_name": os.path.join(image_root, file_name),
        "height": size[0],
        "width": size[1],
        "image_id": image["id"],
        "annotations": [],
    }


def _look_up(
    annotation: Mapping[str, Any], key: str, known: Mapping[int, Any], json_file: str | Path
) -> Any:
    try:
        return known[annotation[key]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{json_file}: annotation {annotation['id']} must have the {key} of a listed one, "
            f"got {annotation.get(key)!r}"
        ) from error


def _clean_annotation(
    annotation: Mapping[str, Any], record: DatasetDict, flaws: Mapping[str, list[str]]
) -> DatasetDict | None:
    """The annotation in detectron2's form, without its ids; None where its box is of no use."""
    height, width = record["height"], record["width"]
    bbox, box_flaw = _clean_box(annotation.get("bbox"), height, width)
    iscrowd = 1 if annotation.get("iscrowd") else 0
    segmentation, mask_flaw = _clean_segmentation(
        annotation.get("segmentation"), height, width, iscrowd
    )
    for flaw in (box_flaw, mask_flaw if bbox else ""):
        if flaw:
            flaws[flaw].append(f"annotation {annotation['id']} of {record['file_name']}")
    if bbox is None:
        return None
    cleaned = {"bbox": bbox, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": iscrowd}
    area = annotation.get("area")
    if isinstance(area, (int, float)) and 0 <= area < math.inf:
        cleaned["area"] = area
    if segmentation:
        cleaned["segmentation"] = segmentation
    if annotation.get("difficult"):
        cleaned["difficult"] = 1
    return cleaned


def _clean_box(bbox: Any, height: int, width: int) -> tuple[list[float] | None, str]:
    """(box inside the image or None, what was wrong with it or ""); XYWH, absolute pixels."""
    try:
        x, y, w, h = bbox
        if x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height:
            return bbox, ""
        if not math.isfinite(x + y + w + h):
            return None, "box with NaN or infinity, dropped"
    except (TypeError, ValueError, OverflowError):
        return None, "box that is not four numbers, dropped"
    if w <= 0 or h <= 0:
        return None, "box of zero or negative area, dropped"
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x1 <= x0 or y1 <= y0:
        return None, "box outside its image, dropped"
    excess = max(x0 - x, y0 - y, x + w - x1, y + h - y1)
    flaw = "box partly outside, clipped" if excess >= _ROUNDING_PIXELS else ""
    return [x0, y0, x1 - x0, y1 - y0], flaw


def _clean_segmentation(
    segmentation: Any, height: int, width: int, iscrowd: int
) -> tuple[list | dict | None, str]:
    """(usable polygons or RLE or None, what was wrong or "")."""
    if not segmentation:
        return None, ""
    if isinstance(segmentation, dict):
        if not _is_rle(segmentation, height, width):
            return None, "RLE that does not fit its image, mask dropped"
        if isinstance(segmentation["counts"], list) and not iscrowd:
            # detectron2's mappers drop crowds and can decode only compressed RLE for the others.
            segmentation = mask_util.frPyObjects(segmentation, height, width)
        return segmentation, ""
    if not isinstance(segmentation, list):
        return None, "segmentation that is neither polygons nor RLE, mask dropped"
    polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
    if len(polygons) == len(segmentation):
        return segmentation, ""
    return polygons, "polygon of fewer than 3 points or not of numbers, polygon dropped"


def _is_polygon(polygon: Any) -> bool:
    """Whether it is a flat list x0, y0, x1, y1, ... of at least three finite points."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        return math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False


def _is_rle(segmentation: Mapping[str, Any], height: int, width: int) -> bool:
    """Whether RLE is of the image's size; counts of a list must also cover the image exactly."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width] or not counts:
        return False
    if isinstance(counts, str):
        return True
    if not isinstance(counts, list) or not all(
        type(count) is int and count >= 0 for count in counts
    ):
        return False
    return sum(counts) == height * width


def _warn_of_flaws(flaws: Mapping[str, list[str]], name: str, json_file: str | Path) -> None:
    if not flaws:
        return
    parts = []
    for flaw, culprits in sorted(flaws.items()):
        more = ", ..." if len(culprits) > _NUM_CULPRITS else ""
        parts.append(f"{len(culprits)} x {flaw} ({', '.join(culprits[:_NUM_CULPRITS])}{more})")
    logger.warning(
        "data set %s (%s) has annotations that are of no use as they are: %s",
        name,
        json_file,
        "; ".join(parts),
    )
