"""Study 05: what its smoke run leaves, the table that ships, its findings, and runs of other kinds."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from shared.displayed import displayed_markdown
from shared.studies import check_figure, run_job, smoke_fixture

from maskalign_lab.base import paths
from maskalign_lab.measure.wording import NotTrained, difference, interval, verdict
from maskalign_lab.runs import studied_runs
from maskalign_lab.runs.experiments import lengths, load_rows, results_file, run_arms, run_identity
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.studies.maskalign import findings, opening, tables
from maskalign_lab.studies.maskalign.arms import (
    ABLATIONS,
    ARMS,
    CONTROLS,
    HEADLINE,
    ON_REPA,
    SCALES,
    measure_arm,
)
from maskalign_lab.studies.maskalign.measures import load_records
from maskalign_lab.training.methods import METHODS

SAID = {  # by finding: what it says of the rows that ship
    "stability": ["REG's stability gap is .0011", "MaskAlign's +.0001 +/- .0002", "-.0010 +/- .0005 (*reproduced*)"],
    "parts_alone": [
        "mask alone changes the gap by -.0004 +/- .0003 (*lower*)",
        "mixer alone by -.0007 +/- .0005 (*lower*)",
    ],
    "stability_on_repa": [".0026 without MaskAlign and .0005 with it: -.0022 +/- .0004 (*reproduced*)"],
    "carried": [
        "two blocks restores .42. Beside it one block is at -.16 +/- .16 (*lower*)",
        "three are at +.01 +/- .19 (*undecided*, detectable .25)",
        "(`mask the loss`) is at -.18 +/- .07 (*lower*)",
    ],
    "preference": [
        "-.04 +/- .12 (*undecided*, detectable .16) when all",
        "-.09 +/- .17 (*undecided*, detectable .23) under a mask",
    ],
    "dropping": ["+.0027 +/- .0011 (*reproduced*)"],
    "dropping_more": [
        "+.0073 +/- .0048 (*contradicted*) for a half",
        "+.0217 +/- .0089 (*reproduced*) for three quarters",
    ],
    "repair": [
        "+.0028 +/- .0031 (*undecided*, detectable .0042) beside REG",
        "+.0001 +/- .0041 (*undecided*, detectable .0055) beside the mask alone",
        "+.0022 +/- .0021 (*contradicted*) beside the mixer alone",
        "interaction is -.0005 +/- .0028 (*undecided*, detectable .0038)",
    ],
    "depth_of_the_mixer": [
        "one block is at -.0013 +/- .0063 (*undecided*, detectable .0083)",
        "three are at -.0011 +/- .0031 (*undecided*, detectable .0040)",
    ],
    "on_repa": [
        "MaskAlign on REPA is at +.0027 +/- .0022 (*contradicted*)",
        "HASTE at +.0001 +/- .0046 (*undecided*, detectable .0061)",
        "iREPA at +.0011 +/- .0020 (*undecided*, detectable .0026)",
    ],
    "controls": [
        "aligned layer are at -.0017 +/- .0012 (*lower*)",
        "-.0024 +/- .0021 (*lower*) beside two in front",
        "-.0021 +/- .0020 (*lower*) beside MaskAlign",
        "+.0157 +/- .0043 (*higher*) beside REG",
    ],
    "equal_operations": [
        "without a mixer is at -.0098 +/- .0014 (*lower*)",
        "a half at -.0122 +/- .0033 (*lower*)",
        "three quarters at -.0181 +/- .0075 (*lower*)",
        "MaskAlign itself at -.0025 +/- .0031 (*undecided*, detectable .0043)",
    ],
    "equal_operations_on_repa": ["MaskAlign is at -.0030 +/- .0010 (*lower*)"],
}
ASKED = {  # by finding: arm, other, claim, metric and budget of the differences that it states, in order
    "stability": [("MaskAlign", "REG", -1, "gap", "steps")],
    "parts_alone": [(arm, "REG", 0, "gap", "steps") for arm in ("mask, no mixer", "mixer, no mask")],
    "stability_on_repa": [("REPA + MaskAlign", "REPA", -1, "gap", "steps")],
    "dropping": [("mask, no mixer", "REG", +1, "velocity", "steps")],
    "dropping_more": [("ratio 0.5", "REG", -1, "velocity", "steps"), ("ratio 0.75", "REG", +1, "velocity", "steps")],
    "repair": [("MaskAlign", arm, -1, "velocity", "steps") for arm in ("REG", "mask, no mixer", "mixer, no mask")],
    "depth_of_the_mixer": [(arm, "MaskAlign", 0, "velocity", "steps") for arm in ("mixer of 1", "mixer of 3")],
    "on_repa": [(arm, "REPA", -1, "velocity", "steps") for arm in ("REPA + MaskAlign", "HASTE", "iREPA")],
    "controls": [
        ("two blocks behind", "REG", 0, "velocity", "steps"),
        ("two blocks behind", "mixer, no mask", 0, "velocity", "steps"),
        ("mask the loss", "MaskAlign", 0, "velocity", "steps"),
        ("mask the input", "REG", 0, "velocity", "steps"),
    ],
    "augmentation": [
        ("mask the attention", "REG", 0, "velocity", "steps"),
        ("MaskAlign", "mask the attention", 0, "velocity", "steps"),
        ("mask, no mixer", "attention, no mixer", 0, "velocity", "steps"),
    ],
    "equal_operations": [
        (arm, "REG", 0, "velocity", "flops") for arm in ("mask, no mixer", "ratio 0.5", "ratio 0.75", "MaskAlign")
    ],
    "equal_operations_on_repa": [("REPA + MaskAlign", "REPA", 0, "velocity", "flops")],
}


smoke = smoke_fixture("05")


def test_figures_tell_budgets_gaps_and_preference(smoke):
    for name in ("05_filmstrip", "05_arms", "05_preference", "05_influence"):
        side = check_figure(smoke, "05_maskalign", name)
        assert side["by_steps"] and side["gaps"] and side["preference"]


def test_the_table_of_the_job_is_paired_and_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "05_rows.json")
    assert {(row["arm"], row["seed"], row["budget"]) for row in rows} == {
        (arm, seed, budget) for arm in ("REG", "MaskAlign") for seed in (0, 1) for budget in ("steps", "flops")
    }
    assert all(row["reaches dropped"] == 0 for row in rows if row["arm"] == "REG")


@pytest.fixture(scope="module")
def shipped():
    return load_rows(results_file("05_maskalign", "shapes"))


def test_the_table_that_ships_is_paired(shipped):
    """Every arm has its first seeds, three or more, at both budgets, and so has its baseline: a gap would bias a difference."""
    assert {row["arm"] for row in shipped} <= {arm.name for arm in ARMS}
    seeds = {}
    for row in shipped:
        seeds.setdefault((row["arm"], row["budget"]), []).append(row["seed"])
    assert all(sorted(of) == list(range(len(of))) and len(of) >= 3 for of in seeds.values())
    assert all(seeds[arm, "steps"] == seeds[arm, "flops"] for arm, _ in seeds)
    assert all(len(seeds[arm.name, "steps"]) == 5 for arm in HEADLINE)


@pytest.mark.parametrize(("group", "baseline"), [((*HEADLINE, *ABLATIONS, *CONTROLS), "REG"), (ON_REPA, "REPA")])
def test_the_table_that_ships_is_what_todays_recipes_would_train(group, baseline, shipped):
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again."""
    plan = lengths({arm.name: arm.recipe(overrides=SCALES["laptop"].overrides) for arm in group}, baseline)
    for arm in group:
        rows = [row for row in shipped if row["arm"] == arm.name]
        recipes = {row["seed"]: arm.recipe(seed=row["seed"], overrides=SCALES["laptop"].overrides) for row in rows}
        assert {row["identity"] for row in rows} == {
            run_identity(recipe, plan[arm.name]) for recipe in recipes.values()
        }


