"""Class-balanced batches for metric learning: M random classes with D random images each (RepMet section 4.1).

Image t is a pure function of (seed, t), as a training episode is, so the stream and the loader of episodes serve here
too: any number of workers, and a run that was resumed, see the same batches.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader, Dataset

from .classified_images import ClassifiedImages, Read, classified_images
from .loaders import EpisodicTrainLoader

logger = logging.getLogger(__name__)


class SquareMapper:
    """Reads an image and makes it a square tensor of a classifier's batch."""

    @configurable
    def __init__(self, *, size: int, image_format: str, flip_probability: float):
        """Store the parts.

        Args:
            size: side in pixels; the aspect ratio is given up.
            image_format: channel order, "RGB" or "BGR".
            flip_probability: of a horizontal flip, in training.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR', got {image_format!r}")
        self.resize = T.Resize((size, size))
        self.image_format, self.flip_probability = image_format, flip_probability

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Read the keys."""
        flips = is_train and cfg.INPUT.RANDOM_FLIP == "horizontal"
        return {
            "size": cfg.FEWSHOT.CLASSIFY.IMAGE_SIZE,
            "image_format": cfg.INPUT.FORMAT,
            "flip_probability": 0.5 if flips else 0.0,
        }

    def __call__(
        self, read: Read, label: int, rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Map one image: {"image": uint8 Tensor[3, S, S], "label": int}; without ``rng`` it is never flipped.

        Raises:
            ValueError: the image cannot be read; the message names the file.
        """
        pixels = read()
        if rng is not None and rng.random() < self.flip_probability:
            pixels = pixels[:, ::-1]
        # Pillow wants rows without holes.
        pixels = np.ascontiguousarray(pixels)
        pixels = self.resize.get_transform(pixels).apply_image(pixels)
        if self.image_format == "BGR":
            pixels = pixels[..., ::-1]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "label": label,
        }


class ClassBatches:
    """All training images there are, in balanced batches: ``batches[t]`` is image t % (M D) of batch t // (M D)."""

    def __init__(
        self,
        images: ClassifiedImages,
        mapper: Callable[..., dict[str, Any]],
        *,
        num_classes: int,
        per_class: int,
        seed: int,
    ):
        """Take the images and their mapper.

        Args:
            images: of training. mapper: called with what reads an image, its label and a generator.
            num_classes, per_class: M and D of a batch.

        Raises:
            ValueError: fewer than two classes a batch or more than there are, or no image.
        """
        if not 2 <= num_classes <= len(images.class_names) or per_class < 1:
            raise ValueError(
                f"FEWSHOT.CLASSIFY.CLASSES_PER_BATCH must be 2..{len(images.class_names)}, the classes of "
                f"{images.name}, and EXAMPLES_PER_CLASS at least 1, got {num_classes} and {per_class}"
            )
        self.images, self.mapper = images, mapper
        self.num_classes, self.per_class, self.seed = num_classes, per_class, seed
        self._batch: tuple[int, list[tuple[int, int]]] = -1, []

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch, position = divmod(number, self.num_classes * self.per_class)
        label, place = self.draw(batch)[position]
        rng = np.random.default_rng((self.seed, number, 6))
        return self.mapper(self.images.images[label][place], label, rng)

    def draw(self, batch: int) -> list[tuple[int, int]]:
        """(class, image of the class) of a batch's images, class after class.

        Images of a class repeat only once all of them were drawn.
        """
        if batch != self._batch[0]:
            rng = np.random.default_rng((self.seed, batch, 5))
            labels = rng.permutation(len(self.images.class_names))[: self.num_classes]
            drawn = [(int(c), place) for c in labels for place in self._draw_images(rng, int(c))]
            self._batch = batch, drawn
        return self._batch[1]

    def _draw_images(self, rng: np.random.Generator, label: int) -> list[int]:
        count, drawn = len(self.images.images[label]), []
        while len(drawn) < self.per_class:
            drawn += rng.permutation(count).tolist()
        return drawn[: self.per_class]


class ClassBatchLoader(EpisodicTrainLoader):
    """Endless batches (list of mapped images) that start at the trainer's iteration.

    Several processes share a batch out; SOLVER.IMS_PER_BATCH is that of all of them.
    """

    def __init__(self, cfg: CfgNode):
        """Look up the images of FEWSHOT.CLASSIFY.TRAIN; nothing is read yet.

        Raises:
            ValueError: the number of classes or the batch size does not fit, or there is a split.
        """
        node, images = cfg.FEWSHOT.CLASSIFY, classified_images(cfg.FEWSHOT.CLASSIFY.TRAIN)
        if cfg.FEWSHOT.SPLIT != "all":
            raise ValueError(
                "FEWSHOT.SPLIT must be 'all' for a classifier, which is trained on all classes of "
                f"FEWSHOT.CLASSIFY.TRAIN, got {cfg.FEWSHOT.SPLIT!r}"
            )
        balanced = node.CLASSES_PER_BATCH * node.EXAMPLES_PER_CLASS
        if cfg.SOLVER.IMS_PER_BATCH % balanced:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of FEWSHOT.CLASSIFY.CLASSES_PER_BATCH x "
                f"EXAMPLES_PER_CLASS = {balanced}, got {cfg.SOLVER.IMS_PER_BATCH}"
            )
        if len(images.class_names) != cfg.MODEL.DML.NUM_CLASSES:
            raise ValueError(
                f"MODEL.DML.NUM_CLASSES must be the {len(images.class_names)} classes of "
                f"{images.name}, got {cfg.MODEL.DML.NUM_CLASSES}"
            )
        self.episodes = ClassBatches(
            images,
            SquareMapper(cfg, is_train=True),
            num_classes=node.CLASSES_PER_BATCH,
            per_class=node.EXAMPLES_PER_CLASS,
            seed=max(cfg.SEED, 0),
        )
        self.total_batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.num_workers = cfg.DATALOADER.NUM_WORKERS
        logger.info(
            "Training images: %s, %d images of %d classes, seed %d",
            *(images.name, len(images), len(images.class_names), self.episodes.seed),
        )


class LabelledImages(Dataset):
    """Mapped images of a test set, in order."""

    def __init__(
        self, labelled: list[tuple[Read, int]], mapper: Callable[[Read, int], dict[str, Any]]
    ):
        self.labelled, self.mapper = labelled, mapper

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.mapper(*self.labelled[index])


def build_classification_test_loader(cfg: CfgNode) -> tuple[DataLoader, tuple[str, ...]]:
    """Batches of all images of FEWSHOT.CLASSIFY.TEST, this process's share, and the N class names of training."""
    class_names = classified_images(cfg.FEWSHOT.CLASSIFY.TRAIN).class_names
    labelled = classified_images(cfg.FEWSHOT.CLASSIFY.TEST).labelled(class_names)
    images = LabelledImages(labelled, SquareMapper(cfg, is_train=False))
    loader = DataLoader(
        images,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        sampler=InferenceSampler(len(images)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )
    return loader, class_names
