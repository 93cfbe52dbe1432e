"""Published checkpoints come in through one door, and nothing else does."""

import argparse
import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shared.golden import close, golden
from shared.jit import OBJECTIVE, Diary, official_stages
from torch import nn

from maskalign_lab import gradient_norms
from maskalign_lab.cli import main
from maskalign_lab.diffusion.jit import NAMES, JiT, published_size
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample, sample
from maskalign_lab.gradient_norms import fit_observer
from maskalign_lab.runs.checkpoint_files import read_weights
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.official import DOORS, SAMPLERS, arguments, from_official, to_official
from maskalign_lab.runs.official_files import export_run, import_run
from maskalign_lab.runs.official_jit import DENOISER, bare, flat, jit_sampler
from maskalign_lab.runs.official_shapes import read_off, told_arguments
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, to_json
from maskalign_lab.runs.run import build, load_run
from maskalign_lab.runs.shared_settings import IMAGES, Setting
from maskalign_lab.studies.gradient_norms.arms import SCALES
from maskalign_lab.studies.gradient_norms.opening import open_study
from maskalign_lab.training.methods import MethodConfig, PlainSiT


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


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa", "jit"])
def test_import_and_export_by_command_lose_no_bit(name, tmp_path, capsys):
    record, family = golden(name), name.split("_")[0]
    save_file(record.weights, tmp_path / "in.safetensors")
    words = ["--family", family, "--config", json.dumps(record.config)]
    assert main(["import", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.safetensors")]) == 0
    back, metadata, _ = read_weights(tmp_path / "out.safetensors")
    assert metadata["family"] == family and back.keys() == record.weights.keys()
    assert all(torch.equal(back[key], record.weights[key]) for key in back)
    given, again = flat(record.config), flat(json.loads(metadata["config"]))
    told = {name: value for name, value in given.items() if name in again}
    assert {name: again[name] for name in told} == told
    assert load_run(tmp_path / "run").method.config.name == {"jit": "irepa"}.get(family, family)


def test_an_imported_reg_has_its_class_token_and_can_be_sampled(tmp_path):
    run = load_run(import_run(recorded_file(tmp_path, "reg"), tmp_path / "run"))
    record = golden("reg")
    out = run.net(*(record.inputs[k] for k in ("x", "t", "y", "cls")))
    torch.testing.assert_close(out.class_prediction, record.out["cls_pred"], rtol=1e-4, atol=2e-5)
    config = SamplerConfig("euler", steps=3, guidance=2.3, guidance_high=0.85)
    *_, last = sample(run.net, run.recipe.objective, torch.tensor([3, 7]), config)
    assert last.x.shape == (2, 4, 16, 16) and last.cls.shape == (2, 48) and last.x.isfinite().all()


@pytest.mark.parametrize("name", ["reg", "irepa", "jit"])
def test_a_bare_file_tells_its_family(name):
    record = golden(name)
    family, config = read_off(record.weights)
    assert family == name and {"num_heads", "encoder_depth", "in_context_start"}.isdisjoint(config)
    assert all(flat(record.config)[key] == value for key, value in config.items())
    silent = {"num_heads": 4, "encoder_depth": 2} | ({"in_context_start": 2} if name == "jit" else {})
    official = from_official(family, config | silent, record.weights)
    assert (official.method.config.name, official.method.config.depth) == ({"jit": "irepa"}.get(name, name), 2)


def test_a_bare_file_of_haste_is_told_by_the_caller(tmp_path):
    save_file(golden("haste").weights, tmp_path / "bare.safetensors")
    config = {"num_heads": 4, "encoder_depth": 3}
    runs = [load_run(import_run(tmp_path / "bare.safetensors", tmp_path / f"as {f}", f, config)) for f in ("", "haste")]
    assert [run.method.config.name for run in runs] == ["repa", "haste"]
    assert runs[1].method.config.student_blocks == (1, 2, 3)
    assert runs[1].method.config.teacher_blocks == (10, 11, 12)


def test_haste_at_the_papers_size_has_the_papers_blocks():
    config = DOORS["haste"].alignment(arguments("haste", {}))
    assert (config.depth, config.stop, config.weight, config.attention_weight) == (8, 250_000, 0.5, 0.5)
    assert (config.student_blocks, config.teacher_blocks) == ((5, 6, 7, 8), (9, 10, 11, 12))


def test_a_file_of_reg_without_projectors_names_what_is_missing():
    record = golden("reg")
    rest = {name: value for name, value in record.weights.items() if not name.startswith("projectors.")}
    with pytest.raises(ValueError, match="missing projectors.0.0.bias"):
        from_official("reg", record.config, rest)


@pytest.mark.parametrize(
    ("family", "layout", "change", "kind"),
    [
        ("irepa", "projection_layer.0.weight", {}, "'mlp' of irepa"),
        ("irepa", "projection_layer.weight", {}, "'linear' of irepa"),
        ("irepa", "0.weight", {"old_projector_version": True, "z_dims": [48]}, "'mlp, old version' of irepa"),
        ("jit", "projection_layer.0.weight", {"in_context_start": 2}, "'mlp' of jit"),
        ("jit", "projection_layer.weight", {"in_context_start": 2}, "'linear' of jit"),
    ],
)
def test_other_projectors_of_irepa_are_left_out_aloud(family, layout, change, kind, capsys):
    """What the network computes does not depend on them."""
    weights = {name: value for name, value in bare(golden(family).weights).items() if "projectors." not in name}
    weights[f"projectors.0.{layout}"] = torch.zeros(48, 64)
    config = {name: value for name, value in read_off(weights)[1].items() if name != "projector_dim"}
    official = from_official(family, config | change | {"num_heads": 4}, weights)
    assert kind in capsys.readouterr().out and official.method.config.name == "sit"
    assert all(torch.equal(value, weights[name]) for name, value in official.net.state_dict().items())


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
        to_official(*build(recipe, Facts(10, (16,))), recipe.objective)


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
    weights, words, second = read_weights(tmp_path / "0000007.pt")
    assert words["step"] == "7" and second is None and all(torch.equal(weights[k], record.weights[k]) for k in weights)


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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "the file is a list"),
        (torch.zeros(2), "the file is a Tensor"),
        ({"ema": [1, 2]}, "entry 'ema' is a list"),
        ({"loss": 0.5}, "the file is a dict"),
        ({"model": {"net.w": torch.zeros(2)}, "model_ema1": [torch.zeros(2)]}, "entry 'model_ema1' is a list"),
        ({"model_ema1": {"w": torch.zeros(2)}, "model_ema2": [torch.zeros(2)]}, "entry 'model_ema2' is a list"),
    ],
)
def test_a_pickle_without_a_state_dict_says_so(content, found, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"no state dict: {found}; expected names and tensors"):
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
        ({"z_dims": [48, 48]}, "missing projectors.1.0.bias"),
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
    from maskalign_lab.diffusion.sit import SIZES

    numbers = SIZES[size]
    config = dict(hidden_size=numbers["width"], depth=numbers["depth"], num_heads=numbers["heads"], patch_size=patch)
    family = "sit" if learn_sigma else "repa"
    with torch.device("meta"):
        net = DOORS[family].network({**DOORS[family].known, **config})
    found_family, found = read_off(net.state_dict())
    assert found_family == ("sit" if learn_sigma else "") and all(
        found[name] == value for name, value in config.items()
    )


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