def test_every_arm_trains_and_is_measured(own_folders):
    """At the smallest size, through the same machinery: methods, controls, and networks whose projector needs the grid."""

    def recipe_of(arm, seed):
        few = "data.n=32 training.batch_size=8 training.warmup=1 training.cooldown=0 training.steps=2"
        return arm.recipe("smoke", "shapes", seed, few)

    for group, baseline in (((*HEADLINE, *ABLATIONS, *CONTROLS), "REG"), (ON_REPA, "REPA")):
        rows = run_arms(group, (0,), recipe_of, baseline, partial(measure_arm, images=8), device="cpu")
        assert {row["arm"] for row in rows} == {arm.name for arm in group}
        assert all(np.isfinite(row["velocity"]) for row in rows)
        assert all(("gap" in row) is (row["arm"] != "iREPA") for row in rows)


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
    """A share of the steps, a share of the teacher's blocks, student blocks that end at the aligned depth; the rest as it is."""
    haste, irepa = (arm.recipe(preset, overrides=SCALES[preset].overrides) for arm in ON_REPA[2:])
    theirs, blocks = make_recipe("haste", "paper"), TEACHER_BLOCKS | {"tiny": tiny_blocks()}
    assert haste.method.stop * theirs.training.steps == theirs.method.stop * haste.training.steps
    teacher, student = haste.method.teacher_blocks, haste.method.student_blocks
    last, pairs = blocks[haste.data.teacher], round(blocks[haste.data.teacher] * 4 / 12)
    assert teacher == tuple(range(last - pairs + 1, last + 1))
    assert student == tuple(range(haste.method.depth - pairs + 1, haste.method.depth + 1))
    assert (haste.method.weight, haste.method.attention_weight) == (
        theirs.method.weight,
        theirs.method.attention_weight,
    )
    assert replace(irepa.method, depth=8) == make_recipe("irepa", "paper").method
    assert irepa.method.depth == haste.method.depth


