"""A row of figures says what it is of, and is the same from one process or four, in small files or large, after a stop."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shared.sampled import eye, plan, random_run

from maskalign_lab.cli import main
from maskalign_lab.data.cache_filling import Share
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.measure.fidelity import gaussian_of, precision_recall, seen_in
from maskalign_lab.runs import fidelity_evaluation, sampling_shards
from maskalign_lab.runs.fidelity_evaluation import evaluate, evaluated_text, own_images, reference_of
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.sample_plan import plan_of
from maskalign_lab.runs.sampling_shards import Drawer

pytestmark = pytest.mark.usefixtures("own_folders")
N = 150


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "small")


def real_of(run):
    return reference_of(run, "validation", 12, most=40)


def row_of(run, folder, share=Share(), size=256, reference=None):
    return evaluate(run, plan(N), folder, eye(), reference or real_of(run), share, size, 0)


@pytest.mark.parametrize(("processes", "size"), [(1, 8), (1, 128), (4, 8), (4, 128)])
def test_the_same_row_comes_from_any_division_of_the_work(run, tmp_path, monkeypatch, processes, size):
    """Here one process after the other, the first one last, so that nobody waits."""
    whole = row_of(run, tmp_path / "whole")
    monkeypatch.setattr(fidelity_evaluation, "wait_for", lambda *of: None)
    monkeypatch.setattr(fidelity_evaluation, "ROWS", 64)
    for rank in reversed(range(1, processes)):
        sampling_shards.make_samples(run, plan(N), tmp_path / "parts", Share(rank, processes), size, 0)
    sampling_shards.make_samples(run, plan(N), tmp_path / "parts", Share(0, processes), size, 0)
    for rank in reversed(range(1, processes)):
        assert row_of(run, tmp_path / "parts", Share(rank, processes), size) is None
    assert json.dumps(row_of(run, tmp_path / "parts", Share(0, processes), size)) == json.dumps(whole)


def test_a_stop_while_looking_changes_nothing(run, tmp_path, monkeypatch):
    whole = row_of(run, tmp_path / "whole")
    monkeypatch.setattr(fidelity_evaluation, "ROWS", 64)
    extractor, seen = eye(), []

    def stops(module, given):
        seen.append(len(given[0]))
        if len(seen) > 12:
            raise KeyboardInterrupt

    extractor.module.register_forward_pre_hook(stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, plan(N), tmp_path / "samples", extractor, real_of(run), print_every=0)
    assert row_of(run, tmp_path / "samples") == whole
    kept = list((tmp_path / "samples").glob("*/*.safetensors"))
    assert len(kept) == 3  # of the rows of 150 samples


def test_figures_are_those_of_the_samples_and_of_the_reference(run, tmp_path):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    row = row_of(run, tmp_path)
    fake = seen_in(eye(), Drawer(run, plan(N))(0, N))[:, :12]
    real = seen_in(eye(), torch.from_numpy(np.array(own_images(run, "validation", 40).images)))[:, :12]
    pair = (gaussian_of(fake)._asdict(), gaussian_of(real)._asdict())
    assert row["FID"] == pytest.approx(fid_statistics_to_metric(*pair, False)["frechet_inception_distance"], abs=1e-6)
    assert (row["precision"], row["recall"]) == pytest.approx(precision_recall(real, fake), abs=1e-6)


def test_a_row_says_what_it_is_of(run, tmp_path):
    row = row_of(run, tmp_path)
    told = {
        name: row[name] for name in ("run", "step", "number", "labels", "rounding", "seed", "autoencoder", "average")
    }
    assert told == {
        "run": "small",
        "step": 5,
        "number": N,
        "labels": "balanced",
        "rounding": "nearest",
        "seed": 0,
        "autoencoder": "pixels",
        "average": "ema",
    }
    assert (row["extractor"], row["resize"], row["sampler"]["solver"]) == ("eye", "none", "heun")
    assert row["reference"]["split"] == "validation" and row["reference"]["images"] == 40
    assert "no file with losses" in row["encoding"]
    assert {name: row["reference"][name] for name in ("files", "crop", "size")} == {
        "files": "none, made as bytes",
        "crop": "none",
        "size": 16,
    }
    assert "of fewer than 2,048 samples" in evaluated_text(row) and row == json.loads(json.dumps(row))


# ---- references


def test_statistics_of_a_file_take_the_place_of_images(run, tmp_path):
    """ADM's, with images for precision and recall, and JiT's, without."""
    images = np.array(own_images(run, "validation", 40).images)
    known = gaussian_of(seen_in(eye(), torch.from_numpy(images))[:, :12])
    np.savez(tmp_path / "jit.npz", **known._asdict())
    np.savez(tmp_path / "adm.npz", **known._asdict(), mu_s=known.mu, arr_0=images[:20])
    references = {name: reference_of(run, str(tmp_path / f"{name}.npz"), 12) for name in ("jit", "adm")}
    rows = {name: row_of(run, tmp_path / "samples", reference=each) for name, each in references.items()}
    whole = row_of(run, tmp_path / "samples")
    assert rows["jit"]["FID"] == rows["adm"]["FID"] == whole["FID"]
    assert rows["jit"]["precision"] is None and rows["adm"]["precision"] is not None
    assert "precision and recall by nothing" in evaluated_text(rows["jit"])
    assert rows["adm"]["reference"]["precision and recall"] == "arr_0, 20 images"


def test_samples_against_themselves_are_at_no_distance(run, tmp_path):
    first = row_of(run, tmp_path / "samples")
    np.savez(tmp_path / "own.npz", arr_0=Drawer(run, plan(N))(0, N).numpy())
    row = row_of(run, tmp_path / "samples", reference=reference_of(run, str(tmp_path / "own.npz"), 12))
    assert abs(row["FID"]) < 1e-4 < first["FID"] and (row["precision"], row["recall"]) == (1, 1)


def test_references_that_do_not_fit_are_refused_before_any_work(run, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    for name, message in [
        ("large.npz", "32 pixels a side, and samples of 'small' have 16"),
        ("few.npz", "3 real images are too few"),
        ("none.npz", "no file"),
        ("test", "expected train, validation, or a file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            reference_of(run, str(tmp_path / name) if name.endswith("npz") else name, 12)


def test_of_real_images_in_files_the_formats_are_told(tmp_path):
    """A file is what it holds, whatever its name says."""
    for number in range(24):
        (folder := tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (9 * number, 9, 9)).save(folder / f"{number}.jpg", "PNG" if number < 4 else "JPEG")
    images = load_dataset(f"folder:{tmp_path / 'images'}", 16, "train", crop="adm")
    told = fidelity_evaluation.origin_of(images, "adm")
    found = dict(part.split(" (") for part in told.pop("files").removesuffix(" looked at)").split(" looked at), "))
    counts = {name: int(count.split(" of ")[0]) for name, count in found.items()}
    assert told == {"crop": "adm", "size": 16} and list(counts) == ["JPEG", "PNG"]
    assert sum(counts.values()) == len(images)


def test_real_images_are_at_no_distance_from_themselves(run):
    """Through the reference and the rows that `evaluate` keeps; halves of them are farther."""
    reference = real_of(run)
    looks = fidelity_evaluation.Looks(reference.images, reference.facts, eye())
    looks.make(Share(), 0)
    found = fidelity_evaluation.figures_of(looks.kept(), reference, looks.kept(), 12)
    assert abs(found["FID"]) < 1e-6 and (found["precision"], found["recall"]) == (1, 1)
    half = fidelity_evaluation.figures_of(looks.kept(), reference, looks.kept()[:20], 12)
    assert half["FID"] > 1e-2


# ---- the command


@pytest.fixture
def with_eye(monkeypatch):
    monkeypatch.setattr("maskalign_lab.measure.fidelity.load_extractor", lambda weights, device: eye())


def test_the_command_samples_compares_and_exports(run, tmp_path, with_eye, capsys):
    words = [
        "evaluate",
        str(run.path),
        "--n",
        "20",
        "--steps",
        "2",
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--reference-n",
        "40",
    ]
    for rank in "01":
        share = ["--shards", "2", "--shard", rank, "--shard-size", "8", "--samples", str(tmp_path / "own")]
        assert main([*words, *share]) == 0
    assert "share 1 of 2 of the samples in" in capsys.readouterr().out
    assert main([*words, "--samples", str(tmp_path / "own"), "--npz", str(tmp_path / "adm.npz")]) == 0
    assert main([*words, "--step", "5", "--out", str(tmp_path / "row.json")]) == 0
    own, row = ((tmp_path / name).read_text() for name in ("own/figures-train.json", "row.json"))
    assert own == row and json.loads(row)["number"] == 20
    with np.load(tmp_path / "adm.npz") as file:
        assert file["arr_0"].shape == (20, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        asked = plan_of(load_run(run.path), n=20, steps=2, precision="float32")
        assert (file["arr_0"] == Drawer(run, asked)(0, 20).numpy()).all()
    assert len(list((tmp_path / "own").glob("*.safetensors"))) == 3
    fewer = [*words[:-1], "30", "--samples", str(tmp_path / "own")]
    assert main(fewer) == main(fewer) == 0
    rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "own").glob("figures-train*.json"))]
    assert sorted(row["reference"]["images"] for row in rows) == [30, 40]  # neither took the other's place


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards", "4"], "--shards 4 --shard None: expected a --shard from 0 to 3"),
        (["--shards", "2", "--shard", "2"], "expected a --shard from 0 to 1"),
        (["--shards", "2", "--shard", "1", "--processes", "2"], "take one of both"),
        (["--as", "dit"], "unknown settings 'dit'. Did you mean 'ditdh'?"),
        (["--n", "5"], "5 samples are too few for these figures"),
        (["--reference", "imagenet"], "reference 'imagenet': expected train"),
        (["--reference", "trian"], "Did you mean 'train'?"),
        (["--reference-n", "-1"], "-1 real images are too few"),
        (
            ["--shards", "2", "--shard", "0", "--npz", "a.npz", "--out", "b", "--reference", "c", "--inception", "d"],
            "--shard 0 draws its files and no more: give --npz, --out, --reference, --inception to the last call",
        ),
        (["--average", "second_ema"], "average of small"),
        (["--shards", "0"], "--shards 0: expected at least 1"),
        (["--shard-size", "0"], "--shard-size 0: expected at least 1"),
        (["--step", "4"], "has no step 4; it has [5]"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(run, with_eye, words, message, capsys):
    assert main(["evaluate", str(run.path), *words]) == 2
    assert message in capsys.readouterr().err
