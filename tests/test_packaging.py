"""The package is what settings.ini says, what the notebooks export, and whole in a wheel and an sdist."""

import base64
import configparser
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from shared.clone import ROOT, copied

import maskalign_lab

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
KB = 1000


def tool(name: str, *arguments, cwd: Path) -> None:
    """Run a program that stands beside this interpreter; its output is the message if it fails."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(code: str, *, cwd: Path, path: Path) -> str:
    """What `code` prints in a new interpreter that finds the package under `path`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASKALIGN_LAB_")}
    environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(tree: Path, *folders: str) -> dict[str, bytes]:
    files = (path for folder in folders for path in (tree / folder).rglob("*") if path.is_file())
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in files if path.name != ".last_checked"}


# ---- one truth


def test_settings_and_package_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings()["version"] == maskalign_lab.__version__
    assert settings()["name"] == settings()["lib_name"] == project["name"] == maskalign_lab.__name__
    assert f">={settings()['min_python']}" == project["requires-python"]


def test_requirements_are_read_word_by_word():
    for key in (key for key in settings() if key.endswith("requirements")):
        for word in settings()[key].split():
            assert re.fullmatch(r"[\w-]+([<>=!~]=?[\w.]+(,[<>=!~]=?[\w.]+)*)?", word), f"{key}: {word}"


def normal(name: str) -> str:
    """The name of a distribution without the marks of its version, in the one spelling that counts."""
    return re.split(r"[\s<>=!~;\[(]", name)[0].replace("_", "-").replace(".", "-").lower()


def brought_by(names: set[str]) -> set[str]:
    """The distributions `names` and all that they need without an extra."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):  # needed on another platform
            needs = metadata.requires(name) or []
            waiting |= {normal(need) for need in needs if "extra ==" not in need} - found
    return found


def test_what_is_imported_is_required():
    """A package that only the developer has breaks the first run of everybody else."""
    home = {module: {normal(name) for name in names} for module, names in metadata.packages_distributions().items()}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "maskalign_lab").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)(?:[\w.]* import| as |[\w.]*$)", code, re.MULTILINE))
    foreign = imported - sys.stdlib_module_names - {"maskalign_lab"}
    assert {"torch", "timm", "numpy"} <= foreign
    there = brought_by({normal(word) for word in settings()["requirements"].split()})
    extras = (settings()[key] for key in settings() if key.endswith("_requirements") and key != "dev_requirements")
    asked = brought_by({normal(word) for words in extras for word in words.split()})  # for, where it is needed
    at_once = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    alone = {module for module in foreign if not home.get(module, set()) & there}
    assert sorted(module for module in alone if module in at_once or not home.get(module, set()) & asked) == []


def test_export_and_clean_change_nothing(tree):
    before = contents(tree, "maskalign_lab", "nbs")
    for path in (tree / "maskalign_lab").rglob("*.py"):
        if path.name not in ("__init__.py", "_modidx.py"):
            path.unlink()  # so that a module without a notebook is missing afterwards
    tool("nbdev-export", cwd=tree)
    tool("nbdev-clean", cwd=tree)
    after = contents(tree, "maskalign_lab", "nbs")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, "run `python3 lab.py export`"


def test_clean_keeps_the_tag_of_papermill(tree):
    path = tree / "nbs" / "tagged.ipynb"
    cell = {"cell_type": "code", "execution_count": 3, "id": "a", "outputs": [], "source": ["n = 1"]}
    cell["metadata"] = {"tags": ["parameters"], "scrolled": True}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    tool("nbdev-clean", "--fname", str(path), cwd=tree)
    (cleaned,) = notebook(path)["cells"]
    assert cleaned["execution_count"] is None, "it was not cleaned at all"
    assert cleaned["metadata"] == {"tags": ["parameters"]}


# ---- the notebooks


def size_of(kind: str, value) -> int:
    """Bytes of one form of an output: of the picture itself, not of its base64 text."""
    text = "".join(value) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)
    return len(base64.b64decode(text)) if kind in ("image/png", "image/jpeg") else len(text.encode())


def heavy_outputs(cells: list[dict]) -> list[str]:
    """Outputs of more than 100 KB, and views of live widgets, which are dead in a file."""
    found = []
    for number, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {"text": output.get("text", "")}).items():
                size = size_of(kind, value)
                if size > 100 * KB or "widget-view" in kind:
                    found.append(f"cell {number}: {kind} of {size / KB:.0f} KB")
    return found


def test_heavy_outputs_are_found():
    def shown(**data):
        return [{"outputs": [{"data": data}]}]

    png = base64.b64encode(bytes(101 * KB)).decode()
    assert heavy_outputs(shown(**{"image/png": png})) and heavy_outputs(shown(**{"text/html": ["x" * 101 * KB]}))
    assert heavy_outputs(shown(**{"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}))
    assert heavy_outputs([{"outputs": [{"text": ["x" * 101 * KB]}]}])
    assert not heavy_outputs(shown(**{"image/png": png[: 99 * KB // 3 * 4], "text/plain": "<Figure>"}))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_light(path):
    book = notebook(path)
    assert path.stat().st_size <= 1000 * KB
    assert "widgets" not in book["metadata"]
    assert not heavy_outputs(book["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_literate(path):
    """Bounds, not aims. A study: median cell of at most 6 lines, 90 % of at most 20, 30 to 90 words of prose a code cell.

    The library holds whole functions with a comment for each parameter, so there it is 16, 30, and at least 15 words.
    """
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(path)["cells"]]
    lines = sorted(source.count("\n") + 1 for kind, source in cells if kind == "code" and source.strip())
    words = sum(len(source.split()) for kind, source in cells if kind == "markdown") / len(lines)
    library = ROOT / "nbs" / "lib" in path.parents
    assert statistics.median(lines) <= (16 if library else 6)
    assert lines[int(0.9 * (len(lines) - 1))] <= (30 if library else 20)
    assert words >= 15 if library else 30 <= words <= 90


def test_ruff_finds_nothing():
    tool("ruff", "check", "--quiet", "--output-format", "concise", ".", cwd=ROOT)


# ---- installed


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel made from it, offline, of a clone in which somebody has worked."""
    folder = tmp_path_factory.mktemp("built")
    tree = copied(folder / "clone")
    for junk in ("nbs/.ipynb_checkpoints/01-checkpoint.ipynb", "nbs/lib/__pycache__/x.pyc"):
        (tree / junk).parent.mkdir()
        (tree / junk).touch()
    (tree / "data" / "probe").mkdir()
    (tree / "data" / "probe" / "weights.safetensors").write_bytes(b"weights")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_sdist_is_whole(built):
    with tarfile.open(next((built / "dist").glob("*.tar.gz"))) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isfile()}
    wanted = contents(ROOT, "data", "nbs", "maskalign_lab").keys() | {"settings.ini", "lab.py", "LICENSE", "README.md"}
    wanted = {name for name in wanted if "__pycache__" not in name and ".ipynb_checkpoints" not in name}
    assert not wanted - names
    assert "data/probe/weights.safetensors" in names
    assert not [name for name in names if "checkpoint.ipynb" in name or name.endswith(".pyc")]


