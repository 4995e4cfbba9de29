"""Episodic mappers: an ``Episode`` in, the query dict of the batch contract out (see ``structures``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances
from detectron2.utils.registry import Registry
from pycocotools import mask as coco_mask

from ..decoding import read_rgb
from ..structures import Support, SupportSet
from ..support_augmentation import SupportAugmentation, mirrored
from ..transforms import ResizeByRule, SupportCrop
from .augmentation import NOTHING, AugmentationRule, centres_inside
from .episodes import Episode

EPISODIC_MAPPER_REGISTRY = Registry("EPISODIC_MAPPER")
EPISODIC_MAPPER_REGISTRY.__doc__ = """
Mappers named by FEWSHOT.MAPPER; called as ``mapper(cfg, is_train)`` and then with an ``Episode``. Pre-training on
pairs also calls ``boxed(record, annotation)`` and ``support_crop``.
"""

_SUPPORT_FORMS = ("crop", "image", "whole")
_SUPPORT_BOXES = ("annotation", "mask")


@EPISODIC_MAPPER_REGISTRY.register()
class EpisodicDatasetMapper:
    """The default mapper.

    1. Read the query, augment it, flip it (training, by key) and resize it.
    2. Keep the annotations of the episode's classes as ``instances`` with episode-local classes.
    3. Read the supports and crop them, attach their boxes or leave them without.

    Everything random comes from the episode's key, nothing from a worker's state.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        image_format: str,
        resize: ResizeByRule,
        support_crop: SupportCrop,
        support_form: str,
        support_box: str,
        with_masks: bool,
        flip_probability: float,
        support_augmentation: SupportAugmentation | None = None,
        query_augmentation: AugmentationRule = NOTHING,
    ):
        """Store the parts.

        Args:
            is_train: whether ``instances`` are wanted and flips allowed.
            image_format: channel order of the query, "BGR" or "RGB". Supports are always RGB.
            resize: rule of the query. support_crop: rule of the supports if ``support_form`` is "crop".
            support_form: "crop", "image" or "whole". support_box: "annotation" or "mask".
            with_masks: whether instances get ``gt_masks``.
            flip_probability: of a horizontal flip of query and supports together, in training; supports of the form
                "whole" are not flipped.
            support_augmentation: of supports in testing; None = none. query_augmentation: of the query in training.
        """
        if support_form not in _SUPPORT_FORMS or support_box not in _SUPPORT_BOXES:
            raise ValueError(
                f"FEWSHOT.SUPPORT.FORM must be one of {_SUPPORT_FORMS} and BOX one of "
                f"{_SUPPORT_BOXES}, got {support_form!r} and {support_box!r}"
            )
        self.is_train = is_train
        self.image_format = image_format
        self.resize = resize
        self.support_crop = support_crop
        self.support_form, self.support_box = support_form, support_box
        self.with_masks = with_masks
        self.flip_probability = flip_probability if is_train else 0.0
        self.support_augmentation = SupportAugmentation()
        if support_augmentation and not is_train:
            self.support_augmentation = support_augmentation
        self.query_augmentation = query_augmentation if is_train else NOTHING

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Read the keys."""
        return {
            "is_train": is_train,
            "image_format": cfg.INPUT.FORMAT,
            "resize": ResizeByRule.from_cfg(cfg, is_train=is_train),
            "support_crop": SupportCrop.from_cfg(cfg),
            "support_form": cfg.FEWSHOT.SUPPORT.FORM,
            "support_box": cfg.FEWSHOT.SUPPORT.BOX,
            "with_masks": cfg.MODEL.MASK_ON,
            "support_augmentation": SupportAugmentation.from_cfg(cfg),
            "flip_probability": 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
            "query_augmentation": AugmentationRule.from_cfg(cfg),
        }

    def __call__(self, episode: Episode) -> dict[str, Any]:
        """Map one episode; the dicts in it are not changed.

        Raises:
            ValueError: an image is missing or broken; the message names the file.
        """
        pixels = read_image(episode.query, self.image_format)
        flip = self.flips(episode)
        transform, window = self.query_transform(episode, pixels, flip=flip)
        pixels = transform.apply_image(pixels)
        result = self.query(episode, pixels)
        if episode.supports:
            result["support"] = self.support_set(episode, flip=flip)
        if self.is_train:
            result["instances"] = self._instances(episode, transform, pixels.shape[:2], window)
        if episode.weights:
            result["weights"] = list(episode.weights)
        return result

    def query(self, episode: Episode, pixels: np.ndarray) -> dict[str, Any]:
        """The query of an episode with these pixels, of whatever size, without supports and ground truth."""
        record = episode.query
        return {
            **{key: record[key] for key in ("file_name", "image_id", "height", "width")},
            "image": _to_tensor(pixels),
            "episode_id": episode.episode_id,
        }

    def query_transform(
        self, episode: Episode, pixels: np.ndarray, *, flip: bool
    ) -> tuple[T.TransformList, Any]:
        """Augment, flip and resize; and the window that is cut out (None: the whole image)."""
        moves = self.query_augmentation.moves_pixels
        augmented = T.AugInput(pixels, boxes=self._boxes(episode) if moves else None)
        rng = np.random.default_rng((*episode.key, 3))
        transform = augmented.apply_augmentations(self.query_augmentation.augmentations(rng))
        flips = [T.HFlipTransform(augmented.image.shape[1])] if flip else []
        resize = self.resize.get_transform(augmented.image)
        return transform + T.TransformList([*flips, resize]), None

    def flips(self, episode: Episode) -> bool:
        """Whether an episode's query and supports are flipped."""
        return bool(np.random.default_rng((*episode.key, 2)).random() < self.flip_probability)

    def _instances(
        self,
        episode: Episode,
        transform: T.Transform,
        image_size: tuple[int, int],
        window: Any = None,
    ) -> Instances:
        local_class = {c: k for k, c in enumerate(episode.contiguous_ids)}
        wanted = self.searched_annotations(episode)
        if self.query_augmentation.moves_pixels:
            inside = centres_inside(self._boxes(episode), transform, image_size)
            wanted = [a for a, is_inside in zip(wanted, inside, strict=True) if is_inside]
        annotations = [
            {
                **a,
                "category_id": local_class[a["category_id"]],
                "segmentation": outline(a),
                # detectron2 transforms in the box's own type, and would round integers down.
                "bbox": [float(value) for value in a["bbox"]],
            }
            for a in wanted
        ]
        difficult = [bool(a.get("difficult", 0)) for a in annotations]
        for annotation in annotations:
            if not self.with_masks:
                del annotation["segmentation"]
            elif self.query_augmentation.crops:
                # Polygons could not be cropped.
                annotation["segmentation"] = _as_rle(annotation["segmentation"], episode.query)
        annotations = [
            detection_utils.transform_instance_annotations(a, transform, image_size)
            for a in annotations
        ]
        instances = detection_utils.annotations_to_instances(
            annotations, image_size, mask_format="bitmask"
        )
        if any(difficult):
            instances.gt_difficult = torch.tensor(difficult)
        return detection_utils.filter_empty_instances(instances)

    def searched_annotations(self, episode: Episode) -> list[dict[str, Any]]:
        """The query's annotations of the episode's classes, without crowds."""
        searched = set(episode.contiguous_ids)
        return [
            a
            for a in episode.query.get("annotations", ())
            if a["category_id"] in searched and not a.get("iscrowd", 0)
        ]

    def _boxes(self, episode: Episode) -> np.ndarray:
        """XYXY of the episode's instances in the query, float64[N, 4], original pixels."""
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in self.searched_annotations(episode)
        ]
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)

    def support_set(self, episode: Episode, *, flip: bool = False) -> SupportSet:
        """Read, crop and perhaps flip the supports of an episode; in testing with the augmented ones."""
        examples = [
            [self.support(record, annotation, flip=flip) for record, annotation in shots]
            for shots in episode.supports
        ]
        return self.support_augmentation(
            SupportSet(list(episode.class_ids), list(episode.class_names), examples)
        )

    def support(self, record: dict, annotation: dict, *, flip: bool = False) -> Support:
        """Read, crop or resize and perhaps flip one example."""
        if self.support_form == "whole":
            pixels = read_image(record, "RGB")
            return Support(_to_tensor(self.resize.get_transform(pixels).apply_image(pixels)))
        support = self.boxed(record, annotation)
        if self.support_form == "crop":
            support = self.support_crop(support)
        return mirrored(support) if flip else support

    def boxed(self, record: dict, annotation: dict) -> Support:
        """Read one example: its whole image and its box."""
        image = _to_tensor(read_image(record, "RGB"))
        box = self._example_box(record, annotation)
        return Support(image=image, box=torch.tensor(box, dtype=torch.float32))

    def _example_box(self, record: dict, annotation: dict) -> Sequence[float]:
        if self.support_box == "mask" and annotation.get("segmentation") is not None:
            mask = decode_mask(annotation["segmentation"], record["height"], record["width"])
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _as_rle(segmentation: list | dict, record: dict) -> dict:
    mask = decode_mask(segmentation, record["height"], record["width"])
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def read_image(record: dict, image_format: str) -> np.ndarray:
    """Read a dataset dict's image, uint8 (H, W, 3), as ``find`` reads pictures; "RGB" or "BGR".

    Raises:
        ValueError: missing, broken, too large (see ``decoding``) or of another size than annotated; names the file.
    """
    pixels = read_rgb(record["file_name"])
    try:
        detection_utils.check_image_size(dict(record), pixels)
    except detection_utils.SizeMismatchError as error:
        raise ValueError(
            f"{record['file_name']} must have {record['width']}x{record['height']} pixels as annotated, got: {error}"
        ) from error
    return np.ascontiguousarray(pixels[:, :, ::-1]) if image_format == "BGR" else pixels


def outline(annotation: dict) -> list | dict:
    """The segmentation, or the box as a polygon where there is none: the best outline known."""
    if annotation.get("segmentation"):
        return annotation["segmentation"]
    x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO polygons, uncompressed or compressed RLE -> bool (height, width)."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
