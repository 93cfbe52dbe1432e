"""What comes from outside: a terminal that is closed, a reader who leaves. Nothing is lost."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
from shared import survive

from maskalign_lab import cli
from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.base.processes import stop_signals
from maskalign_lab.base.terminal import enduring, say
from maskalign_lab.cli import main
from maskalign_lab.training.log import with_log
from maskalign_lab.training.loop import fit
from maskalign_lab.training.stopping import notice
from maskalign_lab.workbench.commands import COMMANDS
from maskalign_lab.workbench.notebook_kernel import Stopped, Stopper, signals_to


@contextlib.contextmanager
def handled(number, handler):
    """A handler for the time of the block."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def printing_to_nobody():
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
        yield


# ---- a terminal that is closed


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_asks_to_be_called_again(number, tmp_path):
    with pytest.raises(SystemExit) as end:
        for step in fit(*survive.tiny(), survive.batches, survive.config(save_every=100), tmp_path, "cpu"):
            if step.step == 4:
                signal.raise_signal(number)
    assert end.value.code == 75 and steps_of(tmp_path) == [5]


def test_what_nohup_ignores_stays_ignored():
    with handled(signal.SIGHUP, signal.SIG_IGN), notice() as arrived:
        signal.raise_signal(signal.SIGHUP)
        assert arrived == [] and signal.SIGHUP not in stop_signals() and signal.SIGTERM in stop_signals()


def test_a_job_hears_that_the_terminal_was_closed():
    stopper, before = Stopper(client=None), signal.getsignal(signal.SIGHUP)
    with signals_to(stopper):
        signal.raise_signal(signal.SIGHUP)
    assert stopper.number == signal.SIGHUP and signal.getsignal(signal.SIGHUP) is before
    stop = Stopped(stopper.number)
    assert stop.exit_code == 75 and str(stop) == "stopped by SIGHUP"  # `perform` records it as preempted


# ---- a reader who leaves


def test_a_training_whose_lines_nobody_reads_goes_on_to_its_end(tmp_path):
    with printing_to_nobody():
        steps = fit(*survive.tiny(), survive.batches, survive.config(steps=3), tmp_path, "cpu")
        for _ in with_log(steps, tmp_path, 1, print_every=1e-9):
            pass
    assert steps_of(tmp_path) == [3] and len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_command_whose_lines_nobody_reads_does_its_work(monkeypatch):
    done = []

    def wordy(options):
        for line in range(3):
            print(line, flush=True)
            print(line, file=sys.stderr, flush=True)
        done.append(line)
        return 0

    monkeypatch.setitem(COMMANDS, "doctor", (cli.Doctor, wordy))
    with printing_to_nobody():
        assert main(["doctor"]) == 0
    assert done == [2]


def test_a_full_disk_behind_the_output_is_an_error_still(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        say("a line")


def test_nothing_is_said_when_python_ends():
    """The last flush of what is in the buffer goes to nobody as well."""
    code = """import sys
from maskalign_lab.base.terminal import enduring
with enduring():
    print("first")
    sys.stdin.read()
    print("second")"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.communicate(b"")[1] == b"" and process.returncode == 0


def test_streams_come_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), enduring():
        assert sys.stdout is not before[0] and sys.stdout.fileno == before[0].fileno
        raise KeyError
    assert (sys.stdout, sys.stderr) == before
