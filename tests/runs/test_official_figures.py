"""A published checkpoint comes in with its autoencoder by name, is sampled, evaluated, and looked at by study 01."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shared.golden import golden
from shared.sampled import eye

from maskalign_lab.cli import main
from maskalign_lab.gradient_norms import gradient_norms_at, observe
from maskalign_lab.runs.official_files import export_run, import_run, published_teacher
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run

pytestmark = pytest.mark.usefixtures("own_folders")
FIGURES = {"FID", "Inception score", "Inception score deviation", "precision", "recall"}


@pytest.fixture
def with_eye(monkeypatch):
    monkeypatch.setattr("maskalign_lab.measure.fidelity.load_extractor", lambda weights, device: eye())


def saved(name, folder):
    """A recorded network as its authors' file."""
    record, family = golden(name), name.split("_")[0]
    save_file(record.weights, folder / "in.safetensors", {"family": family, "config": json.dumps(record.config)})
    return str(folder / "in.safetensors"), family


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa", "jit"])
def test_a_published_checkpoint_is_imported_sampled_evaluated(name, tmp_path, with_eye, capsys):
    (file, family), place = saved(name, tmp_path), str(tmp_path / "run")
    encoding = [] if family == "jit" else ["--autoencoder", "tiny"]
    assert main(["import", file, "--out", place, "--dataset", "shapes", *encoding]) == 0
    run, rows = load_run(place), []
    few = ["--n", "10", "--steps", "2", "--precision", "float32", "--device", "cpu", "--reference-n", "10"]
    for words in (["--as", family], []):
        assert main(["evaluate", place, *few, *words, "--out", str(tmp_path / "row.json")]) == 0
        rows.append(json.loads((tmp_path / "row.json").read_text()))
    assert (rows[0]["settings"], rows[0]["sampler"]["solver"]) == (f"{family}, with steps=2", run.sampler.solver)
    assert rows[0]["autoencoder"] == ("pixels" if family == "jit" else f"tiny ({run.autoencoder.digest})")
    assert f"step 0: as {family}, with steps=2: 10 samples" in capsys.readouterr().out
    told = [{key: row[key] for key in row.keys() - FIGURES - {"sampler"}} for row in rows]
    assert told[0] == told[1]  # an imported run needs no `--as`


@pytest.mark.parametrize("name", ["repa-shapes", "reg-shapes"])
def test_study_01_sees_of_it_what_it_saw_before(name, tmp_path):
    """`-p run FOLDER` is the one parameter: the file names data and teacher."""
    before = load_run(name)
    again = load_run(import_run(export_run(before, tmp_path / "official.safetensors"), tmp_path / "run"))
    pictures, seen = before.images("validation", 6), []
    for run in (before, again):
        observed = observe(run)
        seen.append(gradient_norms_at(observed, pictures, observed.features(pictures), np.arange(6), 0.4))
    assert seen[0].shape == (6, 64) and (seen[0] > 0).all() and torch.equal(*seen)


def test_a_teacher_is_named_assumed_where_it_fits_or_refused_where_it_does_not(tmp_path, capsys):
    file, _ = saved("repa", tmp_path)
    told = load_run(import_run(file, tmp_path / "told", dataset="shapes", teacher="tiny:elsewhere"))
    assert told.recipe.data.teacher == "tiny:elsewhere"
    silent = load_run(import_run(file, tmp_path / "silent", dataset="shapes"))
    with pytest.raises(ValueError, match="a teacher of 48 channels, and 'tiny' has 128; .* with --teacher"):
        silent.teacher  # noqa: B018
    assert "assumed teacher" not in capsys.readouterr().out
    wide = SimpleNamespace(config=SimpleNamespace(name="repa"), teacher_dims=(768,))
    assert published_teacher(wide, 16) == make_recipe("repa", "paper").data.teacher
    assert "assumed teacher timm:vit_base_patch14_dinov2, as published" in capsys.readouterr().out


def test_latents_without_an_autoencoder_are_no_images(tmp_path, with_eye, capsys):
    import_run(saved("repa", tmp_path)[0], tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--n", "10"]) == 2
    assert "names no autoencoder" in capsys.readouterr().err
