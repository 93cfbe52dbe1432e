"""The film of depth and time: what a cell is the mean of, what a click opens, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskalign_lab.measure.teacher_map import fit_teacher_maps, teacher_cosines
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.position_preference.depth_film import (
    DepthFilm,
    depth_figure,
    film_of,
    load_film,
    make_film,
    make_reader,
    noised_pixels,
    save_film,
    scrubber,
    strip,
    view,
)
from maskalign_lab.workbench import scrubber as live
from maskalign_lab.workbench.plots import png

SMALL = "data.n=64 training.steps=2 training.warmup=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain, and an aligned run with class token and mixer."""
    folder = tmp_path_factory.mktemp("runs")
    made = [
        train(make_recipe(name, "smoke", overrides=SMALL), folder / name, "cpu", 0) for name in ("sit", "maskalign")
    ]
    return [load_run(path) for path in made]


@pytest.fixture(scope="module")
def film(runs) -> DepthFilm:
    return make_film(runs, times=3, images=40, shown=2)


def test_shapes_and_names(film, runs):
    assert film.heat.shape == film.halves.shape == (2, 4, 3) and film.cosines.shape == (2, 2, 4, 3, 64)
    assert film.clean.shape == (2, 32, 32, 3) and film.noised.shape == (2, 3, 32, 32, 3)
    assert film.runs == [run.name for run in runs] and film.aligned == [[], [2]] and film.images == 20


def test_a_cell_is_the_mean_over_the_images_that_were_asked(film, runs):
    images = runs[1].survey_images(40)
    known, asked = images.subset(np.arange(20)), images.subset(np.arange(20, 40))
    maps = fit_teacher_maps(runs[1], known, runs[1].teacher_view(known), 0.5, [1, 2, 3, 4])
    found = teacher_cosines(maps, runs[1], asked, runs[1].teacher_view(asked), 1)
    np.testing.assert_allclose(film.heat[1, :, 1], found.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(film.halves[1, :, 1], 1.96 * found.mean(2).std(1) / 20**0.5, atol=1e-5)


def test_the_picture_is_noised_as_the_network_saw_it(film, runs):
    images = runs[0].survey_images(40).subset(np.arange(20, 40))
    shown = images.subset(np.unique(images.labels, return_index=True)[1][:2])
    assert np.array_equal(film.noised[:, 1], noised_pixels(runs[1], shown, 0.5))
    assert np.array_equal(film.clean, shown.pixels) and np.array_equal(film.noised[:, 0], shown.pixels)


def test_a_cell_opens_its_token_map(film):
    shown = view(film, 1, 0, 2, 1)
    heat, _, noised, tokens = shown.panels
    assert heat.chosen == (2, 1) and heat.rows == ["1", "2*", "3", "4"] and "block 3" in tokens.title
    assert np.array_equal(tokens.values.flatten(), film.cosines[1, 0, 2, 1])
    assert np.array_equal(noised.pixels, film.noised[0, 1])
    assert np.allclose(shown.curve.ys["mean of all images"], film.heat[1, 2])
    one = view(film, 1, 0, 2, 1, (3, 5)).curve
    assert np.array_equal(one.ys["this token"], film.cosines[1, 0, 2, :, 3 * 8 + 5]) and "(3, 5)" in one.title


def test_a_click_moves_block_and_time(film):
    stage = live.Stage(scrubber(film))
    found = live.pickers(stage)
    point = type("Points", (), {"xs": [2.0], "ys": [3.0]})
    live._clicked_cell(stage, found, None, point, None)
    assert (stage.state["depth"], stage.state["time"]) == (3, 2) == (found["depth"].index, found["time"].index)
    assert np.allclose(stage.figure.data[9].z, film.cosines[0, 0, 3, 2].reshape(8, 8)) and not stage.error.value


def test_a_kept_film_is_the_same(film, tmp_path):
    again = load_film(save_film(film, tmp_path / "film.npz"))
    for name, value in vars(film).items():
        assert (
            np.array_equal(getattr(again, name), value)
            if isinstance(value, np.ndarray)
            else getattr(again, name) == value
        )


def test_paper(film):
    assert png(strip(film)) and png(depth_figure(film))


def test_pictures_of_one_s_own_are_shown(runs):
    images = runs[0].images("validation", 3)
    own = replace(images, labels=np.full(3, 10), classes=(*images.classes, "mine"), masks=None)
    film = film_of([make_reader(runs[0], [0.0, 1.0], 40)], own)
    assert film.labels == ["mine"] * 3 and np.array_equal(film.clean, own.pixels)


def test_networks_that_differ_cannot_share_a_film(runs):
    with pytest.raises(ValueError, match="one film shows networks of one depth.*sit: 4 blocks.*repa-shapes: 12 blocks"):
        make_film([runs[0], load_run("repa-shapes")], times=2, images=40)


def test_the_mean_of_noise_is_nothing(film):
    assert np.abs(film.heat[:, :, -1]).max() < 0.3 and torch.isfinite(torch.from_numpy(film.cosines)).all()
