"""Recipes, runs and training: what is refused at once, what is found again, what resuming changes (nothing)."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.cli import main
from maskalign_lab.runs.presets import PRESETS, make_recipe
from maskalign_lab.runs.recipe import from_json, identity, override, to_json
from maskalign_lab.runs.run import ensure_run, find_run, load_run, train

pytestmark = pytest.mark.usefixtures("own_folders")
TINY = "network.width=16 network.depth=2 network.heads=2 data.n=64 training.batch_size=8 training.warmup=2"


def tiny(method: str = "sit", steps: int = 6, more: str = ""):
    aligned = " method.depth=1 method.projector_width=16" if method == "repa" else ""
    return make_recipe(method, "smoke", overrides=f"{TINY} training.steps={steps} {more}{aligned}")


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("method", ["sit", "repa"])
def test_every_preset_survives_a_round_trip(method, preset):
    recipe = make_recipe(method, preset)
    assert from_json(to_json(recipe)) == recipe and identity(from_json(to_json(recipe))) == identity(recipe)


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 10**6), lr=st.floats(1e-6, 1.0), seed=st.integers(0, 2**31))
def test_overrides_say_what_they_mean(steps, lr, seed):
    recipe = override(make_recipe(), f"training.steps={steps} training.lr={lr!r} training.seed={seed}")
    assert (recipe.training.steps, recipe.training.lr, recipe.training.seed) == (steps, lr, seed)
    assert identity(recipe) == identity(from_json(to_json(recipe)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.step=3", "Did you mean 'training.steps'"),
        ("training.steps=3.5", "expected int, got float"),
        ("training.lr=fast", "expected float, got str"),
        ("method.name=rpea", "Did you mean 'repa'"),
        ("steps=3", "not of the form section.field=value"),
        ("objective.prediction=w", "unknown prediction 'w'"),
    ],
)
def test_bad_overrides_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        override(make_recipe(), text)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        make_recipe(preset="smkoe")
    with pytest.raises(ValueError, match="Did you mean 'shapes'"):
        ensure_run(make_recipe("sit", "smoke", "shpaes"))
    with pytest.raises(FileNotFoundError, match="Did you mean 'repa-shapes'"):
        find_run("repa-shaeps")
    with pytest.raises(FileNotFoundError, match="path does not exist"):
        find_run("no/such/run")


def test_alignment_deeper_than_the_net_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="depth 9 is outside the network"):
        train(override(tiny("repa"), "method.depth=9"), tmp_path / "run", "cpu", 0)
    assert not (tmp_path / "run").exists()


def test_a_teacher_on_another_grid_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="8 *[x×] *8.*16 *[x×] *16|16 *[x×] *16.*8 *[x×] *8|grid"):
        train(override(tiny("repa"), "network.patch_size=2"), tmp_path / "run", "cpu", 0)
    assert not (tmp_path / "run").exists()


def test_a_run_is_trained_once_and_found_again(capsys):
    first = ensure_run(tiny("repa"), "cpu")
    stamp = (first.path / "steps").stat().st_mtime_ns
    again = ensure_run(tiny("repa"), "cpu")
    assert again.path == first.path and (again.path / "steps").stat().st_mtime_ns == stamp
    assert torch.equal(first.net.pos_embed, again.net.pos_embed)
    assert find_run(first.name) == first.path


def test_a_folder_with_another_recipe_is_not_overwritten(tmp_path):
    train(tiny(steps=2), tmp_path / "run", "cpu", 0)
    with pytest.raises(FileExistsError, match="another recipe"):
        train(tiny(steps=3), tmp_path / "run", "cpu", 0)
    assert load_run(tmp_path / "run").step == 2


def test_a_run_is_not_continued_with_other_data_or_another_teacher(tmp_path, monkeypatch):
    """And this is said before the teacher has looked at a single image."""
    train(tiny("repa", 2), tmp_path / "run", "cpu", 0)
    monkeypatch.setattr("maskalign_lab.runs.run.make_batches", lambda *_: pytest.fail("features were asked for"))
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert len(facts["data_digest"]) == len(facts["teacher_digest"]) == 16
    for name in ("data_digest", "teacher_digest"):
        (tmp_path / "run" / "facts.json").write_text(json.dumps(facts | {name: "0123456789abcdef"}))
        with pytest.raises(FileExistsError, match=f"{name} '0123456789abcdef', which is now '{facts[name]}'"):
            train(tiny("repa", 2), tmp_path / "run", "cpu", 0)


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut(tmp_path):
    train(tiny(steps=4, more="training.save_every=2 training.log_every=1"), tmp_path / "run", "cpu", 0)
    shutil.rmtree(tmp_path / "run" / "steps" / "000004")
    (tmp_path / "run" / "latest").write_text("000002")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"denoising": 0.')
    train(tiny(steps=4, more="training.save_every=2 training.log_every=1"), tmp_path / "run", "cpu", 0)
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_a_step_that_was_not_saved_names_those_that_were(tmp_path):
    train(tiny(steps=2), tmp_path / "run", "cpu", 0)
    with pytest.raises(FileNotFoundError, match=r"no step 7; it has \[2\]"):
        load_run(tmp_path / "run", step=7)


def test_resuming_in_a_new_process_is_exact(forks, tmp_path):
    more = "training.save_every=1 training.precision=float32 execution.keep=6"  # whole ones, to go on from each
    whole = train(tiny("repa", more=more), tmp_path / "whole", "cpu", 0)
    broken = [tmp_path / f"broken{stop}" for stop in (1, 3, 5)]
    for run, stop in zip(broken, (1, 3, 5)):  # as if the process had died after that step
        shutil.copytree(whole, run)
        for step in range(stop + 1, 7):
            shutil.rmtree(run / "steps" / f"{step:06d}")
        (run / "latest").write_text(f"{stop:06d}")
    code = (
        "import sys; from pathlib import Path; from maskalign_lab.runs.run import from_json, train\n"
        "for path in map(Path, sys.argv[1:]): train(from_json((path / 'recipe.json').read_text()), path, 'cpu', 0)"
    )
    assert forks.start(code, *broken).wait(120) == 0
    for run in broken:
        for name in ("model", "ema", "method", "optimizer"):
            a, b = (load_tensors(step_folder(each), name) for each in (whole, run))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), (run.name, name)


def test_the_log_holds_losses_and_rate(tmp_path, capsys):
    train(tiny("repa", steps=4, more="training.log_every=2"), tmp_path / "run", "cpu", 0.001)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"denoising", "alignment", "gradient_norm", "seconds"} <= lines[0].keys()
    assert "steps/s" in capsys.readouterr().out


def test_data_order_and_noise_are_the_same_for_both_methods(tmp_path):
    losses = []
    for method in ("sit", "repa"):
        train(tiny(method, steps=1, more="training.log_every=1"), tmp_path / method, "cpu", 0)
        losses.append(json.loads((tmp_path / method / "log.jsonl").read_text())["denoising"])
    assert losses[0] == losses[1]


def test_folder_datasets_are_remembered_by_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert make_recipe("sit", "smoke", "folder:pictures").data.name == f"folder:{tmp_path / 'pictures'}"


def test_runs_of_other_versions_stand_in_nobodys_way(capsys):
    """A newer version left a run with a field that this one does not know, another left half a file."""
    first = ensure_run(tiny(), "cpu")
    for name, text in (("newer", to_json(tiny()).replace('"seed"', '"sead"')), ("torn", "{")):
        folder = first.path.parent / name
        shutil.copytree(first.path, folder)
        (folder / "recipe.json").write_text(text)
    assert ensure_run(tiny(), "cpu").path == first.path
    assert ensure_run(tiny(steps=2), "cpu").step == 2
    assert main(["runs"]) == 0
    told = capsys.readouterr().out
    assert "newer" in told and "Did you mean 'seed'" in told and first.name in told
    with pytest.raises(ValueError, match="unknown TrainingConfig field 'sead'"):
        load_run("newer")
