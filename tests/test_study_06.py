"""Study 06 as its users run it: papermill end to end, what ships, and mistakes in seconds."""

import nbformat
import numpy as np
import pytest
from studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab import paths
from maskalign_lab.ahpa import AHPAConfig
from maskalign_lab.batch import run_study
from maskalign_lab.experiments import Length, load_rows, results_file, run_identity
from maskalign_lab.recipes import load_run
from maskalign_lab.routing import measure_routing
from maskalign_lab.routing_arms import (
    CHOICES,
    LEVELS,
    SCALES,
    TRACED,
    coarse_in_noise,
    mean_routing,
    numbers_table,
    oracle_table,
    routings,
)
from maskalign_lab.routing_film import load_film
from maskalign_lab.verdicts import Paired, beside, by_seed, paired

smoke = smoke_fixture("06")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in (
        "filmstrip",
        "contents",
        "weights",
        "skill",
        "traces",
        "oracle",
        "arms",
        "per_t",
        "larger_arms",
        "larger_weights",
    ):
        check_figure(smoke, "06_ahpa", f"06_{name}")


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


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("06_ahpa")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "method.tua=0.1"}, "Did you mean 'method.tau'"),
        ({"preset": "smoke", "overrides": "data.autoencoder=tinny"}, "Did you mean 'tiny'"),
        ({"preset": "smoke", "overrides": "method.levels=down.0,middle"}, "middle"),
        ({"run": "repa-shapes"}, "expected ahpa"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("06", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error


def study_text() -> str:
    book = nbformat.read(paths.notebooks() / "06_ahpa.ipynb", as_version=4)
    return " ".join(" ".join(cell.source for cell in book.cells if cell.cell_type == "markdown").split())


def short(value: float, digits: int = 4) -> str:
    """ "-.0113", as the text has it."""
    return f"{value:+.{digits}f}".replace("0.", ".", 1)


def interval(found: Paired, digits: int = 4) -> str:
    return f"{short(found.mean, digits)} +/- {short(found.half, digits)[1:]}"


def test_the_findings_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "shapes"))
    steps, flops = by_seed(rows, "velocity"), by_seed(rows, "velocity", "flops")
    ahpa, equal = beside(steps["AHPA"], steps["SiT"]), beside(steps["AHPA"], steps["uniform"])
    mean = {arm: short(np.mean(list(steps[arm].values())))[1:] for arm in ("AHPA", "SiT")}
    alone = {arm: short(beside(steps[arm], steps["SiT"]).mean) for arm in ("SRA 2", "REPA", *(a.name for a in CHOICES))}
    for told in (
        f"AHPA's velocity loss is {mean['AHPA']} and SiT's {mean['SiT']}, a difference of {interval(ahpa)}: *reproduced*",
        f"after equal operations it is {interval(beside(flops['AHPA'], flops['SiT']))}, undecided",
        f"SRA 2 and REPA are at {alone['SRA 2']} and {alone['REPA']}.",
        f"Beside equal weights AHPA is at {interval(equal)}",
        f"its reverse at {interval(beside(steps['coarse to fine'], steps['fine to coarse']))}",
        f"beside equal weights at {interval(beside(steps['coarse to fine'], steps['uniform']))}",
        f"is at {alone['target mixing']} beside SiT, *smooth L1* at {alone['smooth L1']}, *averaged levels* at {alone['averaged levels']}.",
    ):
        assert told in text, told
    judge = by_seed(rows, "frechet")
    nearer = [beside(judge[arm], judge["SiT"]) for arm in ("AHPA", "coarse to fine")]
    told = [f"{-found.mean:.1f} +/- {found.half:.1f}" for found in nearer]
    assert f"AHPA's distance is {told[0]} lower, undecided, that of coarse to fine {told[1]};" in text
    assert [found.verdict(0).split()[0] for found in nearer] == ["undecided", "lower"]
    assert ahpa.verdict(-1) == "reproduced" and equal.verdict(-1).startswith("undecided")
    better = {level: steps[f"{level} alone"][0] < steps["AHPA"][0] for level in LEVELS}
    assert better == {"down.0": True, "down.1": False, "mid": True, "latent": False}


def test_the_findings_on_routers_say_what_the_tables_say():
    text, rows = study_text(), load_rows(results_file("06_ahpa", "shapes"))
    learned = routings(rows, {"AHPA": AHPAConfig()})
    table = numbers_table(learned)["AHPA"]
    percent = lambda name: " +/- ".join(f"{100 * table.loc[name, of]:.1f}" for of in ("mean", "+/-")) + " %"  # noqa: E731
    slopes = [
        paired([each.coarseness(without) for each in learned["AHPA"]], [0.0] * 3) for without in ((), ("latent",))
    ]
    latent = mean_routing(learned["AHPA"]).weights[:, -1]
    for told in (
        f"Of its weight {percent('from closed form')} lies elsewhere",
        f"and {percent('from that of loss / constant')} elsewhere",
        f"The slope is {interval(slopes[0], 3)}, by the rule *contradicted*",
        f"without the latent {interval(slopes[1], 3)}, *contradicted*",
        f"The latent has {short(latent[0], 2)[1:]} of the weight near the data",
    ):
        assert told in text, told
    assert [slope.verdict(+1) for slope in slopes] == ["contradicted"] * 2
    there = load_rows(results_file("06_ahpa", "folder:cifar10/train"))
    (router,) = routings(there, {"AHPA": AHPAConfig()})["AHPA"]
    loss = {row["arm"]: short(row["velocity"])[1:] for row in there if row["budget"] == "steps"}
    told = [short(router.weights[k, -1], 2)[1:] for k in (0, 5)]
    assert (
        f"{told[0]} of the weight on the latent near the data, {told[1]} in the middle, slope {short(router.coarseness(), 3)}."
        in text
    )
    assert f"AHPA's velocity loss is {loss['AHPA']}, SiT's {loss['SiT']}." in text
    assert ".14 to .17 in the noise" in text and 0.135 < latent[5:].min() < latent[5:].max() < 0.175


def test_the_findings_on_the_oracle_and_on_traces_say_what_their_rows_say():
    text, rows = study_text(), load_rows(results_file("06_oracle", "shapes"))
    near, middle, far = 100 * oracle_table(rows)[0].mean(1)  # aligned where; in per cent of the loss in each window
    percent = lambda value: f"{abs(value):.1f} %".removeprefix("0")  # noqa: E731
    contrasts = [coarse_in_noise(rows, level, "down.0") for level in LEVELS[1:]]
    for told in (
        f"takes off most: {percent(middle[1])} of the loss there, {percent(middle[0])} near the data and {percent(middle[2])} in",
        f"At the clean end it takes off {percent(near[1])} in the middle",
        f"it adds {percent(far[1])} in the middle and {percent(far[0])[:-2]} and {percent(far[2])} elsewhere",
        ", ".join(
            f"{interval(one)} ({name})"
            for one, name in zip(contrasts, ("`down.1`", "`mid`", "the latent"), strict=True)
        ),
    ):
        assert told in text, told
    assert all(one.verdict(-1).startswith("undecided") for one in contrasts)

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
