"""Study 06: what its smoke run leaves, the runs and tables that ship, and what it says of them."""

from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from shared.displayed import displayed_markdown
from shared.studies import smoke_fixture

from maskalign_lab.ahpa import AHPAConfig
from maskalign_lab.base import paths
from maskalign_lab.measure.verdicts import by_seed, over_metrics
from maskalign_lab.measure.wording import NotTrained, difference, interval, verdict
from maskalign_lab.runs.experiments import Length, load_rows, results_file, run_identity
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.ahpa import findings, opening, router_findings
from maskalign_lab.studies.ahpa.arms import LEVELS, SCALES
from maskalign_lab.studies.ahpa.film import load_film
from maskalign_lab.studies.ahpa.routing import measure_routing
from maskalign_lab.studies.ahpa.tables import (
    claimed_pairs,
    judged_beside_sit,
    leaning_table,
    leanings,
    oracle_note,
    routings,
)

smoke = smoke_fixture("06")


def test_the_tables_of_the_job_are_kept(smoke):
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "06_rows.json")} == {arm.name for arm in SCALES["smoke"].arms}
    assert {row["arm"] for row in load_rows(folder / "06_oracle_rows.json")} >= {
        arm.name for arm in SCALES["smoke"].tried
    }
    assert {row["arm"] for row in load_rows(folder / "06_router_rows.json")} == {
        arm.name for arm in SCALES["smoke"].traced
    }
    film = load_film(folder / "06_film.safetensors")
    np.testing.assert_allclose(film.weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "table",
    [("06_ahpa", "shapes"), ("06_oracle", "shapes"), ("06_ahpa", "shapes", "gpu"), ("06_ahpa", "folder:cifar10/train")],
)
def test_the_tables_that_ship_are_paired(table):
    """Every arm has the first seeds of the arm without alignment, or a difference would compare different trainings."""
    seeds: dict[str, list[int]] = {}
    for row in load_rows(results_file(*table)):
        if row["budget"] == "steps":
            seeds.setdefault(row["arm"], []).append(row["seed"])
    assert seeds["SiT"] and all(found == list(range(len(found))) for found in seeds.values())
    assert all(len(found) <= len(seeds["SiT"]) for found in seeds.values())


def test_the_run_that_ships_is_ahpas():
    """Its levels are fitted anew from the autoencoder that ships, and its heads still know them."""
    run = load_run("ahpa-shapes", device="cpu")
    seen = measure_routing(run, run.images("validation", 32))
    np.testing.assert_allclose(seen.weights.sum(1), 1, rtol=1e-5)
    assert (seen.skill[:5] > 0.7).all() and seen.distance.max() < 0.1


@pytest.mark.parametrize("table", ["06_ahpa", "06_oracle"])
@pytest.mark.parametrize("preset", ["laptop", "gpu"])
def test_the_tables_that_ship_are_what_todays_recipes_would_train(table, preset):
    """`-p seeds 5` finds the rows by the identity of their runs: none is trained again."""
    rows, scale = load_rows(results_file(table, "shapes", preset)), SCALES[preset]
    assert bool(rows) is ((table, preset) != ("06_oracle", "gpu"))
    recipe_of = scale.recipe_of(preset, "shapes", scale.oracle if table == "06_oracle" else "")
    arms = {arm.name: arm for arm in (*scale.arms, *scale.tried)}
    trainings: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        trainings.setdefault((row["arm"], row["seed"]), {})[row["budget"]] = row
    for (arm, seed), budgets in trainings.items():
        recipe = recipe_of(arms[arm], seed)
        length = Length(budgets["steps"]["step"], budgets["flops"]["step"])
        assert length.steps == recipe.training.steps
        assert {row["identity"] for row in budgets.values()} == {run_identity(recipe, length)}, (arm, seed)


