"""Study 07: what its smoke run leaves, the fits that ship, and what it says where nothing was trained."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.studies import check_figure, smoke_fixture

from maskalign_lab.base import paths
from maskalign_lab.diffusion.objectives import Objective, shifted
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.verdicts import beside, by_seed
from maskalign_lab.measure.wording import difference, interval, plain, signed
from maskalign_lab.rae import BACKBONES, FIT, ImageFit, dimension_shift, noise_missed, odds_times
from maskalign_lab.runs import rung
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.studies.rae import opening
from maskalign_lab.studies.rae.arms import SCALES, film_arms, shift_of
from maskalign_lab.studies.rae.film import check_shown, load_film, scrubber
from maskalign_lab.studies.rae.findings import (
    all_findings,
    head_helps,
    learned_encoder,
    noisy_decoder,
    semantics,
    shift_helps,
    wide_enough,
    width_on_data,
)
from maskalign_lab.studies.rae.noise import DECODERS
from maskalign_lab.studies.rae.one_image import CASES, case_of, rows_of, shipped_fits
from maskalign_lab.studies.rae.opening import BOTH, FILM, NOISE, Study, load_decoded
from maskalign_lab.studies.rae.tables import PAIRS, untrained, verdicts

BOOK = paths.notebooks() / "07_rae.ipynb"
smoke = smoke_fixture("07")


# ---- one image


def test_the_fits_that_ship_are_the_cases_and_are_paired():
    fits = [case_of(row) for row in shipped_fits()]
    assert set(fits) == set(CASES) and len(fits) == len(CASES)
    three = [case for case in CASES if case.size == 16 and case.steps == min(case.steps for case in CASES)]
    seeds = {
        replace(case, seed=0): {each.seed for each in three if replace(each, seed=0) == replace(case, seed=0)}
        for case in three
    }
    assert all(found == {0, 1, 2} for found in seeds.values())


def test_no_fit_of_v_or_eps_beats_the_bound_of_its_width():
    for row in shipped_fits():
        assert row["prediction"] == "x" or row["missed"] > row["bound"]


def test_known_fits_are_not_made_again(tmp_path):
    assert rows_of(CASES, paths.data() / "results" / "07_one_image.json") == shipped_fits()


@given(network=st.sampled_from(list(BACKBONES)), width=st.sampled_from([24, 48, 96]))
def test_the_width_of_a_case_is_what_a_token_is_read_from(network, width):
    """The last layer's weights have it as their rank, at most."""
    net = ImageFit("v", width, 16, network=network).build()
    assert net.final_layer.linear.weight.shape == (48, width)
    assert net.width == (width if network == "SiT" else round(BACKBONES[network] * 48))


def test_a_wrong_network_is_named():
    with pytest.raises(ValueError, match="Did you mean 'DiT-DH'"):
        ImageFit("v", 24, 16, network="DiT-HD")


@pytest.mark.parametrize(("prediction", "missed"), [("eps", 1.0), ("v", 1.25)])
def test_a_network_that_says_nothing_misses_all_of_the_noise(prediction, missed):
    """Of v the image as well, whose mean square is a quarter here."""
    silent = lambda x_t, t, y: SimpleNamespace(prediction=torch.zeros_like(x_t))  # noqa: E731
    found = noise_missed(silent, Objective(prediction=prediction, **FIT), torch.full((3, 8, 8), 0.5), 0)
    assert found == pytest.approx(missed, rel=0.02)


def test_x_and_v_that_say_the_same_miss_the_same():
    image = torch.linspace(-1, 1, 192).reshape(3, 8, 8)
    right = {"x": lambda x_t, t: image + 0.1, "v": lambda x_t, t: (x_t - image - 0.1) / t.view(-1, 1, 1, 1)}
    nets = {
        kind: lambda x_t, t, y, say=say: SimpleNamespace(prediction=say(x_t, t).expand_as(x_t))
        for kind, say in right.items()
    }
    one, other = (noise_missed(net, Objective(prediction=kind, **FIT), image, 0) for kind, net in nets.items())
    assert one == pytest.approx(other, rel=0.05) and one > 0.01


# ---- the shift


