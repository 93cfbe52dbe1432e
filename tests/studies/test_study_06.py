"""Study 06: what its smoke run leaves, the runs and tables that ship, and what its text says of them."""

from dataclasses import replace

import nbformat
import numpy as np
import pytest
from shared.studies import smoke_fixture

from maskalign_lab.ahpa import AHPAConfig
from maskalign_lab.base import paths
from maskalign_lab.measure.verdicts import Paired, beside, by_seed, paired
from maskalign_lab.runs.experiments import Length, load_rows, results_file, run_identity
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.ahpa.arms import (
    LEVELS,
    SCALES,
    TRACED,
    agreement,
    as_routing,
    coarse_in_noise,
    mean_routing,
    numbers_table,
    oracle_table,
    routings,
)
from maskalign_lab.studies.ahpa.film import load_film
from maskalign_lab.studies.ahpa.routing import measure_routing

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


def study_text() -> str:
    book = nbformat.read(paths.notebooks() / "06_ahpa.ipynb", as_version=4)
    return " ".join(" ".join(cell.source for cell in book.cells if cell.cell_type == "markdown").split())


def short(value: float, digits: int = 4) -> str:
    """ "-.0113", as the text has it."""
    return f"{value:+.{digits}f}".replace("0.", ".", 1)


def interval(found: Paired, digits: int = 4) -> str:
    return f"{short(found.mean, digits)} +/- {short(found.half, digits)[1:]}"


def percent(mean: float, half: float | None = None) -> str:
    """ "1.7 +/- .4 %" of shares."""
    each = [f"{100 * abs(value):.1f}".removeprefix("0") for value in (mean, half) if value is not None]
    return " +/- ".join(each) + " %"


def test_the_findings_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "shapes"))
    steps, flops, judge = by_seed(rows, "velocity"), by_seed(rows, "velocity", "flops"), by_seed(rows, "frechet")
    sit = {arm: beside(of, steps["SiT"]) for arm, of in steps.items()}
    ahpa = {arm: beside(steps["AHPA"], of) for arm, of in steps.items()}
    coarse = [beside(steps["coarse to fine"], steps[other]) for other in ("fine to coarse", "uniform")]
    fewer, nearer = (beside(of["AHPA"], of["SiT"]) for of in (flops, judge))
    near = beside(judge["coarse to fine"], judge["SiT"])
    mean = {arm: short(np.mean(list(steps[arm].values())))[1:] for arm in ("AHPA", "SiT")}
    lower = {level: interval(ahpa[f"{level} alone"])[1:] for level in ("down.1", "latent")}
    alone = {level: interval(sit[f"{level} alone"]) for level in LEVELS}
    for told in (
        f"AHPA's velocity loss is {mean['AHPA']} and SiT's {mean['SiT']}, a difference of {interval(sit['AHPA'])}: *reproduced*",
        f"after equal operations it is {interval(fewer)}, *lower*",
        f"SRA 2 and REPA are at {interval(sit['SRA 2'])} and {interval(sit['REPA'])}.",
        f"AHPA's distance is {-nearer.mean:.1f} +/- {nearer.half:.1f} lower, *reproduced*",
        f"that of coarse to fine {-near.mean:.1f} +/- {near.half:.1f};",
        f"Beside equal weights AHPA is at {interval(ahpa['uniform'])}",
        f"its reverse at {interval(coarse[0])}, beside equal weights at {interval(coarse[1])}: all undecided",
        f"is at {short(sit['target mixing'].mean)} beside SiT, *smooth L1* at {short(sit['smooth L1'].mean)}",
        f"*averaged levels* at {short(sit['averaged levels'].mean)}.",
        f"`down.0` alone is at {alone['down.0']} and `mid` at {alone['mid']}, `down.1` at {alone['down.1']}",
        f"and the latent at {alone['latent']}. AHPA beats the two worse ones, by {lower['down.1']} and {lower['latent']}",
        f"not `down.0` ({interval(ahpa['down.0 alone'])}) or `mid` ({interval(ahpa['mid alone'])}).",
        f"Its loss is at {interval(sit['bilevel'])} beside SiT and {interval(beside(steps['bilevel'], steps['AHPA']))} beside AHPA",
    ):
        assert told in text, told
    assert [found.verdict(-1) for found in (sit["AHPA"], fewer, nearer)] == ["reproduced"] * 3
    cost = {row["arm"]: 100 * (row["relative_flops"] - 1) for row in rows}
    assert (
        f"A step costs {cost['AHPA']:.0f} % more;" in text and f"a step costs {cost['bilevel']:.0f} % more than" in text
    )
    seen = [row for row in rows if "frechet" in row and row["budget"] == "steps"]
    assert "about five times the floor or more" in text and len(seen) == sum(map(len, steps.values()))
    assert min(row["frechet"] / row["frechet floor"] for row in seen) > 4.8
    assert 0.05 < min(row["accuracy"] for row in seen) < max(row["accuracy"] for row in seen) < 0.15  # chance: 0.1
    undecided = [ahpa[other] for other in ("uniform", "down.0 alone", "mid alone", "bilevel")] + coarse
    assert all(found.verdict(-1).startswith("undecided") for found in (*undecided, sit["SRA 2"], sit["REPA"]))
    assert [ahpa[f"{level} alone"].verdict(-1) for level in ("down.1", "latent")] == ["reproduced"] * 2
    assert {arm: len(of) for arm, of in steps.items()} == {
        arm: 5 if arm in ("SiT", "AHPA", "uniform", "coarse to fine", "fine to coarse") else 3 for arm in steps
    }