# --- how families sample ----------------------------------------------------------------------------------------------


def test_families_sample_as_their_papers_say():
    told = {name: (s.solver, s.steps, s.guidance, s.guidance_low, s.guidance_high) for name, s in SAMPLERS.items()}
    assert told == {
        "sit": ("euler-maruyama", 250, 1.5, 0, 1), "repa": ("euler-maruyama", 250, 1.8, 0, 0.7),
        "reg": ("euler-maruyama", 250, 2.3, 0, 0.85), "haste": ("euler-maruyama", 250, 1.65, 0, 0.72),
        "irepa": ("euler-maruyama", 250, 1.8, 0, 0.7),
    }  # fmt: skip
    sit = SAMPLERS["sit"]
    assert (sit.diffusion, sit.last, sit.last_step, sit.guided_channels) == ("sigma", "mean", 0.04, 3)
    for name in SAMPLERS.keys() - {"sit"}:  # w = t, all channels, the class token guided as the image
        sampler = SAMPLERS[name]
        assert (sampler.diffusion, sampler.guided_channels, sampler.class_guidance) == ("linear", None, None)
        assert (sampler.last, sampler.last_step, sampler.guide_stages) == ("mean", 0.04, False)


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa", "jit"])
def test_an_imported_run_knows_how_it_is_sampled(name, tmp_path):
    family, config = name.split("_")[0], golden(name).config
    save_file(golden(name).weights, tmp_path / "file.safetensors")
    run = load_run(import_run(tmp_path / "file.safetensors", tmp_path / "run", family, config))
    assert run.sampler == (jit_sampler(DOORS["jit"].known | flat(config)) if family == "jit" else SAMPLERS[family])


