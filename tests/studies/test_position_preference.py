"""Position preference: an exact split, bounded numbers, three kinds of pull, and a decomposition with known answers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskalign_lab.base.resampling import permutation_null
from maskalign_lab.base.seeding import generator
from maskalign_lab.gradient_norms import (
    concentration,
    gradient_norms_at,
    noised_inputs,
    null_concentration,
    observe,
    token_gradient_norms,
)
from maskalign_lab.measure.decomposition import decompose, fitted
from maskalign_lab.measure.token_pulls import norms_at, pulls_at
from maskalign_lab.position_preference import (
    agreement,
    at_times,
    correlations,
    entropy,
    gini_again,
    parts_at,
    peak_again,
    position_covariance,
    position_share,
    pull_parts,
    uniform_null,
)
from maskalign_lab.runs.run import load_run
from maskalign_lab.training.repa import cosine_alignment, projector


def drawn(*shape: int, seed: int = 0, name: str = "drawn") -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, 0, name)).double()


# ---- the parts of a pull


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), length=st.floats(0.01, 100))
def test_the_three_parts_add_up_to_the_log_of_the_norm(seed, length):
    torch.manual_seed(seed)
    mlp, hidden, features = projector(8, 12, 6).double(), length * drawn(3, 9, 8, seed=seed), drawn(3, 9, 6, seed=seed)
    parts = pull_parts(mlp, hidden, features)
    exact = token_gradient_norms(mlp, hidden, features).log()
    torch.testing.assert_close(parts.sum(0), exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts[1], -mlp(hidden).norm(dim=-1).log(), rtol=0, atol=1e-10)


def test_each_part_feels_what_it_is_named_after():
    """A longer teacher token changes nothing; a longer projection changes the length alone; a gain the gain and the length."""
    torch.manual_seed(0)
    hidden, features, linear = (
        drawn(2, 5, 8),
        drawn(2, 5, 8, name="features"),
        torch.nn.Linear(8, 8, bias=False).double(),
    )
    before = pull_parts(linear, hidden, features)
    torch.testing.assert_close(pull_parts(linear, hidden, 7 * features), before)
    longer = pull_parts(linear, 3 * hidden, features) - before
    torch.testing.assert_close(longer, torch.tensor([0, -np.log(3), 0])[:, None, None].expand_as(longer))
    linear.weight.data *= 3
    louder = pull_parts(linear, hidden, features) - before
    torch.testing.assert_close(louder, torch.tensor([0, -np.log(3), np.log(3)])[:, None, None].expand_as(louder))


def test_a_token_that_agrees_exactly_has_no_pull_and_no_nan():
    parts = pull_parts(torch.nn.Identity(), torch.ones(1, 2, 4).double(), torch.ones(1, 2, 4).double())
    assert not parts.isnan().any() and parts.sum(0).max() < -30


def test_parts_work_under_no_grad():
    with torch.no_grad():
        assert not pull_parts(projector(8, 12, 6).double(), drawn(1, 4, 8), drawn(1, 4, 6)).requires_grad


# ---- how much is position


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, 4), n=st.integers(2, 20), seed=st.integers(0, 99))
def test_covariances_of_the_parts_add_up_to_that_of_the_whole(k, n, seed):
    one, other = drawn(2, k, n, seed=seed)
    found = position_covariance(one, other)
    whole = position_covariance(one.sum(0, keepdim=True), other.sum(0, keepdim=True)).squeeze()
    torch.testing.assert_close(found.sum(), whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, found.mT)


@pytest.mark.parametrize("images", [8, 200])
def test_the_share_of_position_is_unbiased(images):
    """Whatever the number of images, by chance and with a map of a third of the variance."""
    slope = torch.linspace(-1, 1, 16).double()
    slope = slope / (2 * slope.var()).sqrt()
    levels = 5 * drawn(400, images, 1, name="levels of the images")
    for add, expected in ((0, 0), (slope, 1 / 3)):
        found = position_share(drawn(400, images, 16) + levels + add)
        assert abs(found.mean() - expected) < 5 * found.std() / 20 + 0.01 / images
    assert position_share(levels[0] + slope) == pytest.approx(1)


# ---- bounded numbers


@settings(deadline=None, max_examples=50)
@given(n=st.integers(2, 100), seed=st.integers(0, 99), sparse=st.booleans())
def test_measures_stay_within_their_ends(n, seed, sparse):
    one = torch.rand(n, generator=generator(seed, 0, "map")).double()
    if sparse:
        one[1:] = 0  # a ratio of extremes would be infinite
    assert 1 - 1e-9 <= peak_again(one, one) <= n + 1e-9
    assert -1e-9 <= gini_again(one, one) <= 1 - 1 / n + 1e-9
    assert -1e-9 <= entropy(one) <= 1 + 1e-9


def test_the_uniform_null_is_that_of_study_01_and_leaves_what_is_asked_again_at_chance():
    ratios = uniform_null(lambda one, other: concentration((one + other) / 2), 512, 16, repeats=60)
    theirs = null_concentration(512, 16, repeats=60)
    assert abs(ratios.mean() - theirs.mean()) < 5 * (ratios.std() + theirs.std()) / 60**0.5
    for again, chance in ((peak_again, 1), (gini_again, 0)):
        null = uniform_null(again, 64, 16, repeats=200)
        assert abs(null.mean() - chance) < 5 * null.std() / 200**0.5


# ---- alike?


@settings(deadline=None, max_examples=20)
@given(leading=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 99))
def test_correlations_are_those_of_numpy_for_any_leading_axes(leading, seed):
    one, other = drawn(*leading, 3, 7, seed=seed), drawn(*leading, 2, 7, seed=seed, name="other")
    found = correlations(one, other)
    assert found.shape == (*leading, 3, 2)
    for place in np.ndindex(*leading):
        torch.testing.assert_close(found[place], torch.corrcoef(torch.cat([one[place], other[place]]))[:3, 3:])


def test_a_flat_map_is_like_nothing():
    assert correlations(torch.ones(1, 5), drawn(1, 5).float()).item() == 0


def test_agreement_of_shuffled_images_is_luck():
    """A map that two halves share is found; of shuffled images nothing is left of it, however many there are."""
    one, other = drawn(2, 600, 16) + torch.linspace(-1, 1, 16)
    found = lambda *maps: agreement(*(each.unsqueeze(-2) for each in maps)).squeeze()  # noqa: E731
    assert found(one.mean(0), other.mean(0)) > 0.9
    chance = permutation_null(found, one, other, repeats=200)
    assert abs(chance.mean()) < 5 * chance.std() / 200**0.5


# ---- with respect to what


@pytest.fixture(scope="module")
def observed():
    """A network with a class token, which must be left out of all maps."""
    return observe(load_run("reg-shapes", device="cpu"))


@pytest.fixture(scope="module")
def images(observed):
    return observed.run.survey_images(6)


INDEX = np.array([1, 4])


def shown_to(observed, images):
    shown = noised_inputs(observed.run, images, INDEX, torch.full((2,), 0.5), step=1)
    return shown, observed.features(images)[INDEX].float()


def losses(observed, x_t, t, y, cls_t, features):
    hidden = observed.net.hidden(x_t, t, y, observed.depth, cls_t)[:, 1:]
    return cosine_alignment(observed.projector(hidden), features)


def test_pulls_on_parameters_are_those_of_a_loop(observed, images):
    found = pulls_at(observed, images, observed.features(images), INDEX, 0.5, "parameters")
    shown, features = shown_to(observed, images)
    block = observed.net.blocks[observed.depth - 1].requires_grad_(True)
    try:
        with torch.enable_grad():
            each = losses(observed, *shown, features)
            for place in ((0, 0), (0, 37), (1, 63)):
                gradients = torch.autograd.grad(each[place], list(block.parameters()), retain_graph=True)
                expected = sum(gradient.square().sum() for gradient in gradients).sqrt()
                torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=0)
    finally:
        block.requires_grad_(False)
    assert found.shape == (2, observed.net.side**2)


def test_pulls_on_inputs_are_those_of_every_patch(observed, images):
    found = pulls_at(observed, images, observed.features(images), INDEX, 0.5, "inputs")
    (x_t, *others), features = shown_to(observed, images)
    x_t.requires_grad_()
    with torch.enable_grad():
        loss = losses(observed, x_t, *others, features).sum()
    (gradient,) = torch.autograd.grad(loss, x_t)
    p, side = observed.net.patch_size, observed.net.side
    for i, row, column in ((0, 0, 0), (1, 2, 5)):
        patch = gradient[i, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
        torch.testing.assert_close(found[i, row * side + column], patch.norm(), rtol=1e-4, atol=0)


def test_hidden_is_what_study_01_measures_and_the_parts_add_up_to_it(observed, images):
    times, features = (0.2, 0.9), observed.features(images)
    norms = norms_at(observed, images, times)
    torch.testing.assert_close(norms[1], gradient_norms_at(observed, images, features, np.arange(6), 0.9))
    torch.testing.assert_close(parts_at(observed, images, times).sum(1).exp(), norms, rtol=1e-3, atol=0)


def test_another_word_is_refused_with_the_nearest(observed, images):
    with pytest.raises(ValueError, match="unknown wrt 'input'. Did you mean 'inputs'"):
        pulls_at(observed, images, observed.features(images), INDEX, 0.5, "input")


def test_batches_lie_end_to_end():
    at = lambda index, t: torch.tensor(index).float()[None, :, None] + t  # noqa: E731
    found = at_times(at, 7, (0.0, 0.5), batch_size=3)
    assert found.shape == (2, 1, 7, 1)
    assert torch.equal(found[1, 0, :, 0], torch.arange(7) + 0.5)


# ---- which cause


def centred(maps: torch.Tensor) -> torch.Tensor:
    return maps - maps.mean(-1, keepdim=True)


def grid(teachers: int, students: int, seed: int, n: int = 9):
    """Effects that add up to zero over levels and have no mean over positions, and all cases of the grid."""
    common, *effects = (
        centred(drawn(k, n, seed=seed, name=f"{k} of {j}")) for j, k in enumerate((1, teachers, students))
    )
    effects = [effect - effect.mean(0) for effect in effects]
    cases = list(itertools.product(range(teachers), range(students)))
    maps = torch.stack([common[0] + effects[0][a] + effects[1][b] for a, b in cases])
    return [common, *effects], cases, maps


def levels(cases) -> dict[str, list]:
    return {"teacher": [f"teacher {a}" for a, _ in cases], "student": [b for _, b in cases]}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 99), st.integers(0, 6))
def test_effects_that_add_up_are_found_exactly_however_many_cases_are_missing(teachers, students, seed, missing):
    effects, cases, maps = grid(teachers, students, seed)
    order = torch.randperm(len(cases), generator=generator(seed, 0, "missing")).tolist()
    kept = order[: len(cases) - missing] + order[:1]  # and one of them twice
    try:
        found = decompose(maps[kept], levels([cases[i] for i in kept]))
    except ValueError:  # too few are left
        assume(False)
    assume(len({cases[i][0] for i in kept}) == teachers and len({cases[i][1] for i in kept}) == students)
    truth = [effect.square().mean().item() for effect in effects]
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == pytest.approx([*(np.array(truth) / sum(truth)), 0], abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_names_order_and_units_do_not_matter(seed, scale):
    _, cases, maps = grid(4, 3, seed)
    noisy = (maps + drawn(*maps.shape, seed=seed, name="noise"))[1:]
    factors = levels(cases[1:])
    found = decompose(noisy, factors)
    turned = decompose(scale * noisy + 5, {name: factors[name] for name in reversed(factors)})
    renamed = decompose(noisy, {name: [hash(level) for level in of] for name, of in factors.items()})
    back = decompose(noisy.flip(0), {name: of[::-1] for name, of in factors.items()})
    for other in (turned, renamed, back):
        assert {name: other[name] for name in found} == pytest.approx(found)


@pytest.mark.parametrize("missing", [(), (0, 5, 6, 10, 15)])
def test_noise_makes_no_factor_important(missing):
    """The mean of many estimates is within five errors of the truth, in a full grid and in one that lacks cases."""
    effects, cases, maps = grid(4, 4, seed=0)
    kept = [i for i in range(16) if i not in missing]
    maps, factors = maps[kept], levels([cases[i] for i in kept])
    truth = [effect.square().mean().item() for effect in effects]
    noise = [centred(2 * drawn(*maps.shape, seed=k, name="noise")) for k in range(300)]
    for signal, expected in ((0, [0, 0, 0]), (maps, truth)):
        found = np.array([list(fitted(signal + each, factors).variances.values()) for each in noise])
        error = found.std(0, ddof=1) / 300**0.5
        assert (abs(found.mean(0) - [*expected, 4 * 8 / 9]) < 5 * error).all()


def test_the_maps_behind_the_shares_are_given_by_level():
    effects, cases, maps = grid(3, 2, seed=1)
    found = fitted(maps, levels(cases)).effects
    torch.testing.assert_close(found["common"]["all"], effects[0][0])
    torch.testing.assert_close(torch.stack([found["teacher"][f"teacher {a}"] for a in range(3)]), effects[1])


def test_one_factor_of_whole_cells_leaves_the_seeds_in_the_rest():
    """So interactions are told from seeds: what a factor of all combinations explains beyond the factors' own effects."""
    _, cases, maps = grid(3, 3, seed=2)
    pairs = 2 * cases
    interaction = centred(drawn(9, 9, name="interaction"))
    both = torch.cat([maps + interaction] * 2) + 0.1 * centred(drawn(18, 9, name="seeds"))
    by_cell = decompose(both, {"cell": pairs})
    apart = decompose(both, levels(pairs))
    assert by_cell["rest"] < 0.02 < 0.1 < apart["rest"]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"teacher": [0, 0, 1]}, "'teacher' has 3 levels for 4 maps"),
        ({"teacher": [0, 0, 1, 1], "student": [0, 0, 1, 1]}, "cannot tell the 3 effects of teacher, student apart"),
        ({"teacher": [0, 1, 2, 3]}, "4 maps cannot tell the 4 effects"),
        ({"rest": [0, 0, 1, 1]}, "cannot be called 'rest'"),
    ],
)
def test_a_grid_that_answers_nothing_is_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        decompose(drawn(4, 6), factors)


def test_flat_maps_are_refused():
    with pytest.raises(ValueError, match="nothing to explain"):
        decompose(torch.ones(4, 6), {"teacher": [0, 0, 1, 1]})
