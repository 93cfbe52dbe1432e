"""x, eps and v follow from one another: exactly away from the ends, finitely at them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.diffusion.interpolants import INTERPOLANTS, convert, interpolate, velocity
from maskalign_lab.diffusion.objectives import Objective, denoising_loss

KINDS = ("x", "eps", "v")
pairs = st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)).filter(lambda pair: pair[0] != pair[1])
paths = st.sampled_from(sorted(INTERPOLANTS))


def scene(seed, t, path):
    """Truth of all three kinds, the noised input and the times, in float64."""
    x, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = torch.tensor([t], dtype=torch.float64)
    return {"x": x, "eps": noise, "v": velocity(x, noise, times, path)}, interpolate(x, noise, times, path), times


@settings(max_examples=200, deadline=None)
@given(pairs, paths, st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_there_and_back_is_exact(pair, path, t, seed):
    (source, target), (truth, x_t, times) = pair, scene(seed, t, path)
    there = convert(truth[source], source, target, x_t, times, path)
    back = convert(there, target, source, x_t, times, path)
    scale = max(value.abs().max().item() for value in truth.values())
    conditioning = 1.0 if path != "vp" else 1e3  # VP's alpha falls to 0.01 at t = 0.95
    assert (back - truth[source]).abs().max() <= 1e-12 * scale * conditioning
    assert (there - truth[target]).abs().max() <= 1e-12 * scale * conditioning


@settings(max_examples=100, deadline=None)
@given(pairs, st.sampled_from(["linear", "cosine"]), st.sampled_from([0.0, 1e-9, 1 - 1e-9, 1.0]), st.floats(1e-3, 0.1))
def test_the_ends_are_finite_with_a_clamp(pair, path, t, clamp):
    (source, target), (truth, x_t, times) = pair, scene(0, t, path)
    assert convert(truth[source], source, target, x_t, times, path, clamp).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["x", "eps"]), st.floats(0, 1), st.floats(1e-3, 0.3), st.integers(0, 99))
def test_a_clamp_bounds_a_velocity_as_a_whole(source, t, clamp, seed):
    """JiT: v = (x - z) / max(1 - t, clamp), in its time; from noise in the same way."""
    truth, x_t, times = scene(seed, t, "linear")
    guess = truth[source] + 1
    by_hand = (x_t - guess) / max(t, clamp) if source == "x" else (guess - x_t) / max(1 - t, clamp)
    torch.testing.assert_close(convert(guess, source, "v", x_t, times, "linear", clamp), by_hand)


@pytest.mark.parametrize(
    ("source", "target", "t"), [("x", "eps", 0.0), ("x", "v", 0.0), ("eps", "x", 1.0), ("eps", "v", 1.0)]
)
def test_the_ends_are_singular_without_one(source, target, t):
    truth, x_t, times = scene(0, t, "linear")
    wrong = truth[source] + 0.1
    assert not convert(wrong, source, target, x_t, times).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), paths, st.floats(0, 1), st.integers(0, 99))
def test_a_perfect_network_has_no_loss(prediction, space, path, t, seed):
    objective = Objective(path, prediction, space, clamp=0.05)
    t = min(t, 0.999) if path == "vp" else t
    truth, _, times = scene(seed, max(t, 1e-3) if path == "vp" else t, path)
    assert denoising_loss(objective, truth[prediction], truth["x"], truth["eps"], times).max() < 1e-18


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.floats(0.1, 0.9), st.integers(0, 99))
def test_loss_spaces_differ_by_a_factor_of_t_alone(prediction, t, seed):
    truth, _, times = scene(seed, t, "linear")
    guess = truth[prediction] + torch.randn(
        1, 3, 4, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    losses = {
        s: denoising_loss(Objective("linear", prediction, s), guess, truth["x"], truth["eps"], times) for s in KINDS
    }
    torch.testing.assert_close(losses["eps"] * t**2, losses["x"] * (1 - t) ** 2)
    torch.testing.assert_close(losses["v"] * t**2, losses["x"])
