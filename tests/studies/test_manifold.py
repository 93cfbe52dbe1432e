"""The manifold toy: its plane, its exact flow, paired draws, trainings and surveys that go on where they stopped."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base import devices
from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.measure.verdicts import comparison
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.studies.prediction_targets import manifold_figures, manifold_film, manifold_survey
from maskalign_lab.studies.prediction_targets.manifold import (
    DATA,
    ToyConfig,
    begin_toy,
    draw_batch,
    draw_points,
    embedding,
    plane_parts,
    train_toy,
    trained_toy,
)
from maskalign_lab.studies.prediction_targets.manifold_measures import (
    LEFT,
    ExactNet,
    Flow,
    error_split,
    least_energy,
    leaving_time,
    off_energy,
    sliced_distance,
    stray_distance,
    toy_start,
    watch_flow,
)
from maskalign_lab.studies.prediction_targets.manifold_survey import (
    PREDICTIONS,
    control_cases,
    diagram_cases,
    energies,
    load_flows,
    paired_ratio,
    pick,
    sample_cases,
    survey_cases,
    survey_toy,
    toy_identity,
)
from maskalign_lab.workbench import plotly_figure, plots

TINY = ToyConfig(dim=6, width=12, steps=12, batch=16)
DIMS = st.integers(2, 40)
SEEDS = st.integers(0, 10_000)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed):
    """A random orthogonal 2 x 2 matrix."""
    return torch.linalg.qr(normal(2, 2, seed=seed)).Q


# the plane


@settings(max_examples=30, deadline=None)
@given(DIMS, SEEDS)
def test_the_embedding_is_orthonormal_and_fixed(dim, seed):
    basis = embedding(dim, seed).double()
    assert torch.allclose(basis.mT @ basis, torch.eye(2, dtype=torch.float64), atol=1e-6)
    embedding.cache_clear()
    assert torch.equal(embedding(dim, seed).double(), basis)


@settings(max_examples=30, deadline=None)
@given(DIMS, SEEDS)
def test_the_two_parts_add_up_and_do_not_mix(dim, seed):
    basis, z = embedding(dim).double(), normal(50, dim, seed=seed)
    on, off = plane_parts(z, basis)
    assert torch.allclose(on.square().sum(1) + off.square().sum(1), z.square().sum(1), atol=1e-4)
    assert torch.allclose(on @ basis.mT + off, z) and (off @ basis).abs().max() < 1e-5
    assert off_energy(on @ basis.mT, basis) < 1e-10
    assert math.isclose(off_energy(z, basis), max(1, dim - 2) * off_energy(z, basis, per_coordinate=True), abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), SEEDS)
def test_another_basis_of_the_same_plane_changes_no_measure(dim, seed):
    basis, z = embedding(dim).double(), normal(64, dim, seed=seed)
    turned, data = basis @ rotation(seed), normal(256, 2, seed=seed + 1)
    assert math.isclose(off_energy(z, basis), off_energy(z, turned), rel_tol=1e-6)
    here, there = plane_parts(z, basis)[0], plane_parts(z, turned)[0]
    moved = data @ rotation(seed)
    assert math.isclose(stray_distance(here, data), stray_distance(there, moved), rel_tol=1e-6)
    # 64 directions stand for all; a rotation looks along others
    assert math.isclose(sliced_distance(here, data), sliced_distance(there, moved), rel_tol=0.01)


def test_noise_has_its_share_off_the_plane():
    z, basis = normal(4000, 32), embedding(32).double()
    assert off_energy(z, basis, per_coordinate=True) == pytest.approx(1, abs=0.02)
    assert off_energy(z, basis) == pytest.approx(30, abs=0.6)


# data


@pytest.mark.parametrize("data", DATA)
def test_data_are_standardised_and_counted(data):
    points = draw_points(data, 50_000, generator(3, 0, "points"))
    assert points.mean(0).abs().max() < 0.02 and (points.square().mean(0) - 1).abs().max() < 0.02
    again = [draw_points(data, 100, generator(3, step, "points")) for step in (0, 1, 0)]
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([3, 8, 64]), st.integers(0, 50))
def test_starts_are_normal_and_alike_on_the_plane(dim, seed):
    start, flat = toy_start(ToyConfig(dim=dim, seed=seed), 1024), toy_start(ToyConfig(dim=2, seed=seed), 1024)
    assert torch.allclose(start @ embedding(dim), flat @ embedding(2), atol=1e-4)
    assert (start.std(0) - 1).abs().max() < 0.12 and start.mean(0).abs().max() < 0.16
    assert torch.isfinite(start).all()


# measures


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_a_shift_is_measured_as_what_it_is(seed, dx, dy):
    points = normal(128, 2, seed=seed)
    shift = torch.tensor([dx, dy], dtype=torch.float64)
    assert sliced_distance(points + shift, points) == pytest.approx(float(shift.norm()) / 2**0.5, abs=1e-6)
    assert stray_distance(points + shift, points) <= float(shift.norm()) + 1e-6
    assert sliced_distance(points, points.repeat(3, 1)) < 1e-7 and stray_distance(points, points.flip(0)) < 1e-6


def test_quantiles_are_not_invented():
    with pytest.raises(ValueError, match="250 points are no multiple of 100"):
        sliced_distance(normal(100, 2), normal(250, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=2, max_size=12))
def test_leaving_is_for_good(values):
    excess = torch.tensor([0.0, *values], dtype=torch.float64)[:, None]
    t = torch.linspace(1, 0, len(excess), dtype=torch.float64)
    time = leaving_time(Flow(t, torch.zeros(len(t), 1, 2), excess, excess)).item()
    assert 0 <= time <= 1
    assert (time > 0) == (values[-1] > LEFT)
    assert (excess[t < time - 1e-9] > LEFT).all()  # from then on it stays outside
    earlier = excess[t > time]
    assert time in (0, 1) or not len(earlier) or earlier[-1] <= LEFT


# the exact flow


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([3, 8, 40]), st.integers(1, 6), st.integers(0, 100), st.sampled_from([5, 20, 33]))
def test_the_exact_flow_only_shrinks_off_the_plane(dim, count, seed, steps):
    points = draw_points("spiral", count, generator(seed, 0, "few"))
    config = ToyConfig(dim=dim, seed=seed, clamp=0.001)
    flow = watch_flow(ExactNet(points, embedding(dim)), config, 16, steps)
    assert flow.t.tolist() == pytest.approx(np.linspace(1, 0, steps + 1).tolist())
    assert flow.excess.max() < 1e-5
    assert torch.allclose(flow.off, flow.t[:, None] * flow.off[:1], atol=1e-5)
    assert leaving_time(flow).tolist() == [0] * 16


def test_the_exact_denoiser_of_one_point_knows_it():
    point = draw_points("moons", 1, generator(0, 0, "one"))
    flow = watch_flow(ExactNet(point, embedding(8)), ToyConfig(dim=8), 32)
    assert torch.allclose(flow.on[-1], point.expand(32, 2), atol=1e-5) and flow.off[-1].max() < 1e-6


def test_the_exact_denoiser_weighs_points_as_bayes_does():
    points, basis, t = normal(5, 2), embedding(2).double(), 0.4
    z = normal(7, 2, seed=1)
    given_z = torch.exp(-0.5 * ((z[:, None] @ basis - (1 - t) * points).norm(dim=2) / t) ** 2)
    mean = given_z @ points / given_z.sum(1, keepdim=True)
    found = ExactNet(points, basis)(z, torch.full((7,), t)).prediction @ basis
    assert torch.allclose(found, mean, atol=1e-5)


def test_no_network_beats_the_exact_one_on_the_plane():
    config, times = ToyConfig(dim=8, width=32, steps=60), torch.tensor([0.2, 0.5, 0.8])
    dense = ExactNet(draw_points("spiral", 4096, generator(0, 0, "dense")), embedding(8))
    least = error_split(dense, config, times, 1024)
    on, off = error_split(trained_toy(config), config, times, 1024)
    assert (least[0] < on).all() and (least[1] < 1e-9).all() and (off > 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_parts_of_the_error_are_the_whole_error(prediction):
    config = replace(TINY, prediction=prediction)
    net, t = trained_toy(config), 0.3
    on, off = error_split(net, config, torch.tensor([t]), 64)
    x = draw_points("spiral", 64, generator(0, 0, "test points")).double() @ embedding(6).double().mT
    noise = torch.randn(64, 6, generator=generator(0, 0, "test noise")).double()
    times = torch.full((64,), t)
    x_t = interpolate(x, noise, times)
    with torch.no_grad():
        out = net(x_t.float(), times).prediction.double()
    implied = {"x": out, "eps": (x_t - t * out) / (1 - t), "v": x_t - t * out}[prediction]
    assert float(on + off) == pytest.approx(float((implied - x).square().sum(1).mean()), rel=1e-4)


# training


@pytest.mark.parametrize(
    "change", [{"prediction": "eps"}, {"prediction": "v"}, {"width": 7}, {"lr": 0.1}, {"layers": 3}]
)
def test_paired_cases_see_the_same_draws(change):
    other = replace(TINY, **change)
    for step in (0, 5):
        assert all(torch.equal(a, b) for a, b in zip(draw_batch(TINY, step), draw_batch(other, step)))
    assert torch.equal(toy_start(TINY, 8), toy_start(other, 8))
    if "prediction" in change:
        weights = (begin_toy(config).net.state_dict().values() for config in (TINY, other))
        assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_seeds_and_steps_see_other_draws():
    draws = [draw_batch(TINY, 0), draw_batch(TINY, 1), draw_batch(replace(TINY, seed=1), 0)]
    for i in range(3):
        assert not torch.equal(draws[0][i], draws[1][i]) and not torch.equal(draws[0][i], draws[2][i])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_training_goes_on_where_it_stopped(prediction):
    config = replace(TINY, prediction=prediction)
    whole, parts = [now.loss for now in train_toy(begin_toy(config))], []
    progress = begin_toy(config)
    while progress.step < config.steps:
        for now in train_toy(progress):
            parts.append(now.loss)
            if now.step % 5 == 0:
                break
    assert parts == whole and len(whole) == config.steps
    assert list(train_toy(progress)) == []


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained_toy(TINY)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_falls(prediction):
    losses = [now.loss for now in train_toy(begin_toy(ToyConfig(dim=4, width=64, prediction=prediction, steps=200)))]
    assert np.mean(losses[-30:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("dim, width", [(16, 4), (12, 1), (20, 9)])
def test_a_narrow_velocity_keeps_the_noise_that_it_cannot_reach(dim, width):
    """Whatever the weights: here they are random, and large."""
    config = ToyConfig(dim=dim, width=width, prediction="v")
    net = begin_toy(config).net
    torch.nn.init.normal_(net.layers[-1].weight, generator=generator(0, 0, "large"))
    bias, weight = net.layers[-1].bias, net.layers[-1].weight.double()
    start = toy_start(config, 2048).double()
    span = torch.linalg.qr(torch.cat([weight, embedding(dim).double(), bias.double()[:, None]], 1)).Q
    unreached = (start - start @ span @ span.mT).square().sum(1).mean().item()
    energy = watch_flow(net, config).off[-1].square().mean().item()
    assert energy >= unreached * (1 - 1e-6) and unreached > 0.9 * (least_energy(dim, width) - 1)


# errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"data": "spirals"}, "unknown data 'spirals'. Did you mean 'spiral'"),
        ({"prediction": "noise"}, "unknown prediction 'noise'.*Valid: x, eps, v"),
        ({"loss_space": "u"}, "unknown loss_space 'u'"),
        ({"dim": 1}, "dim 1 is too small: expected at least 2"),
        ({"layers": 1}, "layers 1 is too small: expected at least 2"),
        ({"steps": 0}, "steps 0 is too small"),
        ({"width": 0}, "width 0 is too small"),
        ({"batch": 0}, "batch 0 is too small"),
        ({"lr": 0.0}, "lr 0.0 must be positive"),
        ({"lr": math.nan}, "lr nan must be positive"),
        ({"clamp": 0.0}, "clamp 0.0 must lie between 0 and 1"),
        ({"clamp": 1.0}, "clamp 1.0 must lie between 0 and 1"),
    ],
)
def test_a_wrong_case_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ToyConfig(**wrong)


def test_a_plane_needs_two_dimensions():
    with pytest.raises(ValueError, match="dim 1 holds no plane"):
        embedding(1)


# the survey


def small_cases(seeds=(0, 1)):
    return [replace(TINY, prediction=p, seed=s) for s in seeds for p in ("x", "v")]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_survey_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = survey_toy(small_cases(), tmp_path / "whole.json", 64)
    survey_toy(small_cases((0,)), tmp_path / "parts.json", 64)
    parts = survey_toy(small_cases(), tmp_path / "parts.json", 64)
    assert without_time(parts) == without_time(whole)
    monkeypatch.setattr(manifold_survey, "case_row", None)  # nothing may be trained any more
    assert survey_toy(small_cases(), tmp_path / "parts.json", 64) == parts
    assert load_rows(tmp_path / "parts.json") == parts


def test_rows_are_json_and_can_be_compared(tmp_path):
    rows = survey_toy(small_cases(), tmp_path / "rows.json", 64)
    json.dumps(rows, allow_nan=False)
    same = {name: getattr(TINY, name) for name in ("dim", "width", "steps", "batch")}
    ours, theirs = pick(rows, **same), pick(rows, prediction="v", **same)
    assert [row["seed"] for row in ours] == [0, 1] and pick(rows) == []
    ratio, low, high = paired_ratio(theirs, ours, "off")
    assert low < ratio < high and ratio == pytest.approx(1 / paired_ratio(ours, theirs, "off")[0])
    assert set(comparison(rows, "on", "x", {})["arm"]) == {"x", "v"}


def test_an_identity_names_one_case():
    cases = list(dict.fromkeys([*sample_cases(), *diagram_cases(), *control_cases()]))
    assert len({toy_identity(case) for case in cases}) == len(cases)
    assert toy_identity(TINY) == toy_identity(ToyConfig(**asdict(TINY)))


def test_flows_are_sampled_in_float32(monkeypatch):
    """Tables hold what is seen in them."""
    net, config = begin_toy(ToyConfig(dim=2, width=8)).net, ToyConfig(dim=2)
    net.requires_grad_(False).apply(lambda m: hasattr(m, "weight") and m.weight.add_(0.1 * torch.randn_like(m.weight)))
    flows = []
    for native in (False, True):
        monkeypatch.setattr(devices, "native_bfloat16", lambda device, native=native: native)
        flows.append(watch_flow(net, config, 16, 4))
    assert torch.equal(flows[0].on, flows[1].on)


def test_only_what_is_shown_is_kept(tmp_path):
    flow = watch_flow(begin_toy(ToyConfig(dim=2, width=4)).net, ToyConfig(dim=2), 16, 4)
    for config in (
        ToyConfig(dim=2),
        ToyConfig("moons", 2),
        ToyConfig(dim=2, seed=1),
        replace(ToyConfig(dim=2), width=8),
    ):
        manifold_survey.keep_flow(tmp_path / "flows.npz", config, flow)
    kept = load_flows(tmp_path / "flows.npz")
    assert {name: places.shape for name, places in kept.items()} == {"spiral-2-x": (5, 16, 2), "moons-2-x": (1, 16, 2)}
    assert np.allclose(kept["spiral-2-x"], flow.on.numpy(), atol=2e-3)


# what is seen


def film(times=5):
    nets = {p: begin_toy(replace(TINY, prediction=p)) for p in PREDICTIONS}
    flows = {p: watch_flow(now.net, now.config, 64, times - 1) for p, now in nets.items()}
    return manifold_film.make_film({6: flows, 8: flows})


def test_the_player_shows_the_exact_way_and_three_predictions():
    shown = film()
    views = [manifold_film.view(shown, 0, time) for time in range(5)]
    assert [panel.colour for panel in views[0].panels] == [plots.INK, *plots.PALETTE[:3]]
    for time, panels in enumerate(views):
        assert panels.curve.marker == shown.times[time] and (np.diff(panels.curve.x) > 0).all()
        figure = plotly_figure.figure(panels)
        assert [trace.type for trace in figure.data] == plotly_figure.kinds(panels)
    starts = [panel.points[:64] for panel in views[0].panels]
    assert all(np.allclose(points, starts[0], atol=1e-5) for points in starts)


def test_the_player_fits_a_page_and_a_paper():
    shown = film(21)
    player = manifold_film.player(shown)
    views = [player.view(**player.defaults() | {"time": time}) for time in player.slider().values]
    assert len(plotly_figure.film(views, 10).to_json()) < 600_000
    assert len(plots.png(player.strip())) <= 100_000


def test_clouds_out_of_sight_are_told():
    assert manifold_figures.outside(np.zeros((10, 2))) == ""
    assert manifold_figures.outside(np.full((3, 2), 9.0)) == "all outside"
    assert manifold_figures.outside(np.array([[0, 0], [0, 9.0]])) == "50% outside"


def test_an_unknown_flow_or_metric_is_refused():
    with pytest.raises(ValueError, match="unknown flow 'spiral-2-x'"):
        manifold_figures.samples_figure({})
    with pytest.raises(ValueError, match="unknown metric 'of'. Did you mean 'off'"):
        manifold_figures.diagram([], "x", "of")


def test_a_diagram_has_holes_where_nothing_is_known():
    rows = [{**asdict(ToyConfig(dim=8, width=32, seed=seed)), "off": value} for seed, value in ((0, 6.0), (1, 24.0))]
    grid = manifold_figures.diagram(rows, "x", "off", (8, 32), (32, 64))
    assert grid[0, 0] == pytest.approx(12 / 6) and np.isnan(grid).sum() == 3


def made_up_row(seed=0, **change):
    row = {"seed": seed, "off": 3.0, "stray": 0.2, "left": 0.5, "leaving": 0.9, "on": 0.1, "excess": [0.0, 1.0, 2.0]}
    return row | asdict(ToyConfig(**change, seed=seed))


def test_all_cases_are_there_once_and_a_seed_is_a_part_of_them():
    every = survey_cases()
    assert len(set(every)) == len(every) and {*sample_cases(), *diagram_cases(), *control_cases()} == set(every)
    assert set(survey_cases(1)) == {case for case in every if case.seed == 0} and len(survey_cases(1)) < len(every)


def test_energies_are_per_coordinate_beside_their_bound():
    rows = [made_up_row(seed, dim=12, width=4, prediction="v") | {"off": off} for seed, off in enumerate((1.0, 4.0))]
    told = energies(rows)
    assert told["energy per coordinate"] == pytest.approx(2 / 10) and told["least for the width"] == 6 / 10
    assert (told["seeds"], told["share that leaves"]) == (2, 0.5)
    assert energies([row | {"prediction": "x"} for row in rows])["least for the width"] == 0
    assert np.isnan(energies([row | {"prediction": "eps"} for row in rows])["least for the width"])


def test_one_seed_has_a_ratio_and_no_interval():
    ratio, low, high = paired_ratio([{"seed": 0, "off": 6.0}], [{"seed": 0, "off": 2.0}], "off")
    assert ratio == pytest.approx(3) and math.isnan(low) and math.isnan(high)


def test_marks_of_leaving_do_not_hide_one_another():
    """Both leave at once: a ring around a dot."""
    rows = [made_up_row(dim=8, prediction=prediction) for prediction in PREDICTIONS]
    axis = manifold_figures.excess_figure(rows, dims=(8,)).axes[0]
    marks = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    sizes = [(line.get_markersize(), line.get_markerfacecolor()) for line in marks]
    assert len(marks) == 3 and sizes[1][0] > sizes[2][0] and sizes[1][1] == "none"


def test_samples_are_drawn_of_any_data_with_both_coordinates_named():
    flows = {manifold_survey.flow_name("moons", 8, p): np.zeros((1, 5, 2)) for p in PREDICTIONS}
    figure = manifold_figures.samples_figure(flows, "moons", (8,))
    assert figure.get_suptitle() == "moons" and figure.get_supylabel() == "second coordinate"
    assert "first coordinate" in figure.get_supxlabel()
