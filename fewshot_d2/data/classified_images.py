"""Images of a closed set of classes, for classification (RepMet section 5.1): where they come from.

A source is named by a text: ``omniglot:A-B:C-D`` (characters A to B - 1, drawers C to D - 1), a registered data set
(the crop of every box) or a folder with a folder of pictures for each class.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..decoding import IMAGE_SUFFIXES
from ..files import dataset_path
from .coco_json import dataset_categories
from .dataset_mapper import read_image
from .datasets.omniglot import OmniglotGlyphs
from .loaders import build_index

# () -> uint8 (H, W, 3), RGB. What makes one must be importable, because workers may be spawned.
Read = Callable[[], np.ndarray]

_OMNIGLOT = re.compile(r"omniglot:(\d+)-(\d+):(\d+)-(\d+)")


@dataclass(frozen=True)
class ClassifiedImages:
    """Images that have one class each, read one by one.

    Attributes:
        name: where they come from, for messages.
        class_names: N names, no two alike.
        images: N sequences, the images of each class.
    """

    name: str
    class_names: tuple[str, ...]
    images: tuple[tuple[Read, ...], ...]

    def __post_init__(self):
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(
                f"{self.name} must have at least 2 classes of different names, got "
                f"{len(self.class_names)}: {self.class_names[:5]}"
            )
        if len(self.images) != len(self.class_names):
            raise ValueError(
                f"{self.name} must have images for each of {len(self.class_names)} classes, got "
                f"{len(self.images)} lists"
            )
        empty = [n for n, own in zip(self.class_names, self.images, strict=True) if not own]
        if empty:
            raise ValueError(f"{self.name} must have an image of every class, got none of {empty}")

    def __len__(self) -> int:
        """Number of images."""
        return sum(len(own) for own in self.images)

    def labelled(self, class_names: Sequence[str]) -> list[tuple[Read, int]]:
        """Every image with its class as a position in ``class_names``, the classes of training.

        Raises:
            ValueError: a class is not among them; this is a closed set.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        unknown = [name for name in self.class_names if name not in label_of]
        if unknown:
            raise ValueError(
                f"{self.name} must have classes of training only, got also {unknown[:5]}"
            )
        return [
            (read, label_of[name])
            for name, own in zip(self.class_names, self.images, strict=True)
            for read in own
        ]


def classified_images(source: str) -> ClassifiedImages:
    """What a source names; see the head of this module.

    Raises:
        ValueError: it is none of the three.
    """
    omniglot = _OMNIGLOT.fullmatch(source)
    if omniglot:
        first, end, first_drawer, end_drawer = map(int, omniglot.groups())
        return omniglot_characters(
            OmniglotGlyphs(), (first, end), drawers=(first_drawer, end_drawer)
        )
    if source in DatasetCatalog.list():
        return box_crops(source)
    # An empty text would be the folder of all data sets.
    if source and dataset_path(source).is_dir():
        return class_folders(dataset_path(source))
    raise ValueError(
        "FEWSHOT.CLASSIFY.TRAIN and TEST must be 'omniglot:A-B:C-D', a registered data set or a "
        f"folder, got {source!r}, which is no folder {dataset_path(source).absolute()}"
    )


def class_folders(root: str | Path) -> ClassifiedImages:
    """Pictures ``root/class/*``, in the order of their names; nothing is read yet."""
    folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
    images = [
        sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        for folder in folders
    ]
    return ClassifiedImages(
        name=str(root),
        class_names=tuple(folder.name for folder in folders),
        images=tuple(tuple(partial(_picture, str(path)) for path in own) for own in images),
    )


def omniglot_characters(
    source: OmniglotGlyphs, classes: tuple[int, int], *, drawers: tuple[int, int]
) -> ClassifiedImages:
    """Drawings of some characters, black on white; both ranges are half-open.

    The n-th drawings of an alphabet's characters are by one person, so other drawers are other people.
    """
    names = source.class_names[slice(*classes)]
    images = [
        tuple(
            partial(_drawing, source, c, d)
            for d in range(drawers[0], min(drawers[1], source.num_drawings(c)))
        )
        for c in range(classes[0], min(classes[1], source.num_classes))
    ]
    name = "omniglot:{}-{}:{}-{}".format(*classes, *drawers)
    return ClassifiedImages(name=name, class_names=tuple(names), images=tuple(images))


def box_crops(dataset: str) -> ClassifiedImages:
    """The box of every instance of a registered data set, for the classes that have one; crowds are left out."""
    index, names = build_index(dataset), dataset_categories(dataset)
    images = [
        tuple(
            partial(_crop, index.dicts[i], index.dicts[i]["annotations"][position])
            for i in index.images_with(class_id)
            for position in index.instances(i, class_id)
        )
        for class_id in index.class_ids
    ]
    class_names = tuple(names[class_id] for class_id in index.class_ids)
    return ClassifiedImages(name=dataset, class_names=class_names, images=tuple(images))


def _picture(path: str) -> np.ndarray:
    return read_image({"file_name": path}, "RGB")


def _drawing(source: OmniglotGlyphs, class_index: int, drawing_index: int) -> np.ndarray:
    ink = source.drawing(class_index, drawing_index)
    return np.repeat(255 - ink[..., None], 3, axis=2)


def _crop(record: Mapping, annotation: Mapping) -> np.ndarray:
    """The pixels that the box touches."""
    pixels = read_image(dict(record), "RGB")
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    height, width = pixels.shape[:2]
    left, top = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    right, bottom = int(np.ceil(box[2])), int(np.ceil(box[3]))
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
