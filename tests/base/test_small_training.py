"""The small loop: stopped anywhere it goes on to the same bits, its average and its schedule are what they are called."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.base.seeding import generator
from maskalign_lab.base.small_training import Checkpoints, Schedule, complete, progress, train

SCHEDULE = Schedule(steps=11, lr=0.05, warmup=3)


def start(seed: int = 0):
    """A network, its optimiser, and losses of two parts that are keyed by the step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def losses(step):
        x = torch.randn(16, 3, generator=generator(seed, step, "points"))
        guess = net(x)
        return {"first": (guess[:, 0] - x.sum(1)).square().mean(), "second": 0.1 * guess[:, 1].square().mean()}

    return net, torch.optim.AdamW(net.parameters()), losses


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def whole():
    """The average and the network after an uninterrupted training."""
    net, *rest = start()
    *_, last = train(net, *rest, SCHEDULE, decay=0.8)
    return weights(last.model), weights(net)


# ---- interruptions


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_training_stopped_at_any_step_goes_on_to_the_same_bits(stop, whole, tmp_path):
    checkpoints = Checkpoints(tmp_path, 4, {"data": "points"})
    net, *rest = start()
    for step in train(net, *rest, SCHEDULE, 0.8, checkpoints):
        if step.step == stop:
            break
    kept = 4 * (stop // 4)
    assert steps_of(tmp_path) == list(range(4, kept + 1, 4))
    net, *rest = start()
    steps = list(train(net, *rest, SCHEDULE, 0.8, checkpoints))
    assert [step.step for step in steps] == list(range(kept or 1, 12))
    assert same(weights(steps[-1].model), whole[0]) and same(weights(net), whole[1])


def test_a_complete_training_has_a_last_step_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, 11, {"data": "points"})
    first = complete(train(*start(), SCHEDULE, None, checkpoints), print_every=0)
    again = list(train(*start(), SCHEDULE, None, checkpoints))
    assert len(again) == 1 and (again[0].step, again[0].losses) == (11, {})
    assert same(weights(again[0].model), weights(first.model)) and again[0].seconds == pytest.approx(first.seconds)


def test_the_state_tells_what_it_is_of_and_how_long_it_took(tmp_path):
    identity = {"data": "points", "config": {"widths": (3, 8)}}
    seconds = [s.seconds for s in train(*start(), SCHEDULE, None, Checkpoints(tmp_path, 5, identity))]
    state = json.loads((tmp_path / "steps" / "000010" / "state.json").read_text())
    assert state == {"data": "points", "config": {"widths": [3, 8]}, "seconds": seconds[9], "step": 10}
    goes_on = list(train(*start(), SCHEDULE, None, Checkpoints(tmp_path, 5, identity)))
    assert goes_on[0].seconds == seconds[9] <= goes_on[1].seconds


@pytest.mark.parametrize(
    "other, named", [({"data": "lines"}, "data 'points'"), ({"data": "points", "lr": 1}, "lr None")]
)
def test_another_training_is_refused(other, named, tmp_path):
    complete(train(*start(), SCHEDULE, None, Checkpoints(tmp_path, 5, {"data": "points"})), print_every=0)
    net, *rest = start(seed=1)
    before = weights(net)
    with pytest.raises(FileExistsError, match=f"trained with {named}"):
        next(train(net, *rest, SCHEDULE, None, Checkpoints(tmp_path, 5, other)))
    assert same(weights(net), before) and steps_of(tmp_path) == [5, 10]


# ---- averages


def test_the_average_is_the_recursion_written_out():
    net, *rest = start()
    expected = weights(net)
    for step in train(net, *rest, SCHEDULE, decay=0.3):
        decay = min(0.3, step.step / (9 + step.step))
        expected = [decay * a + (1 - decay) * p for a, p in zip(expected, weights(net), strict=True)]
        torch.testing.assert_close(weights(step.model), expected)
        assert step.model is not net and not any(p.requires_grad for p in step.model.parameters())


def test_an_average_does_not_change_what_is_trained(whole):
    net, *rest = start()
    *_, last = train(net, *rest, SCHEDULE)
    assert last.model is net and same(weights(net), whole[1]) and not same(whole[0], whole[1])


# ---- schedule, steps and progress


@given(steps=st.integers(2, 500), warmup=st.integers(0, 100), lr=st.floats(1e-5, 1.0))
def test_the_rate_rises_then_falls_and_stays_below_its_bound(steps, warmup, lr):
    rates = [Schedule(steps, lr, warmup).rate(step) for step in range(steps)]
    assert rates[0] == lr * min(1, 1 / max(1, warmup)) and 0 < min(rates) and max(rates) <= lr
    for step in range(warmup, steps):
        assert rates[step] == pytest.approx(lr * math.cos(math.pi * step / steps / 2) ** 2)


def test_every_step_has_the_rate_of_the_schedule():
    net, optimizer, losses = start()
    for step in train(net, optimizer, losses, SCHEDULE):
        assert optimizer.param_groups[0]["lr"] == SCHEDULE.rate(step.step - 1)
        assert all(p.grad is None for p in net.parameters())
        assert set(step.losses) == {"first", "second"} and not any(x.requires_grad for x in step.losses.values())


def test_large_gradients_are_cut_to_norm_one():
    net = nn.Linear(4, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    next(train(net, optimizer, lambda step: {"steep": 1e6 * net.weight.sum()}, Schedule(1, 0.5, 0)))
    assert (net.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_progress_is_told_at_both_ends(capsys):
    last = complete(train(*start(), SCHEDULE), print_every=1e9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/11", "11/11"] and lines[-1] == progress(last)
    assert "first " in lines[0] and "second " in lines[0] and lines[-1].endswith("0:00 left")
    complete(train(*start(), SCHEDULE), print_every=0)
    assert not capsys.readouterr().out
