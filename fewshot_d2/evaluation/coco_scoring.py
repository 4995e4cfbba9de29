"""COCO average precision over the (image, class) pairs that a plan searches.

Only those pairs exist here: ground truth and detections of any other pair are left out before
pycocotools sees them. In the present protocol the pairs are the classes of each image, in the open
protocol every image with every class.
"""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_json import dataset_categories
from ..data.plans import EvaluationPlan

TASKS = ("bbox", "segm")
# Order of COCOeval.stats.
_METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip

# A row of a COCO results file: image_id, category_id, bbox (XYWH, pixels), score, segmentation
# (RLE).
Detection = dict[str, Any]
Pair = tuple[int, int]


@dataclass
class GroundTruthInstance:
    """One annotation of a dataset dict.

    Attributes:
        box: XYWH, absolute pixels of the image.
        annotated_area: pixels, None where the json gives none.
        segmentation: COCO polygons or RLE, None where there is none.
        image_size: (height, width).
        is_difficult: need not be found, for VOC's average precision alone.
    """

    annotation_id: int
    image_id: int
    class_id: int
    box: tuple[float, float, float, float]
    is_crowd: bool
    annotated_area: float | None
    segmentation: list | dict | None
    image_size: tuple[int, int]
    is_difficult: bool = False

    @cached_property
    def rle(self) -> dict[str, Any] | None:
        """Compressed RLE of the mask; None where the annotation has no outline."""
        if not self.segmentation:
            return None
        if isinstance(self.segmentation, list):
            return mask_api.merge(mask_api.frPyObjects(self.segmentation, *self.image_size))
        if isinstance(self.segmentation["counts"], list):
            return mask_api.frPyObjects(self.segmentation, *self.image_size)
        return self.segmentation

    @property
    def area(self) -> float:
        """Pixels, as annotated (in COCO: of the mask), else those of the mask, else of the box."""
        if self.annotated_area is not None:
            return self.annotated_area
        return self.box[2] * self.box[3] if self.rle is None else float(mask_api.area(self.rle))


class GroundTruth:
    """Annotations of a data set by (image, class); class ids are those of the data set.

    Attributes:
        class_names: {class id: name}.
        images: {image id: dataset dict}.
        annotations: {annotation id: instance}.
    """

    def __init__(self, dicts: Iterable[dict[str, Any]], class_names: Mapping[int, str]):
        """Sort the annotations of detectron2's dataset dicts.

        Args:
            dicts: read once, not changed.
            class_names: {dataset category id: name} in the order of the contiguous ids.
        """
        self.class_names = dict(class_names)
        self.images: dict[int, dict[str, Any]] = {}
        self.annotations: dict[int, GroundTruthInstance] = {}
        self._by_pair: dict[Pair, list[GroundTruthInstance]] = defaultdict(list)
        self._num_instances: dict[int, int] = defaultdict(int)
        class_ids = list(self.class_names)
        for record in dicts:
            image_id = record["image_id"]
            self.images[image_id] = record
            for row in record.get("annotations", ()):
                instance = GroundTruthInstance(
                    annotation_id=row["id"],
                    image_id=image_id,
                    class_id=class_ids[row["category_id"]],
                    box=BoxMode.convert(tuple(row["bbox"]), row["bbox_mode"], BoxMode.XYWH_ABS),
                    is_crowd=bool(row.get("iscrowd", 0)),
                    annotated_area=row.get("area"),
                    segmentation=row.get("segmentation"),
                    image_size=(record["height"], record["width"]),
                    is_difficult=bool(row.get("difficult", 0)),
                )
                self.annotations[instance.annotation_id] = instance
                self._by_pair[image_id, instance.class_id].append(instance)
                # Counted for all classes, also those that a plan does not search: clutter is what
                # the eye sees.
                self._num_instances[image_id] += not instance.is_crowd

    @classmethod
    def of_dataset(cls, name: str) -> "GroundTruth":
        """Read a registered data set; a generated one is written first."""
        return cls(DatasetCatalog.get(name), dataset_categories(name))

    def instances(self, image_id: int, class_id: int) -> Sequence[GroundTruthInstance]:
        """Annotations of a class in an image, crowds included."""
        return self._by_pair.get((image_id, class_id), ())

    def is_present(self, image_id: int, class_id: int) -> bool | None:
        """Whether the class is in the image; None where only a crowd of it is."""
        instances = self.instances(image_id, class_id)
        if instances and all(i.is_crowd for i in instances):
            return None
        return bool(instances)

    def num_instances(self, image_id: int) -> int:
        """Annotations of *all* classes in an image, without crowds."""
        return self._num_instances.get(image_id, 0)


def planned_pairs(plan: EvaluationPlan) -> set[Pair]:
    """The (image id, class id) pairs that a plan searches.

    Raises:
        ValueError: the plan is empty, or searches a pair twice, which results could not tell apart.
    """
    pairs: set[Pair] = set()
    for episode in plan.episodes:
        for class_id in episode.class_ids:
            if (episode.image_id, class_id) in pairs:
                raise ValueError(
                    f"image {episode.image_id} must be searched for class {class_id} once, "
                    f"got it again in episode {episode.id}"
                )
            pairs.add((episode.image_id, class_id))
    if not pairs:
        raise ValueError(
            f"evaluation plan of {plan.dataset} ({plan.side}) must have an episode, got none"
        )
    return pairs


