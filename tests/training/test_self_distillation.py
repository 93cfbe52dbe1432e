"""DSD: which gradients reach the encoder, what a view may change, and that a run trains, samples and is measured."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from shared.given import given, in_double, small
from torch.func import vmap

from maskalign_lab.base.seeding import generator
from maskalign_lab.cli import main
from maskalign_lab.diffusion.dsd import DSD
from maskalign_lab.diffusion.interpolants import TARGETS as MIXTURES
from maskalign_lab.diffusion.interpolants import coefficients, velocity
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.dsd import TARGETS, SelfDistillationConfig
from maskalign_lab.runs.building import build
from maskalign_lab.runs.evaluation import held_out_losses
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.dsd.courses import rank
from maskalign_lab.training.latent_terms import draw_hidden, latent_rank, spread, whitening
from maskalign_lab.training.methods import Plan, State, shard

BARE = (
    "method.alignment=0 method.deep=0 method.classification=0 method.perceptual=0 method.views=0 method.target=online"
)


def setting(more="", images=4):
    """Network, average, method, batch and draw, in float64; all weights are drawn."""
    net, method, batch, draw = given(small("dsd", more), images)
    ema = DSD(width=net.width, depth=net.depth, heads=2, latent_norm=net.latent_norm).double()
    ema.load_state_dict({name: value + 0.01 * value.sin() for name, value in net.state_dict().items()}, strict=False)
    return net, ema.requires_grad_(False), method, batch, draw


def encoder_gradient(more, part="distillation"):
    """What a part of the loss asks of the map that makes latents."""
    net, ema, method, batch, draw = setting(more)
    loss = method.loss(State(net, ema, 0), batch, draw).parts[part]
    return torch.autograd.grad(loss, net.latent_head.linear.weight, allow_unused=True)[0]


# ---- gradients


@pytest.mark.parametrize("predicts", TARGETS)
def test_no_gradient_of_the_distillation_reaches_the_encoder_if_none_is_asked_for(predicts):
    found = encoder_gradient(f"{BARE} method.gradient=none method.predicts={predicts}")
    assert found is None or found.abs().max() == 0
    assert encoder_gradient(f"{BARE} method.gradient=input method.predicts={predicts}").abs().max() > 0


def test_the_target_pulls_only_if_its_gradient_is_asked_for():
    """Of a loss whose input is the same, the two ways differ by the pull of the target; noise alone as target has none."""
    both, through = (encoder_gradient(f"{BARE} method.gradient={way} method.predicts=v") for way in ("both", "input"))
    assert (both - through).abs().max() > 1e-3 * both.abs().max()
    both, through = (encoder_gradient(f"{BARE} method.gradient={way} method.predicts=eps") for way in ("both", "input"))
    torch.testing.assert_close(both, through)


def test_the_velocity_head_teaches_nothing_but_itself():
    net, ema, method, batch, draw = setting()
    method.loss(State(net, ema, 0), batch, draw).parts["velocity"].backward()
    taught = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert taught == {"final_layer"}


def test_an_average_as_target_is_what_is_told_of_the_clean_image():
    net, ema, method, batch, draw = setting("method.perceptual=0")
    found = method.loss(State(net, ema, 0), batch, draw).parts["distillation"]
    z = net.encode(draw.view(batch.x), draw.hide).z
    t = draw.t[:, None, None, None]
    said, _ = net.distil((1 - t) * z + t * draw.noise, draw.t, draw.y)
    torch.testing.assert_close(found, (said - ema.encode(batch.x).z).square().mean())


@pytest.mark.parametrize("predicts", ["x", "eps", "v"])
def test_shares_on_the_linear_path_are_those_of_every_objective(predicts):
    t, like = torch.rand(5, dtype=torch.float64), torch.ones(5, 1, 1, 1, dtype=torch.float64)
    found = MIXTURES[predicts].mixture(coefficients("linear", t, like))
    for share, told in zip(found, TARGETS[predicts], strict=True):
        assert (torch.as_tensor(share) == told).all()


def test_another_path_has_its_own_velocity():
    _, _, method, _, draw = setting(f"{BARE} method.predicts=v objective.interpolant=cosine")
    z = torch.randn(draw.noise.shape, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(method.mixed(z, draw), velocity(z, draw.noise, draw.t, "cosine"))


def test_a_teacher_is_asked_only_by_parts_that_want_one():
    asked = {more: Plan(small("dsd", more).method).needs for more in ("", BARE, f"{BARE} method.adversarial=0.1")}
    assert list(asked.values()) == [{"features"}, set(), {"features"}]
    assert build(small("dsd", BARE), Facts(10))[1].representing.shallow is None


# ---- views


def test_only_images_that_are_shown_in_a_view_are_changed():
    _, _, _, batch, draw = setting("method.views=0.5", 32)
    same = (draw.view(batch.x) - batch.x).abs().flatten(1).amax(1) < 1e-12
    assert 8 < draw.shown.sum() < 24 and torch.equal(~draw.shown, same) and not draw.hide[~draw.shown].any()


def test_what_a_view_hid_is_not_asked_of_the_decoder_nor_of_the_velocity_head():
    net, ema, method, batch, draw = setting("method.views=0.5 method.perceptual=0", 16)
    other = replace(batch, x=torch.where(draw.shown[:, None, None, None], -batch.x, batch.x))
    before, after = (method.loss(State(net, ema, 0), each, draw).parts for each in (batch, other))
    for name in ("pixels", "velocity"):
        torch.testing.assert_close(before[name], after[name])
    assert not torch.isclose(before["distillation"], after["distillation"])


@pytest.mark.parametrize("more", ["", BARE, "method.rank=3 method.predicts=v"])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(more):
    net, ema, method, batch, draw = setting(f"method.perceptual=0 {more}", 8)
    whole = method.loss(State(net, ema, 0), batch, draw).total
    parts = [method.loss(State(net, ema, 0), shard(batch, k, 4), shard(draw, k, 4)).total for k in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert not method.indivisible


@settings(max_examples=30, deadline=None)
@drawn(st.integers(1, 8), st.floats(0, 0.75), st.integers(0, 99))
def test_a_view_hides_no_image_whole(side, most, seed):
    hidden = draw_hidden(64, side, most, torch.Generator().manual_seed(seed))
    assert hidden.shape == (64, side**2) and not hidden.all(1).any()
    assert most or not hidden.any()


# ---- what keeps latents apart


@settings(max_examples=30, deadline=None)
@drawn(st.floats(0.1, 4), st.integers(0, 99))
def test_spread_and_whitening_ignore_what_all_images_share(scale, seed):
    g = torch.Generator().manual_seed(seed)
    z, places = torch.randn(16, 4, 3, 3, generator=g).double(), torch.randn(4, 3, 3, generator=g).double()
    torch.testing.assert_close(spread(scale * z + places), scale * spread(z))
    torch.testing.assert_close(whitening(z + places), whitening(z))


@settings(max_examples=30, deadline=None)
@drawn(st.floats(0.1, 4), st.integers(0, 99))
def test_the_rank_of_a_step_is_that_of_the_tables(scale, seed):
    """Of any scale, whatever all images share, whether it is one of many or alone."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(16, 4, 3, 3, generator=g) * torch.tensor([1.0, 0.5, 0.1, 0.0]).view(4, 1, 1)
    assert latent_rank(z + 1).item() == pytest.approx(rank(z), rel=1e-3)
    torch.testing.assert_close(vmap(latent_rank)(torch.stack([z, 2 * z])), latent_rank(z).expand(2))


