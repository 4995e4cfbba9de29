"""SSD's augmentation of training queries as detectron2 Augmentations (SILCO spec A7).

The crop follows the original rule: *some* box must have the least IoU with the crop, and boxes whose centre is outside
are dropped afterwards, by ``centres_inside``. Everything random comes from the generator that is given. Images are
uint8 (H, W, 3), boxes XYXY in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

_PROBABILITY = 0.5
_BRIGHTNESS, _HUE = 32.0, 18.0
_FACTORS = (0.5, 1.5)
# Of a crop: side relative to the image's, width : height relative to the image's, attempts with one option.
_SCALES, _ASPECTS, _ATTEMPTS = (0.3, 1.0), (0.5, 2.0), 50
CROP_OPTIONS = ("none", 0.1, 0.3, 0.5, 0.7, 0.9, "random")


@dataclass(frozen=True)
class AugmentationRule:
    """Which of the steps there are; the default does nothing.

    Attributes:
        photometric (bool): colours.
        expand (float): largest canvas, relative to the image's sides; 1 = none.
        crops (tuple): of ``CROP_OPTIONS`` or other least IoUs in [0, 1]; empty = none.
        fill (tuple[float, float, float]): colour of the canvas.
        image_format (str): channel order, "BGR" or "RGB".
    """

    photometric: bool = False
    expand: float = 1.0
    crops: tuple[str | float, ...] = ()
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)
    image_format: str = "RGB"

    def __post_init__(self) -> None:
        if self.expand < 1:
            raise ValueError(f"FEWSHOT.AUGMENT.EXPAND must be at least 1, got {self.expand}")
        for option in self.crops:
            if option not in ("none", "random") and not (
                isinstance(option, (int, float)) and 0 <= option <= 1
            ):
                raise ValueError(
                    f'FEWSHOT.AUGMENT.CROPS must be "none", "random" or IoUs in [0, 1], got {option!r}'
                )

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "AugmentationRule":
        """Read the keys."""
        node = cfg.FEWSHOT.AUGMENT
        return cls(
            photometric=node.PHOTOMETRIC,
            expand=node.EXPAND,
            crops=tuple(node.CROPS),
            fill=tuple(cfg.MODEL.PIXEL_MEAN),
            image_format=cfg.INPUT.FORMAT,
        )

    @property
    def moves_pixels(self) -> bool:
        """Whether boxes move."""
        return self.expand > 1 or bool(self.crops)

    def augmentations(self, rng: np.random.Generator) -> list[T.Augmentation]:
        """The steps in their order, to be applied once to an ``AugInput`` with boxes."""
        steps: list[T.Augmentation] = []
        if self.photometric:
            steps.append(RandomColors(rng, image_format=self.image_format))
        if self.expand > 1:
            steps.append(RandomExpand(rng, largest=self.expand, fill=self.fill))
        if self.crops:
            steps.append(RandomCropByIoU(rng, options=self.crops))
        return steps


NOTHING = AugmentationRule()


class RandomColors(T.Augmentation):
    """Brightness, contrast, saturation, hue and the order of the channels, each with probability 0.5."""

    def __init__(self, rng: np.random.Generator, *, image_format: str):
        """Take the channel order, "BGR" or "RGB"."""
        super().__init__()
        self.rng = rng
        from_rgb = image_format == "RGB"
        self.to_hsv = cv2.COLOR_RGB2HSV if from_rgb else cv2.COLOR_BGR2HSV
        self.to_colors = cv2.COLOR_HSV2RGB if from_rgb else cv2.COLOR_HSV2BGR

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """A transform that leaves coordinates as they are."""
        brightness = self._drawn(-_BRIGHTNESS, _BRIGHTNESS, otherwise=0.0)
        contrast = self._drawn(*_FACTORS, otherwise=1.0)
        saturation = self._drawn(*_FACTORS, otherwise=1.0)
        hue = self._drawn(-_HUE, _HUE, otherwise=0.0)
        is_contrast_first = self.rng.random() < _PROBABILITY
        is_shuffled = self.rng.random() < _PROBABILITY
        order = self.rng.permutation(3) if is_shuffled else np.arange(3)

        def changed(pixels: np.ndarray) -> np.ndarray:
            values = pixels.astype(np.float32) + brightness
            if is_contrast_first:
                values *= contrast
            values = self._with_hue(values, saturation, hue)
            if not is_contrast_first:
                values *= contrast
            return values.round().clip(0, 255).astype(np.uint8)[:, :, order]

        return T.ColorTransform(changed)

    def _drawn(self, low: float, high: float, *, otherwise: float) -> float:
        value = self.rng.uniform(low, high)
        return value if self.rng.random() < _PROBABILITY else otherwise

    def _with_hue(self, values: np.ndarray, saturation: float, hue: float) -> np.ndarray:
        if saturation == 1 and hue == 0:
            return values
        # Outside of 0..255 OpenCV's saturation is not what it is called.
        hsv = cv2.cvtColor(values.clip(0, 255) / 255, self.to_hsv)
        hsv[:, :, 0] = (hsv[:, :, 0] + hue) % 360
        hsv[:, :, 1] = (hsv[:, :, 1] * saturation).clip(0, 1)
        return cv2.cvtColor(hsv, self.to_colors) * 255


class FilledPadTransform(T.PadTransform):
    """Padding with a colour."""

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Pad an image (H, W, 3); ``pad_value`` has three channels."""
        height, width = image.shape[:2]
        shape = height + self.y0 + self.y1, width + self.x0 + self.x1, 3
        canvas = np.broadcast_to(np.round(self.pad_value).astype(image.dtype), shape).copy()
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = image
        return canvas


