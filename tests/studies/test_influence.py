"""Which token moves which behind the mixer: exact, by probes, and what is read off the matrix."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.diffusion.layers import patchify, take
from maskalign_lab.diffusion.objectives import Objective, denoising_loss
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.studies.maskalign.influence import (
    Influence,
    Outputs,
    alignment_outputs,
    exact_influence,
    hidden_outputs,
    predicted_patches,
    probed_columns,
    probed_influence,
    squared_pullbacks,
    velocity_outputs,
)
from maskalign_lab.studies.maskalign.influence_shares import (
    at_positions,
    grid_distance,
    influence_figure,
    loss_influence,
    restored,
    split,
    summary,
    token_maps,
)
from maskalign_lab.training.repa import projector
from maskalign_lab.workbench.plots import png

DEPTH = 2


def network(class_dim: int | None = 6, mixer_depth: int = 1, fresh: bool = False, width: int = 8, **more) -> SiT:
    """A grid of 3 by 3 in float64; moved away from the identity unless it is to be fresh."""
    torch.manual_seed(0)
    sizes = dict(input_size=6, patch_size=2, in_channels=2, depth=DEPTH, heads=2, num_classes=5)
    net = SiT(**sizes | more, width=width, class_dim=class_dim, mixer_depth=mixer_depth).double()
    if not fresh:
        for parameter in net.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def inputs(net: SiT, images: int = 2) -> dict:
    """Images, noise, times, labels, and a class token if the network has one."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, images, 2, 6, 6).double()
    cls = torch.randn(images, net.class_dim).double() if net.class_dim else None
    return dict(x=x, noise=noise, t=torch.rand(images).double(), y=torch.arange(images), cls=cls)


def embedded(net: SiT, given: dict):
    return net.embed(given["x"], given["t"], given["y"], given["cls"])


