"""AHPA: weights that add up, a closed form that is the optimum, one level equal to itself, and nothing left at inference."""

import re
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.ahpa import AHPA, SCHEDULES, AHPAConfig, Router, closed_form, gains, pull, router_loss, schedule
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.caching import open_cache, place
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.encoders.autoencoder_levels import (
    cached_level_tokens,
    description,
    fit_levels,
    on_grid,
    principal_components,
    rotation,
)
from maskalign_lab.encoders.autoencoders import load_autoencoder
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import LATENTS, make_recipe
from maskalign_lab.runs.recipe import from_json, identity
from maskalign_lab.runs.run import build, load_run, train
from maskalign_lab.runs.sources import kept_autoencoder, load_sources
from maskalign_lab.studies.ahpa.arms import SCALES, WINDOWS, measure_ahpa, oracle_arm
from maskalign_lab.studies.ahpa.film import make_film
from maskalign_lab.studies.ahpa.level_contents import centroid, level_power
from maskalign_lab.studies.ahpa.routing import (
    TIMES,
    Routing,
    constant_losses,
    measure_routing,
    run_levels,
    trace_router,
    weights_over,
)
from maskalign_lab.studies.ahpa.tables import mean_routing, numbers_table, oracle_table, routings
from maskalign_lab.training.methods import Batch, State, denoise, shard

NAMES = ("down.0", "down.1", "mid", "latent")
times = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(lambda values: torch.tensor(values))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an untrained autoencoder of Stable Diffusion's form; another seed, other weights."""

    def make(seed: int = 0) -> str:
        folder = tmp_path_factory.mktemp("vae")
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        AutoencoderKL(block_out_channels=(8, 16, 16), norm_num_groups=8, latent_channels=4, **blocks).save_pretrained(
            folder
        )
        return str(folder)

    return cache(make)


def recipe(folder: str, method: str = "ahpa", more: str = ""):
    small = (
        "network.width=16 network.depth=3 data.n=32 training.steps=4 training.batch_size=8 training.precision=float32"
    )
    return make_recipe(method, "smoke", overrides=f"{LATENTS['']} {small} data.autoencoder={folder} {more}")


def fixture(more: dict | None = None, double: bool = True, classes: int = 3):
    """A small network, a method, and a batch with levels."""
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=2, in_channels=4, width=32, depth=4, heads=2, num_classes=classes)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    method = AHPA(
        net, Objective(), AHPAConfig(**{"levels": NAMES, "depth": 2, "projector_width": 32, "dim": 6} | (more or {}))
    )
    g = torch.Generator().manual_seed(1)
    batch = Batch(
        torch.randn(4, 4, 8, 8, generator=g), torch.tensor([0, 1, 2, 0]), levels=torch.randn(4, 4, 16, 6, generator=g)
    )
    batch.held_out = Batch(torch.randn(4, 4, 8, 8, generator=g), torch.tensor([2, 1, 0, 0]))
    draw = method.draw(batch, 0, lambda step, name: generator(0, step, name))
    if double:
        net, method = net.double(), method.double()
        batch.x, batch.levels, draw.t, draw.noise = (v.double() for v in (batch.x, batch.levels, draw.t, draw.noise))
        batch.held_out.x = batch.held_out.x.double()
    return net, method, batch, draw


# ---- weights


@settings(deadline=None, max_examples=40)
@given(t=times, name=st.sampled_from((*SCHEDULES, *NAMES)))
def test_schedules_are_weights(t, name):
    weights = schedule(name, t, NAMES)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(t)))


@settings(deadline=None, max_examples=40)
@given(t=times)
def test_the_reverse_schedule_is_the_reverse(t):
    torch.testing.assert_close(schedule("coarse-to-fine", t, NAMES), schedule("fine-to-coarse", t, NAMES).flip(1))