@pytest.mark.parametrize(("depth", "student", "teacher"), [(1, (1,), (5,)), (2, (1, 2), (4, 5)), (6, (5, 6), (4, 5))])
def test_hastes_blocks_follow_the_aligned_depth(depth, student, teacher):
    told = ON_REPA[2].recipe("laptop", overrides=f"network.depth=6 method.depth={depth}").method
    assert (told.student_blocks, told.teacher_blocks) == (student, teacher)


def tiny_blocks() -> int:
    """How many blocks the teacher that ships has."""
    return json.loads((paths.data() / "teacher" / "shapes" / "card.json").read_text())["network"]["depth"]


@pytest.mark.parametrize("name", SAID)
def test_what_a_finding_says_of_the_rows_that_ship(name, shipped):
    text = getattr(findings, name)(shipped)
    assert all(part in text for part in SAID[name]), text


@pytest.fixture(scope="module")
def made():
    """Rows of every arm with values of no meaning."""
    draw = np.random.default_rng(0)
    return [
        {"arm": arm.name, "seed": seed, "budget": budget, "relative_flops": 1.0}
        | {metric: value for metric, value in zip(("velocity", "gap"), draw.normal(0.2, 0.05, 2), strict=True)}
        for arm in ARMS
        for seed in range(4)
        for budget in ("steps", "flops")
    ]


@pytest.mark.parametrize("name", ASKED)
def test_a_finding_states_value_interval_and_verdict_of_its_arms(name, made):
    text, place = getattr(findings, name)(made), 0
    for arm, other, claim, metric, budget in ASKED[name]:
        found = difference(made, arm, other, metric, budget)
        expected = f"{interval(found)} ({verdict(found, claim)})"
        assert expected in text[place:], (text, expected)
        place = text.index(expected, place) + 1


@pytest.mark.parametrize("name", ASKED)
def test_a_finding_is_left_out_if_an_arm_is_missing(name, made):
    for arm in {arm for asked in ASKED[name] for arm in asked[:2]}:
        with pytest.raises(NotTrained):
            getattr(findings, name)([row for row in made if row["arm"] != arm])


