"""Where each class's instances are, and how supports are drawn from them (spec 2.2, steps 3-4).

Images are known by their index in the list of dataset dicts, instances by (image index, position in
its annotations). Class ids are dataset category ids. Crowds and boxes without an area are left out:
they can be no example.
"""

import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from detectron2.structures import BoxMode

from .coco_json import DatasetDict


class InstanceIndex:
    """Instances of each class in a list of dataset dicts, kept as the attribute ``dicts``."""

    def __init__(self, dicts: Sequence[DatasetDict], dataset_ids: Mapping[int, int]):
        """Go through all annotations once.

        Args:
            dicts: detectron2 dataset dicts; not changed.
            dataset_ids: {contiguous ``category_id``: dataset category id} of every class.
        """
        self.dicts = dicts
        self._dataset_ids = dict(dataset_ids)
        self._instances = [self._instances_by_class(record) for record in dicts]
        images: dict[int, list[int]] = {}
        for image_index, by_class in enumerate(self._instances):
            for class_id in by_class:
                images.setdefault(class_id, []).append(image_index)
        self._images = {class_id: tuple(images[class_id]) for class_id in sorted(images)}

    def _instances_by_class(self, record: DatasetDict) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for position, annotation in enumerate(record.get("annotations", ())):
            if _is_example(annotation):
                found.setdefault(annotation["category_id"], []).append(position)
        unknown = found.keys() - self._dataset_ids.keys()
        if unknown:
            raise ValueError(
                f"{record['file_name']}: category_id of annotations must be one of the "
                f"{len(self._dataset_ids)} contiguous ids, got {sorted(unknown)}"
            )
        by_class = {self._dataset_ids[i]: tuple(positions) for i, positions in found.items()}
        return dict(sorted(by_class.items()))

    @property
    def category_ids(self) -> list[int]:
        """Every class of the data set, with instances or without, ascending."""
        return sorted(self._dataset_ids.values())

    @property
    def class_ids(self) -> list[int]:
        """The classes that have instances, ascending."""
        return list(self._images)

    def classes_in(self, image_index: int) -> tuple[int, ...]:
        """The classes with instances in an image, ascending."""
        return tuple(self._instances[image_index])

    def images_with(self, class_id: int) -> tuple[int, ...]:
        """The images that have instances of a class, ascending."""
        return self._images.get(class_id, ())

    def instances(self, image_index: int, class_id: int) -> tuple[int, ...]:
        """Positions of a class's instances among the annotations of an image, ascending."""
        return self._instances[image_index].get(class_id, ())

    def image_index(self, image_id: int) -> int:
        """The index of the image with this ``image_id``."""
        try:
            return self._image_of_id[image_id]
        except KeyError:
            raise ValueError(f"image id must be one of the data set, got {image_id}") from None

    def locate(self, annotation_id: int) -> tuple[int, int]:
        """(image index, position) of an instance.

        Raises:
            ValueError: no instance (non-crowd, of positive area) has this id.
        """
        try:
            return self._place_of_id[annotation_id]
        except KeyError:
            raise ValueError(
                f"annotation id must be of a non-crowd instance known here, got {annotation_id}"
            ) from None

    def class_of(self, annotation_id: int) -> int:
        """The class of an instance."""
        image_index, position = self.locate(annotation_id)
        return self._dataset_ids[self.dicts[image_index]["annotations"][position]["category_id"]]

    def annotation_id(self, image_index: int, position: int) -> int:
        """The id of an annotation, which training does without but evaluation plans need."""
        record = self.dicts[image_index]
        try:
            return record["annotations"][position]["id"]
        except KeyError:
            raise ValueError(
                f"{record['file_name']}: annotations must have an 'id' for evaluation plans, got "
                "none; register the json with fewshot_d2's register_instances"
            ) from None

    @cached_property
    def files(self) -> list[str]:
        """The file of each image, without symbolic links."""
        return [os.path.realpath(record["file_name"]) for record in self.dicts]

    @cached_property
    def _image_of_id(self) -> dict[int, int]:
        return _unique(((record["image_id"], i) for i, record in enumerate(self.dicts)), "image")

    @cached_property
    def _place_of_id(self) -> dict[int, tuple[int, int]]:
        places = (
            (image_index, position)
            for image_index, by_class in enumerate(self._instances)
            for positions in by_class.values()
            for position in positions
        )
        return _unique(((self.annotation_id(*place), place) for place in places), "annotation")

    def draw_support(
        self,
        rng: np.random.Generator,
        class_id: int,
        shots: int,
        exclude_images: Collection[int] = (),
    ) -> list[tuple[int, int]]:
        """Draw instances: uniform over images that have the class, then over its instances there.

        Instances are drawn without replacement; they repeat only once all of them were drawn.
        Excluded images serve only if no other image has the class at all: a repeated example is
        fairer than one out of the query image.

        Returns:
            ``shots`` pairs (image index, position).

        Raises:
            ValueError: the class has no instance, or ``shots`` is below 1.
        """
        images = self.images_with(class_id)
        if not images or shots < 1:
            raise ValueError(
                f"support must be at least 1 shot of a class with instances, got {shots} shots of "
                f"class {class_id}, which {len(images)} images have"
            )
        excluded = _ranks(images, exclude_images)
        if len(excluded) == len(images):
            excluded = set()
        closed, unused, drawn = set(excluded), {}, []
        for _ in range(shots):
            if len(closed) == len(images):
                closed, unused = set(excluded), {}
            # Only integers() is used: its stream is the same in every numpy version and on every
            # platform.
            rank = _nth_outside(int(rng.integers(len(images) - len(closed))), closed)
            rest = unused.setdefault(rank, list(self.instances(images[rank], class_id)))
            drawn.append((images[rank], rest.pop(int(rng.integers(len(rest))))))
            if not rest:
                closed.add(rank)
        return drawn


def same_images(index: InstanceIndex, other: InstanceIndex) -> dict[int, tuple[int, ...]]:
    """{image of an index: those of the same file in another one, ascending}, for images that have any.

    Images are told by their files: parts of a data set may share ids, and one set may have two names.
    """
    places: dict[str, list[int]] = {}
    for image_index, file in enumerate(other.files):
        places.setdefault(file, []).append(image_index)
    return {i: tuple(places[file]) for i, file in enumerate(index.files) if file in places}


def _is_example(annotation: Mapping) -> bool:
    if annotation.get("iscrowd", 0):
        return False
    bbox, mode = annotation["bbox"], annotation["bbox_mode"]
    if mode != BoxMode.XYWH_ABS:
        bbox = BoxMode.convert(bbox, mode, BoxMode.XYWH_ABS)
    return bbox[2] > 0 and bbox[3] > 0


def _unique(pairs: Iterable[tuple], kind: str) -> dict:
    table = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{kind} ids must be unique in the data set, got {key} twice")
        table[key] = value
    return table


def _ranks(ascending: Sequence[int], values: Collection[int]) -> set[int]:
    """Where the values are in an ascending sequence; those that are not in it are left out."""
    places = ((bisect_left(ascending, value), value) for value in values)
    return {
        place for place, value in places if place < len(ascending) and ascending[place] == value
    }


def _nth_outside(n: int, closed: Collection[int]) -> int:
    """The n-th (from 0) of the numbers 0, 1, 2, ... that are not closed."""
    for number in sorted(closed):
        if number > n:
            break
        n += 1
    return n