def weights_at(rows: list[dict], arm: str, budget: str):
    """The weights (10, K) of every seed of an arm."""
    return (row["weights"] for row in rows if (row["arm"], row["budget"]) == (arm, budget))


def slope(each: list, *without: str) -> Paired:
    return paired([one.coarseness(without) for one in each], [0.0] * len(each))


def test_the_findings_on_routers_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "shapes"))
    learned = routings(rows, {"AHPA": AHPAConfig(), "bilevel": AHPAConfig(router="bilevel")})
    table, slopes = numbers_table(learned)["AHPA"], [slope(learned["AHPA"], *without) for without in ((), ("latent",))]
    latent = mean_routing(learned["AHPA"]).weights[:, -1]
    for told in (
        f"Of its weight {percent(*table.loc['from closed form'])} lies elsewhere",
        f"and {percent(*table.loc['from that of loss / constant'])} elsewhere",
        f"The slope is {interval(slopes[0], 3)}, by the rule *contradicted*",
        f"without the latent {interval(slopes[1], 3)}, *contradicted*",
        f"The latent has {short(latent[0], 2)[1:]} of the weight near the data",
        f"{short(latent[5:].min(), 2)[1:]} to {short(latent[5:].max(), 2)[1:]} in the noise",
        f"time plays no part (slope {interval(slope(learned['bilevel']), 3)})",
    ):
        assert told in text, told
    assert [found.verdict(+1) for found in slopes] == ["contradicted"] * 2
    moved = [
        100 * np.abs(np.mean(np.subtract(*weights), 0)).sum() / 2
        for weights in zip(*(list(weights_at(rows, "bilevel", budget)) for budget in ("steps", "flops")), strict=True)
    ]
    assert "Between step 622 and the last {:.0f}, {:.0f} and {:.0f} % of the weight moved on".format(*moved) in text
    first = [
        as_routing(next(row for row in rows if (row["arm"], row["budget"]) == ("AHPA", at)))
        for at in ("flops", "steps")
    ]
    leans = [short(each.coarseness(), 2) for each in first]
    ends = [short(replace(each, weights=each.closed).coarseness(), 2) for each in first]
    assert f"was {leans[0]} at step 745 and {leans[1]} at 800, that of the closed form {ends[0]} and {ends[1]}." in text
    favourites = [each.weights.mean(0) for each in learned["bilevel"]]
    assert [LEVELS[weights.argmax()] for weights in favourites] == ["down.0", "latent", "down.1"]
    named = zip(("`down.0`", "the latent", "`down.1`"), favourites, strict=True)
    assert ", ".join(f"{name} with {short(weights.max(), 2)[1:]} of the weight" for name, weights in named) in text


def test_the_findings_on_photographs_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "folder:cifar10/train"))
    found, routers = by_seed(rows, "velocity"), routings(rows, {"AHPA": AHPAConfig()})["AHPA"]
    beside_sit = {arm: beside(found[arm], found["SiT"]) for arm in ("AHPA", "uniform")}
    latent = mean_routing(routers).weights[:, -1]
    for told in (
        f"AHPA is at {interval(beside_sit['AHPA'])} beside SiT, equal weights at {interval(beside_sit['uniform'])}.",
        f"{short(latent[0], 2)[1:]} of the weight on the latent near the data, {short(latent[5], 2)[1:]} in the middle",
        f"slope {interval(slope(routers), 3)}, *contradicted*.",
    ):
        assert told in text, told
    assert all(one.verdict(-1) == "undecided (3 seeds)" for one in beside_sit.values())
    assert slope(routers).verdict(+1) == "contradicted"


