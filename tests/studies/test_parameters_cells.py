"""Papermill reads the parameters of every study as we do: without a warning, and with the help that stands behind each."""

import logging

import nbformat
import papermill.translators
import pytest
from shared.clone import ROOT

from maskalign_lab.workbench.study_parameters import study_parameters

STUDIES = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_papermill_understands_every_line(path, caplog):
    """A second `=` on a line, in its comment for instance, makes papermill warn at every run and leave the line out of its help."""
    (cell,) = (c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", ()))
    with caplog.at_level(logging.WARNING, "papermill"):
        found = papermill.translators.PythonTranslator.inspect(cell)
    assert not caplog.records
    known = study_parameters(path)
    assert [each.name for each in found] == list(known) and all(each.help for each in found if each.name != "seed")
