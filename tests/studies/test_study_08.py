"""Study 08: what its notebook promises beyond what every study does."""

import json
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from shared.studies import check_figure

from maskalign_lab.base import paths
from maskalign_lab.dsd import TARGETS
from maskalign_lab.measure.findings import check_words, findings_table
from maskalign_lab.measure.wording import plain
from maskalign_lab.runs.experiments import load_rows, own_facts, step_flops
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.dsd.arms import SCALES
from maskalign_lab.studies.dsd.courses import psnr
from maskalign_lab.studies.dsd.denoising_film import Denoising
from maskalign_lab.studies.dsd.film import lost
from maskalign_lab.studies.dsd.filming import load_film
from maskalign_lab.studies.dsd.findings import all_findings, collapses, verdict_line
from maskalign_lab.studies.dsd.opening import DENOISING, FILM, TABLE, whole_recipe
from maskalign_lab.studies.dsd.tables import (
    FEW,
    HALF,
    JUDGED,
    METRICS,
    PAIRS,
    collapse_of,
    foretold,
    last_rows,
    pull_of,
    readable,
    stable_by_rank,
    theory_table,
    verdicts,
)
from maskalign_lab.studies.dsd.toy import CASES, train_toy
from maskalign_lab.studies.dsd.variance_term import flow

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
    assert a.network.latent_norm and not a.data.autoencoder and not a.method.adversarial


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
    assert pull_of(methods["b, low-pass"]) is None and pull_of(methods["b: target cut"]) > 0
    assert stable_by_rank(methods["b, low-pass"]) and not stable_by_rank(methods["b: target cut"])
    assert {method.predicts for method in methods.values()} < set(TARGETS)


def test_operations_are_counted_with_each_arms_own_latents():
    """A SiT sees the latents that it is trained on, and not the pixels that a DSD sees."""
    scale = SCALES["smoke"]
    recipes = {arm.name: scale.recipe_of("smoke", "shapes")(arm, 0) for arm in scale.table("unity")}
    costs = {name: step_flops(recipe, own_facts(recipe)) for name, recipe in recipes.items()}
    assert costs["VAE and SiT"] < costs["DSD"] and costs["RAE and SiT"] < costs["DSD"]
    assert costs["DSD"] == costs["DSD, three trunks"]  # as many operations, by other weights


@pytest.mark.parametrize("preset", SCALES)
def test_every_arm_of_every_preset_can_be_trained_on_its_latents(preset):
    """Autoencoder, teacher and size of the images fit; the latents of the RAE have RAE's shift, those of the VAE none."""
    scale = SCALES[preset]
    of = scale.recipe_of(preset, "shapes")
    recipes = {arm.name: of(arm, 0) for arm in scale.table("steps interventions free answers unity parts")}
    facts = {name: own_facts(recipe) for name, recipe in recipes.items()}
    vae, rae, whole = (recipes[name] for name in ("VAE and SiT", "RAE and SiT", "DSD"))
    assert vae.data.size == rae.data.size == whole.data.size
    assert (facts["VAE and SiT"].channels, facts["RAE and SiT"].channels) == ((4, 768) if scale.paper else (4, 128))
    assert vae.objective.time_shift == 1 and rae.objective.time_shift == (6.928 if scale.paper else 2.828)
    assert vae.data.autoencoder and rae.network.patch_size == 1 and vae.network.patch_size == 2


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
    assert set(verdicts(rows, "steps")["metric"]) == set(METRICS["steps"])


def prose() -> str:
    cells = nbformat.read(BOOK, as_version=4).cells
    return " ".join(" ".join(cell.source.split()) for cell in cells if cell.cell_type == "markdown")


def ways(arm: str) -> list[str]:
    """How the latents of each seed have collapsed."""
    return [collapse_of(row) for row in last_rows(shipped()) if row["arm"] == arm]


def means(arm: str, metric: str, budget: str = "steps") -> list[float]:
    """Of each of the looks at an arm, in order."""
    of = [row for row in shipped() if row["arm"] == arm and row["budget"] == budget]
    return [
        float(np.mean([row[metric] for row in of if row["step"] == step])) for step in sorted({r["step"] for r in of})
    ]