@pytest.mark.parametrize("name", ["floor", "whitening"])
def test_a_penalty_is_in_the_loss_if_it_has_a_weight(name):
    net, ema, method, batch, draw = setting(f"{BARE} method.{name}=2.0")
    found = method.loss(State(net, ema, 0), batch, draw)
    rest = sum(value for part, value in found.parts.items() if part not in (name, "spread", "rank"))
    torch.testing.assert_close(found.total, rest + 2 * found.parts[name])
    assert method.indivisible and name not in setting(BARE)[2].loss(State(net, ema, 0), batch, draw).parts


def test_a_prediction_through_few_channels_has_a_low_rank():
    net, ema, method, batch, draw = setting(f"{BARE} method.rank=2", 16)
    said, _ = net.distil(draw.noise, draw.t, draw.y)
    rows = method.low_pass(said.flatten(2).mT).flatten(0, 1)
    assert (
        torch.linalg.matrix_rank(rows - rows.mean(0)) <= 2 < torch.linalg.matrix_rank(said.flatten(2).mT.flatten(0, 1))
    )


# ---- errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"predicts": "z"}, "expected one of|Did you mean|predicts"),
        ({"gradient": "inputs"}, "input"),
        ({"target": "mean"}, "method.target"),
        ({"views": 1.0}, "method.views=1.0: expected a share in \\[0, 0.9\\]"),
        ({"reconstruction": -1.0}, "method.reconstruction=-1.0: expected at least 0"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillationConfig(**setting)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dsd", "network.name=sit", "expected network dsd"),
        ("repa", "network.name=dsd", "does not train the network to make its own latents"),
        ("dsd", "data.autoencoder=tiny", "makes its own latents; expected none"),
        ("dsd", "method.gradient=both", "no gradient passes an average"),
    ],
)
def test_network_and_method_belong_together(method, more, message):
    with pytest.raises(ValueError, match=message):
        build(make_recipe(method, "smoke", overrides=more), Facts(10, (24,)))


