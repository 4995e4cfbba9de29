"""The mapper of training patches (OS2D spec 1.14): a random window of each query, or the one that was mined.

Testing is that of ``EpisodicDatasetMapper``. Instances have ``gt_difficult`` (bool) and boxes that may leave the patch.
"""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances

from .dataset_mapper import (
    EPISODIC_MAPPER_REGISTRY,
    EpisodicDatasetMapper,
    decode_mask,
    outline,
    read_image,
)
from .episodes import Episode
from .patches import PatchRule, Window, pil_filter, window_transform


@EPISODIC_MAPPER_REGISTRY.register()
class PatchMapper(EpisodicDatasetMapper):
    """Training queries are patches of one size; ``height`` and ``width`` stay those of the whole image."""

    @configurable
    def __init__(self, *, patches: PatchRule, **kwargs: Any):
        """Add to the mapper's arguments how patches are drawn.

        Raises:
            ValueError: queries are to be augmented besides.
        """
        super().__init__(**kwargs)
        if self.query_augmentation.photometric or self.query_augmentation.moves_pixels:
            raise ValueError(
                "FEWSHOT.AUGMENT must be left as it is with the PatchMapper, which draws patches itself, got "
                f"{self.query_augmentation}"
            )
        self.patches = patches

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Read the keys."""
        return {**super().from_config(cfg, is_train), "patches": PatchRule.from_cfg(cfg)}

    def flips(self, episode: Episode) -> bool:
        """Mined patches are not varied."""
        return episode.window is None and super().flips(episode)

    def query_transform(
        self, episode: Episode, pixels: np.ndarray, *, flip: bool
    ) -> tuple[T.TransformList, Window | None]:
        """Flip, cut and resize; and the window, in pixels of the flipped image."""
        if not self.is_train:
            return super().query_transform(episode, pixels, flip=flip)
        height, width = pixels.shape[:2]
        flips = [T.HFlipTransform(width)] if flip else []
        rng = np.random.default_rng((*episode.key, 5))
        window, interp = episode.window, pil_filter("bilinear")
        if window is None:
            boxes = T.TransformList(flips).apply_box(self._boxes(episode))
            scale = self.scale_of(height, width)
            window = self.patches.draw(rng, boxes, height=height, width=width, scale=scale)
            interp = self.patches.draw_filter(rng)
        cut = window_transform(
            window, height=height, width=width, size=self.patches.size, interp=interp
        )
        return T.TransformList([*flips, *cut.transforms]), window

    def scale_of(self, height: int, width: int) -> float:
        """Pixels of a training image after resizing for one before."""
        new_height, new_width = self.resize.shape(height, width)
        return (new_height * new_width / (height * width)) ** 0.5

    def scaled(self, episode: Episode, factor: float) -> dict[str, Any]:
        """The whole query at ``factor`` x the training scale, with its instances, for mining; without supports.

        Raises:
            ValueError: the image is missing or broken; the message names the file.
        """
        pixels = read_image(episode.query, self.image_format)
        height, width = pixels.shape[:2]
        factor *= self.scale_of(height, width)
        shape = max(1, round(height * factor)), max(1, round(width * factor))
        transform = T.TransformList([T.ResizeTransform(height, width, *shape)])
        query = self.query(episode, transform.apply_image(pixels))
        return {**query, "instances": self._instances(episode, transform, shape)}

    def _instances(
        self,
        episode: Episode,
        transform: T.Transform,
        image_size: tuple[int, int],
        window: Window | None = None,
    ) -> Instances:
        """Boxes, not clipped, of the episode's classes that the window holds; all of them without one."""
        annotations = self.searched_annotations(episode)
        original = self._boxes(episode)
        boxes = transform.apply_box(original)
        kept, cut = np.ones(len(boxes), bool), np.zeros(len(boxes), bool)
        if window is not None:
            # The window is one of the flipped image; the patch is all of it.
            patch = 0, 0, image_size[1], image_size[0]
            kept, cut = self.patches.states(boxes, patch)
        local_class = {c: k for k, c in enumerate(episode.contiguous_ids)}
        classes = [local_class[a["category_id"]] for a in annotations]
        difficult = [bool(a.get("difficult", 0)) for a in annotations]
        instances = Instances(image_size)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        instances.gt_difficult = torch.tensor(difficult, dtype=torch.bool) | torch.from_numpy(cut)
        if self.with_masks:
            instances.gt_masks = self._masks(episode, annotations, transform, image_size)
        return instances[torch.from_numpy(kept)]

    def _masks(
        self,
        episode: Episode,
        annotations: list[dict[str, Any]],
        transform: T.Transform,
        image_size: tuple[int, int],
    ) -> BitMasks:
        size = episode.query["height"], episode.query["width"]
        masks = torch.zeros(len(annotations), *image_size, dtype=torch.bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            whole = decode_mask(outline(annotation), *size).astype(np.uint8)
            mask[:] = torch.from_numpy(transform.apply_segmentation(whole).astype(bool))
        return BitMasks(masks)