class RandomExpand(T.Augmentation):
    """With probability 0.5 put the image somewhere on a larger canvas of its own shape: small objects."""

    def __init__(self, rng: np.random.Generator, *, largest: float, fill: Sequence[float]):
        """Take the largest ratio of sides and the colour of the canvas."""
        super().__init__()
        self.rng, self.largest, self.fill = rng, largest, np.asarray(fill)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Padding on all sides, or nothing."""
        ratio = self.rng.uniform(1, self.largest)
        if self.rng.random() >= _PROBABILITY:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        free = [int(side * ratio) - side for side in (width, height)]
        left, top = (int(self.rng.integers(margin + 1)) for margin in free)
        return FilledPadTransform(
            left, top, free[0] - left, free[1] - top, width, height, self.fill
        )


class RandomCropByIoU(T.Augmentation):
    """Crop so that some box has at least the IoU of a random option with the crop, and some centre is inside.

    An option that no attempt fulfils is given up for another draw; "none" is always possible in the end.
    """

    def __init__(self, rng: np.random.Generator, *, options: Sequence[str | float]):
        """Take the options; see ``CROP_OPTIONS``."""
        super().__init__()
        self.rng, self.options = rng, tuple(options)

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """A crop in whole pixels, or nothing."""
        height, width = image.shape[:2]
        for number in self.rng.permutation(len(self.options)):
            option = self.options[number]
            if option == "none" or not len(boxes):
                break
            least = 0.0 if option == "random" else float(option)
            for _ in range(_ATTEMPTS):
                crop = self._drawn(height, width)
                if is_valid_crop(crop, boxes, least):
                    x0, y0, x1, y1 = crop.tolist()
                    return T.CropTransform(x0, y0, x1 - x0, y1 - y0, width, height)
        return T.NoOpTransform()

    def _drawn(self, height: int, width: int) -> np.ndarray:
        """XYXY; scale and aspect are relative to the image, and the aspect is such that the crop fits."""
        scale = self.rng.uniform(*_SCALES)
        low, high = max(_ASPECTS[0], scale**2), min(_ASPECTS[1], scale**-2)
        root = self.rng.uniform(low, high) ** 0.5
        w = min(max(int(scale * root * width), 1), width)
        h = min(max(int(scale / root * height), 1), height)
        x, y = (int(self.rng.integers(margin + 1)) for margin in (width - w, height - h))
        return np.array([x, y, x + w, y + h])


def is_valid_crop(crop: np.ndarray, boxes: np.ndarray, least_iou: float) -> bool:
    """Whether one box at least has its centre in the crop, and one at least the IoU with it.

    Args:
        crop (ndarray[4]), boxes (ndarray[N, 4]): XYXY.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    if not ((centres > crop[:2]) & (centres < crop[2:])).all(axis=1).any():
        return False
    sides = np.minimum(boxes[:, 2:], crop[2:]) - np.maximum(boxes[:, :2], crop[:2])
    common = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (crop[2:] - crop[:2]).prod()
    return bool((common / (areas - common) >= least_iou).any())


def centres_inside(
    boxes: np.ndarray, transform: T.Transform, image_size: tuple[int, int]
) -> np.ndarray:
    """bool[N]: which boxes (XYXY, before ``transform``) have their centres in the image (height, width) after it."""
    centres = np.asarray(boxes, dtype=np.float64).reshape(-1, 2, 2).mean(axis=1)
    places = transform.apply_coords(centres.copy())
    return ((places >= 0) & (places < image_size[::-1])).all(axis=1)