LEARNED = {"AHPA": AHPAConfig(), "bilevel": AHPAConfig(router="bilevel")}
SAID = {  # by finding: what it says of the rows that ship
    "helps": [
        "loss is .5281 and SiT's .5386, a difference of -.0105 +/- .0037 (*reproduced*)",
        "A step costs 7 % more; after equal operations the difference is -.0041 +/- .0032 (*lower*)",
    ],
    "baselines": [
        "SRA 2 is at -.0012 +/- .0048 (*undecided*, detectable .0064)",
        "REPA at +.0010 +/- .0069 (*undecided*, detectable .0091)",
    ],
    "judged": [
        "distance differs by -1.3 +/- 1.0 (*reproduced*)",
        "coarse to fine by -1.7 +/- 1.0 (*lower*)",
        "Floor 2.1; distances are 4.9 times theirs or more; wanted class seen: 0.07 to 0.13",
    ],
    "adapts": [
        "Beside equal weights AHPA is at -.0007 +/- .0013 (*undecided*, detectable .0018)",
        "-.0001 +/- .0023 (*undecided*, detectable .0032) beside its reverse",
        "+.0004 +/- .0006 (*undecided*, detectable .0009) beside equal weights",
    ],
    "adapts_by_judge": [
        "AHPA differs by -.11 +/- .26 (*undecided*, detectable .35) from equal weights'",
        "coarse to fine by -.40 +/- .40 (*reproduced*) from its reverse's and by -.44 +/- .36 (*reproduced*)",
    ],
    "choices": [
        "is at -.0095 +/- .0037 (*lower*) beside SiT",
        "*smooth L1* at -.0062 +/- .0059 (*lower*)",
        "*averaged levels* at -.0034 +/- .0070 (*undecided*, detectable .0092)",
    ],
    "single_levels": [
        "`down.0` at -.0122 +/- .0070 (*lower*)",
        "`down.1` at -.0071 +/- .0091 (*undecided*, detectable .0120)",
        "`mid` at -.0118 +/- .0110 (*lower*)",
        "`latent` at -.0053 +/- .0063 (*undecided*, detectable .0083)",
        "AHPA is at +.0009 +/- .0037 (*undecided*, detectable .0048) beside `down.0`",
        "-.0042 +/- .0031 (*reproduced*) beside `down.1`",
        "+.0005 +/- .0027 (*undecided*, detectable .0036) beside `mid`",
        "-.0060 +/- .0052 (*reproduced*) beside `latent`",
    ],
    "follows": ["Of its weight 1.7 +/- .4 % lies elsewhere", "3.7 +/- .6 % elsewhere"],
    "fluctuates": ["the slope was -.20 at step 745 and -.11 at 800, that of the closed form -.13 and -.12"],
    "leans": [
        "has .35 of the weight near the data, .14 to .18 in the noisy half",
        "slope -.135 +/- .027, ends less middle +.061 +/- .010 (*bends*, minimum near t = .65)",
        "without the latent slope -.024 +/- .018, ends less middle +.028 +/- .009 (*bends*, minimum near t = .55)",
    ],
    "bilevel": [
        "`down.0` with .43, `latent` with .47, `down.1` with .49 of the weight, of which 17, 19, 9 % moved on",
        "slope +.001 +/- .003, ends less middle -.000 +/- .000 (*undecided*, detectable .004)",
        "at -.0078 +/- .0072 (*lower*) beside SiT, at +.0035 +/- .0037 (*undecided*, detectable .0048) beside AHPA",
        "a step costs 29 % more",
    ],
    "pulls": [
        "`latent` has at least 1.00 of the weight at all times",
        "within .022 of equal ones",
        "the router has .57 on `down.0` near the data and .46 on `latent` in the noise",
    ],
    "classes": ["differ by .088 of the weight"],
    "when": [
        "middle of the times the loss changes by -.6 %, -1.1 %, -.9 %",
        "clean end by -.2 %, -1.2 %, -.2 %",
        "noisy end by +.5 %, +1.2 %, +.2 %",
    ],
    "which": [
        "`down.0` changes the loss by -2.0 +/- .6 %, `latent` by -.0 +/- 2.0 %",
        "-.0008 +/- .0068 for `down.1` (*undecided*, detectable .0089)",
        "-.0008 +/- .0065 for `mid` (*undecided*, detectable .0085)",
        "-.0007 +/- .0085 for `latent` (*undecided*, detectable .0112)",
    ],
    "ranks": ["is -.4 near the data, +1.0 in the middle and +.8 in the noise"],
    "larger_gain": [
        "at -.0030 +/- .0049 (*undecided*, detectable .0066) beside SiT's .3685",
        "a gain of .8 % of the loss where the small network has 1.9 %",
        "after equal operations at +.0017 +/- .0046 (*undecided*, detectable .0061)",
    ],
    "larger_arms": [
        "Equal weights are at -.0033 +/- .0053 (*undecided*, detectable .0071)",
        "fine to coarse at -.0024 +/- .0072 (*undecided*, detectable .0096)",
        "coarse to fine at -.0037 +/- .0024 (*lower*)",
        "AHPA is at +.0003 +/- .0010 (*undecided*, detectable .0013) beside equal weights",
        "its distance of 3.9 differs by -.2 +/- .7 (*undecided*, detectable .9)",
    ],
    "larger_router": [
        "to .9 +/- .6 % of its weight",
        "slope -.075 +/- .025, ends less middle +.027 +/- .008 (*bends*, minimum near t = .75)",
        "without the latent slope -.044 +/- .012, ends less middle -.001 +/- .005 (*bends*, minimum near t = .85)",
    ],
    "photographs": [
        "AHPA is at -.0030 +/- .0215 (*undecided*, detectable .0283) beside SiT",
        "equal weights at -.0031 +/- .0215 (*undecided*, detectable .0283)",
        "has .37 of the weight on `latent` near the data, .11 in the middle",
        "slope -.154 +/- .051, ends less middle +.076 +/- .023 (*bends*, minimum near t = .55)",
    ],
}


