"""A published checkpoint comes in with its autoencoder by name, is sampled, evaluated, and looked at by study 01."""

import json

import pytest
from safetensors.torch import save_file
from shared.golden import golden
from shared.sampled import eye, fidelity

from maskalign_lab.cli import main
from maskalign_lab.gradient_norms import observe
from maskalign_lab.runs.official_files import import_run
from maskalign_lab.runs.run import load_run

pytestmark = pytest.mark.usefixtures("own_folders")
FIGURES = {"FID", "Inception score", "Inception score deviation", "precision", "recall"}


@pytest.fixture
def with_eye(monkeypatch):
    fidelity()
    monkeypatch.setattr("maskalign_lab.measure.fidelity.load_extractor", lambda weights, device: eye())


def saved(name, folder):
    """A recorded network as its authors' file."""
    record, family = golden(name), name.split("_")[0]
    save_file(record.weights, folder / "in.safetensors", {"family": family, "config": json.dumps(record.config)})
    return str(folder / "in.safetensors"), family


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa", "jit"])
def test_a_published_checkpoint_is_imported_sampled_evaluated(name, tmp_path, with_eye):
    (file, family), place = saved(name, tmp_path), str(tmp_path / "run")
    encoding = [] if family == "jit" else ["--autoencoder", "tiny"]
    assert main(["import", file, "--out", place, "--dataset", "shapes", *encoding]) == 0
    run, rows = load_run(place), []
    few = ["--n", "10", "--steps", "2", "--precision", "float32", "--device", "cpu", "--reference-n", "10"]
    for words in (["--as", family], []):
        assert main(["evaluate", place, *few, *words, "--out", str(tmp_path / "row.json")]) == 0
        rows.append(json.loads((tmp_path / "row.json").read_text()))
    assert (rows[0]["settings"], rows[0]["sampler"]["solver"]) == (family, run.sampler.solver)
    assert rows[0]["encoding"] == ("pixels" if family == "jit" else f"tiny ({run.autoencoder.digest})")
    told = [{key: row[key] for key in row.keys() - FIGURES - {"sampler"}} for row in rows]
    assert told[0] == told[1]  # an imported run needs no `--as`


@pytest.mark.parametrize("name", ["repa", "reg", "irepa", "jit"])
def test_study_01_looks_at_it_with_one_parameter(name, tmp_path):
    """What `-p run FOLDER` opens: the gradient norm of every token."""
    file, family = saved(name, tmp_path)
    encoding = "" if family == "jit" else "tiny"
    run = load_run(import_run(file, tmp_path / "run", dataset="shapes", autoencoder=encoding))
    assert observe(run).depth == run.method.collect[0]


def test_latents_without_an_autoencoder_are_no_images(tmp_path, with_eye, capsys):
    import_run(saved("repa", tmp_path)[0], tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--n", "10"]) == 2
    assert "names no autoencoder" in capsys.readouterr().err
