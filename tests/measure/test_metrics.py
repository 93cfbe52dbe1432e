"""What is measured on samples: known answers, brute force, and no dependence on what should not matter."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.measure import metrics
from maskalign_lab.measure.metrics import Reading, read


class Colours(nn.Module):
    """Pictures of one pixel are their own features, logits and attributes."""

    def forward(self, images):
        colours = images.flatten(1)
        return Reading(colours, colours, {"x": colours[:, 0], "hue": colours[:, 1] % 1})


JUDGE = Colours().eval()


def cloud(n: int, d: int, name: str, mean: float = 0.0) -> Reading:
    """Correlated Gaussian features."""
    mix = torch.randn(d, d, generator=generator(0, 0, "mix"))
    features = mean + torch.randn(n, d, generator=generator(0, 0, name)) @ mix
    return Reading(features, features, {"x": features[:, 0], "hue": features[:, 1] % 1})


# ---- the Fréchet distance


def closed_form(first: np.ndarray, second: np.ndarray) -> float:
    """The distance written out, with SciPy's matrix square root."""
    a, b = (np.cov(part, rowvar=False) for part in (first, second))
    means = np.square(first.mean(0) - second.mean(0)).sum()
    return means + np.trace(a + b - 2 * sqrtm(a @ b).real)


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_frechet_is_the_closed_form(mean):
    first, second = cloud(300, 12, "a"), cloud(200, 12, "b", mean)
    expected = closed_form(first.features.double().numpy(), second.features.double().numpy())
    assert metrics.frechet_distance(JUDGE, first, second) == pytest.approx(expected, rel=1e-8)


def test_frechet_is_zero_for_itself_symmetric_and_blind_to_order():
    first, second = cloud(300, 12, "a"), cloud(300, 12, "b", 0.2)
    shuffled = second.rows(torch.randperm(300, generator=generator(0, 0, "order")))
    there = metrics.frechet_distance(JUDGE, first, second)
    assert abs(metrics.frechet_distance(JUDGE, first, first)) < 1e-6 < there
    assert metrics.frechet_distance(JUDGE, second, first) == pytest.approx(there, rel=1e-8)
    assert metrics.frechet_distance(JUDGE, first, shuffled) == pytest.approx(there, rel=1e-8)


def test_frechet_is_biased_and_kernel_is_not():
    first, second = cloud(2000, 40, "a"), cloud(2000, 40, "b")
    pairs = [(first.rows(slice(n)), second.rows(slice(n))) for n in (100, 400, 2000)]
    biased = [metrics.frechet_distance(JUDGE, *pair) for pair in pairs]
    assert biased[0] > 3 * biased[1] > 9 * biased[2] > 0
    for pair in pairs[1:]:
        mean, deviation = metrics.kernel_distance(JUDGE, *pair)
        assert abs(mean) < 2 * deviation


# ---- the kernel distance


