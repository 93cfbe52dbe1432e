"""Study 03 as its users run it: papermill end to end, what ships, and mistakes in seconds."""

import pytest
from studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab import paths
from maskalign_lab.batch import run_study
from maskalign_lab.experiments import load_rows
from maskalign_lab.recipes import make_recipe, train
from maskalign_lab.targets import ARMS, SCALES
from maskalign_lab.targets_film import load_film

smoke = smoke_fixture("03")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in ("03_filmstrip", "03_by_size", "03_width"):
        check_figure(smoke, "03_prediction_targets", name)


def test_the_tables_of_the_job_are_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "03_rows.json")
    assert {row["arm"] for row in rows} == {arm.name for arm in SCALES["smoke"].arms}
    assert load_film(smoke.path(".html").parent / "03_film.safetensors").predictions() == ["x", "eps", "v"]


def test_the_tables_that_ship_are_paired():
    """x, eps and v stand beside each other with the same seeds, or a factor would compare different trainings."""
    rows = load_rows(paths.data() / "results" / "03_targets_shapes.json")
    names = {arm.name for arm in ARMS}
    seeds: dict[str, set[int]] = {}
    for row in rows:
        assert row["arm"] in names
        seeds.setdefault(row["arm"].split(", ", 1)[1], set())
    for setting in seeds:
        of = [{row["seed"] for row in rows if row["arm"] == f"{kind}, {setting}"} for kind in ("x", "eps", "v")]
        assert of[0] == of[1] == of[2] and of[0]
    assert {row["arm"] for row in rows} == names


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("03_prediction_targets")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "objective.clmap=0.1"}, "Did you mean 'objective.clamp'"),
        ({"preset": "smoke", "overrides": "objective.clamp=0"}, "set objective.clamp"),
        ({"run": "reg-shapes"}, "needs a class token"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("03", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error


def test_a_run_of_jit_is_looked_at(tmp_path):
    more = "network.width=16 training.steps=2 data.n=64"
    path = train(make_recipe("jit", "smoke", overrides=more), tmp_path / "mine", "cpu", 0)
    job = run_study("03", {"preset": "smoke", "run": str(path)}, tmp_path / "job")
    assert job.status == "ok", job.error
