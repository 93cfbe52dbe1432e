"""Gradient conflict of trained runs: rows of smallest trainings, and what their figures show."""

import json
from dataclasses import replace

import numpy as np
import pytest

from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.measure.conflict import conflict
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
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
from maskalign_lab.workbench.plots import png

SMALL = "data.n=64 training.steps=6 training.warmup=1 training.batch_size=8"


@pytest.fixture(scope="module")
def haste(tmp_path_factory):
    """HASTE that stops half way, with its checkpoints."""
    folder = tmp_path_factory.mktemp("haste")
    recipe = kept_often(make_recipe("haste", "smoke", overrides=f"{SMALL} method.stop=3"))
    return train(recipe, folder / "run", "cpu", print_every=0)


def test_rows_of_every_checkpoint_and_loss(haste):
    rows = course_rows(haste, "HASTE", 2)
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


def test_haste_s_line_is_broken_behind_its_stop(haste):
    rows = [row for row in course_rows(haste, "HASTE", 2) if row["part"] == "alignment"]
    axis = course_figure(rows).axes[0]
    whole, behind, dotted = axis.lines[1:4]
    assert max(whole.get_xdata()) <= 3 < min(behind.get_xdata()) and dotted.get_linestyle() == ":"
    assert axis.lines[-1].get_xdata()[0] == 3
    never = [row | {"stop": None} for row in rows]
    assert len(course_figure(never).axes[0].lines[2].get_xdata()) == 0 and stops_of(never) == []


def test_arms_are_those_of_the_issue():
    assert [arm.method for arm in ARMS] == ["repa", "haste", "irepa", "reg", "maskalign"]
    recipe = ARMS[0].recipe("study")
    assert replace(kept_often(recipe), training=recipe.training) == recipe
