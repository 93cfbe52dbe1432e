"""What a dry run tells: true where it can be checked, and without a trace."""

import builtins
import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from torch.autograd.graph import saved_tensors_hooks

from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import step_folder
from maskalign_lab.base.seeding import generator
from maskalign_lab.cli import main
from maskalign_lab.runs.batches import load_sources, make_batches
from maskalign_lab.runs.estimates import (
    GPUS,
    WORKSPACE,
    caches,
    count,
    estimate,
    memory,
    parts_needed,
    report,
    resident,
    saved_bytes,
)
from maskalign_lab.runs.expectations import expect, expected_images
from maskalign_lab.runs.experiments import COUNTED, blank_batch, blank_step
from maskalign_lab.runs.presets import NAMED, make_recipe
from maskalign_lab.runs.recipe import DataConfig
from maskalign_lab.runs.run import build, train
from maskalign_lab.training.loop import Trainee, make_optimizer
from maskalign_lab.training.methods import INSTALLED, State

pytestmark = pytest.mark.usefixtures("own_folders")
SMALL = "network.width=16 network.depth=2 network.heads=2 data.n=32 training.batch_size=8 training.steps=2"


def small(method: str, more: str = ""):
    aligned = " method.depth=1 method.projector_width=16" if method == "repa" else ""
    return make_recipe(method, "smoke", overrides=f"{SMALL}{aligned} {more}")


@pytest.mark.parametrize("name", sorted({*INSTALLED, *NAMED}))
def test_what_is_expected_is_what_loading_gives(name):
    recipe = make_recipe(name, "smoke", overrides="data.n=32")
    images, _, facts = expect(recipe)
    loaded = load_sources(recipe).facts
    assert replace(loaded, data_digest="", teacher_digest="", autoencoder_digest="") == facts and images.count == 32
    blank, trainee = blank_step(recipe, facts), Trainee(*build(recipe, loaded))
    told, real = (sum(p.numel() for p in part.parameters()) for part in (blank.net, trainee.model))
    assert told == real and count(blank.method) == sum(p.numel() for p in trainee.method.parameters())
    learned = [p for group in make_optimizer(trainee, recipe.training).param_groups for p in group["params"]]
    assert memory(recipe, blank)["optimiser"] == 8 * sum(p.numel() for p in learned)


