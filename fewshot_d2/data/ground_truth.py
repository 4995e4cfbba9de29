"""Which annotations count as ground truth: filters that a benchmark may have (SILCO spec A7)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from .coco_json import DatasetDict


@dataclass(frozen=True)
class GroundTruthFilter:
    """Removes annotations, so that neither training nor evaluation knows of them.

    Attributes:
        keep_difficult (bool): whether objects that VOC calls difficult stay.
        min_area (float): least share of its image's area that a box has, in [0, 1).
        max_boxes (int): an image with this many boxes of a class, or more, has none of that class; 0 = any number.
    """

    keep_difficult: bool = True
    min_area: float = 0.0
    max_boxes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < 1 or self.max_boxes < 0:
            raise ValueError(
                "FEWSHOT.GROUND_TRUTH must have a MIN_AREA in [0, 1) and MAX_BOXES of at least 0, got "
                f"{self.min_area} and {self.max_boxes}"
            )

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "GroundTruthFilter":
        """Read the keys."""
        node = cfg.FEWSHOT.GROUND_TRUTH
        return cls(node.KEEP_DIFFICULT, node.MIN_AREA, node.MAX_BOXES)

    def __str__(self) -> str:
        """What is removed, as plans record it; "all" where nothing is."""
        rules = [] if self.keep_difficult else ["not difficult"]
        rules += [f"area at least {self.min_area:g}"] if self.min_area else []
        rules += [f"below {self.max_boxes} boxes"] if self.max_boxes else []
        return ", ".join(rules) or "all"

    def __call__(self, dicts: Iterable[DatasetDict]) -> list[DatasetDict]:
        """The dataset dicts with what is left; images without any annotation stay. The originals are not changed.

        Boxes are counted after the small and the difficult ones are gone; crowds are neither counted nor removed.
        """
        if self == KEEP_ALL:
            return list(dicts)
        return [{**record, "annotations": self._kept(record)} for record in dicts]

    def _kept(self, record: DatasetDict) -> list[dict]:
        area = self.min_area * record["height"] * record["width"]
        kept = [
            a
            for a in record.get("annotations", ())
            if (self.keep_difficult or not a.get("difficult", 0))
            and (a.get("iscrowd", 0) or _box_area(a) >= area)
        ]
        if not self.max_boxes:
            return kept
        counts = Counter(a["category_id"] for a in kept if not a.get("iscrowd", 0))
        return [a for a in kept if counts[a["category_id"]] < self.max_boxes]


KEEP_ALL = GroundTruthFilter()


def _box_area(annotation: dict) -> float:
    """Pixels."""
    width, height = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)[
        2:
    ]
    return width * height
