"""Runs on the latents of a representation autoencoder: trained, told beforehand, shown, and imported with statistics."""

import json
import shutil
from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import save_file
from shared.golden import close, golden
from shared.rae import random_rae, random_statistics, random_teacher

from maskalign_lab.cli import main
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.encoders.latent_statistics import read_statistics, write_statistics
from maskalign_lab.runs import evaluation
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.estimates import caches, estimate
from maskalign_lab.runs.evaluation import judge_samples, measure
from maskalign_lab.runs.expectations import expect
from maskalign_lab.runs.official_files import export_run, import_run
from maskalign_lab.runs.preparing import prepare
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.runs.sources import encodings_of, load_sources

pytestmark = pytest.mark.usefixtures("own_folders")
SMALL = (
    "data.size=32 data.n=32 data.teacher=tiny-4x4 network.patch_size=1 network.width=16 network.depth=2 network.heads=2 "
    "training.batch_size=8 training.steps=2 training.warmup=1 training.log_every=1 training.save_every=2"
)
ALIGNED = "method.depth=1 method.projector_width=16"
METHODS = {
    "sit": "",
    "sra2": "method.depth=1",
    "repa": ALIGNED,
    "reg": ALIGNED,
    "maskalign": ALIGNED.replace("method.", "method.inner."),
}


def recipe_of(method: str, autoencoder: str, more: str = ""):
    return make_recipe(
        method, "smoke", overrides=f"{SMALL} {METHODS.get(method, '')} data.autoencoder={autoencoder} {more}"
    )


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """The name of a folder, and what it holds."""
    place = tmp_path_factory.mktemp("rae")
    return f"rae:{place}", random_rae(place)


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_and_are_looked_at_unchanged(method, rae, tmp_path):
    name, whole = rae
    run = load_run(train(recipe_of(method, name), tmp_path / "run", "cpu", 0))
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and all(torch.tensor(line["denoising"]).isfinite() for line in log)
    assert run.facts.channels == 128 and run.facts.factor == 8 and run.facts.autoencoder_digest == whole.digest
    held_out = run.images("validation", 4)
    assert torch.equal(run.inputs(held_out), whole.encode(held_out.images()))
    x = last_sample(run.net, run.recipe.objective, torch.tensor([3, 7]), SamplerConfig(steps=2))
    assert x.shape == (2, 128, 4, 4) and run.decode(x).shape == (2, 3, 32, 32)


def test_ditdh_trains_with_the_shift_of_its_latents(rae, tmp_path):
    more = "network.name=ditdh network.head_width=24 network.head_depth=1 network.head_heads=2 objective.time_shift=2.0"
    run = load_run(train(recipe_of("sit", rae[0], more), tmp_path / "run", "cpu", 0))
    assert run.net.in_channels == 128 and run.net.side == 4 and run.recipe.objective.time_shift == 2.0
    assert last_sample(run.net, run.recipe.objective, torch.tensor([0]), SamplerConfig(steps=2)).isfinite().all()


def test_a_batch_is_the_latents_and_no_noise(rae):
    name, whole = rae
    batches = make_batches(recipe_of("repa", name), "cpu")
    batch, again = batches(0), replace(batches, training=replace(batches.training, seed=0))(0)
    index = batches.drawn(32, 0)
    assert torch.equal(batch.x, whole.encode(batches.dataset.images(index))) and torch.equal(batch.x, again.x)


def test_a_method_that_needs_levels_says_what_to_take(rae):
    """SRA 2 does not: its target is the clean latent, of whatever kind."""
    for look in (load_sources, expect):
        with pytest.raises(ValueError, match="method 'ahpa' aligns with the levels .*rae:.* set data.autoencoder=tiny"):
            look(recipe_of("ahpa", rae[0]))


