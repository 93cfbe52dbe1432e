"""The sentences of study 03: their numbers are those of the rows, and rows that say otherwise have none."""

import json
import re
from functools import cache

import nbformat
import numpy as np
import pandas as pd
import pytest
from shared.displayed import section_prose

from maskalign_lab.base import paths
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.verdicts import Paired
from maskalign_lab.measure.wording import NotTrained
from maskalign_lab.prediction_targets import KINDS
from maskalign_lab.runs.experiments import load_rows, results_file
from maskalign_lab.studies.prediction_targets import (
    conclusions,
    costs,
    error_findings,
    findings,
    jit_parts,
    manifold_findings,
    summary,
)
from maskalign_lab.studies.prediction_targets.arms import BY_SIZE, JIT_ARMS, SCALES, target_arm
from maskalign_lab.studies.prediction_targets.findings import in_words
from maskalign_lab.studies.prediction_targets.measures import by_width, judge_verdicts

MODULES = (findings, error_findings, manifold_findings, conclusions, jit_parts, costs)
QUIET = "nothing is said here"


@cache
def tables() -> dict[str, list]:
    """Every table that ships, by the name that the findings below ask for."""
    found = {name: load_rows(paths.data() / "results" / f"03_{name}.json") for name in ("manifold", "one_image")}
    files = {"rows": ("03_targets", "shapes"), "photos": ("03_targets", "photos"), "longer": ("03_longer", "shapes")}
    files |= {"cifar": ("03_targets", "folder:cifar10/train"), "jit": ("03_jit", "shapes")}
    found |= {name: load_rows(results_file(*which)) for name, which in files.items()}
    return found


def of_jit(rows):
    return jit_parts.jit_conclusion(jit_parts.in_readers_words(rows))


of_jit.__doc__ = jit_parts.jit_conclusion.__doc__


def of_widths(rows):
    """As the study asks for it."""
    return findings.channels_text(by_width(rows))


CASES = [  # finding, its tables, its other arguments, and all numbers in its text
    (manifold_findings.stray_text, ["manifold"], [], "16 0.31 0.09 0.009 89 0.0001"),
    (manifold_findings.leaving_text, ["manifold"], [], "512 20 16 89 512 0.6"),
    (manifold_findings.diagram_text, ["manifold"], [], "512 0.43 32 64 8 0.003"),
    (manifold_findings.controls_text, ["manifold"], [], "0.67 0.61 0.35 0.22 0.32 0.33"),
    (findings.across_text, ["rows"], [], "32 64 128 0.52 0.85 0.93 64 0.75 0.94 0.98 0.60 0.92 0.98"),
    (of_widths, ["rows"], [], "0.09 0.12"),
    (findings.judge_text, ["rows"], [], "32 16 22.2 21.8 1.1 11"),
    (findings.longer_text, ["longer"], [], "16 8.9 11.1"),
    (findings.space_text, ["rows"], [], "1.3 0.8 11.0 3.1 11.2 6.3 16 5.2 1.4 64 128 14.3 9.0"),
    (findings.weighting_text, ["rows"], [], "64 128 0.7 0.16 0.17 0.14 1.7 1.5 16 16"),
    (error_findings.near_data_text, ["rows"], ["shapes"],
     "128 0.05 0.011 0.003 0.0030 1 0.0028 0.00255 0.00275 2 76 128 12"),
    (error_findings.rank_text, ["rows"], [96],
     "64 128 89 93 96 59 88 64 25 75 128 16 27 32 128 15.8 26.7 64 19 26 32 26 18 16 17 9 08"),
    (error_findings.spectrum_text, ["rows"], [], "128 63 300 984 10 1 1.5 9 5 16 0.030 0.038 0.045 1 1"),
    (findings.one_image_text, ["one_image"], [], "2 26 0.016 0.029"),
    (conclusions.agreement_text, ["photos"], [], "32 128"),
    (conclusions.size_conclusion, ["rows"], [96],
     "48 0.99 0.80 2 3.46 3.55 192 768 3,072 3.9 6.6 8.8 1.6 1.9 1.7 3.9 7.2 10.7 0.05 7 1.25 364 727 1,009 61 85 80"),
    (conclusions.width_conclusion, ["rows"], [96, "manifold", "one_image"],
     "3 6 34 512 1,024 510 0.30 0.41 512 0.43 2 768 2 26 0.029 64 192 384 0.96 0.85 0.62 0.875 0.750 0.500 "
     "91 88 80 0.50 0.40 0.33 1.9 2.1 1.9"),
    (conclusions.detail_conclusion, ["rows"], [96],
     "4.2 7.9 11.5 2.6 4.6 5.0 0.069 0.072 0.074 16 0.067 13 1.5 0.3 11 66 279"),
    (conclusions.toy_conclusion, ["manifold"], [], "512 1.24 1.70 1.98 1.23 3.17 1.18 0.41 3.37 1.9 4.0 2"),
    (conclusions.photographs_conclusion, ["photos", "cifar"], [],
     "1.03 1.04 3.7 5.6 6.1 16 128 0.82 1.6 1.5 1.03 1.05 1.01 3.9 6.2 7.2 4.6 8.0 11.4 3.0 5.3 6.2 1.04 16 3.0 5.5 7.9 "
     "0.94 1.7 2.9 3.1"),
    (of_jit, ["jit"], [], "400 64 13 04 0.67 0061 0014 +5.3 2.6 30 10 81 0.05 200"),
]  # fmt: skip
IDS = [case[0].__name__ for case in CASES]