@pytest.fixture(scope="module")
def tables():
    """What ships: rows of arms, of the oracle, of routers along their training, of a larger network, of photographs."""
    names = {"arms": ("06_ahpa", "shapes"), "oracle": ("06_oracle", "shapes"), "traces": ("06_router", "shapes")}
    names |= {"larger": ("06_ahpa", "shapes", "gpu"), "photographs": ("06_ahpa", "folder:cifar10/train")}
    return {name: load_rows(results_file(*table)) for name, table in names.items()}


@pytest.fixture(scope="module")
def learned(tables):
    """What became of the routers of each table of arms."""
    return {name: routings(tables[name], LEARNED) for name in ("arms", "larger", "photographs")}


@pytest.fixture(scope="module")
def asked(tables, learned):
    """What each finding is made from."""
    rows, oracle, traces, larger, photographs = tables.values()
    ahpa = {name: each["AHPA"] for name, each in learned.items()}
    return {name: (rows,) for name in ("helps", "baselines", "judged", "adapts", "adapts_by_judge", "choices")} | {
        "single_levels": (rows, LEVELS),
        "follows": (ahpa["arms"],),
        "fluctuates": (rows, LEARNED["AHPA"]),
        "leans": (ahpa["arms"],),
        "bilevel": (rows, learned["arms"]["bilevel"]),
        "pulls": (traces, LEVELS),
        "classes": (traces,),
        "when": (oracle, LEVELS),
        "which": (oracle, LEVELS),
        "ranks": (oracle, ahpa["arms"]),
        "larger_gain": (larger, rows),
        "larger_arms": (larger,),
        "larger_router": (ahpa["larger"],),
        "photographs": (photographs, ahpa["photographs"]),
    }


def finding(name: str, *given) -> str:
    return getattr(findings if hasattr(findings, name) else router_findings, name)(*given)


@pytest.mark.parametrize("name", SAID)
def test_what_a_finding_says_of_the_rows_that_ship(name, asked):
    text = finding(name, *asked[name])
    assert all(part in text for part in SAID[name]), text


ARM_PAIRS = {  # by finding: arm, other, claim, metric, budget, digits of the differences that it states, in order
    "helps": [("AHPA", "SiT", -1, "velocity", "steps", 4), ("AHPA", "SiT", 0, "velocity", "flops", 4)],
    "baselines": [(arm, "SiT", -1, "velocity", "steps", 4) for arm in ("SRA 2", "REPA")],
    "judged": [("AHPA", "SiT", -1, "frechet", "steps", 1), ("coarse to fine", "SiT", 0, "frechet", "steps", 1)],
    "adapts": [
        ("AHPA", "uniform", -1, "velocity", "steps", 4),
        ("coarse to fine", "fine to coarse", -1, "velocity", "steps", 4),
        ("coarse to fine", "uniform", -1, "velocity", "steps", 4),
    ],
    "adapts_by_judge": [
        ("AHPA", "uniform", -1, "frechet", "steps", 2),
        ("coarse to fine", "fine to coarse", -1, "frechet", "steps", 2),
        ("coarse to fine", "uniform", -1, "frechet", "steps", 2),
    ],
    "choices": [(arm, "SiT", 0, "velocity", "steps", 4) for arm in ("target mixing", "smooth L1", "averaged levels")],
    "single_levels": [(f"{level} alone", "SiT", 0, "velocity", "steps", 4) for level in LEVELS]
    + [("AHPA", f"{level} alone", -1, "velocity", "steps", 4) for level in LEVELS],
}


