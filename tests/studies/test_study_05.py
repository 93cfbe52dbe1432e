"""Study 05: what its smoke run leaves, the table that ships, its findings, and runs of other kinds."""

import json
import re
from dataclasses import replace
from functools import partial

import nbformat
import numpy as np
import pytest
from shared.displayed import displayed_markdown, section_prose
from shared.studies import check_figure, run_cells, smoke_fixture, with_tables

from maskalign_lab.base import paths
from maskalign_lab.measure.courses import METRICS, course_figure, shape_figure
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.verdicts import claim_on
from maskalign_lab.measure.wording import NotTrained, difference, interval, mean_of, plain
from maskalign_lab.runs import studied_runs
from maskalign_lab.runs.experiments import lengths, load_rows, results_file, run_arms, run_identity
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.runs.rung import BASELINE, EARLY, UNSEEN, table_preset, table_seeds
from maskalign_lab.studies.maskalign import findings, opening
from maskalign_lab.studies.maskalign import verdict_tables as verdicts
from maskalign_lab.studies.maskalign.arms import (
    ARMS,
    CLAIMS,
    HEADLINE,
    ON_REPA,
    PAPER,
    PLAIN,
    SCALES,
    arms_of,
    measure_arm,
    told_alike,
)
from maskalign_lab.studies.maskalign.measures import load_records
from maskalign_lab.studies.maskalign.tables import gap_ratios
from maskalign_lab.training.methods import METHODS

NOTEBOOK = paths.notebooks() / "05_maskalign.ipynb"
ASKED = {  # by question: arm, other, claim, metric, budget and digits of the difference that it states
    "better_loss": ("MaskAlign", "REG", -1, "velocity", "steps", 4),
    "nearer": ("MaskAlign", "REG", -1, "frechet", "steps", 2),
    "recognised": ("MaskAlign", "REG", +1, "accuracy", "steps", 3),
    "equal_operations": ("MaskAlign", "REG", 0, "velocity", "flops", 4),
    "repairs": ("MaskAlign", "mask, no mixer", -1, "frechet", "steps", 2),
    "steadier": ("MaskAlign", "REG", -1, "gap", "steps", 4),
    "less_partial": ("MaskAlign", "REG", -1, "peak full", "steps", 2),
    "more_than_views": ("MaskAlign", "mask the attention", 0, "velocity", "steps", 4),
}
COUNTED = {  # by question: how many comparisons it holds if every arm has rows
    "alignment_helps": 2 + 3,  # REG's loss cannot be compared with SiT's
    "as_in_the_paper": 3 * (2 + 3 + 2),
}


smoke = smoke_fixture("05")


def test_figures_tell_budgets_gaps_and_preference(smoke):
    for name in ("05_filmstrip", "05_arms", "05_preference", "05_influence", "05_courses", "05_paper", "05_gap"):
        side = check_figure(smoke, "05_maskalign", name)
        assert side["by_steps"] and side["by_flops"] and side["gaps"] and side["preference"]
    assert {row["metric"] for row in side["by_steps"]} == set(METRICS)
    assert not any((row["metric"], row["arm"]) == ("velocity", "SiT") for row in side["by_steps"])


def test_the_table_of_the_job_is_paired_and_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "05_rows.json")
    budgets = ("early", "steps", "flops")
    assert {(row["arm"], row["seed"], row["budget"]) for row in rows} == {
        (arm, seed, budget) for arm in ("SiT", "REG", "MaskAlign") for seed in table_seeds(2) for budget in budgets
    }
    assert all(row["reaches dropped"] == 0 for row in rows if row["arm"] == "REG")


@pytest.fixture(scope="module")
def shipped():
    return load_rows(results_file("05_maskalign", "shapes"))


def test_the_table_that_ships_is_paired(shipped):
    """Every arm has its first seeds, and so has each arm that it is compared with: a gap would bias a difference."""
    assert {row["arm"] for row in shipped} <= {arm.name for arm in ARMS}
    seeds = {}
    for row in shipped:
        if row["budget"] != "early":
            seeds.setdefault((row["arm"], row["budget"]), []).append(row["seed"])
    assert all(sorted(of) == list(table_seeds(len(of))) for of in seeds.values())
    assert all(seeds[arm, "steps"] == seeds[arm, "flops"] for arm, _ in seeds)
    assert {BASELINE, "REPA", *(arm.name for arm in HEADLINE)} <= {arm for arm, _ in seeds}


