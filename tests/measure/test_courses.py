"""Arms in units of the baseline's spread, look by look, and the shape of a paper's table."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskalign_lab.measure.courses import (
    METRICS,
    PaperTable,
    at_looks,
    course,
    course_figure,
    in_spreads,
    shape_figure,
    spread,
)
from maskalign_lab.measure.verdicts import BETTER, paired

NUMBERS = st.floats(-10, 10).map(lambda x: round(x, 3))


LOOKS = ((10, "early"), (20, "early"), (30, "steps"), (25, "flops"))
PAPER = PaperTable("table 1", "SiT", {"SiT": 2.0, "arm": 1.0, "not trained": 7.0})


def row(arm, seed, step, budget="early", **found):
    return {"arm": arm, "seed": seed, "step": step, "budget": budget, "relative_flops": 1.0, **found}


def table(gain, metric="velocity", seeds=(5, 6, 7)):
    """SiT, whose seeds lie a spread of 1 apart, and an arm that is better by `gain` at every look."""
    sign = BETTER[metric]
    return [
        row(arm, seed, step, budget, **{metric: seed + sign * more})
        for arm, more in (("SiT", 0), ("arm", gain))
        for seed in seeds
        for step, budget in LOOKS
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_better_is_above_whatever_the_metric(metric):
    found = course(table(2.0, metric), metric, "arm")
    assert list(found) == [10, 20, 30]  # equal operations are no look on the way
    assert all(each.mean == pytest.approx(2.0) and each.half == pytest.approx(0) for each in found.values())


@given(values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6), factor=st.floats(0.1, 10), shift=NUMBERS)
def test_spreads_know_no_unit(values, factor, shift):
    """A metric that is scaled and shifted gives the same picture."""

    def told(change):
        arm, base = ([change(pair[side]) for pair in values] for side in (0, 1))
        return in_spreads(paired(arm, base), spread(dict(enumerate(base))), "velocity") if np.std(base) > 1e-3 else None

    one, other = told(lambda x: x), told(lambda x: factor * x + shift)
    if one and other:
        assert other.mean == pytest.approx(one.mean, rel=1e-6, abs=1e-6)
        assert other.half == pytest.approx(one.half, rel=1e-6, abs=1e-6)


def test_looks_that_only_one_of_two_has_are_left_out():
    rows = [each for each in table(1.0) if (each["arm"], each["step"]) != ("arm", 20)]
    assert list(course(rows, "velocity", "arm")) == [10, 30]
    assert list(at_looks(rows, "accuracy")) == [] and course(rows, "velocity", "nobody") == {}


def test_one_seed_tells_nothing_in_spreads():
    rows = table(1.0, seeds=(5,))
    assert math.isnan(spread({5: 1.0})) and course(rows, "velocity", "arm") == {}
    assert course_figure(rows, ["arm"]) is None and shape_figure(rows, [PAPER]) is None


def test_one_unit_holds_at_all_looks():
    """A difference that stays the same is a level line, though seeds come to lie further apart."""
    rows = [
        {"arm": arm, "seed": seed, "budget": budget, "step": step, "velocity": step * seed - gain}
        for budget, step in (("early", 1), ("steps", 3))
        for arm, gain in (("SiT", 0.0), ("arm", 6.0))
        for seed in (0, 1, 2)
    ]
    assert [each.mean for each in course(rows, "velocity", "arm").values()] == pytest.approx([2, 2])


def test_differences_from_any_arm_are_told_in_the_spread_of_sit():
    wide = [row("wide", seed, step, budget, velocity=3.0 * seed) for seed in (5, 6, 7) for step, budget in LOOKS]
    found = course(table(2.0) + wide, "velocity", "arm", "wide")[30]
    assert found.differences == pytest.approx([12, 14, 16])  # not divided by the spread of 3
    assert course(wide, "velocity", "wide", "wide") == {}  # nobody's spread


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(1, 9), min_size=2))
def test_a_shape_has_its_largest_difference_at_one_end(fid):
    base, *others = fid
    if any(fid[other] != fid[base] for other in others):
        told = PaperTable("table", base, fid)
        assert set(told.shape) == set(others) and max(map(abs, told.shape.values())) == pytest.approx(1)
        assert all((fid[base] - fid[other]) * told.shape[other] >= 0 for other in others)
        claims = {arm: claim for arm, other, claim in told.pairs if other == base}
        assert claims == {other: (fid[other] > fid[base]) - (fid[other] < fid[base]) for other in others}


def test_figures_have_a_panel_a_metric_and_no_number_of_the_paper():
    rows = [left | right for left, right in zip(table(1.0), table(1.0, "accuracy"), strict=True)]
    assert len(course_figure(rows, ["arm"]).axes) == 2
    apart = course_figure(rows, ["arm"], apart={"velocity": ["arm"]})
    assert [axis.get_title() for axis in apart.axes] == [METRICS["accuracy"]]
    nobody = PaperTable("table 2", "gone", {"gone": 1.0, "arm": 2.0})
    figure = shape_figure(rows, [PAPER, nobody])
    first, *others = figure.axes
    assert len(others) == 2 and list(first.get_xticks()) == []
    assert [text.get_text() for text in first.get_yticklabels()] == ["arm", "not trained"]
    assert all([text.get_text() for text in axis.texts] == ["not trained"] for axis in others)
