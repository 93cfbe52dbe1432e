"""Batches: each job comes to exactly one end, nothing is lost or done twice, and a stop reaches what runs."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.clone import ROOT
from shared.notebooks import write

from maskalign_lab.base.locks import sole_writer
from maskalign_lab.base.processes import began
from maskalign_lab.batch_commands import carry_out_here, check_jobs
from maskalign_lab.cli import main
from maskalign_lab.studies.dsd.arms import SCALES as DSD
from maskalign_lab.studies.maskalign import arms as maskalign_arms
from maskalign_lab.studies.rae.arms import SCALES as RAE
from maskalign_lab.workbench.batch_ledger import ENDS, Record, job_place, read_record, save_record, settle, write_ledger
from maskalign_lab.workbench.batch_plan import Task, expand, parse_plan
from maskalign_lab.workbench.batch_work import Work, carry_out_all, kill_all
from maskalign_lab.workbench.ledger import Job

ACTS = """import os, signal, time
if os.path.exists(AGAIN):
    job = None
elif seed == 1:
    raise RuntimeError("seed 1 goes wrong")
else:
    os.kill(os.getppid(), signal.SIGKILL if seed == 2 else signal.SIGTERM)
    time.sleep(60)"""


def test_twelve_jobs_with_an_error_a_kill_and_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    study = write(tmp_path / "study.ipynb", ACTS.replace("AGAIN", repr(str(tmp_path / "again"))))
    for number in range(9):
        (tmp_path / str(number)).mkdir()
        Job(str(tmp_path / str(number)), "study", {}, "maskalign-lab run study").save()
    quick = [Task(("jobs", str(tmp_path / str(number)))) for number in range(9)]
    tasks = [*quick[:5], *expand({"run": str(study), "seed": [1, 2, 3]}), *quick[5:]]

    def ends():
        carry_out_all(tmp_path / "batch", tasks, ["", ""], lambda record: None)
        write_ledger(tmp_path / "batch", tasks)
        told = json.loads((tmp_path / "batch" / "ledger.json").read_text())
        return told["tally"], [(row["status"], row["exit_code"], row["error"]) for row in told["jobs"][5:8]]

    assert ends() == (
        "9 ok, 1 failed, 1 preempted, 1 killed",
        [
            ("failed", 1, "RuntimeError: seed 1 goes wrong"),
            ("killed", -signal.SIGKILL, "ended by SIGKILL"),
            ("preempted", 75, "stopped by SIGTERM"),
        ],
    )
    (tmp_path / "again").touch()
    assert ends() == ("12 ok", [("ok", 0, "")] * 3)
    said = [(job_place(tmp_path / "batch", task.name) / "output.txt").read_text() for task in tasks]
    assert [text.count("== attempt") for text in said] == [1] * 5 + [2] * 3 + [1] * 4


def test_a_stop_reaches_the_job_that_runs_and_keeps_the_rest(tmp_path):
    study = write(tmp_path / "study.ipynb", 'import time\nprint("begun", flush=True)\ntime.sleep(100)')
    (path := tmp_path / "two.yaml").write_text(json.dumps({"jobs": [{"run": str(study), "seed": [0, 1]}]}))
    place = tmp_path / "runs" / "batches" / "two"
    first, second = (job_place(place, task.name) / "output.txt" for task in parse_plan(path.read_text()).tasks)
    env = os.environ | {"MASKALIGN_LAB_OUTPUT": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    batch = subprocess.Popen([sys.executable, "-m", "maskalign_lab.cli", "batch", str(path)], env=env)
    while not (first.exists() and "begun" in first.read_text()):
        with pytest.raises(subprocess.TimeoutExpired):  # it has not ended
            batch.wait(0.1)
    batch.terminate()
    assert batch.wait(60) == 75
    rows = json.loads((place / "ledger.json").read_text())["jobs"]
    assert [(row["status"], row["attempts"]) for row in rows] == [("preempted", 1), ("waiting", 0)]
    assert rows[0]["error"] == "stopped by SIGTERM" and second.read_text() == ""
    assert not psutil.pid_exists(rows[0]["pid"])


# ---- one job


def test_a_job_that_somebody_else_does_is_left_alone(tmp_path):
    task = Task(("jobs",))
    with sole_writer(job_place(tmp_path, task.name)):
        assert Work(tmp_path, task)().status == "waiting"
    assert Work(tmp_path, task)().status == "ok"


def test_a_job_whose_watcher_was_killed_is_not_done_twice(tmp_path):
    task = Task(("jobs",))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as orphan:
        (record := read_record(tmp_path, task)).begin(orphan.pid, "")
        save_record(tmp_path, record)
        assert settle(tmp_path, task).status == Work(tmp_path, task)().status == "running"
    assert settle(tmp_path, task).status == "killed"
    assert Work(tmp_path, task)().status == "ok" and read_record(tmp_path, task).attempts == 2


def test_a_device_on_which_a_job_of_a_killed_batch_lives_is_not_given_away(tmp_path, monkeypatch):
    other, left = Task(("jobs",)), Task(("jobs", "--help"))
    orphan = psutil.Popen([sys.executable, "-c", "import time; time.sleep(2)"])
    (record := read_record(tmp_path, left)).begin(orphan.pid, "0")
    save_record(tmp_path, record)
    attempt, there = Work.attempt, []

    def looked(work, record):
        there.append((record.name, began(orphan.pid) is not None))
        return attempt(work, record)

    monkeypatch.setattr(Work, "attempt", looked)
    records = carry_out_all(tmp_path, [other, left], ["0"], lambda record: None)
    assert sorted(there) == sorted([(other.name, False), (left.name, False)])
    assert [(record.name, record.status, record.attempts) for record in records] == [
        (other.name, "ok", 1),
        (left.name, "ok", 2),  # nobody knows how it had ended
    ]


def test_a_stop_reaches_a_job_of_a_killed_batch(tmp_path):
    task = Task(("jobs",))
    orphan = psutil.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (record := read_record(tmp_path, task)).begin(orphan.pid, "0")
    save_record(tmp_path, record)
    (work := Work(tmp_path, task)).stop()
    work.outlive()
    assert began(orphan.pid) is None and work().status == "killed"


def test_a_kill_reaches_those_in_a_session_of_their_own(tmp_path):
    code = """import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print(child.pid, flush=True)
