"""Published checkpoints come in through one door, and nothing else does."""

import argparse
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_parity import golden

from maskalign_lab.cli import main
from maskalign_lab.official import ARGUMENTS, backbone, from_official, import_run, read_off, read_weights
from maskalign_lab.recipes import load_run


def repa_file(folder, **words):
    """The recorded REPA network as an official file with a description."""
    record = golden("repa")
    path = folder / "repa.safetensors"
    save_file(record.weights, path, {"family": "repa", "config": json.dumps(record.config), **words})
    return path


def test_a_file_that_describes_itself_becomes_a_run(tmp_path):
    run = load_run(import_run(repa_file(tmp_path, step="400000"), tmp_path / "run"))
    record = golden("repa")
    assert run.step == 400_000 and run.method.config.depth == 2
    for name, value in {**run.net.state_dict(), **run.method.state_dict()}.items():
        assert torch.equal(value, record.weights[name])
    torch.testing.assert_close(
        run.net(*(record.inputs[k] for k in "xty")).prediction, record.out["pred"], rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", ["sit_ls1", "repa"])
def test_import_and_export_by_command_lose_no_bit(name, tmp_path, capsys):
    record, family = golden(name), "sit" if name == "sit_ls1" else "repa"
    save_file(record.weights, tmp_path / "in.safetensors")
    words = ["--family", family, "--config", json.dumps(record.config)]
    assert main(["import", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.safetensors")]) == 0
    back, metadata = read_weights(tmp_path / "out.safetensors")
    assert metadata["family"] == family and back.keys() == record.weights.keys()
    assert all(torch.equal(back[key], record.weights[key]) for key in back)


def test_an_official_pickle_with_settings_gives_its_average(tmp_path):
    record = golden("sit_ls1")
    other = {name: torch.zeros_like(value) for name, value in record.weights.items()}
    content = {
        "model": other,
        "ema": record.weights,
        "opt": {"state": {}},
        "args": argparse.Namespace(lr=1e-4),
        "steps": 7,
    }
    torch.save(content, tmp_path / "0000007.pt")
    weights, words = read_weights(tmp_path / "0000007.pt")
    assert words["step"] == "7" and all(torch.equal(weights[k], record.weights[k]) for k in weights)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": golden("sit_ls1").weights, "args": Hostile()}, "bad.pt")
    assert main(["import", "bad.pt", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "could run code" in said and "weights_only=False" in said and "mkdir" in said
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "run").exists()


def test_a_bare_pickle_is_refused_too(tmp_path):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path / "bad.pt")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_file_that_is_cut_off_says_so(name, kept, tmp_path):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(golden("sit_ls1").weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=name):
        read_weights(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"ema": [1, 2]}, {"loss": 0.5}])
def test_a_pickle_without_a_state_dict_says_so(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "other.pt")


def test_old_names_of_the_later_blocks_are_understood():
    record = golden("repa")

    def old(name):
        head, *rest = name.split(".")
        late = head == "blocks" and int(rest[0]) >= 2
        return ".".join(["decoder_blocks", str(int(rest[0]) - 2), *rest[1:]]) if late else name

    official = from_official("repa", record.config, {old(k): v for k, v in record.weights.items()})
    assert torch.equal(official.net.blocks[3].mlp.fc1.weight, record.weights["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 64}, "hidden_size"),
        ({"depth": 5}, "missing blocks.4.adaLN_modulation"),
        ({"depth": 3}, "unknown blocks.3.adaLN_modulation"),
        ({"num_classes": 11}, r"embedding_table.weight has shape \(11, 64\), expected \(12, 64\)"),
        ({"z_dims": [48, 48]}, "one teacher"),
        ({"class_dropout_prob": 0}, "null class"),
        ({"path_type": "edm"}, "path_type"),
        ({"path_type": "GVP"}, "path_type of repa"),
        ({"decoder_hidden_size": 768}, "decoder_hidden_size"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    record = golden("repa")
    with pytest.raises(ValueError, match=message):
        from_official("repa", record.config | change, record.weights)


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match="'repa'"):
        from_official("rpea", {}, {})


def test_shapes_tell_what_they_can_and_heads_are_asked_for(tmp_path, capsys):
    record = golden("sit_ls1")
    family, config = read_off(record.weights)
    assert family == "sit" and all(record.config[name] == value for name, value in config.items())
    save_file(record.weights, tmp_path / "bare.safetensors")
    assert main(["import", str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "run")]) == 2
    assert "num_heads" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "assumed", "silent"),
    [
        ({"path_type": "cosine", "encoder_depth": 2}, [], ["path_type", "encoder_depth"]),
        ({"encoder_depth": 2}, ["path_type 'linear'"], ["encoder_depth"]),
    ],
)
def test_what_leaves_no_trace_is_assumed_aloud_or_given(given, assumed, silent, tmp_path, capsys):
    save_file(golden("repa").weights, tmp_path / "bare.safetensors")
    words = [str(tmp_path / "bare.safetensors"), "--config", json.dumps({"num_heads": 4} | given)]
    assert main(["import", *words, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert all(f"assumed {word}" in said for word in assumed) and not any(word in said for word in silent)
    run = load_run(tmp_path / "run")
    assert run.recipe.objective.interpolant == given.get("path_type", "linear") and run.method.config.depth == 2


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_published_sizes_are_read_off_completely(size, patch, learn_sigma):
    from maskalign_lab.sit import SIZES

    numbers = SIZES[size]
    config = dict(hidden_size=numbers["width"], depth=numbers["depth"], num_heads=numbers["heads"], patch_size=patch)
    family = "sit" if learn_sigma else "repa"
    with torch.device("meta"):
        net = backbone(family, {**ARGUMENTS[family], **config})
    found_family, found = read_off(net.state_dict())
    assert found_family == family and all(found[name] == value for name, value in config.items())


def test_a_run_is_not_overwritten(tmp_path):
    import_run(repa_file(tmp_path), tmp_path / "run")
    with pytest.raises(FileExistsError, match="another folder"):
        import_run(repa_file(tmp_path), tmp_path / "run")


def test_an_objective_without_an_official_layout_is_refused(tmp_path, capsys):
    run = load_run("sit-shapes")
    recipe = json.loads((run.path / "recipe.json").read_text())
    recipe["objective"]["prediction"] = "x"
    folder = tmp_path / "x"
    shutil.copytree(run.path, folder)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["export", str(folder), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "x-prediction" in capsys.readouterr().err
