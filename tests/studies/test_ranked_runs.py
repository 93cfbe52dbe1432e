"""Study 02's rankings: what is asked of which run, what a row holds, what figures draw and findings say of it."""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from maskalign_lab.base import paths
from maskalign_lab.gradient_norms import Observed, observe
from maskalign_lab.measure.attribution import ATTRIBUTIONS
from maskalign_lab.measure.findings import MOST_ROWS, check_words, findings_table
from maskalign_lab.measure.rankings import NORM, POSITIONS, RANDOM
from maskalign_lab.measure.wording import signed
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies import shipped_runs
from maskalign_lab.studies.position_preference import ranked_runs, ranking_figures
from maskalign_lab.studies.position_preference.ranked_runs import MIDDLE, PATH, RUNS, TIMES, Case, case_rows, cases_of

RANKINGS = [*ATTRIBUTIONS, POSITIONS, RANDOM]


@cache
def shipped():
    return load_rows(paths.data() / "results" / ranked_runs.ROWS)


def of(method: str) -> Observed:
    """A run of which only the method is known."""
    recipe = SimpleNamespace(method=SimpleNamespace(name=method, mask_ratio=0.25))
    return Observed("a", SimpleNamespace(recipe=recipe), None, 4)


def test_only_networks_that_were_trained_with_masks_are_asked_without_tokens():
    assert {case.removal for case in cases_of(of("reg"))} == {"replace"}
    dropped = [case.t for case in cases_of(of("maskalign")) if case.removal == "drop"]
    assert dropped == list(TIMES) and all(NORM in case.names for case in cases_of(of("maskalign")))


# ---- a row


@cache
def small(removal: str = "replace", name: str = "repa-shapes"):
    return case_rows(observe(load_run(name)), Case(MIDDLE, removal=removal, names=(NORM, PATH)), images=4, looked=1)


@pytest.mark.parametrize(("removal", "name"), [("replace", "repa-shapes"), ("drop", "maskalign-shapes")])
def test_a_row_holds_one_ranking(removal, name):
    rows = small(removal, name)
    assert [row["ranking"] for row in rows] == [NORM, PATH, POSITIONS, RANDOM] and json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["images"] == 4 and len(row["levels"]) == len(row["deletion"]) == len(row["insertion half"])
        assert row["deletion"][0] == row["insertion"][0] == rows[0]["deletion"][0]
    assert rows[-1]["less random"] == [0, 0] and rows[0]["less norm"] == [0, 0] and rows[0]["misaligned"][0] > 0
    assert ("of greedy" in rows[0]) is (removal == "replace") and ("delta" in rows[1]) and ("delta" not in rows[0])


def test_the_drop_is_what_all_rankings_lose_in_the_end():
    for row in small():
        assert row["deletion"][0] - row["deletion"][-1] == pytest.approx(row["drop"], abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(7)))
def test_rank_correlation_is_spearman_s(order):
    one, other = torch.arange(7.0).exp()[None], torch.tensor(order)[None].float()
    known = spearmanr(one[0], other[0]).statistic
    assert float(ranked_runs.rank_correlation(one, other)) == pytest.approx(known)


# ---- figures


def test_figures_of_what_was_not_measured_are_none():
    assert ranking_figures.curves_figure(small(), "class") is None and ranking_figures.gaps_figure([]) is None


def rows_of(gap: float, runs=("a-shapes", "b-shapes")):
    """Rows of two runs in which every ranking but chance has one gap, of a drop of two."""
    curve = {"levels": [0, 8, 16], "deletion": [2.0, 1.0, 0.0], "insertion": [2.0, 1.5, 0.0]}
    curve |= {
        "deletion half": [0.1] * 3,
        "insertion half": [0.1] * 3,
        "drop": 2.0,
        "drop half": 0.1,
        "images": 128,
        "of greedy": 0.5,
    }
    rows = []
    for run in runs:
        for removal, question in (("replace", "alignment"), ("replace", "class"), ("drop", "alignment")):
            for ranking in RANKINGS:
                less = [0.0, 0.0] if ranking == RANDOM else [gap, 0.1]
                row = {"run": run, "question": question, "t": MIDDLE, "removal": removal, "stand_in": "noise"}
                others = {f"less {other}": less for other in ranked_runs.OTHERS}
                rows.append(row | {"ranking": ranking, "misaligned": less} | curve | others)
    return rows


