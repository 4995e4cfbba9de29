"""Inference on a user's own images: encode the supports once, then predict on many images."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances

from .checkpoint import FewShotCheckpointer, read_checkpoint
from .config import load_config
from .decoding import read_rgb
from .inference.feature_store import load_features, model_sha256, save_keeping_features
from .inference.pipeline import mapped_ahead
from .modeling.co_localization import common_boxes
from .structures import SupportFeatures, SupportSet
from .support_augmentation import SupportAugmentation
from .transforms import ResizeByRule

logger = logging.getLogger(__name__)

# Autocast's type; supports are always encoded in full precision, once.
_PRECISIONS = {"fp32": None, "amp": torch.float16, "bf16": torch.bfloat16}
_BATCH_ON_GPU = 8

# An image as the user gives it: BGR uint8 (H, W, 3) as OpenCV reads it, or a file.
ImageSource = np.ndarray | str | Path


@dataclass
class Query:
    """One image on its way through the predictor.

    Attributes:
        source: what the user gave. image (uint8, (H, W, 3)): BGR, its pixels; None if ``error``.
        error (ValueError or None): why it could not be read.
        tensor (Tensor[3, h, w]): uint8, resized, in the model's channel order.
        instances: what was found, on the CPU, in pixels of ``image``.
    """

    source: Any
    image: np.ndarray | None = None
    error: ValueError | None = None
    tensor: torch.Tensor | None = None
    instances: Instances | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the tensor: images of one shape can be batched without padding, so with the same result."""
        return None if self.tensor is None else tuple(self.tensor.shape)


