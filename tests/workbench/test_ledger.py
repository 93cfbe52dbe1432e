"""The ledger of a job tells the truth, also of one whose process was killed, and its command works anywhere."""

import json
import os
import socket
import subprocess
import sys

import pytest
from shared.notebooks import write

from maskalign_lab.base.processes import began
from maskalign_lab.cli import main
from maskalign_lab.workbench import jobs
from maskalign_lab.workbench.ledger import Job, command_of, known_jobs, published, read_job, rooted

COMMAND = "maskalign-lab run 01_gradient_norms"


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """All results of a test go to its own folder."""
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def killed():
    """The number and the beginning of a process that was killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = {"pid": process.pid, "began": began(process.pid)}
    process.kill()
    process.communicate()
    return known


def kept(folder, **known):
    """A job in a folder, with a ledger."""
    folder.mkdir(parents=True)
    job = Job(str(folder), "01_gradient_norms", {}, COMMAND, **known)
    job.save()
    return job


def test_a_killed_job_is_not_running(output, killed, capsys):
    kept(output / "job", **killed)
    job = read_job(output / "job")
    assert job.status == "killed" and f"process {killed['pid']} on {socket.gethostname()} is gone" in job.error
    assert json.loads((output / "job" / "job.json").read_text())["status"] == "killed"
    assert jobs.summary(job).startswith("killed: process")
    assert main(["jobs"]) == 0 and main(["jobs", "job"]) == 0 and main(["jobs", str(output / "job")]) == 0
    line, *more = capsys.readouterr().out.splitlines()
    assert line.startswith("killed ") and line.endswith(str(output / "job")) and more[0] == more[-3]


def test_another_process_with_the_number_of_the_job_is_not_the_job(output):
    kept(output / "job", began=began(os.getpid()) - 100)
    assert read_job(output / "job").status == "killed"


def test_a_job_that_runs_or_has_ended_stays_as_it_is(output, killed):
    kept(output / "running")
    kept(output / "elsewhere", host="another-host", **killed)
    kept(output / "failed", status="failed", exit_code=1, **killed)
    assert {job.folder.rpartition("/")[2]: job.status for job in known_jobs()} == {
        "running": "running",
        "elsewhere": "running",
        "failed": "failed",
    }


def test_ledgers_of_before_are_read(output, killed):
    kept(output / "job", **killed)
    path = output / "job" / "job.json"
    told = json.loads(path.read_text()) | {"of another version": 1}
    path.write_text(json.dumps({name: value for name, value in told.items() if name not in ("directory", "began")}))
    assert read_job(output / "job").status == "killed"


def test_no_jobs(output, capsys):
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == f"no job under {output}\n"


def test_the_command_works_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained" / "mine").mkdir(parents=True)
    given = {"run": "trained/mine", "dataset": "folder:cats", "out_dir": "figures", "seed": 3, "preset": "smoke"}
    absolute = {
        "run": f"{tmp_path}/trained/mine",
        "dataset": f"folder:{tmp_path}/cats",
        "out_dir": f"{tmp_path}/figures",
    }
    assert rooted(given) == given | absolute
    monkeypatch.setattr(jobs, "perform", lambda job, *_: job.end("ok", 0))
    job = jobs.run_study(write(tmp_path / "study.ipynb"), {"out_dir": "figures"}, "job")
    assert job.command == f"maskalign-lab run {tmp_path}/study.ipynb -p out_dir {tmp_path}/figures"
    assert (job.directory, job.parameters["out_dir"]) == (str(tmp_path), f"{tmp_path}/figures")
    assert command_of(jobs.find_study("01"), {"seed": 3}) == f"{COMMAND} -p seed 3"


@pytest.mark.parametrize(
    "word, shown",
    [
        ("/home/me/a study.ipynb", "a study"),
        ("folder:/home/me/my cats", "folder:my cats"),
        ("tiny:/home/me/a,tiny:/home/me/b", "tiny:a,tiny:b"),
        ("training.steps=3 data.name=folder:/home/me/c", "training.steps=3 data.name=folder:c"),
        ("01_gradient_norms", "01_gradient_norms"),
        ("a/b", "a/b"),
    ],
)
def test_what_is_published_tells_nothing_of_the_machine(word, shown):
    assert published(word) == shown
