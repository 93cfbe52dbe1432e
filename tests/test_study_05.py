"""Study 05 as its users run it: papermill end to end, its table, and mistakes in seconds."""

import pytest
from studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab import paths
from maskalign_lab.batch import run_study
from maskalign_lab.experiments import load_rows, run_arms
from maskalign_lab.masking import ABLATIONS, CLAIMS, CONTROLS, HEADLINE, ON_REPA, TABLE
from maskalign_lab.methods import METHODS
from maskalign_lab.recipes import make_recipe, train
from maskalign_lab.verdicts import comparison

ARMS = (*HEADLINE, *ABLATIONS, *CONTROLS, *ON_REPA)


smoke = smoke_fixture("05")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in ("05_filmstrip", "05_arms"):
        side = check_figure(smoke, "05_maskalign", name)
        assert side["by_steps"]


def test_the_table_of_the_job_is_paired_and_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "05_rows.json")
    assert {(row["arm"], row["seed"], row["budget"]) for row in rows} == {
        (arm, seed, budget) for arm in ("REG", "MaskAlign") for seed in (0, 1) for budget in ("steps", "flops")
    }
    assert all(row["reaches dropped"] == 0 for row in rows if row["arm"] == "REG")


def test_the_table_that_ships_is_paired():
    """Every arm that ships has the baseline's seeds and both budgets: a gap would bias the paired differences."""
    rows = load_rows(paths.data() / "results" / "05_maskalign_shapes.json")
    seeds = {row["seed"] for row in rows if row["arm"] == "REG"}
    assert seeds == set(range(len(seeds))) and {row["arm"] for row in rows} <= {arm.name for arm in ARMS}
    found = [(row["arm"], row["seed"], row["budget"]) for row in rows]
    assert sorted(found) == sorted(
        (arm, seed, budget) for arm in {row["arm"] for row in rows} for seed in seeds for budget in ("steps", "flops")
    )
    assert (comparison(rows, "velocity", "REG", CLAIMS)["seeds"] == len(seeds)).all()


@pytest.mark.parametrize(("group", "baseline"), [((*HEADLINE, *ABLATIONS, *CONTROLS), "REG"), (ON_REPA, "REPA")])
def test_the_table_that_ships_is_what_todays_recipes_would_train(group, baseline):
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again."""
    rows = load_rows(paths.data() / "results" / "05_maskalign_shapes.json")
    rows = [row for row in rows if row["arm"] in {arm.name for arm in group}]
    arms = [arm for arm in group if arm.name in {row["arm"] for row in rows}]

    def recipe_of(arm, seed):
        return arm.recipe("laptop", "shapes", seed, TABLE["laptop"])

    def untrained(_):
        raise AssertionError("a row was not found")

    if not arms:
        pytest.skip(f"no arm beside {baseline} ships")
    assert run_arms(arms, sorted({row["seed"] for row in rows}), recipe_of, baseline, untrained, rows) == rows


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("05_maskalign")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "method.mask_ratio=0.5"}, "Did you mean"),
        ({"preset": "smoke", "overrides": "data.teacher=oracle"}, "class token"),
        ({"run": "maskaling-shapes"}, "Did you mean 'maskalign-shapes'"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("05", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error


def test_a_run_without_class_token_or_mixer_is_studied(tmp_path):
    path = train(make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64"), tmp_path / "mine", "cpu", 0)
    job = run_study("05", {"preset": "smoke", "run": str(path), "seeds": 1}, tmp_path / "job")
    assert job.status == "ok", job.error


def test_methods_of_the_study_are_installed():
    assert {"maskalign", "mask-loss", "mask-input"} <= METHODS.keys() and "same-mask" not in METHODS