child.wait()"""
    leader = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(leader.stdout.readline()))
    kill_all(leader)
    assert psutil.wait_procs([leader, child], timeout=60)[1] == []


def test_a_disk_that_is_full_when_a_job_ends_does_not_end_the_batch(tmp_path, monkeypatch, capsys):
    def full(folder, record):
        if record.status == "ok":
            raise OSError("no space left")
        save_record(folder, record)

    monkeypatch.setattr("maskalign_lab.workbench.batch_work.save_record", full)
    tasks = [Task(("jobs",)), Task(("jobs", "--help"))]
    assert [record.status for record in carry_out_all(tmp_path, tasks, [""], lambda record: None)] == ["ok", "ok"]
    assert "cannot be written: no space left" in capsys.readouterr().out
    assert [record.status for record in write_ledger(tmp_path, tasks)] == ["killed", "killed"]


def test_a_study_that_ended_while_nobody_watched_has_its_own_end(tmp_path):
    task = Task(("run", "01"))
    (record := read_record(tmp_path, task)).begin(os.getpid(), "")
    record.began -= 100  # the process of this number is another one by now
    save_record(tmp_path, record)
    (place := job_place(tmp_path, task.name) / "attempt-1").mkdir()
    job = Job(str(place), "01_gradient_norms", {}, "maskalign-lab run 01")
    job.end("ok", 0)
    job.save()
    assert settle(tmp_path, task).status == Work(tmp_path, task)().status == "ok"


def test_what_goes_wrong_about_one_job_is_its_own_end(tmp_path, monkeypatch):
    monkeypatch.setattr("maskalign_lab.workbench.batch_work.words_here", lambda task, *of: ["x" * 10_000_000])
    records = carry_out_all(tmp_path, [Task(("jobs",)), Task(("jobs", "x"))], [""], lambda record: None)
    assert [record.status for record in records] == ["failed"] * 2 and "too long" in records[0].error


def test_a_folder_belongs_to_one_plan_and_a_look_leaves_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    study = write(tmp_path / "study.ipynb", "1 / 0")
    plans = [tmp_path / name / "plan.yaml" for name in "ab"]
    for plan in plans:
        plan.parent.mkdir()
        plan.write_text(json.dumps({"jobs": [{"run": str(study)}]}))
    assert main(["batch", str(plans[0]), "--status"]) == 75 and "1 jobs: 1 waiting" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(["batch", str(plans[0])]) == 1
    before = (ledger := tmp_path / "runs" / "batches" / "plan" / "ledger.json").read_text()
    for words in (["batch", str(plans[1])], ["batch", str(plans[1]), "--status"]):
        assert main(words) == 2 and "choose another folder with --out" in capsys.readouterr().err
    assert ledger.read_text() == before


def test_what_another_machine_does_is_not_called_dead_while_it_is_locked(tmp_path):
    task = Task(("jobs",))
    (record := read_record(tmp_path, task)).begin(os.getpid(), "")
    record.host = "elsewhere"
    save_record(tmp_path, record)
    with sole_writer(job_place(tmp_path, task.name)):
        assert settle(tmp_path, task).status == "running"
    assert settle(tmp_path, task).status == "killed"


def test_a_job_that_was_stopped_before_it_began_waits(tmp_path):
    (work := Work(tmp_path, Task(("jobs",)))).stop()
    assert work().status == "waiting" and read_record(tmp_path, work.task).attempts == 0


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0, 1, 75, -9, -15]), min_size=1, max_size=5))
def test_a_record_tells_the_last_end_only(codes):
    record = Record("job", "maskalign-lab jobs")
    for code in codes:
        record.begin(os.getpid(), "")
        assert (record.status, record.exit_code, record.error) == ("running", None, "")
        record.end(code, "why", 1.0)
        assert record.status in ENDS and bool(record.error) == (code != 0)
    assert record.attempts == len(codes) and record.exit_code == codes[-1]


# ---- plans


scalars = st.one_of(st.integers(0, 99), st.sampled_from(["a", "b=c", "x y"]), st.booleans())


@given(
    st.dictionaries(
        st.sampled_from(["seed", "preset", "network", "training.steps"]),
        st.lists(scalars, min_size=1, max_size=3, unique_by=str),
    )
)
def test_a_plan_has_every_combination_once(values):
    tasks = parse_plan(json.dumps({"jobs": [{"train": ["sit", "repa"]} | values]})).tasks
    count = 2
    for choices in values.values():
        count *= len(choices)
    assert len(tasks) == len({task.name for task in tasks}) == count
    assert all(len(task.name) < 100 and "/" not in task.name and " " not in task.name for task in tasks)


def test_a_relative_path_belongs_to_the_folder_in_which_the_plan_was_called(tmp_path, monkeypatch):
    text = "jobs: [{train: sit, dataset: 'folder:cats'}, {run: '01', dataset: 'folder:cats'}]"
    monkeypatch.chdir(tmp_path)
    here = parse_plan(text).tasks
    assert all(f"folder:{tmp_path}/cats" in task.words for task in here)
    monkeypatch.chdir(tmp_path.parent)
    assert not {task.name for task in here} & {task.name for task in parse_plan(text).tasks}


def test_the_ledger_is_written_as_jobs_end(tmp_path, monkeypatch):
    tallies = []

    def all_of(folder, tasks, devices, told, jobs=None):
        for task in tasks:
            told(Work(folder, task)())
            tallies.append(json.loads((folder / "ledger.json").read_text())["tally"])

    monkeypatch.setattr("maskalign_lab.workbench.batch_work.carry_out_all", all_of)
    carry_out_here(tmp_path, [Task(("jobs",)), Task(("jobs", "--help"))], None, 1)
    assert tallies == ["1 ok, 1 waiting", "2 ok"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: [{train: repa, trainin.steps: 3}]", "training"),
        ("jobs: [{run: '01', presett: smoke}]", "Did you mean 'preset'"),
        ("jobs: [{run: '01', preset: smok}]", "Did you mean 'smoke'"),
        ("jobs: [{run: '14'}]", "unknown study '14'"),
        ("jobs: [{train: repa, sede: 3}]", "Did you mean 'seed'"),
        ("jobs: [{train: repa, seed: x}]", "cannot have"),
        ("jobs: [{train: repa, out: here}]", "leave it out"),
        ("jobs: [{run: '01'}]\nslurm: {partition: gpu}", "time: None: expected the minutes"),
        ("jobs: [{run: '01'}]\nslurm: {time: 9, qso: high}", "Did you mean 'qos'"),
        ("jobs: [{run: '01'}]\nslurm: {time: 4:00:00}", "expected the minutes"),
        ("jobs: [{train: sit, seed: 0, seed: 1}]", "'seed' stands twice"),
        ("jobs: [{train: sit, processes: 0}]", "--processes 0: expected at least 1"),
        ("jobs: [{train: sit, device: cpu, processes: 7}]", "cannot be cut into 7 equal parts"),
        ("jobs: [{train: sit, dataset: 'folder:none'}]", "does not exist"),
        ("jobs: [{train: sit, device: gpu}]", "there is no device 'gpu' here"),
        ("jobs: {run: '01'}", "a list `jobs:`"),
        ("jobs: [{run: '01', run: '02'", "cannot be read"),
        ("jobs: [{train: sit}, {train: [sit, repa], seed: '0'}]", "trains the same as `maskalign-lab train sit`"),
        (
            "jobs: [{train: sit, processes: 4}]\nslurm: {time: 30, gpus_per_node: 1}",
            "expected at least 4, one for each",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_starts(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    (path := tmp_path / "plan.yaml").write_text(text)
    assert main(["batch", str(path)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_plan_that_is_no_text_is_named(tmp_path, capsys):
    (path := tmp_path / "plan.yaml").write_bytes(b"jobs: \xff")
    assert main(["batch", str(path)]) == 2 and f"plan '{path}' is no text" in capsys.readouterr().err


def test_the_plan_that_ships_has_every_study_and_every_arm_of_its_tables():
    """Parts of a table together are what preset gpu trains in one job."""
    plan = parse_plan((ROOT / "benchmarks" / "plans" / "studies.yaml").read_text())
    check_jobs(plan.tasks)
    told = [(task.words[1], dict(zip(task.words[3::3], task.words[4::3]))) for task in plan.tasks]  # run 05 -p arms x
    assert {what for what, _ in told} == {f"0{k}" for k in range(1, 10)}
    assert all(parameters["preset"] == "gpu" for _, parameters in told)
    for study, groups in (("05", maskalign_arms.EVERY), ("07", RAE["gpu"].arms), ("08", DSD["gpu"].arms)):
        parts = [parameters["arms"].split() for what, parameters in told if what == study]
        assert sorted(sum(parts, [])) == sorted(groups.split())
