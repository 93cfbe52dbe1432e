"""Study 02: which tables are trained, what ships of the lenses, and how rows become figures."""

import re
from copy import deepcopy
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from maskalign_lab.base import paths
from maskalign_lab.gradient_norms import observe
from maskalign_lab.measure.courses import METRICS
from maskalign_lab.measure.findings import check_words, findings_table
from maskalign_lab.measure.rankings import NORM
from maskalign_lab.measure.spatial import METRICS as SPATIAL
from maskalign_lab.measure.verdicts import by_seed
from maskalign_lab.measure.wording import in_seeds, plain, signed
from maskalign_lab.position_preference import agreement, peak_again
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.rung import UNSEEN
from maskalign_lab.studies.position_preference import answers, conflict_courses, lenses, tables
from maskalign_lab.studies.position_preference.cause_findings import (
    cause_table,
    cell,
    following,
    follows,
    likeness_over_time,
)
from maskalign_lab.studies.position_preference.causes import CUT
from maskalign_lab.studies.position_preference.depth_film import load_film
from maskalign_lab.studies.position_preference.flip import flip_table
from maskalign_lab.studies.position_preference.gap_quality import correlation_table, gap_note
from maskalign_lab.studies.position_preference.mixer_figures import dose_table, mixer_findings
from maskalign_lab.studies.position_preference.opening import SHIPPED, TABLES, open_study
from maskalign_lab.studies.position_preference.part_tables import training_table
from maskalign_lab.studies.position_preference.ranked_runs import ROWS as RANKED
from maskalign_lab.studies.position_preference.ranking_figures import all_findings as ranking_findings
from maskalign_lab.studies.position_preference.ranking_figures import picked, trust_table
from maskalign_lab.studies.position_preference.summary import CHOSEN, all_findings
from maskalign_lab.studies.position_preference.surveys import load_parts

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
    assert list(seeds) == [UNSEEN, UNSEEN + 1] and device == "cpu" and keep.name == f"02_{name}_rows.json"
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


def test_the_answers_end_in_what_the_rows_say():
    """Their numbers are made from the rows; their conclusions are words, and hold for the rows that ship."""
    causes, mixer, masked = (
        load_rows(RESULTS / f"{name}_shapes.json") for name in ("02_causes", "02_mixer", "05_maskalign")
    )
    moved, still = ({of: following(causes, of, how) for of in ("REPA", f"REPA, {CUT}")} for how in (True, False))
    assert (moved["REPA"] > still["REPA"]).all() and moved["REPA"][:, :-1].min() > 0.9
    cut = f"REPA, {CUT}"
    assert (moved[cut] < still[cut])[:, :-1].all() and (moved[cut] > still[cut])[:, -1].all()
    told = answers.cause_answer(causes)
    assert "REPA's map goes with the teacher's tokens:" in told and "With attention cut it stays:" in told
    assert "*consistent with* the objection" in answers.dose_answer(mixer)
    assert re.search(r"\+\.70 \([^)]*\), undecided", answers.dose_answer(mixer)) and "(+.70)" in said("**Verdict.**")
    assert "decided only together with the arms that drop more" in answers.quality_answer(masked, mixer)
    silent, table = ["mask, no mixer", "mixer radius 0"], dose_table(mixer)
    assert (table.loc[silent, "restored"] == 0).all() and (table.drop(silent)["restored"] > 0).all()
    assert (
        table.loc[silent, "gap"].min() > table.drop(silent)["gap"].max()
        and table["velocity"].idxmin() == "mixer radius 1"
    )
    assert mixer_findings(mixer)["latents come back"]().verdict.startswith("undecided")
    every = correlation_table(masked)
    assert set(every[(every["part"] == "between") & (every["among"] == "told alike")]["verdict"]) == {"undecided"}
    names = by_seed(masked, "gap")
    assert {"ratio 0.5", "ratio 0.75"} <= set(names)
    fewer = answers.quality(masked, [name for name in names if "ratio" not in name], ["frechet", "accuracy"])
    assert all(each.verdict(0) == "undecided" for each in fewer)
    assert 0.12 < np.mean([*names["MaskAlign"].values()]) / np.mean([*names["REG"].values()]) < 0.145
    assert "1 seed" in answers.cause_answer([row for row in causes if row["seed"] == 5])