def test_curves_run_over_shares_that_are_gone_or_there():
    figure = ranking_figures.curves_figure(rows_of(0.4))
    deletion, insertion = (figure.axes[place].lines[0] for place in (0, 2))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a", "b"]
    assert np.allclose(deletion.get_xydata(), [(0, 2), (0.5, 1), (1, 0)])
    assert np.allclose(insertion.get_xydata(), [(1, 2), (0.5, 1.5), (0, 0)])
    assert len(figure.axes[0].lines) == 1 + len(ranking_figures.DRAWN)


def test_gaps_are_drawn_with_their_intervals_and_greedy_in_proportion():
    figure = ranking_figures.gaps_figure(rows_of(0.4))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [name for name in RANKINGS if name != RANDOM] + ["greedy"]
    (drawn,) = figure.axes[1].containers
    assert np.allclose(drawn.lines[0].get_xydata(), [(0.4, place) for place in range(len(names) - 1)])
    assert np.allclose(drawn.lines[2][0].get_segments()[0], [(0.3, 0), (0.5, 0)])
    assert np.allclose(figure.axes[1].lines[-1].get_xydata(), [(0.8, len(names) - 1)])  # every ranking has half of it


def test_maps_of_shares_of_one_drop_have_one_scale():
    found = {name: np.full((2, 16), value) for name, value in zip(ranking_figures.MAPPED, (3.0, -2.0, 1.0, 0.5))}
    rows = ranking_figures.map_rows(found, 4)
    ends = {name: panels[0].range for name, panels in rows.items()}
    assert list(ends.values()) == [None, (-2, 2), (-2, 2), (-0.5, 0.5)]
    assert {panel.quantity for panel in rows[PATH]} == {"attribution"} and rows[NORM][0].values.shape == (4, 4)


# ---- findings


def table(rows, **runs):
    return findings_table(ranking_figures.all_findings(rows, **runs)).data


@pytest.mark.parametrize(("gap", "word"), [(0.4, "reproduced"), (-0.4, "contradicted"), (0.05, "undecided")])
def test_a_ranking_that_knows_more_than_chance_is_reproduced(gap, word):
    found = ranking_figures.of_images("?", ranking_figures.row_of(rows_of(gap), "a-shapes", NORM))
    assert found.verdict == f"{word} (128 images)" and found.effect == f"{signed(gap, 3)} +/- .100"
    assert 0.1 < float(found.detectable) < 0.2


@pytest.mark.parametrize(
    ("gap", "told"), [(0.4, "2 of 2 above chance | – | 0 below"), (-0.4, "0 of 2 above chance | – | 2 below")]
)
def test_networks_are_counted(gap, told):
    assert told in table(rows_of(gap), run="a-shapes", masked="b-shapes")


def test_findings_whose_rows_are_missing_are_counted():
    rows = [row for row in rows_of(0.4) if row["question"] != "class"]
    assert "no rows here: 2" in table(rows, run="a-shapes", masked="b-shapes")
    assert "missing here" in table([])


# ---- what ships


def test_what_ships_holds_every_ranking_of_every_run():
    for run in RUNS:
        asked = {(row["question"], row["t"], row["removal"], row["stand_in"]) for row in shipped() if row["run"] == run}
        known = {(case.question, case.t, case.removal, case.stand_in) for case in cases_of(observe(load_run(run)))}
        assert asked == known
    whole = ranking_figures.picked(shipped(), question="alignment")
    assert len(whole) == len(RUNS) * len(TIMES) * len(RANKINGS) and {row["images"] for row in whole} == {128}


def test_paths_converged_on_what_ships():
    deltas = {
        name: [row["delta"] for row in shipped() if row["ranking"] == name] for name in (PATH, "conductance, block 1")
    }
    assert max(deltas[PATH]) < 0.01 and max(deltas["conductance, block 1"]) < 0.05


def test_the_findings_fit_on_one_screen():
    made = ranking_figures.all_findings(shipped())
    assert len(made) <= MOST_ROWS and check_words(table(shipped())) and "no rows here" not in table(shipped())


def test_one_command_makes_the_rows(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ranked_runs, "load_run", lambda name, device: asked.append((name, device)) or name)
    monkeypatch.setattr(ranked_runs, "observe", lambda run: run)
    monkeypatch.setattr(ranked_runs, "ranking_rows", lambda runs: [{"run": run} for run in runs])
    made = shipped_runs.make("position-rankings", out=tmp_path, device="cpu")
    assert made == tmp_path / ranked_runs.ROWS and load_rows(made) == [{"run": run} for run in RUNS]
    assert asked == [(run, "cpu") for run in RUNS]
