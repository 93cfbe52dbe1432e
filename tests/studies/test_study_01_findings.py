"""The table of arms of study 01: its rows are of today's recipes, and every text about them says what they say."""

import json
import math
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from shared.displayed import section_prose
from shared.studies import smoke_fixture

from maskalign_lab.base import paths
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.wording import NotTrained, plain
from maskalign_lab.runs.experiments import lengths, load_rows, results_file, run_identity
from maskalign_lab.runs.rung import BASELINE, EARLY, UNSEEN, trainable
from maskalign_lab.studies.gradient_norms import figures, summary
from maskalign_lab.studies.gradient_norms.arms import ARMS, CLAIMS, ORACLE, SCALES, SHOWN_ALIKE
from maskalign_lab.studies.gradient_norms.findings import norm_table, quality_table
from maskalign_lab.studies.gradient_norms.opening import TABLE, table_rows
from maskalign_lab.studies.gradient_norms.unevenness import TIMES
from maskalign_lab.studies.maskalign.arms import ARMS as ARMS_OF_05

NOTEBOOK = paths.notebooks() / "01_gradient_norms.ipynb"
ROWS = load_rows(results_file(TABLE, "shapes"))
BOUNDS = {
    "held": (0.125, 1),
    "peak": (0, 8),
    "gini": (-1, 1),
    "same t": (-1, 1),
    "over t": (-1, 1),
    "both ends": (-1, 1),
}

smoke = smoke_fixture("01")


# ---- the rows that ship


