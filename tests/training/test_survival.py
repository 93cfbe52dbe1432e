"""Trainings that are killed, told to stop, run out of disk or meet NaN lose nothing, and say so."""

import builtins
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from shared import survive
from shared.clone import ROOT
from shared.notebooks import write
from shared.stored import content, same
from shared.waits import Waits

from maskalign_lab.base import checkpoints, files
from maskalign_lab.base.checkpoints import step_folder, steps_of
from maskalign_lab.cli import main
from maskalign_lab.training.loop import fit
from maskalign_lab.training.stopping import Guard, NonFinite, notice

HERE = ROOT / "tests" / "shared"


@pytest.fixture
def start(forks):
    """The training in a process of its own."""
    return partial(forks.start, "survive")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing disturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    survive.train(folder)
    return folder


@pytest.mark.parametrize("stop", [1, 3, 4, 11])
def test_a_training_stopped_after_any_step_continues_to_the_same_bits(whole, tmp_path, stop):
    for step in fit(*survive.tiny(), survive.batches, survive.config(save_every=1), tmp_path, "cpu"):
        if step.step == stop:
            break
    survive.train(tmp_path)
    same(content(tmp_path), content(whole))


def test_a_new_process_continues_to_the_same_bits(whole, tmp_path):
    """One that has imported all by itself; the others of this file are forked."""
    survive.train(tmp_path, 6)
    path = os.pathsep.join(map(str, (ROOT, HERE.parent, HERE)))
    command = [sys.executable, str(HERE / "survive.py"), str(tmp_path), "12"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    same(content(tmp_path), content(whole))


def test_sigterm_saves_and_asks_to_be_called_again(start, tmp_path):
    process = start(tmp_path, 100_000)
    for line in process.stdout:
        if line.startswith("step 5"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(30) == 75 and "told to stop: saved after step" in rest
    done = steps_of(tmp_path)[-1]
    assert f"saved after step {done}" in rest and done >= 5
    log = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, done + 1))


