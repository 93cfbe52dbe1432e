"""Stability gap and conditional preference against what they must be."""

import numpy as np
import pytest
import torch

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.layers import take
from maskalign_lab.gradient_norms import concentration, observe
from maskalign_lab.maskalign import draw_keep
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.maskalign.influence import exact_influence, hidden_outputs
from maskalign_lab.studies.maskalign.influence_shares import restored
from maskalign_lab.studies.maskalign.measures import (
    dropped_share,
    look,
    masked_norms,
    null_preference,
    preference,
    restored_share,
    stability_gap,
)
from maskalign_lab.training.repa import cosine_alignment


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """REG, and REPA under MaskAlign, each trained for a few steps and then shaken, so that tokens do mix."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKALIGN_LAB_CACHE", str(folder / "cache"))
        for name, method, more in (("reg", "reg", ""), ("repa", "maskalign", "method.inner.name=repa")):
            recipe = make_recipe(method, "smoke", overrides=f"{more} training.steps=2 training.warmup=1 data.n=64")
            run = load_run(train(recipe, folder / name, "cpu", print_every=0))
            torch.manual_seed(0)
            for p in run.net.parameters():
                p.data.add_(0.05 * torch.randn_like(p))
            found[name] = observe(run)
    return found


@pytest.fixture(scope="module")
def images(observed):
    return observed["reg"].run.images("validation", 24)


@pytest.mark.parametrize("name", ["reg", "repa"])
def test_the_gap_by_hand(observed, images, name):
    """Image by image and mask by mask, with the definition's two losses over the class token and the same kept patches."""
    each, first = observed[name], int(name == "reg")
    found = stability_gap(each, images, (0.5,), ratio=0.25, images=3, masks=2)
    seen = look(each, images, np.arange(3), 0.5)
    gaps = []
    for mask in range(2):
        keep = draw_keep(3, 64, 48, generator(0, mask, "masking"))
        for i in range(3):
            rows = [*range(first), *(keep[i] + first).tolist()]
            losses = []
            for kept in (keep, None):
                hidden = each.net.hidden(seen.x_t, seen.t, seen.y, each.depth, seen.cls_t, kept)
                mine = each.projector(hidden)[i] if kept is not None else each.projector(hidden)[i, rows]
                losses.append(cosine_alignment(mine[None], seen.teacher[i, rows][None]).mean())
            gaps.append((losses[0] - losses[1]).item())
    np.testing.assert_allclose(found.gap[0], np.array(gaps).reshape(2, 3).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["reg", "repa"])
def test_dropping_nothing_leaves_no_gap(observed, images, name):
    gap = stability_gap(observed[name], images, (0.3, 0.8), ratio=0.0, images=16, masks=2)
    assert gap.gap.shape == (2, 16) and np.abs(gap.gap).max() < 1e-6
    assert np.abs(stability_gap(observed[name], images, (0.3,), ratio=0.5, images=16, masks=2).gap).max() > 1e-4


def test_a_network_whose_tokens_do_not_meet_has_no_gap(observed, images):
    each = observed["reg"]
    weights = {name: value.clone() for name, value in each.net.state_dict().items()}
    for block in each.net.blocks:
        block.adaLN_modulation[1].weight.data.zero_()
        block.adaLN_modulation[1].bias.data.zero_()
    gap = stability_gap(each, images, (0.5,), ratio=0.5, images=16, masks=2).gap
    each.net.load_state_dict(weights)
    assert np.abs(gap).max() < 1e-6


def test_the_gap_is_paired(observed, images):
    """The same masks, noise and images whatever else is asked for."""
    one = stability_gap(observed["reg"], images, (0.2, 0.6), images=8, masks=2)
    other = stability_gap(observed["reg"], images, (0.6,), images=8, masks=2)
    np.testing.assert_allclose(one.gap[1], other.gap[0], atol=1e-7)


@pytest.mark.parametrize("name", ["reg", "repa"])
def test_norms_under_a_mask_are_those_of_the_kept_tokens(observed, images, name):
    each = observed[name]
    seen = look(each, images, np.arange(4), 0.5)
    keep = draw_keep(4, 64, 20, generator(0, 0, "test"))
    norms = masked_norms(each, seen, keep)
    hidden = each.net.hidden(seen.x_t, seen.t, seen.y, each.depth, seen.cls_t, keep).detach().requires_grad_()
    first = int(name == "reg")
    losses = cosine_alignment(each.projector(hidden)[:, first:], take(seen.teacher[:, first:], keep))
    slope = torch.autograd.grad(losses[:, 7].sum(), hidden)[0]
    torch.testing.assert_close(norms[:, 7], slope[:, 7 + first].norm(dim=1))


def test_preference_is_conditional_on_being_kept(observed, images):
    """Every kept set marks a tenth of itself, so the mean over positions of what is marked given kept is about a tenth."""
    for ratio, kept in ((0.0, 64), (0.25, 48), (0.75, 16)):
        found = preference(observed["repa"], images, (0.5,), ratio, images=24)
        share = max(1, round(0.1 * kept)) / kept
        assert found.probability.shape == (1, 64) and abs(found.probability.mean() - share) < 0.03
        assert ((found.probability >= 0) & (found.probability <= 1)).all() and (found.mean_norm >= 0).all()


def test_the_null_grows_with_the_ratio_and_shrinks_with_images():

    def extremes(images, ratio):
        return torch.stack([concentration(p) for p in null_preference(images, 64, ratio, repeats=5)]).mean()

    few, many, harder = extremes(256, 0.25), extremes(4096, 0.25), extremes(4096, 0.75)
    assert few > many > 1 and harder > many
    torch.testing.assert_close(
        null_preference(512, 64, 0.25, repeats=1).mean(), torch.tensor(5 / 48), rtol=0.02, atol=0
    )


def test_dropped_tokens_are_reached_through_a_mixer_only(observed, images):
    without, with_one = (dropped_share(observed[name], images, 0.5, images=8) for name in ("reg", "repa"))
    assert (without.dropped == 0).all() and (with_one.dropped > 0).all()
    torch.testing.assert_close(without.class_token + without.kept + without.dropped, torch.ones(8))


def test_what_is_restored_is_the_ratio_of_exact_influences(observed, images):
    """By random directions over sums of rows, against the two matrices themselves."""
    one = observed["repa"]
    found = restored_share(one, images, 0.5, images=2, probes=400)
    seen, net = look(one, images, np.arange(2), 0.5), one.net
    keep = draw_keep(2, 64, 48, generator(0, 0, "restored"))
    tokens, c = net.embed(seen.x_t, seen.t, seen.y, seen.cls_t)
    masked, full = (exact_influence(hidden_outputs(net, c, one.depth, k), tokens.detach()) for k in (keep, None))
    torch.testing.assert_close(found, restored(masked, full).to(found), rtol=0.15, atol=0)
    assert (found > 0).all() and (restored_share(observed["reg"], images, 0.5, images=2, probes=2) == 0).all()
