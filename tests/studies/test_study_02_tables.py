"""Study 02: which tables are trained, what ships of the lenses, and how rows become figures."""

import re
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

from maskalign_lab.base import paths
from maskalign_lab.gradient_norms import observe
from maskalign_lab.measure.courses import METRICS
from maskalign_lab.measure.findings import findings_table
from maskalign_lab.measure.verdicts import by_seed
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.rung import UNSEEN
from maskalign_lab.studies.position_preference import conflict_courses, lenses, tables
from maskalign_lab.studies.position_preference.cause_findings import cause_table, follows
from maskalign_lab.studies.position_preference.depth_film import load_film
from maskalign_lab.studies.position_preference.gap_quality import correlation_table
from maskalign_lab.studies.position_preference.mixer_figures import dose_table, mixer_findings
from maskalign_lab.studies.position_preference.opening import SHIPPED, TABLES, open_study
from maskalign_lab.studies.position_preference.ranked_runs import ROWS as RANKED
from maskalign_lab.studies.position_preference.ranking_figures import all_findings as ranking_findings
from maskalign_lab.studies.position_preference.ranking_figures import trust_table
from maskalign_lab.studies.position_preference.summary import CHOSEN, all_findings

RESULTS = paths.data() / "results"


def study(**changes):
    given = {"preset": "laptop", "dataset": "shapes", "device": "cpu", "overrides": "", "out_dir": None, "count": 0}
    return SimpleNamespace(**given | {"tables": TABLES, "observed": []} | changes)


@pytest.fixture
def trained(monkeypatch):
    """What `run_arms` was asked for."""
    calls = []
    monkeypatch.setattr(tables, "run_arms", lambda *given: calls.append(given) or [])
    return calls


@pytest.mark.parametrize("name", TABLES)
def test_without_seeds_what_ships_is_shown(name, trained):
    shipped = RESULTS / f"{tables.EXPERIMENTS[name].table}_shapes.json"
    assert tables.table_rows(study(), name) == load_rows(shipped) and not trained


@pytest.mark.parametrize("name", TABLES)
def test_seeds_train_the_tables_that_are_named_alone(name, trained, tmp_path):
    others = tuple(other for other in TABLES if other != name)
    tables.table_rows(study(count=2, tables=others), name)
    assert not trained
    tables.table_rows(study(count=2, out_dir=str(tmp_path)), name)
    ((arms, seeds, recipe_of, baseline, measure, _, keep, device),) = trained
    assert list(seeds) == [UNSEEN, UNSEEN + 1] and device == "cpu" and keep.name == f"02_{name}.json"
    assert baseline == ("SiT" if name == "mixer" else None) and arms[0].name == "SiT"
    assert all(recipe_of(arm, 5).training.steps == 1000 for arm in arms)
    assert measure.keywords["samples"] == 500


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_of_pictures_has_no_oracle_no_torus_and_no_judge(name, trained):
    tables.table_rows(study(count=1, dataset="digits"), name)
    (arms, _, recipe_of, *_, measure, _, _, _) = trained[0]
    assert measure.keywords["samples"] == 0
    assert not any("oracle" in arm.name or "torus" in arm.name for arm in arms)


def test_an_unknown_table_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="Did you mean 'mixer'"):
        open_study(tables="mixr")
    with pytest.raises(ValueError, match="table of study 02"):
        tables.table_rows(study(), "dose")


def test_what_ships_of_the_lenses_is_of_the_runs_that_the_study_opens_with():
    runs = [SimpleNamespace(name=f"{name}-shapes") for name in SHIPPED]
    shown = lenses.lenses_of(study(observed=runs))
    seen, aligned = lenses.seen_in(shown.depth)
    assert list(seen) == shown.film.runs == [f"{name}-shapes" for name in SHIPPED]
    assert {row["arm"] for row in shown.conflict} == set(aligned) == set(seen) - {"sit-shapes"}
    for name, of in seen.items():
        assert set(of) == {"probe", "CKNNA"} and of["probe"].values.shape == (len(lenses.TIMES), 12), name
        assert of["probe"].chance == 0.1 and (of["probe"].halves > 0).all()
    film = load_film(RESULTS / lenses.FILM)
    assert film.heat.shape == (4, 12, 9) and np.isfinite(film.cosines).all()
    assert len({row["teacher"] for row in shown.space}) == 6


def test_a_conflict_needs_no_more_images_than_it_looks_at():
    run = load_run("repa-shapes")
    batches = lenses.few_batches(run, 2)
    assert len(batches.dataset) == 2 * run.recipe.training.batch_size
    assert len(batches(1).y) == run.recipe.training.batch_size


