"""Jobs on Slurm: programs in the place of Slurm's own run what submitit writes, and end it as Slurm does."""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from shared.clone import ROOT
from shared.notebooks import write

from maskalign_lab.cli import main
from maskalign_lab.workbench.batch_ledger import Record, job_place, note_sent, read_record, save_record
from maskalign_lab.workbench.batch_plan import Task, read_plan
from maskalign_lab.workbench.slurm import SlurmWork, in_slurm, queued, states

SLURM = """#!{python}
import json, os, re, subprocess, sys
from pathlib import Path
place, program, words = Path({place!r}), Path(sys.argv[0]).name, sys.argv[1:]

def start(script, number):  # one task of the array, in a session of its own
    told = {{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}}
    subprocess.Popen(["bash", script], env=os.environ | told, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def state(number):
    pid = place / f"pid-{{number}}"
    return "RUNNING" if pid.exists() and Path("/proc", pid.read_text(), "exe").exists() else "COMPLETED"

if program == "sbatch":
    (place / "script").write_text(Path(words[0]).read_text())
    count = int(re.search(r"--array=.?0-([0-9]+)", Path(words[0]).read_text())[1])
    (place / "sent").write_text(str(count + 1))
    for number in range(count + 1):
        start(place / "script", number)
    print("Submitted batch job 7")
if program == "srun":  # becomes what it is told to start
    number = os.environ["SLURM_ARRAY_TASK_ID"]
    command = words[words.index("-m") - 2 :]
    (place / f"pid-{{number}}").write_text(str(os.getpid()))
    os.execv(command[0], command)
if program == "scontrol":
    with open(place / "requeued", "a") as note:
        note.write(" ".join(words) + "\\n")
    start(place / "script", words[1].partition("_")[2])
if program == "squeue" and (place / "sent").exists():
    for number in range(int((place / "sent").read_text())):
        if state(number) == "RUNNING":
            print(f"7_{{number}} RUNNING")
if program == "sacct":
    print("JobID|State|NodeList")
    for number in range(int((place / "sent").read_text())):
        print(f"7_{{number}}|{{state(number)}}|here")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder in which a Slurm of one machine keeps its notes."""
    (programs := tmp_path / "programs").mkdir()
    (place := tmp_path / "slurm").mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct", "squeue"):
        (programs / name).write_text(SLURM.format(python=sys.executable, place=str(place)))
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    yield place
    for pid in place.glob("pid-*"):
        if Path("/proc", pid.read_text(), "exe").exists():
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


def waited(ready, seconds=90):
    """Wait until something is so."""
    for _ in range(10 * seconds):
        if ready():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not hasattr(os, "killpg") or not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGUSR2, signal.SIGTERM]
)  # before the time is up; for somebody more important
def test_a_warning_saves_a_job_and_queues_it_again(slurm, tmp_path, capsys, number):
    acts = """import pathlib, time
if seed == 1 and not (again := pathlib.Path(AGAIN)).exists():
    again.touch()
    print("begun", flush=True)
    time.sleep(100)"""
    study = write(tmp_path / "study.ipynb", acts.replace("AGAIN", repr(str(tmp_path / "again"))))
    told = {"jobs": [{"run": str(study), "seed": [0, 1]}], "slurm": {"time": 60, "partition": "small"}}
    (path := tmp_path / "two.yaml").write_text(json.dumps(told))
    folder, tasks = tmp_path / "runs" / "batches" / "two", read_plan(path).tasks

    def records():
        return [read_record(folder, task) for task in tasks]

    assert main(["batch", str(path)]) == 0 and "2 jobs sent to Slurm: 7_0 to 7_1" in capsys.readouterr().out
    script = (slurm / "script").read_text()
    assert all(
        f"#SBATCH --{flag}" in script for flag in ("requeue", "partition=small", "signal=USR2@360", "gpus-per-node=1")
    )
    said = job_place(folder, tasks[1].name) / "output.txt"
    assert waited(lambda: said.exists() and "begun" in said.read_text())
    assert main(["batch", str(path)]) == 0 and "with Slurm already" in capsys.readouterr().out  # nothing is sent twice
    os.kill(int((slurm / "pid-1").read_text()), number)
    assert waited(lambda: [record.status for record in records()] == ["ok", "ok"])
    assert (slurm / "requeued").read_text() == "requeue 7_1\n"
    assert [record.attempts for record in records()] == [1, 2] and "stopped by SIGTERM" in said.read_text()
    assert main(["batch", str(path), "--status"]) == 0 and "2 jobs: 2 ok" in capsys.readouterr().out
    assert main(["batch", str(path)]) == 0 and "sent" not in capsys.readouterr().out.replace("sends what", "")


