"""Curves over time: a trend is one only where the curve does not turn, and noise turns no more often than luck allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.measure.curves import bends, curve, curve_words, slopes

T = np.linspace(0.05, 0.95, 10)
NOISE = np.random.default_rng(3).normal(size=(5, 10))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2), st.lists(st.floats(0, 1), min_size=3, max_size=9, unique=True)
)
def test_the_bend_knows_nothing_of_a_line_and_the_slope_nothing_of_a_level(slope, level, more, times):
    times = np.sort(times)
    if np.diff(times).min() > 0.01:
        y = np.sin(5 * times)[None]
        assert bends(times, y + slope * times + level) == pytest.approx(bends(times, y), abs=1e-6)
        assert slopes(times, y + slope * times + level) == pytest.approx(slopes(times, y) + slope, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        (0.3 * T, "reproduced"),
        (-0.3 * T, "contradicted"),
        (np.sqrt(T), "reproduced"),  # bends all the way, and rises all the way
        ((T - 0.65) ** 2, "bends, minimum near t = .65"),
        (-((T - 0.35) ** 2), "bends, maximum near t = .35"),
        (0.4 * np.maximum(T - 0.75, 0) - 0.1 * T, "bends, minimum near t = .75"),  # late, where no third ends
        (0 * T, "undecided (5 seeds)"),
    ],
)
def test_a_curve_that_turns_has_no_trend_and_one_that_does_not_has_its_slopes(shape, word):
    found = curve(T, shape + 0.004 * NOISE)
    assert found.verdict(+1) == word
    assert found.turns is word.startswith("bends")


def test_a_level_that_a_seed_has_for_itself_does_not_count():
    shape, level = (T - 0.65) ** 2 + 0.004 * NOISE, 10 * np.arange(5.0)[:, None]
    alone, moved = curve(T, shape), curve(T, shape + level)
    assert moved.verdict(0) == alone.verdict(0)
    assert moved.slope.mean == pytest.approx(alone.slope.mean) and moved.legs[0].half == pytest.approx(
        alone.legs[0].half
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_noise_has_a_trend_by_luck_alone_and_hardly_ever_turns(seeds):
    draws = np.random.default_rng(seeds).normal(size=(1000, seeds, 10))
    words = [curve(T, draw).verdict(0) for draw in draws]
    assert np.mean([word in ("lower", "higher") for word in words]) == pytest.approx(0.05, abs=0.02)
    assert np.mean([word.startswith("bends") for word in words]) < 0.04


def test_a_rising_line_in_noise_is_not_taken_for_a_bend():
    draws = 0.3 * T + 0.1 * np.random.default_rng(0).normal(size=(500, 5, 10))
    assert np.mean([curve(T, draw).turns for draw in draws]) < 0.03


def test_one_seed_decides_nothing():
    found = curve(T, [(T - 0.65) ** 2])
    assert found.verdict(+1) == "undecided (1 seed)" and "nothing detectable" in curve_words(found, +1)


def test_words_tell_slope_and_bend_whatever_the_verdict():
    bent, line = curve_words(curve(T, (T - 0.65) ** 2 + 0.004 * NOISE), +1), curve_words(curve(T, T + 0.01 * NOISE), +1)
    assert (
        bent.startswith("slope -.")
        and "ends less middle +.118" in bent
        and bent.endswith("(*bends*, minimum near t = .65)")
    )
    assert line.endswith("(*reproduced*)") and "ends less middle" in line


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [[1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0]]])
def test_values_that_are_no_curves_are_refused(values):
    with pytest.raises(ValueError, match="expected \\(seeds, times\\)"):
        curve([0.1, 0.5, 0.9][: 2 if values == [[1.0, 2.0]] else 3], values)
