"""How findings are worded: numbers, intervals, verdicts, and what is left out."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskalign_lab.measure.verdicts import paired
from maskalign_lab.measure.wording import (
    NotTrained,
    by_luck,
    compared,
    count_verdicts,
    difference,
    findings,
    interval,
    mean_of,
    percent,
    plain,
    signed,
    signed_percent,
)


@given(st.floats(-1e3, 1e3), st.integers(1, 5))
def test_a_number_reads_as_what_it_is(value, digits):
    for text in (plain(value, digits), signed(value, digits)):
        assert float(text) == pytest.approx(value, abs=0.51 * 10**-digits)
        assert "0." not in text or abs(value) >= 1  # no zero before the point
    assert signed(value, digits)[0] == ("-" if value < 0 else "+")


def test_numbers_that_are_shown():
    assert [plain(0.5281), plain(3.94, 1), plain(1.0, 2)] == [".5281", "3.9", "1.00"]
    assert [percent(0.0172, 0.0041), percent(0.2109, digits=0), percent(0.5, float("inf"))] == [
        "1.7 +/- .4 %",
        "21 %",
        "50.0 %",
    ]
    assert [signed_percent(-0.0113), signed_percent(0.0, 0.02)] == ["-1.1 %", "+.0 +/- 2.0 %"]


def test_an_interval_needs_two_seeds():
    assert interval(paired([1.0, 1.2, 1.1], [0.9, 1.0, 1.0]), 2) == "+.13 +/- .14"
    assert interval(paired([0.4], [0.5]), 2) == "-.10 (1 seed)"


def rows_of(values: dict[str, list[float]], metric: str = "velocity", budget: str = "steps") -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "budget": budget, metric: value}
        for arm, of in values.items()
        for seed, value in enumerate(of)
    ]


ROWS = rows_of({"base": [0.5, 0.6, 0.7], "better": [0.4, 0.5, 0.61], "same": [0.51, 0.58, 0.7]})


@pytest.mark.parametrize(
    ("arm", "claim", "expected"),
    [
        ("better", -1, "-.0967 +/- .0143 (*reproduced*)"),
        ("better", +1, "-.0967 +/- .0143 (*contradicted*)"),
        ("better", 0, "-.0967 +/- .0143 (*lower*)"),
        ("same", -1, "-.0033 +/- .0379 (*undecided*, detectable .0499)"),
    ],
)
def test_a_difference_says_value_interval_and_verdict(arm, claim, expected):
    assert compared(ROWS, arm, "base", claim) == expected


def test_a_difference_is_paired_over_common_seeds_of_one_budget():
    more = [*ROWS, *rows_of({"base": [9.0], "better": [1.0]}, budget="flops"), *rows_of({"late": [0.0, 0.1]})]
    assert difference(more, "better", "base").seeds == 3 and difference(more, "late", "base").seeds == 2
    assert difference(more, "better", "base", budget="flops").mean == -8
    assert mean_of(more, "base") == pytest.approx(0.6)


def test_what_was_not_trained_cannot_be_said():
    for ask in (lambda: difference(ROWS, "absent", "base"), lambda: mean_of(ROWS, "base", "frechet")):
        with pytest.raises(NotTrained):
            ask()


def test_a_list_says_what_luck_decides_and_what_is_missing():
    parts = [lambda arm=arm: f"{arm}: {compared(ROWS, arm, 'base')}" for arm in ("better", "same", "absent")]
    lines = findings(parts).splitlines()
    assert [line[:8] for line in lines[:2]] == ["* better", "* same: "] and lines[2] == ""
    assert lines[3] == (
        "Of 2 verdicts luck would decide about 0.1 if there were nothing to be seen. "
        "Findings about arms that have no rows here: 1."
    )
    assert findings(parts[2:]).count("\n") == 0 and "-p seeds 1" in findings(parts[2:])
    assert "no rows here" not in findings(parts[:2])


def test_rounding_keeps_a_verdict_apart_from_its_number():
    """A difference that rounds to nothing still has its sign and its verdict."""
    tiny = rows_of({"base": list(np.arange(3.0)), "less": list(np.arange(3.0) - 1e-7)})
    assert compared(tiny, "less", "base", -1) == "-.0000 +/- .0000 (*reproduced*)"


def test_the_same_claim_is_about_a_rise_of_what_is_better_when_it_rises():
    rows = [row | {"accuracy": -row["velocity"]} for row in ROWS]
    assert compared(rows, "better", "base", -1, "accuracy") == "+.0967 +/- .0143 (*reproduced*)"
    assert compared(rows, "better", "base", +1, "accuracy") == "+.0967 +/- .0143 (*contradicted*)"


def test_one_seed_detects_nothing_and_is_no_verdict_that_luck_decides():
    one = [row for row in ROWS if row["seed"] == 0]
    assert compared(one, "better", "base", -1) == "-.1000 (1 seed) (*undecided*, nothing detectable)"
    both = findings([lambda rows=rows: compared(rows, "better", "base", -1) for rows in (one, ROWS)])
    assert "Of 1 verdict luck would decide about 0.05" in both
    assert findings([lambda: compared(one, "better", "base", -1)]).endswith("has paired seeds that could decide it.")


def test_verdicts_of_a_table_are_counted_in_all_its_columns():
    words = ["reproduced", "undecided (5 seeds)", "undecided (1 seed)", "not trained", np.nan, "lower"]
    assert count_verdicts(pd.DataFrame({"arm": words, "verdict": words})) == 3
    wide = pd.DataFrame({("loss", "verdict"): words, ("judge", "verdict"): words, ("judge", "mean"): words})
    assert count_verdicts(wide) == 6
    assert count_verdicts(pd.DataFrame({"loss: verdict": words, "verdict of": words})) == 3
    assert (
        count_verdicts(pd.DataFrame({"verdict": ["bends, minimum near t = .65", "met (5 seeds)", "not measured"]})) == 2
    )
    assert by_luck(40).startswith("Of 40 verdicts luck would decide about 2 if")