@pytest.mark.parametrize("name", ["reg", "maskalign", "haste"])
def test_what_a_step_keeps_is_what_a_real_one_keeps(name):
    """In float32 on a CPU, where numbers are computed."""
    recipe = make_recipe(name, "smoke", overrides="data.n=32")
    facts, kept = expect(recipe).facts, {}
    net, method = build(recipe, facts)
    batch = blank_batch(recipe, facts, net.side, net.blocks[0].attn.heads)
    draw = method.draw(batch, 0, lambda step, name: generator(0, step, name))
    weights = {p.untyped_storage()._cdata for part in (net, method) for p in part.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        method.loss(State(net, net, 0), batch, draw)
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / COUNTED
    assert saved_bytes(blank_step(recipe, facts)) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_what_lies_on_disk_afterwards_is_what_was_told(precision, tmp_path):
    recipe = small("repa", f"data.precision={precision}")
    found = estimate(recipe)
    run = train(recipe, tmp_path / "run", "cpu", 0)
    saved = sum(file.stat().st_size for file in step_folder(run).iterdir())
    assert saved == pytest.approx(found.checkpoints["whole"], rel=0.2)  # of so small a network names weigh too
    kept = sum(file.stat().st_size for file in (paths.cache() / "features").rglob("*.safetensors"))
    assert kept == pytest.approx(found.caches["features"], rel=0.01)


@pytest.mark.parametrize("precision", ["exact", "half"])
def test_latents_and_levels_are_told_too(precision):
    recipe = make_recipe("ahpa", "smoke", overrides=f"data.n=32 data.precision={precision}")
    told = caches(recipe, expect(recipe).facts, 32)
    batches = make_batches(recipe)
    assert told == {"latents": batches.latents[:].nbytes, "levels": batches.levels[:].nbytes}


def test_memory_grows_with_the_batch_and_falls_with_its_parts():
    def total(more: str = "") -> float:
        recipe = small("reg", more)
        return sum(memory(recipe, blank_step(recipe, expect(recipe).facts)).values())

    sizes = [total(f"training.batch_size={n}") for n in (1, 8, 64)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    parts = [total(f"training.batch_size=64 execution.accumulate={n}") for n in (1, 2, 8)]
    assert parts == sorted(parts, reverse=True) and len(set(parts)) == 3
    assert total("training.precision=float32") > total() and total("execution.compile=off") > total()
    assert total("training.second_ema=0.9") > total()


def test_a_batch_that_does_not_fit_is_told_the_parts_in_which_it_does():
    found = estimate(make_recipe("reg", "paper", "folder:/no/such/imagenet"))
    assert parts_needed(found, GPUS["H100"]) == 2 and parts_needed(found, GPUS["H200"]) == 1
    assert resident(found, GPUS["H200"]) == ["latents"] and resident(found, GPUS["H100"]) == []
    assert sum(found.memory.values()) - found.memory["activations"] / 2 + WORKSPACE < GPUS["H100"].memory
    assert found.parameters["network"] == pytest.approx(676.89e6, rel=1e-4)
    assert parts_needed(found, GPUS["H100"]._replace(memory=1e9)) is None
    told = report(found, price=2.0)
    assert "1,281,167 in 1,000 classes (assumed" in told and "assumed, not measured" in told and "79.9 epochs" in told
    assert "fits with execution.accumulate=2" in told and ", cost " in told and "cost" not in report(found)


def test_a_stop_of_the_alignment_makes_it_cheaper():
    long, short = (
        estimate(make_recipe("haste", "smoke", overrides=f"method.stop={stop} network.depth=2")) for stop in (20, 5)
    )
    assert long.flops > short.flops > estimate(make_recipe("sit", "smoke", overrides="network.depth=2")).flops


def test_of_older_checkpoints_only_averages_stay():
    often, once = (estimate(small("sit", f"training.steps=100 training.save_every={n}")) for n in (10, 100))
    assert often.checkpoints["whole"] == 2 * once.checkpoints["whole"] and once.checkpoints["averages"] == 0
    assert often.checkpoints["averages"] == 8 * 4 * often.parameters["network"]


@pytest.fixture
def sealed(monkeypatch):
    """A machine without a network, whose files can be read only."""
    opened = builtins.open

    def read_only(file, mode="r", *rest, **named):
        assert not set(mode) & set("wax+") or not str(file).startswith("/") or str(file).startswith("/dev"), file
        return opened(file, mode, *rest, **named)

    def no_network(*_):
        pytest.fail("asked the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(builtins, "open", read_only)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("made a folder"))


@pytest.mark.parametrize("words", [["haste"], ["ahpa"], ["jit", "network=JiT-B/16"]], ids=lambda words: words[0])
def test_a_dry_run_downloads_nothing_and_leaves_nothing(words, sealed, tmp_path, capsys):
    size = [] if words[0] == "jit" else ["network=SiT-S/2"]
    assert (
        main(["train", *words, *size, "--preset", "paper", "--dataset", "folder:/no/such", "--dry-run", "--price", "2"])
        == 0
    )
    told = capsys.readouterr().out
    assert "H200" in told and "cost" in told and "training in" not in told
    assert not list(tmp_path.iterdir())


def test_a_price_without_a_dry_run_is_refused(capsys):
    assert main(["train", "sit", "--preset", "smoke", "--price", "2"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_images_are_counted_where_they_are(tmp_path):
    for k in range(20):
        (folder := tmp_path / "train" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").touch()  # listed, not opened
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "0.png").touch()
    here = DataConfig(f"folder:{tmp_path}")
    assert expected_images(here) == (20, 2, f"listed in {tmp_path}")
    assert expected_images(replace(here, n=8)).count == 8
    gone = expected_images(DataConfig("folder:/no/such"))
    assert (gone.count, gone.classes) == (1_281_167, 1000) and gone.source.startswith("assumed")
    assert expected_images(DataConfig("folder:/no/such", n=9)).count == 9


def test_mistakes_are_told_as_a_training_tells_them(tmp_path, capsys):
    for words, message in (
        (["repa", "data.teacher=tinny"], "unknown teacher 'tinny'. Did you mean 'tiny'"),
        (["repa", "network.patch_size=2"], "8 x 8 tokens, the network one of 16 x 16"),
        (["repa", "method.depth=99"], "depth 99 is outside the network"),
        (["sit", "--dataset", "shaeps"], "Did you mean 'shapes'"),
        (["ahpa", "data.autoencoder=someone/unknown"], "nothing is downloaded to tell its size"),
    ):
        assert main(["train", *words, "--preset", "smoke", "--dry-run"]) == 2
        assert message in capsys.readouterr().err


def test_a_log_tells_the_rate(tmp_path, capsys):
    run = train(small("sit", "training.steps=6 training.log_every=2"), tmp_path / "run", "cpu", 0)
    found = estimate(small("sit", "training.steps=6 training.log_every=2"), run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert found.rate == pytest.approx(4 / (lines[-1]["seconds"] - lines[0]["seconds"]))
    assert "time, measured" in report(found)


def test_a_training_says_where_only_after_its_checks(tmp_path, capsys):
    words = ["train", "repa", "--preset", "smoke", "data.n=16", "--out", str(tmp_path / "run")]
    assert main([*words, "data.teacher=tiny:/no/such"]) == 2
    assert "training in" not in capsys.readouterr().out
    assert main([*words, "training.steps=1"]) == 0
    assert f"training in {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("execution.accumulate=3", "training.batch_size=32 cannot be cut into 3 equal parts"),
        ("training.batch_size=33 --processes 2", "training.batch_size=33 cannot be cut into 2 equal parts"),
        ("data.n=0", "data.n=0: expected at least 1"),
        ("data.classes=circle", "data.classes=circle: expected a folder:PATH or hf:NAME .* got data set 'shapes'"),
        ("--price -3", "--price -3: expected at least 0"),
    ],
)
def test_a_dry_run_refuses_what_a_training_would(words, told, capsys):
    assert main(["train", "sit", "--preset", "smoke", "--dry-run", *words.split()]) == 2
    assert re.search(told, capsys.readouterr().err)
