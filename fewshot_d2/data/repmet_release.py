"""RepMet's released benchmark files as a COCO json and a ``BenchmarkPlan`` (spec 3.2).

The release is made of pickles: a list of all images with their boxes ("roidb"), and episodes in two forms, by position
in that list (an ".npz" that is a pickle as well) or by path. They are read without running code. Ids are ours: of an
image its position in the list, of an annotation a running number over the images that the episodes use.
"""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json
from ..pickles import load_arrays
from .benchmark_plans import BenchmarkEpisode, BenchmarkPlan

# A released box names its image by path and its corners in whole pixels; rounding may move them by one.
_SAME_CORNER = 1.0


@dataclass
class _Roidb:
    """The released list of images.

    Attributes:
        path: of the file, for messages. entries (list[dict]): one an image. classes (list[str]): names of the ids
            1, 2, ...; the release has none for background.
        prefix (str): what is cut off the paths of images.
    """

    path: Path
    entries: Sequence[Mapping[str, Any]]
    classes: Sequence[str]
    prefix: str

    def entry(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self.entries):
            raise ValueError(f"image must be one of {len(self.entries)}, got {index}")
        return self.entries[index]

    def file_name(self, index: int) -> str:
        return str(_get(self.entry(index), "image")).removeprefix(self.prefix).lstrip("/")

    def by_path(self) -> dict[str, int]:
        """Position of each path; of an image that stands there again, flipped, the first."""
        paths: dict[str, int] = {}
        for index, entry in enumerate(self.entries):
            if isinstance(entry, Mapping) and "image" in entry:
                paths.setdefault(str(entry["image"]), index)
        return paths

    def classes_of(self, task: Any) -> list[int]:
        """The classes of an episode."""
        class_ids = [int(c) for c in _get(task, "epi_cats")]
        self.check_classes(class_ids)
        return class_ids

    def check_classes(self, class_ids: Sequence[int]) -> None:
        if not all(0 < c <= len(self.classes) for c in class_ids):
            raise ValueError(f"classes must be 1..{len(self.classes)}, got {class_ids}")


def convert_release(
    roidb: str | Path,
    episodes: str | Path,
    output: str | Path,
    *,
    dataset: str,
    prefix: str,
    shots: int,
) -> BenchmarkPlan:
    """Write ``instances.json`` and the plan into ``output``.

    Args:
        roidb, episodes: the released files. dataset: the name that the json will be registered with.
        prefix: what image paths begin with and the image folder stands for.
        shots: boxes a class has at most, which the files do not say but for their names.

    Returns:
        The plan; a class that has no example in the release has none in it.

    Raises:
        ValueError: a file holds anything but arrays, lists, dicts, strings and numbers, or does not fit the other
            one; names the file and the place.
    """
    content = _load(roidb)
    entries = content.get("roidb") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not isinstance(content.get("classes"), _SEQUENCES):
        raise ValueError(f"{roidb} must hold a dict with 'roidb' and 'classes', got another")
    names = [str(name) for name in content["classes"]]
    images = _Roidb(Path(roidb), entries, names[names[:1] == ["__background__"] :], prefix)
    tasks = _load(episodes)
    if not isinstance(tasks, _SEQUENCES) or not len(tasks):
        raise ValueError(f"{episodes} must hold a list of episodes, got {type(tasks).__name__}")
    by_path: dict[str, int] = {}
    if isinstance(tasks[0], Mapping) and "train_boxes" in tasks[0]:
        by_path = images.by_path()
    parsed = []
    for number, task in enumerate(tasks):
        try:
            parsed.append(_by_path(task, images, by_path) if by_path else _by_index(task, images))
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(f"{episodes}: episode {number} must fit {roidb}: {error}") from error
        for places in parsed[-1][1]:
            del places[shots:]
    used = sorted({i for _, shots, queries in parsed for i in _images_of(shots, queries)})
    annotation_id = _write_json(images, used, Path(output) / "instances.json")
    try:
        plan = _plan(dataset, parsed, annotation_id, shots)
    except ValueError as error:
        raise ValueError(f"{episodes} must give a benchmark plan: {error}") from error
    plan.save(Path(output) / plan.file_name)
    return plan


_SEQUENCES = (list, tuple, np.ndarray)
# Classes of an episode, the (image, box) places of the shots of each, and the queries' images.
_Task = tuple[list[int], list[list[tuple[int, int]]], list[int]]


def _load(path: str | Path) -> Any:
    try:
        return load_arrays(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} must be a pickle of the release, got: {error}") from error


def _get(mapping: Any, key: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"dict with {key!r} must be there, got {type(mapping).__name__}")
    if key not in mapping:
        raise ValueError(f"key {key!r} must be there, got {sorted(map(str, mapping))[:8]}")
    return mapping[key]


