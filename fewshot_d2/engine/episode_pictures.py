"""Pictures of how a detector searched a query, of what its ``explain`` gives (SILCO Figs. 3 and 4, OS2D Fig. 2)."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import inference_context
from detectron2.structures import Instances

from ..data.dataset_mapper import read_image
from ..data.episodes import Episode, EpisodeFactory, PlannedEpisodes
from ..data.plans import EvaluationPlan, PlannedEpisode
from ..modeling.detector import FewShotDetector
from ..visualization import alignment_panel
from ..visualization.attention import attention_panel, heat_panel
from .episode_runner import Found, truth_of

logger = logging.getLogger(__name__)

_DOTS, _JOINT_DOTS = 20, 100


class PairExplainer:
    """Searches a query of a plan once more, for one of its classes alone, to show how."""

    def __init__(
        self,
        model: FewShotDetector,
        plan: EvaluationPlan,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
    ):
        """Take a plan that was checked against the factory's indices, and a mapper of inference."""
        self.model, self.episodes = model, PlannedEpisodes(plan, factory, mapper)

    @torch.no_grad()
    def __call__(self, image_id: int, class_id: int) -> dict[str, np.ndarray]:
        """Panels of ``explanation_panels``; none, and a warning, where the query or a support cannot be read."""
        planned = self._planned(image_id, class_id)
        index = self.episodes.factory.query_index
        try:
            mapped = self.episodes.mapper(self.episodes.episode(planned))
            pixels = read_image(index.dicts[index.image_index(image_id)], "RGB")
        except ValueError as error:
            logger.warning("Not explained: image %d, class %d: %s", image_id, class_id, error)
            return {}
        truth = truth_of(index, image_id, [class_id])
        with inference_context(self.model):
            features = self.model.encode_support([mapped["support"]])
            query = self.model.describe_queries([mapped])[0]
            predictions = self.model.search(query, features).to("cpu")
            found = Found(planned, image_id, mapped["support"], truth, predictions, query, features)
            return explanation_panels(self.model, found, pixels)

    def _planned(self, image_id: int, class_id: int) -> PlannedEpisode:
        """The episode of the pair, with this class alone."""
        episode = next(
            e
            for e in self.episodes.plan.episodes
            if e.image_id == image_id and class_id in e.class_ids
        )
        shots = episode.supports[episode.class_ids.index(class_id)]
        return replace(episode, class_ids=(class_id,), supports=(shots,))


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