def some_kept(images: int = 2, kept: int = 6, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.stack([torch.randperm(9)[:kept] for _ in range(images)])


def all_losses(net: SiT, given: dict, c, keep) -> dict[str, Outputs]:
    torch.manual_seed(2)
    mlp = projector(net.width, 12, 5).double().requires_grad_(False)
    features = torch.randn(len(c), 9 + bool(net.class_dim), 5).double()
    return {
        "alignment": alignment_outputs(net, c, mlp, features, 1, keep),
        "velocity": velocity_outputs(net, c, Objective(), given["x"], given["noise"], given["t"], keep),
    }


CLASS = pytest.mark.parametrize("class_dim", [None, 6])


@CLASS
@pytest.mark.parametrize("depth", range(DEPTH + 1))
@pytest.mark.parametrize("masked", [False, True])
def test_the_matrix_is_that_of_the_full_jacobian(class_dim, depth, masked):
    net = network(class_dim)
    tokens, c = embedded(net, inputs(net))
    keep = some_kept() if masked else None
    found = exact_influence(hidden_outputs(net, c, depth, keep), tokens, at_once=3)
    for b in range(2):
        one = hidden_outputs(net, c[b : b + 1], depth, None if keep is None else keep[b : b + 1])
        jacobian = torch.autograd.functional.jacobian(one, tokens[b : b + 1])[0, :, :, 0]  # (m, e, n, d)
        torch.testing.assert_close(found.squared[b], jacobian.square().sum((1, 3)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("which", ["alignment", "velocity"])
def test_an_entry_of_every_loss_agrees_with_finite_differences(which):
    net = network()
    given, keep = inputs(net, 1), some_kept(1)
    tokens, c = embedded(net, given)
    losses = all_losses(net, given, c, keep)[which]
    found, step = exact_influence(losses, tokens), 1e-6
    for i, j in ((0, 0), (2, 0), (1, 4), (4, 9)):
        moves = torch.zeros(8, 10, 8).double()
        moves[range(8), j, range(8)] = step
        slopes = torch.stack([losses(tokens + m)[0, i, 0] - losses(tokens - m)[0, i, 0] for m in moves]) / (2 * step)
        torch.testing.assert_close(found.norm[0, i, j], slopes.norm(), rtol=1e-6, atol=1e-9)


@CLASS
@pytest.mark.parametrize("mixer_depth", [0, 2])
def test_hidden_tokens_are_those_of_the_network(class_dim, mixer_depth):
    net = network(class_dim, mixer_depth)
    given, keep = inputs(net), some_kept()
    tokens, c = embedded(net, given)
    out = net(given["x"], given["t"], given["y"], given["cls"], keep=keep, collect=(1, 2))
    for depth in (1, 2):
        assert torch.equal(hidden_outputs(net, c, depth, keep)(tokens), out.hidden[depth])


@pytest.mark.parametrize("more", [{}, {"learn_sigma": True}, {"data_at_one": True}])
def test_predicted_patches_are_those_of_the_network(more):
    net = network(**more)
    given, keep = inputs(net), some_kept()
    tokens, c = embedded(net, given)
    out = net(given["x"], given["t"], given["y"], given["cls"], keep=keep)
    assert torch.equal(predicted_patches(net, hidden_outputs(net, c, DEPTH, keep)(tokens), c), out.prediction)


@pytest.mark.parametrize(("prediction", "space"), list(itertools.product(("x", "eps", "v"), repeat=2)))
def test_velocity_losses_of_patches_average_to_the_loss_that_is_trained(prediction, space):
    net, objective = network(), Objective(prediction=prediction, loss_space=space)
    given, keep = inputs(net), some_kept()
    tokens, c = embedded(net, given)
    x, noise = (take(patchify(given[name], 2), keep) for name in ("x", "noise"))
    out = net(given["x"], given["t"], given["y"], given["cls"], keep=keep)
    whole = denoising_loss(objective, out.prediction, x, noise, given["t"])
    each = velocity_outputs(net, c, objective, given["x"], given["noise"], given["t"], keep)(tokens)
    torch.testing.assert_close(each[..., 0].mean(1), whole)


@CLASS
@pytest.mark.parametrize("net_of", [dict(mixer_depth=0), dict(mixer_depth=2, fresh=True)])
@pytest.mark.parametrize("masked", [False, True])
def test_without_a_mixer_or_with_a_fresh_one_the_matrix_is_the_identity(class_dim, net_of, masked):
    net = network(class_dim, **net_of)
    tokens, c = embedded(net, inputs(net))
    keep = some_kept() if masked else None
    found = exact_influence(hidden_outputs(net, c, 0, keep), tokens)
    first = int(class_dim is not None)
    columns = found.positions + first
    if first:
        columns = torch.cat([torch.zeros(2, 1, dtype=torch.long), columns], 1)
    identity = torch.zeros_like(found.squared).scatter(2, columns.unsqueeze(2), net.width)
    assert torch.equal(found.squared, identity)
    assert (summary(found).own == 1).all() and (summary(found).others == 0).all()
    assert summary(found).distance.isnan().all()


@CLASS
@pytest.mark.parametrize("which", ["alignment", "velocity"])
def test_dropped_tokens_have_exactly_zero_gradient_without_a_mixer_and_not_with_one(class_dim, which):
    for mixer_depth in (0, 1, 2):
        net = network(class_dim, mixer_depth)
        given, keep = inputs(net), some_kept()
        tokens, c = embedded(net, given)
        squared = loss_influence(all_losses(net, given, c, keep)[which], tokens)
        gone = torch.ones(2, 9, dtype=torch.bool).scatter(1, keep, False)
        of_patches = squared[:, -9:]
        assert (of_patches[~gone] > 0).all()
        assert (of_patches[gone] > 0).all() if mixer_depth else (of_patches[gone] == 0.0).all()
        assert (split(squared, 3, keep).dropped == 0.0).all() == (mixer_depth == 0)


@CLASS
def test_dropped_tokens_have_exactly_zero_gradient_behind_a_fresh_mixer(class_dim):
    net = network(class_dim, mixer_depth=2, fresh=True)
    given, keep = inputs(net), some_kept()
    tokens, c = embedded(net, given)
    squared = loss_influence(all_losses(net, given, c, keep)["alignment"], tokens)
    gone = torch.ones(2, 9, dtype=torch.bool).scatter(1, keep, False)
    assert (squared[:, -9:][gone] == 0.0).all() and (squared[:, -9:][~gone] > 0).all()
    assert (loss_influence(all_losses(net, given, c, keep)["velocity"], tokens) == 0).all()  # it predicts zero


def test_gradients_of_the_summed_loss_are_at_most_the_rows_together():
    """The triangle inequality ties the two views: |sum_i dl_i/du_j| <= sum_i I_ij."""
    net = network()
    given, keep = inputs(net), some_kept()
    tokens, c = embedded(net, given)
    for losses in all_losses(net, given, c, keep).values():
        bound = exact_influence(losses, tokens).norm.sum(1)
        assert (loss_influence(losses, tokens).sqrt() <= bound + 1e-12).all()


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(9)), st.booleans())
def test_permuting_patches_permutes_rows_and_columns(order, with_class):
    net, order = network(6 if with_class else None), torch.tensor(order)
    net.pos_embed.zero_()
    given = inputs(net)
    tokens, c = embedded(net, given)
    mixed = given | {"x": _permuted(given["x"], order)}
    moved = embedded(net, mixed)[0]
    a, b = (exact_influence(hidden_outputs(net, c, 1), each) for each in (tokens, moved))
    torch.testing.assert_close(b.patches, a.patches[:, order][:, :, order], rtol=1e-9, atol=1e-12)
    if with_class:
        torch.testing.assert_close(b.squared[:, 0, 1:], a.squared[:, 0, 1:][:, order], rtol=1e-9, atol=1e-12)


def _permuted(images, order):
    from maskalign_lab.diffusion.layers import unpatchify

    return unpatchify(patchify(images, 2)[:, order], 2)


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(6)))
def test_the_order_of_kept_patches_orders_the_rows_only(order):
    net, keep = network(), some_kept()
    tokens, c = embedded(net, inputs(net))
    a, b = (exact_influence(hidden_outputs(net, c, 2, each), tokens) for each in (keep, keep[:, list(order)]))
    torch.testing.assert_close(b.patches, a.patches[:, list(order)], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(summary(b)), torch.stack(summary(a)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(at_positions(b), at_positions(a), rtol=1e-9, atol=1e-12, equal_nan=True)


def every_sign(channels: int) -> torch.Tensor:  # (2^channels, channels)
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=channels))).double()


