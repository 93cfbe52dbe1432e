"""CKNNA, probes and gradient cosines against slow and obvious versions of themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from maskalign_lab.base.seeding import generator
from maskalign_lab.base.statistics import cknna, hsic, linear_probe
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.objectives import Objective, draw_noise
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.measure.representation import cknna_over_depth, gradient_cosine, pooled_hidden, probe_over_depth
from maskalign_lab.training.methods import Batch, Draw, State
from maskalign_lab.training.repa import REPA, REPAConfig


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


def network(depth=3):
    torch.manual_seed(0)
    net = SiT(input_size=16, patch_size=4, in_channels=3, width=32, depth=depth, heads=4, num_classes=10)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


def test_pooled_hidden_is_the_mean_token_whatever_the_batch_size():
    net, x, y = network(), torch.randn(10, 3, 16, 16), torch.arange(10)
    small, large = (pooled_hidden(net, Objective(), x, y, 0.3, [1, 3], batch_size=size) for size in (3, 256))
    noise = draw_noise(Objective(), x.shape, generator(0, 0, "probing"))
    times = torch.full((10,), 0.3)
    hidden = net(interpolate(x, noise, times), times, y, collect=(1, 3)).hidden
    for depth in (1, 3):
        torch.testing.assert_close(small[depth], large[depth])
        torch.testing.assert_close(large[depth], hidden[depth].mean(1))


def test_a_class_that_can_be_seen_is_found_until_noise_hides_it():
    net, labels = network(), torch.arange(400) % 2
    x = 0.3 * torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + (2.0 * labels - 1).view(
        -1, 1, 1, 1
    )
    scores = probe_over_depth(net, Objective(), x, labels, [0.1, 1.0], [1, 3])
    assert scores.shape == (2, 2) and scores[0].min() > 0.95 and scores[1].max() < 0.65


def test_tokens_resemble_features_that_are_made_of_them():
    net, x = network(), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    times, null = torch.zeros(64), torch.full((64,), 10)
    features = net(x, times, null, collect=(2,)).hidden[2].detach()
    values = cknna_over_depth(net, Objective(), x, features, [0.0, 1.0], [1, 2, 3], k=5)
    assert values.shape == (2, 3) and values[0, 1] == pytest.approx(1, abs=1e-5) and values[0].argmax() == 1
    assert values[1].max() < 0.5


def test_the_gradient_cosine_is_that_of_two_backward_passes():
    net = network()
    repa = REPA(net, Objective(), REPAConfig(depth=2, projector_width=24), teacher_dims=(12,))
    batch = Batch(torch.randn(6, 3, 16, 16), torch.arange(6), torch.randn(6, 16, 12))
    values = gradient_cosine(repa, net, batch, [0.25, 0.75], [1, 2], seed=3)
    noise = draw_noise(Objective(), batch.x.shape, generator(3, 0, "noise"))
    for i, t in enumerate((0.25, 0.75)):
        for j, depth in enumerate((1, 2)):
            slopes = []
            for name in ("denoising", "alignment"):
                net.zero_grad(set_to_none=True)
                repa.loss(State(net, net, 0), batch, Draw(torch.full((6,), t), noise, batch.y)).parts[name].backward()
                slopes.append(torch.cat([p.grad.flatten() for p in net.blocks[depth - 1].parameters()]))
            assert values[i, j].item() == pytest.approx(torch.cosine_similarity(*slopes, dim=0).item(), abs=1e-5)
