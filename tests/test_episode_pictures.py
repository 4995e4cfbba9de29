"""Pictures of a search with OS2D: the grids are those of the first class's detections."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from factories import random_support_set

from fewshot_d2.engine.episode_pictures import explanation_panels
from fewshot_d2.engine.episode_runner import Found
from fewshot_d2.systems.os2d import geometry
from fewshot_d2.visualization import alignment_panel

PIXELS = np.full((480, 480, 3), 90, dtype=np.uint8)


class Explaining:
    """Has maps of scores on two levels; the second has the best."""

    maps = {"low": torch.tensor([[0.1, 0.2]]), "high": torch.eye(3)}

    def explain(self, query, features):
        return self.maps


def found_at(rng, number, truth_classes):
    """Detections of the identity at the places of a 30 x 30 map, the last half of another class."""
    identity = torch.tensor(geometry.IDENTITY["affine"]).view(1, 6, 1).repeat(1, 1, 900)
    places = torch.tensor([400, 430, 460, 490])[:number]
    predictions = Instances(
        (480, 480),
        pred_boxes=Boxes(geometry.anchors((30, 30), torch.device("cpu"))[places]),
        pred_corners=geometry.to_corners(identity, (30, 30))[0, places],
        scores=torch.tensor([0.3, 0.5, 0.9, 0.8])[:number],
        pred_classes=torch.tensor([0, 0, 1, 1])[:number],
    )
    support = random_support_set(rng, ways=2)
    ids = torch.tensor([support.class_ids[k] for k in truth_classes], dtype=torch.int64)
    truth = Instances((480, 480), gt_boxes=Boxes(torch.rand(len(ids), 4)), gt_ids=ids)
    return Found(None, 1, support, truth, predictions)


@pytest.mark.parametrize("truth_classes", [(0, 1, 1), (1,), ()])
def test_best_of_the_first_class_with_its_grid_and_the_best_level(rng, truth_classes):
    """The identity's grid is as large as the anchor, which is the box: corners of the grid are corners of the box."""
    found = found_at(rng, 4, truth_classes)
    panels = explanation_panels(Explaining(), found, PIXELS)
    assert list(panels) == ["_heat", "_alignment"]
    box = found.predictions.pred_boxes.tensor[[1]].numpy()
    x0, y0, x1, y1 = box[0]
    corners = np.array([[x0, y0, x1, y0, x0, y1, x1, y1]])
    wanted = alignment_panel(PIXELS, box, corners, np.array([0.5]), np.eye(3))
    assert np.array_equal(panels["_alignment"], wanted)


def test_nothing_found_is_a_picture_without_boxes(rng):
    panels = explanation_panels(Explaining(), found_at(rng, 0, (0,)), PIXELS)
    nothing = np.zeros((0, 4)), np.zeros((0, 8)), np.zeros(0)
    assert np.array_equal(panels["_alignment"], alignment_panel(PIXELS, *nothing, np.eye(3)))
