"""Study 06 as its users run it: papermill end to end, what ships, and mistakes in seconds."""

import json

import nbformat
import numpy as np
import pytest

from maskalign_lab import paths
from maskalign_lab.batch import run_study
from maskalign_lab.experiments import load_rows
from maskalign_lab.routing import SCALES
from maskalign_lab.routing_film import load_film


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One execution with preset smoke, shared by the tests that look at its results."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKALIGN_LAB_CACHE", str(folder / "cache"))
        return run_study("06", {"preset": "smoke"}, folder / "job")


def test_smoke_runs_end_to_end(smoke):
    assert smoke.status == "ok", smoke.error
    executed = nbformat.read(smoke.path(".ipynb"), as_version=4)
    assert "widgets" not in executed.metadata
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


def test_figures_are_small_and_traceable(smoke):
    folder = smoke.path(".html").parent
    for name in ("06_filmstrip", "06_weights", "06_oracle"):
        assert (folder / f"{name}.png").stat().st_size <= 100_000
        side = json.loads((folder / f"{name}.json").read_text())
        assert side["study"] == "06_ahpa" and "-p preset smoke" in side["command"]


def test_the_tables_of_the_job_are_kept(smoke):
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "06_rows.json")} == {arm.name for arm in SCALES["smoke"].arms}
    assert {row["arm"] for row in load_rows(folder / "06_oracle.json")} >= {arm.name for arm in SCALES["smoke"].tried}
    assert {row["arm"] for row in load_rows(folder / "06_router.json")} == {arm.name for arm in SCALES["smoke"].traced}
    film = load_film(folder / "06_film.safetensors")
    np.testing.assert_allclose(film.weights.sum(-1), 1, rtol=1e-5)


def test_the_tables_that_ship_are_paired():
    """Every arm has the seeds of the arm without alignment, or a difference would compare different trainings."""
    for name in ("06_ahpa_shapes", "06_oracle_shapes"):
        seeds: dict[str, set[int]] = {}
        for row in load_rows(paths.data() / "results" / f"{name}.json"):
            seeds.setdefault(row["arm"], set()).add(row["seed"])
        assert all(found == seeds["SiT"] for found in seeds.values())


def test_the_scrubber_comes_by_the_third_code_cell():
    book = nbformat.read(paths.notebooks() / "06_ahpa.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert any("show(scrubber" in cell.source for cell in code[:3])
    assert "parameters" in code[1].metadata.get("tags", [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "method.tua=0.1"}, "Did you mean 'method.tau'"),
        ({"preset": "smoke", "overrides": "data.autoencoder=tinny"}, "Did you mean 'tiny'"),
        ({"run": "repa-shapes"}, "expected ahpa"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("06", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error