def test_all_findings_of_the_rows_that_ship(shipped):
    """Each of them once, with runs' records and photographs."""
    text = shipped_findings(shipped)
    there = {row["arm"] for row in shipped}
    missing = [name for name, asked in ASKED.items() if not {arm for each in asked for arm in each[:2]} <= there]
    assert text.count("\n* ") + 1 == len(findings.ON_ROWS) + 2 - len(missing)
    assert (f"no rows here: {len(missing)}." in text) == bool(missing)
    assert "At step 7,000, of one seed, MaskAlign's gap is 14 % of REG's" in text
    assert "(CIFAR-10) the gap is 21 % of REG's, a difference of -.0007 +/- .0002 (*reproduced*)" in text
    assert "at +.0032 +/- .0010 (*contradicted*) after equal steps, at -.0007 +/- .0012 (*undecided*, " in text
    assert "Of 33 verdicts luck would decide about 1.7" in text
    assert text.count("undecided") == text.count("undecided*, detectable ")


def test_every_metric_of_the_two_networks_has_a_verdict_with_what_was_detectable(shipped):
    """Gap and preference by the paper's claim, the alignment loss without one, and the interaction among the pairs."""
    with_token, _ = tables.by_class_token(shipped)
    claims = {"alignment": {}, "gap": tables.STEADIER, "peak full": tables.STEADIER}
    table = tables.verdict_table(with_token, claims, ["MaskAlign"])
    assert table["verdict"].tolist() == ["undecided (5 seeds)", "reproduced", "undecided (5 seeds)"]
    repair = tables.repair_table(with_token)
    assert repair["arm"].tolist()[-1] == "interaction" and (repair["detectable"] > repair["+/-"]).all()
    assert repair["difference"].tolist()[-1] == tables.interaction(with_token).mean


def shipped_findings(rows):
    records = {name: load_records(paths.data() / "runs" / name) for name in ("reg-shapes", "maskalign-shapes")}
    return findings.all_findings(rows, load_rows(results_file("05_maskalign", "folder:cifar10/train")), records)


def test_the_notebook_displays_the_findings_of_the_rows_that_ship(shipped):
    assert shipped_findings(shipped) in displayed_markdown(paths.notebooks() / "05_maskalign.ipynb")


def test_a_job_displays_the_findings_of_its_own_rows(smoke):
    rows = load_rows(smoke.path(".html").parent / "05_rows.json")
    photographs = load_rows(results_file("05_maskalign", "folder:cifar10/train"))
    expected = findings.all_findings(rows, photographs, {})
    assert expected in displayed_markdown(smoke.path(".ipynb"))
    assert f"no rows here: {len(findings.ON_ROWS) + 1 - 2}." in expected  # REG and MaskAlign: stability, preference


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
    monkeypatch.setattr(opening, "run_arms", lambda *asked: trained.append(asked) or [len(trained)])
    given = dict(
        preset="gpu", seeds=2, arms="pair repa", overrides="training.steps=9", out_dir=str(tmp_path), device="cpu"
    )
    study = opening.open_study(**given)
    assert opening.table_rows(study) == [1, 2]
    arms, seeds, recipe_of, baseline, _, _, keep, device = trained[1]
    assert (list(seeds), baseline, keep, device) == ([0, 1], "REPA", tmp_path / "05_rows.json", "cpu")
    assert arms == ON_REPA and recipe_of(arms[0], 3).training.steps == 9
    assert opening.open_study(preset="gpu").count == SCALES["gpu"].seeds and opening.open_study().count == 0


def test_a_run_without_class_token_or_mixer_is_studied(tmp_path, after_smoke):
    after_smoke("05")
    path = train(make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64"), tmp_path / "mine", "cpu", 0)
    job = run_job("05", {"preset": "smoke", "run": str(path), "seeds": 1}, tmp_path / "job")
    assert job.status == "ok", job.error


def test_methods_of_the_study_are_installed():
    assert {"maskalign", "mask-loss", "mask-input", "mask-attention"} <= METHODS.keys() and "same-mask" not in METHODS
