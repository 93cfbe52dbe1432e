"""MaskAlign: what is dropped is gone, what is kept is REG, and any method can be put inside."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.layers import patchify
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.maskalign import (
    MaskAlign,
    MaskAlignConfig,
    MaskAttention,
    MaskInput,
    MaskLoss,
    count_kept,
    draw_keep,
    kept_first,
)
from maskalign_lab.reg import REG, REGConfig
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, identity, to_json
from maskalign_lab.runs.run import build, load_run, train
from maskalign_lab.runs.sources import load_sources
from maskalign_lab.training.methods import Batch, MethodConfig, State, method_class, shard
from maskalign_lab.training.repa import REPAConfig, cosine_alignment

REG_INSIDE, REPA_INSIDE = REGConfig(depth=2, projector_width=24), REPAConfig(depth=2, projector_width=24)


def network(mixer_depth: int = 0, class_dim: int | None = 12) -> SiT:
    torch.manual_seed(0)
    sizes = dict(input_size=16, patch_size=4, in_channels=3, width=32, depth=3, heads=4, num_classes=10)
    net = SiT(**sizes, class_dim=class_dim, mixer_depth=mixer_depth).double()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


def make(net: SiT, ratio: float, inside: MethodConfig = REG_INSIDE, kind: type[MaskAlign] = MaskAlign) -> MaskAlign:
    torch.manual_seed(1)
    return kind(net, Objective(), kind.Config(inner=inside, mask_ratio=ratio), teacher_dims=(12,)).double()


def batch(b: int = 5) -> Batch:
    g = torch.Generator().manual_seed(0)
    x, features, cls = (torch.randn(b, *s, generator=g).double() for s in ((3, 16, 16), (16, 12), (12,)))
    return Batch(x, torch.arange(b), features, cls)


def drawn(method: MaskAlign, step: int = 0):
    draw = method.draw(batch(), step, partial(generator, 0))
    return replace(draw, t=draw.t.double(), noise=draw.noise.double())


def gradients(net: SiT, method: MaskAlign, draw) -> list[torch.Tensor]:
    net.zero_grad(), method.zero_grad()
    method.loss(State(net, net, 0), batch(), draw).total.backward()
    return [p.grad for p in (*net.parameters(), *method.parameters()) if p.grad is not None]


def test_without_a_mask_and_a_mixer_it_is_reg_to_the_bit():
    net = network()
    masked = make(net, 0.0)
    torch.manual_seed(1)
    reg = REG(net, Objective(), REG_INSIDE, teacher_dims=(12,)).double()
    draw = drawn(masked)
    assert draw.keep is None
    ours, theirs = (m.loss(State(net, net, 0), batch(), draw) for m in (masked, reg))
    assert torch.equal(ours.total, theirs.total) and ours.parts.keys() == theirs.parts.keys()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, masked, draw), gradients(net, reg, draw), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.25, 0.5, 0.8]), st.sampled_from([0, 2]), st.booleans())
def test_the_order_of_the_kept_does_not_matter(step, ratio, mixer_depth, on_reg):
    net = network(mixer_depth, 12 if on_reg else None)
    masked = make(net, ratio, REG_INSIDE if on_reg else REPA_INSIDE)
    draw = drawn(masked, step)
    order = torch.rand(draw.keep.shape, generator=torch.Generator().manual_seed(step)).argsort(1)
    losses = [
        masked.loss(State(net, net, 0), batch(), each).total
        for each in (draw, replace(draw, keep=draw.keep.gather(1, order)))
    ]
    assert (losses[0] - losses[1]).abs() <= 1e-12


def test_the_loss_is_that_of_images_that_have_only_the_kept_tokens():
    """Brute force: each image alone, its dropped tokens cut out of the sequence by hand."""
    net = network(2)
    masked, b = make(net, 0.5), batch()
    draw = drawn(masked)
    found = masked.loss(State(net, net, 0), b, draw).parts
    x_t, cls_t = interpolate(b.x, draw.noise, draw.t), interpolate(b.class_token, draw.class_noise.double(), draw.t)
    velocity, alignment, class_velocity = [], [], []
    for i, keep in enumerate(draw.keep):
        one = slice(i, i + 1)
        tokens, c = net.embed(x_t[one], draw.t[one], draw.y[one], cls_t[one])
        tokens = net.mix(tokens, c)[:, [0, *(keep + 1).tolist()]]
        for depth, block in enumerate(net.blocks, start=1):
            tokens = block(tokens, c)
            if depth == 2:
                rows = torch.cat([b.class_token[one, None], b.features[one][:, keep]], 1)
                alignment.append(cosine_alignment(masked.inner.projectors[0](tokens), rows).mean())
        patches, cls = net.final_layer(tokens, c)
        truth = patchify(draw.noise - b.x, 4)[one][:, keep]
        velocity.append((patches - truth).square().mean())
        class_velocity.append((cls - (draw.class_noise - b.class_token)[one]).square().mean())
    for name, values in (("denoising", velocity), ("alignment", alignment), ("class_denoising", class_velocity)):
        torch.testing.assert_close(found[name], torch.stack(values).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inside", [REG_INSIDE, REPA_INSIDE], ids=["reg", "repa"])
def test_without_a_mixer_dropped_patches_have_exactly_no_gradient(inside):
    for mixer_depth in (0, 2):
        net = network(mixer_depth, 12 if inside is REG_INSIDE else None)
        masked = make(net, 0.25, inside)
        draw = drawn(masked)
        draw.noise.requires_grad_()
        # the noise enters the targets as well: only kept ones, so dropped patches are felt through the network alone
        slope = torch.autograd.grad(masked.loss(State(net, net, 0), batch(), draw).total, draw.noise)[0]
        felt = patchify(slope, 4).abs().amax(2)
        gone = torch.ones(5, 16, dtype=torch.bool).scatter(1, draw.keep, False)
        assert felt[~gone].gt(0).all() and (felt[gone].eq(0).all() if mixer_depth == 0 else felt[gone].gt(0).all())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.999))
def test_count_of_the_kept(tokens, ratio):
    if int(tokens * (1 - ratio) + 1e-9) < 1:
        with pytest.raises(ValueError, match=f"of {tokens} tokens leaves none"):
            count_kept(tokens, ratio)
    else:
        assert 1 <= count_kept(tokens, ratio) <= tokens


def test_the_published_count():
    assert count_kept(256, 0.25) == 192 and count_kept(10, 0.9) == 1 and count_kept(64, 0.0) == 64
    for ratio in (1.0, -0.25, 1.5, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            count_kept(64, ratio)


def test_subsets_are_uniform_and_independent():
    keep = draw_keep(20_000, 8, 2, generator(0, 0, "test"))
    assert keep.shape == (20_000, 2) and (keep[:, 0] < keep[:, 1]).all()
    pairs = torch.bincount(8 * keep[:, 0] + keep[:, 1], minlength=64)
    counts = pairs[pairs > 0].float()
    assert len(counts) == 28 and ((counts - 20_000 / 28).square() / (20_000 / 28)).sum() < 60  # chi-squared, 27 degrees
    other = draw_keep(20_000, 8, 2, generator(0, 1, "test"))
    assert ((keep == other).all(1).float().mean() - 1 / 28).abs() < 0.01


def test_draws_are_the_inner_methods_draws():
    """Paired runs: MaskAlign sees the same times, noise and labels as REG; only `keep` is new."""
    net = network()
    masked = make(net, 0.25)
    ours, theirs = drawn(masked, 7), drawn(masked.inner, 7)
    assert torch.equal(ours.t, theirs.t) and torch.equal(ours.noise, theirs.noise) and torch.equal(ours.y, theirs.y)
    assert torch.equal(ours.class_noise, theirs.class_noise) and theirs.keep is None
    halves = [shard(ours, rank, 2) for rank in range(2)]
    assert torch.equal(halves[0].keep, ours.keep[::2]) and torch.equal(halves[1].class_noise, ours.class_noise[1::2])


def test_mask_the_loss_takes_regs_losses_of_the_kept_tokens():
    """Token by token: REG's own outputs and hidden tokens, of which the kept ones count."""
    net = network()
    control, data = make(net, 0.5, kind=MaskLoss), batch()
    draw = drawn(control)
    parts = control.loss(State(net, net, 0), data, draw).parts
    x_t, cls_t = (
        interpolate(clean, noise, draw.t)
        for clean, noise in ((data.x, draw.noise), (data.class_token, draw.class_noise))
    )
    out = net(x_t, draw.t, draw.y, cls=cls_t, collect=(2,))
    error = patchify(out.prediction - (draw.noise - data.x), 4).square().mean(2)  # (b, n)
    cosines = cosine_alignment(
        control.inner.projectors[0](out.hidden[2]), torch.cat([data.class_token[:, None], data.features], 1)
    )
    kept = torch.cat([torch.zeros(5, 1, dtype=torch.long), draw.keep + 1], 1)
    expected = {"denoising": error.gather(1, draw.keep).mean(), "alignment": cosines.gather(1, kept).mean()}
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12)


