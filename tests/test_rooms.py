"""The rooms of the house: who may import whom, what a room says of itself, and where a module's notebook stands."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from shared.clone import ROOT

PACKAGE = ROOT / "maskalign_lab"

# Lowest first. A module imports from its own room and from floors below; rooms of one floor do not know each other.
# "study" is the room of the modules at the top level: what a numbered study builds and exports.
FLOORS = (
    {"base"},
    {"workbench", "diffusion"},
    {"data"},
    {"encoders"},
    {"training"},
    {"study"},
    {"measure"},
    {"runs"},
    {"studies"},
    {"evaluation_commands", "network_commands", "study_commands", "training_commands"},
    {"batch_commands"},
    {"cli"},
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
LONGEST = 300  # lines of a module


def name_of(path: Path) -> str:
    """`diffusion.sit` of maskalign_lab/diffusion/sit.py, `diffusion` of its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_modidx.py"}
INITS = {name: path for name, path in SOURCES.items() if path.name == "__init__.py"}
MODULES = {name: path for name, path in SOURCES.items() if name not in INITS}


def room(module: str) -> str:
    """The room of a module."""
    first = module.split(".")[0]
    return first if first in HEIGHT else "study"


def folder(module: str) -> str:
    """Where a module lies: its room, or the folder of one study within `studies`."""
    return module.rpartition(".")[0] or module


def imported(code: str, package: str, known=SOURCES) -> Iterator[str]:
    """Modules of this project that code in `package` imports: at the top, in a function, or for a type checker alone."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            start = ["maskalign_lab", *above[: len(above) - node.level + 1]] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            full = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in full:
            project, _, module = name.partition(".")
            if project == "maskalign_lab":
                while module and module not in known:  # what is named last may be a function
                    module = module.rpartition(".")[0]
                yield module


def arrows() -> list[tuple[str, str]]:
    """(module, imported module), for all of the package."""
    found = []
    for module, path in MODULES.items():
        targets = set(imported(path.read_text(encoding="utf-8"), module.rpartition(".")[0])) - {"", module}
        found += [(module, target) for target in sorted(targets)]
    return found


def allowed(module: str, target: str) -> bool:
    """Whether a module may import another."""
    here, there = room(module), room(target)
    return here == there or HEIGHT[there] < HEIGHT[here]


# ---- the reader of imports


@pytest.mark.parametrize(
    "code",
    [
        "from maskalign_lab.runs.run import load_run",
        "import maskalign_lab.runs.run",
        "from maskalign_lab.runs import run",
        "from ..runs.run import load_run",
        "from ..runs import run as r",
        "def f():\n    from ..runs.run import load_run",
        "if TYPE_CHECKING:\n    from ..runs.run import Run",
        "try:\n    import maskalign_lab.runs.run as r\nexcept ImportError:\n    pass",
        "class C:\n    def f(self):\n        from ..runs.run import (\n            Run,\n            load_run,\n        )",
    ],
)
def test_every_way_to_import_is_seen(code):
    assert set(imported(code, "diffusion")) == {"runs.run"}


def test_imports_of_others_are_not_ours():
    assert not list(imported("import os\nfrom torch import nn\nfrom maskalign import x", "diffusion"))
    assert list(imported("from . import layers", "diffusion")) == ["diffusion.layers"]
    assert list(imported("from .files import write_atomic", "base")) == ["base.files"]
    assert list(imported("from . import reg", "")) == ["reg"]


@pytest.mark.parametrize(
    ("module", "target", "may"),
    [
        ("runs.run", "base.paths", True),
        ("base.paths", "runs.run", False),
        ("workbench.jobs", "diffusion.sit", False),
        ("diffusion.sit", "workbench.plots", False),
        ("maskalign", "reg", True),
        ("maskalign", "measure.metrics", False),
        ("maskalign", "runs.run", False),
        ("maskalign", "studies.maskalign.measures", False),
        ("studies.ahpa.arms", "ahpa", True),
        ("network_commands", "cli", False),
    ],
)
def test_who_may_import_whom(module, target, may):
    assert allowed(module, target) is may


# ---- the arrows


def test_no_import_runs_upwards():
    found = arrows()
    assert len(found) > len(MODULES)
    assert [f"{module} imports {target}" for module, target in found if not allowed(module, target)] == []


@pytest.mark.parametrize("level", [folder, str], ids=["folders", "modules"])
def test_there_is_no_circle(level):
    graph = {}
    for module, target in arrows():
        if level(module) != level(target):
            graph.setdefault(level(module), set()).add(level(target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_every_floor_is_there():
    assert {room(module) for module in MODULES} == HEIGHT.keys()


# ---- what a room says


@pytest.mark.parametrize("name", [name for name in INITS if name])
def test_a_room_says_what_lives_in_it_and_imports_nothing(name):
    (said,) = ast.parse(INITS[name].read_text(encoding="utf-8")).body
    text = said.value.value
    assert isinstance(text, str) and text.endswith(".") and "\n" not in text and len(text.split()) >= 5


def test_every_folder_of_modules_is_a_room():
    folders = {path.parent for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts}
    assert {path.parent for path in INITS.values()} == folders


def test_the_package_holds_its_version_and_nothing_else():
    (statement,) = ast.parse(INITS[""].read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Assign) and [target.id for target in statement.targets] == ["__version__"]
    assert isinstance(statement.value, ast.Constant)


# ---- the notebooks


def texts(path: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def exports_of(path: Path) -> list[str]:
    """The modules that a notebook names as its own."""
    return [name for text in texts(path, "code") for name in re.findall(r"^#\| default_exp (\S+)", text, re.MULTILINE)]


LIBRARY = sorted((ROOT / "nbs" / "lib").rglob("*.ipynb"))
LIBRARY = [path for path in LIBRARY if ".ipynb_checkpoints" not in path.parts]
STUDIES = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT / "nbs" / "lib").as_posix())
def test_a_notebook_stands_where_its_module_does_and_has_its_name(path):
    module = ".".join(path.relative_to(ROOT / "nbs" / "lib").with_suffix("").parts)
    assert exports_of(path) == [module]
    assert texts(path, "markdown")[0].splitlines()[0] == f"# {path.stem}"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_exports_a_module_of_its_name_or_none(path):
    assert exports_of(path) in ([], [path.stem[3:]])


def test_every_module_has_a_notebook():
    homes = [module for path in (*LIBRARY, *STUDIES) for module in exports_of(path)]
    assert sorted(homes) == sorted(MODULES)


# ---- what a module imports and how long it is


def test_a_module_imports_only_what_it_uses():
    """Imports of a notebook's checks and figures stand in cells that are not exported."""
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    command = [ruff, "check", "--isolated", "--no-cache", "--select", "F401", "--output-format", "json", str(PACKAGE)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    idle = {name_of(Path(each["filename"])): each["message"] for each in found if "_modidx" not in each["filename"]}
    assert idle == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{module} has {lines} lines, more than {LONGEST}: split it along a natural line"


# ---- what notebooks import


def defined_in(path: Path) -> set[str]:
    """Every name that a module binds, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", [*LIBRARY, *STUDIES], ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path):
    """A study's late cells run for minutes before they fail; this takes none."""
    for text in texts(path, "code"):
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.MULTILINE))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskalign_lab."):
                module = node.module.removeprefix("maskalign_lab.")
                names = {alias.name for alias in node.names}
                missing = {name for name in names if f"{module}.{name}" not in MODULES}
                assert module in SOURCES and missing <= defined_in(SOURCES[module]), f"{node.module}: {missing}"
