"""The picture of boxes, grids and scores."""

import numpy as np
import pytest

from fewshot_d2.visualization.alignment import alignment_panel, grid_lines


def panel(boxes, corners, **options):
    image = np.full((400, 500, 3), 90, dtype=np.uint8)
    before = image.copy()
    score_map = np.array([[0.1, 0.2], [0.3, 0.9]])
    scores = np.linspace(1, 0, len(boxes))
    picture = alignment_panel(image, boxes, corners, scores, score_map, **options)
    assert np.array_equal(image, before)
    return picture


def count(picture, color):
    return int((picture == np.array(color)).all(axis=2).sum())


def test_boxes_grids_and_scores_are_drawn():
    box, quad = (
        np.array([[100, 100, 300, 250]]),
        np.array([[120, 120, 280, 110, 130, 240, 290, 230]]),
    )
    empty = panel(box[:0], quad[:0])
    drawn = panel(box, quad)
    assert drawn.dtype == np.uint8 and drawn.shape == empty.shape and drawn.shape[1] > 1000
    for color in ((240, 228, 66), (213, 94, 0)):
        assert count(empty, color) == 0 < count(drawn, color)
    assert count(panel(box, quad, lines=12), (213, 94, 0)) > count(drawn, (213, 94, 0))
    # The best cell is white, the worst black.
    right = drawn[:, drawn.shape[1] // 2 + 10 :]
    assert count(right[:150, :200], (0, 0, 0)) > 10000
    assert count(right[-150:, -200:], (255, 255, 255)) > 10000


def test_lines_go_through_the_corners_and_the_middle():
    quad = np.array([[0, 0], [10, 2], [1, 8], [11, 10]], dtype=float)
    lines = grid_lines(quad, 3)
    assert lines.shape == (6, 2, 2)
    assert lines[0].tolist() == [[0, 0], [10, 2]] and lines[5].tolist() == [[10, 2], [11, 10]]
    assert lines[1].tolist() == [[0.5, 4], [10.5, 6]] and lines[4].tolist() == [[5, 1], [6, 9]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2 lines"):
        panel(np.zeros((0, 4)), np.zeros((0, 8)), lines=1)
    with pytest.raises(ValueError, match="score map"):
        alignment_panel(
            np.zeros((9, 9, 3), np.uint8), np.zeros((0, 4)), np.zeros((0, 8)), [], np.zeros((0, 2))
        )