def test_the_findings_are_ten_at_most_and_say_what_is_missing():
    nothing = {name: [] for name in TABLES}
    makes = all_findings(nothing, [])
    assert len(makes) == sum(map(len, CHOSEN.values())) == 10
    assert "trains them" in findings_table(makes).data
    with pytest.raises(ValueError, match="finding of gap 'told alike: velocty'. Did you mean 'told alike: velocity'"):
        all_findings(nothing, [], {"gap": ["told alike: velocty"]})


def test_what_the_first_screen_says_of_gaps_and_rankings_is_in_the_rows():
    masked, ranked = load_rows(RESULTS / "05_maskalign_shapes.json"), load_rows(RESULTS / RANKED)
    table = correlation_table(masked)
    over_all = table[(table["part"] == "between") & (table["among"] == "all arms")]
    assert set(over_all["verdict"]) == {"contradicted"} and set(over_all["metric"]) == set(list(METRICS.values())[1:])
    assert set(table[table["part"] == "within"]["verdict"]) == {"undecided"}
    norms = ranking_findings(ranked)[0]()
    assert norms.verdict.startswith("contradicted") and "g_i" in norms.question


def test_what_is_said_of_the_mixers_doses_is_in_the_rows():
    """Of the networks after equal steps: where nothing comes back the gap is widest, and neighbours are enough."""
    rows, text = load_rows(RESULTS / "02_mixer_shapes.json"), said("Two seeds; over the seven doses")
    table, silent = dose_table(rows), ["mask, no mixer", "mixer radius 0"]
    seeing = table.drop(silent)
    assert (table.loc[silent, "restored"] == 0).all() and len(table) == 7
    assert seeing["restored"].idxmin() == "mixer of 1" and 0.2 < seeing["restored"].min() < 0.3
    assert seeing["restored"].idxmax() == "mixer radius 1" and 0.85 < seeing["restored"].max() < 0.95
    assert 0.0003 < table.loc[silent, "gap"].min() and table.loc[silent, "gap"].max() < 0.00055
    assert seeing["gap"].max() < 0.0001
    between = mixer_findings(rows)["between arms"]()
    assert between.effect.replace("-", "−") in text and between.verdict.startswith("reproduced")
    reg = np.mean([*by_seed(rows, "velocity")["REG"].values()])
    losses = [*table.loc[["mixer radius 1", "mixer radius 2", "MaskAlign"], "velocity"], reg]
    assert re.findall(r"\.\d{3}\b", text.partition("the loss is")[2]) == [f"{loss:.3f}"[1:] for loss in losses]


def said(words: str) -> str:
    """The text of the notebook that has some words."""
    book = nbformat.read(paths.notebooks() / "02_position_preference.ipynb", as_version=4)
    return next(cell.source for cell in book.cells if cell.cell_type == "markdown" and words in cell.source)


def test_what_the_first_screen_says_of_untrained_networks_is_in_the_rows():
    cells = cause_table(load_rows(RESULTS / "02_causes_shapes.json")).set_index(["student", "teacher"])
    for student in ("untrained", "SiT", "REPA"):
        peaks = [cells.loc[(student, "as taught"), f"peak, t = {t}"] for t in ("0", "0.5", "1")]
        assert np.min(peaks) > 2, student


def test_what_the_first_screen_says_of_a_teacher_whose_tokens_are_moved_is_in_the_rows():
    rows = load_rows(RESULTS / "02_causes_shapes.json")
    assert follows(rows, True).verdict.startswith("higher") and follows(rows, False).verdict.startswith("undecided")


def test_what_is_said_of_the_first_steps_is_in_the_rows():
    rows = load_rows(RESULTS / conflict_courses.ROWS)
    assert not [row for row in rows if row["step"] > 30 and row["mean"] < -row["mean half"]]
    for row in (row for row in rows if row["part"] == "alignment" and row["step"] == conflict_courses.STEPS):
        assert row["times"][-1] == 0.95 and row["per t"][-1] > row["per t half"][-1], row["arm"]


def test_what_is_said_of_scores_is_in_the_rows():
    """Integrated gradients predict better than equal scores in every network; delta says nothing of that."""
    trust = trust_table(load_rows(RESULTS / RANKED))
    runs = [f"{name}-shapes" for name in SHIPPED]
    assert set(trust.columns) == {(key, run) for key in ("delta", "infidelity") for run in runs}
    assert (trust.loc["integrated gradients", "infidelity"] < 1).all()
    assert trust.loc["own change", "delta"].max() == 0 < trust.loc["own change", "infidelity"].min()


def test_other_runs_are_ranked_now_and_in_one_case():
    observed = [observe(load_run("repa-shapes"))]
    rows = lenses.rankings_of(study(preset="smoke", observed=observed))
    assert {(row["run"], row["t"], row["images"]) for row in rows} == {("repa-shapes", 0.5, 4)}