@pytest.fixture(scope="module")
def made():
    """Rows of every arm with values of no meaning."""
    draw = np.random.default_rng(0)
    return [
        {"arm": arm.name, "seed": seed, "budget": budget, "relative_flops": 1.0, "velocity": 0.2 + 0.05 * draw.normal()}
        | {"frechet": 10 + draw.normal(), "frechet floor": 2.0, "accuracy": 0.1}
        for arm in SCALES["laptop"].arms
        for seed in range(4)
        for budget in ("steps", "flops")
    ]


@pytest.mark.parametrize("name", ARM_PAIRS)
def test_a_finding_states_value_interval_and_verdict_of_its_arms(name, made):
    text, place = finding(name, made, *[LEVELS] * (name == "single_levels")), 0
    for arm, other, claim, metric, budget, digits in ARM_PAIRS[name]:
        found = difference(made, arm, other, metric, budget)
        expected = f"{interval(found, digits)} ({verdict(found, claim, digits)})"
        assert expected in text[place:], (text, expected)
        place = text.index(expected, place) + 1


@pytest.mark.parametrize("name", ARM_PAIRS)
def test_a_finding_is_left_out_if_an_arm_is_missing(name, made):
    for arm in {arm for pair in ARM_PAIRS[name] for arm in pair[:2]}:
        with pytest.raises(NotTrained):
            finding(name, [row for row in made if row["arm"] != arm], *[LEVELS] * (name == "single_levels"))


def test_findings_on_routers_need_their_rows(tables, learned):
    oracle, traces, ahpa = tables["oracle"], tables["traces"], learned["arms"]["AHPA"]
    some = [row for row in oracle if not row["arm"].startswith("mid")]
    few = [row for row in traces if row["arm"] != "tau 0.5" and row["class"] == "all"]
    missing = {"when": (some, LEVELS), "which": (some, LEVELS), "ranks": (some, ahpa), "pulls": (few, LEVELS)}
    missing |= {"classes": (few,), "fluctuates": ([], LEARNED["AHPA"])}
    for name, given in missing.items():
        with pytest.raises(NotTrained):
            finding(name, *given)


def test_numbers_of_routers_are_those_of_arithmetic(tables, learned):
    """Against the rows themselves: what moved on, and the slopes."""
    rows = [row for row in tables["arms"] if row["arm"] == "bilevel"]
    for seed, share in enumerate(router_findings.moved(tables["arms"], "bilevel")):
        ends = [np.mean(row["weights"], 0) for row in rows if row["seed"] == seed]
        assert share == pytest.approx(np.abs(ends[0] - ends[1]).sum() / 2)
    each = learned["arms"]["AHPA"]
    whole, without = leanings(each).values()
    assert whole.slope.mean == pytest.approx(np.mean([one.coarseness() for one in each]))
    assert without.slope.mean == pytest.approx(np.mean([one.coarseness(("latent",)) for one in each]))
    assert leaning_table(each)["slope"].tolist() == [whole.slope.mean, without.slope.mean]


def test_a_router_whose_weights_bend_has_no_slope_for_a_verdict(learned):
    """The place of the weights is coarse near the data and in the noise, and finest between, with and without the latent."""
    for name, place in (("arms", (0.65, 0.55)), ("larger", (0.75, 0.85)), ("photographs", (0.55, None))):
        for found, at in zip(leanings(learned[name]["AHPA"]).values(), place, strict=True):
            assert at is None or (found.turns and found.point == "minimum" and found.at == pytest.approx(at))
    table = leaning_table(learned["arms"]["AHPA"])
    assert table["verdict"].str.startswith("bends").all() and (table["slope"] < 0).all()