@given(shift=st.floats(1, 20))
def test_the_axis_of_odds_favours_neither_law(shift):
    """Turned around its middle, the axis is itself, and the plain law's middle becomes the shifted law's."""
    logits = odds_times(shift).double().logit()
    middle = math.log(shift) / 2
    torch.testing.assert_close(2 * middle - logits.flip(0), logits, rtol=1e-3, atol=1e-3)
    assert math.isclose(math.log(shifted(0.5, shift) / (1 - shifted(0.5, shift))), 2 * middle, abs_tol=1e-6)


def test_the_papers_shift_follows_from_its_rule():
    assert make_recipe("ditdh", "paper").objective.time_shift == pytest.approx(dimension_shift(256 * 768))
    assert make_recipe("ditdh", "study").objective.time_shift == pytest.approx(shift_of(SCALES["laptop"].latents))


# ---- arms


@pytest.mark.parametrize("preset", SCALES)
def test_arms_of_one_question_differ_in_what_it_asks(preset):
    scale = SCALES[preset]
    recipes = {arm.name: scale.recipe_of(preset, "shapes")(arm, 0) for arm in scale.table("head shift latents width")}
    assert len({each.training for each in recipes.values()}) == 1
    one, other = recipes["DiT-DH"], recipes["no shift"]
    assert replace(one, objective=other.objective) == other and other.objective.time_shift == 1
    wide, head = recipes["SiT"].network, one.network
    assert (wide.width, wide.depth) == (head.head_width, head.depth + head.head_depth)
    assert replace(recipes["REPA"], method=recipes["SiT"].method) == recipes["SiT"]
    assert all(name in recipes for pairs in PAIRS.values() for pair in pairs for name in pair[:2] if preset != "paper")


@pytest.mark.parametrize("preset", SCALES)
def test_every_network_is_filmed_with_every_target(preset):
    arms = film_arms(SCALES[preset])
    assert list(arms) == list(product(("DiT-DH", "SiT"), ("v", "x")))
    for (network, target), arm in arms.items():
        recipe = arm.recipe(preset)
        assert (recipe.network.name, recipe.objective.prediction) == (network.lower().replace("-", ""), target)


def test_arms_of_one_width_are_trained_for_equal_steps_alone(monkeypatch):
    asked, scale = {}, SCALES["laptop"]
    for module in (opening, rung):
        monkeypatch.setattr(
            module, "run_arms", lambda arms, _, __, baseline, *___: asked.update({baseline: arms}) or []
        )
    opening.table_rows(Study("laptop", "shapes", "cpu", 0, "", None, scale, 1, scale.table(), None, {}))
    assert {arm.name for arm in asked[None]} == scale.by_width
    assert {arm.name for arm in asked["SiT"]} == {arm.name for arm in scale.table("head shift latents")}


# ---- nothing trained


def test_empty_tables_say_what_trains_them():
    assert verdicts([], "head").empty and "-p seeds 3" in untrained([], ["DiT-DH"])
    told = findings_table(all_findings([], [], SCALES["laptop"].networks)).data
    assert "missing here" in told


def test_findings_fit_on_a_screen_and_the_first_screen_tells_the_headline():
    rows = load_rows(paths.data() / "results" / "07_rae_shapes.json")
    text = findings_table(all_findings(shipped_fits(), rows, SCALES["laptop"].networks)).data
    assert check_words(text) <= 250
    first = nbformat.read(BOOK, as_version=4).cells[0].source
    assert headline(wide_enough(shipped_fits())) in first
    assert "farther from real images" in first and "recognised more often" in first
    shift = [shift_helps(rows, metric, "") for metric in ("frechet", "accuracy", "odds loss")]
    others = [make(rows) for make in (head_helps, noisy_decoder, semantics, learned_encoder)]
    wide = width_on_data(rows, SCALES["laptop"].networks, -1, 0, "")
    for found, digits in zip((wide, *shift, *others), (1, 2, 2, 3, 3, 2, 2, 2), strict=True):
        mean, half = map(float, found.effect.split(" +/- "))
        assert f"({signed(mean, digits)} +/- {plain(half, digits)}" in first
    probe = beside(*(by_seed(rows, "probe")[arm] for arm in ("DiT-DH", "VAE latents")))
    assert interval(probe, 2) in first