def _by_index(task: Mapping[str, Any], images: _Roidb) -> _Task:
    """Episodes that name images by position; the shots of a class are all boxes of it in support images."""
    classes = images.classes_of(task)
    shots: list[list[tuple[int, int]]] = [[] for _ in classes]
    examples, queries = (_get(task, key) for key in ("train_nImg", "query_images"))
    if not isinstance(examples, Mapping) or not isinstance(queries, Mapping):
        raise ValueError("'train_nImg' and 'query_images' must be dicts by class, got others")
    seen: set[int] = set()
    for class_id in classes:
        for index in map(int, examples.get(class_id, ())):
            if index in seen:
                continue
            seen.add(index)
            for box, of_class in enumerate(_get(images.entry(index), "gt_classes")):
                if int(of_class) in classes:
                    shots[classes.index(int(of_class))].append((index, box))
    found = dict.fromkeys(int(i) for c in classes for i in queries.get(c, ()))
    for index in found:
        images.entry(index)
    return classes, shots, list(found)


def _by_path(task: Mapping[str, Any], images: _Roidb, by_path: Mapping[str, int]) -> _Task:
    """Episodes that name images by path and shots by their boxes."""
    classes = images.classes_of(task)
    shots: list[list[tuple[int, int]]] = [[] for _ in classes]
    for class_id, _, path, corners in _get(task, "train_boxes"):
        index = by_path[str(path)]
        boxes = np.asarray(_get(images.entry(index), "boxes"), float).reshape(-1, 4)
        distance = np.abs(boxes - np.asarray(corners, float).reshape(4)).max(axis=1, initial=0)
        distance[np.asarray(images.entry(index)["gt_classes"]) != int(class_id)] = np.inf
        if not len(distance) or distance.min() > _SAME_CORNER:
            raise ValueError(
                f"support must be a box of class {class_id} in {path}, got {list(corners)}"
            )
        shots[classes.index(int(class_id))].append((index, int(distance.argmin())))
    queries = dict.fromkeys(by_path[str(path)] for path in _get(task, "query_images"))
    return classes, shots, list(queries)


def _images_of(shots: Iterable[Iterable[tuple[int, int]]], queries: Iterable[int]) -> set[int]:
    return {image for places in shots for image, _ in places} | set(queries)


def _write_json(images: _Roidb, used: Sequence[int], path: Path) -> dict[tuple[int, int], int]:
    """Write the images that are used; returns the annotation id of each (image, box)."""
    content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    ids: dict[tuple[int, int], int] = {}
    for index in used:
        try:
            image, boxes = _image_row(images, index), _box_rows(images, index)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{images.path}: image {index} must be complete: {error}") from error
        content["images"].append(image)
        for box, row in enumerate(boxes):
            ids[index, box] = len(ids) + 1
            content["annotations"].append({"id": len(ids), "image_id": index, **row})
    content["categories"] = [
        {"id": i, "name": name} for i, name in enumerate(images.classes, start=1)
    ]
    write_json(path, content)
    return ids


def _image_row(images: _Roidb, index: int) -> dict[str, Any]:
    size = {key: int(_get(images.entry(index), key)) for key in ("height", "width")}
    return {"id": index, "file_name": images.file_name(index), **size}


def _box_rows(images: _Roidb, index: int) -> list[dict[str, Any]]:
    entry = images.entry(index)
    boxes = np.asarray(_get(entry, "boxes"), float).reshape(-1, 4)
    classes = [int(c) for c in _get(entry, "gt_classes")]
    images.check_classes(classes)
    if len(classes) != len(boxes):
        raise ValueError(f"each of {len(boxes)} boxes must have a class, got {classes}")
    # The release's boxes end with their last pixel.
    return [
        {"category_id": class_id, "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1]}
        for class_id, (x0, y0, x1, y1) in zip(classes, boxes.tolist(), strict=True)
    ]


def _plan(
    dataset: str, tasks: Sequence[_Task], annotation_id: Mapping[tuple[int, int], int], shots: int
) -> BenchmarkPlan:
    episodes = tuple(
        BenchmarkEpisode(
            id=number,
            class_ids=tuple(classes),
            supports=tuple(tuple(annotation_id[p] for p in places) for places in supports),
            query_image_ids=tuple(queries),
        )
        for number, (classes, supports, queries) in enumerate(tasks)
    )
    ways = len(episodes[0].class_ids)
    return BenchmarkPlan(
        dataset=dataset,
        support_dataset=dataset,
        split="all",
        side="all",
        ways=ways,
        shots=shots,
        max_shots=shots,
        queries_per_class=max(-(-len(e.query_image_ids) // ways) for e in episodes),
        seed=0,
        class_ids=tuple(sorted({c for e in episodes for c in e.class_ids})),
        episodes=episodes,
    )
