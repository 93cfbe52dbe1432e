"""Resampling: intervals cover, shuffles keep what an image holds, and both are the same whenever they are asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.resampling import bootstrap, permutation_null, shuffled
from maskalign_lab.base.seeding import generator


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, 0, "values"))


def largest(maps):
    return maps.amax(-1)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    """400 surveys of 60 images: 0.95 within four errors of a share, and the percentile interval is a little short."""
    held = 0
    for survey in range(400):
        low, high = bootstrap(lambda maps: maps[..., 0], values(60, 1, seed=survey), draws=400, seed=survey)
        held += bool(low <= 0 <= high)
    assert 0.90 < held / 400 < 0.99


def test_samples_are_drawn_from_by_themselves_and_leading_axes_together():
    one = (64 * values(256, 3)).round() / 64  # sums and means of these are exact in any order
    apart = bootstrap(lambda a, b: (a - b).abs().amax(-1), one, one)
    together = bootstrap(lambda maps: (maps[..., 0, :] - maps[..., 1, :]).abs().amax(-1), torch.stack([one, one]))
    assert apart[1] > 0.05 and together[1] == 0


def test_the_mean_of_the_draws_is_the_map():
    sample = values(2, 50, 4)
    low, high = bootstrap(lambda maps: maps, sample, draws=500)
    assert low.shape == (2, 4) and (low < sample.mean(-2)).all() and (sample.mean(-2) < high).all()


@settings(deadline=None, max_examples=20)
@given(b=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_shuffled_image_keeps_its_values_and_its_conditions_together(b, n, seed):
    sample = values(b, n, seed=seed)
    moved = shuffled(torch.stack([sample, 2 * sample]), seed, 0)
    assert torch.equal(moved[0].sort(-1).values, sample.sort(-1).values)
    assert torch.equal(moved[1], 2 * moved[0])


def test_both_are_reproducible_and_every_seed_is_another():
    sample = values(40, 5)
    for drawn in (
        lambda seed: bootstrap(largest, sample, draws=50, seed=seed),
        lambda seed: permutation_null(largest, sample, repeats=3, seed=seed),
    ):
        again, first, other = drawn(0), drawn(0), drawn(1)
        assert torch.equal(again, first) and not torch.equal(first, other)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_favourite_stands_out_and_noise_does_not(strength):
    sample = values(300, 16) + strength * (torch.arange(16) == 5)
    null = permutation_null(largest, sample, repeats=99)
    above = (null >= largest(sample.mean(0))).float().mean()
    assert above == 0 if strength else 0.01 < above < 0.99
