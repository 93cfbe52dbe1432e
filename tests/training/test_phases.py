"""A step may have phases beyond the main one: who learns when, from what, and what a stop costs."""

import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.phased import config, duel, train
from shared.stored import content, same
from shared.survive import batches
from torch import nn

from maskalign_lab.base.checkpoints import step_folder, steps_of, whole_steps
from maskalign_lab.training.compiling import way_to_compile
from maskalign_lab.training.config import learning_rate
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import State
from maskalign_lab.training.side_by_side import OnlyAlone, check_stackable
from maskalign_lab.training.stopping import Guard, NonFinite
from maskalign_lab.training.trainee import Trainee

CPU = torch.device("cpu")


def steps_of_fit(pair, settings, run=None, batches=batches, **how):
    return list(fit(*pair, batches, settings, run, "cpu", **how))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing disturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


# ---- who learns when, and from what


def by_hand(settings, steps):
    """The same training in plain PyTorch: two optimisers, each with its own loss alone."""
    net, method = duel(lr=3e-3, betas=(0.5, 0.9))
    main = [*net.parameters(), method.scale]
    first = torch.optim.AdamW(main, betas=settings.betas, weight_decay=0, fused=True)
    second = torch.optim.AdamW(method.critic.parameters(), betas=(0.5, 0.9), weight_decay=0, fused=True)
    for step in range(steps):
        batch = batches(step)
        draw = Trainee(net, method, settings.seed).draw(batch, step, CPU)
        turns = [("main", first, main, learning_rate(settings, step))]
        if step >= 2:
            turns.append(("critic", second, [*method.critic.parameters()], 3 * learning_rate(settings, step - 2)))
        for phase, optimizer, weights, lr in turns:
            loss = method.loss(State(net, net, step), batch, draw, phase).total
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            nn.utils.clip_grad_norm_(weights, settings.clip)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    return net, method


def test_each_phase_is_a_training_of_its_own_after_the_main_one():
    """Against plain PyTorch, to the bit: order, schedules, clipping, and no gradient from one phase in the other."""
    settings = config(steps=6, lr=1e-3)
    pair = duel(lr=3e-3, betas=(0.5, 0.9))
    steps_of_fit(pair, settings)
    for ours, theirs in zip(pair, by_hand(settings, 6), strict=True):
        same({"": ours.state_dict()}, {"": theirs.state_dict()})


def test_a_module_learns_in_its_phase_alone():
    pair = duel(stop=4)
    steps_of_fit(pair, config(steps=6))
    main = [(step, "main", False, True, True) for step in range(6)]
    critic = [(step, "critic", True, False, False) for step in (2, 3)]
    assert pair[1].seen == sorted(main + critic, key=lambda each: (each[0], each[1] != "main"))
    assert not any(weight.requires_grad for weight in pair[1].critic.parameters())


def test_losses_and_norms_of_a_phase_go_by_its_name():
    steps = steps_of_fit(duel(), config(steps=3))
    assert [{*step.losses} for step in steps] == [{"far", "score"}] * 2 + [{"far", "score", "critic gap"}]
    assert [{*step.norms} for step in steps] == [{"network", "method", "gradient"}] * 2 + [
        {"network", "method", "gradient", "critic"}
    ]
    parts = steps[-1].norms
    torch.testing.assert_close(parts["gradient"], torch.hypot(parts["network"], parts["method"]))


def test_a_phase_that_never_begins_changes_nothing():
    """Beside a method of one phase, whose critic is frozen."""

    class Alone(type(duel()[1]), name=None):
        def phases(self):
            return {}

    found = []
    for kind in (type(duel()[1]), Alone):
        net, method = duel(start=99)
        method.__class__ = kind
        method.critic.requires_grad_(False).eval()
        steps_of_fit((net, method), config(steps=4))
        found.append({"net": net.state_dict(), "scale": {"": method.scale.detach()}})
    same(*found)


def test_an_unknown_setting_of_a_phase_is_refused():
    with pytest.raises(TypeError, match="rate"):
        next(fit(*duel(rate=1.0), batches, config(), None, "cpu"))


# ---- stop and go on


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_training_stopped_after_any_step_continues_to_the_same_bits(whole, tmp_path, stop):
    for step in fit(*duel(), batches, config(save_every=1), tmp_path, "cpu"):
        if step.step == stop:
            break
    train(tmp_path)
    assert {"model", "ema", "method", "optimizer", "optimizer-critic"} == content(whole).keys()
    same(content(tmp_path), content(whole))