@settings(deadline=None, max_examples=30)
@given(t=times, size=st.floats(0.01, 30))
def test_a_router_is_finite_and_adds_up_under_autocast(t, size):
    """Whatever it learned: large weights of the perceptron included."""
    torch.manual_seed(0)
    router = Router(NAMES, "coarse-to-fine", width=32, num_classes=3)
    for p in router.parameters():
        p.data.add_(size * torch.randn_like(p))
    with torch.autocast("cpu", torch.bfloat16):
        weights = router(t, torch.full((len(t),), 3))
    assert weights.dtype == torch.float32 and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(t)))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), tau=st.floats(0.01, 5))
def test_closed_form_is_the_optimum(data, tau):
    draws = st.lists(st.floats(0, 2), min_size=4, max_size=4)
    losses = torch.tensor([data.draw(draws)], dtype=torch.float64)
    prior = torch.softmax(torch.tensor([data.draw(draws)], dtype=torch.float64), 1)
    best = closed_form(losses, prior, tau)
    value = lambda w: (w * losses).sum() + tau * pull(w.clamp(min=1e-300).log(), prior)[0]  # noqa: E731
    least = -tau * torch.logsumexp(prior.log() - losses / tau, 1)[0]  # its value in closed form
    torch.testing.assert_close(value(best), least, atol=1e-9, rtol=1e-6)
    other = torch.softmax(torch.tensor([data.draw(draws)], dtype=torch.float64), 1)
    assert value(other) >= value(best) - 1e-9


def test_a_level_that_is_easier_weighs_more():
    weights = closed_form(torch.tensor([0.1, 0.2, 0.4, 0.3]), torch.full((4,), 0.25), 0.1)
    assert weights.argsort(descending=True).tolist() == [0, 1, 3, 2]


# ---- the method


def test_one_hot_weights_equal_the_single_level_to_the_bit(vae, tmp_path):
    """Two trainings, one with four levels of which one counts and one with that level alone: the same network."""
    folder, found = vae(), []
    for levels in (NAMES, ("mid",)):
        more = f"training.steps=3 method.router=mid method.levels={','.join(levels)}"
        found.append(load_run(train(recipe(folder, more=more), tmp_path / str(len(levels)), "cpu", 0)))
    (four, one), start = found, build(found[0].recipe, Facts(10, channels=4, factor=4))[0].state_dict()
    moved = [not torch.equal(value, start[name]) for name, value in four.net.state_dict().items()]
    assert any(moved) and all(torch.equal(v, one.net.state_dict()[name]) for name, v in four.net.state_dict().items())
    for name, value in one.method.trunk.state_dict().items():
        assert torch.equal(value, four.method.trunk.state_dict()[name])


def test_permuting_levels_with_their_heads_changes_nothing():
    net, method, batch, draw = fixture({"router": "uniform"})
    first = method.loss(State(net, net, 0), batch, draw).total
    order = [2, 0, 3, 1]
    method.heads = torch.nn.ModuleList(method.heads[k] for k in order)
    batch.levels = batch.levels[:, order]
    torch.testing.assert_close(method.loss(State(net, net, 0), batch, draw).total, first, rtol=0, atol=1e-12)


def test_targets_give_the_router_no_gradient_and_losses_do():
    for mix, some in (("targets", False), ("losses", True)):
        net, method, batch, draw = fixture({"mix": mix, "way": "rotated"})
        method.loss(State(net, net, 0), batch, draw).total.backward()
        slopes = [p.grad.abs().max().item() for p in method.router.parameters() if p.grad is not None]
        assert (max(slopes) > 1e-8) is some


def test_outside_of_its_window_there_is_no_alignment():
    net, method, batch, draw = fixture({"router": "uniform", "window": (0.0, 0.5)})
    draw.t = torch.full_like(draw.t, 0.8)
    parts = method.loss(State(net, net, 0), batch, draw)
    assert parts.parts["alignment"] == 0 and parts.total == parts.parts["denoising"]


