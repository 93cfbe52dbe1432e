"""Prediction targets: weights, splits and tables that must add up, films that are exact, and settings that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.seeding import generator
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.interpolants import INTERPOLANTS, convert, interpolate
from maskalign_lab.diffusion.objectives import (
    Objective,
    check_trainable,
    check_velocity,
    denoising_loss,
    draw_time,
    predicted_velocity,
)
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.measure.metrics import validation_loss
from maskalign_lab.prediction_targets import KINDS, OneImage, fit_one, main_effects, space_weight
from maskalign_lab.runs.evaluation import at_side
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import NAMED, make_recipe
from maskalign_lab.runs.run import build, load_run, train
from maskalign_lab.studies.prediction_targets import arms, measures
from maskalign_lab.studies.prediction_targets.arms import SCALES, film_arms, sheet, sheet_arms, target_arm
from maskalign_lab.studies.prediction_targets.figures import (
    nine_figure,
    nine_table,
    sheet_figure,
    size_figure,
    width_figure,
)
from maskalign_lab.studies.prediction_targets.film import (
    film_of_run,
    from_levels,
    limit,
    load_film,
    make_film,
    noise_of,
    said_at,
    save_film,
    seen,
    to_levels,
    view,
)
from maskalign_lab.studies.prediction_targets.measures import measure_target, split_error, versus_x
from maskalign_lab.training.methods import INSTALLED, Batch, State

kinds = st.sampled_from(KINDS)


def tiny(kind="x", space="v", size=32, detail="true", more=""):
    overrides = f"objective.clamp=0.05 network.width=16 network.depth=2 data.n=64 training.steps=3 {more}"
    return target_arm(kind, space, size, detail).recipe("smoke", overrides=overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A network of each prediction, hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    return {(kind, "v", 32): load_run(train(tiny(kind), folder / kind, "cpu", 0)) for kind in KINDS}


# ---- the axis: nine combinations, any network and method


NAMES = {  # every method and network -> what it needs to be small
    "sit": "", "repa": "", "reg": "", "maskalign": "", "mask-loss": "", "mask-input": "", "mask-attention": "", "irepa": "", "sra2": "",
    "haste": "method.student_blocks=(1,2)", "ahpa": "data.autoencoder= data.size=32 network.patch_size=4",
    "jit": "network.context_start=1",
    "ditdh": "data.autoencoder= network.patch_size=4 network.head_width=24 network.head_heads=3",
    "dsd": "network.patch_size=4 method.depth=2",
}  # fmt: skip


def test_no_method_is_forgotten():
    installed = {name for name, method in INSTALLED.items() if method.__module__.startswith("maskalign_lab")}
    assert installed | NAMED.keys() == NAMES.keys()


@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_trains_every_method_and_network(kind, space):
    """One step each: a finite loss whose gradient reaches the network."""
    g = torch.Generator().manual_seed(0)
    shapes = (4, 3, 32, 32), (4, 64, 12), (4, 12), (4, 2, 2, 64, 64), (4, 4, 64, 16)
    x, *given = (torch.randn(shape, generator=g) for shape in shapes)  # features, class token, attention, levels
    batch = Batch(x, torch.arange(4), *given)
    for name, more in NAMES.items():
        sized = "network.width=16 network.depth=3 network.heads=2"
        objective = f"objective.prediction={kind} objective.loss_space={space} objective.clamp=0.05"
        net, method = build(make_recipe(name, "smoke", overrides=f"{sized} {objective} {more}"), Facts(10, (12,)))
        draw = method.draw(batch, 0, lambda step, what: generator(0, step, what))
        loss = method.loss(State(net, net, 0), batch, draw).total
        loss.backward()
        assert loss.isfinite() and net.final_layer.linear.weight.grad.abs().sum() > 0, name


@settings(max_examples=60, deadline=None)
@given(kinds, kinds, st.sampled_from(sorted(set(INTERPOLANTS) - {"vp"})), st.floats(0.06, 0.94), st.integers(0, 99))
def test_a_loss_space_is_a_weight_of_time(kind, space, path, t, seed):
    x, noise, error = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = torch.tensor([t], dtype=torch.float64)
    x_t = interpolate(x, noise, times, path)
    guess = convert(x + error, "x", kind, x_t, times, path)
    loss = denoising_loss(Objective(path, kind, space), guess, x, noise, times)
    torch.testing.assert_close(loss, space_weight(space, times, path) * error.square().mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "t", "divisor"), [("x", 0.0, "sigma"), ("eps", 1.0, "alpha")])
def test_times_without_a_velocity_are_refused(kind, t, divisor):
    with pytest.raises(
        ValueError, match=f"{kind}-prediction at t = {t:g} divides by {divisor} = 0; set objective.clamp"
    ):
        check_velocity(Objective(prediction=kind), t)
    check_velocity(Objective(prediction=kind, clamp=0.05), t)
    check_velocity(Objective(prediction=kind), 1 - t)


def test_sampling_noise_prediction_without_a_clamp_is_refused_before_it_starts(runs):
    net = runs["eps", "v", 32].net
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="eps-prediction at t = 1"):
        last_sample(net, Objective(prediction="eps", loss_space="eps"), torch.tensor([1]))
    with pytest.raises(ValueError, match="x-prediction at t = 0"):
        last_sample(net, Objective(prediction="x", loss_space="x"), torch.tensor([1]), SamplerConfig("dopri5"))
    assert not calls
    last_sample(net, runs["eps", "v", 32].recipe.objective, torch.tensor([1]), SamplerConfig(steps=1))
    handle.remove()
    assert calls  # the hook does count


@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_losses_without_a_mean_are_refused(kind, space):
    """x must not be divided by a t that may be 0, nor eps by an alpha that may be; the law or a clamp helps."""
    refused = kind != "v" and space != kind
    objective = Objective(prediction=kind, loss_space=space)
    if refused:
        with pytest.raises(ValueError, match="uniform times come that near"):
            check_trainable(objective)
        with pytest.raises(ValueError, match="uniform times come that near"):
            given = f"objective.prediction={kind} objective.loss_space={space}"
            build(make_recipe("sit", "smoke", overrides=given), Facts(10))
    else:
        check_trainable(objective)
    check_trainable(Objective(prediction=kind, loss_space=space, clamp=0.05))
    check_trainable(Objective(prediction=kind, loss_space=space, time_law="logit-normal"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective.prediction=y", "unknown prediction 'y'"),
        ("objective.loss_space=velocity", "unknown loss_space"),
        ("objective.clamp=1.5", r"objective.clamp=1.5 must be in \[0, 1\)"),
        ("objective.noise_scale=0", "objective.noise_scale=0.0 must be above 0"),
        ("network.name=jitt", "Did you mean 'jit'"),
    ],
)
def test_bad_objectives_and_networks_are_refused_with_the_value(text, message):
    with pytest.raises(ValueError, match=message):
        make_recipe("sit", "smoke", overrides=text)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="size 30 is no multiple of 4 tokens"):
        target_arm("x", size=30)
    with pytest.raises(ValueError, match="patch_size 5 does not divide input_size 32"):
        build(make_recipe("jit", "smoke", overrides="network.patch_size=5"), Facts(10))


# ---- what is measured


def test_the_common_axis_is_the_velocity_loss_at_the_same_times(runs):
    """velocity = x error / t^2, whatever is predicted; a perfect network has none of either."""
    for run in runs.values():
        found = measure_target(run, 16)
        by_hand = np.mean(np.array(found["x error per t"]) / np.array(measures.TIMES) ** 2)
        assert found["velocity"] == pytest.approx(by_hand, rel=1e-2)
        assert len(found["rank per t"]) == 10 and all(0 < rank <= 256 for rank in found["rank per t"])
        json.dumps(found)


def test_implied_errors_are_the_validation_loss(runs):
    """Two independent paths to one quantity, with noises of their own: E ||v-hat - v||^2 of a hardly trained network."""
    run = runs["v", "v", 32]
    held_out = run.images("validation", 64)
    x, y = held_out.images(), torch.as_tensor(held_out.labels)
    mean = validation_loss(run.net, run.recipe.objective, x, y, bins=10).mean(1)
    guesses = [measures.implied(run, x, y, t)[1] for t in measures.TIMES]
    at_times = [(guess - x).square().mean() / t**2 for guess, t in zip(guesses, measures.TIMES, strict=True)]
    torch.testing.assert_close(torch.stack(at_times), mean, rtol=0.03, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_the_split_of_an_error_adds_up_and_the_plane_is_closed(block, seed):
    error = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    inside, across = split_error(error, block)
    torch.testing.assert_close(inside + across, error.square().flatten(1).mean(1))
    flat = error[..., ::block, ::block].repeat_interleave(block, 2).repeat_interleave(block, 3)
    assert split_error(flat, block)[1].max() < 1e-10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=9, max_size=9), st.floats(0.1, 10))
def test_main_effects_add_up_and_do_not_know_the_unit(values, unit):
    table = np.array(values).reshape(3, 3)
    shares = main_effects(table)
    assert all(share >= -1e-12 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1) or np.ptp(np.log(table)) < 1e-6
    if np.ptp(np.log(table)) > 1e-3:
        assert main_effects(table * unit) == pytest.approx(shares, abs=1e-6)
        swapped = main_effects(table.T)
        assert swapped["prediction"] == pytest.approx(shares["loss space"], abs=1e-9)


def test_main_effects_refuse_what_has_no_logarithm():
    with pytest.raises(ValueError, match="positive"):
        main_effects(np.array([[1.0, 0.0], [2.0, 1.0]]))


def test_images_of_all_sizes_come_to_the_judges_size():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert at_side(x, 2).flatten().tolist() == [0, 2, 8, 10]
    assert torch.equal(at_side(at_side(x, 8), 4), x) and at_side(x, 8).shape[-1] == 8


# ---- width against dimension


@pytest.mark.parametrize("width", [8, 16])
def test_a_velocity_wider_than_the_network_is_missed_by_the_bound(width):
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    case = OneImage("v", width, 16, steps=120)
    assert case.token_dim == 48 and case.bound == pytest.approx(1 - width / 48)
    assert case.bound * 0.95 < fit_one(case, image)


def test_an_image_itself_is_not_bound_by_the_width():
    """16 tokens of one image need 15 directions and a bias, however many values they have."""
    image = load_dataset("shapes", 32, n=1).images()[0]
    case = OneImage("x", 16, 32, steps=150)
    assert case.bound > 0.9 and fit_one(case, image) < 0.3


# ---- tables and films


def test_the_verdict_is_a_factor_and_follows_the_rule():
    rows = [
        {"arm": target_arm(kind, "v", size).name, "seed": seed, "x error": value * (1 + 0.02 * seed * (kind == "v")),
         "velocity": 1 / value}
        for seed in range(3)
        for size in (16, 128)
        for kind, value in (("x", 1.0), ("v", 1.0 if size == 16 else 9.0))
    ]  # fmt: skip
    table = versus_x(rows).set_index("size")
    large, small = table.loc["128 px"], table.loc["16 px"]
    assert large["error of x̂: verdict"] == "reproduced" and 9 < large["error of x̂ / x's"] < 9.5
    assert large["v-loss: verdict"] == "contradicted" and large["v-loss / x's"] == pytest.approx(1 / 9)
    assert "undecided" in small["error of x̂: verdict"]
    assert (table["error of x̂, low"] < table["error of x̂ / x's"]).all()
    assert (
        versus_x(rows, width=3072).set_index("size").loc["128 px", "v-loss: verdict"] == "lower"
    )  # nothing is claimed


@pytest.mark.parametrize(("size", "width", "claim"), [(16, 0, 0), (32, 0, 1), (32, 192, 0), (64, 192, 1)])
def test_x_is_claimed_to_be_better_where_noise_does_not_fit(size, width, claim):
    assert measures.claimed(target_arm("v", "v", size, width=width).name) == claim


def test_weights_of_times_are_how_often_they_are_drawn():
    for objective in (make_recipe("jit").objective, Objective()):
        drawn = draw_time(objective, 400_000, torch.Generator().manual_seed(0))
        near = np.array([(drawn - t).abs().lt(0.01).sum().item() for t in measures.TIMES])
        np.testing.assert_allclose(measures.law_weights(objective), near / near.sum(), atol=0.005)


def test_the_loss_over_jits_times_hardly_sees_the_clean_end():
    flat = np.square(measures.TIMES)
    errors = [flat, np.r_[100 * flat[:1], flat[1:]]]  # a hundred times the error at t = 0.05
    rows = measures.with_jits_times([{"seed": i, "x error per t": each} for i, each in enumerate(errors)])
    first, second = (row["velocity, JiT's times"] for row in rows)
    assert first == pytest.approx(1) and second == pytest.approx(1, abs=0.005) and rows[1]["seed"] == 1


def test_arms_of_matched_noise_and_of_other_widths_stand_beside_their_own_x():
    for special in ({"detail": "matched"}, {"width": 192}):
        arms = {kind: target_arm(kind, "v", 64, **special) for kind in ("x", "v")}
        rows = [
            {"arm": arm.name, "seed": 0, "x error": error, "velocity": error}
            for kind, error in (("x", 1.0), ("v", 3.0))
            for arm in (arms[kind], target_arm(kind, "v", 64))
        ]
        rows[1]["x error"] = 100.0  # the plain x; nobody must take it for the baseline
        table = versus_x(rows).set_index("detail")
        (name,) = set(table.index) - {"true"}
        assert table.loc[name, "error of x̂ / x's"] == pytest.approx(3)
    matched, wide = (
        target_arm("v", "v", 64, **special).recipe("laptop") for special in ({"detail": "matched"}, {"width": 192})
    )
    assert (matched.data.detail, matched.objective.noise_scale) == (16, 4)
    assert (wide.network.width, wide.network.heads, wide.objective.noise_scale) == (192, 6, 1)


@pytest.mark.parametrize("noise_scale", [1.0, 3.0])
@pytest.mark.parametrize("metric", ["x error", "velocity"])
def test_the_bound_of_the_width_is_what_the_best_network_reaches(metric, noise_scale):
    """A network that knows the image and passes on the noise along d of n directions misses exactly the bound."""
    n, d = 48, 16
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q[:, :d]
    x, noise = torch.randn(2, 4000, n, generator=draw, dtype=torch.float64)
    noise = noise_scale * noise
    passed = noise @ basis @ basis.mT
    for kind, said in (("v", passed - x), ("eps", passed)):
        found = []
        for time in measures.TIMES:
            t = torch.full((len(x),), time, dtype=torch.float64)
            error = (convert(said, kind, "x", interpolate(x, noise, t), t) - x).square().mean()
            found.append(error if metric == "x error" else error / time**2)
        bound = measures.width_bound(kind, metric, d, n, noise_scale)
        assert torch.stack(found).mean().item() == pytest.approx(bound, rel=0.02)
    assert measures.width_bound("x", metric, d, n) == measures.width_bound("v", metric, n, n) == 0


def test_a_film_is_exact_up_to_its_levels(runs, tmp_path):
    """What is seen is what the network said, to half a level; its errors are those before anything was rounded."""
    film = load_film(save_film(make_film(runs, shown=2, images=4), tmp_path / "film.npz"))
    assert film.predictions() == list(KINDS) and film.trained() == [("v", 32)] and film.patches == {32: 8}
    for kind, run in zip(KINDS, runs.values(), strict=True):
        truth, noise = run.images("validation", 100), noise_of(film, 32)[:1]
        x = truth.subset(np.array([int(np.flatnonzero(truth.labels == truth.labels.min())[0])])).images()
        label = torch.tensor([truth.labels.min()])
        for time in (0, len(film.times) - 1):
            found = seen(film, 0, time, kind, ("v", 32))
            out, implied = said_at(run, x, label, noise, film.times[time])
            assert (out[0] - found[f"{kind}-hat"]).abs().max() <= 1.001 * limit(kind, 1.0) / 255
            for other, wrong in zip(KINDS, film.wrong[kind, "v", 32][0, time].tolist(), strict=True):
                right = {"x": x, "eps": noise, "v": noise - x}[other]
                assert (implied[other] - right).square().mean().item() == pytest.approx(wrong, rel=1e-4)


def test_an_estimate_far_beyond_the_levels_of_an_image_is_seen(runs, tmp_path):
    """At t = 0.95 the x-hat of a predicted noise is 19 times its error away, and its noise looks like what it is."""
    film = make_film(runs, shown=1, images=4)
    found, last = seen(film, 0, len(film.times) - 1, "eps", ("v", 32)), film.wrong["eps", "v", 32][0, -1].tolist()
    assert found["x-hat"].abs().max() > 10
    for kind, wrong in zip(KINDS, last, strict=True):
        assert (found[f"{kind}-hat"] - found[kind]).square().mean().item() == pytest.approx(wrong, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1.0, 2.0, 5.0]), st.lists(st.floats(-9, 9), min_size=1, max_size=20))
def test_levels_are_near_and_bounded(reach, values):
    values = torch.tensor(values)
    back = from_levels(to_levels(values, reach), reach)
    assert (back - values.clamp(-reach, reach)).abs().max() <= 1.001 * reach / 255


def test_a_film_of_one_run_keeps_its_noise_scale_and_class_tokens_are_refused(tmp_path):
    run = load_run(train(tiny("x", more="objective.noise_scale=2.0"), tmp_path / "loud", "cpu", 0))
    film = film_of_run(run, 2)
    assert film.noise_scale == 2 and noise_of(film, 32).std() > 1.5
    with pytest.raises(ValueError, match="needs a class token"):
        film_of_run(load_run("reg-shapes"))


def test_a_film_of_a_run_has_the_runs_own_patches(tmp_path):
    """A run with 8 x 8 tokens is told with its patch and its grid."""
    run = load_run(
        train(make_recipe("sit", "smoke", overrides="data.n=64 training.steps=2"), tmp_path / "own", "cpu", 0)
    )
    film = film_of_run(run, 1)
    panels = view(film, 0, 2, "v", ("v", 32))
    assert film.patches == {32: 4} and panels.panels[-1].values.shape == (8, 8) and "patches of 4" in panels.curve.title


def test_latents_and_mixed_objectives_are_refused_by_name(runs, tmp_path):
    run = runs["x", "v", 32]
    recipe = replace(run.recipe, data=replace(run.recipe.data, autoencoder="tiny"))
    with pytest.raises(ValueError, match="sees the latents of autoencoder 'tiny'"):
        film_of_run(replace(run, recipe=recipe))
    loud = replace(run.recipe, objective=replace(run.recipe.objective, noise_scale=2.0))
    with pytest.raises(ValueError, match="one noise_scale, and its runs have 1.0 and 2.0"):
        make_film(runs | {("x", "x", 32): replace(run, recipe=loud)})


def test_presets_name_networks_that_the_film_can_hold():
    assert len(film_arms("laptop", 3)) == 36 and len(film_arms("gpu")) == 36 and len(film_arms("laptop")) == 3
    assert {arm.name for arm in arms.SCALES["smoke"].arms} <= {arm.name for arm in arms.ARMS}


def test_repeated_images_say_nothing_more(tmp_path):
    run = load_run(train(tiny("x", detail="repeated", size=64), tmp_path / "run", "cpu", 0))
    images = run.images("validation", 8).images()
    assert torch.equal(images[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), images)
    found = measure_target(run, 8)
    assert 0 < found["across"] <= found["x error"]


def test_predictions_agree_on_the_velocity_that_they_imply():
    x, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    x_t = interpolate(x, noise, t)
    for kind, truth in (("x", x), ("eps", noise), ("v", noise - x)):
        torch.testing.assert_close(predicted_velocity(Objective(prediction=kind), truth, x_t, t), noise - x)


# ---- spectrum and samples


def test_a_network_that_says_nothing_is_wrong_at_all_scales_alike(tmp_path):
    """An untrained network predicts x = 0, so its error is the image: the ratio of powers is 1 in every ring."""
    recipe = tiny("x", more="training.lr=1e-30")
    found = measure_target(load_run(train(recipe, tmp_path / "run", "cpu", 0)), 16)
    assert len(found["spectrum"]) == 17
    np.testing.assert_allclose(found["spectrum"], 1, rtol=1e-3)


def test_sheets_start_from_the_same_noise(runs):
    """Sheets are reproducible, in bytes, and networks of different predictions are first asked about one noise."""
    config, starts = SamplerConfig("euler", steps=2), {}
    for kind in KINDS:
        net, asked = runs[kind, "v", 32].net, []
        handle = net.register_forward_pre_hook(lambda _, given, asked=asked: asked.append(given[0].clone()))
        first, again = sheet(runs[kind, "v", 32], 3, config), sheet(runs[kind, "v", 32], 3, config)
        handle.remove()
        assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8 and np.array_equal(first, again)
        starts[kind] = asked[0]
    assert torch.equal(starts["x"], starts["eps"]) and torch.equal(starts["x"], starts["v"])
    assert not torch.equal(starts["x"][0], starts["x"][1])


@pytest.mark.parametrize("preset", SCALES)
def test_sheets_are_of_the_smallest_and_the_largest_size(preset):
    arms = sheet_arms(SCALES[preset])
    sizes = sorted({int(name.split("-")[1]) for name in arms})
    assert len(arms) == 6 and sizes == ([16, 32] if preset == "smoke" else [16, 128])
    for name, arm in arms.items():
        recipe = arm.recipe("smoke")
        assert name == f"{recipe.objective.prediction}-{recipe.data.size}" and recipe.objective.loss_space == "v"


@pytest.mark.parametrize("preset", SCALES)
def test_every_arm_and_every_jit_can_be_built(preset):
    """Names are unique, patches fit, heads divide widths, and JiT's parts are off one at a time."""
    scale = SCALES[preset]
    assert len({arm.name for arm in scale.arms}) == len(scale.arms)
    for arm in scale.arms:
        recipe = scale.recipe_of(preset, "shapes")(arm, 0)
        assert recipe.data.size == 4 * recipe.network.patch_size and recipe.network.width % recipe.network.heads == 0
        check_trainable(recipe.objective)
    whole, *parts = (scale.jit_recipe_of(preset, "shapes")(arm, 0) for arm in scale.jit_arms)
    assert whole.objective.noise_scale == whole.data.size / 256 and whole.network.context_start < whole.network.depth
    for part in parts:
        different = [name for name, value in vars(part.network).items() if value != getattr(whole.network, name)]
        assert len(different) == 1 and replace(part, network=whole.network) == whole


