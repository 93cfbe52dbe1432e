"""Study 05: what its smoke run leaves, the table that ships, and runs of other kinds."""

from functools import partial

import numpy as np
import pytest
from shared.studies import check_figure, run_job, smoke_fixture

from maskalign_lab.measure.verdicts import against
from maskalign_lab.runs.experiments import lengths, load_rows, results_file, run_arms, run_identity
from maskalign_lab.runs.presets import PRESETS, make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.studies.maskalign.measures import ABLATIONS, CLAIMS, CONTROLS, HEADLINE, ON_REPA, TABLE, measure_arm
from maskalign_lab.training.methods import METHODS

ARMS = (*HEADLINE, *ABLATIONS, *CONTROLS, *ON_REPA)
FINDINGS = {  # (metric, budget, arm, other) -> verdict and difference, as the study's findings tell them
    ("gap", "steps", "MaskAlign", "REG"): ("reproduced", -0.0010),
    ("gap", "steps", "REPA + MaskAlign", "REPA"): ("reproduced", -0.0022),
    ("peak full", "steps", "MaskAlign", "REG"): ("undecided", -0.04),
    ("peak masked", "steps", "MaskAlign", "REG"): ("undecided", -0.09),
    ("velocity", "steps", "mask, no mixer", "REG"): ("reproduced", 0.0027),
    ("velocity", "steps", "ratio 0.5", "REG"): ("contradicted", 0.0073),
    ("velocity", "steps", "ratio 0.75", "REG"): ("reproduced", 0.0217),
    ("velocity", "steps", "MaskAlign", "REG"): ("undecided", 0.0028),
    ("velocity", "steps", "MaskAlign", "mask, no mixer"): ("undecided", 0.0001),
    ("velocity", "steps", "MaskAlign", "mixer, no mask"): ("contradicted", 0.0022),
    ("velocity", "steps", "REPA + MaskAlign", "REPA"): ("contradicted", 0.0027),
    ("velocity", "steps", "HASTE", "REPA"): ("undecided", 0.0001),
    ("velocity", "steps", "iREPA", "REPA"): ("undecided", 0.0011),
    ("velocity", "steps", "two blocks behind", "REG"): ("lower", -0.0017),
    ("velocity", "steps", "two blocks behind", "mixer, no mask"): ("lower", -0.0024),
    ("velocity", "steps", "mask the loss", "MaskAlign"): ("lower", -0.0021),
    ("velocity", "steps", "mask the input", "REG"): ("higher", 0.0157),
    ("velocity", "flops", "mask, no mixer", "REG"): ("lower", -0.0098),
    ("velocity", "flops", "ratio 0.5", "REG"): ("lower", -0.0122),
    ("velocity", "flops", "ratio 0.75", "REG"): ("lower", -0.0181),
    ("velocity", "flops", "MaskAlign", "REG"): ("undecided", -0.0025),
    ("velocity", "flops", "REPA + MaskAlign", "REPA"): ("lower", -0.0030),
}


smoke = smoke_fixture("05")


def test_figures_tell_budgets_gaps_and_preference(smoke):
    for name in ("05_filmstrip", "05_arms", "05_preference", "05_influence"):
        side = check_figure(smoke, "05_maskalign", name)
        assert side["by_steps"] and side["gaps"] and side["preference"]


def test_the_table_of_the_job_is_paired_and_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "05_rows.json")
    assert {(row["arm"], row["seed"], row["budget"]) for row in rows} == {
        (arm, seed, budget) for arm in ("REG", "MaskAlign") for seed in (0, 1) for budget in ("steps", "flops")
    }
    assert all(row["reaches dropped"] == 0 for row in rows if row["arm"] == "REG")


@pytest.fixture(scope="module")
def shipped():
    return load_rows(results_file("05_maskalign", "shapes"))


def test_the_table_that_ships_is_paired(shipped):
    """Every arm has its first seeds, three or more, at both budgets, and so has its baseline: a gap would bias a difference."""
    assert {row["arm"] for row in shipped} <= {arm.name for arm in ARMS}
    seeds = {}
    for row in shipped:
        seeds.setdefault((row["arm"], row["budget"]), []).append(row["seed"])
    assert all(sorted(of) == list(range(len(of))) and len(of) >= 3 for of in seeds.values())
    assert all(seeds[arm, "steps"] == seeds[arm, "flops"] for arm, _ in seeds)
    assert all(len(seeds[arm.name, "steps"]) == 5 for arm in HEADLINE)


@pytest.mark.parametrize(("group", "baseline"), [((*HEADLINE, *ABLATIONS, *CONTROLS), "REG"), (ON_REPA, "REPA")])
def test_the_table_that_ships_is_what_todays_recipes_would_train(group, baseline, shipped):
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again."""
    plan = lengths({arm.name: arm.recipe(overrides=TABLE["laptop"]) for arm in group}, baseline)
    for arm in group:
        rows = [row for row in shipped if row["arm"] == arm.name]
        recipes = {row["seed"]: arm.recipe(seed=row["seed"], overrides=TABLE["laptop"]) for row in rows}
        assert {row["identity"] for row in rows} == {
            run_identity(recipe, plan[arm.name]) for recipe in recipes.values()
        }


def test_every_arm_trains_and_is_measured(own_folders):
    """At the smallest size, through the same machinery: methods, controls, and networks whose projector needs the grid."""

    def recipe_of(arm, seed):
        few = "data.n=32 training.batch_size=8 training.warmup=1 training.cooldown=0 training.steps=2"
        return arm.recipe("smoke", "shapes", seed, few)

    for group, baseline in (((*HEADLINE, *ABLATIONS, *CONTROLS), "REG"), (ON_REPA, "REPA")):
        rows = run_arms(group, (0,), recipe_of, baseline, partial(measure_arm, images=8), device="cpu")
        assert {row["arm"] for row in rows} == {arm.name for arm in group}
        assert all(np.isfinite(row["velocity"]) for row in rows)
        assert all(("gap" in row) is (row["arm"] != "iREPA") for row in rows)


@pytest.mark.parametrize("preset", PRESETS)
def test_arms_differ_by_the_same_at_every_preset(preset):
    recipes = {arm.name: arm.recipe(preset, overrides=TABLE[preset]) for arm in ARMS}
    base, haste = recipes["REG"], recipes["HASTE"]
    assert recipes["two blocks behind"].network.depth == base.network.depth + 2
    assert recipes["aligned two deeper"].method.depth == base.method.depth + 2 <= base.network.depth
    assert haste.method.stop == haste.training.steps // 2
    assert len({recipe.training for recipe in recipes.values()}) == 1


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_the_findings_say_is_what_the_table_says(finding, shipped):
    metric, budget, arm, other = finding
    verdict, difference = FINDINGS[finding]
    found = against(shipped, metric, arm, other, CLAIMS[arm] if budget == "steps" else 0, budget)
    assert found["verdict"].startswith(verdict)
    assert found["difference"] == pytest.approx(difference, abs=5.1e-3 if "peak" in metric else 5.1e-5)


def test_a_run_without_class_token_or_mixer_is_studied(tmp_path, after_smoke):
    after_smoke("05")
    path = train(make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64"), tmp_path / "mine", "cpu", 0)
    job = run_job("05", {"preset": "smoke", "run": str(path), "seeds": 1}, tmp_path / "job")
    assert job.status == "ok", job.error


def test_methods_of_the_study_are_installed():
    assert {"maskalign", "mask-loss", "mask-input"} <= METHODS.keys() and "same-mask" not in METHODS