def said(finding, names, more, change=lambda rows: rows) -> str:
    """A finding's words about tables that ship, of which the first named ones are changed."""
    given = [change(tables()[name]) for name in names]
    return in_words(finding, *given, *(tables()[each] if each in tables() else each for each in more)).data


@pytest.mark.parametrize(("finding", "names", "more", "numbers"), CASES, ids=IDS)
def test_a_finding_says_of_the_rows_that_ship_what_they_say(finding, names, more, numbers):
    text = said(finding, names, more)
    assert QUIET not in text
    assert re.findall(r"(?<![\w-])[+-]?\d[\d,]*\d(?:\.\d+)?|(?<![\w.-])[+-]?\d(?:\.\d+)?", text) == numbers.split()


@pytest.mark.parametrize(("finding", "names", "more", "numbers"), CASES, ids=IDS)
def test_a_finding_without_rows_is_a_line_with_its_topic_and_a_reason(finding, names, more, numbers):
    text = said(finding, names, more, lambda rows: [])
    assert text.startswith(f"*{finding.__doc__.rstrip('.')}: {QUIET}, since ") and len(text.splitlines()) == 1


def swapped(first: str, second: str):
    """Rows in which two arms or predictions have changed their names."""

    def change(rows):
        other = {first: second, second: first}
        arms = [{**row, "arm": re.sub(r"^[^,]+", lambda arm: other.get(arm[0], arm[0]), row["arm"])} if "arm" in row
                else dict(row) for row in rows]  # fmt: skip
        return [
            {**row, "prediction": other.get(row["prediction"], row["prediction"])} if "prediction" in row else row
            for row in arms
        ]

    return change


SYMMETRIC = ("weighting_text",)  # shares of x and v do not know which is which


