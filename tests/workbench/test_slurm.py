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
from maskalign_lab.workbench.batch_ledger import job_place, read_record
from maskalign_lab.workbench.batch_plan import read_plan

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
    for name in ("sbatch", "srun", "scontrol", "sacct"):
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
def test_a_warning_saves_a_job_and_queues_it_again(slurm, tmp_path, capsys):
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
        f"#SBATCH --{flag}" in script for flag in ("requeue", "partition=small", "signal=USR2@120", "gpus-per-node=1")
    )
    said = job_place(folder, tasks[1].name) / "output.txt"
    assert waited(lambda: said.exists() and "begun" in said.read_text())
    assert main(["batch", str(path)]) == 0 and "with Slurm already" in capsys.readouterr().out  # nothing is sent twice
    os.kill(int((slurm / "pid-1").read_text()), signal.SIGUSR2)  # what Slurm does before the time is up
    assert waited(lambda: [record.status for record in records()] == ["ok", "ok"])
    assert (slurm / "requeued").read_text() == "requeue 7_1\n"
    assert [record.attempts for record in records()] == [1, 2] and "stopped by SIGTERM" in said.read_text()
    assert main(["batch", str(path), "--status"]) == 0 and "2 jobs: 2 ok" in capsys.readouterr().out
    assert main(["batch", str(path)]) == 0 and "sent" not in capsys.readouterr().out.replace("sends what", "")
