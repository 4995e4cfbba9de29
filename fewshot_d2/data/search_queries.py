"""What an instance search is asked for: boxes of a data set, or boxes that a user drew in a folder of images.

A query is a ``RankList`` that has no candidates yet.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..decoding import IMAGE_SUFFIXES
from .index import InstanceIndex
from .plans import EvaluationPlan
from .rank_lists import RankList
from .typed_json import XYXY, has_area

CHOICES = ("largest", "all")

_NUMBER = r"\s*([-+]?[0-9]*\.?[0-9]+)\s*"
_QUERY = re.compile(rf"(.+?):{','.join([_NUMBER] * 4)}(?::([^:]+))?")
# Tag of EXIF, and its values for images that are shown with width and height exchanged.
_ORIENTATION, _TURNED = 274, {5, 6, 7, 8}


def annotated_queries(
    index: InstanceIndex, choice: str = "largest", per_label: int | None = None
) -> tuple[RankList, ...]:
    """Queries out of the annotations of a data set, crowds left out; ``label`` is the category id.

    Args:
        index: with annotations. choice: "largest" = the largest box of each image, or "all".
        per_label: so many queries of a label, the first; None = all.

    Returns:
        Queries in the order of the data set, whose ``query_id`` are the annotations' ids.

    Raises:
        ValueError: unknown choice, less than one query of a label, or there is no annotation.
    """
    if choice not in CHOICES or per_label is not None and per_label < 1:
        raise ValueError(
            f"queries must be one of {CHOICES} and at least 1 of a label, got {choice!r} and {per_label}"
        )
    queries: list[RankList] = []
    counts: Counter[int] = Counter()
    for image_index in range(len(index.dicts)):
        found = list(_queries_of(index, image_index))
        for query in found if choice == "all" else sorted(found, key=_order)[:1]:
            counts[query.label] += 1
            if per_label is None or counts[query.label] <= per_label:
                queries.append(query)
    if not queries:
        raise ValueError(
            f"the data set of the queries must have annotations, got none in {len(index.dicts)} images"
        )
    return tuple(queries)


def planned_queries(plan: EvaluationPlan, index: InstanceIndex) -> tuple[RankList, ...]:
    """The supports of a plan as queries, for few-shot detection by search; ``label`` is the category id.

    Args:
        plan: with fixed supports. index: of its support data set; only the annotations that the plan names are read.

    Returns:
        One query for each annotation, whose id is the annotation's, class after class. A class that has fewer than the
        plan's shots repeats some there, not here.

    Raises:
        ValueError: supports differ between episodes, or the data set has not all of them.
    """
    if plan.fixed_supports is None:
        raise ValueError(
            "a plan whose supports are searched for must have the same in all episodes (make_episodes.py "
            f"--fixed-supports), got others in {len(plan.episodes)} episodes"
        )
    queries = []
    for class_id, supports in plan.fixed_supports.items():
        for annotation_id in dict.fromkeys(supports):
            query = _query(index, *index.locate(annotation_id), index.class_of(annotation_id))
            if query.label != class_id:
                raise ValueError(
                    f"support {annotation_id} must be of class {class_id}, got class {query.label}"
                )
            queries.append(query)
    return tuple(queries)


@dataclass(frozen=True)
class FolderQuery:
    """A box that a user drew.

    Attributes:
        file_name (str): below the folder. box (XYXY): pixels of the image as it is shown.
        label (str): name of the instance, shared by queries of one; "" = an instance of its own.
    """

    file_name: str
    box: XYXY
    label: str = ""

    @classmethod
    def parse(cls, text: str) -> "FolderQuery":
        """Read ``file:x,y,w,h`` or ``file:x,y,w,h:label``.

        Raises:
            ValueError: the text is none.
        """
        found = _QUERY.fullmatch(text)
        if not found:
            raise ValueError(f"a query must be file:x,y,w,h or file:x,y,w,h:label, got {text!r}")
        x, y, w, h = map(float, found.groups()[1:5])
        return cls(found[1], (x, y, x + w, y + h), (found[6] or "").strip())


def folder_dataset(
    folder: str | Path, queries: Sequence[FolderQuery]
) -> tuple[dict[str, Any], tuple[RankList, ...], list[str]]:
    """The images of a folder, and of those below it, as a COCO json whose annotations are the queries alone.

    Returns:
        Content of the json; the queries, whose ids are 1, 2, ...; file names of images that cannot be read and are left
        out.

    Raises:
        ValueError: no such folder, no image in it can be read, a query's image is not among those that can, or its
            box is not inside.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"images must be in a folder that exists, got {folder}")
    images, broken = [], []
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    for path in tqdm(paths, desc="images", unit="img"):
        name, size = path.relative_to(folder).as_posix(), _shown_size(path)
        if size is None:
            broken.append(name)
        else:
            image = {"id": len(images) + 1, "file_name": name}
            images.append({**image, "width": size[0], "height": size[1]})
    if not images:
        raise ValueError(
            f"{folder} must have images that can be read, got {len(broken)} that cannot ({sorted(IMAGE_SUFFIXES)})"
        )
    labels = _label_ids(queries)
    of_name = {image["file_name"]: image for image in images}
    lists = tuple(
        _checked(query, row, labels[row - 1][0], of_name, folder)
        for row, query in enumerate(queries, start=1)
    )
    content = {
        "images": images,
        "annotations": [_annotation(row) for row in lists],
        "categories": [{"id": i, "name": name} for i, name in sorted(set(labels))],
    }
    return content, lists, broken