@pytest.mark.parametrize("arm", [arm.name for arm in ARMS])
def test_an_arm_has_three_metrics_at_three_looks_or_more(arm, shipped):
    rows = [row for row in shipped if row["arm"] == arm]
    if not rows:
        assert f"`{arm}`" in verdicts.not_trained(shipped)
    for seed in {row["seed"] for row in rows}:
        looks = [row for row in rows if row["seed"] == seed]
        assert len({row["step"] for row in looks}) >= 3 and {"early", "steps", "flops"} == {r["budget"] for r in looks}
        assert all(np.isfinite([row[metric] for metric in METRICS]).all() for row in looks)


def test_the_table_that_ships_is_what_todays_recipes_would_train(shipped):
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again."""
    of = SCALES["laptop"].recipe_of("laptop", "shapes")
    arms = [arm for arm in ARMS if arm.name in {row["arm"] for row in shipped}]
    recipes = {arm.name: of(arm, UNSEEN) for arm in ARMS}
    plan = lengths(recipes, BASELINE, early=EARLY)
    assert all(each.relative > 0 and len(each.looks) == 4 for each in plan.values())  # of arms without rows, too
    for arm in arms:
        rows = [row for row in shipped if row["arm"] == arm.name]
        assert {row["relative_flops"] for row in rows} == {plan[arm.name].relative}
        for row in rows:
            assert row["identity"] == run_identity(of(arm, row["seed"]), plan[arm.name])


def test_every_arm_trains_and_is_measured(own_folders):
    """At the smallest size, through the same machinery: methods, controls, and networks whose projector needs the grid.

    Their operations are counted above, and looks on the way are those of the smoke run.
    """

    def recipe_of(arm, seed):
        few = "data.n=32 training.batch_size=8 training.warmup=1 training.cooldown=0 training.steps=2"
        return arm.recipe("smoke", "shapes", seed, few)

    rows = run_arms(ARMS, table_seeds(1), recipe_of, None, partial(measure_arm, images=8, samples=0), device="cpu")
    assert {row["arm"] for row in rows} == {arm.name for arm in ARMS}
    assert all(np.isfinite(row["velocity"]) for row in rows)
    assert all(("gap" in row) is (row["arm"] not in ("SiT", "iREPA")) for row in rows)


@pytest.mark.parametrize("preset", SCALES)
def test_arms_differ_by_the_same_at_every_preset(preset):
    recipes = {arm.name: arm.recipe(preset, overrides=SCALES[preset].overrides) for arm in ARMS}
    base = recipes["REG"]
    assert recipes["two blocks behind"].network.depth == base.network.depth + 2
    assert recipes["aligned two deeper"].method.depth == base.method.depth + 2 <= base.network.depth
    assert len({recipe.training for recipe in recipes.values()}) == 1


TEACHER_BLOCKS = {"timm:vit_base_patch14_dinov2": 12}


@pytest.mark.parametrize("preset", SCALES)
def test_haste_and_irepa_are_their_authors_relative_to_size(preset):
    """A share of the steps, a share of the teacher's blocks, student blocks that end at the aligned depth; the rest as it is.

    On the rung all alignment weighs four times as much.
    """
    of, louder = SCALES[preset].recipe_of(preset, "shapes"), 4 if table_preset(preset) != preset else 1
    haste, irepa = (of(arm, 0) for arm in ON_REPA[1:])
    theirs, blocks = make_recipe("haste", "paper"), TEACHER_BLOCKS | tiny_blocks()
    assert haste.method.stop * theirs.training.steps == theirs.method.stop * haste.training.steps
    teacher, student = haste.method.teacher_blocks, haste.method.student_blocks
    last, pairs = blocks[haste.data.teacher], round(blocks[haste.data.teacher] * 4 / 12)
    assert teacher == tuple(range(last - pairs + 1, last + 1))
    assert student == tuple(range(haste.method.depth - pairs + 1, haste.method.depth + 1))
    assert haste.method.weight == louder * theirs.method.weight
    assert haste.method.attention_weight == louder * theirs.method.attention_weight
    alone = make_recipe("irepa", "paper").method
    assert replace(irepa.method, depth=8, weight=irepa.method.weight / louder) == alone
    assert irepa.method.depth == haste.method.depth


@pytest.mark.parametrize(("depth", "student", "teacher"), [(1, (1,), (5,)), (2, (1, 2), (4, 5)), (6, (5, 6), (4, 5))])
def test_hastes_blocks_follow_the_aligned_depth(depth, student, teacher):
    told = ON_REPA[1].recipe("laptop", overrides=f"network.depth=6 method.depth={depth}").method
    assert (told.student_blocks, told.teacher_blocks) == (student, teacher)


def tiny_blocks() -> dict[str, int]:
    """How many blocks the teachers that ship have."""
    names = {"tiny": "shapes", "tiny-4x4": "shapes-4x4"}
    cards = {name: paths.data() / "teacher" / folder / "card.json" for name, folder in names.items()}
    return {name: json.loads(card.read_text())["network"]["depth"] for name, card in cards.items()}


# ---- what the tables say, of made-up rows


@pytest.fixture(scope="module")
def made():
    """Rows of every arm with values of no meaning."""
    draw, metrics = np.random.default_rng(0), ("velocity", "frechet", "accuracy", "gap", "peak full")
    looks = (("early", 300), ("early", 600), ("steps", 1000), ("flops", 900))
    return [
        {"arm": arm.name, "seed": seed, "identity": f"{arm.name} {seed}", "budget": budget, "step": step}
        | {"relative_flops": 1.0, "seconds": 1.0}
        | dict(zip(metrics, draw.normal(0.2, 0.05, len(metrics)).tolist(), strict=True))
        for arm in ARMS
        for seed in range(4)
        for budget, step in looks
    ]


def without(rows, *arms):
    return [row for row in rows if row["arm"] not in arms]


@pytest.mark.parametrize("name", ASKED)
def test_a_finding_states_value_interval_and_verdict_of_its_arms(name, made):
    arm, other, claim, metric, budget, digits = ASKED[name]
    finding, found = getattr(findings, name)(made), difference(made, arm, other, metric, budget)
    number, half = (float(each) for each in finding.effect.split(" +/- "))
    assert (number, half) == pytest.approx((found.mean, found.half), abs=0.51 * 10**-digits)
    assert float(finding.detectable) == pytest.approx(found.detectable, abs=0.51 * 10**-digits)
    assert finding.verdict.split(" (")[0] == found.verdict(claim).split(" (")[0] and finding.verdicts == 1
    assert finding.figure != "05_arms" or (other, metric) == ("REG", "velocity")  # all that this figure shows


@pytest.mark.parametrize("name", COUNTED)
def test_a_count_holds_every_comparison_that_can_be_made(name, made):
    finding = getattr(findings, name)(made)
    counts = re.findall(r"\d+", f"{finding.effect} {finding.verdict}")
    assert finding.effect == f"{counts[0]} of {COUNTED[name]} comparisons" and finding.verdicts == COUNTED[name]
    assert finding.verdict == f"{counts[2]} contradicted, {counts[3]} undecided"
    assert int(counts[0]) + int(counts[2]) + int(counts[3]) == COUNTED[name]
    one = getattr(findings, name)([row for row in made if row["seed"] == 0])
    assert one.verdicts == 0 and one.effect.startswith("0 of")


@pytest.mark.parametrize("name", [*ASKED, *COUNTED])
def test_a_finding_is_left_out_if_its_arms_are_missing(name, made):
    arms = {"alignment_helps": ["SiT"], "as_in_the_paper": ["REG", "MaskAlign"]}
    for arm in arms.get(name, ASKED.get(name, ())[:2]):
        rows = without(made, *arms["as_in_the_paper"]) if name == "as_in_the_paper" else without(made, arm)
        with pytest.raises(NotTrained):
            getattr(findings, name)(without(rows, "mixer, no mask") if name == "as_in_the_paper" else rows)


def test_the_interaction_is_a_difference_of_differences(made):
    for metric in METRICS:
        pairs = (("MaskAlign", "mask, no mixer"), ("mixer, no mask", "REG"))
        one, other = (difference(made, *pair, metric) for pair in pairs)
        expected = np.subtract(one.differences, other.differences)
        assert verdicts.interaction(made, metric).differences == pytest.approx(tuple(expected))
    assert verdicts.interaction(without(made, "REG")) is None


def test_losses_of_networks_that_are_told_different_things_are_not_compared(made):
    table = verdicts.metrics_table(made, verdicts.beside_reg(made))
    loss = table[METRICS["velocity"], "verdict"].droplevel("beside")
    assert {arm for arm, word in loss.items() if word == "not comparable"} == {
        "SiT",
        "REPA",
        *(a.name for a in ON_REPA),
    }
    assert not (table[METRICS["frechet"], "verdict"] == "not comparable").any() and "REG, oracle" not in loss
    numbers = verdicts.over_all(made, verdicts.beside_reg(made))
    compared = numbers[numbers["metric"] == "velocity"]["arm"]
    assert set(compared) == set(loss.index[loss != "not comparable"]) and all(
        told_alike(arm, "REG") for arm in compared
    )


def test_claims_are_of_equal_steps_and_of_the_papers_arms(made):
    assert {pair[2] for pair in verdicts.beside_reg(made, claimed=False)} == {0}
    claims = {arm: claim for arm, _, claim in verdicts.beside_reg(made)}
    assert claims["SiT"] == claims["REPA"] == +1 and claims["HASTE"] == claims["mask the loss"] == 0
    assert {arm.name for arm in HEADLINE[1:]} <= claims.keys() and claims["MaskAlign"] == CLAIMS["MaskAlign"] == -1
    assert verdicts.beside_theirs(made) == [
        *((arm.name, "REPA", -1) for arm in ON_REPA),
        ("MaskAlign, oracle", "REG, oracle", -1),
    ]
    assert all(claim == -1 and other == "SiT" for _, other, claim in verdicts.beside_sit(made))


def test_the_repair_is_asked_of_every_metric_at_both_budgets(made):
    table = verdicts.repair_table(made)
    assert table.index.get_level_values("equal").tolist() == ["steps"] * 4 + ["operations"] * 3
    for metric, name in METRICS.items():
        found = verdicts.interaction(made, metric)
        line = table.loc[("steps", "interaction", ""), name]
        assert float(line["difference"].split()[0]) == pytest.approx(
            found.mean, abs=0.51 * 10 ** -verdicts.DIGITS[metric]
        )
        assert set(table.loc["operations"][name, "verdict"]) <= {"lower", "higher", "undecided"}
    gone = verdicts.repair_table(without(made, "two blocks behind", "REG"))
    assert (gone.xs("two blocks behind", level="arm")[METRICS["velocity"], "verdict"] == "not trained").all()
    assert "interaction" not in gone.index.get_level_values("arm")


def test_missing_arms_are_named_with_what_trains_them(made):
    assert verdicts.not_trained(made) == "Every arm has rows here."
    text = verdicts.not_trained(without(made, "HASTE", "ratio 0.5"))
    assert text == 'No rows here of `ratio 0.5`, `HASTE`; `-p seeds 3 -p arms "ablations repa"` trains them.'


def test_figures_stand_beside_the_paper_and_over_the_looks(made):
    assert [table.name for table in PAPER] == ["table 3", "table 5", "table 6"]
    assert len(shape_figure(made, PAPER).axes) == 3 * (1 + len(METRICS))
    assert len(shape_figure(without(made, "mixer of 1", "mixer of 3"), PAPER).axes) == 2 * (1 + len(METRICS))
    panels = course_figure(made, ["SiT", "MaskAlign"], "REG", apart={"velocity": ["SiT"]}).axes
    assert [len(panel.containers) for panel in panels] == [1, 2, 2]
    one = [row for row in made if row["seed"] == 0]
    assert shape_figure(one, PAPER) is None and course_figure(one, ["MaskAlign"], "REG") is None


def test_photographs_have_a_table_or_the_commands_that_train_it(made):
    text = verdicts.photographs_text([])
    assert "maskalign-lab teach folder:IMAGES --patch-size 8" in text and "-p arms headline" in text
    assert verdicts.photographs_table([]).empty
    headline_arms = ("SiT", "REPA", "REG", "MaskAlign")
    unjudged = ("frechet", "accuracy")
    rows = [{k: v for k, v in row.items() if k not in unjudged} for row in made if row["arm"] in headline_arms]
    table = verdicts.photographs_table(rows)
    assert table[["metric", "arm", "equal"]].values.tolist() == [
        *([["velocity", arm, equal] for equal in ("steps", "operations") for arm in ("REPA", "MaskAlign")]),
        ["gap", "MaskAlign", "steps"],
    ]
    assert (table["seeds"] == 4).all() and verdicts.photographs_text(rows) == "16 trainings of up to 1,000 steps."
    one = [row for row in rows if row["seed"] == 0]
    assert set(verdicts.photographs_table(one)["verdict"]) == {"undecided (1 seed)"}
    assert verdicts.photographs_text(one) == "4 trainings of up to 1,000 steps. One seed decides nothing."


def test_rows_of_photographs_are_the_headlines_if_there_are_any():
    rows = load_rows(results_file("05_maskalign", "folder:cifar10/train"))
    assert {row["arm"] for row in rows} <= {arm.name for arm in arms_of("headline")}
    assert verdicts.photographs_table(rows).empty is not bool(rows)


# ---- what is said of the rows that ship


def test_the_findings_are_a_table_of_ten_rows_and_250_words(shipped):
    shown = findings_table(findings.all_findings(shipped)).data
    assert 100 < check_words(f"{section_prose(NOTEBOOK, 'Findings')} {shown}")
    missing = re.search(r"no rows here: (\d+)", shown)
    assert shown.count("\n|") - 1 + int(missing[1] if missing else 0) == len(findings.QUESTIONS) == 10
    assert "| Is MaskAlign's velocity loss below REG's? |" in shown


def test_the_first_screen_says_its_verdict_in_one_line_as_the_rows_do(shipped):
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    assert f"**Verdict.** {headline(findings.better_loss(shipped))}\n" in first


@pytest.fixture(scope="module")
def said():
    """All prose of the notebook, in one line."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return " ".join(" ".join(cell.source for cell in cells if cell.cell_type == "markdown").split())


