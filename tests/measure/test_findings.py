"""The table of a study's findings: what a row says, what luck decides of it, and how much fits."""

from functools import partial

import numpy as np
import pytest

from maskalign_lab.measure.findings import (
    Finding,
    check_words,
    findings_table,
    headline,
    of_arms,
    of_count,
    of_factor,
    of_number,
    of_pairs,
)
from maskalign_lab.measure.verdicts import paired
from maskalign_lab.measure.wording import NotTrained

VALUES = {"base": [0.5, 0.6, 0.7], "better": [0.4, 0.5, 0.61], "same": [0.51, 0.58, 0.7]}
ROWS = [
    {"arm": arm, "seed": seed, "budget": "steps", "velocity": value, "accuracy": 1 - value}
    for arm, of in VALUES.items()
    for seed, value in enumerate(of)
]
ONE = [row for row in ROWS if row["seed"] == 0]


def test_a_row_of_two_arms_says_effect_detectable_and_verdict():
    found = of_arms("Is it better?", ROWS, "better", "base", -1, figure="05_arms")
    assert found == Finding("Is it better?", "-.0967 +/- .0143", ".0188", "reproduced (3 seeds)", "05_arms", 1)
    assert of_arms("", ROWS, "better", "base", -1, "accuracy").verdict == "reproduced (3 seeds)"
    assert of_arms("", ROWS, "better", "base").verdict == "lower (3 seeds)"
    with pytest.raises(NotTrained):
        of_arms("", ROWS, "gone", "base")


def test_one_seed_detects_nothing_and_is_no_verdict():
    found = of_arms("", ONE, "better", "base", -1, digits=2)
    assert (found.effect, found.detectable, found.verdict, found.verdicts) == (
        "-.10",
        "nothing",
        "undecided (1 seed)",
        0,
    )
    ratio = of_factor("", paired([1.0], [0.0]), +1)
    assert (ratio.effect, ratio.detectable, ratio.verdicts) == ("2.72 times", "nothing", 0)


def test_shares_are_said_in_per_cent_and_factors_as_factors():
    found = of_pairs("", paired([0.02, 0.03, 0.04], [0.0, 0.0, 0.0]), unit="%", digits=1)
    assert (found.effect, found.detectable) == ("+3.0 +/- 2.5 %", "3.3 %")
    logs = paired(np.log([3.9, 4.0, 4.1]), np.zeros(3))
    found = of_factor("", logs, +1, digits=1)
    assert (found.effect, found.verdict) == ("4.0 times (3.8 to 4.3)", "reproduced (3 seeds)")
    assert float(found.detectable.split()[0]) == pytest.approx(np.exp(logs.detectable), abs=0.05)
    assert of_number("", 0.131, "even", 0.02, unit="%", digits=0).effect == "13 +/- 2 %"
    assert of_number("", 41.0, "even", unit="dB", digits=1).effect == "41.0 dB"


def test_a_table_holds_ten_rows_and_says_what_luck_decides_and_what_is_missing():
    pairs = [partial(of_arms, f"Is {arm} better?", ROWS, arm, "base", -1) for arm in ("better", "same", "gone")]
    counts = [
        lambda: of_count("Everywhere?", 5, 6, "sizes", "yes", by_seeds=True),
        lambda: of_number("How even?", 1, "-"),
    ]
    lines = findings_table(pairs + counts).data.splitlines()
    assert lines[0] == "| question | effect | detectable | verdict | figure |"
    assert lines[3] == "| Is same better? | -.0033 +/- .0379 | .0499 | undecided (3 seeds) | – |"
    assert lines[4] == "| Everywhere? | 5 of 6 sizes | – | yes | – |" and len(lines) == 8
    assert lines[-1] == (
        "Of 8 verdicts luck would decide about 0.4 if there were nothing to be seen. "
        "Findings about arms that have no rows here: 1."
    )
    assert "no rows here" not in findings_table(pairs[:2]).data
    assert "-p seeds 1" in findings_table(pairs[2:]).data


def test_an_eleventh_row_is_refused_before_anything_is_computed():
    asked = []
    with pytest.raises(ValueError, match="11 findings: a table holds at most 10"):
        findings_table([lambda: asked.append(1)] * 11)
    assert not asked


def test_a_verdict_in_one_line_tells_what_was_detectable_if_it_is_undecided():
    better, same = (of_arms(f"Is {arm} better?", ROWS, arm, "base", -1) for arm in ("better", "same"))
    assert headline(better) == "Is better better? -.0967 +/- .0143: *reproduced* (3 seeds)."
    assert headline(same) == "Is same better? -.0033 +/- .0379: *undecided* (3 seeds), detectable .0499."
    assert headline(of_count("Do they differ?", 4, 4, "networks", "above chance")) == (
        "Do they differ? 4 of 4 networks: *above chance*."
    )


def test_more_words_than_fit_are_refused():
    table = findings_table([lambda: of_number("How even is it?", 0.5, "even")]).data
    assert check_words("one two\n\n* three") == 3 and check_words(table) == 20
    with pytest.raises(ValueError, match="251 words, expected at most 250"):
        check_words("word " * 251)
