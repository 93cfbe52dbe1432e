"""The command: fast to ask, clear when wrong, and doing what it says."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from shared.clone import ROOT

from maskalign_lab import cli, network_commands, training_commands
from maskalign_lab.base import paths
from maskalign_lab.cli import main
from maskalign_lab.workbench import commands

pytestmark = pytest.mark.usefixtures("own_folders")
HEAVY = {"torch", "numpy", "matplotlib", "papermill", "nbformat", "jupyter_client", "plotly", "IPython", "timm"}


def in_a_process(*words):
    """Exit code, messages and imported modules of the command in a new interpreter."""
    code = f"""import sys
from maskalign_lab.cli import main
try:
    code = main({list(words)!r})
except SystemExit as exit:
    code = exit.code
print("MODULES", *sys.modules)
sys.exit(code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    text, modules = done.stdout.split("MODULES")
    return done.returncode, text + done.stderr, set(modules.split())


# ---- asking


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["tarin"], ["run", "no_such_study"], ["run"]])
def test_help_and_typing_errors_import_nothing_heavy(words):
    code, text, modules = in_a_process(*words)
    assert code == (0 if "--help" in words else 2) and text
    assert not modules & HEAVY


def test_the_module_is_the_command():
    """As one starts it from a clone in which nothing is installed."""
    start = [sys.executable, "-m", "maskalign_lab.cli"]
    done = subprocess.run([*start, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 0 and done.stdout.startswith("usage: maskalign-lab COMMAND") and "\n  train" in done.stdout
    )
    done = subprocess.run([*start, "tarin"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Did you mean 'train'?" in done.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"maskalign-lab {name}" in printed
    main(["--help"])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian", "repa"], "unknown command 'trian'. Did you mean 'train'?"),
        (["train", "rpea"], "unknown method 'rpea'. Did you mean 'repa'?"),
        (["train", "repa", "training.step=3"], "Did you mean 'training.steps'?"),
        (["train", "repa", "training.steps=many"], "training.steps"),
        (["train", "repa", "smoke"], "override 'smoke' is not of the form section.field=value"),
        (["train", "repa", "--preset", "laptob"], "unknown preset 'laptob'. Did you mean 'laptop'?"),
        (["sample", "nowhere/run"], "nowhere/run"),
        (["run", "01_gradient_norm"], "Did you mean '01_gradient_norms'?"),
        (["run", "nothing.ipynb"], "no notebook 'nothing.ipynb'"),
        (["make", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and message in told
    with pytest.raises((ValueError, FileNotFoundError)):
        main([*words, "--debug"])


def test_overrides_stand_anywhere():
    words = ["repa", "method.weight=1", "--preset", "gpu", "training.steps=3", "--out", "here"]
    typed = commands.parse(training_commands.Train, words)
    assert typed == training_commands.Train("repa", ("method.weight=1", "training.steps=3"), preset="gpu", out="here")


# ---- training and sampling


def test_train_sample_and_list(tmp_path, capsys):
    words = ["train", "sit", "--preset", "smoke", "training.steps=2", "data.n=64", "network.depth=1"]
    assert main(words) == 0
    (folder,) = (tmp_path / "runs" / "trained").iterdir()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["training"]["steps"] == 2 and recipe["network"]["depth"] == 1
    assert folder.name.startswith("sit-shapes-")
    grid = tmp_path / "grid.png"
    assert main(["sample", folder.name, "--classes", "0", "2", "--n", "3", "--steps", "2", "--out", str(grid)]) == 0
    assert grid.read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert folder.name in capsys.readouterr().out
    assert main(["sample", folder.name, "--classes", "10"]) == 2
    assert "classes 0 to 9" in capsys.readouterr().err
    assert main([*words, "--out", str(folder), "--seed", "1"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_teach_has_the_defaults_of_its_module():
    from maskalign_lab.encoders.teacher_training import TeachConfig

    command, config = network_commands.Teach("shapes"), TeachConfig()
    assert (command.steps, command.seed) == (config.steps, config.seed)


# ---- studies


def test_run_reads_values_by_their_declared_type(tmp_path, capsys):
    cells = [nbformat.v4.new_code_cell(source) for source in ('run: str = ""\nseed: int = 0', "print([run, seed])")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "study.ipynb")
    words = ["run", str(tmp_path / "study.ipynb"), "-p", "run", "01", "-p", "seed", "-2"]
    assert main([*words, "--out", str(tmp_path / "job")]) == 0
    assert "['01', -2]" in (tmp_path / "job" / "study.ipynb").read_text()
    assert "study.html" in capsys.readouterr().out
    assert main([*words, "-p", "sede", "1"]) == 2
    assert "Did you mean 'seed'" in capsys.readouterr().err


def test_open_copies_and_keeps_what_is_there(tmp_path, capsys):
    target = tmp_path / "mine"
    assert main(["open", str(target), "--no-start"]) == 0
    wanted = {path.relative_to(paths.notebooks()) for path in paths.notebooks().rglob("*.ipynb")}
    wanted = {path for path in wanted if ".ipynb_checkpoints" not in path.parts}
    assert {path.relative_to(target) for path in target.rglob("*.ipynb")} == wanted
    mine = target / "lib" / "base" / "paths.ipynb"
    mine.write_text("my work")
    capsys.readouterr()
    assert main(["open", str(target), "--no-start"]) == 0
    printed = capsys.readouterr().out
    assert "0 notebooks copied" in printed and str(mine) in printed and mine.read_text() == "my work"


def test_open_starts_the_lab_of_this_interpreter(tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            if len(commands) == 1:
                commands.append("Ctrl-C")
                raise KeyboardInterrupt
            return 7

    monkeypatch.setattr(cli.subprocess, "Popen", Process)
    assert main(["open", str(tmp_path), "--no-browser"]) == 7
    assert commands[0] == [sys.executable, "-m", "jupyterlab", str(tmp_path), "--no-browser"]


# ---- doctor


def test_doctor(monkeypatch, capsys, tmp_path):
    code = main(["doctor"])
    printed = capsys.readouterr().out
    for name in "python torch timm diffusers plotly anywidget ipywidgets jupyterlab papermill nbdev".split():
        assert f"\n{name} " in printed
    assert "device" in printed and "bfloat16" in printed and "GiB free" in printed
    assert code == ("MISSING" in printed)
    monkeypatch.setattr(paths, "data", lambda: tmp_path)
    assert main(["doctor"]) == 1
    assert f"MISSING: {Path(tmp_path, 'shapes', 'card.md')} is missing" in capsys.readouterr().out


def test_doctor_on_a_machine_without_the_packages(monkeypatch, capsys):
    for name in ("torch", "jupyter_core.paths", "jupyter_client.kernelspec", "packaging.requirements"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "MISSING: device: " in printed and "MISSING: widget problems: " in printed