def words(rows, arm, other, claim=+1, metric="velocity", budget="steps"):
    """A paired difference as it is written, and its verdict."""
    found = difference(rows, arm, other, metric, budget)
    return interval(found, verdicts.DIGITS[metric]), found.verdict(claim_on(metric, claim)).split(" ")[0]


def test_what_is_said_of_parts_ratios_and_depths_is_what_the_rows_say(shipped, said):
    """Of table 3 the mask alone, of table 5 by loss each further share, by distance half; depths of the mixer are not told apart."""
    verdict_of = partial(lambda *pair, metric="velocity": words(shipped, *pair, metric=metric)[1])
    assert [verdict_of("mask, no mixer", "REG", metric=each) for each in METRICS] == [*["reproduced"] * 2, "undecided"]
    for metric in METRICS:
        assert verdict_of("mixer, no mask", "REG", metric=metric) == "undecided"
        assert verdict_of("MaskAlign", "REG", metric=metric) == "reproduced"  # that it is worse
        for depth in ("mixer of 1", "mixer of 3"):
            assert verdict_of(depth, "MaskAlign", metric=metric) == "undecided", (depth, metric)
    ladder = ("mixer, no mask", "MaskAlign", "ratio 0.5", "ratio 0.75")
    for less, more in zip(ladder, ladder[1:]):
        assert verdict_of(more, less) == "reproduced", more
    for more in ladder[1:]:
        assert verdict_of(more, ladder[0], metric="frechet") == "reproduced", more
    half, three = ([words(shipped, *pair, metric=each) for each in ("velocity", "frechet")] for pair in
                   (("ratio 0.5", "MaskAlign"), ("ratio 0.75", "ratio 0.5")))  # fmt: skip
    assert [each[1] for each in (*half, *three)] == [*["reproduced"] * 3, "undecided"]
    assert f"(half beside a quarter {half[0][0]}, three quarters beside half {three[0][0]})" in said
    assert (
        f"half is worse than a quarter ({half[1][0]}), and beyond that three seeds do not decide ({three[1][0]})"
        in said
    )


