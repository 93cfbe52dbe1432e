"""Ranks, spectra, intervals, CKNNA and the linear probe against slow and obvious versions of themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from maskalign_lab.base.statistics import (
    bootstrap_by_group,
    cknna,
    effective_rank,
    four_digits,
    gram,
    gram_cknna,
    hsic,
    jackknife,
    linear_probe,
    mean_interval,
    radial_spectrum,
    share_half,
)

# ---- ranks and spectra


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.floats(0.1, 10))
def test_effective_rank_counts_equal_directions_and_knows_no_frame(k, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64)).Q
    points = torch.cat([frame[:k], -frame[:k]])  # k equally strong directions, centred
    assert effective_rank(points) == pytest.approx(k, rel=1e-6)
    cloud = torch.randn(30, 12, generator=draw, dtype=torch.float64)
    assert effective_rank(scale * cloud @ frame + 3) == pytest.approx(effective_rank(cloud), rel=1e-6)
    assert 1 <= effective_rank(cloud) <= 12


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([7, 8, 16, 33]), st.integers(0, 99))
def test_a_spectrum_loses_nothing(side, seed):
    images = torch.randn(3, 2, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(radial_spectrum(images).sum(1), images.square().flatten(1).mean(1))
    turned = radial_spectrum(images.rot90(1, (2, 3)))
    torch.testing.assert_close(turned, radial_spectrum(images))


@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3, 4)])
def test_a_rank_is_of_points(shape):
    with pytest.raises(ValueError, match="at least 2 points"):
        effective_rank(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 9)])
def test_a_spectrum_is_of_square_images(shape):
    with pytest.raises(ValueError, match="square"):
        radial_spectrum(torch.zeros(shape))


# ---- intervals


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_values_have_no_interval_and_no_warning(n, recwarn):
    _, half = mean_interval(torch.ones(3, n))
    assert half.isnan().all() and not recwarn.list


def test_a_share_of_all_or_none_is_not_certain():
    """The interval is as wide for none as for all, is not 0, and shrinks with n."""
    none, every = (share_half(torch.full((40,), value)) for value in (False, True))
    assert (
        none.item() == pytest.approx(every.item()) and every > 0.05 and share_half(torch.full((400,), True)) < every / 5
    )


def test_an_interval_over_groups_is_that_of_their_means():
    """Copies of a value tell nothing new, and groups count alike, however large."""
    values, groups = np.array([0.0, 2.0, 4.0]), np.arange(3)
    few = bootstrap_by_group(values, groups)
    assert bootstrap_by_group(values.repeat([50, 1, 1]), groups.repeat([50, 1, 1])) == few
    mean, (low, high) = few
    assert mean == 2 and 0 <= low < 2 < high <= 4
    assert bootstrap_by_group(np.ones(4), np.zeros(4)) == (1, (1, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 60), st.integers(0, 99))
def test_a_jackknife_of_a_mean_is_the_interval_of_a_mean(n, seed):
    """Exactly, where every sample is a group; and every group is left out once."""
    values, seen = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), []

    def mean(rows):
        seen.append(set(range(n)) - set(rows.tolist()))
        return values[rows].mean().item()

    found, half = jackknife(mean, n, groups=n, seed=seed)
    assert found == pytest.approx(values.mean().item()) and half == pytest.approx(mean_interval(values)[1].item())
    seen.clear()
    jackknife(mean, n, groups=5, seed=seed)
    assert seen[-1] == set() and sorted(i for gone in seen for i in gone) == list(range(n))


def test_cknna_of_gram_matrices_is_that_of_features():
    a, b = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    assert gram_cknna(gram(a), gram(b), 5) == cknna(a, b, 5)
    rows = torch.arange(20)
    assert gram_cknna(gram(a)[rows][:, rows], gram(b)[rows][:, rows], 5) == pytest.approx(cknna(a[:20], b[:20], 5))
    with pytest.raises(ValueError, match="30 and 20 features"):
        gram_cknna(gram(a), gram(b[:20]), 5)


@pytest.mark.parametrize(("value", "shown"), [(0.123456, 0.1235), (-98765.4, -98770.0), (3e-7, 3e-7), (0.0, 0.0)])
def test_four_digits_count(value, shown):
    assert four_digits(value) == shown


# ---- representations


def slow_hsic(K, L):
    """Song et al. 2012, equation 5, as sums over distinct indices: all pairs, triples and quadruples."""
    n, one, two, three = len(K), 0.0, 0.0, 0.0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            one += K[i, j] * L[i, j]
            for q in range(n):
                if q in (i, j):
                    continue
                two += K[i, j] * L[i, q]
                three += sum(K[i, j] * L[q, r] for r in range(n) if r not in (i, j, q))
    pairs, triples = n * (n - 1), n * (n - 1) * (n - 2)
    return one / pairs - 2 * two / triples + three / (triples * (n - 3))


def slow_formula(K, L):
    """The closed form with loops; the marked matrices of CKNNA are not symmetric, so the order of indices matters."""
    n, pairs, chains = len(K), 0.0, 0.0
    for i in range(n):
        for j in range(n):
            pairs += K[i, j] * L[j, i] if i != j else 0
            chains += sum(K[i, j] * L[j, q] for q in range(n) if i != j and q != j)
    sums = sum(K[i, j] for i in range(n) for j in range(n) if i != j) * sum(
        L[i, j] for i in range(n) for j in range(n) if i != j
    )
    return (pairs + sums / ((n - 1) * (n - 2)) - 2 * chains / (n - 2)) / (n * (n - 3))


def slow_cknna(a, b, k):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    K, L = a @ a.T, b @ b.T

    def near(M, i):
        return set(sorted((j for j in range(len(M)) if j != i), key=lambda j: -M[i, j])[:k])

    def masked(M, others):
        keep = np.array(
            [[j in set.intersection(*(near(N, i) for N in others)) for j in range(len(M))] for i in range(len(M))]
        )
        return np.where(keep, M, 0.0)

    cross = slow_formula(masked(K, (K, L)), masked(L, (K, L)))
    own = [slow_formula(masked(M, (M,)), masked(M, (M,))) for M in (K, L)]
    return cross / math.sqrt(own[0] * own[1]) if own[0] * own[1] >= 0 else math.nan


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.integers(5, 9))
def test_hsic_is_the_sum_over_distinct_indices(seed, n):
    K, L = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    K, L = K + K.T, L + L.T
    assert float(hsic(K, L)) == pytest.approx(slow_hsic(K.numpy(), L.numpy()), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(2, 4))
def test_cknna_is_its_definition(seed, k):
    a = torch.randn(11, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b = a @ torch.randn(3, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.2
    own, slow = cknna(a, b, k), slow_cknna(a.numpy(), b.numpy(), k)
    assert own == pytest.approx(slow, rel=1e-9, abs=1e-9) or (math.isnan(own) and math.isnan(slow))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0.1, 10))
def test_cknna_ignores_rotation_scale_and_order_of_images(seed, scale):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 60, 6, generator=g)
    rotation, order = torch.linalg.qr(torch.randn(6, 6, generator=g))[0], torch.randperm(60, generator=g)
    value = cknna(a, b, 8)
    assert cknna(b, a, 8) == pytest.approx(value, abs=0.02)  # the estimator is not quite symmetric
    assert cknna(scale * a @ rotation, b, 8) == pytest.approx(value, rel=1e-3, abs=1e-3)
    assert cknna(a[order], b[order], 8) == pytest.approx(value, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("n", "m", "k"), [(10, 9, 3), (10, 10, 1), (10, 10, 10)])
def test_cknna_refuses_what_has_no_neighbours(n, m, k):
    with pytest.raises(ValueError, match="2 <= k < n"):
        cknna(torch.randn(n, 3), torch.randn(m, 3), k)


def test_the_probe_agrees_with_scikit_learn():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=g) + torch.nn.functional.one_hot(labels, 6) * 1.5
    train, test = x[:200], x[200:]
    mean, std = train.mean(0), train.std(0) + 1e-6
    theirs = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=1000).fit(
        ((train - mean) / std).numpy(), labels[:200].numpy()
    )
    ours = linear_probe(train, labels[:200], test).numpy()
    assert (ours == theirs.predict(((test - mean) / std).numpy())).mean() >= 0.99
