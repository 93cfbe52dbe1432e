"""Figures: one form for all views, values that change, files that stay small."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from maskalign_lab.workbench import figure_layout, plotly_figure, plots, small_png
from maskalign_lab.workbench.colours import MISSING, PALETTE, QUANTITIES, colours
from maskalign_lab.workbench.plots import Curve, Panels, Picture, Points, TokenMap
from maskalign_lab.workbench.spectra import Spectrum

SHOWN = ("norm", "top", "probability", "loss", "cosine")  # as many panels as a study shows


def picture(size=32, seed=0):
    return Picture("picture", np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def view(t=0.0, side=8, size=32, seed=0, token=None):
    draw = np.random.default_rng(seed)
    maps = [TokenMap(name, draw.random((side, side)), name) for name in SHOWN]
    x = np.linspace(0, 1, 5)
    return Panels((picture(size, seed), *maps), Curve("curve", x, {"a": x, "b": 1 - x}, "t", "value", t), token)


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def squares(figure, n):
    """Width and height in pixels, and the left edge, of each panel."""
    names = ["axis" + (str(i) if i > 1 else "") for i in range(1, n + 1)]
    x, y = (np.array([figure.layout[letter + name].domain for name in names]) for letter in "xy")
    return np.ptp(x, axis=1) * figure.layout.width, np.ptp(y, axis=1) * figure.layout.height, x


# the live figure


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.text(max_size=60), st.booleans())
def test_panels_are_equal_squares_that_do_not_overlap(n, words, curve):
    panels = Panels(tuple(TokenMap(words, np.eye(4), "norm") for _ in range(n)), view().curve if curve else None)
    width, height, x = squares(plotly_figure.figure(panels), n)
    assert np.allclose(width, width[0]) and np.allclose(width, height)
    assert (x[1:, 0] > x[:-1, 1]).all() and x.min() > 0 and x.max() <= 1


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=12), st.integers(90, 240))
def test_titles_keep_their_words_and_fit_their_panel(words, size):
    lines = figure_layout.wrapped(" ".join(words), size).split("<br>")
    assert " ".join(lines).split() == words or max(map(len, words)) > 8
    assert max(map(len, lines)) * 7.6 <= max(size + figure_layout.GAP / 2, 8 * 7.6)


def test_updating_equals_making_anew():
    figure, other = plotly_figure.figure(view(seed=0)), view(0.5, seed=1, token=(2, 5))
    plotly_figure.update(figure, other)
    assert json.loads(figure.to_json()) == json.loads(plotly_figure.figure(other).to_json())


def test_updating_sends_only_what_changed():
    figure = go.FigureWidget(plotly_figure.figure(view(0.25)))
    sent = []
    figure._send_update_msg = lambda **message: sent.append(message)
    with figure.batch_update():
        plotly_figure.update(figure, view(0.5))
    assert len(sent) == 1
    assert set(sent[0]["restyle_data"]) == {"x", "y"}  # marker and dots; no map, no picture


@pytest.mark.parametrize("change", ["a panel less", "another order", "a line more"])
def test_another_form_of_view_is_refused(change):
    panels, curve = view().panels, view().curve
    other = {
        "a panel less": Panels(panels[:-1], curve),
        "another order": Panels(panels[::-1], curve),
        "a line more": Panels(panels, Curve("", curve.x, {**curve.ys, "c": curve.x}, "", "")),
    }[change]
    with pytest.raises(ValueError, match="another form"):
        plotly_figure.update(plotly_figure.figure(view()), other)


def test_the_token_lies_at_the_same_place_on_every_panel():
    figure = plotly_figure.figure(view(size=32, token=(2, 5)))
    outlines = [trace for trace in figure.data if trace.type == "scatter" and trace.xaxis != "x99"]
    assert len(outlines) == 12
    assert {(min(trace.x), max(trace.x), min(trace.y), max(trace.y)) for trace in outlines} == {(4.5, 5.5, 1.5, 2.5)}
    image = figure.data[0]
    left, right = image.x0 - image.dx / 2, image.x0 + 31.5 * image.dx
    assert (left, right) == (-0.5, 7.5)  # 32 pixels over 8 tokens


@pytest.mark.parametrize("size", [8, 64, 100, 256, 700])
def test_pictures_arrive_whole_whatever_their_size(size):
    figure = plotly_figure.figure(view(size=size))
    got = pixels(figure.data[0].source)
    assert got.shape[0] == min(size, 256)
    assert np.isclose(got.shape[0] * figure.data[0].dx, 8)
    if size <= 64:
        assert np.array_equal(got, picture(size).pixels)


def test_a_marker_sits_on_its_lines():
    dots = plotly_figure.figure(view(0.3)).data[-1]
    assert np.allclose(dots.y, [0.3, 0.7]) and set(dots.x) == {0.3}


def test_a_constant_map_and_a_missing_value_can_be_drawn():
    values = np.zeros((4, 4))
    values[0, 0] = np.nan
    panels = Panels((TokenMap("zero", values, "norm"), TokenMap("missing", np.full((4, 4), np.nan), "loss")))
    assert [trace.zmax for trace in plotly_figure.figure(panels).data[::3]] == [1, 1]
    assert plots.rgb(panels.panels[0], (0, 1))[0, 0].tolist() == [190] * 3


def test_an_unknown_quantity_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'probability'"):
        TokenMap("", np.eye(2), "probabilty")


@pytest.mark.parametrize("size, most", [(32, 400_000), (256, 450_000)])
def test_a_film_is_small_and_begins_with_its_default(size, most):
    views = [view(t, side=16, size=size, seed=i) for i, t in enumerate(np.linspace(0, 1, 21))]
    film = plotly_figure.film(views, 4)
    assert len(film.to_json()) < most and len(film.frames) == 21
    assert film.data[0].source == film.frames[4].data[0].source
    assert np.array_equal(film.data[3].z, film.frames[4].data[3].z)


# points


def cloud(t=0.0, seed=0, reach=3.0, n=40):
    draw = np.random.default_rng(seed)
    points, behind = draw.normal(size=(n, 2)).astype(np.float32), draw.normal(size=(n, 2))
    x = np.linspace(0, 1, 5)
    two = [Points(f"t = {t}", points + i, reach, behind, PALETTE[i], ("first", "second")) for i in (0, 1)]
    return Panels((*two, view(seed=seed).panels[1]), Curve("curve", x, {"a": x}, "t", "value", t))


def test_points_are_shown_where_they_are():
    panels = cloud()
    figure = plotly_figure.figure(panels)
    assert [trace.type for trace in figure.data] == plotly_figure.kinds(panels)
    grey, coloured, empty = figure.data[3:6]
    second = panels.panels[1]
    for trace, points in ((grey, second.behind), (coloured, second.points)):
        assert np.allclose(np.stack([trace.x, trace.y], 1), points, atol=6e-4)
    assert grey.marker.color == MISSING and coloured.marker.color == PALETTE[1] and empty.x == (None,)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 50))
def test_points_have_equal_axes_that_rise(reach):
    figure = plotly_figure.figure(cloud(reach=reach))
    width, height, _ = squares(figure, 3)
    assert np.allclose(width, height)
    for axis in (figure.layout.xaxis, figure.layout.yaxis, figure.layout.xaxis2, figure.layout.yaxis2):
        assert axis.range == (-reach, reach) and axis.visible is None
    assert figure.layout.xaxis.title.text == "first" and figure.layout.yaxis.title.text == "second"
    assert figure.layout.yaxis2.showticklabels is False  # between panels there is no room
    assert figure.layout.xaxis3.visible is False and figure.layout.yaxis3.range[0] > figure.layout.yaxis3.range[1]


def test_moving_points_equals_making_anew_and_sends_no_map():
    figure, other = plotly_figure.figure(cloud()), cloud(0.5, seed=1, n=30)
    plotly_figure.update(figure, other)
    assert json.loads(figure.to_json()) == json.loads(plotly_figure.figure(other).to_json())
    with pytest.raises(ValueError, match="another form"):
        plotly_figure.update(figure, Panels(other.panels[::-1], other.curve))


def test_the_numbers_of_points_and_their_words_do_not_reach_the_curve():
    at = figure_layout.place(cloud())
    assert at.curve - 36 - (at.rows[0] + at.size) >= figure_layout.AXIS
    assert figure_layout.place(Panels(cloud().panels[:2])).height - (at.rows[0] + at.size) >= figure_layout.AXIS


def test_a_film_of_points_is_small():
    views = [cloud(t, seed=i, n=250) for i, t in enumerate(np.linspace(0, 1, 21))]
    film = plotly_figure.film(views, 4)
    assert len(film.to_json()) < 600_000 and len(film.frames) == 21
    assert film.frames[4].data[1].x == film.data[1].x


def test_a_strip_of_points_has_equal_scales_and_one_frame_each():
    panels = cloud(reach=2.0).panels[:2]
    figure = plots.filmstrip({"points": panels}, ["a", "b"])
    for axes, panel in zip(figure.axes, panels):
        assert axes.get_xlim() == axes.get_ylim() == (-2, 2) and axes.get_aspect() == 1
        grey, coloured = (collection.get_offsets() for collection in axes.collections)
        assert np.allclose(grey, panel.behind) and np.allclose(coloured, panel.points)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"points": np.zeros((2, 3))}, r"points of shape \(2, 3\) are no points of a plane: expected \(n, 2\)"),
        ({"behind": np.zeros(2)}, r"behind of shape \(2,\)"),
        ({"reach": 0.0}, "reach 0.0 must be positive"),
    ],
)
def test_what_is_no_cloud_of_points_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Points(**{"title": "", "points": np.zeros((4, 2)), "reach": 1.0} | wrong)


# colours


def simulated(shades, matrix):
    """What a dichromat sees, in linear RGB."""
    linear = (shades / 255.0) ** 2.2
    return np.clip(linear @ np.array(matrix).T, 0, 1)


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("quantity", ["norm", "probability", "loss", "off", "distance"])
def test_scales_rise_in_lightness_for_the_colour_blind(kind, quantity):
    seen = simulated(colours(QUANTITIES[quantity].scale)[::16], BLIND[kind])
    assert (np.diff(seen @ [0.2126, 0.7152, 0.0722]) > 0).all()


# static figures


def test_pngs_keep_to_their_limit():
    noise = [Picture("", np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(11)]
    figure = plots.filmstrip({"one": noise, "two": noise}, [f"{i}" for i in range(11)])
    sizes = [len(plots.png(figure, most)) for most in (1_000_000, 100_000, 30_000)]
    assert sizes[0] > 100_000 and sizes[1] <= 100_000 and sizes[2] <= 30_000
    with pytest.raises(ValueError, match="does not fit into 100 bytes"):
        plots.png(figure, 100)


CHANGES = {
    "title": lambda figure: figure.axes[0].set_title("another"),
    "line": lambda figure: figure.axes[0].lines[0].set_ydata([0, 3]),
    "image": lambda figure: figure.axes[1].images[0].set_data(np.eye(2)[::-1]),
    "axes": lambda figure: figure.axes[0].remove(),
    "size": lambda figure: figure.set_size_inches(3, 3),
    "suptitle": lambda figure: figure.suptitle("above"),
    "subfigure": lambda figure: figure.subfigs[0].suptitle("above"),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_figure_is_drawn_again_only_if_it_has_changed(monkeypatch, tmp_path, change):
    drawn, draw = [], small_png.draw
    monkeypatch.setattr(small_png, "draw", lambda *given: drawn.append(given) or draw(*given))
    figure = Figure((4, 2))
    left, right = figure.subfigures(1, 2)
    left.subplots().plot([0, 1], [0, 2])
    right.subplots().imshow(np.eye(2))
    before = plots.png(figure)
    if change:
        CHANGES[change](figure)
    after = small_png.save_png(figure, tmp_path / "figure.png").read_bytes()
    assert (len(drawn), before == after) == ((2, False) if change else (1, True))
    monkeypatch.undo()
    assert small_png.draw(figure, 100_000) == after  # what is shown is the present state


def test_save_png_makes_the_folder(tmp_path):
    path = small_png.save_png(plots.loss_per_t({"run": (np.ones(4), np.ones(4))}), tmp_path / "new" / "figure.png")
    assert Image.open(path).format == "PNG"


def test_a_filmstrip_is_aligned():
    panels = view().panels[:3]
    figure = plots.filmstrip({panel.title: [panel] * 4 for panel in panels}, list("abcd"), "title")
    corners = np.array([axes.get_position().bounds for axes in figure.axes]).reshape(3, 5, 4)
    assert np.allclose(corners[:, :, 0], corners[0, :, 0]) and np.allclose(corners[:, :, 1], corners[:, :1, 1])
    inches = corners[:, :4, 2:] * figure.get_size_inches()
    assert np.allclose(inches, inches[0, 0, 0])


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="row 'norm' has 2 panels, but there are 3 columns"):
        plots.filmstrip({"norm": [picture()] * 2}, list("abc"))


def test_sample_grids_keep_order_and_fill_the_last_row():
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    shown = plots.sample_grid(images, 3, ["a", "b", "c"]).axes[0].images[0].get_array()
    assert shown[3::6, 3::6, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 255, 255]]


# spectra, wide pictures, keys, crosses


def spectra(scale=1.0, names=("latents", "predicted")):
    lines = {name: scale * 0.5 ** np.arange(1, 9 - i) for i, name in enumerate(names)}
    return Spectrum("spectrum", lines, (1e-3, 1), ("component", "deviation"))


@given(st.floats(1e-9, 1e9))
def test_a_spectrum_stays_on_its_axis(scale):
    first, second, empty = plotly_figure.values(Panels((spectra(scale),)))
    assert all(1e-3 * 0.99 <= v <= 1.01 for v in (*first["y"], *second["y"])) and empty["x"] == [None]
    assert (first["x"], second["x"]) == (list(range(1, 9)), list(range(1, 8)))


def test_spectra_of_other_values_and_names_follow_each_other():
    figure, other = plotly_figure.figure(Panels((spectra(),))), Panels((spectra(0.1, ("z 1.0", "said 2.0", "v 3.0")),))
    plotly_figure.update(figure, other)
    assert json.loads(figure.to_json()) == json.loads(plotly_figure.figure(other).to_json())
    assert all(name in figure.layout.annotations[0].text for name in other.panels[0].lines)


@pytest.mark.parametrize(
    "lines, range", [({}, (0.1, 1)), (dict.fromkeys("abcd", [1.0]), (0.1, 1)), ({"a": [1.0]}, (0, 1))]
)
def test_a_spectrum_that_cannot_be_drawn_is_refused(lines, range):
    with pytest.raises(ValueError, match="expected"):
        Spectrum("", lines, range)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(8, 300), st.integers(1, 3))
def test_a_wide_picture_fills_a_panel_as_much_lower(times, side, columns):
    pixels = np.zeros((side, times * side, 3), np.uint8)
    panels = Panels((picture(), Picture("wide", pixels)), per_row=columns, key={"a": "red"})
    figure = plotly_figure.figure(panels)
    width, height, _ = squares(figure, 2)
    assert np.allclose(width / height, (1, times))
    image, (low, high) = figure.data[3], figure.layout.xaxis2.range
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.source.split(",")[1]))))
    assert np.isclose(image.x0 - image.dx / 2, low) and np.isclose(sent.shape[1] * image.dx, high - low, rtol=0.02)


def test_the_key_names_colours_and_moves_all_down():
    plain, keyed = Panels((picture(),)), Panels((picture(),), key={"disc": "#0072B2", "ring": "#D55E00"})
    assert figure_layout.place(keyed).above(0) - figure_layout.place(plain).above(0) == figure_layout.KEY
    assert plotly_figure.figure(keyed).layout.annotations[-1].text.count("●") == 2


def test_a_cross_sits_on_its_line_and_may_be_missing():
    crossed = replace(view().curve, crosses={"b": 0.25})
    cross = plotly_figure.figure(Panels(view().panels, crossed)).data[-1]
    assert (cross.x, cross.y, cross.marker.color) == ((0.25,), (0.75,), (PALETTE[1],))
    none = plotly_figure.figure(Panels(view().panels, replace(crossed, crosses={})))
    assert none.data[-1].x == (None,) and len(none.data) == len(plotly_figure.figure(view()).data) + 1


def test_the_name_of_the_curves_axis_follows():
    figure = plotly_figure.figure(view())
    plotly_figure.update(figure, Panels(view().panels, replace(view().curve, y_label="decibels")))
    assert figure.layout.yaxis99.title.text == "decibels"