def test_wheel_carries_data_and_notebooks(built):
    with zipfile.ZipFile(next((built / "dist").glob("*.whl"))) as archive:
        names = set(archive.namelist())
        about = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        archive.extractall(built / "site")
    shipped = {f"maskalign_lab/_shipped/{name}" for name in contents(ROOT, "data", "nbs") if "/." not in name}
    assert not {name for name in shipped if "__pycache__" not in name} - names
    assert "maskalign_lab/_shipped/data/probe/weights.safetensors" in names
    assert not [name for name in names if "checkpoint.ipynb" in name or name.endswith(".pyc")]
    assert all(f"Requires-Dist: {word.split('>')[0]}" in about for word in settings()["requirements"].split())
    assert "License-Expression: Apache-2.0" in about and 'extra == "dev"' in about


def test_paths_in_a_wheel_and_in_a_clone(built, tmp_path):
    with zipfile.ZipFile(next((built / "dist").glob("*.whl"))) as archive:
        archive.extractall(built / "site")
    code = "from maskalign_lab.base import paths; print(paths.data(), paths.notebooks(), paths.output(), sep='|')"
    package = built / "site" / "maskalign_lab"
    wheel = [package / "_shipped" / "data", package / "_shipped" / "nbs", tmp_path / "runs"]
    assert python(code, cwd=tmp_path, path=built / "site").split("|") == [str(path) for path in wheel]
    clone = built / "clone"
    assert python(code, cwd=tmp_path, path=clone).split("|") == [str(clone / name) for name in ("data", "nbs", "runs")]


def test_import_is_light(tmp_path):
    code = "import sys, maskalign_lab, maskalign_lab.base.paths, maskalign_lab.base.errors; print(*sys.modules)"
    loaded = set(python(code, cwd=tmp_path, path=ROOT).split())
    assert "maskalign_lab.base.paths" in loaded
    assert not loaded & {"torch", "numpy", "timm", "diffusers", "sklearn", "matplotlib", "plotly", "IPython"}