def test_mask_the_input_hides_the_dropped_and_counts_all():
    net = network()
    control = make(net, 0.25, kind=MaskInput)
    draw = drawn(control)
    assert "mask_token" in dict(control.named_parameters())
    total = control.loss(State(net, net, 0), batch(), draw).total
    total.backward()
    assert control.mask_token.grad.abs().sum() > 0
    gone = torch.ones(5, 16, dtype=torch.bool).scatter(1, draw.keep, False)
    noise, b = draw.noise.clone().requires_grad_(), batch()
    x_t = interpolate(b.x, noise, draw.t)
    cls_t = interpolate(b.class_token, draw.class_noise.double(), draw.t)
    out = net(x_t, draw.t, draw.y, cls=cls_t, keep=draw.keep, fill=control.mask_token)
    assert out.prediction.shape == b.x.shape
    felt = patchify(torch.autograd.grad(out.prediction.square().sum(), noise)[0], 4).abs().amax(2)
    assert felt[gone].eq(0).all() and felt[~gone].gt(0).all()


def shown(control: MaskAlign, net: SiT, draw, noise: torch.Tensor | None = None, collect: tuple = (2,)):
    """What the method inside is shown of the network."""
    b, seen = batch(), []
    x_t = interpolate(b.x, draw.noise if noise is None else noise, draw.t)
    has = net.class_dim is not None
    cls_t = interpolate(b.class_token, draw.class_noise.double(), draw.t) if has else None

    def look(state, batch, draw, phase):
        seen.append(state.model(x_t, draw.t, draw.y, cls=cls_t, keep=draw.keep, collect=collect))

    control.inner.loss = look
    control.loss(State(net, net, 0), b, draw)
    return seen[0], partial(net, x_t, draw.t, draw.y, cls=cls_t, collect=collect)


