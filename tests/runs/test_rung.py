"""The studies' tables stand on one rung: one preset, one cost, the same looks, seeds that the search has not seen."""

import pytest

from maskalign_lab.runs import rung
from maskalign_lab.runs.experiments import Arm, lengths, run_identity
from maskalign_lab.runs.presets import PRESETS, make_recipe
from maskalign_lab.runs.scale_search import TRIALS
from maskalign_lab.studies.ahpa import arms as ahpa
from maskalign_lab.studies.maskalign import arms as maskalign
from maskalign_lab.studies.reg import arms as reg

TABLES = {
    "04": (reg.SCALES, reg.ARMS),
    "05": (maskalign.SCALES, maskalign.arms_of(" ".join(maskalign.GROUPS))),
    "06": (ahpa.SCALES, ahpa.SCALES["laptop"].arms),
}


def test_tables_begin_where_the_search_ended():
    assert max(trial.seeds for trial in TRIALS) <= min(rung.table_seeds(1)) and len(rung.table_seeds(3)) == 3


@pytest.mark.parametrize("asked", ["laptop", "gpu"])
def test_tables_are_trained_with_the_presets_of_studies(asked):
    trained = rung.table_preset(asked)
    assert trained in PRESETS and trained != asked
    for scales, arms in TABLES.values():
        recipe = scales[asked].recipe_of(asked, "shapes")(next(arm for arm in arms if arm.name == "REPA"), 5)
        assert recipe == make_recipe("repa", trained, seed=5)


def test_a_preset_without_another_one_for_its_tables_trains_them_itself():
    assert rung.table_preset("smoke") == "smoke" and rung.table_preset("paper") == "paper"


def test_studies_share_the_runs_of_the_arms_that_they_share():
    """SiT, REPA and REG are one training each: same recipe, same steps, same looks."""
    shared, found = ("SiT", "REPA", "REG", "REG, oracle"), {}
    for scales, arms in TABLES.values():
        recipe_of = scales["laptop"].recipe_of("laptop", "shapes")
        recipes = {arm.name: recipe_of(arm, rung.UNSEEN) for arm in arms if arm.name in shared}
        for name, length in lengths(recipes, rung.BASELINE, early=rung.EARLY).items():
            found.setdefault(name, set()).add((run_identity(recipes[name], length), length))
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(shared, 1)
    assert all(len(length.looks) == 4 for each in found.values() for _, length in each)


def test_known_rows_are_found_by_seed_and_nothing_is_trained(monkeypatch):
    arms = [Arm("SiT", "sit"), Arm("REPA", "repa")]
    recipe_of = TABLES["04"][0]["laptop"].recipe_of("laptop", "shapes")
    recipes = {arm.name: recipe_of(arm, 5) for arm in arms}
    plan = lengths(recipes, "SiT", early=rung.EARLY)
    known = [
        {"arm": arm.name, "seed": seed, "identity": run_identity(recipe_of(arm, seed), plan[arm.name])}
        for seed in (4, 5, 6)
        for arm in arms
    ]
    monkeypatch.setattr("maskalign_lab.runs.experiments.ensure_run", None)  # would fail if it were called
    rows = rung.rung_rows(arms, 2, recipe_of, measure=None, known=known)
    assert [(row["arm"], row["seed"]) for row in rows] == [("SiT", 5), ("REPA", 5), ("SiT", 6), ("REPA", 6)]


def test_only_shapes_are_judged():
    assert rung.samples_judged("shapes", 500) == 500 and rung.samples_judged("folder:somewhere", 500) == 0


def test_what_a_user_says_of_the_method_reaches_one_methods_arms_or_all():
    arms = Arm("REPA", "repa"), Arm("REG", "reg")
    for owner, weights in (("repa", (3, 2)), ("", (3, 3))):
        of = rung.recipes_of("laptop", "shapes", "training.steps=7", "method.weight=3 training.lr=1e-4", owner)
        recipes = [of(arm, 5) for arm in arms]
        assert tuple(recipe.method.weight for recipe in recipes) == weights
        assert {(recipe.training.steps, recipe.training.lr) for recipe in recipes} == {(7, 1e-4)}