def _queries_of(index: InstanceIndex, image_index: int) -> Iterator[RankList]:
    for class_id in index.classes_in(image_index):
        for position in index.instances(image_index, class_id):
            yield _query(index, image_index, position, class_id)


def _query(index: InstanceIndex, image_index: int, position: int, class_id: int) -> RankList:
    record = index.dicts[image_index]
    annotation = record["annotations"][position]
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    query_id = index.annotation_id(image_index, position)
    return RankList(query_id, record["image_id"], tuple(map(float, box)), class_id, ())


def _order(query: RankList) -> tuple[float, int]:
    """The largest first, of equal ones the one annotated first."""
    x0, y0, x1, y1 = query.box
    return -(x1 - x0) * (y1 - y0), query.query_id


def _shown_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as the image is shown, None if it cannot be read to its end."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            # A JPEG is read at an eighth of its size, which finds out as well whether it is whole.
            image.draft("RGB", (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return (height, width) if turned else (width, height)


def _label_ids(queries: Sequence[FolderQuery]) -> list[tuple[int, str]]:
    """(id, name) of each query's label; equal names have one id."""
    names = [q.label or f"query {row}" for row, q in enumerate(queries, start=1)]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names), start=1)}
    return [(ids[name], name) for name in names]


def _checked(
    query: FolderQuery, query_id: int, label: int, images: dict[str, dict], folder: str | Path
) -> RankList:
    image = images.get(query.file_name)
    if image is None:
        raise ValueError(
            f"the image of query {query_id} must be a readable one of {folder}, got {query.file_name!r}"
        )
    x0, y0, x1, y1 = query.box
    inside = x0 >= 0 and y0 >= 0 and x1 <= image["width"] and y1 <= image["height"]
    if not (inside and has_area(query.box)):
        raise ValueError(
            f"the box of query {query_id} must have an area inside the {image['width']} x {image['height']} pixels of "
            f"{query.file_name}, got x {x0:g}, y {y0:g}, w {x1 - x0:g}, h {y1 - y0:g}"
        )
    return RankList(query_id, image["id"], query.box, label, ())


def _annotation(query: RankList) -> dict[str, Any]:
    x0, y0, x1, y1 = query.box
    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
    ids = {"id": query.query_id, "image_id": query.image_id, "category_id": query.label}
    return {**ids, **box}
