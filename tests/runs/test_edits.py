"""What a notebook defines is trained under its own identity: every edit that changes what a class does is seen."""

import itertools
import json
import linecache
from pathlib import Path
from unittest.mock import patch

import pytest
from shared.clone import ROOT

from maskalign_lab.runs.edits import behaviour, edit_digest
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.training.methods import INSTALLED, METHODS, Method

CELL = """
SCALE, OTHER = 2.0, 7

def stretch(x):
    return x * SCALE

class Head:
    def __call__(self, x):
        return stretch(x)

class Base:
    WEIGHT = 0.5

    def before(self, x):
        return x

class Loss(Base):
    make = Head

    @property
    def half(self):
        return self.WEIGHT / 2

    def loss(self, x):
        head = Head()
        return (lambda y: head(y))(self.before(x))

    def again(self, x):
        return Loss().loss(x)
"""
EDITS = {
    "a constant that a function reads": ("SCALE, OTHER = 2.0", "SCALE, OTHER = 3.0"),
    "a function that a class calls": ("x * SCALE", "x + SCALE"),
    "a class that is built inside": ("return stretch(x)", "return -stretch(x)"),
    "what is inherited": ("        return x\n\nclass Loss", "        return -x\n\nclass Loss"),
    "a value that is inherited": ("WEIGHT = 0.5", "WEIGHT = 0.25"),
    "a property": ("self.WEIGHT / 2", "self.WEIGHT / 3"),
    "its own code": ("(self.before(x))", "(x)"),
}
SAME = {
    "a comment": ("head = Head()", "head = Head()  # the head"),
    "a constant that nothing reads": ("2.0, 7", "2.0, 8"),
    "a constant with the name of an attribute": ("def stretch", "before = 3\n\ndef stretch"),
}
numbers = itertools.count()


def execute(source: str, space: dict) -> None:
    """Execute a cell so that its source can be asked for, as in a kernel."""
    name = f"<cell {next(numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), space)


def defined(source: str) -> type:
    """The class Loss of a cell."""
    execute(source, space := {"__name__": "a_notebook"})
    return space["Loss"]


def edited(old: str, new: str) -> type:
    assert CELL.count(old) == 1
    return defined(CELL.replace(old, new))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen(edit):
    assert behaviour(edited(*EDITS[edit])) != behaviour(defined(CELL))


@pytest.mark.parametrize("change", SAME)
def test_what_changes_nothing_is_no_edit(change):
    assert behaviour(edited(*SAME[change])) == behaviour(defined(CELL))


# ---- the notebooks of the methods


def notebook_of(method: type) -> Path:
    path = ROOT / "nbs" / "lib" / Path(*method.__module__.split(".")[1:]).with_suffix(".ipynb")
    return path if path.exists() else next((ROOT / "nbs").glob(f"0?_{path.name}"))


OURS = {  # but SiT, whose notebook makes the table of methods itself
    name: method
    for name, method in INSTALLED.items()
    if method.__module__.startswith("maskalign_lab") and method.__module__ != Method.__module__
}


def exported(path: Path) -> list[str]:
    """The cells that make a library module."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if cell.startswith("#| export")]


def digest_in_notebook(name: str, old: str = "", new: str = "") -> str:
    """What enters the identity of a method when its own notebook defines it, perhaps edited."""
    cells, space = exported(notebook_of(OURS[name])), {"__name__": "__main__"}
    assert not old or sum(cell.count(old) for cell in cells) == 1
    with patch.dict(METHODS), patch.dict(INSTALLED):
        for cell in cells:
            execute(cell.replace(old, new) if old else cell, space)
        assert METHODS[name] is not OURS[name]
        return edit_digest(make_recipe(name).method)


@pytest.mark.parametrize("name", OURS)
def test_an_untouched_notebook_is_no_edit(name):
    assert digest_in_notebook(name) == ""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("irepa", "padding=kernel // 2)", "padding=kernel // 2, bias=False)"),
        ("ahpa", "nn.init.zeros_(self.mlp[-1].weight)", "nn.init.ones_(self.mlp[-1].weight)"),
    ],
)
def test_an_edited_helper_is_an_edit(name, old, new):
    assert digest_in_notebook(name, old, new)