@pytest.mark.parametrize(
    ("overrides", "message"), [("network.trunks=4", "expected 1 "), ("network.latent_dim=0", "latent_dim=0")]
)
def test_bad_networks_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_recipe("dsd", "smoke", overrides=overrides)


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    few = "method.adversarial=0.25 method.heard_from=2 network.width=16 network.depth=2 network.heads=2 method.depth=1"
    recipe = make_recipe("dsd", "smoke", overrides=f"{few} data.n=64 training.steps=4 training.batch_size=8")
    return load_run(train(recipe, tmp_path_factory.mktemp("runs") / "dsd", "cpu", 0))


def test_a_run_makes_pictures_of_its_own_latents(run):
    held_out = run.images("validation", 8)
    z = run.inputs(held_out)
    assert z.shape == (8, 16, 4, 4) and run.decode(z).shape == (8, 3, 32, 32) and run.encodes
    torch.testing.assert_close(run.inputs(held_out, slice(2, 4)), z[2:4])
    made = last_sample(run.net, run.recipe.objective, torch.arange(3), SamplerConfig(steps=2))
    assert made.shape == (3, 16, 4, 4) and run.decode(made).isfinite().all()
    assert held_out_losses(run, held_out).isfinite().all()


def test_all_that_was_asked_for_is_in_the_log(run):
    line = (run.path / "log.jsonl").read_text().splitlines()[-1]
    for name in (
        "distillation",
        "pixels",
        "perceptual",
        "alignment",
        "deep",
        "classification",
        "adversarial",
        "spread",
        "rank",
    ):
        assert f'"{name}"' in line
    assert '"discriminator loss"' in line


def test_draws_do_not_depend_on_what_the_images_show(run):
    _, _, method, batch, _ = setting("method.perceptual=0")
    one, two = (method.draw(each, 3, partial(generator, 0)) for each in (batch, replace(batch, x=-batch.x)))
    for name, value in vars(in_double(one)).items():
        assert value is None or torch.equal(value, getattr(in_double(two), name)), name


def test_a_training_that_collapsed_says_so_and_when(run):
    log = [{"step": step, "spread": spread} for step, spread in ((1, 0.7), (10, 0.05), (20, 0.04))]
    assert "the latents collapsed: from step 10 on" in run.method.last_words(log)
    assert "have not collapsed in spread" in run.method.last_words(log[:1]) and not run.method.last_words([{"step": 1}])
    ranked = [line | {"spread": 0.9, "rank": rank} for line, rank in zip(log, (9.0, 3.3, 3.1))]
    assert "they collapsed in rank at step 20" in run.method.last_words(ranked)
    assert "in rank" not in run.method.last_words([line | {"spread": 0.9} for line in log])


def test_the_command_ends_with_what_became_of_the_latents(tmp_path, capsys):
    few = (
        "network.width=16 network.depth=2 network.heads=2 method.depth=1 method.perceptual=0 data.n=64 training.steps=2"
    )
    assert (
        main(["train", "dsd", *few.split(), "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "run")])
        == 0
    )
    told = capsys.readouterr().out
    assert "the spread of the latents over images is" in told and "run 08 -p run" in told