def test_an_interrupt_saves_and_is_an_interrupt(start, tmp_path):
    """Ctrl-C at a terminal, and Jupyter's stop button."""
    process = start(tmp_path, 100_000)
    for line in process.stdout:
        if line.startswith("step 5"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    done = steps_of(tmp_path)[-1]
    assert process.returncode not in (0, 75) and "KeyboardInterrupt" in rest and f"saved after step {done}" in rest
    assert max(int(line.split()[1]) for line in rest.splitlines() if line.startswith("step ")) <= done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("command, module", [("train", "run"), ("prepare", "preparing")])
def test_a_signal_before_the_first_step_asks_to_be_called_again(tmp_path, monkeypatch, capsys, number, command, module):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path))
    before = signal.getsignal(number)
    monkeypatch.setattr(f"maskalign_lab.runs.{module}.load_sources", lambda *_, **more: signal.raise_signal(number))
    assert main([command, "sit", "--preset", "smoke", "--device", "cpu"]) == 75
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with notice() as arrived:
        signal.raise_signal(signal.SIGINT)
        assert arrived == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_that_is_told_to_stop_saves_the_training_in_its_cell(tmp_path):
    """Scheduler -> papermill job -> kernel -> training: the step is saved and the job is marked."""
    cell = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport survive\nfrom pathlib import Path\n"
    write(tmp_path / "study.ipynb", cell + f"survive.train(Path({str(tmp_path / 'run')!r}), 100_000)")
    code = "import sys; from maskalign_lab.workbench.jobs import run_study; sys.exit(run_study(*sys.argv[1:2], out=sys.argv[2]).exit_code)"
    command = [sys.executable, "-c", code, str(tmp_path / "study.ipynb"), str(tmp_path / "job")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    for line in process.stdout:
        if line.startswith("step 5"):
            process.terminate()
            break
    process.communicate(timeout=120)
    job = json.loads((tmp_path / "job" / "job.json").read_text())
    assert (process.returncode, job["status"]) == (75, "preempted")
    done = steps_of(tmp_path / "run")[-1]
    assert f"saved after step {done}" in (tmp_path / "job" / "study.ipynb").read_text()


def kill_and_check(start, folder, draw, steps=10_000):
    """Kill a training at a random instant. What is on disk must be whole, and lack at most one interval of what was done."""
    process = start(folder, steps)
    process.stdout.readline()
    time.sleep(draw.uniform(0, 0.6))
    process.kill()
    done = max(map(int, re.findall(r"^step (\d+)\n", process.communicate()[0], re.MULTILINE)), default=0)
    saved = max(steps_of(folder), default=0)
    assert saved > done - survive.config().save_every
    if saved:
        tensors = content(folder)
        assert set(tensors) == {"model", "ema", "optimizer"}
        assert all(value.isfinite().all() for part in tensors.values() for value in part.values())
    for step in steps_of(folder)[:-1]:
        shutil.rmtree(folder / "steps" / f"{step:06d}")
    return saved


def kill_often(start, folder, times, seed):
    """Kill the same training again and again; it never falls back."""
    draw, reached = random.Random(seed), [0]
    for _ in range(times):
        reached.append(kill_and_check(start, folder, draw, 1_000_000))
    assert reached == sorted(reached) and reached[-1] > 0


def test_a_kill_at_any_instant_costs_at_most_one_interval(start, tmp_path):
    kill_often(start, tmp_path, 5, seed=0)


@pytest.mark.slow
def test_two_hundred_kills_cost_at_most_one_interval_each(start, tmp_path):
    kill_often(start, tmp_path, 200, seed=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", range(0, 12, 2))
def test_a_disk_that_fails_while_saving_is_loud_and_spares_the_last_step(tmp_path, monkeypatch, code, call):
    survive.train(tmp_path, 3)
    before, count = content(tmp_path), iter(range(1000))

    def failing(function):
        def wrapped(*args, **kwargs):
            if next(count) == call:
                raise OSError(code, os.strerror(code))
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(checkpoints.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(checkpoints.os, "replace", failing(os.replace))
    with pytest.raises(OSError, match=os.strerror(code)):
        survive.train(tmp_path, 6)
    monkeypatch.undo()
    reached = steps_of(tmp_path)[-1]
    assert reached in (3, 6)
    if reached == 3:
        same(content(tmp_path), before)
    survive.train(tmp_path, 6)
    assert steps_of(tmp_path)[-1] == 6


def test_a_short_write_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    survive.train(tmp_path, 3)

    class Short:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", lambda *a: Short(builtins.open(*a)), raising=False)
    with pytest.raises(OSError, match="No space left"):
        survive.train(tmp_path, 6)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [3] and step_folder(tmp_path).name == "000003"
    survive.train(tmp_path, 6)


@pytest.mark.parametrize("parts", ["1", "2"])
def test_two_processes_train_what_one_does_with_the_whole_batch(start, whole, tmp_path, parts):
    """Half of the batch each, at once or in parts, over gloo. Sums are taken in another order, so equal within 1e-5, not to the bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "ACCUMULATE": parts,
        }
    ranks = [start(tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    one, two = content(whole), content(tmp_path)
    for name in ("model", "ema"):
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-5, atol=1e-5)
    log = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 13))


def spoiled(at, where):
    def batches(step):
        batch = survive.batches(step)
        if step == at:
            batch.x[0, 0, 0, 0] = float("nan") if where == "batch" else 1e38
        return batch

    return batches


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("where", ["batch", "overflow"])
def test_a_number_that_is_not_finite_stops_with_step_place_and_state(whole, tmp_path, at, where):
    with pytest.raises(NonFinite, match=rf"step {at + 1}: not finite, first in .*; the state before it is .*{at:06d}"):
        for _ in fit(*survive.tiny(), spoiled(at, where), survive.config(), tmp_path, "cpu"):
            pass
    assert steps_of(tmp_path)[-1] == at
    survive.train(tmp_path)  # with the good batch, the run goes on as if nothing had been
    same(content(tmp_path), content(whole))


@pytest.mark.parametrize(("at", "noticed"), [(3, 5), (11, 11)])
def test_a_device_that_is_looked_at_rarely_is_looked_at_before_saving(tmp_path, monkeypatch, at, noticed):
    """As on a GPU: a look every ten steps. No checkpoint may hide a bad step, the last one neither."""
    watch, steps = Guard.watch, []

    def rarely(self, norm, step):
        self.every = 10
        steps.append(step)
        watch(self, norm, step)

    monkeypatch.setattr(Guard, "watch", rarely)
    with pytest.raises(NonFinite, match=f"step {at + 1}: "):
        for _ in fit(*survive.tiny(), spoiled(at, "batch"), survive.config(), tmp_path, "cpu"):
            pass
    assert steps[-1] == noticed and steps_of(tmp_path)[-1] == at
    assert all(value.isfinite().all() for part in content(tmp_path).values() for value in part.values())


def test_the_guilty_layer_is_named(tmp_path):
    net, method = survive.tiny()
    hook = net.blocks[1].mlp.fc2.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(NonFinite, match=r"first in model\.blocks\.1\.mlp\.fc2 \(forward\)"):
        for _ in fit(net, method, survive.batches, survive.config(), tmp_path, "cpu"):
            pass
    hook.remove()


def test_the_counter_of_waits_counts():
    with Waits() as waits:
        torch.ones(2).sum().item(), bool(torch.ones(()) > 0), torch.ones(3).nonzero()
    assert waits.count == 3


@pytest.mark.parametrize(("every", "looks"), [(1, 12), (5, 4)])  # steps 0, 5 and 10, and the last one
def test_nothing_waits_for_the_device_but_the_guard(monkeypatch, every, looks):
    watch = Guard.watch

    def seldom(self, norm, step):
        self.every = every
        watch(self, norm, step)

    monkeypatch.setattr(Guard, "watch", seldom)
    with Waits() as waits:
        for _ in fit(*survive.tiny(), survive.batches, survive.config(save_every=100), None, "cpu"):
            pass
    assert waits.count == looks
