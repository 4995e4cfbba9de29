"""Pictures of how a detector searched a query, of what its ``explain`` gives (SILCO Figs. 3 and 4)."""

import numpy as np
import torch
from detectron2.structures import Instances

from ..modeling.detector import FewShotDetector
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
    truth = found.truth.gt_boxes.tensor.numpy()
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
        best = _best(found.predictions, len(truth))
        panels["_heat"] = heat_panel(pixels, heats, truth=truth, found=best)
    return panels


def _best(predictions: Instances, number: int) -> np.ndarray:
    """As many of the best-scored boxes as there are instances."""
    order = predictions.scores.argsort(descending=True)[:number]
    return predictions.pred_boxes.tensor[order].numpy()