def test_gains_are_inner_products_of_gradients():
    """Against the products themselves, image by image and level by level; as training calls it, in float32 too."""
    net, method, batch, draw = fixture()
    found = gains(method, net, batch, draw)
    weights = [p for p in net.parameters() if p.requires_grad]

    def slopes(loss):
        of = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, of, strict=True)]
        )

    first, second = (shard(batch, 0, 2), shard(draw, 0, 2)), shard(batch.held_out, 1, 2)
    others = shard(draw, 1, 2)
    others = replace(others, y=torch.where(others.y == 3, 3, second.y))
    held_out = slopes(denoise(method, net, second, others).denoising)
    losses = method.level_losses(denoise(method, net, *first).hidden[2], first[0].levels)
    exact = torch.stack([slopes(loss) @ held_out for loss in losses.flatten()]).view_as(losses)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-7)
    net, method, batch, draw = fixture(double=False)
    contrasts, single = (
        each - each.mean(1, keepdim=True) for each in (exact, gains(method, net, batch, draw).double())
    )
    assert (single - contrasts).norm() < 0.02 * contrasts.norm()


def test_what_all_levels_gain_moves_no_router(monkeypatch):
    """Neither the direction nor the length of its step: an offset that levels share must not set the unit either."""
    net, method, batch, draw = fixture({"router": "bilevel", "tau": 1e-6})
    useful, slopes = gains(method, net, batch, draw), []
    for offset in (torch.zeros(2, 1), torch.tensor([[50.0], [-80.0]])):
        monkeypatch.setattr("maskalign_lab.ahpa.gains", lambda *_, offset=offset: useful + offset)
        loss = router_loss(method, State(net, net, 0), batch, draw, method.log_weights(draw.t, draw.y))
        slopes.append(torch.autograd.grad(loss, method.router.mlp[-1].bias)[0])
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def test_a_bilevel_router_moves_towards_what_helps():
    """Its surrogate falls if weight goes to the level with the largest gain."""
    net, method, batch, draw = fixture({"router": "bilevel", "tau": 1e-6, "probe_every": 1})
    useful = gains(method, net, batch, draw)
    router_loss(method, State(net, net, 0), batch, draw, method.log_weights(draw.t, draw.y)).backward()
    lowered = -method.router.mlp[-1].bias.grad  # the direction in which the bias of each level will move
    centred = useful - useful.mean(1, keepdim=True)
    assert torch.cosine_similarity(lowered, centred.sum(0), dim=0) > 0.99


def test_a_bilevel_router_rests_between_its_looks():
    """Neither the gains nor the pull act there, so that their ratio does not depend on how often it looks."""
    net, method, batch, draw = fixture({"router": "bilevel", "probe_every": 3})
    torch.nn.init.ones_(method.router.mlp[-1].bias[:1])  # away from the prior, where the pull has a slope
    log_weights = method.log_weights(draw.t, draw.y)
    acts = [router_loss(method, State(net, net, step), batch, draw, log_weights).requires_grad for step in range(7)]
    assert acts == [step % 3 == 0 for step in range(7)]


def test_a_bilevel_router_needs_a_batch_of_two():
    net, method, batch, draw = fixture({"router": "bilevel"})
    one, only = shard(batch, 0, len(batch.y)), shard(draw, 0, len(batch.y))
    with pytest.raises(ValueError, match="a bilevel router needs two or more; take training.batch_size=2"):
        method.loss(State(net, net, 0), one, only)


def test_gains_do_not_look_at_the_other_half_of_the_batch():
    """Only at held-out images, whose dropped labels are those of the draw."""
    net, method, batch, draw = fixture()
    found = gains(method, net, batch, draw)
    batch.x[1::2], batch.y[1::2] = torch.randn_like(batch.x[1::2]), 1
    assert torch.equal(gains(method, net, batch, draw), found)
    dropped = replace(draw, y=torch.where(torch.arange(4) % 2 == 1, 3, draw.y))
    unlabelled = gains(method, net, batch, dropped)
    assert not torch.equal(unlabelled, found)
    batch.held_out.y[:] = 1
    assert torch.equal(gains(method, net, batch, dropped), unlabelled)


