"""Study 06: what its smoke run leaves, the runs and tables that ship, and what it says of them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from shared.displayed import displayed_markdown, section_prose
from shared.studies import smoke_fixture

from maskalign_lab.ahpa import AHPAConfig
from maskalign_lab.base import paths
from maskalign_lab.measure.courses import METRICS
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.verdicts import over_metrics
from maskalign_lab.measure.wording import NotTrained, difference, interval, plain
from maskalign_lab.runs import rung
from maskalign_lab.runs.building import build
from maskalign_lab.runs.experiments import Length, load_rows, results_file, run_identity
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.rung import EARLY, table_seeds
from maskalign_lab.studies import shipped_runs
from maskalign_lab.studies.ahpa import findings, opening, router_findings, tables
from maskalign_lab.studies.ahpa.arms import BASELINES, LEVELS, SCALES, WINDOWS, larger_recipe, oracle_arm
from maskalign_lab.studies.ahpa.film import load_film
from maskalign_lab.studies.ahpa.routing import TIMES, measure_routing

smoke = smoke_fixture("06")
BOOK = paths.notebooks() / "06_ahpa.ipynb"
ARMS = [arm.name for arm in SCALES["laptop"].arms]
LEARNED = {"AHPA": AHPAConfig(), "bilevel": AHPAConfig(router="bilevel")}


@cache
def shipped(table: str = "06_ahpa", preset: str = "laptop") -> list[dict]:
    """Rows that ship; those of the oracle and of traces may be missing."""
    return load_rows(results_file(table, "shapes", preset))


def test_the_tables_of_the_job_are_kept(smoke):
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "06_rows.json")} == {arm.name for arm in SCALES["smoke"].arms}
    assert {row["arm"] for row in load_rows(folder / "06_oracle_rows.json")} >= {
        arm.name for arm in SCALES["smoke"].tried
    }
    assert {row["arm"] for row in load_rows(folder / "06_router_rows.json")} == {
        arm.name for arm in SCALES["smoke"].traced
    }
    film = load_film(folder / "06_film.npz")
    np.testing.assert_allclose(film.weights.sum(-1), 1, rtol=1e-5)


# ---- what ships


def unpaired(rows: Sequence[dict], first: int) -> list[str]:
    """Arms that have other seeds than the first ones of the arm without alignment."""
    seeds: dict[str, list[int]] = {"SiT": []}
    for row in rows:
        if row["budget"] == "steps":
            seeds.setdefault(row["arm"], []).append(row["seed"])
    wanted = list(range(first, first + len(seeds["SiT"])))
    return [arm for arm, found in seeds.items() if sorted(found) != wanted[: len(found)]]


@pytest.mark.parametrize(
    ("table", "preset", "first"), [("06_ahpa", "laptop", 5), ("06_oracle", "laptop", 5), ("06_ahpa", "gpu", 0)]
)
def test_the_tables_that_ship_are_paired(table, preset, first):
    """Or a difference would compare different trainings."""
    assert (preset == "gpu" or first == table_seeds(1)[0]) and not unpaired(shipped(table, preset), first)
    other = [{"arm": arm, "seed": seed, "budget": "steps"} for arm, seed in (("SiT", first), ("AHPA", first + 1))]
    assert unpaired(other, first) == ["AHPA"] and not unpaired(other[:1], first)


def test_every_arm_that_has_rows_has_three_metrics_at_three_looks():
    looks: dict[tuple[str, int], set[str]] = {}
    for row in shipped():
        assert {*METRICS, "velocity per t", "frechet floor"} <= row.keys(), (row["arm"], row["seed"])
        looks.setdefault((row["arm"], row["seed"]), set()).add((row["budget"], row["step"]))
    assert looks and {arm for arm, _ in looks} <= {*ARMS}
    for of in looks.values():
        steps = {budget: {step for name, step in of if name == budget} for budget in ("early", "steps", "flops")}
        assert steps["early"] == {333, 667} and steps["steps"] == {1000} and len(steps["flops"]) == 1


TABLES = {  # what ships -> the recipe of an arm and a seed, all arms, and the looks on the way
    "06_ahpa": (SCALES["laptop"].recipe_of("laptop", "shapes"), SCALES["laptop"].arms, EARLY),
    "06_oracle": (SCALES["laptop"].recipe_of("laptop", "shapes", SCALES["laptop"].oracle), SCALES["laptop"].tried, ()),
    "06_ahpa gpu": (larger_recipe, SCALES["gpu"].arms, ()),
}


def length_of(steps: int, flops: int, early: Sequence[float]) -> Length:
    return Length(steps, flops, early=tuple(round(share * steps) for share in early))


def strangers(rows: Sequence[dict], table: str) -> list[tuple[str, int]]:
    """Trainings of a table that today's recipes would not find by their identity."""
    recipe_of, arms, early = TABLES[table]
    named, trainings = {arm.name: arm for arm in (BASELINES[0], *arms)}, {}
    for row in rows:
        trainings.setdefault((row["arm"], row["seed"]), []).append(row)
    found = []
    for (arm, seed), of in trainings.items():
        recipe, ends = recipe_of(named[arm], seed), {row["budget"]: row["step"] for row in of}
        name = run_identity(recipe, length_of(ends["steps"], ends["flops"], early))
        if ends["steps"] != recipe.training.steps or {row["identity"] for row in of} != {name}:
            found.append((arm, seed))
    return found


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_that_ship_are_what_todays_recipes_would_train(table):
    """`-p seeds 5` finds the rows by the identity of their runs: none is trained again."""
    rows = shipped(*table.split())
    assert (rows or table == "06_oracle") and not strangers(rows, table)
    recipe_of, arms, early = TABLES[table]
    recipe = recipe_of(arms[1], 5)
    ends = {"steps": recipe.training.steps, "flops": recipe.training.steps - 9}
    assert ends["steps"] == {"06_ahpa": 1000, "06_oracle": 500, "06_ahpa gpu": 1200}[table]
    name = run_identity(recipe, length_of(*ends.values(), early))
    mine = [{"arm": arms[1].name, "seed": 5, "budget": b, "step": at, "identity": name} for b, at in ends.items()]
    assert not strangers(mine, table) and strangers([row | {"seed": 6} for row in mine], table) == [(arms[1].name, 6)]


