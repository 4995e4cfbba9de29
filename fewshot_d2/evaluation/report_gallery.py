"""Pictures for the report: the best, median and worst (query, class) pairs of a run, and how they were searched."""

import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_api

from ..data.dataset_mapper import read_image
from ..data.plans import EvaluationPlan
from ..structures import Support, SupportSet
from ..visualization import episode_panel
from .assignment import Assignment, by_pair
from .coco_scoring import Detection, GroundTruth, GroundTruthInstance, Pair

logger = logging.getLogger(__name__)

GROUPS = ("best", "median", "worst")


@dataclass(frozen=True)
class GalleryPicture:
    """One panel as JPEG, with what a caption needs."""

    jpeg: bytes
    caption: str


def choose_pairs(
    assignments: Mapping[Pair, Assignment], threshold: float, number: int
) -> dict[str, list[Pair]]:
    """The best, median and worst pairs by F1 at a score threshold; no image comes twice.

    Pairs without instances and without a detection above the threshold are passed over. Of equal
    F1, classes take turns, the best are those with more instances and the worst those with more
    errors.
    """
    shown = {p: a for p, a in assignments.items() if a.num_instances or a.counts(threshold)[1]}
    f1 = {p: a.f1(threshold) for p, a in shown.items()}
    errors = {p: sum(a.counts(threshold)[1:]) for p, a in shown.items()}
    best = _ranking({p: (-f1[p], -a.num_instances) for p, a in shown.items()})
    worst = _ranking({p: (f1[p], -errors[p]) for p in shown})
    middle = len(best) // 2
    median = [best[i] for i in sorted(range(len(best)), key=lambda i: abs(i - middle))]
    groups: dict[str, list[Pair]] = {}
    used: set[int] = set()
    for name, order in zip(GROUPS, (best, median, worst), strict=True):
        groups[name] = []
        for pair in order:
            if len(groups[name]) < number and pair[0] not in used:
                groups[name].append(pair)
                used.add(pair[0])
    return groups


def _ranking(keys: Mapping[Pair, tuple[float, float]]) -> list[Pair]:
    """Pairs by their keys, but classes take turns among pairs whose first key is equal."""
    ordered = sorted(keys, key=lambda pair: (keys[pair], pair))
    turns: Counter[tuple[float, int]] = Counter()
    turn = {}
    for pair in ordered:
        kind = (keys[pair][0], pair[1])
        turn[pair] = turns[kind]
        turns[kind] += 1
    return sorted(ordered, key=lambda pair: (keys[pair][0], turn[pair]))


def draw_pairs(
    pairs: Sequence[Pair],
    plan: EvaluationPlan,
    ground_truth: GroundTruth,
    support_truth: GroundTruth,
    detections: Sequence[Detection],
    assignments: Mapping[Pair, Assignment],
    *,
    threshold: float,
) -> list[GalleryPicture]:
    """Draw pairs with the supports of the plan; unreadable images are logged and left out."""
    groups = by_pair(detections)
    supports = {
        (episode.image_id, class_id): annotation_ids
        for episode in plan.episodes
        for class_id, annotation_ids in zip(episode.class_ids, episode.supports, strict=True)
    }
    pictures = []
    for pair in pairs:
        image_id, class_id = pair
        assignment = assignments[pair]
        ranked = [groups[pair][i] for i in assignment.order]
        try:
            query = read_image(ground_truth.images[image_id], "RGB")
            support = _support_set(support_truth, class_id, supports[pair])
        except ValueError as error:
            logger.warning("No picture of image %d, class %d: %s", image_id, class_id, error)
            continue
        panel = _panel(query, support, ground_truth.instances(*pair), ranked, assignment, threshold)
        f1 = assignment.f1(threshold)
        caption = f"{support.class_names[0]}, image {image_id}, F1 {f1:.2f}"
        pictures.append(GalleryPicture(_jpeg(panel), caption))
    return pictures


def explain_pair(
    explain: Callable[[int, int], Mapping[str, np.ndarray]], pair: Pair, ground_truth: GroundTruth
) -> list[GalleryPicture]:
    """Draw how a pair was searched."""
    image_id, class_id = pair
    where = f"{ground_truth.class_names[class_id]}, image {image_id}"
    return [
        GalleryPicture(_jpeg(panel), f"{where}: {name.strip('_')}")
        for name, panel in explain(image_id, class_id).items()
    ]


def _support_set(truth: GroundTruth, class_id: int, annotation_ids: Sequence[int]) -> SupportSet:
    examples = []
    for annotation_id in annotation_ids:
        instance = truth.annotations[annotation_id]
        pixels = read_image(truth.images[instance.image_id], "RGB")
        box = torch.tensor(BoxMode.convert(instance.box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        examples.append(Support(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), box))
    return SupportSet([class_id], [truth.class_names[class_id]], [examples])


def _panel(
    query: np.ndarray,
    support: SupportSet,
    instances: Sequence[GroundTruthInstance],
    ranked: Sequence[Detection],
    assignment: Assignment,
    threshold: float,
) -> np.ndarray:
    """Draw one pair; crowds, and detections that lie in one, are left out."""
    size = query.shape[:2]
    visible = ~assignment.ignored
    # An instance counts as found only by a detection that is drawn.
    hit = set(assignment.matched[assignment.hits & (assignment.scores >= threshold)].tolist())
    wanted = [i for i, instance in enumerate(instances) if not instance.is_crowd]
    truth = Instances(
        size,
        gt_boxes=_boxes([instances[i].box for i in wanted]),
        gt_classes=torch.zeros(len(wanted), dtype=torch.int64),
    )
    if any(instances[i].rle is not None for i in wanted):
        truth.gt_masks = BitMasks(_masks([instances[i].rle for i in wanted], size))
    drawn = [d for d, v in zip(ranked, visible, strict=True) if v]
    predictions = Instances(
        size,
        pred_boxes=_boxes([d["bbox"] for d in drawn]),
        pred_classes=torch.zeros(len(drawn), dtype=torch.int64),
        scores=torch.tensor([d["score"] for d in drawn], dtype=torch.float64),
    )
    if any("segmentation" in d for d in drawn):
        predictions.pred_masks = _masks([d.get("segmentation") for d in drawn], size)
    return episode_panel(
        query,
        support,
        ground_truth=truth,
        predictions=predictions,
        threshold=threshold,
        correct=assignment.hits[visible].tolist(),
        found=[i in hit for i in wanted],
    )


def _boxes(boxes: Sequence[Sequence[float]]) -> Boxes:
    """XYWH rows -> Boxes."""
    rows = torch.tensor([list(box) for box in boxes], dtype=torch.float32).reshape(-1, 4)
    return Boxes(BoxMode.convert(rows, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))


def _masks(rles: Sequence[dict | None], size: tuple[int, int]) -> torch.Tensor:
    """RLE -> bool (n, H, W); empty where there is none."""
    masks = np.zeros((len(rles), *size), dtype=bool)
    for mask, rle in zip(masks, rles, strict=True):
        if rle is not None:
            mask[:] = mask_api.decode(rle)
    return torch.from_numpy(masks)


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=84, optimize=True)
    return buffer.getvalue()