def test_the_network_never_sees_what_the_router_is_asked_on(vae):
    """One image in eight, from the end, in steps at which a bilevel router looks; other routers train on all."""
    of = {router: make_batches(recipe(vae(), more=f"method.router={router}")) for router in ("bilevel", "learned")}
    bilevel, learned = of.values()
    count, looked, trained = len(bilevel.dataset), set(), set()
    assert (bilevel.aside, learned.aside) == (count // 8, 0)
    mean, _ = bilevel.latents[:].unbind(1)
    nearest = lambda x: torch.cdist(x.flatten(1) / bilevel.scaling[0], mean.flatten(1)).argmin(1).tolist()  # noqa: E731
    for step in range(24):
        batch = bilevel(step)
        trained |= set(nearest(batch.x))
        assert (batch.held_out is None) is (step % 4 != 0)
        looked |= set(nearest(batch.held_out.x)) if batch.held_out else set()
        assert learned(step).held_out is None
    assert trained == set(range(count - count // 8)) and looked == set(range(count - count // 8, count))


def test_a_control_that_hides_the_network_is_refused():
    net, method, batch, draw = fixture({"router": "bilevel"})
    hidden = lambda *args, **kwargs: net(*args, **kwargs)  # noqa: E731
    with pytest.raises(ValueError, match="which the controls of MaskAlign hide; take another router"):
        method.loss(State(hidden, net, 0), batch, draw)


def test_too_few_images_to_hold_any_out_are_refused(vae):
    with pytest.raises(ValueError, match="keeps one in 8 images from the network, and there are 7"):
        load_sources(recipe(vae(), more="method.router=bilevel data.n=7"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"router": "learnt"}, "Did you mean 'learned'"),
        ({"mix": "target"}, "Did you mean 'targets'"),
        ({"way": "details"}, "Did you mean 'detail'"),
        ({"dim": 0}, "dim=0 must be at least 1"),
        ({"probe_every": 0}, "probe_every=0 must be at least 1"),
        ({"mix": "targets"}, "method.way=rotated method.mix=targets"),
        ({"mix": "targets", "way": "rotated", "router": "bilevel"}, "take mix=losses"),
        ({"window": (0.0, 0.5)}, r"method.router=uniform method.window=\(0,0.5\)"),
        ({"window": (0.0, 0.5), "router": "bilevel"}, "trained at all times"),
        ({"tau": 0.0}, "must be positive"),
        ({"window": (0.5, 0.2)}, "rising"),
        ({"prior": "uniforn"}, "Did you mean 'uniform'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        AHPAConfig(**given)


# ---- levels


@settings(deadline=None, max_examples=20)
@given(side=st.sampled_from((2, 4, 8)), channels=st.integers(1, 5))
def test_space_to_depth_keeps_every_value(side, channels):
    level = torch.randn(2, channels, 8, 8)
    torch.testing.assert_close(on_grid(level, side).flatten().sort().values, level.flatten().sort().values)


def test_levels_of_unseen_images_are_white():
    """As a run of the study has them: places and directions count alike. Tokens of some columns alone would not do."""
    images = load_dataset("shapes", 64, n=512)
    levels = fit_levels(load_autoencoder("tiny"), images, NAMES, side=8)
    tokens = levels(images.images(slice(256, 512)))
    for level in tokens.unbind(1):
        spread = torch.linalg.eigvalsh(level.flatten(0, 1).T.cov())
        assert 0.7 < spread[0] and spread[-1] < 1.4


def test_rotated_levels_are_nearer_to_the_first_and_the_same_in_themselves(vae):
    images, folder = load_dataset("shapes", 64, n=32), vae()
    plain, turned = (
        fit_levels(load_autoencoder(folder), images, NAMES, side=8, way=way) for way in ("detail", "rotated")
    )
    before, after = (levels(images.images()) for levels in (plain, turned))
    assert torch.equal(before[:, 0], after[:, 0])
    torch.testing.assert_close(after[:4] @ after[:4].mT, before[:4] @ before[:4].mT, atol=5e-2, rtol=1e-3)
    near = [torch.cosine_similarity(each[:, :1], each[:, 1:], dim=-1).mean((0, 2)) for each in (before, after)]
    assert (near[1] > near[0]).all() and (near[1] > 0.05).all()


def test_the_rotation_is_the_best_one():
    g = torch.Generator().manual_seed(0)
    rows, towards = torch.randn(2, 200, 5, generator=g)
    best = rotation(rows, towards)
    torch.testing.assert_close(best @ best.T, torch.eye(5), atol=1e-5, rtol=0)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(5, 5, generator=g)).Q
        assert (rows @ best - towards).square().sum() <= (rows @ other - towards).square().sum()


def test_a_level_of_too_low_a_rank_is_refused(vae, monkeypatch):
    """A level whose channels are copies of one another has directions that hold rounding errors only."""
    autoencoder, images = load_autoencoder(vae()), load_dataset("shapes", 64, n=8)
    of = autoencoder.levels
    copies = lambda *given: {name: level[:, :1].expand_as(level) for name, level in of(*given).items()}  # noqa: E731
    monkeypatch.setattr(autoencoder, "levels", copies)
    with pytest.raises(ValueError, match="level 'latent': tokens that vary in 4 directions.*take dim 4"):
        fit_levels(autoencoder, images, ("latent",), side=8)


def test_components_do_not_depend_on_the_order_of_rows():
    rows = torch.randn(300, 8) @ torch.randn(8, 8)
    rows -= rows.mean(0)
    for one, other in zip(principal_components(rows, 5), principal_components(rows.flip(0), 5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_levels_of_another_autoencoder_are_refused(vae):
    """Another autoencoder has a place of its own, and what lies in the first one's place is not taken for its levels."""
    images = load_dataset("shapes", 64, n=8)
    mine, other = (fit_levels(load_autoencoder(vae(seed)), images, NAMES, side=8, images=8) for seed in (0, 1))
    assert description(mine, images) != description(other, images)
    first, second = cached_level_tokens(mine, images), cached_level_tokens(other, images)
    assert not torch.equal(first[[0]], second[[0]])
    with pytest.raises(ValueError, match="was made with autoencoder"):
        open_cache(place("levels", description(mine, images)), description(other, images))
    torch.testing.assert_close(first[[0, 3]].float(), mine(images.images([0, 3])), atol=2e-2, rtol=2e-2)


def test_batches_hold_latents_and_levels(vae):
    settings = recipe(vae())
    batches = make_batches(settings)
    batch, again, later = batches(0), batches(0), batches(4)  # 32 images in batches of 8: step 4 begins anew
    assert batch.x.shape == (8, 4, 16, 16) and batch.levels.shape == (8, 4, 64, 16)
    assert torch.equal(batch.x, again.x) and not torch.equal(batch.x, later.x)
    facts = load_sources(settings).facts
    assert (facts.channels, facts.factor) == (4, 4) and len(facts.autoencoder_digest) == 16


def test_pixels_are_refused():
    with pytest.raises(ValueError, match="data.autoencoder=tiny"):
        make_batches(make_recipe("ahpa", "smoke", overrides="data.autoencoder='' data.n=16"))


# ---- runs


@pytest.mark.parametrize("method", ["sit", "repa", "reg", "maskalign", "sra2", "ahpa", "haste", "irepa"])
def test_every_method_learns_latents(method, vae, tmp_path):
    run = load_run(train(recipe(vae(), method), tmp_path / method, "cpu", 0))
    assert run.net.in_channels == 4 and run.net.side == 8
    assert run.decode(run.inputs(run.images("validation", 4))).shape == (4, 3, 64, 64)
    same = recipe("tiny", "sit", f"network.mixer_depth={run.recipe.network.mixer_depth}")
    plain, _ = build(same, Facts(10, channels=4, factor=4))
    if not run.net.class_dim:  # nothing of the method is left in what is sampled
        assert run.net.state_dict().keys() == plain.state_dict().keys()


def test_latents_are_encoded_on_the_spot_and_on_disk(vae, tmp_path):
    """Of few images and of many; the method has no part in it."""
    run = load_run(train(recipe(vae(), "sit"), tmp_path / "run", "cpu", 0))
    few, many = run.images("validation", 4), run.images("validation", 300)
    torch.testing.assert_close(run.inputs(few), run.inputs(many, slice(0, 4)), rtol=1e-4, atol=1e-4)


def test_another_autoencoder_does_not_continue_a_run(vae, tmp_path):
    first, other = str(shutil.copytree(vae(0), tmp_path / "vae")), vae(1)
    train(recipe(first), tmp_path / "run", "cpu", 0)
    longer = recipe(first, more="training.steps=6")
    (tmp_path / "run" / "recipe.json").unlink()
    shutil.rmtree(first)
    shutil.copytree(other, first)
    with pytest.raises(FileExistsError, match="autoencoder_digest"):
        train(longer, tmp_path / "run", "cpu", 0)


def test_routing_of_a_run(vae, tmp_path):
    run = load_run(train(recipe(vae(), more="method.by_class=true training.save_every=2"), tmp_path / "run", "cpu", 0))
    held_out = run.images("validation", 12)
    seen = measure_routing(run, held_out, run_levels(run))
    np.testing.assert_allclose(seen.weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.closed.sum(1), 1, rtol=1e-5)
    rows = trace_router(run, 20)
    assert [row["step"] for row in rows if row["class"] == "all"] == [2, 4]
    assert {row["class"] for row in rows} - {"all"} == set(held_out.classes)
    assert len(measure_ahpa(run, 8)["velocity per t"]) == 10


def test_a_router_by_class_is_shown_by_the_images_own_labels(vae, tmp_path):
    run = load_run(train(recipe(vae(), more="method.by_class=true"), tmp_path / "run", "cpu", 0))
    for p in run.method.router.parameters():
        p.add_(0.06 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([3, 1, 3, 3])
    each = [run.method.log_weights(t, label.expand(2)).exp() for label in y]
    assert (each[0] - each[1]).abs().max() > 1e-3
    torch.testing.assert_close(weights_over(run, t, y), sum(each) / 4)


def test_numbers_of_a_routing_are_those_of_arithmetic():
    weights = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    losses = np.array([[0.2, 0.4, 0.8], [0.5, 0.5, 0.5], [1.0, 0.5, 0.0]])
    closed = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]])
    seen = Routing(
        ("a", "b", "c"), np.array([0.0, 0.5, 1.0]), losses, np.array([1.0, 0.5, 0.8]), weights, closed, closed
    )
    np.testing.assert_allclose(seen.skill, [[0.8, 0.2, 0], [0.5, 0, 0.375], [0, 0, 1]])
    np.testing.assert_allclose(seen.distance, [0, 0.5, 0.75])
    assert seen.coarseness() == pytest.approx(1) and seen.from_uniform == pytest.approx(0)  # place 0, 1/2, 1
    leaning = replace(seen, weights=np.array([[0.6, 0.2, 0.2], [0.6, 0.2, 0.2], [0.6, 0.2, 0.2]]))
    assert leaning.coarseness() == pytest.approx(0) and leaning.from_uniform == pytest.approx(0.6 - 1 / 3)
    last = replace(seen, weights=np.array([[0.3, 0.3, 0.4], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]))
    assert last.coarseness() > 0.2 and last.coarseness(("c",)) == pytest.approx(0)  # all of it lay in the last level


def test_constants_are_the_best_ones():
    """Two axes in equal parts: the mean direction has length 1 / sqrt 2. Three zeros and a one: a third of beta up."""
    method = fixture({"levels": ("mid",), "router": "uniform"}, double=False)[1]
    rows = torch.eye(6)[[0, 1, 0, 1]].view(1, 1, 4, 6)
    assert constant_losses(method, rows).item() == pytest.approx(1 - 0.5**0.5)
    method = fixture({"levels": ("mid",), "router": "uniform", "loss": "smooth-l1"}, double=False)[1]
    rows, c = torch.tensor([0.0, 0, 0, 1]).view(1, 1, 4, 1).expand(1, 1, 4, 6), 0.05 / 3
    best = (3 * c**2 / 0.1 + (1 - c - 0.025)) / 4
    assert constant_losses(method, rows).item() == pytest.approx(best, rel=1e-4)


def test_detail_is_measured_on_the_level_itself():
    """A wave within the cells is lost by averaging, one that is constant in each cell is not; what all images share is none."""
    x, sign = torch.arange(8.0), torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1)
    waves = {"fine": torch.cos(torch.pi * x), "coarse": torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1])}
    maps = {name: 5 + sign * wave.expand(4, 3, 8, 8) for name, wave in waves.items()}
    maps["both"] = maps["fine"] + 2 * maps["coarse"]
    levels = SimpleNamespace(names=tuple(maps), side=4, autoencoder=SimpleNamespace(levels=lambda images, _: maps))
    power = level_power(levels, torch.zeros(4, 3, 8, 8))
    inside = {name: float(1 - part[-1] / part[:-1].sum()) for name, part in power.items()}
    assert inside == pytest.approx({"fine": 1, "coarse": 0, "both": 1 / 5}, abs=1e-9)
    assert centroid(power["fine"][:-1]) == pytest.approx(4) and centroid(power["coarse"][:-1]) == pytest.approx(2)


