"""Study 01: a mistake, a given run, an edited loss that is really trained, and the runs that ship."""

import json
from dataclasses import replace
from functools import partial

import nbformat
import pytest
from shared.studies import run_cells, run_job, with_tables

from maskalign_lab import gradient_norms
from maskalign_lab.base import paths
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, identity
from maskalign_lab.runs.run import train
from maskalign_lab.runs.sources import images_of
from maskalign_lab.studies.shipped_runs import OTHERS, SHIPPED, shipped_recipe


def test_a_mistake_inside_ends_the_job_with_its_error_and_keeps_the_notebook(tmp_path, own_folders):
    """For the mistakes of all studies, see `test_all_studies`."""
    job = run_job("01", {"run": "repa-shaeps"}, tmp_path / "job")
    assert job.status == "failed" and job.exit_code == 1
    assert "no run 'repa-shaeps'" in job.error and job.path(".ipynb").exists()


def test_an_empty_folder_and_one_class_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        load_dataset(f"folder:{tmp_path / 'empty'}")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cat" / "a.png")
    with pytest.raises(ValueError, match="class"):
        load_dataset(f"folder:{tmp_path / 'one'}")


def test_a_given_run_is_studied(tmp_path, after_smoke, monkeypatch):
    out = with_tables(after_smoke("01"), tmp_path / "out", "01_rows.json")
    monkeypatch.setattr(gradient_norms, "fit_observer", partial(gradient_norms.fit_observer, steps=10))
    path = train(make_recipe("sit", "smoke", overrides="training.steps=2 data.n=64"), tmp_path / "mine", "cpu", 0)
    run_cells("01", {"preset": "smoke", "run": str(path), "seeds": 1, "out_dir": out})  # a short table of arms
    findings = json.loads((tmp_path / "out" / "01_filmstrip.json").read_text())["findings"]
    assert findings[0]["run"] == "mine"


EDIT = """
from functools import partial
from maskalign_lab.runs.edits import edit_digest
from maskalign_lab.runs.run import build
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.training.loop import fit
recipe = make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64")
batches = make_batches(recipe)
net, method = build(recipe, batches.facts)
losses = [float(step.losses["alignment"]) for step in fit(net, method, batches, recipe.training, device="cpu")]
import json
print("RESULT", json.dumps([losses, identity(recipe), edit_digest(recipe.method)]))
"""


def play_alignment_notebook(*edits) -> list[list]:
    """Run the exported cells of lib/training/repa as a person would, with one edit after the other, and train REPA each time."""
    from nbclient import NotebookClient

    book = nbformat.read(paths.notebooks() / "lib" / "training" / "repa.ipynb", as_version=4)
    exported = [c.source for c in book.cells if c.cell_type == "code" and "#| export" in c.source]
    played = [[*map(edit, exported), EDIT] for edit in edits]
    book.cells = [nbformat.v4.new_code_cell(source) for source in sum(played, [])]
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    text = "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)
    return [json.loads(line.split("RESULT", 1)[1]) for line in text.splitlines() if "RESULT" in line]


def test_editing_the_loss_cell_changes_what_is_trained():
    (same, same_id, same_digest), (edited, edited_id, edited_digest) = play_alignment_notebook(
        lambda source: source + "\n# a comment\n",
        lambda source: source.replace("return -F.cosine_similarity(", "return -2 * F.cosine_similarity("),
    )
    recipe = make_recipe("repa", "smoke", overrides="training.steps=2 data.n=64")
    assert same_digest == "" and same_id == identity(recipe)  # untouched cells find the runs that ship
    assert edited_digest and edited_id != same_id  # edited ones never do
    assert edited[0] == pytest.approx(2 * same[0], rel=1e-4)
    assert edited[1] != pytest.approx(2 * same[1], rel=1e-6)  # the edit has changed the weights, too


def test_shipped_runs_are_what_their_recipes_say():
    folders = sorted((paths.data() / "runs").glob("*/recipe.json"))
    assert [path.parent.name for path in folders] == sorted([*SHIPPED, *OTHERS])
    folders = [path for path in folders if path.parent.name in SHIPPED]  # those of one study alone are its own
    recipes = [from_json(path.read_text()) for path in folders]
    pixels = [recipe for recipe in recipes if not recipe.data.autoencoder]
    assert len({(r.data, replace(r.network, mixer_depth=0), r.objective, r.training) for r in pixels}) == 1
    assert {recipe.training for recipe in recipes} == {pixels[0].training}
    digests = {data: images_of(data, "train").digest for data in {recipe.data for recipe in recipes}}
    for path, recipe in zip(folders, recipes, strict=True):
        assert json.loads((path.parent / "facts.json").read_text())["data_digest"] == digests[recipe.data]
        assert identity(recipe) == identity(shipped_recipe(path.parent.name))
        assert (path.parent / "card.md").exists() and (path.parent / "loss.png").exists()
        for name in ("maps", "parts"):  # of studies 01 and 02, which compare the runs on pixels
            assert (path.parent / f"{name}.safetensors").exists() is (recipe in pixels)