def test_what_the_text_says_of_interventions_is_what_their_rows_say():
    """With the target cut a low rank of the prediction can be enough, and it is not needed; a floor does not keep the rank."""
    assert set(ways("b, low-pass")) == set(ways("c, noise on top")) == {""}
    assert set(ways("c, x + eps")) == set(ways("a, floor")) == {"rank"}
    text, told = prose(), {row["metric"]: row["verdict"] for _, row in verdicts(shipped(), "steps")[::3].iterrows()}
    assert told == {"psnr": "lower", "rank": "lower"} and "pictures and rank are worse than a's" in text
    instead, rest = ways("a, x instead"), [r for r in last_rows(shipped()) if r["arm"] == "a, x instead"]
    assert f"collapses in spread in {instead.count('spread')} of {len(instead)} seeds" in text
    others = [row["spread"] for row in rest if not collapse_of(row)]
    assert f"when training stops ({min(others):.2f} to {max(others):.2f})" in text
    first, second, last = *means("a, whitened", "rank", "early"), *means("a, whitened", "rank")
    assert f"from {first:.1f} over {second:.1f} to {last:.1f}, to a bound of {FEW * 16:.1f}" in text
    white = [row for row in last_rows(shipped()) if row["arm"] == "a, whitened"]
    ranks, wide = [row["rank"] for row in white], np.mean([row["spread"] for row in white])
    assert min(ranks) > FEW * 16 and f"its seeds have {min(ranks):.2f} to {max(ranks):.2f}" in text
    assert f"its spread is {wide:.2f} in the end" in text
    free = ways("c, free scale")
    assert f"loses its rank in {free.count('rank')} of {len(free)} seeds" in text


def test_what_the_text_says_of_collapse_and_of_pictures_is_what_the_rows_say():
    text, psnr = prose(), lambda arm: means(arm, "psnr")[0]
    assert f"their effective rank is below {FEW * 16:.1f}. By that a's rank of {means('a: v', 'rank')[0]:.1f}" in text
    kept = sorted(psnr(arm.name) for arm in SCALES["laptop"].table("answers"))
    low, d, c = (psnr(arm) for arm in ("b, low-pass", "d: average, views", "c: x"))
    assert (
        f"{kept[0]:.1f} to {kept[-1]:.1f} dB, beside {low:.1f} of *b, low-pass*, {d:.1f} of d and {c:.1f} of c" in text
    )
    assert kept[0] > max(psnr(arm.name) for arm in SCALES["laptop"].table("steps interventions free"))
    pairs = verdicts(shipped(), "answers")
    assert set(pairs["verdict"]) == {"lower"}
    cut = pairs[(pairs["arm"] == "b: target cut") & (pairs["metric"] == "psnr")].iloc[0]
    assert f"{-cut['difference']:.1f} +/- {plain(cut['+/-'], 1)} dB less than *one trunk, nothing reached*" in text


def test_what_the_text_says_of_a_free_scale_is_what_its_rows_say():
    ends = sorted(row["spread"] for row in last_rows(shipped()) if row["arm"] == "a, free scale")
    assert f"at {ends[1]:.3f} to {ends[-1]:.3f} in four of them and {ends[0]:.3f} in one" in prose()
    grows = [*means("c, free scale", "spread", "early"), *means("c, free scale", "spread")]
    assert f"({', '.join(f'{each:.0f}' for each in grows)})" in prose()


def test_how_many_steps_equal_operations_are_and_what_an_idle_head_would_miss_is_told():
    steps = {(row["arm"], row["budget"]): row["step"] for row in shipped()}
    for arm in ("VAE and SiT", "RAE and SiT"):
        more = steps[arm, "flops"] / steps[arm, "steps"]
        assert f"they have seen {more:.1f} times the steps" in prose()
    t, variance = 0.05, 0.99  # the noised latent in place of the clean one misses t^2 of the noise and of the latent
    assert f"itself would miss {100 * t**2 * (1 + variance) / variance:.1f} %" in prose()


def test_the_arms_in_the_text_are_those_that_are_trained():
    scale, text = SCALES["laptop"], prose()
    for arm in scale.table("steps"):
        recipe = scale.recipe_of("laptop", "shapes")(arm, 0)
        method = recipe.method
        reached = {"both": "input and target", "input": "input"}[method.gradient]
        views = {0.0: "none", 0.5: "half of the images"}[method.views]
        source = {"ema": "its average", "online": "the encoder"}[method.target]
        assert f"| {arm.name} | {method.predicts} | {reached} | {source} | {views} |" in text
    size, training = recipe.network, recipe.training
    assert f"{size.depth} blocks of width {size.width}, {training.steps} steps of {training.batch_size} images" in text
    assert f"out of {recipe.data.n:,}" in text and f"Latents of {size.latent_dim} channels" in text
    assert f"asked at a spread of {HALF:g}" in text and min(row["seed"] for row in shipped()) == 5


def test_what_theory_foretold_is_counted():
    scale = SCALES["laptop"]
    table = theory_table(shipped(), scale.table("steps interventions free"), scale.recipe_of("laptop", "shapes"))
    text = foretold(table)
    assert f"of 8 of {len(table) - 1} arms (not of *b: target cut*, *c, x + eps*, *a, floor*)" in text
    assert table.set_index("arm").loc["b, low-pass", "variance term"] == "–"
    untrained = theory_table([], scale.table("steps"), scale.recipe_of("laptop", "shapes"))
    assert "of 0 of 0 arms whether" in foretold(untrained)