def test_routing_refuses_what_has_no_levels(vae, tmp_path):
    mixed = "method.way=rotated method.mix=targets"
    for method, more, message in (("sit", "", "expected ahpa"), ("ahpa", mixed, "mixes its targets")):
        run = load_run(train(recipe(vae(), method, more), tmp_path / method, "cpu", 0))
        with pytest.raises(ValueError, match=message):
            measure_routing(run, run.images("validation", 4))
    assert measure_ahpa(run, 8).keys() == {"velocity", "velocity per t"}
    film = make_film({run.name: run}, run_levels(run), shown=2, times=3)
    np.testing.assert_allclose(film.weights, 1 / 4, rtol=1e-5)  # it stays at its prior


def test_a_run_of_an_earlier_revision_is_another_run(vae, tmp_path):
    """Its recipe lacks the number or has another one, so it is not found, and its levels are not guessed."""
    mine = recipe(vae())
    train(mine, tmp_path / "run", "cpu", 0)
    path = tmp_path / "run" / "recipe.json"
    path.write_text(re.sub(r'\n *"revision": \d+,', "", path.read_text()))
    assert identity(from_json(path.read_text())) != identity(mine)
    with pytest.raises(ValueError, match="is of revision 0 of ahpa"):
        run_levels(load_run(tmp_path / "run"))


