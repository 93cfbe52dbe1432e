"""What the tests of all studies share: one smoke run of each, and ways to look at a job and at a study's opening."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from IPython.display import display

from maskalign_lab.training.methods import METHODS
from maskalign_lab.workbench.jobs import Job, find_study, run_study


def run_job(number: str, parameters: dict[str, Any], folder) -> Job:
    """A study as a job, in a thread of its own: an open browser keeps an event loop in the main one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run_study, number, parameters, folder).result()


@pytest.fixture(scope="session")
def studies_cache(tmp_path_factory):
    """The cache that studies share, as on a user's machine: what one execution has trained, the next one finds."""
    return tmp_path_factory.mktemp("studies_cache")


@pytest.fixture(scope="session")
def smoke_job(tmp_path_factory, studies_cache):
    """number -> its only execution with preset smoke."""
    folder = tmp_path_factory.mktemp("smoke")

    @cache
    def job_of(number: str) -> Job:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASKALIGN_LAB_CACHE", str(studies_cache))
            return run_job(number, {"preset": "smoke"}, folder / number)

    return job_of


def smoke_fixture(number: str):
    """The smoke run of a study, for a file of tests that look at its results."""

    @pytest.fixture(scope="module")
    def smoke(smoke_job) -> Job:
        return smoke_job(number)

    return smoke


@pytest.fixture
def after_smoke(smoke_job, studies_cache, monkeypatch):
    """number -> makes sure that the study's smoke run is done; what it trained is in the cache."""
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(studies_cache))
    return smoke_job


def with_tables(job: Job, folder: Path, *tables: str) -> str:
    """A folder for the results of another execution that holds tables of a job: their arms are not measured again."""
    folder.mkdir()
    for table in tables:
        shutil.copy(job.path(".html").parent / table, folder)
    return str(folder)


def check_figure(job: Job, study: str, name: str) -> dict[str, Any]:
    """A figure is small, and its sidecar, which is returned, says how to make it again."""
    path = job.path(".html").parent / f"{name}.png"
    assert path.stat().st_size <= 100_000
    side = json.loads(path.with_suffix(".json").read_text())
    assert side["study"] == study and "-p preset smoke" in side["command"] and side["versions"]
    return side


def code_cells(number: str, parameters: dict[str, Any] | None = None) -> list:
    """The code cells of a study, with parameters put in as a job would."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    book = load_notebook_node(str(find_study(number)))
    book = parameterize_notebook(book, parameters) if parameters else book
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run_cells(number: str, parameters: dict[str, Any], until: str = "\0") -> None:
    """Execute a study, as far as a cell with given words, in this process: it has imported what each kernel must import anew."""
    space, before = {"__name__": "__main__", "In": [""], "display": display}, dict(METHODS)
    try:
        for cell in code_cells(number, parameters):
            space["In"].append(cell.source)
            exec(compile(cell.source, f"<cell {len(space['In']) - 1} of study {number}>", "exec"), space)
            if until in cell.source:
                return
    finally:  # methods that the cells define are no longer what a name means, as after a kernel
        METHODS.clear()
        METHODS.update(before)


def run_opening(number: str, parameters: dict[str, Any]) -> None:
    """Execute a study up to its scrubber."""
    run_cells(number, parameters, "show(scrubber")