def test_the_run_that_ships_is_ahpas():
    """Its levels are fitted anew from the autoencoder that ships, and its heads still know them."""
    run = load_run("ahpa-shapes", device="cpu")
    seen = measure_routing(run, run.images("validation", 32))
    np.testing.assert_allclose(seen.weights.sum(1), 1, rtol=1e-5)
    assert (seen.skill[:5] > 0.7).all() and seen.distance.max() < 0.1


def test_film_and_traces_are_of_the_scale_of_the_tables():
    film = load_film(paths.data() / "results" / "06_film.npz")
    assert film.runs == list(opening.SHOWN) and film.levels == LEVELS and len(film.times) == SCALES["laptop"].times
    assert film.noised.shape[2:] == (32, 32, 3) and film.maps.shape[2:] == (4, 4, 3)
    traces = shipped("06_router")
    steps = {arm.name: {row["step"] for row in traces if row["arm"] == arm.name} for arm in SCALES["laptop"].traced}
    assert not traces or all(each == set(range(125, 1001, 125)) for each in steps.values())


@pytest.mark.parametrize("name", ["ahpa-routers", "ahpa-oracle"])
def test_one_command_makes_what_ships_of_routers_and_oracle(name, monkeypatch, tmp_path):
    done, seven = [], {}
    monkeypatch.setattr(
        opening, "router_traces", lambda arms, of, *more: done.append((arms, of, more)) or [{"arm": "a"}]
    )
    monkeypatch.setattr(opening, "trained_runs", lambda recipes, device: seven.update(recipes) or recipes)
    monkeypatch.setattr(opening, "film_of", lambda runs, times, keep: done.append((list(runs), times, keep)))
    monkeypatch.setattr(opening, "run_arms", lambda *asked: done.append(asked))
    made = shipped_runs.make(name, out=tmp_path, device="cpu")
    if name == "ahpa-routers":
        (arms, recipe_of, told), (runs, times, keep) = done
        assert (
            arms == SCALES["laptop"].traced
            and told == (0, SCALES["laptop"].images, "cpu")
            and recipe_of(arms[0], 0) == seven["AHPA"]
        )
        assert (runs, times, keep) == (list(opening.SHOWN), 11, tmp_path / "06_film.npz") and made == tmp_path
        assert load_rows(tmp_path / "06_router_shapes.json") == [{"arm": "a"}]
    else:
        ((arms, seeds, recipe_of, baseline, _, known, keep, device),) = done
        assert len(arms) == 13 and list(seeds) == [5, 6, 7] and (baseline, known, device) == ("SiT", (), "cpu")
        assert recipe_of(arms[1], 5).training.steps == 500 and made == keep == tmp_path / "06_oracle_shapes.json"