def test_another_autoencoder_does_not_show_a_run(vae, tmp_path):
    first, other = str(shutil.copytree(vae(0), tmp_path / "vae")), vae(1)
    train(recipe(first), tmp_path / "run", "cpu", 0)
    before, now = (load_autoencoder(folder).digest for folder in (first, other))
    shutil.rmtree(first)
    shutil.copytree(other, first)
    kept_autoencoder.cache_clear()
    with pytest.raises(ValueError, match=f"digest {before}.*{now}"):
        load_run(tmp_path / "run").autoencoder  # noqa: B018


# ---- arms

DEPTHS = {  # by preset: whose output each method aligns; of one depth where the tables stand
    "smoke": {"ahpa": 3},
    "laptop": {"ahpa": 2, "repa": 2, "sra2": 2},
    "gpu": {"ahpa": 4, "repa": 4, "sra2": 4},
    "paper": {"ahpa": 7, "repa": 8, "sra2": 8},
}


@pytest.mark.parametrize("preset", SCALES)
def test_arms_of_a_scale_differ_in_their_method_alone(preset):
    """Learning rate, clipping, batches, images and network are those of all."""
    scale = replace(SCALES[preset], levels=make_recipe("ahpa", preset).method.levels)
    for overrides in ("", scale.oracle):
        recipes = [
            scale.recipe_of(preset, "shapes", overrides)(arm, 0) for arm in (*scale.arms, *scale.tried, *scale.traced)
        ]
        for part in ("training", "data", "network", "objective"):
            assert len({repr(getattr(each, part)) for each in recipes}) == 1, part
        depths = {name: {each.method.depth for each in recipes if each.method.name == name} for name in DEPTHS[preset]}
        assert {name: depth for name, (depth,) in depths.items()} == DEPTHS[preset]
    if preset == "paper":
        assert (recipes[0].training.lr, recipes[0].training.clip) == (2e-4, 2.0)