def test_what_is_said_of_the_repair_is_what_the_rows_say(shipped, said):
    mask, mixer = ("MaskAlign", "mask, no mixer"), ("MaskAlign", "mixer, no mask")
    nearer, farther = (words(shipped, *pair, -1, "frechet") for pair in (mask, mixer))
    assert (nearer[0][0], farther[0][0]) == ("-", "+")
    assert [nearer[1], farther[1]] == ["reproduced", "contradicted"]
    assert f"{nearer[0][1:]} nearer than the mask alone, but {farther[0][1:]} farther than the mixer alone" in said
    for metric in METRICS:
        assert metric == "frechet" or words(shipped, *mask, metric=metric)[1] == "undecided"
        assert verdicts.interaction(shipped, metric).verdict(-1).startswith("undecided")
    behind = [words(shipped, *mask, 0, metric, "flops") for metric in METRICS]
    assert [word for _, word in behind] == ["higher", "higher", "undecided"]
    assert f"behind the mask alone by loss ({behind[0][0]}) and distance ({behind[1][0]})" in said


def test_what_is_said_of_the_control_and_of_missing_arms_is_what_the_rows_say(shipped, said):
    control, rest = words(shipped, "mask the attention", "REG", 0), words(shipped, "MaskAlign", "mask the attention", 0)
    assert control[1] == rest[1] == "higher"
    assert f"its loss is higher ({control[0]}), and MaskAlign's is higher still ({rest[0]} beside it)" in said
    costs = {row["arm"]: row["relative_flops"] for row in shipped}
    assert costs["mask the attention"] > costs["MaskAlign"]
    assert "no rows of either ship" in said and not {"REPA + MaskAlign", "MaskAlign, oracle"} & costs.keys()


