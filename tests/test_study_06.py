"""Study 06 as its users run it: papermill end to end, what ships, and mistakes in seconds."""

import numpy as np
import pytest
from studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab.batch import run_study
from maskalign_lab.experiments import Length, load_rows, results_file, run_identity, shipped_rows
from maskalign_lab.routing_arms import SCALES
from maskalign_lab.routing_film import load_film

smoke = smoke_fixture("06")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in ("filmstrip", "contents", "weights", "skill", "traces", "oracle", "arms", "per_t"):
        check_figure(smoke, "06_ahpa", f"06_{name}")


def test_the_tables_of_the_job_are_kept(smoke):
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "06_rows.json")} == {arm.name for arm in SCALES["smoke"].arms}
    assert {row["arm"] for row in load_rows(folder / "06_oracle_rows.json")} >= {
        arm.name for arm in SCALES["smoke"].tried
    }
    assert {row["arm"] for row in load_rows(folder / "06_router_rows.json")} == {
        arm.name for arm in SCALES["smoke"].traced
    }
    film = load_film(folder / "06_film.safetensors")
    np.testing.assert_allclose(film.weights.sum(-1), 1, rtol=1e-5)


def test_the_tables_that_ship_are_paired():
    """Every arm has the first seeds of the arm without alignment, or a difference would compare different trainings."""
    for name in ("06_ahpa", "06_oracle"):
        seeds: dict[str, list[int]] = {}
        for row in load_rows(results_file(name, "shapes")):
            if row["budget"] == "steps":
                seeds.setdefault(row["arm"], []).append(row["seed"])
        assert seeds["SiT"] and all(found == list(range(len(found))) for found in seeds.values())
        assert all(len(found) <= len(seeds["SiT"]) for found in seeds.values())


def test_the_tables_that_ship_are_what_todays_recipes_would_train():
    """`-p seeds 5` finds the rows by the identity of their runs: none is trained again."""
    rows, scale = shipped_rows("06_ahpa", "laptop", "shapes"), SCALES["laptop"]
    recipe_of, arms = scale.recipe_of("laptop", "shapes"), {arm.name: arm for arm in scale.arms}
    trainings: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        trainings.setdefault((row["arm"], row["seed"]), {})[row["budget"]] = row
    for (arm, seed), budgets in trainings.items():
        recipe = recipe_of(arms[arm], seed)
        length = Length(budgets["steps"]["step"], budgets["flops"]["step"])
        assert length.steps == recipe.training.steps
        assert {row["identity"] for row in budgets.values()} == {run_identity(recipe, length)}, (arm, seed)


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("06_ahpa")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "method.tua=0.1"}, "Did you mean 'method.tau'"),
        ({"preset": "smoke", "overrides": "data.autoencoder=tinny"}, "Did you mean 'tiny'"),
        ({"preset": "smoke", "overrides": "method.levels=down.0,middle"}, "middle"),
        ({"run": "repa-shapes"}, "expected ahpa"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("06", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error
