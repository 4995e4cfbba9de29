"""Inference on a user's own images: encode the supports once, then predict on many images."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances

from .checkpoint import FewShotCheckpointer
from .structures import SupportFeatures, SupportSet
from .transforms import ResizeByRule


class FewShotPredictor:
    """``set_support`` once, ``predict`` as often as wanted."""

    def __init__(self, cfg: CfgNode):
        """Build the model of ``cfg`` and load MODEL.WEIGHTS."""
        self.model = build_model(cfg).eval()
        FewShotCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.resize = ResizeByRule.from_cfg(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT
        self.cfg = cfg
        self.support: SupportFeatures | None = None

    def set_support(self, support: SupportSet | SupportFeatures) -> SupportFeatures:
        """Encode the examples (or take encoded ones) for all later calls of ``predict``."""
        if isinstance(support, SupportSet):
            with torch.no_grad():
                support = self.model.encode_support([support])
        self.support = support
        return support

    @contextlib.contextmanager
    def fine_tuned(self, support_set: SupportSet) -> Iterator[SupportFeatures]:
        """Within the context, predict with the model tuned to the examples as FEWSHOT.FINETUNE says.

        Afterwards the model is what it was, and supports must be set again.

        Raises:
            ValueError: the system cannot be fine-tuned.
        """
        # Training and evaluation are slow to import, and predicting needs neither.
        from .engine.finetune import FineTuning, fine_tuned

        with fine_tuned(self.model, support_set, FineTuning.from_cfg(self.cfg)) as self.support:
            try:
                yield self.support
            finally:
                self.support = None

    def predict(self, image: np.ndarray) -> Instances:
        """Detect the classes of the support set.

        Args:
            image (uint8, (H, W, 3)): BGR, as OpenCV reads it.

        Returns:
            Instances on the CPU in pixels of ``image``; ``pred_classes`` index ``support.class_names``.

        Raises:
            RuntimeError: ``set_support`` has not been called.
            ValueError: not an image of that kind.
        """
        if self.support is None:
            raise RuntimeError("predict needs supports: call set_support(support_set) first")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"image must be a uint8 array (H, W, 3), got {image.dtype} {image.shape}"
            )
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        pixels = self.resize.get_transform(image).apply_image(np.ascontiguousarray(image))
        query = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "height": height,
            "width": width,
            "support_features": self.support,
        }
        with torch.no_grad():
            return self.model([query])[0]["instances"].to("cpu")