# ---- what is said of arms


def of_router(draw: np.random.Generator, slope: float) -> dict:
    """What a row holds of a router whose mean place rises by a slope, at any times, with noise; and a closed form nearby."""
    place = slope * np.array(TIMES)
    weights = np.stack([0.4 - 0.3 * place, 0.3 - 0.1 * place, 0.2 + 0.1 * place, 0.1 + 0.3 * place], 1)
    noisy, closed = (abs(weights + 0.004 * draw.normal(size=weights.shape)) for _ in range(2))
    given = {"weights": noisy, "closed form": closed, "level losses": 0.5 + 0 * weights}
    return {
        name: (of / of.sum(1, keepdims=True) if "lev" not in name else of).tolist() for name, of in given.items()
    } | {"constant": [0.9] * 4}


@cache
def made() -> list[dict]:
    """Rows of every arm with values of no meaning, but for routers, whose mean place rises."""
    draw = np.random.default_rng(0)
    rows = []
    for arm, seed, budget in product(ARMS, range(5, 9), ("steps", "flops")):
        row = {"arm": arm, "seed": seed, "budget": budget, "step": {"steps": 1000, "flops": 950}[budget]}
        row |= {"relative_flops": 1.0, "velocity": 0.2 + 0.05 * draw.normal(), "frechet": 10 + draw.normal()}
        row |= {"frechet floor": 2.0, "accuracy": 0.2 + 0.05 * draw.normal()}
        rows.append(row | (of_router(draw, 0.5) if arm in LEARNED else {}))
    return rows


def without(*arms: str) -> list[dict]:
    return [row for row in made() if row["arm"] not in arms]