@pytest.mark.parametrize("name", ["", "rae-latents:tiny-4x4?random"])
@pytest.mark.parametrize("precision", ["exact", "half"])
def test_a_dry_run_is_told_the_truth(name, precision, rae):
    recipe = recipe_of("repa", name or rae[0], f"data.precision={precision}")
    sources, expected = load_sources(recipe), expect(recipe)
    assert replace(sources.facts, data_digest="", teacher_digest="", autoencoder_digest="") == expected.facts
    found = estimate(recipe)
    assert found.tokens == 16 and found.caches == caches(recipe, sources.facts, 32)
    made = {each.kind: 32 * each.row_bytes for each in encodings_of(recipe, sources)}
    assert found.caches == made and made["latents"] == 32 * 128 * 16 * (4 if precision == "exact" else 2)


def test_sizes_that_it_does_not_take_are_refused_before_anything_is_loaded(rae):
    for look in (load_sources, expect):
        with pytest.raises(
            ValueError, match="takes images of 32 x 32 pixels and no others, got a side of 64; take data.size=32"
        ):
            look(recipe_of("repa", rae[0], "data.size=64"))


def test_a_mistyped_name_is_refused_by_a_dry_run_too():
    for look in (load_sources, expect):
        with pytest.raises(ValueError, match="unknown autoencoder 'raee'. Did you mean 'rae'"):
            look(recipe_of("repa", "raee"))


def test_what_is_prepared_is_what_a_training_reads(rae, tmp_path, capsys):
    prepare(recipe_of("repa", rae[0]), "cpu", verify=True, print_every=0)
    told = capsys.readouterr().out
    assert "latents" in told and "verified" in told
    train(recipe_of("repa", rae[0]), tmp_path / "run", "cpu", 0)


def test_samples_are_judged_as_images(rae, tmp_path):
    run = load_run(train(recipe_of("sit", rae[0]), tmp_path / "run", "cpu", 0))
    found = judge_samples(run, 20, SamplerConfig(steps=2, precision="float32"))
    assert found["frechet"] > found["frechet floor"] and 0 <= found["accuracy"] <= 1
    assert main(f"sample {run.path} --n 1 --steps 2 --out {tmp_path / 'grid.png'} --device cpu".split()) == 0
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_without_a_decoder_it_trains_and_is_not_sampled(tmp_path, monkeypatch, capsys):
    run = load_run(train(recipe_of("repa", "rae-latents:tiny-4x4?random"), tmp_path / "run", "cpu", 0))
    assert run.inputs(run.images("validation", 4)).shape == (4, 128, 4, 4)
    monkeypatch.setattr(
        evaluation, "sample", lambda *_: pytest.fail("sampled before it was asked whether images can be made")
    )
    for call in (lambda: measure(run, 8), lambda: judge_samples(run, 8)):
        with pytest.raises(ValueError, match="'rae-latents:tiny-4x4.random' has no decoder"):
            call()
    assert main(f"sample {run.path} --out {tmp_path / 'grid.png'} --device cpu".split()) == 2
    assert "has no decoder" in capsys.readouterr().err and not (tmp_path / "grid.png").exists()


def test_another_decoder_under_the_same_name_is_found_out(tmp_path):
    random_rae(tmp_path / "rae")
    run = load_run(train(recipe_of("sit", f"rae:{tmp_path / 'rae'}"), tmp_path / "run", "cpu", 0))
    random_rae(tmp_path / "rae", seed=1)
    with pytest.raises(ValueError, match="learned the latents of an autoencoder .* and what goes by that name now has"):
        _ = load_run(run.path).autoencoder


# ---- the door of DiT-DH


@pytest.fixture
def released(tmp_path):
    """A stage-2 checkpoint of 16 x 8 x 8 latents, statistics as released, and the autoencoder that they are of."""
    save_file(golden("ditdh").weights, tmp_path / "stage2.safetensors")
    teacher = random_teacher(tmp_path / "teacher", patch_size=4)
    random_rae(tmp_path / "rae", teacher)
    torch.save(random_statistics((16, 8, 8), seed=1, mean=False)._asdict(), tmp_path / "stat.pt")
    return tmp_path


def imported(place, out="run", autoencoder=None, **more):
    autoencoder = f"rae:{place / 'rae'}" if autoencoder is None else autoencoder
    return import_run(
        place / "stage2.safetensors", place / out, "ditdh", golden("ditdh").config, "shapes", autoencoder, **more
    )


