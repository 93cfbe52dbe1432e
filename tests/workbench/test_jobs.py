"""Jobs: every end that one can come to is recorded, and nothing is lost."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from shared.clone import ROOT
from shared.notebooks import write

from maskalign_lab.base import paths
from maskalign_lab.cli import main
from maskalign_lab.workbench import jobs, refresh
from maskalign_lab.workbench.batch_ledger import status_of
from maskalign_lab.workbench.jobs import run_study, save_figure

LARGE = base64.b64encode(bytes(100_001)).decode()


def ledger(folder):
    return json.loads((folder / "job.json").read_text())


def cells(folder, name="study"):
    return nbformat.read(folder / f"{name}.ipynb", 4).cells


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """All results of a test go to its own folder."""
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    return tmp_path / "runs"


# ---- how a job ends


def test_a_job_from_end_to_end(tmp_path, output, monkeypatch, capsys):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)  # a python3 that belongs to somebody else
    (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    facts = "import os, sys\nprint([preset, seed, out_dir, sys.executable, os.getcwd()])"
    widget = "import ipywidgets\nipywidgets.IntSlider()"
    job = run_study(write(tmp_path / "study.ipynb", widget, facts), {"preset": "smoke", "seed": 3})
    assert (job.status, job.exit_code) == ("ok", 0)
    (folder,) = output.iterdir()
    assert str(folder) == job.folder and folder.name.startswith("study-")
    assert cells(folder)[-1].outputs[-1].text.strip() == str(["smoke", 3, str(folder), sys.executable, os.getcwd()])
    assert {path.name for path in folder.iterdir()} == {"job.json", "study.ipynb", "study.html"}
    assert "widgets" not in nbformat.read(folder / "study.ipynb", 4).metadata
    told = ledger(folder)
    assert told["status"] == "ok" and told["parameters"] == {"preset": "smoke", "seed": 3, "out_dir": str(folder)}
    assert told["command"] == f"maskalign-lab run {tmp_path / 'study.ipynb'} -p preset smoke -p seed 3"  # from anywhere
    assert told["directory"] == os.getcwd() and told["pid"] == os.getpid()
    assert told["versions"]["papermill"] and told["seconds"] > 0
    printed = capsys.readouterr().out
    assert "[4/4]" in printed and "A study" in printed and str(folder) in jobs.summary(job)


def test_a_failing_cell_keeps_what_was_done(tmp_path, output):
    job = run_study(write(tmp_path / "study.ipynb", "print('before')", "n = 0\n1 / n", "print('after')"))
    assert (job.status, job.exit_code) == ("failed", 1)
    assert "'1 / n'" in job.error and "ZeroDivisionError: division by zero" in job.error and job.error.count("\n") == 1
    (folder,) = output.iterdir()
    text = (folder / "study.ipynb").read_text()
    assert "before" in text and "ZeroDivisionError" in text and not (folder / "study.html").exists()
    assert ledger(folder)["status"] == "failed" and ledger(folder)["error"] == job.error


def test_a_kernel_that_dies_is_a_failure(tmp_path, output):
    job = run_study(write(tmp_path / "study.ipynb", "print('before')", "import os; os._exit(1)"))
    assert job.status == "failed" and "DeadKernelError" in job.error
    (folder,) = output.iterdir()
    assert "before" in cells(folder)[-2].outputs[0].text


def test_a_kernel_that_the_system_kills_is_killed(tmp_path, output):
    job = run_study(
        write(tmp_path / "study.ipynb", "print('before')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    )
    assert (job.status, job.exit_code) == ("killed", 137) and "memory runs out" in job.error
    assert status_of(job.exit_code) == ledger(next(output.iterdir()))["status"] == "killed"


@pytest.mark.parametrize("place", ["notebook_kernel.papermill.execute_notebook", "offline_page.write_page"])
def test_a_signal_outside_of_the_cells_is_followed_and_recorded(tmp_path, output, monkeypatch, place):
    monkeypatch.setattr(f"maskalign_lab.workbench.{place}", lambda *_, **more: signal.raise_signal(signal.SIGUSR1))
    study = write(tmp_path / "study.ipynb", "print('done')")
    assert main(["run", str(study), "--out", str(tmp_path / "job")]) == 75
    told = ledger(tmp_path / "job")
    assert (told["status"], told["exit_code"], told["error"]) == ("preempted", 75, "stopped by SIGUSR1")
    if "page" in place:
        assert cells(tmp_path / "job")[0].source.startswith("**preempted: stopped by SIGUSR1.**")


def test_a_page_that_cannot_be_made_is_a_failure(tmp_path, output, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr("maskalign_lab.workbench.offline_page.write_page", broken)
    job = run_study(write(tmp_path / "study.ipynb", "print('done')"))
    assert (job.status, job.error) == ("failed", "OSError: no space left")
    (folder,) = output.iterdir()
    assert cells(folder)[-1].outputs[0].text == "done\n" and ledger(folder)["status"] == "failed"


@pytest.mark.parametrize(
    "parameters, tags, message",
    [
        ({"preest": "smoke"}, ("parameters",), "Did you mean 'preset'"),
        ({"seed": "three"}, ("parameters",), "expected int"),
        ({"preset": "labtop"}, ("parameters",), "Did you mean 'laptop'"),
        ({"preset": "smoke"}, (), "have the tag 'parameters'"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_exists(tmp_path, output, parameters, tags, message):
    with pytest.raises(ValueError, match=message):
        run_study(write(tmp_path / "study.ipynb", tags=tags), parameters)
    assert not output.exists()


def test_refusing_takes_no_kernel_and_no_torch(tmp_path):
    path = write(tmp_path / "study.ipynb")
    code = f"""import sys