# ---- without a job


class Saved:
    """A job that saves at once when it is asked to."""

    def stop(self):
        pass

    join = stop


@pytest.mark.parametrize("said, requeued", [({"7_0": "RUNNING"}, True), ({"7_0": "COMPLETING"}, False), (None, False)])
def test_a_job_that_slurm_is_ending_is_left_to_it(monkeypatch, said, requeued):
    monkeypatch.setattr("maskalign_lab.workbench.slurm.queued", lambda numbers: said)
    for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "0")):
        monkeypatch.setenv(name, value)
    found, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, lambda *_: found.append("submitit's way"))
    (work := SlurmWork()).work = work.thread = Saved()
    work.found = [Record("job", "", status="preempted")]
    try:
        with pytest.raises(SystemExit) as end:
            work.give_way(signal.SIGTERM, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == 75 and bool(found) == requeued


@pytest.mark.parametrize(
    "status, attempts, state, there",
    [
        ("waiting", 0, "PENDING", True),
        ("waiting", 0, "UNKNOWN", True),
        ("waiting", 0, "GONE", False),
        ("failed", 0, "PENDING", True),  # before it was sent
        ("failed", 1, "RUNNING", False),
        ("killed", 1, "UNKNOWN", False),
        ("killed", 1, "PENDING", True),  # its node was lost
        ("preempted", 1, "PENDING", True),
        ("preempted", 1, "PREEMPTED", False),
        ("preempted", 1, "UNKNOWN", False),
    ],
)
def test_the_own_record_counts_before_slurm(tmp_path, monkeypatch, status, attempts, state, there):
    monkeypatch.setattr("maskalign_lab.workbench.slurm.states", lambda numbers: dict.fromkeys(numbers, state))
    save_record(tmp_path, Record((task := Task(("jobs",))).name, task.command, status, attempts))
    note_sent(tmp_path, task.name, "7_0", 0)
    record = read_record(tmp_path, task)
    assert record.slurm == "7_0" and record.status == (status if attempts else "waiting")
    assert in_slurm(tmp_path, [record]) == ({task.name} if there else set())


def test_a_job_of_which_nothing_is_heard_for_a_day_is_sent_again(tmp_path, monkeypatch):
    monkeypatch.setattr("maskalign_lab.workbench.slurm.states", lambda numbers: dict.fromkeys(numbers, "UNKNOWN"))
    note_sent(tmp_path, (task := Task(("jobs",))).name, "7_0", 0)
    os.utime(job_place(tmp_path, task.name) / "slurm.txt", (0, 0))
    assert in_slurm(tmp_path, [read_record(tmp_path, task)]) == set()


def program(folder, name, text):
    """A program in the place of one of Slurm's."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(stat.S_IRWXU)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan with a job for Slurm, and a machine on which every program is in its folder."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    told = {"jobs": [{"run": str(write(tmp_path / "study.ipynb", "1"))}], "slurm": {"time": 60, "partition": "small"}}
    (path := tmp_path / "one.yaml").write_text(json.dumps(told))
    return path


def test_a_job_that_died_before_it_began_has_failed(plan, tmp_path, capsys):
    program(tmp_path, "squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    program(tmp_path, "sacct", 'echo "JobID|State|NodeList"; echo "7_0|CANCELLED by 5|n1"')
    assert queued(["7_0"]) == {} and states(["7_0", "7_1"]) == {"7_0": "CANCELLED", "7_1": "GONE"}
    (task,), folder = read_plan(plan).tasks, tmp_path / "runs" / "batches" / "one"
    note_sent(folder, task.name, "7_0", 0)
    assert main(["batch", str(plan), "--status"]) == 1
    said = capsys.readouterr().out
    assert "1 jobs: 1 failed" in said and "7_0 ended as CANCELLED before the job began" in said
    assert (
        f"see {folder / 'slurm' / '7_0_0_log.err'}" in said and in_slurm(folder, [read_record(folder, task)]) == set()
    )


def test_a_machine_without_slurm_and_a_refusal_are_told_in_a_sentence(plan, tmp_path, capsys):
    assert main(["batch", str(plan)]) == 2 and "--here" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    program(tmp_path, "srun", "")
    program(tmp_path, "sbatch", "echo sbatch: error: invalid partition specified: small >&2; exit 1")
    assert main(["batch", str(plan)]) == 2
    assert "Slurm refused the jobs: " in (said := capsys.readouterr().err) and "invalid partition specified" in said