def test_the_toy_ends_where_the_text_says():
    """As the notebook trained it, which its figure's sidecar keeps; the closed form begins where a training does."""
    kept = json.loads((paths.clone() / "figures" / "08_toy.json").read_text())["spreads at the end"]
    naive, cut = (kept[name] for name in ("a: v", "b: v, target cut"))
    _, told = flow(train_toy(CASES["b: v, target cut"], steps=1)[0], "v", True, 0.6)
    text = prose()
    words = r"still at (\S+); in b the narrow one ends at (\S+), by the closed form at (\S+)\."
    ends = [float(found) for found in re.findall(words, text)[0]]
    assert ends == pytest.approx([naive[0], cut[1], told[-1, 1].item()], abs=0.01) and naive[1] < 0.02
    held = train_toy(CASES["a, and a decoder"], steps=800)
    assert held[-1].tolist() == pytest.approx([0.3, 0.3], abs=0.05) and (held[-1] < held[600]).all()


def test_tables_of_one_seed_read_as_one_seed():
    rows = [row for row in shipped() if row["seed"] == 5]
    whole = [row for row in rows if row["arm"] == "DSD"]
    rows += [row | {"arm": f"without {part}"} for row in whole for part in ("views", "deep")]
    for question in PAIRS:
        table = readable(verdicts(rows, question))
        assert set(table["verdict"]) == {"undecided (1 seed)"} and set(table["+/-"]) == set(table["detectable"]) == {
            "–"
        }
        assert not table.isna().any(axis=None) and "nan" not in table.to_string()
    assert set(verdicts(rows, "unity", "flops")["metric"]) == set(JUDGED)


def test_findings_fit_on_a_screen_and_the_first_screen_tells_the_verdict():
    rows = shipped()
    assert check_words(findings_table(all_findings(rows)).data) <= 250
    first = nbformat.read(BOOK, as_version=4).cells[0].source
    assert f"**Verdict.** {verdict_line(rows)}\n" in first


def test_a_verdict_needs_all_seeds():
    row = {"arm": "a: v", "budget": "steps", "rank": 6.0, "collapsed at": None}
    rows = [row | {"seed": 5}, row | {"seed": 6, "collapsed at": 80}]
    assert collapses(rows, "?", "a: v", True).verdict == "undecided (2 seeds)"
    assert collapses(rows[:1], "?", "a: v", True).verdict == "contradicted (1 seed)"


# ---- what ships, and what a job leaves


def test_the_film_that_ships_shows_the_steps():
    film = load_film(paths.data() / "results" / FILM)
    assert list(film.arms) == [arm.name for arm in SCALES["laptop"].table("steps")]
    assert f"{film.clouds.shape[2]} held-out images as points" in prose()
    assert film.steps[-1] == 400
    ways = [found and found[0] for found in (lost(film, arm) for arm in range(len(film.arms)))]
    assert ways == ["spread", "rank", None, None]


def test_what_the_text_says_of_denoising_is_in_its_film():
    film = load_film(paths.data() / "results" / DENOISING, Denoising)
    (distilled, *_, d), (velocity, *_, v) = film.missed
    assert f"At $t={film.times[0]:g}$ the diffusion head misses {distilled:.0%}".replace("%", " %") in prose()
    assert f"the velocity head misses {100 * velocity:.1f} %" in prose() and d < v and film.labels[0] == "disc"
    assert film.errors["times"].tolist() == film.times and film.errors["missed by the velocity head"][0] == velocity


def test_the_whole_network_that_ships_is_what_its_card_says():
    run, folder = load_run("dsd-shapes"), paths.data() / "runs" / "dsd-shapes"
    judged = json.loads((folder / "card.json").read_text())["judged"]
    assert identity(run.recipe) == identity(whole_recipe()) and run.step == run.recipe.training.steps
    images = run.images("validation").images(slice(0, 250))
    with torch.no_grad():
        assert psnr(run.decode(run.net.latents(images)), images) == pytest.approx(judged["psnr"], abs=0.1)
    assert f"the class of {judged['accuracy']:.0%} of 500" in " ".join((folder / "card.md").read_text().split())


def test_the_job_keeps_its_rows(smoke_job):
    smoke = smoke_job("08")
    folder = smoke.path(".html").parent
    assert {row["arm"] for row in load_rows(folder / "08_rows.json")} == {arm.name for arm in SCALES["smoke"].table()}
    check_figure(smoke, "08_dsd", "08_toy")
    beside = json.loads((folder / "08_denoising.json").read_text())
    assert len(beside["missed by the diffusion head"]) == len(beside["times"]) > 3