class FewShotPredictor:
    """``set_support`` once, ``predict`` as often as wanted."""

    def __init__(
        self,
        config: CfgNode | str | Path,
        weights: str | Path = "",
        *,
        device: str = "",
        precision: str = "fp32",
        batch_size: int = 0,
        workers: int = 1,
    ):
        """Build the model and load its weights.

        Args:
            config: a config or its file. weights: a checkpoint; "" = MODEL.WEIGHTS of the config.
            device: "cpu", "cuda", "cuda:1"; "" = MODEL.DEVICE of the config, or the CPU where there is no GPU.
            precision: "fp32"; "amp" = float16 where it is safe, on a GPU; "bf16" = bfloat16, likewise, anywhere.
            batch_size: images of one shape that go through the model together; 0 = 8 on a GPU, 1 on a CPU.
            workers: threads that read images ahead.
        """
        if not isinstance(config, CfgNode):
            config = load_config(str(config))
        cfg = config.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(weights) or cfg.MODEL.WEIGHTS
        cfg.MODEL.DEVICE = _checked_device(device or cfg.MODEL.DEVICE)
        if not cfg.MODEL.WEIGHTS:
            logger.warning("No weights: what %s finds is random", cfg.MODEL.META_ARCHITECTURE)
        if _is_whole(cfg.MODEL.WEIGHTS):
            # The file that its backbone started from may be on another machine.
            cfg.MODEL.TORCHVISION.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS = ""
        self.cfg = cfg
        self.dtype = _checked_precision(precision, cfg.MODEL.DEVICE)
        self.model = build_model(cfg).eval()
        FewShotCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.resize = ResizeByRule.from_cfg(cfg, is_train=False)
        self.augmentation = SupportAugmentation.from_cfg(cfg)
        self.input_format = cfg.INPUT.FORMAT
        self.workers = workers
        self.batch_size = batch_size or (1 if cfg.MODEL.DEVICE == "cpu" else _BATCH_ON_GPU)
        self.support: SupportFeatures | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of weights and settings: features of supports are good for this predictor alone."""
        return model_sha256(self.model, self.cfg)

    def set_support(
        self,
        support: SupportSet | SupportFeatures | str | Path,
        *,
        stored_in: Sequence[str | Path] = (),
    ) -> SupportFeatures:
        """Encode the examples (or take encoded ones) for all later calls of ``predict``.

        Args:
            support: examples, features, or a support-set file.
            stored_in: support-set files; features in them are taken if they are this model's and of these examples.
                A file that is given as ``support`` is one of them.
        """
        if isinstance(support, (str, Path)):
            support, stored_in = SupportSet.load(support), [support, *stored_in]
        if isinstance(support, SupportSet):
            self._tell_unused(support)
            stored = (load_features(file, support, self.sha256) for file in stored_in)
            support = next(filter(None, stored), None) or self._encoded(support)
        self.support = support.to(self.cfg.MODEL.DEVICE)
        return self.support

    def _tell_unused(self, support_set: SupportSet) -> None:
        unused = sum(shot.negative for shots in support_set.examples for shot in shots)
        if unused and not self.model.uses_negatives:
            name = type(self.model).__name__
            logger.warning("%s has no use for negative examples: %d left out", name, unused)

    @torch.no_grad()
    def _encoded(self, support_set: SupportSet) -> SupportFeatures:
        return self.model.encode_support([self.augmentation(support_set)])

    def save_support(
        self, path: str | Path, support_set: SupportSet, *, stored_in: Sequence[str | Path] = ()
    ) -> None:
        """Set the support and write it with its features to a support-set file, for later runs of this model.

        Args:
            path: new, or an older file of these examples. stored_in: see ``set_support``; ``path`` is one of them.
        """
        stored_in = [*([path] if Path(path).exists() else []), *stored_in]
        features = self.set_support(support_set, stored_in=stored_in)
        save_keeping_features(path, support_set, {self.sha256: features})

    @contextlib.contextmanager
    def fine_tuned(self, support_set: SupportSet) -> Iterator[SupportFeatures]:
        """Within the context, predict with the model tuned to the examples as FEWSHOT.FINETUNE says.

        Afterwards the model is what it was, and supports must be set again.

        Raises:
            ValueError: the system cannot be fine-tuned.
        """
        # Training and evaluation are slow to import, and predicting needs neither.
        from .engine.finetune import FineTuning, fine_tuned

        tuning, examples = FineTuning.from_cfg(self.cfg), self.augmentation(support_set)
        with fine_tuned(self.model, examples, tuning) as self.support:
            # Features of the tuned model are not those of the weights it came from.
            self.__dict__.pop("sha256", None)
            try:
                yield self.support
            finally:
                self.support = None
                self.__dict__.pop("sha256", None)

    def predict(
        self, images: ImageSource | Iterable[ImageSource]
    ) -> Instances | Iterator[Instances]:
        """Detect the classes of the support set.

        Args:
            images: an image (uint8, (H, W, 3), BGR, as OpenCV reads it, or a file), or any number of them.

        Returns:
            Of an image, its Instances on the CPU in its own pixels; ``pred_classes`` index ``support.class_names``.
            Of several, an iterator over theirs, in order; images are read ahead and only a few are in memory.

        Raises:
            RuntimeError: ``set_support`` has not been called.
            ValueError: not an image of that kind, or a file that cannot be read; names it.
        """
        self._check_support()
        if isinstance(images, (str, Path)) or getattr(images, "ndim", None) in (0, 1, 2, 3):
            return next(self._found([images]))
        return self._found(images)

    def _found(self, images: Iterable[ImageSource]) -> Iterator[Instances]:
        for query in self.search(images):
            if query.error is not None:
                raise query.error
            yield query.instances

    def search(
        self,
        sources: Iterable[Any],
        read: Callable[[Any], np.ndarray] | None = None,
    ) -> Iterator[Query]:
        """What ``predict`` does, with the pixels and, for an image that cannot be read, its ``error``.

        Args:
            sources: anything. read: gives the BGR pixels of a source, called in a thread; default: of an
                ``ImageSource``.
        """
        self._check_support()
        read = read or _read_bgr
        queries = mapped_ahead(
            lambda source: self._prepared(source, read),
            sources,
            ahead=2 * self.batch_size,
            workers=self.workers,
        )
        for shape, of_one_shape in groupby(queries, key=lambda query: query.shape):
            for batch in _batches(of_one_shape, self.batch_size):
                if shape is not None:
                    self._detect(batch)
                yield from batch

    def common_boxes(
        self, images: Sequence[np.ndarray], threshold: float = 0.3
    ) -> list[tuple[torch.Tensor, float] | None]:
        """Where what all images have in common is in each, without any support; see ``modeling.co_localization``.

        Args:
            images: BGR uint8 (H, W, 3) each. threshold: share of the largest attention that a region has.
        """
        queries = [self._prepared(image, _read_bgr) for image in images]
        for query in queries:
            if query.error is not None:
                raise query.error
        return common_boxes(self.model, [_input(query) for query in queries], threshold=threshold)

    def _check_support(self) -> None:
        if self.support is None:
            raise RuntimeError("predict needs supports: call set_support(support_set) first")

    def _prepared(self, source: Any, read: Callable[[Any], np.ndarray]) -> Query:
        try:
            image = _checked_image(read(source))
        except ValueError as error:
            return Query(source, error=error)
        pixels = image[:, :, ::-1] if self.input_format == "RGB" else image
        pixels = self.resize.get_transform(pixels).apply_image(np.ascontiguousarray(pixels))
        return Query(source, image, tensor=torch.from_numpy(pixels.transpose(2, 0, 1).copy()))

    def _detect(self, batch: list[Query]) -> None:
        """Fill in ``instances``."""
        inputs = [{**_input(query), "support_features": self.support} for query in batch]
        device_type = torch.device(self.cfg.MODEL.DEVICE).type
        mixed = torch.autocast(device_type, self.dtype, enabled=self.dtype is not None)
        with torch.no_grad(), mixed:
            outputs = self.model(inputs)
        for query, output in zip(batch, outputs, strict=True):
            query.instances = _in_full_precision(output["instances"].to("cpu"))


def _input(query: Query) -> dict[str, Any]:
    """A query dict without supports."""
    height, width = query.image.shape[:2]
    return {"image": query.tensor, "height": height, "width": width}


def _is_whole(weights: str) -> bool:
    """Whether a file is a checkpoint of training, which holds all weights of a model."""
    return Path(weights).is_file() and "system" in read_checkpoint(weights, lazy=True)


def _checked_device(device: str) -> str:
    """The device, or the CPU where there is no GPU."""
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            logger.warning("No CUDA device: %s is replaced by the CPU", device)
            return "cpu"
        torch.empty(0, device=device)
    # torch raises either, with half a page of text.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch has, got {device!r}: {reason}") from error
    return device


def _checked_precision(precision: str, device: str) -> torch.dtype | None:
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {sorted(_PRECISIONS)}, got {precision!r}")
    if precision == "amp" and torch.device(device).type == "cpu":
        raise ValueError("precision must be fp32 or bf16 on a CPU, got 'amp', which needs a GPU")
    return _PRECISIONS[precision]


def _read_bgr(source: ImageSource) -> np.ndarray:
    return read_rgb(source)[:, :, ::-1] if isinstance(source, (str, Path)) else source


def _checked_image(image: np.ndarray) -> np.ndarray:
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise ValueError(f"image must be a uint8 array (H, W, 3), got {array.dtype} {array.shape}")
    return array


def _batches(queries: Iterable[Query], size: int) -> Iterator[list[Query]]:
    """Lists of at most ``size``; one at a time, so that no more is read than needed."""
    batch: list[Query] = []
    for query in queries:
        batch.append(query)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _in_full_precision(instances: Instances) -> Instances:
    instances.pred_boxes.tensor = instances.pred_boxes.tensor.float()
    instances.scores = instances.scores.float()
    return instances
