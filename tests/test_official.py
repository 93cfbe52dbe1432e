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
from maskalign_lab.official import (
    ARGUMENTS,
    arguments,
    backbone,
    from_official,
    import_run,
    read_off,
    read_weights,
    settings,
    to_official,
)
from maskalign_lab.recipes import build, load_run, make_recipe
from maskalign_lab.sampling import SamplerConfig, sample


def recorded_file(folder, name="repa", **words):
    """A recorded network as an official file with a description."""
    record = golden(name)
    path = folder / f"{name}.safetensors"
    save_file(record.weights, path, {"family": name, "config": json.dumps(record.config), **words})
    return path


def test_a_file_that_describes_itself_becomes_a_run(tmp_path):
    run = load_run(import_run(recorded_file(tmp_path, step="400000"), tmp_path / "run"))
    record = golden("repa")
    assert run.step == 400_000 and run.method.config.depth == 2
    for name, value in {**run.net.state_dict(), **run.method.state_dict()}.items():
        assert torch.equal(value, record.weights[name])
    torch.testing.assert_close(
        run.net(*(record.inputs[k] for k in "xty")).prediction, record.out["pred"], rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa"])
def test_import_and_export_by_command_lose_no_bit(name, tmp_path, capsys):
    record, family = golden(name), name.split("_")[0]
    save_file(record.weights, tmp_path / "in.safetensors")
    words = ["--family", family, "--config", json.dumps(record.config)]
    assert main(["import", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.safetensors")]) == 0
    back, metadata = read_weights(tmp_path / "out.safetensors")
    assert metadata["family"] == family and back.keys() == record.weights.keys()
    assert all(torch.equal(back[key], record.weights[key]) for key in back)
    again = json.loads(metadata["config"])
    told = {name: value for name, value in record.config.items() if name in again}
    assert {name: again[name] for name in told} == told
    assert load_run(tmp_path / "run").method.config.name == family


def test_an_imported_reg_has_its_class_token_and_can_be_sampled(tmp_path):
    run = load_run(import_run(recorded_file(tmp_path, "reg"), tmp_path / "run"))
    record = golden("reg")
    out = run.net(*(record.inputs[k] for k in ("x", "t", "y", "cls")))
    torch.testing.assert_close(out.class_prediction, record.out["cls_pred"], rtol=1e-4, atol=2e-5)
    config = SamplerConfig("euler", steps=3, guidance=2.3, guidance_high=0.85)
    *_, last = sample(run.net, run.recipe.objective, torch.tensor([3, 7]), config)
    assert last.x.shape == (2, 4, 16, 16) and last.cls.shape == (2, 48) and last.x.isfinite().all()


@pytest.mark.parametrize("name", ["reg", "irepa"])
def test_a_bare_file_tells_its_family(name):
    record = golden(name)
    family, config = read_off(record.weights)
    assert family == name and {"num_heads", "encoder_depth"}.isdisjoint(config)
    assert all(record.config[key] == value for key, value in config.items())
    official = from_official(family, config | {"num_heads": 4, "encoder_depth": 2}, record.weights)
    assert (official.method.config.name, official.method.config.depth) == (name, 2)


def test_a_bare_file_of_haste_is_told_by_the_caller(tmp_path):
    save_file(golden("haste").weights, tmp_path / "bare.safetensors")
    config = {"num_heads": 4, "encoder_depth": 3}
    runs = [load_run(import_run(tmp_path / "bare.safetensors", tmp_path / f"as {f}", f, config)) for f in ("", "haste")]
    assert [run.method.config.name for run in runs] == ["repa", "haste"]
    assert runs[1].method.config.student_blocks == (1, 2, 3)
    assert runs[1].method.config.teacher_blocks == (10, 11, 12)


def test_haste_at_the_papers_size_has_the_papers_blocks():
    config = settings("haste", arguments("haste", {}))
    assert (config.depth, config.stop, config.weight, config.attention_weight) == (8, 250_000, 0.5, 0.5)
    assert (config.student_blocks, config.teacher_blocks) == ((5, 6, 7, 8), (9, 10, 11, 12))


def test_a_file_of_reg_without_projectors_names_what_is_missing():
    record = golden("reg")
    rest = {name: value for name, value in record.weights.items() if not name.startswith("projectors.")}
    with pytest.raises(ValueError, match="missing projectors.0.0.bias"):
        from_official("reg", record.config, rest)


@pytest.mark.parametrize(
    ("layout", "change", "kind"),
    [
        ("projection_layer.0.weight", {}, "'mlp'"),
        ("projection_layer.weight", {}, "'linear'"),
        ("0.weight", {"old_projector_version": True, "z_dims": [48]}, "'mlp, old version'"),
    ],
)
def test_other_projectors_of_irepa_are_refused_by_name(layout, change, kind):
    record = golden("irepa")
    weights = {name: value for name, value in record.weights.items() if not name.startswith("projectors.")}
    weights[f"projectors.0.{layout}"] = torch.zeros(48, 64)
    config = {name: value for name, value in read_off(weights)[1].items() if name != "projector_dim"}
    with pytest.raises(ValueError, match=f"projection_layer_type {kind}.*projectors"):
        from_official("irepa", config | change | {"num_heads": 4}, weights)


def test_what_is_left_of_irepa_without_its_projector_is_plain_sit():
    record = golden("irepa")
    weights = {name: value for name, value in record.weights.items() if not name.startswith("projectors.")}
    official = from_official("irepa", record.config | {"eval_mode": True, "projection_layer_type": "mlp"}, weights)
    out = official.net(*(record.inputs[k] for k in "xty")).prediction
    torch.testing.assert_close(out, record.out["pred"], rtol=1e-4, atol=2e-5)
    assert official.method.config.name == "sit"


def test_a_mixer_has_no_official_layout():
    recipe = make_recipe("repa", "smoke", overrides="network.mixer_depth=1")
    with pytest.raises(ValueError, match="method 'repa' with a mixer"):
        to_official(*build(recipe, 10, 16), recipe.objective)


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
    import_run(recorded_file(tmp_path), tmp_path / "run")
    with pytest.raises(FileExistsError, match="another folder"):
        import_run(recorded_file(tmp_path), tmp_path / "run")


def test_an_objective_without_an_official_layout_is_refused(tmp_path, capsys):
    run = load_run("sit-shapes")
    recipe = json.loads((run.path / "recipe.json").read_text())
    recipe["objective"]["prediction"] = "x"
    folder = tmp_path / "x"
    shutil.copytree(run.path, folder)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["export", str(folder), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "x-prediction" in capsys.readouterr().err