def test_whether_the_noise_turns_a_map_over_is_read_from_its_rows():
    causes = load_rows(RESULTS / "02_causes_shapes.json")
    usual = [row for row in causes if row["arm"] == "REPA"]
    assert answers.paths_beside(usual) == ""
    same = [row | {"arm": "REPA, cosine path"} for row in usual]
    assert answers.paths_beside(usual + same).endswith("None turns it over before pure noise.")
    negated = deepcopy(same)
    for case in (case for row in negated for case in row["cases"]):
        case["logs"] = (-np.array(case["logs"])).tolist()
    assert answers.paths_beside(usual + negated).endswith("which is turned over on the cosine path.")


def test_a_favourite_under_blind_teachers_on_a_torus_is_told():
    causes = load_rows(RESULTS / "02_causes_shapes.json")
    assert "no network has a favourite: 1.1 to 1.4" in answers.without_makers(causes)
    assert answers.without_makers([row for row in causes if row["arm"] != "SiT, torus"]) == ""
    for case in next(row for row in causes if row["arm"] == "SiT, torus")["cases"]:
        case["marks"] = np.roll(np.eye(16)[0] + np.zeros((2, 5, 16)), 3).tolist()
    assert "a favourite remains" in answers.without_makers(causes)


def said(words: str) -> str:
    """The text of the notebook that has some words."""
    book = nbformat.read(paths.notebooks() / "02_position_preference.ipynb", as_version=4)
    return next(cell.source for cell in book.cells if cell.cell_type == "markdown" and words in cell.source)


@pytest.fixture(scope="module")
def surveys():
    return {name: load_parts(paths.data() / "runs" / f"{name}-shapes") for name in SHIPPED}


def test_what_is_said_of_the_runs_that_ship_is_in_their_surveys(surveys):
    text = said("What this study finds").replace("\n", " ")
    r = {name: agreement(*torch.from_numpy(survey.means.sum(2))).numpy() for name, survey in surveys.items()}
    aligned = [r[name] for name in SHIPPED if name != "sit"]
    ends, inside = ([of[at] for of in aligned] for at in ((0, -1), (1, -2)))
    for values in (ends, inside):
        assert f"by {spoken(max(values))} to {spoken(min(values))}" in text
    assert min(of[0, 1] for of in aligned) > 0.85 and min(of[3:10, 3:10].min() for of in aligned) > 0.85
    shares = np.stack([survey.share[:, 0] for survey in surveys.values()])
    assert f"{100 * shares.min():.0f} to {100 * shares.max():.0f} % of the variance" in text and shares.max() < 0.5
    peaks = {name: peak_again(*torch.from_numpy(survey.marks[:, 5])).item() for name, survey in surveys.items()}
    assert f"{min(peaks.values()):.1f} to {max(peaks.values()):.1f} times" in text
    verdict = f"{peaks['maskalign']:.2f} times the mean in MaskAlign, {peaks['reg']:.2f} in REG"
    assert verdict in said("**Verdict.**").replace("\n", " ")
    assert f"MaskAlign's favourite, {peaks['maskalign']:.2f}, is no smaller\nthan REG's, {peaks['reg']:.2f}" in said(
        "Fig. 2b"
    )


def spoken(value: float) -> str:
    """ "−.35"."""
    return signed(value, 2).replace("-", "−")


def plain_cells() -> pd.DataFrame:
    """The cells of the grid on the data, times and path of the papers."""
    table = cause_table(load_rows(RESULTS / "02_causes_shapes.json"))
    return table[table["change"] == ""].set_index(["student", "teacher"])


def test_what_is_said_of_the_course_of_training_is_in_the_stored_maps():
    runs = [
        SimpleNamespace(name=name, run=SimpleNamespace(path=paths.data() / "runs" / f"{name}-shapes"))
        for name in SHIPPED
    ]
    table = training_table(runs)
    table = table[table["run"] != "sit"].set_index("step")
    text = said("Over **training**")
    for step in (1000, 3000):
        low, high = (spoken(end(table.loc[step, "t = 0.0"])) for end in (min, max))
        assert f"({low} to {high})" in text
    assert table.loc[1000, ["t = 0.5", "t = 1.0"]].min().min() > 0.8