def rest_of(keep: torch.Tensor, tokens: int = 16) -> torch.Tensor:
    return kept_first(keep, tokens)[:, keep.shape[1] :]


@pytest.mark.parametrize("mixer_depth", [0, 2])
@pytest.mark.parametrize("inside", [REG_INSIDE, REPA_INSIDE], ids=["reg", "repa"])
def test_mask_the_attention_shows_the_kept_what_maskalign_shows_them(inside, mixer_depth):
    """To the last bit, tokens of the aligned depth and class token included; and the dropped ones likewise."""
    first = int(inside is REG_INSIDE)
    net = network(mixer_depth, 12 if first else None)
    control = make(net, 0.25, inside, MaskAttention)
    draw = drawn(control)
    out, forward = shown(control, net, draw)
    assert torch.equal(draw.keep, drawn(make(net, 0.25, inside)).keep) and out.prediction.shape == (5, 3, 16, 16)
    for keep in (draw.keep, rest_of(draw.keep)):
        theirs, rows = forward(keep=keep), keep.unsqueeze(2)
        assert torch.equal(patchify(out.prediction, 4).take_along_dim(rows, 1), theirs.prediction)
        patches = out.hidden[2][:, first:].take_along_dim(rows, 1)
        assert torch.equal(patches, theirs.hidden[2][:, first:]) and out.hidden[2].shape == (5, first + 16, 32)
        if first and keep is draw.keep:
            assert torch.equal(out.class_prediction, theirs.class_prediction)
            assert torch.equal(out.hidden[2][:, 0], theirs.hidden[2][:, 0])


@pytest.mark.parametrize("mixer_depth", [0, 2])
def test_mask_the_attention_parts_meet_in_the_mixer_alone(mixer_depth):
    net = network(mixer_depth)
    control = make(net, 0.25, kind=MaskAttention)
    draw = drawn(control)
    noise = draw.noise.clone().requires_grad_()
    out, _ = shown(control, net, draw, noise)
    kept = torch.zeros(5, 16, dtype=torch.bool).scatter(1, draw.keep, True)
    for part in (kept, ~kept):
        loss = patchify(out.prediction, 4).square().sum(2)[part].sum()
        felt = patchify(torch.autograd.grad(loss, noise, retain_graph=True)[0], 4).abs().amax(2)
        assert felt[part].gt(0).all() and (felt[~part].gt(0).all() if mixer_depth else felt[~part].eq(0).all())