def test_the_oracle_says_what_luck_decides_and_what_it_could_have_seen(tables):
    assert oracle_note(tables["oracle"], LEVELS) == (
        "Of 36 verdicts luck would decide about 1.8 if there were nothing to be seen. "
        "Detectable are changes of 0.2 to 3.4 % and more, by cell."
    )
    one = [row for row in tables["oracle"] if row["seed"] == 0]
    assert oracle_note(one, LEVELS) == "Nothing here has paired seeds that could decide it."


def prose() -> str:
    book = nbformat.read(paths.notebooks() / "06_ahpa.ipynb", as_version=4)
    return " ".join(" ".join(cell.source for cell in book.cells if cell.cell_type == "markdown").split())


def test_what_the_prose_says_of_adapting_is_what_the_rows_say_on_every_metric(tables):
    table = over_metrics(tables["arms"], claimed_pairs(LEVELS)).set_index(["metric", "arm", "beside"])["verdict"]
    words = table.str.split().str[0].sort_index()
    assert (words[:, "AHPA", "uniform"] == "undecided").all()
    assert (words["velocity", "coarse to fine"] == "undecided").all()
    assert (words["frechet", "coarse to fine"] == "reproduced").all()
    alone = {level: words["velocity", "AHPA", f"{level} alone"] for level in LEVELS}
    means = {level: np.mean(list(by_seed(tables["arms"], "velocity")[f"{level} alone"].values())) for level in LEVELS}
    best = sorted(means, key=means.get)
    assert [alone[level] for level in best] == ["undecided"] * 2 + ["reproduced"] * 2
    assert len(table) == 27  # of which luck decides about one, as the text says
    least = over_metrics(tables["arms"], [("AHPA", "uniform", -1)]).set_index("metric")["detectable"]
    gain = over_metrics(tables["arms"], [("AHPA", "SiT", -1)]).set_index("metric")["difference"].abs()
    assert (least[["velocity", "frechet"]] < 0.3 * gain[["velocity", "frechet"]]).all()
    text = prose()
    assert "AHPA beside equal weights is undecided by every metric, and what was detectable by the loss and by" in text
    assert "**Coarse to fine** is undecided by the loss, beside equal weights and beside its reverse" in text
    assert "by the judge's distance it is nearer to real images than both" in text
    assert "its weights do not grow coarser with the noise, they bend" in text


def test_what_the_prose_says_of_the_larger_scale_is_what_its_rows_say(tables):
    judged = judged_beside_sit(tables["larger"], {}).dropna()["verdict"]
    pairs = over_metrics(tables["larger"], claimed_pairs(LEVELS), ("velocity", "frechet", "accuracy"))["verdict"]
    assert judged.str.startswith("undecided").all() and not pairs.isin(("reproduced", "contradicted", "lower")).any()
    assert "nor does the judge decide between any of these" in prose()


def test_how_many_seeds_stand_behind_an_arm(tables):
    many = ("SiT", "AHPA", "uniform", "coarse to fine", "fine to coarse")
    seeds = {arm: len(of) for arm, of in by_seed(tables["arms"], "velocity").items()}
    assert seeds == {arm: 5 if arm in many else 3 for arm in seeds}
    judged = [row for row in tables["arms"] if "frechet" in row and row["budget"] == "steps"]
    assert len(judged) == sum(seeds.values())


def shipped_lists(tables, learned) -> list[str]:
    """What the study displays of the rows that ship."""
    rows, oracle, traces, larger, photographs = tables.values()
    return [
        router_findings.of_routers(rows, learned["arms"], LEARNED["AHPA"], traces),
        findings.of_arms(rows, LEVELS),
        router_findings.of_the_oracle(oracle, LEVELS, learned["arms"]),
        router_findings.elsewhere(rows, larger, learned["larger"]["AHPA"], photographs, learned["photographs"]["AHPA"]),
    ]


def test_nothing_is_left_out_of_the_rows_that_ship(tables, learned):
    lists = shipped_lists(tables, learned)
    assert [text.count("\n* ") + 1 for text in lists] == [6, 7, 3, 4]
    assert not any("no rows here" in text for text in lists)