def test_what_is_said_of_the_turn_is_in_the_rows():
    cells = plain_cells()
    repa, text = cells.loc[("REPA", "as taught")], said("Why the map of the shipped REPA turns over")
    assert f"{spoken(repa['with objects, t = 0'])} at t = 0 and {spoken(repa['with objects, t = 1'])} at t = 1" in text
    angle = plain(repa["angle's share, t = 0"], 2)
    assert f"the angle has {angle} of the map" in text
    oracle = cell(load_rows(RESULTS / "02_causes_shapes.json"), "REPA", "oracle")
    assert min(agreement(*case.logs)[0, -1] for case in oracle.values()) > 0.7
    r = agreement(*torch.from_numpy(load_parts(paths.data() / "runs" / "sit-shapes").means.sum(2)))
    assert r[0, -1] > 0.6


def test_what_is_said_of_lengths_is_seen_in_the_run_that_ships():
    observed = observe(load_run("repa-shapes", device="cpu"))
    flip = flip_table(observed, observed.run.survey_images(256), (0.0, 1.0))
    assert 1.8 < flip.loc[0.0, "length on objects"] < 2.3 and flip.loc[0.0, "angle's share"] < 0.05
    assert flip.loc[0.0, "map and objects"] < -0.8 and flip.loc[1.0, "map and objects"] > 0.7
    assert abs(flip.loc[1.0, "length's share"] - flip.loc[1.0, "angle's share"]) < 0.15
    assert flip.loc[0.0, "length and spread"] > 0.7 and flip.loc[1.0, "length and spread"] < -0.7


def test_what_the_first_screen_says_of_untrained_networks_is_in_the_rows():
    cells = plain_cells()
    for student in ("untrained", "SiT", "REPA"):
        peaks = [cells.loc[(student, "as taught"), f"peak, t = {t}"] for t in ("0", "0.5", "1")]
        assert np.min(peaks) > 2, student


def test_what_the_first_screen_says_of_a_teacher_whose_tokens_are_moved_is_in_the_rows():
    rows = load_rows(RESULTS / "02_causes_shapes.json")
    assert follows(rows, True).verdict.startswith("higher") and follows(rows, False).verdict.startswith("undecided")

    along = following(rows, "SiT", True) > following(rows, "SiT", False)
    assert along[:, [0, 1, 3, 4]].tolist() == [[True, True, False, False]] * 2  # not at 0.75 and 1
    assert along[:, 2].tolist() == [True, False]  # at 0.5 the seeds differ
    assert {len(cell(rows, each)) for each in ("SiT", "untrained")} == {2}
    assert len(following(rows, "MaskAlign", True)) == 1
    assert answers.masked_too(rows).startswith("MaskAlign's goes with the teacher's tokens: ")
    assert answers.masked_too([row for row in rows if row["arm"] != "MaskAlign, permuted"]) == ""


def test_what_the_first_screen_says_of_the_border_and_of_the_noise_is_in_the_rows():
    rows, first = load_rows(RESULTS / "02_causes_shapes.json"), said("What this study finds")
    assert "1.1 to 1.4" in answers.without_makers(rows) and "(1.1 to 1.4 times the mean; one seed each)" in first
    seeds = {key: len(cell(rows, *key, "torus")) for key in answers.BLIND}
    assert set(seeds.values()) == {1}
    usual = cell(rows, "REPA")
    likeness = [
        likeness_over_time(other[5], usual[5])[:-1]
        for other in (cell(rows, "REPA", "as taught", change) for change in answers.CHANGES)
    ]
    assert f"({answers.span(likeness)}; one seed each)" in first


def test_the_first_screen_answers_every_objection_with_effect_and_interval():
    first, rows = (
        said("What this study finds"),
        {name: load_rows(RESULTS / f"02_{name}_shapes.json") for name in TABLES},
    )
    asked = {"causes": ("moved along", "left where it was"), "mixer": ("between arms",), "gap": ("all arms: frechet",)}
    makes = all_findings(rows, load_rows(RESULTS / "05_maskalign_shapes.json"), asked)
    moved, left, dose, gap = (make() for make in makes)
    plain_text = first.replace("\n   ", " ")
    for found in (moved, left):
        assert found.effect.partition(" (")[0] in plain_text and f"({in_seeds(2)})" in plain_text
    rho, ends = dose.effect[:-1].split(" (")
    assert f"rank correlation {rho}, from {ends}; {dose.verdict.partition('(')[2]}" in plain_text
    effect = gap.effect[:-1].replace("-", "−")
    assert gap.verdict.startswith("contradicted") and f"{effect}; {gap.verdict[14:]}" in plain_text


