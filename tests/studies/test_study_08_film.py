"""The films of study 08: what they hold, that they can be kept, seen and refused, and that a collapse is marked."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.dsd import TARGETS
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.dsd import denoising_film
from maskalign_lab.studies.dsd.courses import looks_of
from maskalign_lab.studies.dsd.denoising_film import Denoising, both_heads, clean_of, denoising_of
from maskalign_lab.studies.dsd.film import CLASS_COLOURS, curve_of, key_of, mosaic, scrubber, strip, view
from maskalign_lab.studies.dsd.filming import COURSES, Film, film_of, load_film, on_plane, save_film, shared_steps
from maskalign_lab.studies.dsd.opening import film_saves, open_study
from maskalign_lab.training.latent_terms import spread
from maskalign_lab.workbench import plotly_figure

SMALL = (
    "method.alignment=0 method.deep=0 method.classification=0 method.perceptual=0 method.views=0 method.target=online "
    "network.width=16 network.depth=2 network.heads=2 data.n=48 training.steps=4 training.warmup=1"
)


def trained(path, more="", dataset="shapes"):
    return load_run(train(make_recipe("dsd", "smoke", dataset, overrides=f"{SMALL} {more}"), path, "cpu", 0))


def drawn(figure) -> bytes:
    """A coarse picture of a figure: all of it is drawn."""
    figure.savefig(file := io.BytesIO(), dpi=30)
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two arms, of which the second has fewer channels."""
    folder = tmp_path_factory.mktemp("runs")
    every = "training.save_every=2"
    return {
        "a: v": trained(folder / "a", f"{every} method.predicts=v method.gradient=both"),
        "c: x": trained(folder / "c", f"{every} network.latent_dim=8"),
    }


@pytest.fixture(scope="module")
def film(runs) -> Film:
    return film_of(runs, 30)


@pytest.fixture(scope="module")
def denoising(runs) -> Denoising:
    return denoising_of(runs["a: v"], 30, 3, (0.05, 0.5, 0.95))


# collapse, step by step


def test_what_a_film_holds(film):
    assert film.arms == ["a: v", "c: x"] and film.steps == [2, 4] and film.collapsed == [None, None]
    assert film.clouds.shape == (2, 2, 30, 2) and film.labels.shape == (30,) and len(film.shown) == 4
    assert film.spectra.shape == (2, 2, 2, 16) and film.decoded.shape == (2, 2, 4, 32, 32, 3)
    assert np.isnan(film.spectra[1, ..., 8:]).all() and np.isfinite(film.spectra[1, ..., :8].astype(float)).all()
    assert film.courses.shape == (2, 2, len(COURSES)) and len(np.unique(film.labels[film.shown])) == 4


def test_numbers_are_those_of_the_latents(film, runs):
    """The spread of a film is that of the latents whose deviations its spectrum has: the squares add up."""
    squares = np.nansum(np.square(film.spectra[:, :, 0].astype(np.float64)), -1)
    channels = np.array([run.net.in_channels for run in runs.values()])
    assert np.allclose(np.sqrt(squares / channels[:, None]), film.courses[:, :, 0], rtol=5e-3)
    held_out = runs["a: v"].survey_images(30)
    (_, first), _ = looks_of(runs["a: v"], held_out)
    assert spread(first.z).item() == pytest.approx(film.courses[0, 0, 0], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1), st.integers(0, 100))
def test_a_shrunken_cloud_is_seen_shrunken_wherever_it_moves(share, seed):
    draw = torch.Generator().manual_seed(seed)
    wide, away = torch.randn(20, 6, generator=draw), 5 * torch.randn(6, generator=draw)
    before, after = on_plane(torch.stack([wide, share * wide + away])).astype(np.float32)
    assert np.allclose(after, share * before, atol=5e-3)


def test_a_kept_film_is_the_same_and_small(film, denoising, tmp_path):
    for made, kind in ((film, Film), (denoising, Denoising)):
        path = save_film(made, tmp_path / "film.npz")
        again = load_film(path, kind)
        assert path.stat().st_size < 1_000_000
        for name, value in vars(made).items():
            same = np.array_equal(getattr(again, name), value, equal_nan=value.dtype.kind == "f") if isinstance(
                value, np.ndarray
            ) else getattr(again, name) == value  # fmt: skip
            assert same, name


def test_moving_the_slider_and_the_list_changes_values_only(film):
    shown = plotly_figure.figure(view(film, 1, "spread of the latents"))
    for curve in COURSES:
        plotly_figure.update(shown, view(film, 0, curve))
        assert shown.layout.yaxis99.title.text == COURSES[curve][1]
    again = plotly_figure.figure(view(film, 0, list(COURSES)[-1]))
    assert json.loads(shown.to_json()) == json.loads(again.to_json())
    assert drawn(strip(film)) and scrubber(film).defaults() == {"time": 1, "curve": "spread of the latents"}


def test_a_collapse_is_marked_on_its_line(film):
    marked = replace(film, collapsed=[4, None])
    curve = curve_of(marked, "rank of the latents", 0)
    assert curve.crosses == {"a: v": 4.0} and "collapsed in spread" in curve.title
    cross = plotly_figure.figure(view(marked, 0, "rank of the latents")).data[-1]
    assert cross.x == (4.0,) and cross.y[0] == pytest.approx(film.courses[0, 1, 1])
    assert "collapsed" not in curve_of(film, "rank of the latents", 0).title


def test_latents_that_are_all_the_same_can_be_drawn(film):
    still = replace(film, clouds=0 * film.clouds, spectra=0 * film.spectra, courses=0 * film.courses, collapsed=[2, 2])
    assert plotly_figure.figure(view(still, 0, "PSNR of the pictures")) and drawn(strip(still))


