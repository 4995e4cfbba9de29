"""Attention and heat maps as pictures: dots lie where the numbers say, whatever is drawn around them."""

import numpy as np
import pytest

from fewshot_d2.visualization.attention import attention_panel, heat_panel, top_cells

GREEN = np.array([60, 220, 60])


def is_green(panel):
    return (np.abs(panel.astype(int) - GREEN) < 12).all(axis=2)


def test_top_cells_are_the_largest_of_each_support_or_of_all():
    attention = np.zeros((2, 2, 4))
    attention[0, 1, 3], attention[0, 0, 0], attention[1, 0, 1], attention[1, 1, 2] = 9, 8, 2, 1
    assert top_cells(attention, 1) == [[(0.875, 0.75)], [(0.375, 0.25)]]
    assert top_cells(attention, 2)[1] == [(0.375, 0.25), (0.625, 0.75)]
    assert top_cells(attention, 3, is_joint=True) == [
        [(0.875, 0.75), (0.125, 0.25)],
        [(0.375, 0.25)],
    ]
    assert [len(c) for c in top_cells(attention, 100)] == [8, 8]


def test_dots_are_in_the_picture_of_their_support():
    """Three black pictures of one size; one dot of the query and one in the second support."""
    black = np.zeros((60, 60, 3), np.uint8)
    attention = np.full((2, 3, 3), 1e-9)
    attention[1, 0, 2] = 1.0
    panel = attention_panel(black, [black, black], attention, (15, 45), number=1, is_joint=True)
    rows, columns = np.nonzero(is_green(panel))
    side, gap = 320, 10
    bar = panel.shape[0] - side
    places = {(c // (side + gap)) for c in columns.tolist()}
    assert places == {0, 2}
    of_query = columns < side
    assert columns[of_query].mean() == pytest.approx(0.25 * side, abs=2)
    assert rows[of_query].mean() - bar == pytest.approx(0.75 * side, abs=2)
    assert columns[~of_query].mean() - 2 * (side + gap) == pytest.approx(5 / 6 * side, abs=2)
    assert rows[~of_query].mean() - bar == pytest.approx(1 / 6 * side, abs=2)


def test_supports_of_any_shape_are_drawn():
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 300), (300, 1), (40, 60)]
    supports = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    panel = attention_panel(supports[3], supports, rng.random((4, 5, 5)), (59.9, 39.9))
    assert panel.dtype == np.uint8 and panel.shape[2] == 3


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.zeros((3, 2, 2)), "one map .* for each of 2 supports"),
        (np.zeros((2, 2)), "one map"),
        (np.full((2, 2, 2), np.nan), "finite"),
    ],
)
def test_attention_that_does_not_fit(attention, message):
    black = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        attention_panel(black, [black, black], attention, (1, 1))


def test_heat_is_red_where_it_is_high_and_blue_where_it_is_low():
    gray = np.full((400, 400, 3), 128, np.uint8)
    heat = np.zeros((4, 4))
    heat[:, 2:] = 1
    panel = heat_panel(gray, {"all": heat})
    tile = panel[-400:, 410:].astype(int)
    low, high = tile[200, 40], tile[200, 360]
    assert low[2] > low[0] and high[0] > high[2]
    # Scaled from least to largest.
    assert (heat_panel(gray, {"all": 5 + heat / 100})[-400:, 410:] == tile).all()
    flat = heat_panel(gray, {"all": np.ones((4, 4))})[-400:, 410:]
    assert (flat == flat[0, 0]).all()


def test_boxes_are_on_the_query_and_not_on_the_heat():
    gray = np.full((400, 400, 3), 128, np.uint8)
    options = {"truth": np.array([[50, 60, 150, 160]]), "found": np.array([[200.0, 200, 300, 320]])}
    plain, drawn = heat_panel(gray, {"a": np.eye(3)}), heat_panel(gray, {"a": np.eye(3)}, **options)
    changed = (plain != drawn).any(axis=2)
    assert changed[:, :400].any() and not changed[:, 400:].any()
    rows, columns = np.nonzero(changed)
    assert (columns.min(), columns.max()) == pytest.approx((50, 300), abs=5)


@pytest.mark.parametrize("heat", [np.zeros(3), np.zeros((0, 3)), np.full((2, 2), np.inf)])
def test_what_is_no_map(heat):
    with pytest.raises(ValueError, match="'a' must be a map"):
        heat_panel(np.zeros((9, 9, 3), np.uint8), {"a": heat})
