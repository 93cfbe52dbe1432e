"""Parameters: what a study may declare, and that no wrong value gets past, whoever runs the notebook."""

import json
import subprocess
import sys

import nbformat
import pytest
from shared.clone import ROOT

from maskalign_lab.workbench.study_parameters import Parameter, check_values, parse_cell, parse_value, study_parameters

CELL = """preset: str = "laptop"  # smoke | laptop
run: str = ""  # a "#" is no comment in here
seed: int = 0
weight: float = 0.5
out_dir: str = ""
quick: bool = False"""
STUDIES = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


def write(path, *sources, tags=("parameters",)):
    cells = [nbformat.v4.new_code_cell(source) for source in (CELL, *sources)]
    cells[0].metadata["tags"] = list(tags)
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


# ---- declarations


def test_names_types_defaults_and_comments():
    source = '# a comment alone\nrun: str = "a # b"  # a name\n\nsizes: int = 3\ntext: str = """two\nlines"""  # long'
    known = parse_cell(source)
    assert known["run"] == Parameter("run", str, "a # b", "a name")
    assert known["sizes"].comment == "" and known["text"] == Parameter("text", str, "two\nlines", "long")


@pytest.mark.parametrize("line", ["n = 3", "n: int", "n: list = []", "n: int = len('a')", "import os", "n: int = '3'"])
def test_what_cannot_be_declared(line):
    with pytest.raises(ValueError, match="n|import"):
        parse_cell(line)


def test_a_default_obeys_its_own_choices():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        parse_cell('preset: str = "smok"  # smoke | laptop')


@pytest.mark.parametrize("tags, count", [((), 0), (("parameter",), 0)])
def test_a_missing_tag_is_an_error(tmp_path, tags, count):
    with pytest.raises(ValueError, match=f"{count} cells have the tag 'parameters'.*defaults, which then win"):
        study_parameters(write(tmp_path / "study.ipynb", tags=tags))


# ---- values


@pytest.mark.parametrize(
    "given, message",
    [
        ({"preest": "smoke"}, "unknown parameter 'preest'. Did you mean 'preset'"),
        ({"preset": "smok"}, "unknown preset 'smok'. Did you mean 'smoke'"),
        ({"seed": 0.5}, "seed=0.5: expected int, got float"),
        ({"seed": True}, "expected int, got bool"),
        ({"run": 1}, "run=1: expected str, got int"),
        ({"weight": None}, "expected float, got NoneType"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_values(given, parse_cell(CELL))


def test_text_is_read_by_the_declared_type():
    known = parse_cell(CELL)
    typed = {"run": "01", "seed": "-3", "weight": "1", "quick": "true"}
    read = {name: parse_value(text, known[name].type, name) for name, text in typed.items()}
    assert read == {"run": "01", "seed": -3, "weight": 1.0, "quick": True} and type(read["weight"]) is float


# ---- inside a running notebook


def papermill(path, tmp_path, *arguments):
    """Plain papermill, as somebody would call it who does not know our command: its exit code and messages."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(path), str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


CHECK = (
    "from maskalign_lab.workbench.study_parameters import check_parameters\nvalues = check_parameters()\nprint(values)"
)


def test_plain_papermill_with_good_values(tmp_path):
    given = ["-p", "preset", "smoke", "-p", "weight", "1", "-p", "out_dir", str(tmp_path / "new" / "folder")]
    code, text = papermill(write(tmp_path / "study.ipynb", CHECK), tmp_path, *given)
    assert code == 0, text
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    assert output.text.startswith("{'preset': 'smoke'") and "'weight': 1.0" in output.text
    assert (tmp_path / "new" / "folder").is_dir()


def test_plain_papermill_with_an_unknown_name(tmp_path):
    code, text = papermill(write(tmp_path / "study.ipynb", CHECK), tmp_path, "-p", "preest", "smoke")
    assert code == 1 and "unknown parameter 'preest'. Did you mean 'preset'" in text


def test_plain_papermill_on_a_notebook_that_lost_its_tag(tmp_path):
    code, text = papermill(write(tmp_path / "study.ipynb", CHECK, tags=()), tmp_path, "-p", "preset", "smoke")
    assert code == 1 and "has lost its tag" in text


def test_under_nbdev_test(tmp_path):
    sources = CHECK, "assert values['preset'] == 'laptop'", "preset = 'smok'", "check_parameters()"
    path = write(tmp_path / "study.ipynb", *sources)
    code = f"from nbdev.test import test_nb; print(test_nb({str(path)!r}, basepath={str(ROOT)!r})[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "False" in done.stdout and "Did you mean 'smoke'" in done.stdout + done.stderr


# ---- the studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_declares_the_common_parameters_and_checks_them(path):
    known = study_parameters(path)
    wanted = {"preset": str, "run": str, "dataset": str, "device": str, "seed": int, "out_dir": str, "overrides": str}
    assert {name: known[name].type for name in wanted if name in known} == wanted
    assert known["preset"].choices == ("smoke", "laptop", "gpu", "paper") and known["preset"].default == "laptop"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    at = next(k for k, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ()))
    assert "check_parameters()" in "".join(cells[at + 1]["source"]), "it must follow right behind the parameters"


def test_plain_papermill_opens_a_study(tmp_path, monkeypatch):
    """A real one, up to its film: neither our engine nor a job is there."""
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    book = nbformat.read(ROOT / "nbs" / "09_full_scale.ipynb", 4)
    opening = next(place for place, cell in enumerate(book.cells) if "open_study(**" in cell.source)
    book.cells = book.cells[: opening + 1]
    nbformat.write(book, tmp_path / "study.ipynb")
    code, text = papermill(tmp_path / "study.ipynb", tmp_path, "-p", "preset", "smoke", "-p", "device", "cpu")
    assert code == 0, text
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert executed.cells[-1].outputs and any("injected-parameters" in cell.metadata.tags for cell in executed.cells)