def test_a_released_checkpoint_with_its_statistics_becomes_a_run(released):
    run = load_run(imported(released, statistics=released / "stat.pt"))
    record = golden("ditdh")
    close(run.net(*(record.inputs[k] for k in "xty")).prediction, record.out["pred"])
    assert (run.recipe.data.autoencoder, run.recipe.data.size) == (f"rae:{released / 'rae'}", 32)
    kept = read_statistics(run.path / "statistics.safetensors")
    assert (
        kept.mean is None
        and run.autoencoder.statistics.digest == kept.digest == read_statistics(released / "stat.pt").digest
    )
    images = run.images("validation", 4)
    tokens = run.autoencoder.encoder(images.images())
    torch.testing.assert_close(run.inputs(images), tokens / torch.sqrt(kept.var + 1e-5), rtol=1e-4, atol=1e-4)
    assert run.decode(last_sample(run.net, run.recipe.objective, torch.tensor([1]), run.sampler)).shape == (
        1,
        3,
        32,
        32,
    )


def test_the_statistics_move_with_the_run_and_into_files(released):
    run = load_run(imported(released, statistics=released / "stat.pt"))
    (released / "stat.pt").unlink()
    moved = load_run(shutil.move(run.path, released / "moved"))
    assert moved.autoencoder.digest == run.facts.autoencoder_digest
    file = export_run(moved, released / "again" / "stage2.safetensors")
    again = load_run(import_run(file, released / "back"))
    assert again.autoencoder.digest == run.facts.autoencoder_digest
    (file.parent / "stage2.statistics.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no statistics"):
        import_run(file, released / "without")


def test_an_autoencoders_own_statistics_stand_where_none_are_given(released):
    run = load_run(imported(released))
    assert run.autoencoder.statistics.mean is not None and (run.path / "statistics.safetensors").is_file()
    own = imported(released, "behind the name", f"rae:{released / 'rae'}@{released / 'stat.pt'}")
    assert load_run(own).autoencoder.statistics.mean is None


def test_statistics_that_do_not_fit_leave_nothing_behind(released):
    write_statistics(released / "half.safetensors", random_statistics((16, 4, 4), mean=False))
    torch.save({"mean": torch.zeros(16, 8, 8)}, released / "no var.pt")
    random_rae(released / "other", random_teacher(released / "wide", patch_size=4, width=32))
    random_rae(released / "coarse", random_teacher(released / "coarse teacher", patch_size=8))
    coarse, other = (f"rae:{released / name}" for name in ("coarse", "other"))
    for given, kind, message in (
        (
            {"statistics": released / "half.safetensors"},
            ValueError,
            r"var has shape \(16, 4, 4\), and the latents have \(16, 8, 8\)",
        ),
        ({"statistics": released / "no var.pt"}, ValueError, "expected var"),
        ({"statistics": released / "nowhere.pt"}, FileNotFoundError, "no statistics"),
        ({"statistics": released / "stat.pt", "autoencoder": ""}, ValueError, "name it by --autoencoder"),
        ({"autoencoder": other}, ValueError, "latents of 32 channels, and the network takes 16"),
        ({"autoencoder": coarse}, ValueError, "latents of 4 x 4, and the network takes 8 x 8"),
    ):
        with pytest.raises(kind, match=message):
            imported(released, **given)
        assert not (released / "run").exists()


def test_by_command(released, capsys):
    words = [
        "import",
        str(released / "stage2.safetensors"),
        "--out",
        str(released / "run"),
        "--family",
        "ditdh",
        "--dataset",
        "shapes",
    ]
    words += ["--config", json.dumps(golden("ditdh").config), "--autoencoder", f"rae:{released / 'rae'}"]
    assert main([*words, "--statistics", str(released / "half.pt")]) == 2
    assert "no statistics" in capsys.readouterr().err
    assert main([*words, "--statistics", str(released / "stat.pt")]) == 0
    assert prod(load_run(released / "run").autoencoder.statistics.var.shape) == 16 * 8 * 8
