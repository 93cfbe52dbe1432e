"""The README's promises: its links exist, its commands parse, its studies are those that are there."""

import re
import shlex
import subprocess
import sys

import pytest
from shared.clone import ROOT

from maskalign_lab.cli import COMMANDS as KNOWN
from maskalign_lab.workbench.commands import parse

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists(), link


def test_there_are_commands():
    assert ["python3", "lab.py", "run"] in COMMANDS and ["python3", "lab.py", "test"] in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "maskalign-lab"], ids=" ".join)
def test_commands_of_the_package_parse(command):
    options, _ = KNOWN[command[1]]
    assert isinstance(parse(options, command[2:]), options)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "python3"], ids=" ".join)
def test_commands_of_lab_py_exist(command):
    text = subprocess.run([sys.executable, ROOT / "lab.py", "--help"], capture_output=True, text=True).stdout
    assert command[1] == "lab.py" and re.search(rf"\b{command[2]}\b", text)


def test_every_study_that_is_there_is_linked_and_no_other():
    linked = set(re.findall(r"nbs/(\d\d_\w+\.ipynb)", TEXT))
    assert linked == {path.name for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}