def test_steps_costs_and_losses_in_the_prose_are_those_of_the_rows(shipped, said):
    steps = {row["arm"]: f"{row['step']:,}" for row in shipped if row["budget"] == "flops"}
    assert (
        steps["SiT"] == "1,000"
        and (
            f"{steps['REG']} steps of REG, {steps['MaskAlign']} of MaskAlign, {steps['mask, no mixer']} with a mask and no "
            f"mixer, {steps['mixer, no mask']} with a mixer and no mask"
        )
        in said
    )
    cost = next(row["relative_flops"] for row in shipped if row["arm"] == "REG")
    assert f"(REG: {cost:.3f};" in said and f"REG's loss is {plain(mean_of(shipped, 'REG'))}." in said


def test_times_of_a_step_in_the_prose_are_those_of_the_benchmark(said):
    (table,) = re.findall(
        r"masked-step\.json -->(.*?)```\n", (paths.clone() / "benchmarks" / "README.md").read_text(), re.S
    )
    found = re.findall(
        r"ratio 0.25: ([\d.]+) \[([\d.]+), ([\d.]+)\] of REG's time, ([\d.]+) of its FLOPs: \S+ (.*)", table
    )
    times = [f"{mid} [{low}, {high}]".replace("0.", ".") for mid, low, high, *_ in found]
    assert "{} for S, {} for B and {} for XL at half its depth".format(*times) in said
    assert [word for *_, word in found] == ["undecided about 0.04", "within 0.04", "undecided about 0.04"]
    assert f"(operations {found[2][3][1:]})" in said