def test_pictures_stand_above_what_is_decoded(film):
    shown = mosaic(film, 0, 1)
    assert np.array_equal(shown[2:34, 4:36], film.originals[0]) and np.array_equal(
        shown[38:70, 4:36], film.decoded[0, 1, 0]
    )
    colour = key_of(film)[film.classes[film.labels[film.shown[0]]]]
    assert shown[0, 3].tobytes().hex() == colour[1:].lower()


def test_more_classes_than_colours_are_grey(film):
    many = replace(film, classes=[str(i) for i in range(30)], labels=np.arange(30, dtype=np.int16))
    assert len(key_of(many)) == len(CLASS_COLOURS) + 1 and "others" in key_of(many)
    assert plotly_figure.figure(view(many, 0, "PSNR of the pictures"))


# one network's denoising


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(TARGETS)), st.floats(0.06, 0.94), st.sampled_from(["linear", "cosine"]))
def test_an_exact_answer_implies_the_latent(name, t, interpolant):
    """Of the sum of latent and noise not in the middle of the path, where it tells nothing."""
    z, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times, (p, q) = torch.full((4,), t, dtype=torch.float64), TARGETS[name]
    found = clean_of(p * z + q * noise, interpolate(z, noise, times, interpolant), times, (p, q), interpolant)
    assert torch.isfinite(found).all()
    if name != "x+eps" or abs(t - 0.5) > 0.05:
        assert torch.allclose(found, z, atol=1e-6)


def test_what_a_denoising_film_holds(denoising, runs):
    assert denoising.maps.shape == (3, 3, 3, 4, 4, 3) and denoising.decoded.shape == (3, 3, 3, 32, 32, 3)
    assert denoising.missed.shape == (2, 3) and len(denoising.labels) == 3
    near = np.abs(denoising.decoded[0, :, 0].astype(int) - denoising.target_decoded).mean()
    far = np.abs(denoising.decoded[0, :, 2].astype(int) - denoising.target_decoded).mean()
    assert near < far / 2  # the least noised latent is decoded nearly as the clean one


def test_a_low_pass_is_passed(runs, tmp_path):
    """What a narrow prediction implies has the rank of the filter."""
    run = trained(tmp_path / "narrow", "method.rank=2 training.steps=1")
    z_t = torch.randn(30, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    said, _ = both_heads(run, z_t, 0.5, torch.zeros(30, dtype=torch.long))
    rows = said.flatten(2).mT.flatten(0, 1)
    assert torch.linalg.matrix_rank(rows - rows.mean(0), rtol=1e-4) <= 2


def test_the_denoising_scrubber(denoising):
    shown = plotly_figure.figure(denoising_film.view(denoising, 0, 0))
    plotly_figure.update(shown, denoising_film.view(denoising, 2, 1))
    assert [word.text for word in shown.layout.annotations][4].endswith(denoising.labels[1])
    assert drawn(denoising_film.strip(denoising))


# any run, any data, and what is refused


def test_a_run_that_kept_its_last_checkpoint_has_one_place(runs, tmp_path):
    film = film_of({"last": trained(tmp_path / "last")}, 10)
    assert film.steps == [4] and film.courses.shape[1] == 1
    assert plotly_figure.figure(view(film, 0, "drift of the latents")) and drawn(strip(film))


def test_a_small_folder_with_fewer_images_than_classes(tmp_path):
    for i in range(12):
        place = tmp_path / "pictures" / f"kind {i // 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(place / f"{i}.png")
    run = trained(tmp_path / "run", "data.n=6 training.batch_size=4", f"folder:{tmp_path / 'pictures'}")
    film = film_of({"mine": run}, 4)
    assert film.clouds.shape[2] == 4 and len(film.classes) == 6 and len(key_of(film)) <= 4
    assert (
        plotly_figure.figure(view(film, 0, "PSNR of the pictures"))
        and denoising_of(run, 4, 9, (0.5,)).maps.shape[1] == 4
    )
    with pytest.raises(ValueError, match="2 images make no cloud"):
        film_of({"mine": run}, 2)


def test_what_cannot_be_filmed_is_refused(runs):
    with pytest.raises(ValueError, match="method 'sit'.*expected a run of method 'dsd'"):
        film_of({"one": load_run("sit-shapes")})
    with pytest.raises(ValueError, match="method 'sit'"):
        denoising_of(load_run("sit-shapes"))
    with pytest.raises(ValueError, match="no runs"):
        film_of({})
    with pytest.raises(ValueError, match="Did you mean 'drift of the latents'"):
        curve_of(film_of(runs, 5, 1, 1), "drift of latents", 0)


def test_runs_that_share_no_checkpoint_are_named(runs, tmp_path):
    other = trained(tmp_path / "other", "training.steps=3")
    with pytest.raises(ValueError, match="share no checkpoint"):
        shared_steps({"a": runs["a: v"], "b": other})
    assert shared_steps(runs, 1) == [2] and shared_steps(runs) == [2, 4]


# the study's call


@given(st.integers(1, 5000))
def test_a_film_begins_early_and_ends_with_the_training(steps):
    saves = film_saves(steps)
    assert saves[-1] == steps and saves[0] <= max(1, steps / 100) and list(saves) == sorted(set(saves))


def test_a_run_of_one_s_own_opens_the_study(runs, tmp_path):
    study = open_study(run=str(runs["c: x"].path), device="cpu", out_dir=str(tmp_path / "out"))
    assert study.film.arms == ["c"] and study.film.steps == [2, 4] and study.denoising.run == "c"
    assert load_film(tmp_path / "out" / "08_film.npz").steps == [2, 4]
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        open_study("smoek")
