"""Pictures of how a detector searched a query, of what its ``explain`` gives (SILCO Figs. 3 and 4, OS2D Fig. 2)."""

import numpy as np
import torch
from detectron2.structures import Instances

from ..modeling.detector import FewShotDetector
from ..visualization import alignment_panel
from ..visualization.attention import attention_panel, heat_panel
from .episode_runner import Found

_DOTS, _JOINT_DOTS = 20, 100


@torch.no_grad()
def explanation_panels(
    model: FewShotDetector, found: Found, pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """Pictures by the end of their file names; none of a model that explains nothing.

    Args:
        found: of an episode, whose first class is shown. pixels (ndarray[H, W, 3]): the query, RGB.
    """
    maps = dict(model.explain(found.query, found.features))
    attention = maps.pop("attention", None)
    is_shown = found.truth.gt_ids == found.support_set.class_ids[0]
    truth = found.truth.gt_boxes[is_shown].tensor.numpy()
    panels = {}
    if attention is not None and len(truth):
        point = truth[0, :2] / 2 + truth[0, 2:] / 2
        rows, columns = attention.shape[:2]
        row = min(int(point[1] / pixels.shape[0] * rows), rows - 1)
        column = min(int(point[0] / pixels.shape[1] * columns), columns - 1)
        of_cell = attention[row, column].float().cpu().numpy()
        supports = [s.image.permute(1, 2, 0).numpy() for s in found.support_set.positives()[0]]
        # A support whose whole attention is 1 was looked at by itself.
        is_joint = len(of_cell) > 1 and of_cell.sum() < 1.5
        number = _JOINT_DOTS if is_joint else _DOTS
        panels["_attention"] = attention_panel(
            pixels, supports, of_cell, tuple(point), number=number, is_joint=is_joint
        )
    if maps:
        heats = {name: heat.float().cpu().numpy() for name, heat in maps.items()}
        best = _best(found.predictions, max(len(truth), 1))
        boxes = best.pred_boxes.tensor.numpy()
        panels["_heat"] = heat_panel(pixels, heats, truth=truth, found=boxes)
        if best.has("pred_corners"):
            corners, scores = best.pred_corners.numpy(), best.scores.numpy()
            score_map = max(heats.values(), key=np.max)
            panels["_alignment"] = alignment_panel(pixels, boxes, corners, scores, score_map)
    return panels


def _best(predictions: Instances, number: int) -> Instances:
    """So many of the first class with the best scores."""
    of_class = predictions[predictions.pred_classes == 0]
    return of_class[of_class.scores.argsort(descending=True)[:number]]
