"""The rows of the search belong to its trials, and its table says what they hold."""

from dataclasses import replace

import pytest

from maskalign_lab.runs.experiments import load_rows, results_file
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.scale_search import TRIALS, answer, differences, search_file, search_rows, search_table
from maskalign_lab.studies import shipped_runs

ROWS = load_rows(search_file())
JUDGED = (("frechet", -1), ("accuracy", +1))


def test_every_row_is_of_a_trial_and_every_trial_has_its_rows():
    named = {}
    for trial in TRIALS:
        for arm in trial.arms:
            for seed in range(trial.seeds):
                named[identity(arm.recipe("laptop", "shapes", seed))] = (arm.name, seed)
    found = {row["identity"]: (row["arm"], row["seed"]) for row in ROWS if row["budget"] == "steps"}
    assert found == {name: named[name] for name in found} and {row["identity"] for row in ROWS} == set(found)
    assert {arm for arm, _ in found.values()} == {arm for arm, _ in named.values()}


def test_rows_that_are_known_are_not_trained_again():
    trial = replace(TRIALS[0], seeds=1)
    assert search_rows([trial], ROWS, measure=None) == [row for row in ROWS if row["arm"] == trial.arms[0].name]


def test_one_command_makes_the_rows_that_are_missing(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(shipped_runs, "search_rows", lambda **how: asked.append(how))
    assert shipped_runs.make("scale-search", out=tmp_path / "rows.json", device="cpu") == tmp_path / "rows.json"
    assert asked == [{"keep": tmp_path / "rows.json", "device": "cpu"}]


def test_the_scale_of_preset_study_meets_the_criterion():
    """Its recipe is that of the trial whose seeds decide, for SiT and for the oracle."""
    table = search_table(ROWS)
    (name,) = table[table["criterion"] == "met"]["scale"].unique()
    sit, oracle = next(trial for trial in TRIALS if trial.name == name).arms[:2]
    assert identity(make_recipe("sit", "study", overrides="data.teacher=tiny")) == identity(sit.recipe())
    assert identity(make_recipe("repa", "study", overrides="data.teacher=oracle")) == identity(oracle.recipe())


def test_the_table_tells_what_alignment_changes():
    table = search_table(ROWS)
    assert list(table["scale"].unique()) == [trial.name for trial in TRIALS]
    trial = next(trial for trial in TRIALS if trial.aligned)
    base, way = (arm.name for arm in trial.arms[:2])
    loss = {row["arm"]: row["velocity"] for row in ROWS if row["budget"] == "steps" and row["seed"] == 0}
    line = table[table["scale"] == trial.name].iloc[0]
    assert line["SiT's loss"] == pytest.approx(loss[base])
    assert line["velocity"].startswith("-" if loss[way] < loss[base] else "+")


def test_seeds_that_the_choice_has_not_seen_answer_alike():
    rows = load_rows(results_file("04_reg", "shapes"))
    assert {row["seed"] for row in rows}.isdisjoint(row["seed"] for row in ROWS)
    oracle, tiny = (answer(rows, arm, "SiT") for arm in ("REPA, oracle", "REPA"))
    assert (oracle["criterion"], tiny["criterion"]) == ("met", "not met")
    assert all(differences(rows, "REPA", "SiT")[metric].verdict(sign) == "reproduced" for metric, sign in JUDGED)
    assert differences(rows, "REPA", "SiT")["velocity"].verdict(-1).startswith("undecided")