def test_the_verdict_of_the_data_set_is_in_the_rows():
    rows = load_rows(paths.data() / "results" / "07_rae_shapes.json")
    shift = [shift_helps(rows, metric, "") for metric in ("frechet", "accuracy", "odds loss")]
    narrow, wide = (
        width_on_data(rows, SCALES["laptop"].networks, place, claim, "") for place, claim in ((0, 1), (-1, 0))
    )
    assert narrow.verdict == "reproduced (3 seeds)" and wide.verdict == "undecided (3 seeds)"
    first = nbformat.read(BOOK, as_version=4).cells[0].source
    assert f"v's are {narrow.effect.lstrip('+')} farther from real images than x's" in first
    noise = difference(rows, "eps, SiT, 64", "x, SiT, 64", "frechet")
    assert noise.verdict(+1) == "reproduced" and noise.seeds == 3
    assert (
        f"{plain(noise.mean, 1)} +/- {plain(noise.half, 1)} farther in the narrow one (*reproduced*, 3 seeds)" in first
    )
    others = [make(rows) for make in (noisy_decoder, head_helps, semantics, learned_encoder)]
    found = [each.verdict for each in (*others, *shift)]
    words = ["reproduced", "reproduced", "contradicted", "reproduced", "undecided", "reproduced", "contradicted"]
    assert found == [f"{word} (3 {'seeds' if k else 'networks'})" for k, word in enumerate(words)]


# ---- what ships, and what a job leaves


def test_film_and_decoders_that_ship_are_whole():
    folder = paths.data() / "results"
    film, both, noise = load_film(folder / FILM), load_decoded(folder / BOTH), load_rows(folder / NOISE)
    assert list(film.said) == list(film.errors) == list(film_arms(SCALES["laptop"]))
    assert film.shift == pytest.approx(shift_of(SCALES["laptop"].latents))
    assert {row["decoder"] for row in noise} == set(DECODERS) == set(both.images)
    assert {row["latents"] for row in noise} == {"images", "samples"}


@pytest.mark.parametrize("network", ["DiT-DH", "SiT"])
@pytest.mark.parametrize("target", ["v", "x"])
def test_the_pickers_show_what_is_picked(network, target):
    film = load_film(paths.data() / "results" / FILM)
    moved = scrubber(film)
    assert [control.name for control in moved.controls] == ["place", "image", "network", "target"]
    panels = moved.view(**moved.defaults() | {"network": network, "target": target})
    plain, shifted = (panels.panels[k].pixels for k in (2, 4))
    said = film.said[network, target][:, 0, moved.defaults()["place"]].permute(0, 2, 3, 1).numpy()
    assert (plain == said[0]).all() and (shifted == said[1]).all() and panels.curve.title == f"{network}, {target}"


def test_a_run_of_ones_own_is_picked_by_its_name_and_its_target(monkeypatch):
    run = SimpleNamespace(recipe=make_recipe("sit", "smoke", overrides="objective.prediction=x"))
    monkeypatch.setattr(opening, "load_run", lambda name, device: run)
    monkeypatch.setattr(opening, "make_film", lambda runs, shift: runs)
    assert opening.open_study(run="runs/mine").film == {("runs/mine", "x"): run}


def test_the_job_keeps_its_rows(smoke):
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "07_rows.json")} == {arm.name for arm in SCALES["smoke"].table()}
    assert list(load_film(folder / FILM).said) == list(film_arms(SCALES["smoke"]))
    assert {row["sigma"] for row in load_rows(folder / NOISE)} == {0.0, 0.8}
    side = check_figure(smoke, "07_rae", "07_one_image")
    assert {row["token_dim"] for row in side["share of the noise"]} == {48, 192}


def test_a_run_that_cannot_be_shown_is_refused():
    class Pixels:
        name, net, recipe = "mine", type("Net", (), {"class_dim": None}), make_recipe("sit", "smoke")

    with pytest.raises(ValueError, match="sees pixels"):
        check_shown(Pixels())