@dataclass(frozen=True)
class TaskScores:
    """Average precision of boxes or masks.

    Attributes:
        metrics: AP, AP50, ..., ARl in percent; NaN where no ground truth allows one.
        class_ids: the K classes that have ground truth, ascending.
        ap, ap50 (ndarray[K]): percent, of each of them.
        precision50 (ndarray[K, 101]): in [0, 1], at IoU 0.5 and the recalls 0, 0.01, ..., 1.
    """

    task: str
    metrics: dict[str, float]
    class_ids: tuple[int, ...]
    ap: np.ndarray
    ap50: np.ndarray
    precision50: np.ndarray


def score_detections(
    ground_truth: GroundTruth,
    detections: Iterable[Detection],
    plan: EvaluationPlan,
    task: str,
) -> TaskScores:
    """Run COCOeval with its default parameters on the plan's pairs.

    Args:
        ground_truth: of the plan's data set.
        detections: COCO result rows; those of pairs that the plan does not search are not counted.
        plan: what is searched. A pair without any detection counts as searched and missed.
        task: "bbox" or "segm".
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    pairs = planned_pairs(plan)
    instances = scorable((i for pair in sorted(pairs) for i in ground_truth.instances(*pair)), task)
    # A class without anything to be found has no average precision; it is left out of the means.
    class_ids = tuple(sorted({i.class_id for i in instances if not i.is_crowd}))
    if not class_ids:
        nothing = np.zeros(0)
        return TaskScores(
            task, dict.fromkeys(_METRICS, math.nan), (), nothing, nothing, np.zeros((0, 101))
        )
    records = (ground_truth.images[i] for i in sorted({image_id for image_id, _ in pairs}))
    images = [{"id": r["image_id"], "height": r["height"], "width": r["width"]} for r in records]
    kept = [d for d in detections if (d["image_id"], d["category_id"]) in pairs]
    # pycocotools prints its progress. Without parameters set, it takes all images and classes that
    # it is given.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _as_coco(images, class_ids, _ground_truth_rows(instances, task)),
            _as_coco(images, class_ids, _detection_rows(kept, task)),
            task,
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (IoU, recall, class, area range, max detections): all areas, 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return TaskScores(
        task=task,
        metrics={
            name: 100 * float(value) if value >= 0 else math.nan
            for name, value in zip(_METRICS, evaluation.stats, strict=True)
        },
        class_ids=class_ids,
        ap=100 * precision.mean(axis=(0, 1)),
        ap50=100 * precision[0].mean(axis=0),
        precision50=precision[0].T,
    )


def scorable(instances: Iterable[GroundTruthInstance], task: str) -> list[GroundTruthInstance]:
    """The annotations that a task can score: masks need an outline."""
    return [i for i in instances if task == "bbox" or i.rle is not None]


def has_masks(detections: Collection[Detection]) -> bool:
    """Whether detections carry masks; none at all could have carried them.

    Raises:
        ValueError: some do and some do not.
    """
    without = [d for d in detections if "segmentation" not in d]
    if without and len(without) < len(detections):
        raise ValueError(
            f"either all detections or none must have a mask, got {len(without)} of "
            f"{len(detections)} without, the first in image {without[0]['image_id']}"
        )
    return not without


def _as_coco(images: list[dict], class_ids: Iterable[int], annotations: list[dict]) -> COCO:
    # Not by COCO.loadRes: it fails on an empty list and takes the size of a mask from its box.
    coco = COCO()
    coco.dataset = {
        "images": images,
        "categories": [{"id": i, "name": str(i)} for i in class_ids],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _ground_truth_rows(instances: Iterable[GroundTruthInstance], task: str) -> list[dict]:
    rows = []
    # Ids start at 1: COCOeval takes a match with annotation 0 for no match.
    for number, instance in enumerate(instances, start=1):
        row = {
            "id": number,
            "image_id": instance.image_id,
            "category_id": instance.class_id,
            "bbox": list(instance.box),
            "area": instance.area,
            "iscrowd": int(instance.is_crowd),
        }
        if task == "segm":
            row["segmentation"] = instance.rle
        rows.append(row)
    return rows


def _detection_rows(detections: Iterable[Detection], task: str) -> list[dict]:
    rows = []
    for number, detection in enumerate(detections, start=1):
        row = {key: detection[key] for key in ("image_id", "category_id", "score")}
        row["id"] = number
        if task == "segm":
            # Sizes small, medium and large are those of the mask, not of its box.
            row["segmentation"] = detection["segmentation"]
            row["area"] = float(mask_api.area(detection["segmentation"]))
        else:
            row["bbox"] = list(detection["bbox"])
            row["area"] = row["bbox"][2] * row["bbox"][3]
        rows.append(row)
    return rows