def test_the_findings_at_a_larger_scale_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "shapes", "gpu"))
    steps, flops, judge = by_seed(rows, "velocity"), by_seed(rows, "velocity", "flops"), by_seed(rows, "frechet")
    sit = {arm: beside(of, steps["SiT"]) for arm, of in steps.items()}
    fewer, nearer = (beside(of["AHPA"], of["SiT"]) for of in (flops, judge))
    distance = np.mean(list(judge["AHPA"].values()))
    adapts, routers = beside(steps["AHPA"], steps["uniform"]), routings(rows, {"AHPA": AHPAConfig()})["AHPA"]
    slopes, small = (
        [slope(routers, *left_out) for left_out in ((), ("latent",))],
        load_rows(results_file("06_ahpa", "shapes")),
    )
    shares = [
        -beside(of["AHPA"], of["SiT"]).mean / np.mean(list(of["SiT"].values()))
        for of in (steps, by_seed(small, "velocity"))
    ]
    for told in (
        f"At SiT-S AHPA is at {interval(sit['AHPA'])} beside SiT's {short(np.mean(list(steps['SiT'].values())))[1:]}",
        f"{percent(shares[0])} of the loss where the small network has {percent(shares[1])}",
        f"after equal operations {interval(fewer)}.",
        f"Equal weights are at {interval(sit['uniform'])}, fine to coarse at {interval(sit['fine to coarse'])}",
        f"coarse to fine at {interval(sit['coarse to fine'])}, the only arm that is *lower*",
        f"{interval(adapts)} beside equal weights",
        f"AHPA's distance of {distance:.1f} is {short(-nearer.mean, 1)[1:]} +/- {short(nearer.half, 1)[1:]} lower.",
        f"to {percent(*numbers_table({'AHPA': routers})['AHPA'].loc['from closed form'])} of its weight",
        f"slope is {interval(slopes[0], 3)}, without the latent {interval(slopes[1], 3)}: both *contradicted*.",
    ):
        assert told in text, told
    assert [found.verdict(+1) for found in slopes] == ["contradicted"] * 2
    undecided = [sit["AHPA"], sit["uniform"], sit["fine to coarse"], fewer, nearer, adapts]
    assert all(found.verdict(-1) == "undecided (4 seeds)" for found in undecided)
    assert sit["coarse to fine"].verdict(0) == "lower"


def test_the_findings_on_the_oracle_and_on_traces_say_what_their_rows_say():
    text, rows = study_text(), load_rows(results_file("06_oracle", "shapes"))
    table, half = oracle_table(rows)
    near, middle, far = table.mean(1)  # aligned where; of the loss in each window
    contrasts = [coarse_in_noise(rows, level, "down.0") for level in LEVELS[1:]]
    first, last_level = (percent(table[1, k, 1], half[1, k, 1]) for k in (0, -1))
    for told in (
        f"takes off most: {percent(middle[1])} of the loss there, {percent(middle[0])} near the data and {percent(middle[2])} in",
        f"At the clean end it takes off {percent(near[1])} in the middle",
        f"it adds {percent(far[1])} in the middle and {percent(far[0])[:-2]} and {percent(far[2])} elsewhere",
        f"`down.0` takes off {first} there, the latent {last_level}.",
        ", ".join(
            f"{interval(one)} ({name})"
            for one, name in zip(contrasts, ("`down.1`", "`mid`", "the latent"), strict=True)
        ),
    ):
        assert told in text, told
    assert all(one.verdict(-1) == "undecided (3 seeds)" for one in contrasts)
    of = routings(load_rows(results_file("06_ahpa", "shapes")), {"AHPA": AHPAConfig()})["AHPA"]
    assert "in the middle, nearly so in the noise, and not near the data" in text
    ranks = agreement(mean_routing(of).weights, table)
    assert ranks[0] < 0 and 0.5 < ranks[2] < 1 and ranks[1] == pytest.approx(1)

    last = {
        row["arm"]: np.array(row["weights"])
        for row in load_rows(results_file("06_router", "shapes"))
        if row["class"] == "all"
    }
    assert last.keys() == {arm.name for arm in TRACED}
    assert last["tau 0.02"][:, -1].min() > 0.99 and np.abs(last["tau 0.5"] - 0.25).max() < 0.0301
    prior = last["prior coarse to fine"]
    assert (
        f"the router has {short(prior[0, 0], 2)[1:]} on `down.0` near the data and {short(prior[-1, -1], 2)[1:]} on"
        in text
    )
    by_class = [row["weights"] for row in load_rows(results_file("06_router", "shapes")) if row["class"] != "all"]
    assert f"Classes differ by {short(np.ptp(by_class, axis=0).max(), 2)[1:]} at most." in text