@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_over_every_possible_probe_is_exact(masked):
    """Unbiasedness without statistics: 16 sign vectors of four channels are all there are."""
    net = network(width=4)
    tokens, c = embedded(net, inputs(net))
    outputs = hidden_outputs(net, c, 1, some_kept() if masked else None)
    exact = exact_influence(outputs, tokens).squared
    signs = every_sign(4)[:, None, None].expand(16, 2, exact.shape[1], 4)
    mean = torch.stack([row.mean(0) for row in squared_pullbacks(outputs, tokens, signs)], 1)
    torch.testing.assert_close(mean, exact, rtol=1e-11, atol=1e-13)


def test_the_mean_over_every_possible_grouped_probe_is_the_column_sum():
    net = network(None, width=4)
    tokens, c = embedded(net, inputs(net))
    outputs = hidden_outputs(net, c, 1, some_kept(kept=3))
    whole = replace(outputs, rows=lambda copies: outputs(copies).flatten(1).unsqueeze(1))
    signs = every_sign(12)[:, None, None].expand(4096, 2, 1, 12)
    mean = next(squared_pullbacks(whole, tokens, signs)).mean(0)
    torch.testing.assert_close(mean, exact_influence(outputs, tokens).squared.sum(1), rtol=1e-11, atol=1e-13)


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 2**31))
def test_probes_converge_and_their_standard_error_tells_how_far_they_are(seed):
    net = network()
    tokens, c = embedded(net, inputs(net))
    outputs = hidden_outputs(net, c, 1, some_kept())
    exact = exact_influence(outputs, tokens).squared
    few, many = (probed_influence(outputs, tokens, probes, seed, at_once=256) for probes in (8, 512))
    off_few, off_many = ((guess.squared - exact).norm() / exact.norm() for guess in (few, many))
    assert off_many < 0.12 and off_many < off_few  # 8 times smaller on average
    assert 0.5 < ((many.squared - exact) / many.error).square().mean() < 2
    ratio = few.error.mean() / many.error.mean()
    assert 5 < ratio < 11.3  # sqrt(512 / 8) = 8, less what eight probes underestimate


def test_probed_columns_agree_with_the_exact_ones():
    net = network()
    tokens, c = embedded(net, inputs(net))
    outputs = hidden_outputs(net, c, 2, some_kept())
    exact = exact_influence(outputs, tokens).squared.sum(1)
    guess, error = probed_columns(outputs, tokens, 1024, at_once=256)
    assert ((guess - exact) / error).abs().max() < 5
    assert error.norm() / exact.norm() < 0.1