def test_a_run_of_the_lab_has_no_sampler_of_its_own():
    assert load_run("repa-shapes").sampler is None


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ([], {}),
        (["--guidance", "1.5"], {"guidance": 1.5}),
        (["--steps", "2", "--solver", "euler"], {"steps": 2, "solver": "euler"}),
        (["--precision", "bfloat16"], {"precision": "bfloat16"}),
    ],
)
def test_the_command_samples_as_the_authors_do_unless_told_otherwise(words, change, tmp_path, monkeypatch):
    used = []

    def noted(net, objective, y, config, seed, guide):
        used.append(config)
        return torch.zeros(len(y), 3, 32, 32)

    monkeypatch.setattr("maskalign_lab.diffusion.sampling.last_sample", noted)
    run = import_run(recorded_file(tmp_path, "jit"), tmp_path / "run")
    for name in (str(run), "repa-shapes"):
        assert main(["sample", name, "--n", "1", "--classes", "0", "--out", str(tmp_path / "grid.png"), *words]) == 0
    assert used == [replace(sampler, **change) for sampler in (load_run(run).sampler, SamplerConfig("heun", 25, 2.0))]


@pytest.mark.parametrize(
    ("words", "precision"), [([], "float32"), (["--precision", "auto"], "auto"), (["--steps", "2"], "float32")]
)
def test_the_command_samples_in_the_precision_that_the_recipe_wishes_for(words, precision, tmp_path, monkeypatch):
    run, used = import_run(recorded_file(tmp_path, "jit"), tmp_path / "run"), []
    recipe = from_json((run / "recipe.json").read_text())
    wished = replace(recipe, execution=replace(recipe.execution, sampling="float32"))
    (run / "recipe.json").write_text(to_json(wished))
    noted = lambda net, objective, y, config, seed, guide: used.append(config) or torch.zeros(len(y), 3, 32, 32)  # noqa: E731
    monkeypatch.setattr("maskalign_lab.diffusion.sampling.last_sample", noted)
    assert main(["sample", str(run), "--n", "1", "--classes", "0", "--out", str(tmp_path / "grid.png"), *words]) == 0
    assert [config.precision for config in used] == [precision]


# --- JiT --------------------------------------------------------------------------------------------------------------


def opened_jit(weights=None, **change):
    record = golden("jit")
    return from_official("jit", flat(record.config) | change, record.weights if weights is None else weights)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prefixed", [True, False])