def test_the_oracle_compares_within_a_seed():
    rows = [
        {"arm": name, "seed": seed, "budget": "steps", "velocity per t": [loss * (1 + seed)] * 10}
        for seed in range(2)
        for name, loss in (("SiT", 1.0), (oracle_arm("mid", WINDOWS[2]).name, 0.8))
    ]
    table, half = oracle_table(rows)
    np.testing.assert_allclose(table[2, 2], -0.2)
    np.testing.assert_allclose(half[2, 2], 0, atol=1e-12)  # seeds differ in their loss and not in the change
    assert np.isnan(np.delete(table.reshape(12, 3), 2 * 4 + 2, 0)).all()


def test_the_oracle_averages_the_bins_of_its_windows():
    """Every bin has a change of its own: bins 0 to 2, 3 to 6 and 7 to 9 go together."""
    change = 0.01 * np.arange(10)
    rows = [
        {"arm": name, "seed": 0, "budget": "steps", "velocity per t": loss.tolist()}
        for name, loss in (("SiT", np.ones(10)), (oracle_arm("latent", WINDOWS[0]).name, 1 - change))
    ]
    np.testing.assert_allclose(oracle_table(rows)[0][0, 3], [-0.01, -0.045, -0.08])
    assert np.isinf(oracle_table(rows)[1][0, 3]).all()  # of one seed
    edges = [round(10 * edge) for window in WINDOWS for edge in window]
    assert edges == [0, 3, 3, 7, 7, 10]


