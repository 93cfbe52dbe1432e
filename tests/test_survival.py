"""Trainings that are killed, told to stop, run out of disk or meet NaN lose nothing, and say so."""

import builtins
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import survive
import torch

from maskalign_lab import checkpoints
from maskalign_lab.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.guards import Guard, NonFinite
from maskalign_lab.training import fit

HERE = Path(__file__).parent


def start(folder, steps=12, **more):
    """The training in a process of its own."""
    command = [sys.executable, str(HERE / "survive.py"), str(folder), str(steps)]
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def content(folder, step=None):
    """All tensors of a step, by file."""
    files = sorted(step_folder(folder, step).glob("*.safetensors"))
    return {file.stem: load_tensors(file.parent, file.stem) for file in files}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys() and all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name


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
    assert start(tmp_path, 6).wait(120) == 0
    assert start(tmp_path, 12).wait(120) == 0
    same(content(tmp_path), content(whole))


def test_sigterm_saves_and_asks_to_be_called_again(whole, tmp_path):
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


def kill_and_check(folder, draw, steps=10_000):
    """Kill a training at a random instant; what is on disk must load and be whole."""
    process = start(folder, steps)
    for line in process.stdout:
        if line.startswith("step"):
            break
    time.sleep(draw.uniform(0, 0.6))
    process.kill()
    process.wait()
    if steps_of(folder):
        tensors = content(folder)
        assert set(tensors) == {"model", "ema", "optimizer"}
        assert all(value.isfinite().all() for part in tensors.values() for value in part.values())
    return max(steps_of(folder), default=0)


def test_a_kill_at_any_instant_costs_at_most_one_interval(tmp_path):
    draw, reached = random.Random(0), [0]
    for _ in range(3):
        reached.append(kill_and_check(tmp_path, draw))
    assert reached == sorted(reached)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    draw, reached = random.Random(1), [0]
    for _ in range(200):
        reached.append(kill_and_check(tmp_path, draw, 1_000_000))
    assert reached == sorted(reached)


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

    monkeypatch.setattr(checkpoints, "open", lambda *a: Short(builtins.open(*a)), raising=False)
    with pytest.raises(OSError, match="No space left"):
        survive.train(tmp_path, 6)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [3] and step_folder(tmp_path).name == "000003"
    survive.train(tmp_path, 6)


def test_two_processes_train_what_one_does_with_the_whole_batch(whole, tmp_path):
    """Half of the batch each, over gloo. Sums are taken in another order, so equal within 1e-5 and not to the bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
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


def test_nothing_waits_for_the_device_between_logged_steps(monkeypatch):
    """Reading a tensor from the host goes through one of these; on a CPU only the guard may."""
    reads, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    for _ in fit(*survive.tiny(), survive.batches, survive.config(), None, "cpu"):
        pass
    assert not reads