def test_the_notebook_displays_the_findings_of_the_rows_that_ship(tables, learned):
    shown = displayed_markdown(paths.notebooks() / "06_ahpa.ipynb")
    assert all(text in shown for text in shipped_lists(tables, learned))


def test_a_job_displays_the_findings_of_its_own_rows(smoke):
    rows, scale = load_rows(smoke.path(".html").parent / "06_rows.json"), SCALES["smoke"]
    text = findings.of_arms(rows, scale.levels)
    assert text in displayed_markdown(smoke.path(".ipynb")) and "**Does it help?**" in text


def test_what_is_said_of_levels_is_what_their_table_says():
    table = pd.DataFrame({
        "level": ["down.0", "mid", "(the teacher)", "(chance)"],
        "inside cells": [0.175, 0.14, np.nan, np.nan],
        "of that kept": [0.76, 1.0, np.nan, np.nan],
        "cycles per image": [3.35, 2.04, np.nan, np.nan],
        "as aligned": [2.56, 2.46, np.nan, np.nan],
        "class probe": [0.129, 0.119, 0.35, 0.102],
        "CKNNA to the teacher": [0.138, 0.108, 1.0, 0.024],
    })  # fmt: skip
    text = findings.fineness(table) + findings.meaning(table)
    for part in (
        "3.4 for `down.0`, 2.0 for `mid`",
        "Between tokens the levels have 2.5 to 2.6",
        "lie 14 to 18 % of a level's variance",
        "keep 76 % of the first level and 100 % of the last",
        "names 12 to 13 % of the classes (chance: 10 %)",
        "most with `down.0` and least with `mid` (CKNNA .14 and .11; .02 by chance)",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"run": "mine"}, {"mine": "mine"}),
        ({"seed": 1}, ["AHPA", "bilevel", "coarse to fine"]),
        ({"seeds": 1}, ["AHPA", "bilevel", "coarse to fine"]),
        ({"dataset": "digits"}, ["AHPA", "bilevel", "coarse to fine"]),
        ({"preset": "smoke"}, ["AHPA", "bilevel"]),
    ],
)
def test_which_runs_a_film_is_made_of(given, expected, monkeypatch):
    """The film that ships is shown for the preset's defaults alone; nothing that was asked for is ignored."""
    shown = []
    loaded = SimpleNamespace(recipe=make_recipe("ahpa", "smoke", overrides="method.levels=down.0,mid"))
    monkeypatch.setattr(opening, "load_run", lambda name, device: loaded)
    monkeypatch.setattr(opening, "check_ahpa", lambda run: None)
    monkeypatch.setattr(opening, "trained_runs", lambda recipes, device: dict(recipes))
    monkeypatch.setattr(opening, "film_of", lambda runs, times, keep: shown.append(runs))
    study = opening.open_study(**given)
    assert shown == [None] if expected is None else list(shown[0]) == list(expected)
    assert study.scale.levels == (("down.0", "mid") if "run" in given else LEVELS)
    assert study.settings.training.seed == given.get("seed", 0)


def test_overrides_and_folders_reach_the_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "trained_runs", lambda recipes, device: recipes)
    monkeypatch.setattr(opening, "film_of", lambda runs, times, keep: keep)
    trained = []
    monkeypatch.setattr(opening, "run_arms", lambda *asked: trained.append(asked) or [])
    study = opening.open_study("laptop", seeds=4, overrides="method.tau=0.5", out_dir=str(tmp_path), device="cpu")
    assert study.film == tmp_path / "06_film.safetensors"
    opening.table_rows(study, [])
    opening.oracle_rows(study, [])
    for (arms, seeds, recipe_of, baseline, _, known, keep, device), count, name, steps in zip(
        trained, (4, 3), ("06_rows.json", "06_oracle_rows.json"), (800, 400), strict=True
    ):
        assert (list(seeds), baseline, known, keep, device) == (list(range(count)), "SiT", [], tmp_path / name, "cpu")
        ahpa = next(arm for arm in arms if arm.method == "ahpa")
        recipe = recipe_of(ahpa, 0)
        assert recipe.training.steps == steps and recipe.method.tau == 0.5
    assert opening.table_cost(study, []).startswith("tables: 15 arms x 4 seeds x 800 steps; oracle: 13 x 3 x 400;")