def test_the_findings_fit_on_one_screen():
    rows = {name: load_rows(RESULTS / f"02_{name}_shapes.json") for name in TABLES}
    shown = findings_table(all_findings(rows, load_rows(RESULTS / "05_maskalign_shapes.json"))).data
    assert check_words(f"{said('## Findings')} {shown}") > 100


def test_no_undecided_stands_without_what_would_have_been_seen():
    """Nor a verdict without how many of its like are luck; and what was not trained is named."""
    causes, mixer, masked = (
        load_rows(RESULTS / f"{name}_shapes.json") for name in ("02_causes", "02_mixer", "05_maskalign")
    )
    told = [answers.dose_answer(mixer), answers.quality_answer(masked, mixer)]
    for text in (*told, gap_note(masked)):
        assert "luck would decide about" in text
    for text in told:
        for behind in text.split("undecided")[1:]:
            assert re.match(r"\*?,? ?(\(\d seeds\), )?(least|detectable|nothing)", behind), behind[:40]
    few = [row for row in causes if row["arm"] != "SiT, torus"]
    assert "No rows here of `SiT, torus`" in answers.cause_answer(few)
    assert "`mixer radius 3`" in told[0] and "s each (median)" in told[0]


def test_what_is_said_of_rankings_is_in_the_rows():
    rows = load_rows(RESULTS / RANKED)
    by_norm = {
        (row["run"].removesuffix("-shapes"), row["t"]): row["less random"]
        for row in picked(rows, question="alignment", ranking=NORM)
    }
    assert all(by_norm[run, t][0] < -by_norm[run, t][1] for run in ("repa", "sit") for t in (0.2, 0.5, 0.8))
    assert all(by_norm[run, 0.8][0] < -by_norm[run, 0.8][1] for run in ("reg", "maskalign"))
    told = [signed(by_norm[run, 0.5][0], 3) for run in ("reg", "maskalign")]
    assert f"({told[0]} and {told[1]} at t = 0.5)" in said("What this study finds")
    last = ranking_findings(rows)[-1]()
    lost, whole = last.effect.split()[0], last.verdict.split()[0]
    assert f"loses {lost} of its cosine; with all content removed it is {whole}" in said("behind the mixer an eighth")


def test_what_is_said_of_untaught_teachers_is_in_the_rows():
    rows = [row for row in load_rows(RESULTS / lenses.ROWS) if row["lens"] == "space" and row["variant"] == "as it is"]
    of = {row["teacher"]: row for row in rows}
    above = {
        name: sum(of[f"untrained {name}"][metric] > of[name][metric] for metric in SPATIAL)
        for name in ("tiny", "tiny-4x4")
    }
    assert above == {"tiny": 4, "tiny-4x4": 3}


def test_what_is_said_of_the_first_steps_is_in_the_rows():
    rows = load_rows(RESULTS / conflict_courses.ROWS)
    haste = [row for row in rows if row["arm"] == "HASTE" and row["part"] == "alignment" and row["step"] >= row["stop"]]
    against = [
        mean
        for row in haste
        for mean, half in list(zip(row["per t"], row["per t half"], strict=True))[:2]
        if mean < -half
    ]
    told = said("And **on the way**?").replace("\n", " ")
    assert (
        f"in {len(against)} of {2 * len(haste)} looks from its stop on ({spoken(max(against))} to {spoken(min(against))})"
        in told
    )
    singly = [
        row["arm"]
        for row in rows
        if row["step"] > 30
        and row["part"] == "alignment"
        and any(mean < -half for mean, half in list(zip(row["per t"], row["per t half"], strict=True))[:2])
    ]
    assert {"REG", "REPA", "MaskAlign"} <= set(singly) and singly.count("MaskAlign") == 1
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