def test_the_gap_of_the_pair_that_ships_is_told_from_its_records():
    records = {name: load_records(paths.data() / "runs" / name) for name in ("reg-shapes", "maskalign-shapes")}
    told = "At step 7,000, of one seed, the gaps are .0004 +/- .0003 (MaskAlign) and .0028 +/- .0007 (REG): 14 % (in the paper: 13.8 %)."
    assert findings.gap_note(records) == told
    wide, narrow = (
        gap_ratios({("maskalign", 0.25): ours, ("reg", 0.25): np.ones(8)}, "maskalign", "reg")
        for ours in (np.repeat([0.0, 1.0], [6, 2]), np.full(8, 0.5))
    )
    assert wide.columns[0] == "gap, maskalign over reg"
    assert re.search(
        r"has 25 % from 8 images; its interval is 0 to \d+ % and holds both", findings.gap_note(records, wide, 8)
    )
    assert (
        findings.gap_note(records, narrow, 8)
        == f"{told} The table above has 50 % from 8 images; its interval is 50 to 50 %."
    )
    assert "takes the records of two runs" in findings.gap_note({})


def test_the_notebook_tells_the_gaps_and_what_inf_means():
    shown = displayed_markdown(NOTEBOOK)
    assert any("26 % from 128 images" in each and each.endswith("says little.") for each in shown)
    assert any("`inf`: some position was never marked" in each for each in shown)