def test_probes_of_an_identity_and_of_one_channel_are_exact():
    bare = network(mixer_depth=0)
    given, keep = inputs(bare), some_kept()
    tokens, c = embedded(bare, given)
    guess = probed_influence(hidden_outputs(bare, c, 0, keep), tokens, 2)
    assert torch.equal(guess.squared, exact_influence(hidden_outputs(bare, c, 0, keep), tokens).squared)
    assert (guess.error == 0).all()
    net = network()
    tokens, c = embedded(net, given)
    for losses in all_losses(net, given, c, keep).values():
        guess, exact = probed_influence(losses, tokens, 2), exact_influence(losses, tokens)
        torch.testing.assert_close(guess.squared, exact.squared)


def test_probes_depend_on_their_seed_alone():
    net = network()
    tokens, c = embedded(net, inputs(net))
    outputs = hidden_outputs(net, c, 1)
    first, again, other = (
        probed_influence(outputs, tokens, 5, seed, n).squared for seed, n in ((3, 2), (3, 5), (4, 5))
    )
    torch.testing.assert_close(first, again, rtol=1e-12, atol=0)
    assert not torch.allclose(first, other)


def test_images_do_not_know_of_each_other():
    net, keep = network(), some_kept()
    given = inputs(net)
    tokens, c = embedded(net, given)
    both = exact_influence(hidden_outputs(net, c, 1, keep), tokens)
    for b in range(2):
        alone = exact_influence(hidden_outputs(net, c[b : b + 1], 1, keep[b : b + 1]), tokens[b : b + 1])
        torch.testing.assert_close(alone.squared[0], both.squared[b], rtol=1e-10, atol=1e-13)


def test_float32_agrees_with_float64_and_leaves_the_network_alone():
    net = network().requires_grad_(True)
    tokens, c = embedded(net, inputs(net))
    exact = exact_influence(hidden_outputs(net, c, 1), tokens)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    single = exact_influence(hidden_outputs(net.float(), c.float(), 1), tokens.float())
    assert single.squared.dtype == torch.float32 and not single.squared.requires_grad
    torch.testing.assert_close(single.squared.double(), exact.squared, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name].float()) for name, value in net.state_dict().items())


@CLASS
def test_behind_the_mixer_dropped_patches_have_their_uniform_share_over_all_masks(class_dim):
    """The mixer cannot know the mask: over every way to keep 7 of 9, the ratio to uniform averages to one."""
    net = network(class_dim)
    tokens, c = (each.expand(36, *each.shape[1:]) for each in embedded(net, inputs(net, 1)))
    keep = torch.tensor(list(itertools.combinations(range(9), 7)))
    told = summary(exact_influence(hidden_outputs(net, c, 0, keep), tokens))
    torch.testing.assert_close(told.dropped_over_uniform.mean(), torch.tensor(1.0).double(), rtol=1e-10, atol=0)
    assert told.dropped_over_uniform.std() > 0.01  # of one mask it does vary


