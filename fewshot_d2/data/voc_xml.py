"""Annotations in the XML of PASCAL VOC, which ImageNet-LOC uses as well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class VocObject:
    """One annotated object.

    Attributes:
        name (str): its class. box (tuple): XYXY, absolute pixels, 0-based, ends behind the last pixel.
        difficult (bool), truncated (bool).
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool
    truncated: bool


@dataclass(frozen=True)
class VocImage:
    """One annotation file: (height, width) in pixels and the objects."""

    height: int
    width: int
    objects: tuple[VocObject, ...]


def read_voc_xml(path: str | Path, *, first_pixel: int = 1) -> VocImage:
    """Read one file.

    Args:
        first_pixel: index of the first pixel: 1 in VOC, 0 in ImageNet.

    Raises:
        ValueError: not such a file; names it and what is wrong.
    """
    path = Path(path)
    content = path.read_bytes()
    # Entities can expand to gigabytes; annotations have none.
    if len(content) > _MAX_BYTES or b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError(f"{path} must be a plain annotation below {_MAX_BYTES} bytes, got another")
    try:
        root = ElementTree.fromstring(content)
        size = root.find("size")
        objects = tuple(_object(node, first_pixel) for node in root.iter("object"))
        return VocImage(int(_text(size, "height")), int(_text(size, "width")), objects)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} must be an annotation like those of VOC, got: {error}") from error


def add_voc_image(
    content: dict[str, list[dict[str, Any]]],
    path: str | Path,
    *,
    file_name: str,
    image_id: int,
    class_ids: dict[str, int],
    first_pixel: int = 1,
) -> None:
    """Append an annotation file to the lists of a COCO json; objects of other classes are left out.

    Args:
        content: with "images" and "annotations". path: the XML. file_name, image_id: of the image.
        class_ids: {name: category id}. first_pixel: see ``read_voc_xml``.
    """
    image = read_voc_xml(path, first_pixel=first_pixel)
    size = {"height": image.height, "width": image.width}
    content["images"].append({"id": image_id, "file_name": file_name, **size})
    for found in image.objects:
        if found.name in class_ids:
            x0, y0, x1, y1 = found.box
            row = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            row |= {"category_id": class_ids[found.name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if found.difficult:
                row["difficult"] = 1
            content["annotations"].append(row)


def _object(node: ElementTree.Element, first_pixel: int) -> VocObject:
    bounds = node.find("bndbox")
    x0, y0, x1, y1 = (float(_text(bounds, key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    return VocObject(
        name=_text(node, "name"),
        # Both corners are pixels of the object.
        box=(x0 - first_pixel, y0 - first_pixel, x1 - first_pixel + 1, y1 - first_pixel + 1),
        difficult=(node.findtext("difficult") or "0").strip() == "1",
        truncated=(node.findtext("truncated") or "0").strip() == "1",
    )


def _text(node: ElementTree.Element | None, key: str) -> str:
    value = None if node is None else node.findtext(key)
    if value is None:
        raise ValueError(f"<{key}> is missing")
    return value.strip()
