"""Pictures for the report: the best, the median and the worst (query, class) pairs of a run, drawn."""

import io
import logging
from collections.abc import Mapping, Sequence
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
    """The best, median and worst pairs by F1 at a score threshold.

    Pairs without instances and without a detection above the threshold are passed over. No image
    comes twice; other classes are preferred within a group. Of equal F1, the best are those with
    more instances and the worst those with more errors.
    """
    shown = {p: a for p, a in assignments.items() if a.num_instances or a.counts(threshold)[1]}
    errors = {p: sum(a.counts(threshold)[1:]) for p, a in shown.items()}
    f1 = {p: a.f1(threshold) for p, a in shown.items()}
    ranked = sorted(shown, key=lambda p: (-f1[p], errors[p], -shown[p].num_instances, p))
    middle = len(ranked) // 2
    from_middle = sorted(ranked, key=lambda p: abs(ranked.index(p) - middle)) if ranked else []
    groups: dict[str, list[Pair]] = {}
    used: set[int] = set()
    for name, order in zip(GROUPS, (ranked, from_middle, ranked[::-1]), strict=True):
        groups[name] = _take(order, number, used)
    return groups


def _take(order: Sequence[Pair], number: int, used_images: set[int]) -> list[Pair]:
    """The first pairs of unused images, in a first round one a class; adds their images to ``used_images``."""
    taken: list[Pair] = []
    for new_classes_only in (True, False):
        for pair in order:
            if len(taken) == number:
                break
            if pair[0] in used_images or (
                new_classes_only and pair[1] in {class_id for _, class_id in taken}
            ):
                continue
            taken.append(pair)
            used_images.add(pair[0])
    return sorted(taken, key=order.index)


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
    """Draw (query, class) pairs with the supports of the plan; unreadable images are logged and left out."""
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
    """Draw one pair; crowds and the detections inside them are neither right nor wrong and not drawn."""
    size = query.shape[:2]
    visible = ~assignment.ignored
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
