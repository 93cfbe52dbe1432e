"""The rows of the search belong to its trials, and its table says what they hold."""

import pytest

from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.scale_search import TRIALS, search_file, search_rows, search_table

ROWS = load_rows(search_file())


def test_every_row_is_of_a_trial_and_every_trial_has_its_rows():
    named = {}
    for trial in TRIALS:
        for arm in trial.arms:
            for seed in range(trial.seeds):
                named[identity(arm.recipe("laptop", "shapes", seed))] = (arm.name, seed)
    assert {row["identity"]: (row["arm"], row["seed"]) for row in ROWS} == named
    assert {row["identity"] for row in ROWS if row["budget"] == "steps"} == set(named)


def test_rows_that_are_known_are_not_trained_again():
    place = lambda row: (row["identity"], row["step"])  # noqa: E731
    assert sorted(search_rows(known=ROWS, measure=None), key=place) == sorted(ROWS, key=place)


def test_the_table_tells_what_alignment_changes():
    table = search_table(ROWS)
    assert list(table["scale"].unique()) == [trial.name for trial in TRIALS]
    trial = next(trial for trial in TRIALS if trial.aligned)
    base, way = (arm.name for arm in trial.arms[:2])
    loss = {row["arm"]: row["velocity"] for row in ROWS if row["budget"] == "steps" and row["seed"] == 0}
    line = table[table["scale"] == trial.name].iloc[0]
    assert line["SiT's loss"] == pytest.approx(loss[base])
    assert line["velocity"].startswith("-" if loss[way] < loss[base] else "+")
