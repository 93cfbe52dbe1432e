"""Study 02: its surveys, the film of two runs side by side, and what its smoke run writes."""

import json

import numpy as np
import pytest
from shared.studies import smoke_fixture

from maskalign_lab.base import paths
from maskalign_lab.gradient_norms import observe
from maskalign_lab.measure.token_pulls import norms_at
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.position_preference.film import Film, scrubber, view, with_whole
from maskalign_lab.studies.position_preference.opening import open_study
from maskalign_lab.studies.position_preference.part_figures import agreement_figure
from maskalign_lab.studies.position_preference.surveys import (
    PartSurvey,
    carried,
    load_parts,
    save_parts,
    survey_parts,
)
from maskalign_lab.workbench.plotly_figure import figure, update

smoke = smoke_fixture("02")
SHIPPED = ("sit-shapes", "repa-shapes", "reg-shapes", "maskalign-shapes")


# ---- surveys


@pytest.fixture(scope="module")
def observed():
    return observe(load_run("maskalign-shapes", device="cpu"))


@pytest.fixture(scope="module")
def survey(observed):
    return survey_parts(observed, observed.run.survey_images(32), (0.0, 0.6))


def test_a_survey_is_of_two_halves_and_its_parts_add_up(observed, survey):
    norms = norms_at(observed, observed.run.survey_images(32), (0.0, 0.6))  # (2, 32, 64)
    halves = np.stack([half.log().mean(1) for half in norms.chunk(2, dim=1)])
    np.testing.assert_allclose(survey.means.sum(2), halves, atol=1e-3)
    assert survey.means.shape == (2, 2, 3, 64) and survey.images == 32
    np.testing.assert_allclose(survey.marks.mean(-1), 6 / 64, rtol=1e-6)
    assert survey.share.shape == (2, 4) and (abs(survey.share) <= 1).all()


def test_a_stored_survey_comes_back(survey, tmp_path):
    save_parts(survey, tmp_path / "parts.safetensors")
    again = load_parts(tmp_path)
    assert again.images == survey.images
    for name in ("times", "means", "marks", "share"):
        assert np.array_equal(getattr(again, name), getattr(survey, name))


@pytest.mark.parametrize("name", SHIPPED)
def test_surveys_that_ship_are_of_thousands_of_images_and_of_the_run(name):
    stored = load_parts(paths.data() / "runs" / name)
    assert stored.images >= 4096 and len(stored.times) == 11
    shares, spread = carried(stored)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert (spread > 0).all()
    looked = observe(load_run(name, device="cpu"))
    now = survey_parts(looked, looked.run.survey_images(256), stored.times[5:6]).maps.sum(1)
    assert np.corrcoef(now[0], stored.maps.sum(1)[5])[0, 1] > 0.8


def test_without_a_shared_map_no_part_carries_it():
    """Halves whose maps are opposites: a share of a negative variance would be any number."""
    means = np.random.default_rng(0).normal(size=(1, 1, 3, 16))
    shares, spread = carried(PartSurvey(np.zeros(1), np.concatenate([means, -means]), np.zeros(1), np.zeros(1), 2))
    assert np.isnan(shares).all() and spread == 0


# ---- film


def toy(runs: tuple[str, ...]) -> Film:
    """A film of random numbers: 3 times, 2 images, 4 by 4 tokens."""
    random = np.random.default_rng(0).normal
    one = PartSurvey(np.linspace(0, 1, 3), random(size=(2, 3, 3, 16)), np.zeros((2, 3, 16)), np.zeros((3, 4)), 64)
    parts = with_whole(random(size=(len(runs), 2, 3, 3, 16)))
    black = np.zeros((2, 3, 8, 8, 3), np.uint8)
    return Film(list(runs), one.times, ["mean", "one"], black[:, 0], black, parts, [one] * len(runs))


def test_what_is_shown_adds_up_and_has_no_mean():
    film = toy(("a", "b"))
    for time in range(3):
        panels = view(film, image=1, time=time, left=1, right=0).panels
        for row in (panels[1:5], panels[6:]):
            np.testing.assert_allclose(row[0].values, sum(panel.values for panel in row[1:]), atol=1e-12)
            assert all(abs(panel.values.mean()) < 1e-12 for panel in row)
    assert len({panel.range for panel in (*panels[1:5], *panels[6:])}) == 1  # colours can be compared


def test_any_two_runs_fit_one_figure_also_the_same_one_twice():
    film = toy(("repa-a", "repa-b"))
    drawn = figure(view(film, **scrubber(film).defaults()))
    for left, right in ((0, 1), (1, 0), (0, 0)):
        update(drawn, view(film, 1, 2, left, right, token=(3, 3)))


def test_one_run_stands_alone():
    film = toy(("only",))
    shown = scrubber(film)
    assert [control.name for control in shown.controls] == ["time", "image"]
    assert len(shown.view(**shown.defaults()).panels) == 5


def test_the_agreement_figure_shows_correlations_of_different_images():
    """Noise of the images, the same at both times and another one in each half, makes no two maps alike."""
    noise = np.random.default_rng(0).normal(size=(2, 1, 3, 400)).repeat(2, axis=1)
    drawn = agreement_figure({"toy": PartSurvey(np.arange(2.0), noise, np.zeros(1), np.zeros(1), 64)})
    values = drawn.axes[0].images[0].get_array()
    assert abs(values).max() < 0.3


# ---- the opening, and the smoke run


def test_an_unknown_preset_or_parameter_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        open_study("smkoe")
    with pytest.raises(TypeError, match="preest"):
        open_study(preest="smoke")


def test_the_smoke_run_notes_its_numbers(smoke):
    side = json.loads((smoke.path(".html").parent / "02_parts.json").read_text())
    (alike,) = side["alike"].values()
    assert set(alike) == {"same t", "over t", "both ends"} and all(-1 <= value <= 1 for value in alike.values())
    assert np.isfinite([list(of.values()) for of in side["uneven"].values()]).all()


def test_beside_a_figure_stand_its_own_numbers_alone(smoke):
    folder = smoke.path(".html").parent
    side = {
        name: json.loads((folder / f"02_{name}.json").read_text()) for name in ("agreement", "wrt", "conflict", "depth")
    }
    (of,) = (each for each in side["agreement"].values() if isinstance(each, dict) and "correlations" in each)
    assert np.shape(of["correlations"]) == (len(of["t"]),) * 2
    assert {row["with hidden"] for row in side["wrt"]["correlations"]} == {"inputs", "parameters"}
    assert np.ndim(side["depth"]["cosine"]) == 3 and not any("uneven" in each for each in side.values())
