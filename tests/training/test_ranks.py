"""Several processes train what one does, go on from each other's checkpoints, and end as they should."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from shared import survive
from shared.clone import ROOT

from maskalign_lab.base import devices, locks
from maskalign_lab.base.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.base.devices import resolve_device
from maskalign_lab.base.locks import LOCK, sole_writer
from maskalign_lab.cli import main
from maskalign_lab.runs import run as runs
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.training.loop import check_divides
from maskalign_lab.workbench import launching
from maskalign_lab.workbench.launching import check_processes

HERE = ROOT / "tests" / "shared"
SMALL = "training.steps=60 training.batch_size=8 training.log_every=1 training.precision=float32 data.n=32 data.teacher=oracle"
WORDS = ["train", "repa", "--preset", "smoke", "--device", "cpu", *SMALL.split()]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """This process was started once, by nobody in particular."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def started(*command):
    """A process that finds the package and the tests' shared code."""
    path = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent)])
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.fixture
def trained(forks):
    """Trainings in so many processes, each a folder and steps; what they printed."""

    def train(world, *trainings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        words = [f"{folder}:{steps}" for folder, steps in trainings]
        ranks = [forks.start("ranks", *words, RANK=str(k), LOCAL_RANK=str(k), **env) for k in range(world)]
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, said
        return "".join(said)

    return train


def learned(key, value):
    """A weight without the bias of the keys: a softmax does not see it, so that only rounding moves it."""
    return value.unflatten(0, (3, -1))[[0, 2]] if key.endswith("qkv.bias") else value


def agree(folder, other):
    """Both end with the same weights, averages and moments, but for the order of sums."""
    assert steps_of(folder)[-1] == steps_of(other)[-1]
    for name in ("model", "ema", "optimizer"):
        one, two = (load_tensors(step_folder(each), name) for each in (folder, other))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(learned(key, two[key]), learned(key, value), rtol=1e-4, atol=1e-5)


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- the same training


def test_world_sizes_agree_and_continue_each_other(trained, tmp_path):
    """1, 2 and 4 processes; 2 -> 1, 1 -> 2, 2 -> 4. And two that do not see the same folder are refused, both of them."""
    whole, two, four = (tmp_path / name for name in ("whole", "two", "four"))
    here, there, up = (tmp_path / name for name in ("two-one", "one-two", "two-four"))
    survive.train(whole)
    survive.train(there, 6)
    survive.train(tmp_path / "apart-0", 3)
    said = trained(2, (two, 12), (here, 6), (there, 12), (up, 6), (tmp_path / "apart-*", 6))
    assert said.count(f"process 0 goes on from step 3 in {tmp_path}") == 2 and said.count("finds step 0 there") == 2
    survive.train(here)
    trained(4, (four, 12), (up, 12))
    for folder in (two, four, here, there, up):
        agree(folder, whole)
        assert logged(folder) == list(range(1, 13)), folder


# ---- the command


def wait_for_line(folder, step, process):
    """Return when a step is in the log."""
    while not (folder / "log.jsonl").exists() or max(logged(folder), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def stopped(process, folder, number, ranks=False):
    """Send a signal to a training, or to its processes; exit code, output, and the step that was saved."""
    wait_for_line(folder, max(steps_of(folder), default=0) + 2, process)
    for each in psutil.Process(process.pid).children() if ranks else [process]:
        each.send_signal(number)
    said, errors = process.communicate(timeout=300)
    assert said.count(f"saved after step {(done := steps_of(folder)[-1])}") == 1 and done < 60, errors
    return process.returncode, said + errors, done


def test_a_command_stopped_twice_and_continued_by_one_process_trains_what_one_does(tmp_path, own_folders):
    """SIGUSR1, by which Slurm announces the end, to the launcher; then, under torchrun, SIGTERM to the processes."""
    folder, whole = tmp_path / "several", tmp_path / "whole"
    command = "-m", "maskalign_lab.cli", *WORDS, "--out", str(folder)
    code, said, first = stopped(started(*command, "--processes", "2"), folder, signal.SIGUSR1)
    assert code == 75 and "Traceback" not in said
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    code, said, second = stopped(started(*torchrun, *command), folder, signal.SIGTERM, ranks=True)
    assert code == 1 and "exitcode  : 75" in said and first < second
    for path in (folder, whole):
        runs.train(make_recipe("repa", "smoke", overrides=SMALL), path, "cpu", 0)
    agree(folder, whole)
    assert logged(folder) == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks", "expected"),
    [(signal.SIGTERM, False, 75), (signal.SIGHUP, False, 75), (signal.SIGINT, False, 130), (signal.SIGTERM, True, 75)],
)
def test_every_signal_saves_and_has_its_exit_code(tmp_path, own_folders, number, ranks, expected):
    process = started("-m", "maskalign_lab.cli", *WORDS, "--out", str(tmp_path / "run"), "--processes", "2")
    code, said, _ = stopped(process, tmp_path / "run", number, ranks)
    assert code == expected and "Traceback" not in said


def test_an_error_of_one_process_ends_all_and_is_told_once(tmp_path, own_folders):
    with sole_writer(tmp_path / "run"):
        process = started("-m", "maskalign_lab.cli", *WORDS, "--processes", "2", "--out", str(tmp_path / "run"))
        _, errors = process.communicate(timeout=300)
    assert (
        process.returncode == 2 and errors.count(f"error: process {os.getpid()} on") == 1 and "Traceback" not in errors
    )


# ---- refused before anything is loaded or started


@pytest.fixture
def starts_nothing(monkeypatch):
    def start(*_):
        raise AssertionError("it started")

    monkeypatch.setattr(launching, "launch", start)
    monkeypatch.setattr(runs, "load_sources", start)


def refused(capsys, *words):
    assert main([*WORDS, *words]) == 2
    return capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(starts_nothing, capsys, monkeypatch):
    assert "training.batch_size=8 cannot be cut into 3 equal parts (3 processes); take 6 or 9" in refused(
        capsys, "--processes", "3"
    )
    said = refused(capsys, "--processes", "2", "execution.accumulate=3")
    assert "6 equal parts (2 processes times execution.accumulate=3); take 6 or 12" in said
    assert "take 2" in refused(capsys, "--processes", "2", "training.batch_size=1")
    assert "--processes 0: expected at least 1" in refused(capsys, "--processes", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "0")
    assert "16 equal parts (16 processes); take 16" in refused(capsys)


def test_a_loss_that_compares_the_halves_of_a_batch_wants_one_process():
    recipe = make_recipe("ahpa", "smoke", overrides="method.router=bilevel")
    _, method = runs.build(recipe, Facts(10, channels=4, factor=4))
    check_divides(method, recipe.training, recipe.execution, 1)
    with pytest.raises(ValueError, match="2 processes, and router=bilevel compares the halves of a batch; take"):
        check_divides(method, recipe.training, recipe.execution, 2)


def test_several_starts_without_a_launcher_are_refused(starts_nothing, capsys, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"):
        monkeypatch.setenv(name, "2")
        assert "started 2 times" in (said := refused(capsys)) and "--processes 2" in said
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of a batch script, which runs once
    with pytest.raises(AssertionError, match="it started"):
        main([*WORDS, "--processes", "2"])


def test_more_processes_than_devices_are_refused(monkeypatch):
    check_processes(5, "cpu")
    monkeypatch.setattr(devices, "devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    check_processes(2, "auto")
    with pytest.raises(
        ValueError,
        match="--processes 3: expected at most 2, one for each cuda device here; take --processes 2, or --device",
    ):
        check_processes(3, "auto")
    with pytest.raises(ValueError, match="--device cuda:1 is one device, too few for --processes 2; take cuda"):
        check_processes(2, "cuda:1")


def test_each_process_has_the_device_of_its_number(monkeypatch):
    monkeypatch.setattr(devices, "devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"])
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == resolve_device("cuda") == resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="process 1 of several has cuda:1; say 'cuda'"):
        resolve_device("cuda:0")


# ---- the lock


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Between opening and locking, the last holder removes an empty folder's lock."""
    acquire, calls = locks.FileLock.acquire, []

    def late(self, *given, **named):
        acquire(self, *given, **named)
        calls.append(self)
        if len(calls) == 1:
            (tmp_path / "run" / LOCK).unlink()

    monkeypatch.setattr(locks.FileLock, "acquire", late)
    with sole_writer(tmp_path / "run"):
        assert len(calls) == 2 and (tmp_path / "run" / LOCK).exists()
        with pytest.raises(FileExistsError, match="is writing to"), sole_writer(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()
