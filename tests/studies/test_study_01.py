"""Study 01 as its users run it: papermill end to end, mistakes in seconds, and an edited loss that is really trained."""

import json
from dataclasses import replace

import nbformat
import pytest
from shared.studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab.base import paths
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.runs.batches import images_of
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, identity
from maskalign_lab.runs.run import train
from maskalign_lab.studies.shipped_runs import SHIPPED, shipped_recipe
from maskalign_lab.workbench.jobs import run_study
from maskalign_lab.workbench.study_parameters import study_parameters

STUDY = paths.notebooks() / "01_gradient_norms.ipynb"


smoke = smoke_fixture("01")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in ("01_position_probability", "01_filmstrip"):
        check_figure(smoke, "01_gradient_norms", name)


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("01_gradient_norms")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preest": "smoke"}, "Did you mean 'preset'"),
        ({"preset": "smkoe"}, "Did you mean 'smoke'"),
        ({"seed": "zero"}, "expected int, got str"),
    ],
)
def test_bad_parameters_are_refused_before_a_kernel_starts(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_study("01", given, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_lost_tag_is_refused(tmp_path):
    book = nbformat.read(STUDY, as_version=4)
    for cell in book.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(book, tmp_path / "untagged.ipynb")
    with pytest.raises(ValueError, match="tag"):
        study_parameters(tmp_path / "untagged.ipynb")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": "repa-shaeps"}, "no run 'repa-shaeps'"),
        ({"preset": "smoke", "dataset": "shpaes"}, "Did you mean 'shapes'"),
        ({"preset": "smoke", "overrides": "method.depth=9"}, "depth 9 is outside the network"),
        ({"preset": "smoke", "overrides": "network.patch_size=8"}, "grid"),
        ({"preset": "smoke", "overrides": "method.dpeth=2"}, "Did you mean 'method.depth'"),
    ],
)
def test_mistakes_inside_fail_with_a_clear_error_and_keep_the_notebook(given, message, tmp_path):
    job = run_study("01", given, tmp_path / "job")
    assert job.status == "failed" and job.exit_code == 1
    assert message in job.error and job.path(".ipynb").exists()


def test_an_empty_folder_and_one_class_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        load_dataset(f"folder:{tmp_path / 'empty'}")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cat" / "a.png")
    with pytest.raises(ValueError, match="class"):
        load_dataset(f"folder:{tmp_path / 'one'}")


def test_a_given_run_is_studied(tmp_path):
    path = train(make_recipe("sit", "smoke", overrides="training.steps=2"), tmp_path / "mine", "cpu", 0)
    job = run_study("01", {"preset": "smoke", "run": str(path)}, tmp_path / "job")
    assert job.status == "ok", job.error
    findings = json.loads((tmp_path / "job" / "01_filmstrip.json").read_text())["findings"]
    assert findings[0]["run"] == "mine"


EDIT = """
from functools import partial
from maskalign_lab.runs.recipe import edit_digest
from maskalign_lab.runs.run import build
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.training.loop import fit
recipe = make_recipe("repa", "smoke", overrides="training.steps=2")
batches = make_batches(recipe)
net, method = build(recipe, batches.facts)
losses = [float(step.losses["alignment"]) for step in fit(net, method, batches, recipe.training, device="cpu")]
import json
print("RESULT", json.dumps([losses, identity(recipe), edit_digest(recipe.method)]))
"""


def play_alignment_notebook(edit) -> list:
    """Run the exported cells of lib/training/repa as a person would, with an edit, and train REPA there."""
    from nbclient import NotebookClient

    book = nbformat.read(paths.notebooks() / "lib" / "training" / "repa.ipynb", as_version=4)
    book.cells = [c for c in book.cells if c.cell_type == "code" and "#| export" in c.source]
    for cell in book.cells:
        cell.source = edit(cell.source)
    book.cells.append(nbformat.v4.new_code_cell(EDIT))
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    text = "".join(output.get("text", "") for output in book.cells[-1].outputs)
    return json.loads(text.split("RESULT", 1)[1])


def test_editing_the_loss_cell_changes_what_is_trained():
    same, same_id, same_digest = play_alignment_notebook(lambda source: source + "\n# a comment\n")
    edited, edited_id, edited_digest = play_alignment_notebook(
        lambda source: source.replace("return -F.cosine_similarity(", "return -2 * F.cosine_similarity(")
    )
    recipe = make_recipe("repa", "smoke", overrides="training.steps=2")
    assert same_digest == "" and same_id == identity(recipe)  # untouched cells find the runs that ship
    assert edited_digest and edited_id != same_id  # edited ones never do
    assert edited[0] == pytest.approx(2 * same[0], rel=1e-4)
    assert edited[1] != pytest.approx(2 * same[1], rel=1e-6)  # the edit has changed the weights, too


def test_shipped_runs_are_what_their_recipes_say():
    folders = sorted((paths.data() / "runs").glob("*/recipe.json"))
    assert [path.parent.name for path in folders] == sorted(SHIPPED)
    recipes = [from_json(path.read_text()) for path in folders]
    pixels = [recipe for recipe in recipes if not recipe.data.autoencoder]
    assert len({(r.data, replace(r.network, mixer_depth=0), r.objective, r.training) for r in pixels}) == 1
    assert {recipe.training for recipe in recipes} == {pixels[0].training}
    for path, recipe in zip(folders, recipes, strict=True):
        digest = images_of(recipe.data, "train").digest
        assert json.loads((path.parent / "facts.json").read_text())["data_digest"] == digest
        assert identity(recipe) == identity(shipped_recipe(path.parent.name))
        assert (path.parent / "card.md").exists() and (path.parent / "loss.png").exists()
        assert (path.parent / "maps.safetensors").exists() is (recipe in pixels)
