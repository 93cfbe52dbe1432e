"""Gradient conflict of trained runs: rows of smallest trainings, and what their figures show."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.measure.conflict import conflict
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.experiments import load_rows, save_rows
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.runs.rung import table_seeds
from maskalign_lab.studies import shipped_runs
from maskalign_lab.studies.position_preference import conflict_courses
from maskalign_lab.studies.position_preference.conflict_courses import course_note, over_seeds
from maskalign_lab.studies.position_preference.conflict_figures import (
    ARMS,
    aligning_parts,
    arm_course,
    conflict_figure,
    conflict_rows,
    course_figure,
    course_rows,
    kept_often,
    stops_of,
    training_figure,
)
from maskalign_lab.studies.position_preference.notes import conflict_note
from maskalign_lab.workbench.plots import png

SMALL = "data.n=64 training.steps=6 training.warmup=1 training.batch_size=8"


@pytest.fixture(scope="module")
def haste(tmp_path_factory):
    """HASTE that stops half way, with its checkpoints."""
    folder = tmp_path_factory.mktemp("haste")
    recipe = kept_often(make_recipe("haste", "smoke", overrides=f"{SMALL} method.stop=3"))
    return train(recipe, folder / "run", "cpu", print_every=0)


@pytest.fixture(scope="module")
def course(haste):
    """Its conflict at every checkpoint."""
    return course_rows(haste, "HASTE", 2)


def test_rows_of_every_checkpoint_and_loss(haste, course):
    rows = course
    looked = [(row["step"], row["part"]) for row in rows]
    assert looked == [(step, part) for step in steps_of(haste) for part in ("alignment", "attention")]
    assert json.loads(json.dumps(rows)) == rows and stops_of(rows) == [3]
    assert np.shape(rows[0]["cosine"]) == np.shape(rows[0]["half"]) == (5, 2) and rows[0]["batch"] == 8
    assert all(png(figure(rows)) for figure in (conflict_figure, course_figure, training_figure))


def test_a_row_is_of_the_training_s_own_batches(haste):
    run = load_run(haste)
    alignment, attention = conflict_rows(run, batches=2, times=[0.3, 0.6])
    of = make_batches(run.recipe, "cpu")
    found = conflict(run.method, run.net, [of(0), of(1)], [0.3, 0.6], [1, 2], ("alignment", "attention"))
    for row, values in zip((alignment, attention), found, strict=True):
        assert np.allclose(row["cosine"], values.mean(-1), atol=1e-3)
        assert np.isclose(row["mean"], values.mean(), atol=1e-3) and row["arm"] == run.name


@pytest.mark.parametrize("method", ["repa", "irepa", "reg", "maskalign"])
def test_every_method_that_aligns_has_a_row(method, tmp_path):
    run = load_run(train(make_recipe(method, "smoke", overrides=SMALL), tmp_path / "run", "cpu", print_every=0))
    (row,) = conflict_rows(run, batches=2, times=[0.5])
    assert np.isfinite(row["cosine"]).all() and row["depths"] == [1, 2] and row["stop"] is None


def test_an_arm_is_trained_once_with_checkpoints_on_the_way(own_folders, capsys):
    recipe = make_recipe("repa", "smoke", overrides=SMALL)
    rows = arm_course(ARMS[0], recipe, 2, "cpu")
    assert [row["step"] for row in rows] == sorted(kept_often(recipe).training.kept) and rows[0]["arm"] == "REPA"
    capsys.readouterr()
    assert arm_course(ARMS[0], recipe, 2, "cpu") == rows and "training in" not in capsys.readouterr().out


def test_a_run_without_alignment_is_refused(haste):
    run = load_run("sit-shapes")
    with pytest.raises(ValueError, match="'sit', which aligns with no teacher.*Expected a run of repa, haste"):
        conflict_rows(run)
    assert aligning_parts(load_run(haste)) == (("alignment", "attention"), 2)


def test_haste_s_line_is_broken_behind_its_stop(course):
    rows = [row for row in course if row["part"] == "alignment"]
    axis = course_figure(rows).axes[0]
    whole, behind, dotted = axis.lines[1:4]
    assert max(whole.get_xdata()) <= 3 < min(behind.get_xdata()) and dotted.get_linestyle() == ":"
    assert axis.lines[-1].get_xdata()[0] == 3
    never = [row | {"stop": None} for row in rows]
    assert len(course_figure(never).axes[0].lines[2].get_xdata()) == 0 and stops_of(never) == []


# ---- courses over seeds


def seeds_of(levels, arm="REPA", stop=None):
    """Rows of some seeds at two steps; the second one agrees less by 1."""
    rows = []
    for seed, level in enumerate(levels):
        for step in (10, 20):
            value = level - (step == 20)
            row = {"arm": arm, "part": "alignment", "seed": seed, "step": step, "steps": 20, "stop": stop}
            row |= {"times": [0.1, 0.9], "depths": [1], "cosine": [[value], [value]], "half": [[0.1], [0.1]]}
            rows.append(row | {"mean": value, "mean half": 0.1, "per t": [value, None], "per t half": [0.1, None]})
    return rows


def test_seeds_are_averaged_with_student_s_interval():
    one, two = over_seeds(seeds_of([0.4, 0.5, 0.6]))
    assert one["seeds"] == 3 and one["mean"] == pytest.approx(0.5) and two["mean"] == pytest.approx(-0.5)
    assert one["mean half"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert np.isnan(one["per t"][1]) and one["cosine"] == [[pytest.approx(0.5)], [pytest.approx(0.5)]]
    assert all(png(figure(over_seeds(seeds_of([0.4, 0.5, 0.6])))) for figure in (course_figure, training_figure))


def test_one_seed_keeps_the_interval_of_its_batches():
    (row, _) = over_seeds(seeds_of([0.4]))
    assert row["mean half"] == 0.1 and row["seeds"] == 1


def test_a_course_in_words():
    note = course_note(over_seeds(seeds_of([0.4])))
    assert note == "* **REPA**: +.40 +/- .10 at step 10, -.60 +/- .10 at step 20; against each other at step 20."
    assert "at no look" in course_note(over_seeds(seeds_of([2.0]))) and "no course" in course_note([])


def test_of_one_batch_there_is_no_interval(haste):
    rows = over_seeds(course_rows(haste, "HASTE", 1))
    assert rows[0]["mean half"] is None and "+/-" not in course_note(rows) and "(one batch)" in conflict_note(rows)
    assert all(png(figure(rows)) for figure in (conflict_figure, course_figure, training_figure))


def test_one_command_makes_the_rows_that_are_missing(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(conflict_courses, "arm_course", lambda arm, recipe, *_: asked.append((arm.name, recipe)) or [
        {"arm": arm.name, "seed": recipe.training.seed}
    ])  # fmt: skip
    save_rows(tmp_path / conflict_courses.ROWS, [{"arm": "REPA", "seed": 5}])
    made = shipped_runs.make("position-conflict", out=tmp_path, device="cpu")
    expected = {(arm.name, seed) for arm in ARMS for seed in table_seeds(conflict_courses.SEEDS)}
    assert {(row["arm"], row["seed"]) for row in load_rows(made)} == expected and ("REPA", 5) not in [
        (name, recipe.training.seed) for name, recipe in asked
    ]
    assert {recipe.training.steps for _, recipe in asked} == {conflict_courses.STEPS}


def test_the_rows_that_ship_are_of_every_arm_seed_and_look():
    rows = load_rows(paths.data() / "results" / conflict_courses.ROWS)
    looks = sorted(
        kept_often(ARMS[0].recipe("study", overrides=f"training.steps={conflict_courses.STEPS}")).training.kept
    )
    for arm in ARMS:
        for seed in table_seeds(conflict_courses.SEEDS):
            mine = [row for row in rows if (row["arm"], row["seed"]) == (arm.name, seed)]
            assert sorted({row["step"] for row in mine}) == looks, (arm.name, seed)
            assert {row["part"] for row in mine} == (
                {"alignment", "attention"} if arm.name == "HASTE" else {"alignment"}
            )
    assert stops_of(rows) == [conflict_courses.STEPS // 2] and {row["batches"] for row in rows} == {
        conflict_courses.BATCHES
    }
    assert png(course_figure(over_seeds(rows))) and png(training_figure(over_seeds(rows)))


def test_another_run_is_asked_at_the_checkpoints_that_it_kept(haste):
    run = load_run(haste)
    study = SimpleNamespace(preset="smoke", observed=[SimpleNamespace(name=run.name, run=run)])
    rows = conflict_courses.courses_of(study)
    assert sorted({row["step"] for row in rows}) == list(steps_of(haste)) and {row["arm"] for row in rows} == {run.name}
    plain = SimpleNamespace(name="sit", run=load_run("sit-shapes"))
    assert conflict_courses.courses_of(SimpleNamespace(preset="smoke", observed=[plain])) == []


def test_arms_are_those_of_the_issue():
    assert [arm.method for arm in ARMS] == ["repa", "haste", "irepa", "reg", "maskalign"]
    recipe = ARMS[0].recipe("study")
    assert replace(kept_often(recipe), training=recipe.training) == recipe