def test_the_notebook_displays_the_findings_of_the_rows_that_ship(shipped):
    assert findings_table(findings.all_findings(shipped)).data in displayed_markdown(NOTEBOOK)


def test_a_job_displays_the_findings_of_its_own_rows(smoke):
    rows, shown = load_rows(smoke.path(".html").parent / "05_rows.json"), displayed_markdown(smoke.path(".ipynb"))
    expected = findings_table(findings.all_findings(rows)).data
    assert expected in shown and verdicts.not_trained(rows) in shown
    assert expected.endswith("no rows here: 3.")  # the mixer's, the paper's tables', and the augmentation's


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["reg-shapes", "maskalign-shapes"]),
        ({"run": "mine"}, ["mine"]),
        ({"seed": 1}, ["reg laptop shapes 1 ", "maskalign laptop shapes 1 "]),
        ({"preset": "smoke", "dataset": "digits"}, ["reg smoke digits 0 ", "maskalign smoke digits 0 "]),
        (
            {"overrides": "training.steps=2"},
            [f"{name} laptop shapes 0 training.steps=2" for name in ("reg", "maskalign")],
        ),
    ],
)
def test_which_runs_a_study_looks_at(given, expected, monkeypatch):
    """Those that ship for the preset's defaults alone; nothing that was asked for is ignored."""
    monkeypatch.setattr(studied_runs, "load_run", lambda name, device: name)
    monkeypatch.setattr(studied_runs, "make_recipe", lambda *asked: " ".join(map(str, asked)))
    monkeypatch.setattr(studied_runs, "ensure_run", lambda recipe, device: recipe)
    monkeypatch.setattr(opening, "observe", lambda run: run)
    monkeypatch.setattr(opening, "make_film", lambda studied, scale: None)
    study = opening.open_study(**given)
    assert study.studied == expected


def test_what_a_study_was_asked_for_reaches_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "studied_runs", lambda *asked: [])
    monkeypatch.setattr(opening, "make_film", lambda studied, scale: None)
    trained = []
    monkeypatch.setattr(opening, "rung_rows", lambda *asked: trained.append(asked) or [1])
    given = dict(
        preset="gpu", seeds=2, arms="pair repa", overrides="training.steps=9", out_dir=str(tmp_path), device="cpu"
    )
    study = opening.open_study(**given)
    assert opening.table_rows(study) == [1]
    arms, count, recipe_of, _, _, keep, device = trained[0]
    assert (count, keep, device) == (2, tmp_path / "05_rows.json", "cpu")
    assert arms == (*PLAIN, HEADLINE[0], HEADLINE[3], *ON_REPA) and recipe_of(arms[0], 3).training.steps == 9
    assert opening.open_study(preset="gpu").count == SCALES["gpu"].seeds and opening.open_study().count == 0


def test_a_run_without_class_token_or_mixer_is_studied(tmp_path, after_smoke):
    out = with_tables(after_smoke("05"), tmp_path / "out", "05_rows.json")
    path = train(make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64"), tmp_path / "mine", "cpu", 0)
    run_cells("05", {"preset": "smoke", "run": str(path), "seeds": 1, "out_dir": out})
    assert (tmp_path / "out" / "05_filmstrip.png").exists()


def test_methods_of_the_study_are_installed():
    assert {"maskalign", "mask-loss", "mask-input", "mask-attention"} <= METHODS.keys() and "same-mask" not in METHODS
