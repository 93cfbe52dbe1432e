"""Verdicts: what is paired, when a difference counts, and what the picture of a table shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection

from maskalign_lab.measure.verdicts import against, arms_figure, beside_all, comparison, over_metrics, paired


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.floats(-3, 3), st.integers(0, 1000))
def test_a_pair_is_about_differences(n, shift, seed):
    """What all arms of a seed share cancels, and the verdict turns with the sign."""
    draw = np.random.default_rng(seed)
    ours, theirs, common = draw.normal(size=n), draw.normal(size=n), 10 * draw.normal(size=n)
    one, other = paired(ours + shift, theirs), paired(ours + shift + common, theirs + common)
    assert other.mean == pytest.approx(one.mean, abs=1e-9) and other.half == pytest.approx(one.half, abs=1e-9)
    opposite = {"reproduced": "contradicted", "contradicted": "reproduced"}
    assert one.verdict(+1) == opposite.get(one.verdict(-1), one.verdict(-1))
    assert paired(theirs, ours + shift).mean == pytest.approx(-one.mean)


def test_one_seed_decides_nothing():
    assert paired([1.0], [9.0]).verdict(-1) == "undecided (1 seed)"
    with pytest.raises(ValueError, match="2 and 1 values are no pairs"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_detectable_effect_is_decided_four_times_in_five(seeds):
    """Against a simulation: what is detectable with the true spread is added to draws with that spread."""
    level = np.concatenate([[-1, 1], np.zeros(seeds - 2)]) * ((seeds - 1) / 2) ** 0.5  # a spread of exactly 1
    effect = paired(level, np.zeros(seeds)).detectable
    draws = np.random.default_rng(seeds).normal(effect, 1, (4000, seeds))
    decided = np.mean([paired(row, np.zeros(seeds)).verdict(+1) == "reproduced" for row in draws])
    assert decided == pytest.approx(0.8, abs=0.025)


def test_the_detectable_effect_belongs_to_the_spread_and_not_to_the_mean():
    near, far = paired([1, 2, 3], [1, 1, 1]), paired([11, 12, 13], [1, 1, 1])
    assert near.detectable == pytest.approx(far.detectable) and near.detectable > near.half
    assert paired([10, 20, 30], [0, 0, 0]).detectable == pytest.approx(10 * near.detectable)
    assert paired([1.0], [0.0]).detectable == np.inf


def test_the_table_pairs_by_seed_and_budget():
    values = {
        ("base", 0): 1.0,
        ("base", 1): 2.0,
        ("base", 2): 3.0,
        ("better", 2): 2.0,
        ("better", 0): 0.0,
        ("better", 1): 1.01,
    }
    rows = [
        {"arm": arm, "seed": seed, "budget": budget, "relative_flops": 1.0, "loss": loss + 5 * (budget == "flops")}
        for (arm, seed), loss in values.items()
        for budget in ("steps", "flops")
    ]
    for budget in ("steps", "flops"):
        table = comparison(rows, "loss", "base", {"better": -1}, budget).set_index("arm")
        assert table.loc["better", "difference"] == pytest.approx(-0.9967, abs=1e-4)
        assert table.loc["better", "verdict"] == "reproduced" and table.loc["base", "seeds"] == 3
    assert comparison(rows, "loss", "base", {"better": +1}).set_index("arm").loc["better", "verdict"] == "contradicted"
    assert table.loc["better", "detectable"] > table.loc["better", "+/-"] and np.isnan(table.loc["base", "detectable"])
    with pytest.raises(ValueError, match="budget"):
        comparison(rows, "loss", "base", {}, "time")


ROWS = [
    {"arm": arm, "seed": seed, "budget": budget, "relative_flops": 1.0, "loss": loss + 0.01 * seed * (k + 1)}
    for k, (arm, loss) in enumerate({"base": 1.0, "better": 0.5, "same": 0.98}.items())
    for seed in range(3)
    for budget in ("steps", "flops")
]


def test_two_arms_are_compared_over_the_seeds_that_both_have():
    rows = [row for row in ROWS if (row["arm"], row["seed"]) != ("better", 1)]
    found = against(rows, "loss", "better", "base")
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(-0.49)
    some = [row | {"gap": 1.0} if row["arm"] == "base" else row for row in ROWS]
    assert against(some, "gap", "better", "base")["verdict"] == "not measured"
    assert against(rows, "loss", "better", "none") == {
        "arm": "better", "beside": "none", "seeds": 0, "verdict": "not trained"
    }  # fmt: skip


def test_a_claim_is_turned_where_more_is_better():
    """An arm that is better has the lower loss and the higher accuracy; both say the same of the paper."""
    rows = [row | {"velocity": row["loss"], "accuracy": 1 - row["loss"], "frechet": row["loss"]} for row in ROWS]
    for claim, word in ((-1, "reproduced"), (+1, "contradicted"), (0, None)):
        table = over_metrics(rows, beside_all({"base": 0, "better": claim}, "base")).set_index("metric")
        assert list(table.index) == ["velocity", "frechet", "accuracy"]
        expected = [word] * 3 if word else ["lower", "lower", "higher"]
        assert table["verdict"].tolist() == expected
        assert comparison(rows, "accuracy", "base", {"better": claim})["verdict"].tolist()[1] == expected[2]
    assert (table["detectable"] > 0).all()


def test_a_metric_that_no_row_holds_is_left_out_and_an_arm_that_lacks_it_is_named():
    rows = [row | {"frechet": row["loss"]} if row["arm"] != "same" else row for row in ROWS]
    table = over_metrics(rows, [("better", "base", -1), ("same", "base", -1), ("gone", "base", -1)])
    assert table["metric"].tolist() == ["frechet"] * 3
    assert table["verdict"].tolist() == ["reproduced", "not measured", "not trained"]


def test_a_band_shows_what_was_detectable_where_an_arm_is_undecided():
    axis = arms_figure(ROWS, "loss", "base", {"better": -1}, "loss").axes[0]
    (band,) = [drawn for drawn in axis.collections if isinstance(drawn, PolyCollection)]
    left, right = band.get_paths()[0].get_extents().intervalx
    assert right == pytest.approx(against(ROWS, "loss", "same", "base")["detectable"]) and left == pytest.approx(-right)


def test_the_picture_shows_every_arm_but_the_baseline_at_both_budgets():
    figure = arms_figure(ROWS, "loss", "base", {"better": -1}, "loss")
    assert [axis.get_title() for axis in figure.axes] == ["equal steps", "equal operations"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["better", "same"]
    points = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(points, [[-0.5, -0.49, -0.48], [-0.02, 0.0, 0.02]], atol=1e-12)


def test_the_picture_of_one_budget_has_one_panel():
    rows = [row for row in ROWS if row["budget"] == "steps"]
    assert len(arms_figure(rows, "loss", "base", {}, "loss").axes) == 1
