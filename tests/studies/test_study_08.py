"""Study 08: what its notebook promises beyond what every study does."""

from dataclasses import replace

import nbformat
import pytest
import torch
from shared.studies import check_figure

from maskalign_lab.base import paths
from maskalign_lab.dsd import TARGETS
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.runs.experiments import load_rows, own_facts, step_flops
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.dsd.arms import SCALES
from maskalign_lab.studies.dsd.courses import psnr
from maskalign_lab.studies.dsd.filming import load_film
from maskalign_lab.studies.dsd.findings import all_findings, collapses
from maskalign_lab.studies.dsd.opening import FILM, TABLE, whole_recipe
from maskalign_lab.studies.dsd.tables import (
    METRICS,
    PAIRS,
    collapse_of,
    pull_of,
    stable_by_rank,
    theory_table,
    verdicts,
)

BOOK = paths.notebooks() / "08_dsd.ipynb"


def shipped():
    return load_rows(paths.data() / "results" / f"{TABLE}_shapes.json")


# ---- arms


@pytest.mark.parametrize("preset", SCALES)
def test_steps_change_one_thing_each(preset):
    scale = SCALES[preset]
    a, b, c, d = (scale.recipe_of(preset, "shapes")(arm, 0) for arm in scale.table("steps"))
    assert replace(b, method=replace(b.method, gradient="both")) == a
    assert replace(c, method=replace(c.method, predicts="v")) == b
    assert replace(d, method=replace(d.method, target="online", views=0.0)) == c
    assert a.network.latent_norm and not a.data.autoencoder


def test_every_pair_of_a_table_is_trained_by_the_preset():
    names = {arm.name for arm in SCALES["laptop"].table()}
    assert {name for pairs in PAIRS.values() for pair in pairs for name in pair[:2]} <= names
    assert SCALES["laptop"].whole < names


def test_what_is_added_to_c_changes_its_rank_and_not_its_pull():
    scale = SCALES["laptop"]
    methods = {
        arm.name: scale.recipe_of("laptop", "shapes")(arm, 0).method for arm in scale.table("steps interventions")
    }
    assert pull_of(methods["c, noise on top"]) == pull_of(methods["c: x"]) < 0
    assert stable_by_rank(methods["c: x"]) and not stable_by_rank(methods["c, noise on top"])
    assert pull_of(methods["b, low-pass"]) == pull_of(methods["b: target cut"]) > 0
    assert stable_by_rank(methods["b, low-pass"]) and not stable_by_rank(methods["b: target cut"])
    assert {method.predicts for method in methods.values()} < set(TARGETS)


def test_operations_are_counted_with_each_arms_own_latents():
    """A SiT sees the latents that it is trained on, and not the pixels that a DSD sees."""
    scale = SCALES["smoke"]
    recipes = {arm.name: scale.recipe_of("smoke", "shapes")(arm, 0) for arm in scale.table("unity")}
    costs = {name: step_flops(recipe, own_facts(recipe)) for name, recipe in recipes.items()}
    assert costs["VAE and SiT"] < costs["DSD"] and costs["RAE and SiT"] < costs["DSD"]
    assert costs["DSD"] == costs["DSD, three trunks"]  # as many operations, by other weights


# ---- tables and findings


def test_empty_tables_are_empty():
    assert all(verdicts([], question).empty for question in PAIRS)
    assert "missing here" in findings_table(all_findings([])).data


def test_tables_of_the_rows_that_ship():
    rows, scale = shipped(), SCALES["laptop"]
    table = theory_table(rows, scale.table("steps"), scale.recipe_of("laptop", "shapes")).set_index("arm")
    assert table.loc["a: v", "variance term"] == "narrower" and table.loc["c: x", "by rank"] == "stable"
    ways = {
        arm: {collapse_of(row) for row in rows if row["arm"] == arm and row["budget"] == "steps"} for arm in table.index
    }
    assert ways["a: v"] == {"spread"} and ways["b: target cut"] == {"rank"} and ways["c: x"] == {""}
    assert set(verdicts(rows, "steps")["metric"]) <= set(METRICS)


def test_what_the_text_says_of_interventions_is_what_their_rows_say():
    """A low rank of the prediction is enough, and it is not needed; a floor does not keep the rank."""
    of = lambda arm: {collapse_of(row) for row in shipped() if row["arm"] == arm and row["budget"] == "steps"}  # noqa: E731
    assert of("b, low-pass") == of("c, noise on top") == {""} and of("c, x + eps") == of("a, floor") == {"rank"}


def test_findings_fit_on_a_screen_and_the_first_screen_tells_the_headline():
    rows = shipped()
    assert check_words(findings_table(all_findings(rows)).data) <= 250
    first = nbformat.read(BOOK, as_version=4).cells[0].source.replace("\n", " ")
    naive, cut = all_findings(rows)[:2]
    assert headline(naive()) in first and headline(cut()) in first


def test_a_verdict_needs_all_seeds():
    row = {"arm": "a: v", "budget": "steps", "rank": 6.0, "collapsed at": None}
    rows = [row | {"seed": 5}, row | {"seed": 6, "collapsed at": 80}]
    assert collapses(rows, "?", "a: v", True).verdict == "undecided (2 seeds)"
    assert collapses(rows[:1], "?", "a: v", True).verdict == "contradicted (1 seed)"


# ---- what ships, and what a job leaves


def test_the_film_that_ships_shows_the_steps():
    film = load_film(paths.data() / "results" / FILM)
    assert list(film.arms) == [arm.name for arm in SCALES["laptop"].table("steps")]
    assert film.steps[-1] == 400 and film.collapsed[0] is not None and film.collapsed[2] is None


def test_the_whole_network_that_ships_is_the_tables_and_gives_images_back():
    (row,) = (row for row in shipped() if (row["arm"], row["seed"], row["budget"]) == ("DSD", 5, "steps"))
    run = load_run("dsd-shapes")
    assert identity(run.recipe) == identity(whole_recipe()) == row["identity"] and run.step == row["step"]
    images = run.images("validation").images(slice(0, 250))
    with torch.no_grad():
        assert psnr(run.decode(run.net.latents(images)), images) == pytest.approx(row["psnr"], abs=0.1)


def test_the_job_keeps_its_rows(smoke_job):
    smoke = smoke_job("08")
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "08_rows.json")} == {arm.name for arm in SCALES["smoke"].table()}
    check_figure(smoke, "08_dsd", "08_toy")
