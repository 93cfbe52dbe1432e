"""Heat maps: described, drawn on paper, laid out in a film, and clicked without a browser."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from maskalign_lab.workbench import scrubber
from maskalign_lab.workbench.figure_layout import AXIS, layout
from maskalign_lab.workbench.heat_maps import HeatMap, draw_heat_map, some_labels
from maskalign_lab.workbench.plotly_figure import figure, film, update
from maskalign_lab.workbench.plots import Curve, Panels, Picture, TokenMap, colour_range, filmstrip
from maskalign_lab.workbench.scrubber import Control, Scrubber, Stage

VALUES = np.arange(15).reshape(3, 5) / 15
NAMES = dict(rows=["1", "2", "3"], columns=["0", "0.25", "0.5", "0.75", "1"], axes=("block", "t"))


def view(depth, time, token=None):
    heat = HeatMap("cosine", VALUES, "cosine", **NAMES, chosen=(depth, time))
    tokens = TokenMap(f"block {depth + 1}", np.full((4, 4), VALUES[depth, time]), "cosine")
    curve = Curve("over t", np.linspace(0, 1, 5), {"mean": VALUES[depth]}, "t", "cosine", time / 4)
    return Panels((heat, Picture("picture", np.zeros((8, 8, 3), np.uint8)), tokens), curve, token)


DEPTH = Control("depth", "block", range(3), NAMES["rows"])
TIME = Control("time", "t", range(5), NAMES["columns"], 2, "slider")


def strip():
    return filmstrip({"tokens": [view(0, time).panels[2] for time in range(5)]}, NAMES["columns"])


SCRUBBER = Scrubber(view, [TIME, DEPTH], strip, "token", ("depth", "time"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(quantity="cosin"), "Did you mean 'cosine'"),
        (dict(rows=["1"]), r"values of shape \(3, 5\) for 1 rows and 5 columns"),
        (dict(values=np.zeros(5)), r"values of shape \(5,\)"),
    ],
)
def test_a_wrong_heat_map_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        HeatMap(**dict(title="", values=VALUES, quantity="cosine", **NAMES) | wrong)


@given(st.integers(1, 60), st.integers(1, 12))
def test_labels_are_few_equally_far_apart_and_their_own(n, most):
    places, texts = some_labels([f"{k}" for k in range(n)], most)
    assert 1 <= len(places) <= most and places[0] == 0 and texts == [str(k) for k in places]
    assert len(set(np.diff(places))) <= 1


def test_maps_of_one_quantity_share_their_colours():
    heat = HeatMap("", 5 * VALUES, "loss", **NAMES)
    tokens = TokenMap("", np.ones((4, 4)), "loss")
    assert colour_range(tokens, [heat, tokens]) == colour_range(heat, [heat, tokens]) == (0, 5 * VALUES.max())


def test_paper_tells_only_what_is_sure():
    values = np.array([[0.5, -0.5], [0.1, np.nan]])
    panel = HeatMap("", values, "cosine", ["1", "2"], ["0", "1"], ("block", "t"))
    axis = Figure().subplots()
    draw_heat_map(axis, panel, (-1, 1), np.full((2, 2), 0.2))
    assert [text.get_text() for text in axis.texts] == [".50", "-.50", "·"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("t", "block")


def test_cells_have_axes_and_tokens_have_none():
    shown = figure(view(1, 2))
    found = layout(view(1, 2))
    assert found["xaxis1"]["range"] == [-0.5, 4.5] and found["yaxis1"]["range"] == [2.5, -0.5]
    assert found["yaxis1"]["ticktext"] == NAMES["rows"] and found["xaxis1"]["title"]["text"] == "t"
    assert found["xaxis3"]["visible"] is False and found["xaxis3"]["range"] == [-0.5, 3.5]
    bars = [shown.data[k].colorbar.y * found["height"] for k in (0, 6)]
    assert bars[1] - bars[0] == pytest.approx(AXIS)
    assert shown.data[1].x == (1.5, 2.5, 2.5, 1.5, 1.5) and shown.data[1].y == (0.5, 0.5, 1.5, 1.5, 0.5)
    assert shown.data[4].x == (None,)


def test_updating_equals_making_anew():
    shown = figure(view(0, 0))
    update(shown, view(2, 4, (1, 1)))
    anew = figure(view(2, 4, (1, 1)))
    assert shown.to_json() == anew.to_json()


def points(xs, ys):
    return type("Points", (), {"xs": xs, "ys": ys})


def test_a_click_on_a_cell_moves_both_controls_and_the_token_map():
    stage = Stage(SCRUBBER)
    found = scrubber.pickers(stage)
    scrubber._clicked_cell(stage, found, None, points([4.2], [1.9]), None)
    assert (found["depth"].index, found["time"].index) == (2, 4) == (stage.state["depth"], stage.state["time"])
    assert np.allclose(stage.figure.data[6].z, VALUES[2, 4]) and stage.figure.layout.annotations[2].text == "block 3"
    scrubber._clicked_cell(stage, found, None, points([], []), None)
    assert stage.state["time"] == 4 and stage.state["token"] is None


def test_clicks_on_cells_and_on_tokens_are_told_apart():
    stage = Stage(SCRUBBER)
    scrubber.clickable(stage, scrubber.pickers(stage))
    named = {
        k: [call.func.__name__ for call in trace._click_callbacks]
        for k, trace in enumerate(stage.figure.data)
        if trace._click_callbacks
    }
    assert named == {0: ["_clicked_cell"], 3: ["_clicked"], 6: ["_clicked"]}


def test_unknown_controls_of_cells_are_refused():
    with pytest.raises(ValueError, match="control of a heat map 'dpeth'.*depth"):
        Scrubber(view, [TIME, DEPTH], strip, None, ("dpeth", "time"))


def test_a_film_with_a_heat_map_is_small():
    moving = film([view(0, time) for time in range(5)], 2)
    assert len(moving.frames) == 5 and len(moving.to_json()) < 60_000