def test_what_a_table_costs_is_told_by_what_was_trained():
    rows = [{"arm": arms.ARMS[0].name, "seconds": 60.0}, {"arm": arms.ARMS[1].name, "seconds": 120.0}]
    rows.append({"arm": arms.ARMS[2].name, "seconds": 0.0})  # its run was there already
    assert arms.expected_minutes(arms.ARMS[:3], rows) == pytest.approx(1 + 2 + 1.5)


# ---- figures


def nine_rows(prediction=0.0, space=0.0):
    """Tables in which the prediction and the loss space count as told, in logarithms."""
    factors = {kind: i for i, kind in enumerate(KINDS)}
    return [
        {"arm": target_arm(kind, loss, size).name, "seed": seed, "velocity": 1.0, "spectrum": [1.0] * (size // 2 + 1),
         "x error": float(np.exp(prediction * factors[kind] + space * factors[loss]))}
        for size in (16, 128) for loss in KINDS for kind in KINDS for seed in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "told"), [({"prediction": 2.0}, "prediction"), ({"space": 2.0}, "loss space")])
def test_effects_of_a_table_name_what_made_it(given, told):
    shares = main_effects(nine_table(nine_rows(**given), "x error", 128))
    assert shares[told] == pytest.approx(1)


def test_maps_of_all_nine_share_one_scale():
    figure = nine_figure(nine_rows(1.0, 0.5), sizes=(16, 128))
    first, second, bar = figure.axes
    assert first.collections[0].norm is second.collections[0].norm and bar.get_ylabel() == "error of x̂"
    assert [text.get_text() for text in first.texts] == [text.get_text() for text in second.texts]
    assert len(first.texts) == 9 and first.get_title() == "16 px, 48 values a token"