@pytest.mark.parametrize(
    ("finding", "names", "more", "numbers"),
    [c for c in CASES if c[0].__name__ not in SYMMETRIC],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_rows_that_say_otherwise_have_no_words(finding, names, more, numbers):
    arms = ("JiT", "without bottleneck") if names == ["jit"] else ("x", "v")
    text = said(finding, names, more, swapped(*arms))
    assert text.startswith("*") and QUIET in text


@pytest.mark.parametrize(("finding", "names", "more", "numbers"), CASES, ids=IDS)
@pytest.mark.parametrize("kept", [2, 3])
def test_some_of_the_rows_never_end_in_an_error(finding, names, more, numbers, kept):
    """Seeds, arms and metrics may be missing, as with other presets and data sets."""
    changes = [
        lambda rows: [row for row in rows if row["seed"] < kept - 1],
        lambda rows: rows[::kept],
        lambda rows: rows[: len(rows) // kept],
        lambda rows: [
            {name: value for name, value in row.items() if name not in ("frechet", "accuracy")} for row in rows
        ],
    ]
    for change in changes:
        text = said(finding, names, more, change)
        assert text and ("\n" not in text or QUIET not in text)


def test_every_finding_is_tested_and_displayed_by_the_study():
    book = nbformat.read(paths.notebooks() / "03_prediction_targets.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    names = {name for module in MODULES for name in module.__all__ if name.endswith(("_text", "_conclusion"))}
    inner = {"channels_conclusion"}  # the end of another
    displayed = set(re.findall(r"in_words\((\w+),|\((?:conclusions|jit_parts)\.(\w+),|Markdown\((\w+)\(", code))
    assert {name for each in displayed for name in each if name not in ("", "conclusion")} == names - inner
    tested = {case[0].__name__ for case in CASES} - {"of_jit", "of_widths"}
    assert tested == names - inner - {"gpu_text", "channels_text", "jit_conclusion"}


# ---- made-up rows, whose numbers are known


def made_up(metric, values, size=16, **more):
    """A row for each prediction and seed with the v-loss."""
    return [
        {"arm": target_arm(kind, "v", size, **more).name, "seed": seed, "budget": "steps", metric: value}
        for kind, each in zip(KINDS, values, strict=True)
        for seed, value in enumerate(each)
    ]


def test_means_are_over_seeds_and_a_missing_arm_is_named():
    rows = made_up("x error", ([1, 3], [2], [4]))
    assert findings.target_mean(rows, "x error", "x") == 2
    with pytest.raises(NotTrained, match="'x, v-loss, 32 px' with 'x error'"):
        findings.target_mean(rows, "x error", "x", "v", 32)
    with pytest.raises(NotTrained, match="with 'frechet'"):
        findings.target_mean(rows, "frechet", "x")


def test_the_share_across_the_plane_is_told_by_size():
    rows = []
    for detail in ("repeated", "matched"):
        for size, noise in ((32, 0.75), (64, 0.9375), (128, 0.984375)):
            for kind, share in (("x", 0), ("eps", noise), ("v", noise - 0.05)):
                arm = target_arm(kind, "v", size, detail).name
                rows.append({"arm": arm, "seed": 0, "across": 2 * share, "x error": 2.0})
    assert "it is 0.70, 0.89 and 0.93, which" in findings.across_text(rows)
    rows[0]["across"] = 0.1  # x lets noise through
    assert QUIET in in_words(findings.across_text, rows).data


def test_the_judge_is_as_many_times_the_floor_as_the_best_network():
    near = made_up("frechet", ([20.0, 20.4], [80, 81], [20.2, 20.1]))
    far = made_up("frechet", ([30, 31], [90, 91], [40, 41]), 32)
    rows = [{**row, "frechet floor": 2.5, "accuracy": 0.1} for row in near + far]
    table = findings.judge_table(rows)
    assert table.loc["16 px", "x"] == pytest.approx(20.2) and (table["floor"] == 2.5).all()
    assert "(20.2 and 20.1; detectable " in (text := findings.judge_text(rows)) and "at least 8 times the floor" in text
    rows[-1] = {**rows[-1], "accuracy": 0.5}
    assert QUIET in in_words(findings.judge_text, rows).data


def test_a_loss_space_is_preferred_by_paired_seeds():
    sure, open_ = Paired(-5.0, 1.0, (-5, -4, -6)), Paired(-1.0, 3.0, (-1, 1, -3))
    assert findings.prefers_x_loss([sure] * 3, [sure, open_, open_])
    assert not findings.prefers_x_loss([sure] * 3, [open_] * 3)
    assert not findings.prefers_x_loss([sure] * 3, [sure, open_, Paired(1.0, 3.0, (1, 2, 0))])


def test_leading_cycles_end_where_the_other_falls_below():
    assert error_findings.leading_cycles(np.array([1, 1, 1, 9]), np.array([2, 2, 2, 2])) == 2
    assert error_findings.leading_cycles(np.array([9, 1]), np.array([2, 2])) == -1


def test_answers_that_need_no_network_are_as_wrong_as_they_are():
    x = load_dataset("shapes", 128, n=64).images().double()
    noise, t = np.random.default_rng(0).normal(size=x.shape), 0.05
    x_t = (1 - t) * x.numpy() + t * noise
    plain, scaled = error_findings.untrained_errors("shapes", t)
    assert np.square(x_t - x.numpy()).mean() == pytest.approx(plain, rel=0.01)
    assert np.square(x_t / (1 - t) - x.numpy()).mean() == pytest.approx(scaled, rel=0.01)


def test_the_share_of_the_clean_end_is_of_the_whole_loss():
    errors = [t**2 for t in findings_times()]  # a v-loss of 1 at all times
    rows = [{"arm": target_arm("x").name, "seed": 0, "x error per t": errors, "velocity": 1.0}]
    assert error_findings.clean_end_share(rows, target_arm("x")) == pytest.approx(0.1)


def findings_times():
    return error_findings.TIMES


def test_widths_are_told_beside_their_bounds():
    found = by_width([row for row in tables()["rows"] if "64 px" in row["arm"]])
    assert found["channels"].tolist() == [96, 192, 384] * 2 and (found["seeds"] == 3).all()
    assert found["bound"].round(3).tolist() == [0, 0, 0, 0.875, 0.75, 0.5]
    assert by_width([]).empty and QUIET in in_words(findings.channels_text, by_width([])).data


def summed_up(**changed):
    """The makers of the findings table of the rows that ship, some of them changed."""
    given = {name: tables()[name] for name in ("rows", "manifold", "photos", "jit")} | changed
    return summary.all_findings(
        given["rows"], 96, given["manifold"], given["photos"], jit_parts.in_readers_words(given["jit"])
    )


def test_the_findings_are_a_table_of_ten_rows_and_250_words():
    shown = findings_table(summed_up()).data
    prose = section_prose(paths.notebooks() / "03_prediction_targets.ipynb", "Findings")
    assert check_words(f"{prose} {shown}") > 200
    assert shown.count("\n|") == 11 and "no rows here" not in shown
    for row in (
        "| 6.64 times (6.54 to 6.75) | 1.02 times | reproduced (3 seeds) | 03_by_size |",
        "| 18 of 18 comparisons | – | reproduced | 03_by_size |",
        "| 1.03 times (0.99 to 1.06) | 1.05 times | undecided (3 seeds) | – |",
        "| +.19 +/- .05 | .07 | higher (3 seeds) | 03_nine |",
        "| -11.0 +/- 3.1 | 4.1 | contradicted (3 seeds) | 03_nine_judge |",
        "| 1.24 times (0.90 to 1.70) | 1.53 times | met (5 seeds) | 03_toy |",
        "| 1 of 24 comparisons | – | 3 contradicted | 03_jit_parts |",
    ):
        assert row in shown, shown
    assert "Of 49 verdicts luck would decide about 2.5" in shown


def test_a_question_without_rows_is_counted_and_the_others_stay():
    small = [row for row in tables()["rows"] if "16 px" in row["arm"]]
    shown = findings_table(summed_up(rows=small, jit=[])).data
    assert shown.count("\n|") == 4 and shown.endswith("Findings about arms that have no rows here: 7.")
    one = [row for row in tables()["rows"] if row["seed"] == 0]
    assert "| nothing | undecided (1 seed) | 03_by_size |" in findings_table(summed_up(rows=one)).data


def test_the_first_screen_says_its_verdict_in_one_line_as_the_rows_do():
    assert f"**Verdict.** {headline(summary.larger_error(tables()['rows'], 96))} So it goes" in notebook_prose()
    photographs = summary.on_photographs(tables()["photos"])
    assert photographs.verdict == "undecided (3 seeds)"
    assert f"which is undecided (detectable {photographs.detectable})" in notebook_prose()


def notebook_prose() -> str:
    book = nbformat.read(paths.notebooks() / "03_prediction_targets.ipynb", as_version=4)
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def test_the_judges_verdicts_are_about_x_on_both_of_its_metrics():
    table = judge_verdicts(tables()["rows"]).set_index(["metric", "arm", "beside"])
    assert set(table.index.get_level_values(0)) == {"frechet", "accuracy"}
    assert table.loc[("frechet", "x, v-loss, 64 px", "v, v-loss, 64 px"), "verdict"] == "reproduced"
    small = table.xs("x, v-loss, 16 px", level="arm")
    assert not small["verdict"].isin(("reproduced", "contradicted")).any()  # nothing is claimed where noise fits
    assert judge_verdicts([row for row in tables()["rows"] if row["arm"].startswith("x")]).empty


def test_the_first_screen_says_of_16_pixels_what_the_rows_say():
    small = conclusions.factors(tables()["rows"], "true", "v").loc[conclusions.SMALL]
    told = f"its error ({small[conclusions.ERROR]:.2f} times x's) and more by its loss ({small[conclusions.LOSS]:.2f})"
    assert told in notebook_prose()


def test_what_is_said_of_the_class_that_is_seen_is_in_the_rows():
    table = judge_verdicts(tables()["rows"])
    table = table[table["metric"] == "accuracy"]
    decided = table[~table["verdict"].str.startswith("undecided")].set_index(["arm", "beside"])
    assert decided["verdict"].value_counts().to_dict() == {"reproduced": 1, "contradicted": 2} and len(table) == 22
    assert decided["difference"].abs().round(2).eq(0.02).all()
    names = {*table["arm"], *table["beside"]}
    means = pd.DataFrame([row for row in tables()["rows"] if row["arm"] in names]).groupby("arm")["accuracy"].mean()
    assert [round(end, 2) for end in (means.min(), means.max())] == [0.09, 0.12]
    assert "of 22 verdicts 1 is reproduced" in notebook_prose() and ".09 to .12 of ten classes" in notebook_prose()


def test_the_criterion_says_which_half_is_met():
    table = manifold_findings.criterion_table(tables()["manifold"]).set_index(["data", "asked"])
    assert table["whole interval meets it"].tolist() == [True, True, True, False, True, False]
    assert table.loc[("spiral", "at most 2"), "ratio"] == pytest.approx(1.24, abs=0.005)
    assert (table.loc[(slice(None), "at least 10"), "low"] > 10).all()


def test_the_first_half_of_the_criterion_separates_nothing():
    """v passes ten times at D = 8 and 16 too, where it stays on the plane."""
    toy = tables()["manifold"]
    for dim in (8, 16):
        x, v = (manifold_findings.case(toy, dim=dim, prediction=kind) for kind in ("x", "v"))
        assert manifold_findings.paired_ratio(v, x, "off")[1] > 10 and max(row["left"] for row in v) < 0.01


def test_tables_of_the_toy_leave_out_what_nobody_trained():
    toy = [row for row in tables()["manifold"] if row["dim"] == 16 and row["prediction"] == "v"]
    assert manifold_findings.energy_table(toy).index.tolist() == [(16, "v")]
    assert manifold_findings.leaving_table(toy)[["D", "prediction", "seeds"]].values.tolist() == [[16, "v", 5]]
    assert manifold_findings.control_rows(toy) == {}


def test_parts_of_jit_go_by_the_readers_words():
    rows = jit_parts.in_readers_words(tables()["jit"])
    table = jit_parts.part_table(rows, "velocity")
    assert set(table.index) == set(jit_parts.CLAIMS) and len(table) == len(JIT_ARMS)
    values = [row["velocity"] for row in rows if row["arm"] == "without rotary positions"]
    assert table.loc["without rotary positions", "mean"] == pytest.approx(np.mean(values))
    assert table.loc["without bottleneck", "verdict"] == "contradicted"
    assert jit_parts.part_table(rows, "frechet").loc["without bottleneck", "verdict"] == "reproduced"
    for words in ("(-.13 +/- .04; ", "(-.0061 +/- .0014)", "(+5.3 +/- 2.6)", "(-.8 +/- .4, at a distance of 30)"):
        assert words in jit_parts.jit_conclusion(rows)


def test_the_verdict_of_the_first_screen_is_that_of_the_tables():
    shapes = [
        conclusions.factors(tables()["rows"], detail, kind)
        for detail in ("true", "repeated", "matched")
        for kind in ("eps", "v")
    ]
    assert conclusions.reproduced(*shapes)
    assert conclusions.undecided_on(tables()["photos"]) == conclusions.LEVEL
    for name in ("rows", "photos"):
        small = conclusions.factors(tables()[name], "true", "v").loc[conclusions.SMALL]
        assert all(0.75 < small[factor] < 1.05 for factor in (conclusions.ERROR, conclusions.LOSS, conclusions.JITS))


def test_the_cost_of_preset_gpu_is_the_sum_of_its_steps():
    scale, plan, toy = SCALES["gpu"], costs.gpu_recipes(), tables()["manifold"]
    assert len(plan) == scale.seeds * (len(scale.arms) + len(scale.jit_arms)) + 6 + 6
    text = costs.gpu_text()
    assert f"takes {sum(recipe.training.steps for recipe in plan):,} steps in batches of 256 (384 channels" in text
    assert "takes 207,000 steps" in text and "three seeds of 52 arms and of JiT's 7" in text
    assert f"the {len(toy)} networks of the toy" in text and "277" in text
    assert f"{sum(row['seconds'] for row in toy) / 60:.0f} minutes of one core" in text and " 43 minutes" in text


def test_the_costs_on_one_core_are_those_of_the_trainings_that_ship():
    table = costs.cost_table().round().set_index("one seed of")
    assert table["trainings"].tolist() == [52, 6, 6, 7, 85] and table["minutes"].tolist() == [53, 6, 56, 12, 16]
    assert costs.arms_minutes(SCALES["laptop"]) == pytest.approx(53, abs=0.5)


def test_the_smallest_size_is_not_asked_of_repeated_pixels():
    rows = [json.loads(json.dumps(row)) for row in tables()["rows"]]
    names = {arm.name for arm in BY_SIZE if arm.name.endswith("repeated")}
    assert len(conclusions.factors([row for row in rows if row["arm"] in names], "repeated", "v")) == 3
    with pytest.raises(NotTrained, match="v beside x at all sizes with true detail"):
        conclusions.factors([row for row in rows if "16 px" not in row["arm"]], "true", "v")
