"""Checkpoints are taken in the step and written beside it; the last ones stay whole, of others what studies read."""

import errno
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import survive
from torch import nn

from maskalign_lab.base import checkpoints
from maskalign_lab.base.checkpoints import (
    load_tensors,
    prune,
    resume,
    save_step,
    step_folder,
    steps_of,
    whole_steps,
)
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import ensure_run, load_run
from maskalign_lab.training import loop, saving
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.saving import Saver


def stored(run, step):
    """A checkpoint whose numbers are its step's."""
    tensors = {name: {"w": torch.full((2,), float(step))} for name in ("model", "ema", "method", "optimizer")}
    return save_step(run, step, tensors, {})


def kept(run):
    """What each step has."""
    return {step: {file.stem for file in step_folder(run, step).glob("*.safetensors")} for step in steps_of(run)}


def expected(saved, keep, every):
    """What should be there after these steps were saved, one after the other."""
    light, heavy = {"ema", "method"}, {"model", "ema", "method", "optimizer"}
    recent = saved[-keep:]
    return {step: heavy if step in recent else light for step in saved if step in recent or step % every == 0}


@pytest.fixture(scope="module")
def fast():
    """No flushing: nothing is switched off here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", lambda _: None)
        yield


SEQUENCES = st.lists(st.integers(1, 40), min_size=1, max_size=10, unique=True).map(sorted)


@settings(deadline=None, max_examples=25)
@given(saved=SEQUENCES, keep=st.integers(1, 4), every=st.sampled_from([1, 3, 10]), data=st.data())
def test_the_last_stay_whole_and_averages_of_every_so_many(fast, tmp_path_factory, saved, keep, every, data):
    run = tmp_path_factory.mktemp("run")
    crash = data.draw(st.integers(0, 12))  # the process dies at this call of those that remove
    for place, step in enumerate(saved):
        stored(run, step)
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, crash if step == saved[len(saved) // 2] else 0)
            try:
                prune(run, keep, range(0, 41, every))
            except KeyboardInterrupt:
                assert whole_steps(run)[-1] == steps_of(run)[-1] == step
                readable(run)
                continue
        assert kept(run) == expected(saved[: place + 1], keep, every)
    prune(run, keep, range(0, 41, every))
    assert kept(run) == expected(saved, keep, every)
    readable(run)
    prune(run, keep, range(0, 41, every), complete=True)
    assert steps_of(run) == [step for step in expected(saved, keep, every) if step % every == 0 or step == saved[-1]]


def dying(patch, call):
    """Removing is cut off at one call."""
    count = iter(range(1, 1000))

    def wrapped(function):
        def once(*args, **kwargs):
            if next(count) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return once

    for owner, name in ((checkpoints.os, "replace"), (checkpoints.shutil, "rmtree"), (checkpoints.Path, "unlink")):
        patch.setattr(owner, name, wrapped(getattr(owner, name)))


def readable(run):
    """Every step that is listed can be looked at."""
    for step in steps_of(run):
        for name in ("ema", "method"):
            assert load_tensors(step_folder(run, step), name)["w"].tolist() == [step, step]


def test_averages_alone_are_nothing_to_go_on_from(tmp_path):
    stored(tmp_path, 3)
    for path in [path for name in checkpoints.HEAVY for path in step_folder(tmp_path, 3).glob(f"{name}.safetensors")]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights of steps \[3\] and no optimizer.safetensors"):
        resume(tmp_path, nn.Linear(1, 1), {}, None, torch.optim.AdamW([nn.Parameter(torch.ones(1))]))


# ---- in a training


def train(folder, steps=12, **how):
    changes = {name: how.pop(name) for name in ("save_every",) if name in how}
    for step in fit(
        *survive.tiny(), survive.batches, survive.config(steps, **changes), folder, "cpu", ExecutionConfig(**how)
    ):
        pass
    return step.state.model.state_dict()


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_minutes_save_more_often_and_leave_nothing_behind(tmp_path):
    whole = train(tmp_path / "whole")
    steps = fit(
        *survive.tiny(),
        survive.batches,
        survive.config(),
        tmp_path / "often",
        "cpu",
        ExecutionConfig(save_minutes=1e-9),
    )
    for step in steps:
        if step.step == 8:
            assert kept(tmp_path / "often").keys() == {3, 6, 7, 8} and whole_steps(tmp_path / "often") == [7, 8]
            break
    assert same(train(tmp_path / "often", save_minutes=1e-9), whole)
    assert steps_of(tmp_path / "often") == steps_of(tmp_path / "whole") == [3, 6, 9, 12]


def test_studies_find_every_step_of_a_run_that_was_pruned(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path))
    small = "network.width=16 network.depth=2 data.n=64 training.batch_size=8 training.steps=8 training.save_every=2"
    recipe = make_recipe("sit", "smoke", overrides=f"{small} execution.keep=1")
    run = ensure_run(recipe, "cpu", every_save=True)
    assert steps_of(run.path) == [2, 4, 6, 8] and whole_steps(run.path) == [8]
    monkeypatch.setattr("maskalign_lab.runs.run.train", lambda *_: pytest.fail("trained again"))
    assert ensure_run(recipe, "cpu", every_save=True).path == run.path
    early, late = (load_run(run.path, step).net.state_dict() for step in (2, 8))
    assert not same(early, late)


# ---- beside the training


@pytest.fixture
def ahead(monkeypatch):
    """As on a GPU: the training does not wait for the writer."""
    monkeypatch.setattr(loop, "Saver", lambda *given, **_: Saver(*given, ahead=True))


@pytest.fixture
def gate(monkeypatch):
    """A disk that takes what it is given when it is opened."""
    opened = threading.Event()

    def slow(*given):
        assert opened.wait(60)
        return save_step(*given)

    monkeypatch.setattr(saving, "save_step", slow)
    return opened


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, ahead, gate):
    gate.set()
    whole = train(tmp_path / "whole")
    gate.clear()
    for step in fit(*survive.tiny(), survive.batches, survive.config(), tmp_path / "beside", "cpu"):
        if step.step == 5:  # the checkpoint of step 3 is under way
            assert steps_of(tmp_path / "beside") == []
            gate.set()
    assert steps_of(tmp_path / "beside") == [3, 6, 9, 12] and same(step.state.model.state_dict(), whole)


def test_a_checkpoint_holds_the_moment_it_was_taken_at(tmp_path, ahead, gate):
    gate.set()
    train(tmp_path / "inline", keep=9)
    gate.clear()
    for step in fit(*survive.tiny(), survive.batches, survive.config(5), tmp_path / "beside", "cpu"):
        if step.step == 4:
            gate.set()
    for name in ("model", "ema", "optimizer"):
        found, wanted = (load_tensors(step_folder(tmp_path / run, 3), name) for run in ("beside", "inline"))
        assert found.keys() == wanted.keys() and same(found, wanted)


def test_whoever_leaves_waits_for_the_disk(tmp_path, ahead, gate, monkeypatch):
    wait, waited = Saver.wait, []

    def opening(self):
        if self.writing:
            waited.append(steps_of(tmp_path))
            gate.set()
        wait(self)

    monkeypatch.setattr(Saver, "wait", opening)
    steps = fit(*survive.tiny(), survive.batches, survive.config(), tmp_path, "cpu")
    while next(steps).step < 4:
        pass
    assert waited == []
    steps.close()
    assert waited == [[]] and steps_of(tmp_path) == [3]


def test_a_full_disk_stops_the_training_at_the_next_step(tmp_path, ahead, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(saving, "save_step", full)
    reached = 0
    with pytest.raises(OSError, match="No space left on device"):
        for step in fit(*survive.tiny(), survive.batches, survive.config(100_000), tmp_path, "cpu"):
            reached = step.step
    assert 3 <= reached < 100_000


def test_memory_for_the_copy_is_used_again(tmp_path):
    saver = Saver(tmp_path, survive.config(), ExecutionConfig(), ahead=True)
    weights, places = {"model": {"w": torch.ones(4)}}, []
    for step in (1, 2):
        weights["model"]["w"] += 1
        saver.save(step, weights)
        places.append(saver.copy["model"]["w"].data_ptr())
    saver.wait()
    assert places[0] == places[1] != weights["model"]["w"].data_ptr()
    assert [load_tensors(step_folder(tmp_path, step), "model")["w"][0].item() for step in (1, 2)] == [2, 3]