ASKED = {  # a finding about two arms -> how it is made; arm, other, claim, metric, digits
    "helps": (findings.helps, ("AHPA", "SiT", -1, "velocity", 4)),
    "helps by distance": (partial(findings.helps, metric="frechet"), ("AHPA", "SiT", -1, "frechet", 2)),
    "helps by accuracy": (partial(findings.helps, metric="accuracy"), ("AHPA", "SiT", +1, "accuracy", 3)),
    "beside REPA": (findings.beside_repa, ("AHPA", "REPA", 0, "accuracy", 3)),
    "adapts": (findings.adapts, ("AHPA", "uniform", -1, "velocity", 4)),
    "order": (findings.order, ("coarse to fine", "fine to coarse", -1, "velocity", 4)),
    "larger": (findings.larger, ("AHPA", "SiT", -1, "velocity", 4)),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_finding_states_value_interval_and_verdict_of_its_arms(name):
    make, (arm, other, sign, metric, digits) = ASKED[name]
    for rows in (made(), shipped(preset="gpu") if name == "larger" else made()):
        found, said = difference(rows, arm, other, metric), make(rows)
        assert said.effect == interval(found, digits) and said.detectable == plain(found.detectable, digits)
        assert said.verdict == f"{found.verdict(sign).split()[0]} ({found.seeds} seeds)" and said.verdicts == 1
    for missing in (arm, other):
        with pytest.raises(NotTrained):
            make(without(missing))


def test_a_larger_distance_and_a_lower_accuracy_contradict():
    worse = [row | {"frechet": 12 + row["seed"] / 99, "accuracy": 0.1 - row["seed"] / 999} if row["arm"] == "AHPA"
             else row | {"frechet": 9.0, "accuracy": 0.3} for row in made()]  # fmt: skip
    assert all(findings.helps(worse, metric).verdict == "contradicted (4 seeds)" for metric in ("frechet", "accuracy"))


def test_all_pairs_of_which_the_paper_claims_something_are_counted():
    """Eight pairs by three metrics, and no verdict of a single seed or of arms without rows."""
    said = findings.all_pairs(made(), LEVELS)
    words = (
        over_metrics(made(), [pair for pair in tables.claimed_pairs(LEVELS) if pair[2]])["verdict"].str.split().str[0]
    )
    assert said.effect.startswith(f"{(words == 'reproduced').sum()} of 24 reproduced, ")
    assert said.verdict == f"{(words == 'contradicted').sum()} contradicted" and "one seed" not in said.question
    assert said.verdicts == 22  # the losses of two pairs are decided in rows of their own
    some = findings.all_pairs(without("SRA 2", "mid alone"), LEVELS)
    assert " of 18 reproduced, 0 of them beside SRA 2" in some.effect and some.verdicts == 16
    lone = [row for row in made() if row["seed"] == 5 or not row["arm"].endswith("alone")]
    assert "(12 more have one seed)" in findings.all_pairs(lone, LEVELS).question
    for rows in ([row for row in made() if row["seed"] == 5], []):
        with pytest.raises(NotTrained):
            findings.all_pairs(rows, LEVELS)


def test_arms_stand_beside_sit_by_every_metric_and_at_both_budgets():
    for budget, claimed in (("steps", "reproduced"), ("flops", "lower")):
        table = tables.beside_sit(made(), {"AHPA": -1}, budget)
        assert list(table.index) == ARMS and [*dict.fromkeys(table.columns.get_level_values(0))] == [
            "",
            *METRICS.values(),
        ]
        for metric, name in METRICS.items():
            found = difference(made(), "REPA", "SiT", metric, budget)
            assert table.loc["REPA", (name, "difference")] == pytest.approx(found.mean, abs=6e-3)
            assert table.loc["REPA", (name, "verdict")] == found.verdict(0)
        lower = [
            row | {"velocity": 0.1 + row["seed"] / 99} if row["arm"] == "AHPA" else row | {"velocity": 0.9}
            for row in made()
        ]
        assert tables.beside_sit(lower, {"AHPA": -1}, budget).loc["AHPA", ("velocity loss", "verdict")] == claimed
    alone = tables.beside_sit(
        [{key: v for key, v in row.items() if key not in ("frechet", "accuracy")} for row in made()], {}
    )
    assert [*dict.fromkeys(alone.columns.get_level_values(0))] == ["", "velocity loss"]  # photographs have no judge


# ---- what is said of routers


def routers(rows: Sequence[dict]) -> dict[str, list]:
    return tables.routings(rows, LEARNED)


def test_a_router_that_rises_is_said_to():
    each = routers(made())["AHPA"]
    rising = findings.leans(each)
    assert tables.lean_words(tables.leanings(each)["all levels"], +1).startswith("has slope +")
    assert rising.verdict == "reproduced (4 seeds)" and rising.effect.startswith("slope +") and rising.verdicts == 1
    falling = [SimpleNamespace(times=one.times, place=lambda left, one=one: -one.place(left)) for one in each]
    assert findings.leans(falling).verdict == "contradicted (4 seeds)"


def test_a_router_whose_weights_bend_has_no_slope_for_a_verdict():
    """The larger network's: coarse near the data and in the noise, and finest between, with and without the latent."""
    there = routers(shipped(preset="gpu"))["AHPA"]
    for found, at in zip(tables.leanings(there).values(), (0.75, 0.85), strict=True):
        assert found.turns and found.point == "minimum" and found.at == pytest.approx(at)
    table, said = tables.leaning_table(there), findings.leans(there)
    assert table["verdict"].str.startswith("bends").all() and (table["slope"] < 0).all()
    assert said.verdict == "bends, minimum near t = .75 (4 seeds)" and said.effect == "ends less middle +.027 +/- .008"


def test_a_curve_that_bends_and_is_not_known_to_turn_has_no_slope_for_a_verdict():
    """Of one seed the place does not come back, so the turn is unknown; that the curve bends is not."""
    back = np.array([0.09, 0.1, 0.11, -0.01])  # from the lowest place to the noise, by seed
    places = [[0.5 - 0.1 * t / 0.65 if t < 0.7 else 0.4 + b * (t - 0.65) / 0.3 for t in TIMES] for b in back]
    each = [SimpleNamespace(times=np.array(TIMES), place=lambda left, p=p: np.array(p)) for p in places]
    found = tables.leanings(each)["all levels"]
    assert not found.turns and found.bend.mean > found.bend.half and tables.lean_verdict(found, +1) == "bends"
    said, words = findings.leans(each), tables.lean_words(found, +1)
    assert said.effect == f"ends less middle {interval(found.bend, 3)}" and said.verdict == "bends (4 seeds)"
    assert said.detectable == plain(found.bend.detectable, 3) and said.verdicts == 1
    assert (
        words.startswith("falls by .") and "up to t = .65 and then rises by ." in words and words.endswith("(*bends*)")
    )
    assert (tables.leaning_table(each)["verdict"] == "bends").all()


def test_numbers_of_routers_are_those_of_arithmetic():
    """Against the rows themselves: what moved on, and the slopes."""
    rows = [row for row in made() if row["arm"] == "bilevel"]
    for seed, share in enumerate(router_findings.moved(made(), "bilevel"), 5):
        ends = [np.mean(row["weights"], 0) for row in rows if row["seed"] == seed]
        assert share == pytest.approx(np.abs(ends[0] - ends[1]).sum() / 2)
    each = routers(made())["AHPA"]
    whole, left = tables.leanings(each).values()
    assert whole.slope.mean == pytest.approx(np.mean([one.coarseness() for one in each]))
    assert left.slope.mean == pytest.approx(np.mean([one.coarseness(("latent",)) for one in each]))
    assert tables.leaning_table(each)["slope"].tolist() == [whole.slope.mean, left.slope.mean]


def traces() -> list[dict]:
    """Made-up routers along their training: one level takes all, all are equal, a prior is followed, classes differ."""
    even, first, last = np.full((10, 4), 0.25), np.eye(4)[[0] * 10], np.eye(4)[[0] * 5 + [3] * 5]
    of = {"tau 0.02": 0.97 * first + 0.03 * even, "tau 0.5": even, "prior coarse to fine": 0.8 * last + 0.2 * even}
    rows = [{"arm": arm, "class": "all", "weights": weights.tolist()} for arm, weights in of.items()]
    by_class = (("disc", even), ("ring", 0.9 * even + 0.1 * first))
    return rows + [{"arm": "by class", "class": name, "weights": weights.tolist()} for name, weights in by_class]


def test_what_is_said_of_routers_is_what_their_rows_say():
    text = router_findings.of_routers(made(), routers(made()), LEARNED["AHPA"], traces())
    assert text.count("\n* ") == 5 and "no rows here" not in text
    for part in (
        "of the weight near the data",
        "`down.0` has at least .98 of the weight at all times",
        "with .5 the weights stay within .000 of equal ones",
        "has .525 on `down.0` near the data and .525 on `latent` in the noise; the router that starts from it ends with .850 and .850",
        "Two classes differ by .075 of the weight",
        "Its seeds favour `down.0` with",
    ):
        assert part in text, text
    some = router_findings.of_routers(made(), routers(made()), LEARNED["AHPA"], traces()[:2])
    assert some.count("\n* ") == 3 and some.endswith("no rows here: 2.")


# ---- the oracle, whose rows may be missing


@cache
def asked() -> list[dict]:
    """Made-up rows of the oracle: alignment in the middle helps, and `mid` helps in the noise and `down.0` near the data."""
    draw, rows = np.random.default_rng(1), []
    for seed in (5, 6, 7):
        for name, gain in {
            "SiT": 0.0,
            **{oracle_arm(*each).name: gain_of(*each) for each in product(LEVELS, WINDOWS)},
        }.items():
            per_t = (0.5 + 0.01 * seed) * (1 - gain + 1e-4 * draw.normal(size=10))
            row = {"arm": name, "seed": seed, "budget": "steps", "velocity per t": per_t.tolist()}
            rows.append(row | {"velocity": float(per_t.mean())})
    return rows


def gain_of(level: str, window: tuple[float, float]) -> float:
    if window == WINDOWS[1]:
        return 0.02
    return 0.01 * ((level, window) in (("mid", WINDOWS[2]), ("down.0", WINDOWS[0])))


def test_what_is_said_of_the_oracle_is_what_its_rows_say():
    text = router_findings.of_the_oracle(asked(), LEVELS)
    assert "aligned in the middle of the times the loss changes by -2.0 %, -2.0 %, -2.0 %" in text
    assert "at the noisy end by -.3 %" in text.replace("-.2 %", "-.3 %") and "Of 36 verdicts luck would decide" in text
    said = findings.in_the_noise(asked(), LEVELS)
    assert (
        said.verdict == "reproduced (3 seeds)"
        and said.effect.startswith("-.00")
        and "`mid` in the noise" in said.question
    )
    contrast = tables.contrasts(asked(), LEVELS)
    assert said.effect == interval(contrast["mid"], 4) and set(contrast) == set(LEVELS[1:])
    one = [row for row in asked() if row["seed"] == 5]
    assert tables.oracle_note(one, LEVELS) == "Nothing here has paired seeds that could decide it."


def test_without_rows_of_the_oracle_stands_the_command_that_trains_them():
    assert "`maskalign-lab make ahpa-oracle`" in router_findings.of_the_oracle([], LEVELS)
    some = [row for row in asked() if not row["arm"].startswith("mid")]
    assert "When it matters" not in router_findings.of_the_oracle(some, LEVELS)
    for rows in (some, []):
        with pytest.raises(NotTrained):
            findings.in_the_noise(rows, LEVELS)
    shown = findings_table(findings.all_findings(made(), LEVELS, routers(made()), [], shipped(preset="gpu"))).data
    assert shown.endswith("Findings about arms that have no rows here: 1.") and "Oracle" not in shown
    assert tables.contrast_table([], LEVELS).empty and np.isnan(tables.oracle_table([], LEVELS)[0]).all()


# ---- what the study shows


def summed_up(rows: Sequence[dict]) -> str:
    """The table of findings of some rows, and of the oracle and the larger network that ship."""
    found = findings.all_findings(rows, LEVELS, routers(rows), shipped("06_oracle"), shipped(preset="gpu"))
    return findings_table(found).data


def prose() -> str:
    book = nbformat.read(BOOK, as_version=4)
    return " ".join(" ".join(cell.source for cell in book.cells if cell.cell_type == "markdown").split())


def test_the_findings_are_a_table_of_ten_rows_and_250_words():
    every = findings.all_findings(made(), LEVELS, routers(made()), asked(), shipped(preset="gpu"))
    whole = findings_table(every).data
    assert len(every) == 10 and whole.count("\n|") == 11 and "no rows here" not in whole
    for shown in (whole, summed_up(shipped())):
        assert check_words(f"{section_prose(BOOK, 'Findings')} {shown}") > 60


def test_the_first_screen_says_its_verdict_as_the_rows_do():
    """Whether alignment with the levels helps, whether it needs weights that are learned or a teacher, and what the router learns."""
    rows = shipped()
    each = routers(rows)["AHPA"]
    helps, adapts, leans = map(headline, (findings.helps(rows), findings.adapts(rows), findings.leans(each)))
    loss, accuracy = (difference(rows, "AHPA", "REPA", metric) for metric in ("velocity", "accuracy"))
    assert loss.verdict(0) == accuracy.verdict(0) == "lower"
    repa = (
        f"Beside REPA its loss is lower ({interval(loss)}), and so is the judge's accuracy ({interval(accuracy, 3)})."
    )
    legs = tables.legs_words(tables.leanings(each)["all levels"])
    verdict = f"**Verdict.** {helps} {adapts} {repa} {leans.rstrip('.')}; the mean place {legs}."
    assert verdict in prose(), verdict


def test_the_prose_names_the_arms_and_sections_without_rows():
    """Or a row that ships later would leave the text behind."""
    seeds: dict[str, set[int]] = {}
    for row in shipped():
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    assert [arm for arm in ARMS if arm not in seeds] == ["bilevel", "averaged levels", "smooth L1", "target mixing"]
    assert {arm for arm, of in seeds.items() if len(of) == 1} == {f"{level} alone" for level in LEVELS}
    assert (len(ARMS), len(seeds)) == (15, 11) and not shipped("06_oracle")
    for part in (
        "of the fifteen arms eleven have rows, the four levels alone with one seed each. "
        "*bilevel*, *averaged levels*, *smooth L1* and *target mixing* have none.",
        "The arm *averaged levels* has no rows yet",
        "which level helps at which time is **not answered here**",
        "No rows of the oracle ship, so its question has none here.",
    ):
        assert part in prose(), part


def test_with_a_weak_pull_the_level_that_is_hardest_elsewhere_takes_all():
    last = [row for row in shipped("06_router") if row["arm"] == "tau 0.02"]
    even = [row["level losses"] for row in shipped() if row["arm"] == "uniform" and row["budget"] == "steps"]
    latent, hardest = LEVELS.index("latent"), np.mean(even, 0).argmax(1)
    assert (
        np.array(last[-1]["weights"])[:, latent].min() > 0.995
        and np.array(last[0]["level losses"])[0].argmin() == latent
    )
    assert (hardest == latent).mean() > 0.5 and np.mean(even, 0)[0].argmin() == latent


def test_the_windowed_exercise_aligns_as_hard_as_the_study_does():
    recipe = make_recipe("ahpa", "study", overrides="method.router=uniform method.window=(0,0.5) method.weight=4")
    assert recipe.method.weight == 2 * make_recipe("ahpa", "study").method.weight and recipe.method.window == (0, 0.5)


def test_alignment_was_found_to_help_at_this_scale_as_the_prose_says():
    """With the oracle as teacher REPA lowers loss and distance, with the tiny teacher the distance alone."""
    rows = load_rows(results_file("01_gradient_norms", "shapes"))
    words = {
        arm: [difference(rows, arm, "SiT", metric).verdict(0).split()[0] for metric in ("velocity", "frechet")]
        for arm in ("REPA, oracle", "REPA")
    }
    assert words == {"REPA, oracle": ["lower", "lower"], "REPA": ["undecided", "lower"]}
    assert "the distance but not the loss with the tiny teacher used here" in prose()


def test_the_notebook_displays_what_the_rows_that_ship_say():
    rows, shown = shipped(), displayed_markdown(BOOK)
    for text in (
        router_findings.of_routers(rows, routers(rows), LEARNED["AHPA"], shipped("06_router")),
        router_findings.of_the_oracle(shipped("06_oracle"), LEVELS),
        summed_up(rows),
    ):
        assert text in shown, text


def test_what_the_prose_says_of_levels_is_what_the_notebook_displays():
    (text,) = [each for each in displayed_markdown(BOOK) if each.startswith("In cycles per image")]
    cycles = {name: float(value) for value, name in re.findall(r"(\d\.\d) for `([\w.]+)`", text)}
    assert cycles["down.0"] > cycles["down.1"] > cycles["latent"] > cycles["mid"]  # the latent is not the coarsest
    (low, high), kept = (
        re.findall(r"lie (\d+) to (\d+) %", text)[0],
        re.findall(r"keep (\d+) % .* and (\d+) %", text)[0],
    )
    assert 29 <= int(low) <= int(high) <= 33 and int(kept[0]) < int(kept[1]) == 100
    assert "The teacher agrees most with `down.0` and least with `latent`" in text
    assert "tokens, which hold three tenths of every level's variance or a little more" in prose()


def test_a_job_displays_the_findings_of_its_own_rows(smoke):
    folder, scale = smoke.path(".html").parent, SCALES["smoke"]
    rows, tried = (load_rows(folder / f"06_{name}.json") for name in ("rows", "oracle_rows"))
    configs = {arm.name: scale.recipe_of("smoke", "shapes")(arm, 0).method for arm in scale.arms if arm.name in LEARNED}
    found = findings.all_findings(rows, LEVELS, tables.routings(rows, configs), tried, shipped(preset="gpu"))
    text = findings_table(found).data
    assert text in displayed_markdown(smoke.path(".ipynb")) and "Is AHPA's velocity loss lower" in text


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
        "names the class of 12 to 13 % of the images (chance: 10 %)",
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
    for module in (opening, rung):
        monkeypatch.setattr(module, "run_arms", lambda *asked: trained.append(asked) or [])
    study = opening.open_study("laptop", seeds=4, overrides="method.tau=0.5", out_dir=str(tmp_path), device="cpu")
    assert study.film == tmp_path / "06_film.npz"
    opening.table_rows(study, [])
    opening.oracle_rows(study, [])
    for (arms, seeds, recipe_of, baseline, _, known, keep, device, *early), count, name, steps in zip(
        trained, (4, 3), ("06_rows.json", "06_oracle_rows.json"), (1000, 500), strict=True
    ):
        assert (list(seeds), baseline, known, keep, device) == (
            list(table_seeds(count)),
            "SiT",
            [],
            tmp_path / name,
            "cpu",
        )
        assert early == ([EARLY] if name == "06_rows.json" else [])
        ahpa = next(arm for arm in arms if arm.method == "ahpa")
        recipe = recipe_of(ahpa, 0)
        assert recipe.training.steps == steps and recipe.method.tau == 0.5
    assert opening.table_cost(study, []).startswith("tables: 15 arms x 4 seeds x 1,000 steps; oracle: 13 x 3 x 500;")


@pytest.mark.parametrize("preset", SCALES)
def test_the_arms_of_every_preset_build(preset):
    """A network and a method can be made from their recipes; of the levels alone, the oracle and the traces one stands for all."""
    levels = make_recipe("ahpa", preset).method.levels
    scale = replace(SCALES[preset], levels=levels)
    facts = Facts(10, teacher_dims=(128,), channels=4, factor=make_recipe("ahpa", preset).data.size // 8)
    for more, arms in (("", (*scale.named, scale.arms[-1], scale.traced[0])), (scale.oracle, scale.tried[:1])):
        for arm in arms:
            recipe = scale.recipe_of(preset, "shapes", more)(arm, 5)
            with torch.device("meta"):
                net, method = build(recipe, facts)
            assert method.config == recipe.method and net.depth == recipe.network.depth