def test_the_table_that_ships_is_what_todays_recipes_would_train():
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again."""
    recipe_of = SCALES["laptop"].recipe_of("laptop", "shapes")
    plan = lengths({arm.name: recipe_of(arm, UNSEEN) for arm in ARMS}, BASELINE, early=EARLY)
    arms = {arm.name: arm for arm in ARMS}
    for row in ROWS:
        assert row["identity"] == run_identity(recipe_of(arms[row["arm"]], row["seed"]), plan[row["arm"]])
        assert (row["budget"], row["step"]) in plan[row["arm"]].looks


def test_every_network_was_looked_at_three_times_or_more_and_no_seed_is_the_searchs():
    networks = {(row["arm"], row["seed"]) for row in ROWS}
    assert {arm for arm, _ in networks} <= {arm.name for arm in ARMS} and min(seed for _, seed in networks) >= UNSEEN
    for arm, seed in networks:
        looks = [row for row in ROWS if (row["arm"], row["seed"]) == (arm, seed)]
        assert [row["budget"] for row in looks] == ["early", "early", "steps", "flops"]
        assert len({row["step"] for row in looks}) >= 3


def test_rows_hold_quality_and_norms_within_their_bounds():
    for row in ROWS:
        assert row.keys() >= {"velocity", "frechet", "accuracy"}
        assert ("marks" in row) is (row["arm"] != BASELINE)
        if "marks" in row:
            assert np.shape(row["marks"]) == (len(TIMES), 16) and np.mean(row["marks"]) == pytest.approx(
                2 / 16, abs=1e-4
            )
            assert all(low <= row[name] <= high for name, (low, high) in BOUNDS.items())
            assert row["held"] == pytest.approx(np.mean(row["held per t"]), rel=1e-3)


def test_arms_that_study_05_has_too_are_trained_once():
    shared = {arm.name: arm for arm in ARMS_OF_05}
    assert {arm.name for arm in ARMS} - shared.keys() == {ORACLE.name}
    for arm in ARMS:
        assert arm is ORACLE or arm.recipe("study") == shared[arm.name].recipe("study")


def test_the_rows_that_ship_are_shown_with_preset_laptop_alone(capsys):
    asked = {"count": 0, "preset": "laptop", "dataset": "shapes", "overrides": ""}
    assert table_rows(SimpleNamespace(**asked)) == ROWS
    assert table_rows(SimpleNamespace(**asked | {"dataset": "digits"})) == []
    assert "-p seeds 1" in capsys.readouterr().out


def test_overrides_reach_every_arm_and_those_of_the_method_repa_alone():
    recipe_of = SCALES["laptop"].recipe_of("smoke", "shapes", "training.steps=3 method.depth=1")
    recipes = {arm.name: recipe_of(arm, 0) for arm in ARMS}
    assert {recipe.training.steps for recipe in recipes.values()} == {3}
    assert recipes["REPA"].method.depth == 1 and recipes["HASTE"].method.depth == 2
    assert ORACLE in trainable(ARMS, "shapes") and ORACLE not in trainable(ARMS, "digits")


# ---- what is said about them


def test_the_first_screen_says_its_verdict_in_one_line_as_the_rows_do():
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    assert f"**Verdict.** {headline(summary.preference(ROWS))}" in first.replace("\n", " ")
    objects = ROWS[-1]["objects"]
    assert f"would give more, {max(objects) / np.mean(objects):.2f} times" in first
    assert f"(correlation {summary.on_objects(ROWS, noise=False).effect})" in first
    maps = [np.array(row["marks"])[2] for row in figures.pulled(ROWS) if row["arm"] == "REPA"]
    ratios = [each.max() / each.min() for each in maps]
    assert f"which is {math.floor(min(ratios))} to {max(ratios):.0f} here at t = .5" in first


def test_what_an_aligned_step_costs_is_said_as_the_rows_have_it():
    cost = {row["arm"]: row["relative_flops"] for row in ROWS}
    told = [f"{arm} {100 * (cost[arm] - 1):.0f} %" for arm in ("REPA", "HASTE", "REG")]
    told.append(f"and MaskAlign {100 * (cost['MaskAlign'] - 1):.0f} %")
    assert ", ".join(told) in section_prose(NOTEBOOK, "Does alignment help here?").replace("\n", " ")


def test_what_the_trainings_took_is_said_as_the_rows_have_it():
    took = {row["identity"]: row["seconds"] for row in ROWS}
    text = section_prose(NOTEBOOK, "Over seeds").replace("\n", " ")
    assert f"{len(took)} trainings of 1,000 steps, {plain(sum(took.values()) / 3600, 1)} hours in all" in text
    assert max(row["step"] for row in ROWS if row["budget"] == "steps") == 1000


def test_the_findings_fit_on_one_screen():
    shown = findings_table(summary.all_findings(ROWS)).data
    assert check_words(f"{section_prose(NOTEBOOK, 'Findings')} {shown}") > 100
    assert shown.count("\n|") <= 11


def made_up(arm: str, **values: list[float]) -> list[dict]:
    """A row after equal steps for each seed."""
    shared = {"arm": arm, "budget": "steps", "step": 1000, "relative_flops": 1.0, "marks": [[0.125] * 16] * len(TIMES)}
    count = len(next(iter(values.values())))
    return [shared | {"seed": seed} | {name: each[seed] for name, each in values.items()} for seed in range(count)]


CORNER = [2.0, *[0.9] * 14, 0.4]
PULLED = made_up(
    "REPA",
    **{"held": [0.2, 0.21, 0.22], "peak": [2.0, 2.2, 2.1], "over t": [-0.2, 0.1, 0.1], "both ends": [-0.4, -0.5, -0.6]},
    **{"same t": [0.9, 0.9, 0.9], "objects": [CORNER] * 3},
    **{"object per t": [[-0.9, -0.7, -0.8, -0.8, low] for low in (0.9, 0.8, 0.7)]},
    **{"marks": [[CORNER, CORNER, CORNER, CORNER, [2.0 - each for each in CORNER]]] * 3},
    **{"velocity": [0.7, 0.71, 0.72], "accuracy": [0.3, 0.31, 0.32]},
)
PLAIN = [
    {key: value for key, value in row.items() if key != "marks"}
    for row in made_up("SiT", velocity=[0.71, 0.72, 0.73], accuracy=[0.2, 0.21, 0.23])
]


def test_findings_are_those_of_the_rows():
    words = [make() for make in summary.all_findings(PULLED)[:7]]
    assert [each.verdict.partition(" (")[0] for each in words] == (
        ["reproduced", "undecided", "less than half", "reproduced", "contradicted", "lower", "higher"]
    )
    assert words[0].effect.startswith("2.10 times (") and words[1].effect.startswith("0.98 times (")
    assert words[2].effect.startswith("21.0 +/- ") and words[2].verdicts == 0  # chance is no bound of it
    assert words[3].effect.startswith("+1.00") and words[4].effect.startswith("-1.00")


def test_help_is_a_lower_loss_and_a_higher_accuracy():
    rows = PULLED + PLAIN
    loss, accuracy = summary.helps(rows, "velocity"), summary.helps(rows, "accuracy")
    assert loss.effect.startswith("-.0100") and loss.verdict == "reproduced (3 seeds)"
    assert accuracy.effect.startswith("+.097") and accuracy.verdict == "reproduced (3 seeds)"
    with pytest.raises(NotTrained):
        summary.helps(rows, "frechet")


def test_arms_without_rows_are_counted_and_nothing_breaks():
    shown = findings_table(summary.all_findings(PULLED)).data
    assert shown.endswith("Findings about arms that have no rows here: 3.")
    assert "missing here" in findings_table(summary.all_findings([])).data
    assert figures.unevenness_figure(PLAIN) is None and figures.position_figure([]) is None
    assert figures.unevenness_figure(PULLED[:1]) and figures.position_figure(PULLED[:1])
    assert norm_table([]).empty and norm_table(PULLED).loc["REPA", "seeds"] == 3
    assert norm_table(PULLED[:1]).loc["REPA", "held"] == ".200"
    table = quality_table(PULLED + PLAIN)
    assert table[["metric", "arm"]].values.tolist() == [["velocity", "REPA"], ["accuracy", "REPA"]]
    assert quality_table([]).empty and quality_table(PULLED)["verdict"].eq("not trained").all()


def test_a_loss_is_compared_only_with_networks_that_are_shown_the_same():
    rows = PULLED + PLAIN + [row | {"arm": "REG"} for row in PULLED]
    table = quality_table(rows).set_index(["metric", "arm"])
    assert ("accuracy", "REG") in table.index and ("velocity", "REG") not in table.index
    assert {"REG", "MaskAlign"} == CLAIMS.keys() - set(SHOWN_ALIKE)


# ---- the smoke run


def test_a_smoke_run_trains_two_arms_with_two_seeds(smoke):
    rows = json.loads((smoke.path(".html").parent / "01_rows.json").read_text())["rows"]
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in ("SiT", "REPA") for seed in (5, 6)}
    assert all(("marks" in row) is (row["arm"] == "REPA") for row in rows)