def test_what_a_judge_did_not_say_is_not_made_up():
    rows = nine_rows()
    rows[0]["frechet"] = 3.0
    table = nine_table(rows, "frechet", 16)
    assert table[0, 0] == 3 and np.isnan(table).sum() == 8


def test_the_figure_of_the_width_draws_every_case_and_the_bound():
    rows = [
        vars(case) | {"token_dim": case.token_dim, "bound": case.bound, "loss": 0.1} for case in arms.ONE_IMAGE[:30]
    ]
    axis = width_figure(rows).axes[0]
    *points, bound = axis.lines
    assert sum(len(line.get_xdata()) for line in points) == 30 and len(points) == 6
    x, y = bound.get_data()
    np.testing.assert_allclose(y, np.clip(1 - x, 0, None))


def test_the_figure_of_sizes_shows_both_axes_and_matched_noise_if_it_was_trained():
    rows = [
        {"arm": target_arm(kind, "v", size, "true").name, "seed": 0, "x error": 2.0, "velocity": 3.0}
        for size in (16, 32)
        for kind in KINDS
    ]
    figure = size_figure(rows, 96)
    assert len(figure.axes) == 4 and [axis.get_ylabel() for axis in figure.axes[::2]] == [
        "error of x̂ (mean square)",
        "v-loss (mean square)",
    ]
    (dashed,) = [line for line in figure.axes[2].lines if line.get_label() == "least for the width"]
    assert dict(zip(*dashed.get_data(), strict=True))[192] == pytest.approx(0.5)
    more = [row | {"arm": target_arm(kind, "v", 32, "matched").name} for row, kind in zip(rows, KINDS)]
    assert len(size_figure(rows + more, 96).axes) == 6


def test_sheets_name_their_classes():
    sheets = {f"{kind}-16": np.zeros((2, 16, 16, 3), np.uint8) for kind in KINDS}
    titles = [axis.get_title() for axis in sheet_figure(sheets, 16, ["disc", "star", "more"]).axes]
    assert titles == ["disc", "star", "", "", "", ""]
