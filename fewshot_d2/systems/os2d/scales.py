"""Sizes of class images and of the levels of the image pyramid (OS2D spec 1.1 and 1.15).

Sizes are (height, width) in pixels, whole numbers from above rounded down, at least 1. Backbones that need whole cells
get the nearest multiple of theirs: a slight stretch, where padding would be part of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Scales:
    """Sizes by key.

    Attributes:
        class_size: square root of the area of class images.
        image_size: longer side of a query on the level 1; 0 = as it is given.
        by_exemplars: instead, objects as large as the exemplars become as large as class images; the longer side has
            at most max_image_size pixels then.
        pyramid: levels, relative to the level 1. divisibility: of all sides; 0 = any.

    Raises:
        ValueError: a value that gives no image.
    """

    class_size: int
    image_size: int
    by_exemplars: bool
    max_image_size: int
    pyramid: tuple[float, ...]
    divisibility: int

    def __post_init__(self) -> None:
        if not self.pyramid or min(self.pyramid) <= 0:
            raise ValueError(f"MODEL.OS2D.PYRAMID must be positive numbers, got {self.pyramid}")
        for name in ("class_size", "max_image_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"MODEL.OS2D.{name.upper()} must be at least 1, got {getattr(self, name)}"
                )

    def class_image(self, size: Size, step: int = 0) -> Size:
        """Of a class image: its own shape, the area class_size squared.

        Args:
            step: if not 0, sides are the nearest multiples of it or of ``divisibility``, whichever is larger.
        """
        height, width = size
        root = (height / width) ** 0.5
        return self._whole(self.class_size * root, self.class_size / root, step)

    def levels(self, given: Size, original: Size, exemplars: Sequence[float]) -> list[Size]:
        """Of a query on each level.

        Args:
            given: size of the image that is there. original: that of the user's image.
            exemplars: square roots of the exemplars' areas, in pixels of their own images.
        """
        longer = max(given)
        first = self.image_size or longer
        if self.by_exemplars and len(exemplars):
            median = sorted(exemplars)[(len(exemplars) - 1) // 2]
            first = min(max(original) * self.class_size / median, self.max_image_size)
        ratios = [level * first / longer for level in self.pyramid]
        return [self._whole(given[0] * ratio, given[1] * ratio) for ratio in ratios]

    def _whole(self, height: float, width: float, step: int = 0) -> Size:
        unit = max(self.divisibility, step)
        if unit > 1:
            return tuple(max(unit, round(side / unit) * unit) for side in (height, width))
        return max(int(height), 1), max(int(width), 1)
