"""What the tests of all studies share: folders of their own, one smoke run a file, and what every study must keep to."""

import json
import re
from typing import Any

import nbformat
import pytest

from maskalign_lab.base import paths
from maskalign_lab.workbench.jobs import Job, run_study


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test sees the runs of another."""
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))


def smoke_fixture(number: str):
    """One execution with preset smoke, shared by the tests of a file that look at its results."""

    @pytest.fixture(scope="module")
    def smoke(tmp_path_factory) -> Job:
        folder = tmp_path_factory.mktemp("smoke")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASKALIGN_LAB_CACHE", str(folder / "cache"))
            return run_study(number, {"preset": "smoke"}, folder / "job")

    return smoke


def check_smoke(job: Job) -> None:
    """Every cell has run; the page has at most 1 MB for each slider and asks the network for nothing."""
    assert job.status == "ok", job.error
    executed = nbformat.read(job.path(".ipynb"), as_version=4)
    assert "widgets" not in executed.metadata
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    page = job.path(".html").read_text(encoding="utf-8")
    films = page.count('<div class="film">')
    assert len(page) < 1_000_000 * films and (job.path(".html").parent / "plotly.min.js").exists()
    assert not re.findall(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css|woff2?)""", page)


def check_figure(job: Job, study: str, name: str) -> dict[str, Any]:
    """A figure is small, and its sidecar, which is returned, says how to make it again."""
    path = job.path(".html").parent / f"{name}.png"
    assert path.stat().st_size <= 100_000
    side = json.loads(path.with_suffix(".json").read_text())
    assert side["study"] == study and "-p preset smoke" in side["command"] and side["versions"]
    return side


def check_first_cells(study: str) -> None:
    """The scrubber comes by the third code cell, after the tagged parameters."""
    book = nbformat.read(paths.notebooks() / f"{study}.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert any("show(scrubber" in cell.source for cell in code[:3])
    assert "parameters" in code[1].metadata.get("tags", [])