def test_mask_the_attention_counts_all_tokens():
    """The mean over all is that of MaskAlign's losses of both parts, by their sizes."""
    net = network(2, None)
    control, masked = (make(net, 0.25, REPA_INSIDE, kind) for kind in (MaskAttention, MaskAlign))
    draw = drawn(control)
    found = control.loss(State(net, net, 0), batch(), draw).parts
    parts = [
        masked.loss(State(net, net, 0), batch(), replace(draw, keep=keep)).parts
        for keep in (draw.keep, rest_of(draw.keep))
    ]
    for name in ("denoising", "alignment"):
        torch.testing.assert_close(found[name], 0.75 * parts[0][name] + 0.25 * parts[1][name], rtol=0, atol=1e-12)


@given(st.integers(1, 30), st.floats(0, 0.99), st.integers(0, 99))
def test_kept_first_is_a_permutation_that_begins_with_the_kept(tokens, ratio, seed):
    kept = max(1, int(tokens * (1 - ratio)))
    keep = draw_keep(3, tokens, kept, torch.Generator().manual_seed(seed))
    order = kept_first(keep, tokens)
    assert torch.equal(order[:, :kept], keep) and torch.equal(order.sort(1).values, torch.arange(tokens).expand(3, -1))
    assert (order[:, kept:].diff() > 0).all()


def test_a_recipe_holds_a_method_in_a_method():
    recipe = make_recipe("maskalign", "smoke", overrides="method.inner.name=repa method.mask_ratio=0.5")
    assert isinstance(recipe.method.inner, REPAConfig) and recipe.method.inner.depth == 2
    assert from_json(to_json(recipe)) == recipe
    others = ("method.inner.name=repa", "method.inner.weight=1", "method.mask_ratio=0.25", "network.mixer_depth=0")
    names = {identity(make_recipe("maskalign", "smoke", overrides=o)) for o in ("", *others)}
    assert len(names) == len(others)  # the ratio of 0.25 is the default
    with pytest.raises(ValueError, match="Did you mean 'method.inner.weight'"):
        make_recipe("maskalign", "smoke", overrides="method.inner.wieght=1")
    with pytest.raises(ValueError, match="method 'rpea'.*Did you mean 'repa'"):
        make_recipe("maskalign", "smoke", overrides="method.inner.name=rpea")


def test_mistakes_are_told_before_any_work():
    with pytest.raises(ValueError, match="mask_ratio 0.99 of 64 tokens leaves none"):
        build(make_recipe("maskalign", "smoke", overrides="method.mask_ratio=0.99"), Facts(10, (16,)))
    with pytest.raises(ValueError, match="cannot drop tokens from 'irepa': its projector is a convolution"):
        build(make_recipe("maskalign", "smoke", overrides="method.inner.name=irepa"), Facts(10, (16,)))
    teacher = "timm:vit_wee_patch16_reg1_gap_256?random"
    with pytest.raises(ValueError, match="denoises the teacher's class token.*repa"):
        load_sources(make_recipe("maskalign", "smoke", overrides=f"data.teacher={teacher} data.n=4"))
    with pytest.raises(ValueError, match="class token of 12 channels, and cls is missing"):
        network()(torch.zeros(1, 3, 16, 16).double(), torch.zeros(1).double(), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="no class token, and cls is given"):
        network(class_dim=None).embed(
            torch.zeros(1, 3, 16, 16).double(), torch.zeros(1), torch.zeros(1).long(), torch.ones(1, 12)
        )


@pytest.mark.parametrize("inner", ["reg", "repa"])
def test_a_run_comes_back_as_it_was_trained(tmp_path, own_folders, inner):
    recipe = make_recipe(
        "maskalign", "smoke", overrides=f"method.inner.name={inner} training.steps=3 training.warmup=1 data.n=64"
    )
    run = load_run(train(recipe, tmp_path / "run", "cpu", print_every=0))
    assert run.recipe == recipe and run.net.class_dim == (128 if inner == "reg" else None) and len(run.net.mixer) == 2
    assert type(run.method.inner) is method_class(inner)
    # nothing of the mask is left at inference: the network takes all tokens and has no parameter of the method's
    extras = {"cls": torch.zeros(1, 128)} if inner == "reg" else {}
    out = run.net(torch.zeros(1, 3, 32, 32), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long), **extras)
    assert out.prediction.shape == (1, 3, 32, 32)


def test_default_settings_are_the_papers():
    config = MaskAlignConfig()
    assert (config.mask_ratio, config.inner.weight, config.inner.class_weight) == (0.25, 0.5, 0.03)
    assert make_recipe("maskalign", "paper").network.mixer_depth == 2
