"""Randomness is a function of seed, step and name; batches are shuffled epochs laid end to end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base import seeding
from maskalign_lab.base.seeding import batch_indices, generator, key, rng

KEYS = st.tuples(st.integers(0, 2**40), st.integers(0, 10**7), st.text(max_size=5))


@settings(deadline=None, max_examples=100)
@given(KEYS, KEYS)
def test_keys_are_equal_if_all_three_parts_are(one, other):
    assert (key(*one) == key(*other)) is (one == other)
    assert 0 <= key(*one) < 2**63


@pytest.mark.parametrize("other", [(1, 5, "noise"), (0, 6, "noise"), (0, 5, "time"), (0, 5, "noise ")])
def test_each_part_makes_another_stream_and_history_makes_none(other):
    first = torch.randn(8, generator=generator(0, 5, "noise"))
    torch.manual_seed(3)
    rng(0, 5, "noise").standard_normal(1000)
    assert torch.equal(torch.randn(8, generator=generator(0, 5, "noise")), first)
    assert not torch.equal(torch.randn(8, generator=generator(*other)), first)
    assert not np.array_equal(rng(*other).standard_normal(8), rng(0, 5, "noise").standard_normal(8))


def stream(n, batch, seed, epochs):
    """The indices of the first epochs."""
    steps = range(math.ceil(epochs * n / batch))
    return np.concatenate([batch_indices(n, batch, step, seed) for step in steps])[: epochs * n].reshape(epochs, n)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 50), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_epochs_are_permutations(n, batch, seed):
    epochs = stream(n, batch, seed, 3)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert np.array_equal(stream(n, 7, seed, 3), epochs)  # whatever the batch


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 50), batch=st.integers(1, 160), step=st.integers(0, 40), seed=st.integers(0, 5))
def test_indices_are_those_of_the_definition(n, batch, step, seed):
    """Number p of the stream is number p % n of epoch p // n; a batch belongs to its caller, who may change it."""
    places = range(step * batch, (step + 1) * batch)
    order = {epoch: rng(seed, epoch, "epoch").permutation(n) for epoch in {p // n for p in places}}
    found = batch_indices(n, batch, step, seed)
    assert found.dtype == np.int64 and found.tolist() == [order[p // n][p % n] for p in places]
    found[:] = 0
    assert batch_indices(n, batch, step, seed).tolist() == [order[p // n][p % n] for p in places]


def test_an_epoch_is_permuted_once(monkeypatch):
    made, make = [], seeding.rng
    monkeypatch.setattr(seeding, "rng", lambda *given: made.append(given) or make(*given))
    seeding.epoch_order.cache_clear()
    for step in range(9):
        batch_indices(12, 8, step, 0)
    assert made == [(0, epoch, "epoch") for epoch in range(6)]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(20, 50), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_no_two_epochs_have_the_same_order(n, batch, seed):
    """Two of 20 indices would agree by luck once in 20! times; of neighbours, a shuffled epoch keeps about one."""
    epochs = np.concatenate([stream(n, batch, seed, 4), stream(n, batch, seed + 1, 4)])
    assert len({tuple(epoch) for epoch in epochs}) == 8
    follows = [set(zip(epoch, epoch[1:])) for epoch in [np.arange(n), *epochs]]
    assert all(len(one & other) < n / 2 for at, one in enumerate(follows) for other in follows[:at])
