"""One process at a time trains in a folder, and what killed ones left is swept up."""

import json
import os
import socket
import subprocess
import sys

import pytest
from shared import survive
from shared.clone import ROOT

from maskalign_lab.base.checkpoints import steps_of, sweep
from maskalign_lab.base.locks import LOCK, OWNER, sole_writer
from maskalign_lab.base.processes import began, is_first, is_gone, this_process
from maskalign_lab.runs import run as runs
from maskalign_lab.runs.presets import make_recipe

DEAD = 2**22 + 1  # more than Linux gives
HOLD = """import sys
from maskalign_lab.base.locks import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"` until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def loads_nothing(monkeypatch):
    """Loading images would be the first costly thing."""

    def load(*_):
        raise LookupError("it loaded")

    monkeypatch.setattr(runs, "load_sources", load)


def test_a_second_training_is_refused_at_once_and_told_who_trains(tmp_path, holder, loads_nothing):
    message = f"process {holder.pid} on {socket.gethostname()} is writing to .*run; wait until it has ended, or choose"
    with pytest.raises(FileExistsError, match=message):
        runs.train(make_recipe("sit", "smoke"), tmp_path / "run", "cpu")
    holder.communicate("\n")
    with pytest.raises(LookupError):
        runs.train(make_recipe("sit", "smoke"), tmp_path / "run", "cpu")


def test_the_lock_of_a_process_that_was_killed_hinders_nobody(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "run" / OWNER).read_text())["pid"] == holder.pid
    with sole_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER).read_text()) == this_process()


def test_who_only_wants_the_result_waits(tmp_path, holder, loads_nothing, monkeypatch, capsys):
    """`ensure_run`, of two studies that want one run."""
    monkeypatch.setattr("maskalign_lab.base.locks.say", lambda text: print(text) or holder.communicate("\n"))
    with pytest.raises(LookupError):
        runs.train(make_recipe("sit", "smoke"), tmp_path / "run", "cpu", wait=True)
    assert f"process {holder.pid}" in capsys.readouterr().out


def test_processes_of_one_training_share_the_folder(tmp_path, holder, loads_nothing, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not is_first()
    with pytest.raises(LookupError):  # the first one holds the lock for all
        runs.train(make_recipe("sit", "smoke"), tmp_path / "run", "cpu")


def test_a_recipe_that_is_refused_leaves_no_folder(tmp_path, loads_nothing):
    with pytest.raises(LookupError):
        runs.train(make_recipe("sit", "smoke"), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_work_in_it_stays(tmp_path):
    with pytest.raises(LookupError), sole_writer(tmp_path / "run"):
        (tmp_path / "run" / "recipe.json").touch()
        raise LookupError
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.json", LOCK}


# ---- what is left behind


def test_half_written_steps_of_processes_that_are_gone_are_swept_at_resume(tmp_path):
    survive.train(tmp_path, 3)
    for name in (f"steps/.000006.{DEAD}", f"steps/.000006.{os.getpid()}", f"steps/.000006.{os.getppid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / f".latest.{DEAD}").touch()
    survive.train(tmp_path, 6)
    hidden = [path.name for path in (*tmp_path.glob(".*"), *tmp_path.glob("steps/.*"))]
    assert hidden == [f".000006.{os.getppid()}"] and steps_of(tmp_path) == [3, 6]


def test_what_is_no_leftover_is_not_swept(tmp_path):
    for name in (LOCK, OWNER, ".hidden", ".note.txt"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_process_is_known_by_its_number_and_its_beginning():
    me = this_process()
    assert not is_gone(**{"host": me["host"], "pid": me["pid"], "before": me["began"]})
    assert is_gone(me["host"], me["pid"], me["began"] - 100) and is_gone(me["host"], DEAD, 0)
    assert not is_gone("another-host", DEAD, 0) and began(DEAD) is None