def test_jit_comes_through_the_door(nested, prefixed):
    record = golden("jit")
    config, weights = record.config, record.weights
    official = from_official("jit", config if nested else flat(config), weights if prefixed else bare(weights))
    z, t, y = (record.inputs[k] for k in "zty")
    out = official.net(z, 1 - t, y, collect=(3,))
    close(out.prediction, record.out["x_pred"])
    close(official.method.projectors[0](out.hidden[3]), record.out["zs.0"])
    method = official.method.config
    assert (method.name, method.depth, method.kernel, method.weight, method.gamma) == ("irepa", 3, 3, 0.5, 0.8)
    law = dict(time_law="logit-normal", time_mean=0.8, time_std=0.8)
    assert official.objective == Objective("linear", "x", "v", **law, noise_scale=1.0, clamp=0.05)
    family, back, weights_back = to_official(*vars(official).values())
    assert family == "jit" and config["den"].items() <= back["den"].items()
    unused = {"projector_dim"}  # of a convolution
    assert all(back["net"][name] == config["net"][name] for name in config["net"].keys() - unused)
    assert weights_back.keys() == weights.keys() and all(torch.equal(weights_back[k], weights[k]) for k in weights)


def test_the_doors_sampler_reproduces_the_recorded_samples():
    record, official = golden("jit"), opened_jit()
    start = official.objective.noise_scale * record.inputs["gen_noise_unit"]
    sampler = replace(official.sampler, precision="float32")
    drawn = last_sample(official.net, official.objective, record.inputs["labels"], sampler, start=start)
    close(drawn, record.out["generate.heun.cfg_interval"])


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [(0.1, 1.0, 50), (0.1, 1.0, 20), (0.0, 1.0, 8), (0.25, 0.75, 8), (0.0, 0.5, 8), (0.125, 1.0, 16)],
)
def test_an_interval_that_is_turned_guides_the_same_stages(low, high, steps):
    given = {"interval_min": low, "interval_max": high, "num_sampling_steps": steps}
    diary, sampler = Diary(), jit_sampler(DENOISER | given)
    last_sample(diary, OBJECTIVE, torch.zeros(1, dtype=torch.long), sampler)
    assert diary.asked == official_stages(steps, low, high)
    _, config, _ = to_official(*vars(opened_jit(**given)).values())
    assert {name: config["den"][name] for name in given} == given


def test_a_jit_without_projectors_is_trained_by_denoising():
    weights = {name: value for name, value in golden("jit").weights.items() if "projectors." not in name}
    official = opened_jit(weights)
    assert official.method.config.name == "sit"
    _, config, back = to_official(*vars(official).values())
    assert config["net"]["z_dims"] == [] and back.keys() == weights.keys() and "proj_coeff" not in config["den"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 64}, "unknown jit argument 'hiden_size'. Did you mean 'hidden_size'"),
        ({"P_men": 0.0}, "Did you mean 'P_mean'"),
        ({"class_dropout_prob": 0.1}, "unknown jit argument"),
        ({"attn_drop": 0.1}, "attn_drop 0.1 and proj_drop 0.0"),
        ({"label_drop_prob": 0}, "null class"),
        ({"proj_coeff": "0.5,0.5"}, "proj_coeff '0.5,0.5'.*one weight"),
        ({"z_dims": [40, 40]}, "missing projectors.1.projection_layer.bias"),
        ({"depth": 5}, "missing blocks.4"),
        ({"in_context_start": 4}, "context_start 4 is outside"),
        ({"bottleneck_dim": 25}, r"proj1.weight has shape \(24, 3, 4, 4\), expected \(25, 3, 4, 4\)"),
        ({"interval_min": 0.8, "interval_max": 0.2}, "guidance interval"),
        ({"sampling_method": "heum"}, "Did you mean 'heun'"),
    ],
)
def test_what_does_not_fit_a_jit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        opened_jit(**change)


