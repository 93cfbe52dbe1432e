"""Two cells of the grid side by side, and the notes of study 02: what is said is what the numbers say, for any run."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.known_maps import known_rows

from maskalign_lab.measure.representation import OverDepth
from maskalign_lab.position_preference import PARTS
from maskalign_lab.studies.gradient_norms.unevenness import TIMES
from maskalign_lab.studies.position_preference import notes, pair_film
from maskalign_lab.studies.position_preference.grid import cases_in, peak_of, pick
from maskalign_lab.studies.position_preference.surveys import PartSurvey
from maskalign_lab.workbench import scrubber as live
from maskalign_lab.workbench.plots import png

# ---- two cells side by side


@pytest.fixture(scope="module")
def rows():
    return known_rows(2)


def test_every_cell_of_the_grid_can_be_chosen_on_either_side(rows):
    shown = pair_film.pair_scrubber(rows)
    assert [control.name for control in shown.controls] == ["time", "left", "right"]
    left, right = (list(control.values) for control in shown.controls[1:])
    assert left == right == list(pair_film.cells_of(rows)) and len(left) == len({case[:3] for case in cases_in(rows)})
    assert "REPA, fitted projector / permuted" in left and "SiT / oracle / torus" in left
    opening = shown.defaults()
    assert (opening["left"], opening["right"]) == ("REPA / as taught", "REPA / permuted")
    for state in (opening, opening | {"left": "SiT / random", "right": "SiT / random", "time": 0, "token": (3, 3)}):
        assert len(shown.view(**state).panels) == 6


def test_what_is_shown_is_the_mean_over_seeds(rows):
    cells = pair_film.cells_of(rows)
    one, two = pick(cases_in(rows), "SiT", "oracle").values()
    panels = pair_film.view(cells, 1, "SiT / oracle", "REPA / oracle")
    marked, logs, angle = (panel.values.flatten() for panel in panels.panels[:3])
    np.testing.assert_allclose(marked, (one.marks[:, 1].mean(0) + two.marks[:, 1].mean(0)) / 2, rtol=1e-5)
    np.testing.assert_allclose(logs, (one.logs[:, 1].mean(0) + two.logs[:, 1].mean(0)) / 2, atol=1e-6)
    np.testing.assert_allclose(angle, (one.angles[1] + two.angles[1]) / 2, atol=1e-6)
    (line, _) = panels.curve.ys.values()
    np.testing.assert_allclose(line[2], (peak_of(one, 2) + peak_of(two, 2)) / 2, rtol=1e-6)


def test_a_token_s_course_is_its_place_in_the_map(rows):
    cells = pair_film.cells_of(rows)
    names = "SiT / oracle", "REPA / permuted"
    curve = pair_film.view(cells, 0, *names, token=(1, 2)).curve
    maps = [pair_film.view(cells, time, *names).panels for time in range(len(TIMES))]
    for line, at in zip(curve.ys.values(), (0, 3), strict=True):
        expected = [each[at].values[1, 2] / each[at].values.mean() for each in maps]
        np.testing.assert_allclose(line, expected, rtol=1e-5)


def test_it_is_shown_live_and_on_paper(rows):
    shown = pair_film.pair_scrubber(rows)
    assert png(shown.strip()) and live.live(shown).children
    assert pair_film.pair_scrubber([{"arm": "SiT", "seed": 5}]) is None
    (alone,) = [row for row in rows if row["arm"] == "MaskAlign, oracle" and row["seed"] == 0]
    alone = alone | {"cases": alone["cases"][:1]}
    assert png(pair_film.pair_scrubber([alone]).strip())  # the only cell stands on both sides


# ---- notes


def survey(part: int, turn: bool, size: float = 1.0) -> PartSurvey:
    """Eleven times at which one part makes a map; turned over half way or not."""
    slope, means = np.linspace(-1, 1, 16), np.zeros((2, 11, 3, 16))
    for time in range(11):
        means[:, time, part] = size * slope * (-1 if turn and time > 5 else 1)
    return PartSurvey(np.linspace(0, 1, 11), means, np.zeros((2, 11, 16)), np.zeros((11, 4)), 64)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("turn", [False, True])
def test_a_map_is_carried_by_the_part_that_makes_it_and_is_one_or_two(part, turn):
    note = notes.preference_note({"mine": survey(part, turn)})
    assert f"correlate by {'-' if turn else '+'}1.00 (+1.00 would be one map)" in note
    assert note.count(PARTS[part]) == 3 and "strongest" not in note
    both = notes.preference_note({"weak": survey(part, turn, 0.1), "strong": survey(part, turn)})
    assert "**strong** (11 of 11)" in both


def test_halves_without_a_shared_map_have_no_part_that_carries_it():
    opposite = survey(0, False)
    opposite.means[1] *= -1
    assert notes.preference_note({"mine": opposite}).count("nothing") == 3


@pytest.mark.parametrize(("r", "word"), [(-0.9, "the border is preferred"), (0.9, "the objects are preferred")])
def test_what_is_preferred_follows_the_correlation_with_objects(r, word):
    line = {"map and objects": r, "length on objects": 2.0, "angle and spread": 0.5}
    line |= {"angle's share": 0.2, "length's share": 0.9, "gain's share": -0.1}
    note = notes.flip_note("mine", pd.DataFrame([line, line], [0.0, 1.0]))
    assert note.count(word) == 2 and "**length** (90 %)" in note and note.startswith("In mine")
    assert "not known" in notes.flip_note("mine", pd.DataFrame())


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.floats(0.01, 0.5))
def test_an_interval_that_holds_0_tells_nothing(mean, half):
    inside = abs(mean) <= half
    assert ("not told from" in notes.missed(mean, half)) is inside
    assert ("know nothing" in notes.agrees(mean, half)) is inside
    if not inside:
        assert ("more" in notes.missed(mean, half)) is (mean > 0) is ("disagree" not in notes.agrees(mean, half))


def over(values, half=0.01):
    values = np.array([values, values, values], float)
    return OverDepth((0.2, 0.5, 0.8), (1, 2, 3), values, np.full_like(values, half), 0.1)


def test_the_best_block_is_told_from_the_aligned_one_by_intervals():
    seen = {"mine": {"CKNNA": over([0.1, 0.5, 0.3]), "probe": over([0.5, 0.6, 0.9])}}
    assert "behind block 2; aligned behind block 2. The probe reads more behind its best block, 3" in notes.depth_note(
        seen, {"mine": 2}
    )
    seen["mine"]["probe"] = over([0.5, 0.6, 0.9], 0.4)
    assert "not measurably more" in notes.depth_note(seen, {"mine": 2})
    assert "aligned at none" in notes.depth_note(seen, {})


def test_blocks_that_are_as_much_like_the_teacher_are_named():
    flat = {"CKNNA": over([0.4, 0.5, 0.49], 0.02), "probe": over([0.5, 0.6, 0.9])}
    assert "behind block 2 (not told from 3), and aligned at none" in notes.depth_note({"mine": flat}, {})


def test_the_times_of_the_paper_s_table_are_told_where_a_survey_has_them():
    assert "those of t = 0.1 and 0.9 by -1.00" in notes.preference_note({"mine": survey(0, True)})
    few = PartSurvey(np.linspace(0, 1, 3), survey(0, True).means[:, [0, 5, 10]], np.zeros(1), np.zeros(1), 64)
    assert "those of" not in notes.preference_note({"mine": few})


def test_a_study_without_aligned_runs_has_no_conflict_to_tell():
    assert "nothing to agree" in notes.conflict_note([])
    row = {
        "arm": "a",
        "part": "attention",
        "step": 1000,
        "times": [0.1, 0.9],
        "per t": [0.0, 0.5],
        "per t half": [0.1, 0.1],
    }
    assert notes.conflict_note([row]).startswith("* **a, attention** after step 1,000: at t = 0.1 they know nothing")


def test_rankings_that_were_not_asked_plainly_are_left_out():
    plainly = {"run": "a", "t": 0.5, "question": "alignment", "removal": "replace", "stand_in": "noise"}
    rows = [plainly | {"ranking": "norm", "less random": [-0.1, 0.02]}]
    rows += [plainly | {"t": 0.2, "ranking": "norm", "less random": [9.0, 0.0]}]
    assert notes.ranking_note(rows) == (
        "* **a**, the tokens that come first: by the norm they are missed less than tokens at random (-.100 +/- .020)."
    )
