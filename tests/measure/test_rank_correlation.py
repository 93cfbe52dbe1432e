"""Rank correlations between arms and within them: against scipy, against brute force, and blind to what they should not see."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from maskalign_lab.base.seeding import rng
from maskalign_lab.measure.rank_correlation import (
    RankCorrelation,
    badness,
    both_metrics,
    left,
    of_correlation,
    rank_correlation,
    spearman,
)
from maskalign_lab.measure.wording import NotTrained


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed, 0, "test").normal(size=shape)


@settings(deadline=None, max_examples=50)
@given(arrays(float, (2, 7), elements=st.integers(0, 4).map(float)))
def test_ranks_are_scipys_with_ties_too(pair):
    assume(all(len(set(each)) > 1 for each in pair))
    assert spearman(*pair) == pytest.approx(spearmanr(*pair).statistic, abs=1e-12)


def test_the_null_of_a_few_arms_is_every_order():
    one, other = draws(5, 3), draws(5, 3, seed=1)
    found = rank_correlation(one, other)
    every = [abs(spearmanr(one.mean(1), other.mean(1)[list(order)]).statistic) for order in permutations(range(5))]
    assert found.p == pytest.approx(np.mean(np.array(every) >= abs(found.rho) - 1e-9))
    assert np.mean(np.array(every) >= found.least - 1e-6) <= 0.05 < np.mean(np.array(every) >= found.least - 0.11)


def test_four_arms_decide_nothing_and_five_need_all():
    perfect = lambda n: rank_correlation(np.arange(n * 1.0)[:, None], np.arange(n * 1.0)[:, None])  # noqa: E731
    assert perfect(4).least == np.inf and perfect(4).verdict(+1) == "undecided"
    assert perfect(5).least == 1 and perfect(5).p == pytest.approx(2 / 120) and perfect(5).verdict(+1) == "reproduced"


@pytest.mark.parametrize("part", ["between", "within"])
def test_where_there_is_nothing_luck_is_as_rare_as_it_says(part):
    """50 tables of 6 arms and 3 seeds without any relation: 2.5 are expected below 0.05, and 8 lie more than three errors above."""
    p = [rank_correlation(draws(6, 3, seed=2 * k), draws(6, 3, seed=2 * k + 1), part).p for k in range(50)]
    assert sum(each <= 0.05 for each in p) < 8 and 0.3 < np.mean(p) < 0.7


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1000))
def test_within_arms_neither_arms_nor_seeds_are_seen(seed):
    one, other = draws(6, 4, seed=seed), draws(6, 4, seed=seed + 1)
    arms, seeds = 10 * draws(6, 1, seed=seed + 2), 10 * draws(1, 4, seed=seed + 3)
    np.testing.assert_allclose(left(one + arms + seeds), left(one), atol=1e-9)
    moved = rank_correlation(one + arms + seeds, other + arms - seeds, "within").rho
    assert moved == pytest.approx(rank_correlation(one, other, "within").rho)


def test_seeds_of_one_arm_are_no_new_witnesses():
    """Thirty networks of five arms are as unsure about arms as five are."""
    one, other = draws(5, 1), draws(5, 1, seed=3)
    few, many = rank_correlation(one, other), rank_correlation(np.tile(one, 6), np.tile(other, 6))
    assert (few.low, few.high, few.p) == (many.low, many.high, many.p)


def test_interval_and_null_must_agree():
    sure = dict(rho=0.8, low=0.5, high=0.9, p=0.01, least=0.7, arms=9, seeds=3)
    assert RankCorrelation(**sure).verdict(+1) == "reproduced" and RankCorrelation(**sure).verdict(-1) == "contradicted"
    assert RankCorrelation(**sure).verdict(0) == "positive"
    assert RankCorrelation(**sure | {"p": 0.06}).verdict(+1) == RankCorrelation(**sure | {"low": -0.1}).verdict(+1)
    assert of_correlation("?", RankCorrelation(**sure | {"least": np.inf})).detectable == "nothing"


def test_networks_that_do_not_differ_say_nothing():
    with pytest.raises(NotTrained, match="differ in both metrics between arms"):
        rank_correlation(np.ones((5, 2)), draws(5, 2))
    with pytest.raises(NotTrained, match="within arms"):
        rank_correlation(np.arange(5.0)[:, None] + np.zeros((5, 2)), draws(5, 2), "within")


def test_arms_and_seeds_that_have_both():
    row = lambda arm, seed, **more: {"arm": arm, "seed": seed, "budget": "steps", **more}  # noqa: E731
    rows = [row(arm, seed, gap=seed * 1.0, velocity=k + 0.5) for k, arm in enumerate("abcd") for seed in (5, 6, 7)]
    rows[0].pop("gap")  # seed 5 of arm a
    rows += [row("e", 5, velocity=1.0), row("a", 5, gap=9.0) | {"budget": "flops"}]
    names, gap, velocity = both_metrics(rows, "gap", "velocity")
    assert names == ["b", "c", "d", "a"] or names == ["a", "b", "c", "d"]
    assert gap.tolist() == 4 * [[6, 7]] and sorted(velocity[:, 0]) == [0.5, 1.5, 2.5, 3.5]
    assert both_metrics(rows, "gap", "velocity", ["d", "c", "b"])[0] == ["b", "c", "d"]
    with pytest.raises(NotTrained, match="three arms with 'gap' and 'velocity'"):
        both_metrics(rows, "gap", "velocity", ["a", "b"])


def test_bad_is_large():
    assert [badness(metric) for metric in ("velocity", "frechet", "accuracy", "gap")] == [1, 1, -1, 1]