from maskalign_lab.workbench.jobs import run_study
try:
    run_study({str(path)!r}, {{"preest": "smoke"}})
except ValueError:
    print(not {{"papermill", "torch", "jupyter_client"}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_unknown_studies_and_used_folders(tmp_path):
    with pytest.raises(ValueError, match="Did you mean '01_gradient_norms'"):
        jobs.find_study("gradient_nroms")
    with pytest.raises(FileNotFoundError, match="no notebook"):
        run_study(tmp_path / "none.ipynb")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "job.json").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        run_study(write(tmp_path / "study.ipynb"), out=tmp_path / "used")


# ---- signals


def start(path, folder, grace=20.0):
    """A job in a process of its own, up to the point where its cell has begun."""
    code = f"""import sys
from maskalign_lab.workbench import notebook_kernel
from maskalign_lab.workbench.jobs import run_study
notebook_kernel.GRACE = {grace}
sys.exit(run_study({str(path)!r}, out={str(folder)!r}).exit_code)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if "begun" in line:
            return process
    raise AssertionError("the cell never began")


SAVING = "import time\ntry:\n    print('begun', flush=True)\n    time.sleep(100)\nfinally:\n    print('saved')"
STUBBORN = """import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('begun', flush=True)
time.sleep(100)"""


STOPS = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize("number, code", STOPS)
def test_a_signal_reaches_the_cell_which_may_save(tmp_path, number, code):
    process = start(write(tmp_path / "study.ipynb", SAVING, "print('after')"), tmp_path / "job")
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    told = ledger(tmp_path / "job")
    assert (told["status"], told["exit_code"]) == ("preempted", code) and number.name in told["error"]
    first, *_, interrupted, never_begun = cells(tmp_path / "job")
    assert first.source.startswith(f"**preempted: stopped by {number.name}.**") and "maskalign-lab run" in first.source
    printed = "".join(output.get("text", "") for output in interrupted.outputs)
    assert "saved" in printed and interrupted.outputs[-1].ename == "KeyboardInterrupt" and never_begun.outputs == []


def test_a_cell_that_does_not_listen_is_killed(tmp_path):
    process = start(write(tmp_path / "study.ipynb", STUBBORN), tmp_path / "job", grace=0.5)
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=60) == 75 and time.monotonic() - began < 50
    assert ledger(tmp_path / "job")["status"] == "preempted" and cells(tmp_path / "job")


# ---- figures


def test_a_figure_is_traced_to_its_job(tmp_path, output):
    drawing = """from matplotlib.figure import Figure
from maskalign_lab.workbench.jobs import save_figure
save_figure(Figure(figsize=(1, 1)), "dot", out_dir, {"study": "study", "seed": seed})"""
    job = run_study(write(tmp_path / "study.ipynb", drawing), {"seed": 5})
    (picture,) = jobs.figures_of(job)
    side = json.loads(picture.with_suffix(".json").read_text())
    assert picture.read_bytes()[:4] == b"\x89PNG" and side["figure"] == "dot" and side["seed"] == 5
    assert side["command"] == "maskalign-lab run study -p seed 5"
    assert side["parameters"] == {"preset": "laptop", "seed": 5}
    assert side["versions"]["python"] and "git" in side and str(tmp_path) not in json.dumps(side)


def test_a_figure_made_by_hand(tmp_path):
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    assert save_figure(Figure(), "none", "", {}) is None
    table = pd.DataFrame({"arm": ["REG", "SiT"], "+/-": [np.inf, 1 / 3]})
    path = save_figure(Figure(figsize=(1, 1)), "dot", tmp_path, {"ratio": np.float32(2), "table": table})
    side = json.loads(path.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert side["command"] == "by hand" and side["ratio"] == 2
    assert side["table"] == [{"arm": "REG", "+/-": None}, {"arm": "SiT", "+/-": 0.333333}]


# ---- committed outputs


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with one study, which does what its only cell says."""
    root = tmp_path / "clone"
    (root / "nbs").mkdir(parents=True)
    shutil.copy2(ROOT / "settings.ini", root)
    monkeypatch.setattr(paths, "clone", lambda: root)
    monkeypatch.setattr(paths, "notebooks", lambda: root / "nbs")
    return root


def test_refresh_keeps_what_can_be_shown(clone):
    drawing = """import sys, ipywidgets
from IPython.display import display
from matplotlib.figure import Figure
from maskalign_lab.workbench.jobs import save_figure
print("noise", file=sys.stderr)
print(preset)
display(ipywidgets.IntSlider())
save_figure(Figure(figsize=(1, 1)), "01_dot", out_dir, {});
display({"image/png": "iVBORw0K", "text/plain": "a picture"}, raw=True)
1 + 1"""
    path = write(clone / "nbs" / "01_study.ipynb", drawing)
    job = refresh.refresh("01")
    assert job.status == "ok" and refresh.is_fresh(path)
    book = nbformat.read(path, 4)
    text, slider, picture, value = book.cells[-1].outputs
    assert text.text == "laptop\n" and list(slider.data) == ["text/plain"] and value.data["text/plain"] == "2"
    assert picture.data["image/png"] == "iVBORw0K" and "widgets" not in book.metadata
    assert [cell.get("execution_count") for cell in book.cells] == [None] * 3 and "papermill" not in path.read_text()
    assert refresh.figures()[0].status == "ok"
    assert {each.name for each in (clone / "figures").iterdir()} == {"01_dot.png", "01_dot.json"}


def test_refresh_and_figures_leave_everything_after_a_failure(clone):
    path = write(clone / "nbs" / "01_study.ipynb", "1 / 0")
    before = path.read_bytes()
    assert refresh.refresh("01").exit_code == 1 and refresh.figures()[-1].exit_code == 1
    assert path.read_bytes() == before and not (clone / "figures").exists()


def test_clean_changes_nothing_in_a_refreshed_notebook(tree):
    """In a copy of the real clone, whose pyproject.toml says which metadata stay."""
    path = write(tree / "nbs" / "01_study.ipynb")
    executed = tree / "executed.ipynb"
    book = nbformat.read(path, 4)
    png = base64.b64encode(b"\x89PNG").decode() + "\n"
    book.cells[-1].outputs = [
        nbformat.v4.new_output("execute_result", {"text/plain": "two\nlines"}, execution_count=3),
        nbformat.v4.new_output("display_data", {"image/png": png, "text/plain": "<Figure>"}, metadata={"width": 3}),
    ]
    nbformat.write(book, executed)
    refresh.transplant(executed, path)
    before = path.read_bytes()
    clean = [sys.executable, "-c", f"from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})"]
    subprocess.run(clean, cwd=tree, check=True)
    assert path.read_bytes() == before and refresh.is_fresh(path)


@pytest.mark.parametrize(
    "output, message",
    [
        (nbformat.v4.new_output("stream", text="x" * 100_001), "100 KB"),
        (nbformat.v4.new_output("display_data", {"image/png": LARGE}), "image/png of 100 KB"),
        (nbformat.v4.new_output("stream", text=f"saved to {os.path.expanduser('~')}/x"), "shows the path"),
    ],
)
def test_what_may_not_be_committed(tmp_path, output, message):
    path = write(tmp_path / "study.ipynb")
    before = path.read_bytes()
    book = nbformat.read(path, 4)
    book.cells[-1].outputs = [output]
    nbformat.write(book, tmp_path / "executed.ipynb")
    with pytest.raises(ValueError, match=message):
        refresh.transplant(tmp_path / "executed.ipynb", path)
    assert path.read_bytes() == before


def test_a_notebook_edited_meanwhile_is_left_alone(tmp_path):
    executed = write(tmp_path / "executed.ipynb", "1")
    with pytest.raises(ValueError, match="was edited while its copy ran"):
        refresh.transplant(executed, write(tmp_path / "study.ipynb", "2"))


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_outputs_of_a_study_are_those_of_its_code(path):
    shown = any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
    assert not shown or refresh.is_fresh(path), f"run `python3 lab.py refresh {path.stem[:2]}`"