def test_the_same_method_can_go_on_in_the_same_process(whole, tmp_path):
    pair = duel()
    next(steps := fit(*pair, batches, config(save_every=1), tmp_path, "cpu"))
    steps.close()
    steps_of_fit(pair, config(), tmp_path)
    same(content(tmp_path), content(whole))


def test_of_older_checkpoints_no_optimiser_stays(tmp_path):
    steps_of_fit(duel(), config(save_every=1, steps=4), tmp_path)
    assert whole_steps(tmp_path) == [3, 4]
    assert {path.stem for path in step_folder(tmp_path, 1).glob("*.safetensors")} == {"ema", "method"}


# ---- parts of a batch, and processes


@settings(deadline=None, max_examples=6)
@given(parts=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9))
def test_parts_of_a_batch_train_what_the_whole_does(parts, seed):
    """Its losses are means over images but for the square of the gap, so the critic is compared by its first step."""
    found = []
    for accumulate in (1, parts):
        pair = duel(start=0)
        pair[1].loss = linear(pair[1])
        steps_of_fit(pair, config(steps=2, seed=seed, warmup=0), execution=ExecutionConfig(accumulate=accumulate))
        found.append(pair[1].state_dict() | pair[0].state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def linear(method):
    """The method's loss without the square, so that the mean over parts is that of the whole."""
    loss = type(method).loss

    def plain(state, batch, draw, phase="main"):
        losses = loss(method, state, batch, draw, phase)
        losses.total = losses.parts["gap"] if phase == "critic" else losses.total
        return losses

    return plain


def test_two_processes_train_what_one_does(forks, tmp_path):
    """Half of the batch each, over gloo; sums are taken in another order, and the square is of each half's gap."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    places = [tmp_path / "two", tmp_path / "parts"]
    envs = [{"RANK": str(k), "LOCAL_RANK": str(k), **world} for k in range(2)] + [{"ACCUMULATE": "2"}]
    runs = [forks.start("phased", place, 6, **env) for place, env in zip([places[0], *places], envs)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    two, parts = map(content, places)
    for name in ("model", "method"):
        for key, value in parts[name].items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-5, atol=1e-5)


# ---- numbers that are not finite


def spoiled(monkeypatch, at, phase):
    """One loss of one phase is not finite."""
    kind = type(duel()[1])
    loss = kind.loss

    def bad(self, state, batch, draw, asked="main"):
        losses = loss(self, state, batch, draw, asked)
        losses.total = losses.total / 0 if (state.step, asked) == (at, phase) else losses.total
        return losses

    monkeypatch.setattr(kind, "loss", bad)


def test_a_bad_step_of_a_phase_stops_the_training_with_its_name(whole, tmp_path, monkeypatch):
    spoiled(monkeypatch, 4, "critic")
    with pytest.raises(NonFinite, match="step 5: the gradient of phase 'critic' is not finite; .* are lost"):
        train(tmp_path)
    assert steps_of(tmp_path) == [3]  # the network has done that step already, so it is not saved
    monkeypatch.undo()
    train(tmp_path)
    same(content(tmp_path), content(whole))


@pytest.mark.parametrize("every", [1, 10])
def test_a_bad_main_step_holds_back_the_phases_too(whole, tmp_path, monkeypatch, every):
    """Also where one looks rarely, as on a GPU, and the batches behind the bad one are good; averages go on until one looks."""
    watch = Guard.watch

    def seldom(self, norm, step):
        self.every = every
        watch(self, norm, step)

    spoiled(monkeypatch, 1, "main")
    monkeypatch.setattr(Guard, "watch", seldom)
    with pytest.raises(NonFinite, match=r"step 2: .*; the state before it is .*000001"):
        train(tmp_path)
    monkeypatch.undo()
    assert steps_of(tmp_path)[-1] == 1
    train(tmp_path)
    learned = [
        {name: each[name] for name in each if every == 1 or name != "ema"} for each in map(content, (tmp_path, whole))
    ]
    same(*learned)


# ---- what phases are not made for


def test_a_whole_graph_and_seeds_side_by_side_are_refused():
    net, method = duel()
    why = r"a step has several phases \(main, critic\)"
    with pytest.raises(ValueError, match=f"execution.compile=whole, and {why}"):
        way_to_compile(Trainee(net, method), "whole", CPU, 1, 5000)
    with pytest.raises(OnlyAlone, match=why):
        check_stackable(net, method, ExecutionConfig())