def whole_kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The unbiased estimate from all pairs, by loops."""

    def kernel(a, b):
        return float((a @ b / len(a) + 1) ** 3)

    def among(rows):
        return np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    return among(first) + among(second) - 2 * np.mean([kernel(a, b) for a in first for b in second])


def test_subsets_average_to_the_estimate_from_all_pairs():
    first, second = cloud(40, 5, "a"), cloud(40, 5, "b", 1.0)
    mean, deviation = metrics.kernel_distance(JUDGE, first, second, subsets=2000)
    expected = whole_kernel_distance(first.features.double(), second.features.double())
    assert abs(mean - expected) < 5 * deviation / 2000**0.5


def test_kernel_follows_its_seed_and_leaves_the_global_state_alone():
    first, second = cloud(60, 5, "a"), cloud(60, 5, "b")
    before = torch.random.get_rng_state()
    found = [metrics.kernel_distance(JUDGE, first, second, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- accuracy


@given(n=st.integers(1, 300), data=st.data())
@settings(max_examples=30, deadline=None)
def test_accuracy_has_wilsons_interval(n, data):
    right = data.draw(st.integers(0, n))
    labels = torch.zeros(n, dtype=torch.long)
    logits = torch.eye(2)[(torch.arange(n) >= right).long()]
    share = metrics.judge_accuracy(JUDGE, Reading(logits, logits), labels)
    p, z = right / n, 1.959963984540054
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert share == pytest.approx((p, middle - half, middle + half), abs=1e-9)


# ---- attributes


def turns(count: int) -> st.SearchStrategy:
    return st.lists(st.floats(0, 0.999), min_size=count, max_size=count).map(np.array)


@given(first=turns(7), second=turns(7), shift=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_circular_distance_is_the_best_assignment(first, second, shift):
    """On a circle the best assignment keeps the order, so it is one of n shifts of the sorted values."""
    a, b = np.sort(first), np.sort(second)
    gaps = [np.abs(a - np.roll(b, k)) for k in range(len(b))]
    expected = min(np.minimum(gap, 1 - gap).mean() for gap in gaps)
    assert metrics.circular_distance(first, second) == pytest.approx(expected, abs=2 / 720)
    assert metrics.circular_distance(first + shift, second + shift) == pytest.approx(expected, abs=4 / 720)


def test_attribute_distance_is_the_shift():
    pictures = cloud(400, 3, "a").features[..., None, None]
    moved = pictures + torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1)
    distances = metrics.attribute_distances(JUDGE, pictures, moved)
    assert distances["x"] == pytest.approx(0.5, abs=1e-5)
    assert 0 < distances["hue"] <= 0.25 + 2 / 720


# ---- labels


@given(n=st.integers(1, 500), classes=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_balanced_labels(n, classes, seed):
    labels = metrics.balanced_labels(n, classes, seed)
    assert len(labels) == n and torch.equal(labels, metrics.balanced_labels(n, classes, seed))
    for prefix in (labels, labels[: n // 2]):
        counts = prefix.bincount(minlength=classes)
        assert len(counts) == classes and counts.max() - counts.min() <= 1
    more = metrics.balanced_labels(n + 7 * classes, classes, seed)
    assert torch.equal(more[: n - n % classes], labels[: n - n % classes])  # a longer list begins with the shorter one


def test_labels_have_an_order_of_their_own():
    first, second = metrics.balanced_labels(100, 10, 0), metrics.balanced_labels(100, 10, 1)
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(100) % 10)
    with pytest.raises(ValueError, match="num_classes=0"):
        metrics.balanced_labels(10, 0)


# ---- reading


def test_reading_does_not_depend_on_batches():
    pictures = cloud(100, 3, "a").features[..., None, None]
    whole, parts = read(JUDGE, pictures), read(JUDGE, pictures, batch_size=7)
    assert torch.equal(whole.features, parts.features) and torch.equal(whole.attributes["x"], parts.attributes["x"])
    assert read(JUDGE, whole) is whole


def test_a_judge_in_training_and_spoilt_pictures_are_refused():
    pictures = torch.zeros(5, 3, 1, 1)
    with pytest.raises(ValueError, match="judge.eval"):
        read(Colours().train(), pictures)
    pictures[3, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 images"):
        metrics.frechet_distance(JUDGE, pictures, pictures)


def test_too_few_pictures_and_missing_labels_are_refused():
    few = cloud(1, 3, "a")
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance(JUDGE, few, few)
    with pytest.raises(ValueError, match="at least 4"):
        metrics.kernel_distance(JUDGE, few, few)
    with pytest.raises(ValueError, match="2 labels for 1 images"):
        metrics.judge_accuracy(JUDGE, few, torch.tensor([0, 1]))


def test_judged_is_json_and_agrees_with_its_parts():
    real, fake = cloud(200, 3, "a"), cloud(200, 3, "b", 0.3)
    labels = fake.logits.argmax(1)
    found = metrics.judged(JUDGE, real, fake, labels)
    assert json.loads(json.dumps(found)) == found
    assert found["frechet"] == pytest.approx(metrics.frechet_distance(JUDGE, real, fake), rel=1e-3)
    assert found["accuracy"] == 1 and set(found["accuracy by class"].values()) == {1.0}


def test_judged_briefly_is_a_part_of_judged():
    real, fake, other = cloud(200, 3, "a"), cloud(200, 3, "b", 0.3), cloud(200, 3, "c")
    labels = fake.logits.argmax(1).roll(1)
    brief, found = metrics.judged_briefly(JUDGE, real, fake, other, labels), metrics.judged(JUDGE, real, fake, labels)
    floor = metrics.judged(JUDGE, real, other, labels)["frechet"]
    assert brief == {"frechet": found["frechet"], "frechet floor": floor, "accuracy": found["accuracy"]}


# ---- the loss


def test_validation_loss_is_paired_whatever_the_batches():
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=1, heads=2, num_classes=3)
    x, y = torch.randn(20, 3, 8, 8, generator=generator(0, 0, "x")), torch.arange(20) % 3
    whole = metrics.validation_loss(net, Objective(), x, y, bins=3)
    parts = metrics.validation_loss(net, Objective(), x, y, bins=3, batch_size=7)
    torch.testing.assert_close(whole, parts)
    assert not torch.equal(whole, metrics.validation_loss(net, Objective(), x, y, bins=3, seed=1))
