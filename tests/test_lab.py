"""`lab.py` without its downloads: which interpreter it takes, when it installs what, and what it refuses to export."""

import ast
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared.clone import ROOT


@pytest.fixture
def lab(tmp_path):
    """The module `lab.py` of a clone with no notebook."""
    clone = tmp_path / "clone"
    (clone / "nbs").mkdir(parents=True)
    for name in ("lab.py", "settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, clone)
    spec = importlib.util.spec_from_file_location("lab", clone / "lab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    on_term = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, on_term)


class Machine:
    """Stands for `subprocess` in lab.py: keeps the commands, and plays a machine on which they succeed or fail."""

    DEVNULL = None

    def __init__(self, lab):
        self.lab, self.commands, self.version, self.failing, self.environments = lab, [], "3 12", [], []

    def run(self, command, env=None, **options):
        command = [str(word) for word in command]
        if command[0] == self.lab.tool("python") and not self.lab.BIN.exists():
            raise FileNotFoundError(command[0])
        code = self.note(command, env)
        if "--clear" in command:
            (self.lab.VENV if code else self.lab.BIN).mkdir(parents=True, exist_ok=True)  # a failure leaves a part
        answer = self.version if "version_info" in command[-1] else "2.15.0\n"
        return SimpleNamespace(returncode=code, stdout=answer, stderr="Traceback\nno such symbol")

    def Popen(self, command, env=None, **options):
        code = self.note([str(word) for word in command], env)
        return SimpleNamespace(wait=lambda: code)

    def note(self, command, env):
        if "version_info" not in command[-1]:
            self.commands.append(" ".join(command))
            self.environments.append(env)
        return int(any(word in " ".join(command) for word in self.failing))

    def take(self) -> list[str]:
        """The commands since the last call, without those that ask an interpreter for its version."""
        taken, self.commands, self.environments = self.commands, [], []
        return taken


@pytest.fixture
def machine(lab, monkeypatch) -> Machine:
    machine = Machine(lab)
    monkeypatch.setattr(lab, "subprocess", machine)
    monkeypatch.setattr(lab, "has_nvidia", lambda: False)
    monkeypatch.setattr(lab.sys, "platform", "linux")
    return machine


def kinds(commands: list[str]) -> list[str]:
    """Each command by what it does."""
    words = {"-m venv": "venv", "--index-url": "cpu torch", " -e ": "install", "import torch": "check"}
    return [next((kind for word, kind in words.items() if word in command), command) for command in commands]


# ---- what is installed, and when


def test_first_call_installs_and_the_second_nothing(lab, machine):
    lab.set_up([])
    commands = machine.take()
    assert kinds(commands) == ["venv", "cpu torch", "install", "check"]
    assert commands[2].endswith(f"-e {lab.ROOT}")
    lab.set_up([])
    assert machine.take() == []


def test_tests_install_only_what_is_missing(lab, machine):
    lab.set_up([])
    machine.take()
    (lab.VENV / "lib/python3.12/site-packages/torch").mkdir(parents=True)
    (lab.VENV / "lib/python3.12/site-packages/torch/version.py").touch()
    lab.set_up(["dev"])
    commands = machine.take()
    assert kinds(commands) == ["install", "check"], "neither a new environment nor another PyTorch"
    assert commands[0].endswith("[dev]")
    lab.set_up(["dev"])
    lab.set_up([])
    assert machine.take() == []


@pytest.mark.parametrize("name", ["settings.ini", "pyproject.toml", "setup.py"])
def test_changed_requirements_are_installed(lab, machine, name):
    lab.set_up(["dev"])
    machine.take()
    with open(lab.ROOT / name, "a") as file:
        file.write("# changed\n")
    lab.set_up([])
    assert "[dev]" in next(command for command in machine.take() if " -e " in command), "an extra once asked for stays"
    lab.set_up([])
    assert machine.take() == []


def test_another_interpreter_is_noticed(lab, machine):
    lab.set_up([])
    machine.take()
    machine.version = "3 13"
    lab.set_up([])
    assert kinds(machine.take()) == ["cpu torch", "install", "check"]


def test_a_moved_clone_gets_a_new_environment(lab, machine):
    """The programs of an environment name the folder in which it was made."""
    lab.set_up([])
    machine.take()
    stamp = json.loads(lab.STAMP.read_text())
    lab.STAMP.write_text(json.dumps({**stamp, "root": "/elsewhere"}))
    lab.set_up([])
    assert kinds(machine.take())[0] == "venv"
    lab.set_up([])
    assert machine.take() == []


def test_an_interrupted_installation_is_done_again(lab, machine):
    machine.failing = [" -e "]
    with pytest.raises(SystemExit, match="installation failed"):
        lab.set_up([])
    machine.failing = []
    machine.take()
    lab.set_up([])
    assert kinds(machine.take()) == ["cpu torch", "install", "check"]
    machine.failing = [" -e "]
    with pytest.raises(SystemExit, match="installation failed"):
        lab.set_up(["dev"])
    machine.failing = []
    machine.take()
    lab.set_up([])
    assert "install" in kinds(machine.take()), "it may have left what was whole before in pieces"


def test_a_broken_pytorch_is_named(lab, machine):
    machine.failing = ["import torch"]
    with pytest.raises(SystemExit, match="do not work together: no such symbol"):
        lab.set_up([])
    assert "mark" not in lab.read_stamp()


def test_missing_venv_names_the_package(lab, machine):
    machine.failing = ["-m venv", "virtualenv"]
    with pytest.raises(SystemExit, match="apt-get install python3-venv .or python3.12-venv"):
        lab.set_up([])
    assert not lab.VENV.exists()


def test_virtualenv_is_the_second_choice(lab, machine):
    machine.failing = ["-m venv"]
    lab.set_up([])
    commands = machine.take()
    assert "-m virtualenv --clear" in commands[1]
    assert kinds(commands[2:]) == ["cpu torch", "install", "check"]


# ---- which PyTorch


def test_cpu_index_alone_decides(lab, machine, monkeypatch, capsys):
    """A torch of one index and a torchvision of another do not fit each other: nothing else may offer either."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.setenv(name, "x")
    lab.set_up([])
    command, environment = machine.commands[1], machine.environments[1]
    assert command.endswith("torch torchvision --index-url https://download.pytorch.org/whl/cpu")
    assert {key for key in environment if key.startswith("PIP_")} == {"PIP_CERT", "PIP_CONFIG_FILE"}
    assert environment["PIP_CONFIG_FILE"] == lab.os.devnull
    assert machine.environments[2]["PIP_FIND_LINKS"] == "x", "the usual installation keeps the user's settings"
    assert "about 200 MB" in capsys.readouterr().out


def test_without_the_cpu_index_it_goes_on(lab, machine, capsys):
    machine.failing = ["--index-url"]
    lab.set_up([])
    assert kinds(machine.take()) == ["venv", "cpu torch", "install", "check"]
    assert "about 3 GB" in capsys.readouterr().out


@pytest.mark.parametrize("platform, nvidia", [("linux", True), ("darwin", False), ("win32", False)])
def test_elsewhere_the_usual_build_is_taken(lab, machine, monkeypatch, platform, nvidia):
    monkeypatch.setattr(lab.sys, "platform", platform)
    monkeypatch.setattr(lab, "has_nvidia", lambda: nvidia)
    lab.set_up([])
    assert kinds(machine.take()) == ["venv", "install", "check"]


# ---- the interpreter


def test_which_versions_fit(lab):
    assert [minor for minor in range(5, 20) if lab.fits((3, minor))] == [11, 12, 13, 14]
    assert not lab.fits((2, 12)) and not lab.fits(None)


@pytest.fixture
def old(lab, monkeypatch, tmp_path):
    """lab.py started by Python 3.8, with an empty PATH and no pyenv; returns what adds an interpreter to a folder."""
    monkeypatch.setattr(lab, "sys", SimpleNamespace(version_info=(3, 8, 1), executable="/old", exit=sys.exit))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))

    def add(path: str, prints: str) -> str:
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{prints}\n")
        program.chmod(0o755)
        return str(program)

    return add


def test_newest_fitting_python_on_path(lab, old):
    old("bin/python3.14", "exit 127")  # what a shim does for a version that is not active
    old("bin/python3.13", "echo 3 9")
    wanted = old("bin/python3.12", "echo 3 12")
    old("bin/python3.11", "echo 3 11")
    assert lab.find_python() == wanted


def test_python_of_pyenv(lab, old):
    old("pyenv/versions/3.10.4/bin/python", "echo 3 10")
    wanted = old("pyenv/versions/3.11.7/bin/python", "echo 3 11")
    assert lab.find_python() == wanted


def test_no_fitting_python_says_which_is_needed(lab, old):
    old("bin/python3", "echo 3 8")
    with pytest.raises(SystemExit, match=r"Python 3.11 to 3.14 is needed, this is 3.8"):
        lab.find_python()


def test_old_interpreters_can_read_lab_py():
    module = ast.parse((ROOT / "lab.py").read_text(), feature_version=(3, 8))
    imported = [node for node in ast.walk(module) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


# ---- the guard of export


def write(path: Path, *sources: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []} for source in sources]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def test_the_clone_has_no_strays(lab):
    assert lab.strays(ROOT / "nbs") == []


@pytest.mark.parametrize(
    "directive", ["#| default_exp reg", "# | default_exp reg", "#|default_exp: reg", ["#| default_exp reg\n"]]
)
def test_two_homes_of_a_module_are_found(lab, tmp_path, directive):
    write(tmp_path / "nbs" / "04_reg.ipynb", "#| default_exp reg", "#| export\n")
    write(tmp_path / "nbs" / "lib" / "diffusion" / "taps.ipynb", "#| default_exp diffusion.taps")
    assert lab.strays(tmp_path / "nbs") == []
    write(tmp_path / "nbs" / "lib" / "reg.ipynb", directive)
    assert lab.strays(tmp_path / "nbs") == ["reg is exported by nbs/04_reg.ipynb and by nbs/lib/reg.ipynb"]


@pytest.mark.parametrize("place", ["04_reg-Copy1.ipynb", "my_try.ipynb", "more/04_reg.ipynb"])
def test_strays_are_found(lab, tmp_path, place):
    write(tmp_path / "nbs" / ".ipynb_checkpoints" / "04_reg-checkpoint.ipynb", "#| default_exp reg")
    write(tmp_path / "nbs" / "04_reg.ipynb", "#| default_exp reg")
    assert lab.strays(tmp_path / "nbs") == []
    write(tmp_path / "nbs" / place, "1 + 1")
    (problem,) = lab.strays(tmp_path / "nbs")
    assert problem.startswith(f"nbs/{place} is neither a study nor in nbs/lib")


@pytest.mark.parametrize(("place", "module"), [("taps", "taps"), ("data/taps", "diffusion.taps"), ("base/x", None)])
def test_a_notebook_stands_at_the_path_of_its_module(lab, tmp_path, place, module):
    write(tmp_path / "nbs" / "lib" / f"{place}.ipynb", f"#| default_exp {module}" if module else "1 + 1")
    problems = lab.strays(tmp_path / "nbs")
    if place == module:
        assert not problems
    else:
        found = module or "no module"
        assert problems == [
            f"nbs/lib/{place}.ipynb exports {found}, and the notebook of module a.b is nbs/lib/a/b.ipynb"
        ]


def test_export_refuses_before_it_writes(lab, machine):
    lab.set_up(["dev"])
    machine.take()
    assert lab.main(["export"]) == 0
    assert [Path(command.split()[0]).name for command in machine.take()] == ["nbdev-export", "nbdev-clean"]
    write(lab.ROOT / "nbs" / "04_reg.ipynb", "#| default_exp reg")
    write(lab.ROOT / "nbs" / "stray.ipynb", "#| default_exp reg")
    with pytest.raises(SystemExit, match="(?s)nothing was exported.*stray.ipynb.*reg is exported by"):
        lab.main(["export"])
    assert machine.take() == []


# ---- the commands


def test_mistyped_command_names_the_nearest(lab, machine):
    with pytest.raises(SystemExit, match="no command 'exprot'. Did you mean export"):
        lab.main(["exprot"])
    assert machine.take() == [], "nothing is installed for a typo"


def test_help(lab, machine, capsys):
    assert lab.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert [name for name in lab.COMMANDS if f"lab.py {name} " not in usage] == []
    assert lab.main([]) == 2
    assert capsys.readouterr().out == usage
    assert machine.take() == []


@pytest.mark.parametrize(
    "typed, passed",
    [
        ("run", "run 01 -p preset laptop"),
        ("run 03", "run 03 -p preset laptop"),
        ("run -p run plain", "run 01 -p preset laptop -p run plain"),
        ("run 02 -p preset smoke", "run 02 -p preset smoke"),
        ("refresh 01", "refresh 01"),
        ("figures", "figures"),
    ],
)
def test_what_is_passed_on(lab, machine, typed, passed):
    lab.main(typed.split())
    assert machine.take()[-1] == f"{lab.tool('maskalign-lab')} {passed}"


@pytest.mark.parametrize("failing", ["nbdev-test", "-m pytest"])
def test_any_failure_fails_test(lab, machine, capsys, failing):
    assert lab.main(["test", "-k", "taps"]) == 0
    assert machine.take()[-1].endswith("-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k taps")
    machine.failing = [failing]
    assert lab.main(["test"]) == 1
    assert len(machine.take()) == 2, "the first failure must not hide the second"
    assert capsys.readouterr().out.count("FAILED") == 1


def test_call_passes_exit_code_and_environment(lab):
    code = "import os, sys; sys.exit(3 if os.environ['JUPYTER_PREFER_ENV_PATH'] == os.environ['A'] == '1' else 4)"
    assert lab.call(sys.executable, "-c", code, A="1") == 3


def test_sigterm_reaches_the_command(lab):
    """Whoever ends lab.py ends the server or the training that it started; it may save and choose its exit code."""
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(1, flush=True); time.sleep(60)"
    code = f"import lab, sys; sys.exit(lab.call(sys.executable, '-c', {child!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=lab.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    process.terminate()
    assert process.wait(timeout=30) == 75