def training_checkpoint(path, averages, **typed):
    """A file as JiT's training writes it: raw weights, optimiser, settings, averages as state dicts of parameters."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    raw = {name: torch.zeros_like(value) for name, value in golden("jit").weights.items()}
    content = {"model": raw, "optimizer": optimizer.state_dict(), "epoch": 199}
    content["args"] = argparse.Namespace(model="JiT-B/16", lr=2e-4, attn_dropout=0.0, proj_dropout=0.2, **typed)
    for name, weights in averages.items():
        content[name] = {key: nn.Parameter(value) for key, value in weights.items()}
    torch.save(content, path)
    return path


def test_both_averages_of_a_jit_are_kept(tmp_path, capsys):
    first = golden("jit").weights
    second = {name: 0.5 * value for name, value in first.items()}
    typed = {"P_mean": -0.4, "noise_scale": 2.0, "encoder_depth": 3, "cfg": 3.5, "projection_layer_type": "mlp"}
    file = training_checkpoint(tmp_path / "checkpoint-last.pth", {"model_ema1": first, "model_ema2": second}, **typed)
    config = json.dumps({"num_heads": 4, "in_context_start": 2})
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--config", config]) == 0
    said = capsys.readouterr().out
    assert "assumed P_std 0.8, t_eps 0.05, proj_coeff '0.5'" in said
    assert not any(name in said for name in ("P_mean", "noise_scale", "encoder_depth", "num_heads"))  # told
    for average, weights in {"ema": first, "second_ema": second}.items():
        run = load_run(tmp_path / "run", average=average)
        assert all(torch.equal(value, weights[f"net.{name}"]) for name, value in run.net.state_dict().items())
        back = read_weights(export_run(run, tmp_path / f"{average}.safetensors")).weights
        own = [name for name in back if average == "ema" or "projectors" not in name]
        assert back.keys() == first.keys() and all(torch.equal(back[name], weights[name]) for name in own)
    training, objective = run.recipe.training, run.recipe.objective
    assert (training.ema, training.second_ema) == (0.9999, 0.9996)
    assert (objective.time_mean, objective.noise_scale, run.sampler.guidance) == (0.4, 2.0, 3.5)
    assert (run.method.config.name, run.method.config.depth) == ("irepa", 3)


def test_a_jit_with_one_average_says_so(tmp_path):
    config = {"num_heads": 4, "in_context_start": 2}
    file = training_checkpoint(tmp_path / "checkpoint-0.pth", {"model_ema1": golden("jit").weights})
    run = load_run(import_run(file, tmp_path / "run", config=config))
    assert run.recipe.training.second_ema is None
    with pytest.raises(ValueError, match="'second_ema'"):
        load_run(tmp_path / "run", average="second_ema")


def test_a_second_average_must_fit_too(tmp_path):
    first = golden("jit").weights
    second = {name: value for name, value in first.items() if name != "net.pos_embed"}
    file = training_checkpoint(tmp_path / "checkpoint-0.pth", {"model_ema1": first, "model_ema2": second})
    with pytest.raises(ValueError, match="missing pos_embed"):
        import_run(file, tmp_path / "run", config={"num_heads": 4, "in_context_start": 2})
    assert not (tmp_path / "run").exists()


def test_a_bare_jit_asks_for_what_neither_shapes_nor_papers_tell(tmp_path, capsys):
    save_file(golden("jit").weights, tmp_path / "bare.safetensors")
    words = ["import", str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "num_heads and in_context_start" in said and not (tmp_path / "run").exists()
    assert main([*words, "--config", '{"num_heads": 4}']) == 2
    said = capsys.readouterr().err
    assert "in_context_start" in said and "num_heads" not in said


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_of_jit_are_read_off_completely(name, capsys):
    size = published_size(name)
    with torch.device("meta"):
        net = JiT(**size)
    family, told = told_arguments({f"net.{key}": value for key, value in net.state_dict().items()}, {}, "", {})
    full = arguments(family, told)
    assert family == "jit" and (full["input_size"], full["patch_size"]) == (size["input_size"], size["patch_size"])
    assert (full["hidden_size"], full["depth"], full["num_heads"]) == (size["width"], size["depth"], size["heads"])
    assert (full["bottleneck_dim"], full["in_context_len"]) == (size["bottleneck"], 32)
    assert full["in_context_start"] == size["context_start"]
    assert full["noise_scale"] == size["input_size"] / 256
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("num_heads", "in_context_start", "P_mean -0.8", "P_std", "t_eps", "noise_scale")
    )


def lab_jit(overrides):
    recipe = make_recipe("jit", "smoke", overrides=f"network.data_at_one=true {overrides}")
    return *build(recipe, Facts(10, (16,))), recipe.objective


@pytest.mark.parametrize(
    "overrides", ["", "network.context_tokens=0", "network.mlp_ratio=3.3 network.dropout=0.1", "method.name=irepa"]
)
def test_a_jit_of_the_lab_has_an_official_layout(overrides):
    net, method, objective = lab_jit(overrides)
    family, config, weights = to_official(net, method, objective)
    official = from_official(family, config, weights)
    assert official.objective == objective and official.method.config.name == method.config.name
    mine, theirs = ({**n.state_dict(), **m.state_dict()} for n, m in ((net, method), (official.net, official.method)))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert to_official(official.net, official.method, official.objective)[1] == config
    x, t, y = torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 10])
    assert torch.equal(net.eval()(x, t, y).prediction, official.net(x, t, y).prediction)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("network.data_at_one=false", "train with network.data_at_one=true"),
        ("network.bottleneck=0", "network.bottleneck is switched off"),
        ("network.swiglu=false", "network.swiglu is switched off"),
        ("network.rms_norm=false", "network.rms_norm is switched off"),
        ("network.rope=false", "network.rope is switched off"),
        ("network.qk_norm=false", "network.qk_norm is switched off"),
        ("objective.prediction=v", "objective.prediction in JiT's official layout 'v'. Valid: x"),
        ("objective.loss_space=x", "objective.loss_space in JiT's official layout 'x'. Valid: v"),
        ("objective.time_law=uniform", "objective.time_law"),
        ("objective.interpolant=cosine", "objective.interpolant"),
        ("method.name=repa", "method in JiT's official layout 'repa'.*Valid: sit, irepa"),
    ],
)
def test_a_jit_without_an_official_layout_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        to_official(*lab_jit(overrides))


# ---- what a file's own settings say


def plain(folder, args=None, learn_sigma=False, **changes):
    """A small official SiT without projectors in a training checkpoint, and its network."""
    size = dict(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10, learn_sigma=learn_sigma) | changes
    net = DOORS["sit"].network(arguments("sit", size))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    content = {"ema": net.state_dict(), **({"args": argparse.Namespace(**args)} if args else {})}
    torch.save(content, folder / "plain.pt")
    return folder / "plain.pt", net


HEADS = {"num_heads": 4}


def test_two_families_that_fit_are_asked_about(tmp_path):
    """SiT without learn_sigma and REPA have one layout, and time runs the other way."""
    file, net = plain(tmp_path)
    with pytest.raises(ValueError, match="give --family sit or --family repa"):
        import_run(file, tmp_path / "run", config=HEADS)
    given = [load_run(import_run(file, tmp_path / family, family, HEADS)) for family in ("sit", "repa")]
    assert [run.net.data_at_one for run in given] == [True, False]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    assert torch.equal(given[0].net(x, t, y).prediction, net(x, t, y).prediction)
    assert not torch.allclose(given[1].net(x, t, y).prediction, net(x, t, y).prediction, atol=0.05)


@pytest.mark.parametrize(
    ("args", "family", "path", "data_at_one"),
    [
        ({"path_type": "GVP", "prediction": "velocity"}, "sit", "cosine", True),
        ({"path_type": "Linear", "prediction": "velocity", "loss_weight": None}, "sit", "linear", True),
        ({"path_type": "cosine", "prediction": "v", "encoder_depth": 8, "enc_type": "None"}, "repa", "cosine", False),
    ],
)
def test_the_settings_of_the_training_decide(args, family, path, data_at_one, tmp_path, capsys):
    file, _ = plain(tmp_path, args)
    run = load_run(import_run(file, tmp_path / "run", config=HEADS))
    assert (run.recipe.objective.interpolant, run.net.data_at_one) == (path, data_at_one)
    said = capsys.readouterr().out
    assert f"family {family}" in said and "path_type" not in said


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_networks_of_noise_and_score_are_refused(prediction, tmp_path):
    file, _ = plain(tmp_path, {"path_type": "Linear", "prediction": prediction}, learn_sigma=True)
    with pytest.raises(ValueError, match=f"prediction '{prediction}' of sit"):
        import_run(file, tmp_path / "run", config=HEADS)
    assert not (tmp_path / "run").exists()


def test_the_aligned_depth_and_weight_of_the_training_are_kept(tmp_path, capsys):
    record = golden("repa")
    args = argparse.Namespace(path_type="linear", encoder_depth=2, proj_coeff=0.7, model="SiT-XL/2")
    torch.save({"ema": record.weights, "args": args, "steps": torch.tensor(12.0)}, tmp_path / "0000012.pt")
    run = load_run(import_run(tmp_path / "0000012.pt", tmp_path / "run", config=HEADS))
    assert (run.method.config.depth, run.method.config.weight, run.step) == (2, 0.7, 12)
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_leave_no_mark(prefix, tmp_path):
    record = golden("repa")
    save_file({prefix + name: value for name, value in record.weights.items()}, tmp_path / "wrapped.safetensors")
    run = load_run(import_run(tmp_path / "wrapped.safetensors", tmp_path / "run", config=HEADS | {"encoder_depth": 2}))
    assert all(torch.equal(value, record.weights[name]) for name, value in run.net.state_dict().items())


def test_a_weight_that_is_no_number_is_named(tmp_path, capsys):
    weights = {name: value.clone() for name, value in golden("repa").weights.items()}
    weights["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "spoilt.safetensors")
    assert main(["import", str(tmp_path / "spoilt.safetensors"), "--out", str(tmp_path / "run")]) == 2
    assert "1 of" in (said := capsys.readouterr().err) and "blocks.1.mlp.fc1.weight" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["repa", "irepa"])
def test_a_file_with_two_teachers_keeps_both_projectors(family, tmp_path):
    record = golden(family)
    first = {name: value for name, value in record.weights.items() if name.startswith("projectors.0.")}
    second = {name.replace("projectors.0.", "projectors.1."): 2 * value for name, value in first.items()}
    z = record.config["z_dims"][0]
    config = record.config | {"z_dims": [z, z]}
    words = {"family": family, "config": json.dumps(config)}
    save_file(record.weights | second, tmp_path / "two.safetensors", words)
    run = load_run(import_run(tmp_path / "two.safetensors", tmp_path / "run"))
    assert len(run.method.projectors) == 2 and run.method.teacher_dims == (z, z)
    again = read_weights(export_run(run, tmp_path / "again.safetensors"))
    assert json.loads(again.words["config"])["z_dims"] == [z, z]
    assert all(torch.equal(again.weights[name], value) for name, value in second.items())


def test_dropout_of_a_jits_training_is_kept(tmp_path, capsys):
    file = training_checkpoint(tmp_path / "checkpoint-0.pth", {"model_ema1": golden("jit").weights})
    run = load_run(import_run(file, tmp_path / "run", config={"num_heads": 4, "in_context_start": 2}))
    assert run.recipe.network.dropout == 0.2 and "one dropout" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["sit", "jit"])
def test_an_import_without_projectors_opens_study_01(family, tmp_path, monkeypatch):
    """At a grid of 16 x 16, which no teacher of the lab's has, the papers' teacher is taken; here a tiny one stands for it."""
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(IMAGES, "data.teacher", Setting("timm:test_vit?random", "small"))
    monkeypatch.setattr(gradient_norms, "fit_observer", partial(fit_observer, steps=2))
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], images=6, times=2, shown=1))
    for number in range(30):
        (folder := tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (8 * number, 9, 9)).save(folder / f"{number}.png")
    size = {"input_size": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 2}
    if family == "jit":
        size |= {"patch_size": 2, "bottleneck_dim": 8, "in_context_len": 0, "in_context_start": 0}
    net = DOORS[family].network(arguments(family, size))
    save_file(net.state_dict(), tmp_path / "theirs.safetensors")
    words = [*("--out", str(tmp_path / "run"), "--family", family, "--config", json.dumps(size))]
    words += ["--dataset", f"folder:{tmp_path / 'images'}", *(["--autoencoder", "tiny"] if family == "sit" else [])]
    assert main(["import", str(tmp_path / "theirs.safetensors"), *words]) == 0
    film = open_study("smoke", str(tmp_path / "run"), device="cpu").film
    assert film.norms.shape == (1, 1, 2, 256) and (film.norms > 0).all()


def test_the_autoencoder_of_a_run_on_latents_comes_back(tmp_path, monkeypatch, capsys):
    """Exported and imported again, it can be sampled, measured and looked at; a foreign file is told which it is."""
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    shipped = load_run("ahpa-shapes")
    net = replace(shipped, method=PlainSiT(shipped.net, shipped.recipe.objective, MethodConfig()))
    file = export_run(net, tmp_path / "latents.safetensors")
    again = load_run(import_run(file, tmp_path / "again"))
    assert again.recipe.data.autoencoder == "tiny" and again.recipe.data.size == shipped.recipe.data.size
    assert again.decode(again.inputs(again.images("validation", 4))).shape == (4, 3, 64, 64)
    weights = read_weights(file).weights
    save_file(weights, tmp_path / "bare.safetensors")
    config = {"num_heads": shipped.recipe.network.heads}
    told = load_run(import_run(tmp_path / "bare.safetensors", tmp_path / "told", "repa", config, "shapes", "tiny"))
    assert torch.equal(told.decode(torch.zeros(1, 4, 16, 16)), again.decode(torch.zeros(1, 4, 16, 16)))
    import_run(tmp_path / "bare.safetensors", tmp_path / "bare", "repa", config)
    assert "give --autoencoder" in capsys.readouterr().out


# --- DiT-DH -------------------------------------------------------------------------------------------------------------


def test_a_stage_two_checkpoint_of_rae_becomes_a_run_by_its_tensors_alone(tmp_path, capsys):
    record, file = golden("ditdh"), tmp_path / "last.pt"
    torch.save({"ema": record.weights, "model": record.weights, "step": 7, "epoch": 1}, file)
    run = load_run(import_run(file, tmp_path / "run"))
    x, t, y = (record.inputs[k] for k in "xty")
    close(run.net(x, t, y).prediction, record.out["pred"])
    assert "family ditdh, read off its tensors" in capsys.readouterr().out and run.step == 7
    assert run.recipe.objective.time_shift == 0.5 and run.sampler.steps == 49 and run.sampler.end == 0.001  # 16 x 8 x 8
    assert (run.recipe.network.head_width, run.recipe.network.heads, run.recipe.network.head_heads) == (96, 4, 4)
    family, config, weights = to_official(run.net, run.method, run.recipe.objective, run.sampler)
    assert family == "ditdh" and all(torch.equal(weights[name], value) for name, value in record.weights.items())
    assert arguments(family, config)["num_heads"] == (4, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"wo_shift": True}, "wo_shift"),
        ({"patch_size": 2}, "patch_size 2 of ditdh"),
        ({"time_dist_type": "logit-normal_0"}, "logit-normal_0_1"),
        ({"time_dist_type": "cosine"}, "time_dist_type"),
        ({"depth": 28}, "depth 28 of ditdh: expected two numbers"),
        ({"hiden_size": (1, 2)}, "hidden_size"),
    ],
)
def test_what_a_ditdh_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments("ditdh", wrong)