@CLASS
def test_shares_by_hand(class_dim):
    first = int(class_dim is not None)
    torch.manual_seed(5)
    squared, keep = torch.rand(1, 2 + first, 9 + first).double(), torch.tensor([[4, 8]])
    told = summary(Influence(squared, 3, keep))
    own, others, dropped, classes, distances = [], [], [], [], []
    for row, position in zip(squared[0, first:], (4, 8), strict=True):
        patches = row[first:] / row.sum()
        rest = {j: float(patches[j]) for j in range(9) if j != position}
        own.append(float(patches[position]))
        others.append(sum(rest.values()))
        dropped.append(sum(value for j, value in rest.items() if j not in (4, 8)))
        classes.append(float(row[:first].sum() / row.sum()))
        away = {j: ((j // 3 - position // 3) ** 2 + (j % 3 - position % 3) ** 2) ** 0.5 for j in rest}
        distances.append(sum(rest[j] * away[j] for j in rest) / others[-1])
    for value, expected in zip(told, (own, classes, others, dropped), strict=False):
        assert float(value) == pytest.approx(sum(expected) / 2)
    assert float(told.distance) == pytest.approx(sum(distances) / 2)
    ratios = [d / o / (7 / 8) for d, o in zip(dropped, others, strict=True)]
    assert float(told.dropped_over_uniform) == pytest.approx(sum(ratios) / 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.booleans(), st.floats(1e-6, 1e6))
def test_shares_sum_to_one_and_do_not_depend_on_scale(kept, with_class, scale):
    first, keep = int(with_class), some_kept(kept=kept, seed=kept)
    squared = torch.rand(2, kept + first, 9 + first).double()
    told, scaled = (summary(Influence(each, 3, keep)) for each in (squared, scale * squared))
    torch.testing.assert_close(told.own + told.others + told.class_token, torch.ones(2).double())
    torch.testing.assert_close(torch.stack(told), torch.stack(scaled), equal_nan=True)
    assert told.dropped_over_uniform.isnan().all() == (kept == 9)
    flat = summary(Influence(torch.ones_like(squared), 3, keep))
    torch.testing.assert_close(flat.distance_over_uniform, torch.ones(2).double())
    parts = split(squared[:, 0], 3, keep)
    torch.testing.assert_close(parts.class_token + parts.kept + parts.dropped, torch.ones(2).double())
    assert (parts.class_token > 0).all() == with_class


def test_grid_distances():
    far = grid_distance(3)
    assert far[0, 0] == 0 and far[0, 1] == far[0, 3] == 1 and far[0, 8] == 8**0.5 and torch.equal(far, far.T)


def test_nothing_is_restored_without_a_mixer_and_something_with_one():
    keep = some_kept()
    for mixer_depth in (0, 1):
        net = network(mixer_depth=mixer_depth)
        tokens, c = embedded(net, inputs(net))
        masked, full = (exact_influence(hidden_outputs(net, c, 2, each), tokens) for each in (keep, None))
        back = restored(masked, full)
        assert (back > 0).all() if mixer_depth else (back == 0.0).all()
        at_the_mixer = [exact_influence(hidden_outputs(net, c, 0, each), tokens) for each in (keep, None)]
        if mixer_depth:  # nothing has been lost before the first block
            torch.testing.assert_close(restored(*at_the_mixer), torch.ones(2).double())


@CLASS
def test_maps_of_a_token_are_its_row_and_column(class_dim):
    net, keep = network(class_dim), torch.tensor([[7, 0, 2, 3], [1, 4, 5, 8]])
    tokens, c = embedded(net, inputs(net))
    found = exact_influence(hidden_outputs(net, c, 1, keep), tokens)
    first = int(class_dim is not None)
    on, of = token_maps(found, 2)
    torch.testing.assert_close(on[0].flatten(), found.norm[0, 2 + first, first:])
    assert on[1].isnan().all()  # dropped in the second image
    for row, position in enumerate((7, 0, 2, 3)):
        assert of[0].flatten()[position] == found.norm[0, row + first, 2 + first]
    assert of.isnan().sum((1, 2)).tolist() == [5, 5]


def test_maps_of_the_class_token():
    net, keep = network(), some_kept()
    tokens, c = embedded(net, inputs(net))
    found = exact_influence(hidden_outputs(net, c, 1, keep), tokens)
    on, of = token_maps(found, None)
    assert torch.equal(on.flatten(1), found.norm[:, 0, 1:])
    assert torch.equal(of.flatten(1).gather(1, keep), found.norm[:, 1:, 0]) and of.isnan().sum() == 6


def test_the_figure_fits_and_survives_rows_without_influence():
    keep = some_kept()
    figure = influence_figure(Influence(torch.zeros(2, 6, 9), 3, keep), image=1, title="nothing")
    assert figure.axes[0].get_title() == "nothing" and len(png(figure)) <= 100_000


def test_what_cannot_be_is_refused():
    net = network()
    tokens, c = embedded(net, inputs(net))
    outputs, keep = hidden_outputs(net, c, 0), some_kept()
    full, masked = exact_influence(outputs, tokens), exact_influence(hidden_outputs(net, c, 0, keep), tokens)
    with pytest.raises(ValueError, match="depth 9 is outside the network"):
        hidden_outputs(net, c, 9)
    with pytest.raises(ValueError, match="features of 9 tokens; expected 10"):
        alignment_outputs(net, c, torch.nn.Identity(), torch.zeros(2, 9, 8), 1, keep)
    with pytest.raises(ValueError, match="1 probes leave no standard error"):
        probed_influence(outputs, tokens, 1)
    with pytest.raises(ValueError, match="token 9 is outside the grid: it has patches 0 to 8"):
        token_maps(full, 9)
    with pytest.raises(ValueError, match="no row and column of a class token"):
        token_maps(Influence(torch.ones(1, 9, 9), 3), None)
    with pytest.raises(ValueError, match="the first influence must have dropped patches"):
        restored(full, masked)
    with pytest.raises(ValueError, match="influence of shape"):
        Influence(torch.ones(1, 4, 9), 3)