def test_other_levels_are_tried_alone_and_by_the_oracle():
    levels = ("down.1", "down.2", "latent")
    scale = replace(SCALES["laptop"], levels=levels)
    given = scale.recipe_of("laptop", "shapes", f"method.levels={','.join(levels)}")
    assert {arm.name for arm in scale.arms} >= {"down.2 alone"} and len(scale.tried) == len(levels) * len(WINDOWS)
    for arm in (*scale.arms, *scale.tried, *scale.traced):
        method = given(arm, 0).method
        assert method.name != "ahpa" or method.levels == levels


def test_a_table_of_routers_is_over_seeds_after_equal_steps():
    def row(seed: int, budget: str, rising: float) -> dict:
        """A router of two levels whose second weight rises with t, and whose losses would have it so."""
        second = 0.5 + rising * (np.array(TIMES) - 0.5)
        weights = np.stack([1 - second, second], 1).tolist()
        told = {"arm": "AHPA", "seed": seed, "budget": budget, "constant": [1.0, 1.0], "closed form": weights}
        return told | {"level losses": np.ones((10, 2)).tolist(), "weights": weights}

    config = AHPAConfig(levels=("down.0", "latent"))
    rows = [row(0, "steps", 0.2), row(1, "steps", 0.4), row(1, "flops", 0.9)]
    learned = routings(
        [*rows, rows[0] | {"arm": "SiT"}], {"AHPA": config, "uniform": replace(config, router="uniform")}
    )
    assert {name: len(each) for name, each in learned.items()} == {"AHPA": 2}
    np.testing.assert_allclose(mean_routing(learned["AHPA"]).weights[:, 1], 0.5 + 0.3 * (np.array(TIMES) - 0.5))
    table = numbers_table(learned)["AHPA"]
    assert table.loc["seeds", "mean"] == 2 and table.loc["from closed form", "mean"] == pytest.approx(0)
    assert table.loc["slope", "mean"] == table.loc["slope of the closed form", "mean"] == pytest.approx(0.3)
    assert table.loc["slope", "+/-"] == pytest.approx(12.706 * 0.1, rel=1e-3)  # Student's t of one degree of freedom
