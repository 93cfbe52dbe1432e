"""`prepare`: what a training reads, made beforehand; killed and gone on with, by one process or by two, from broken files too."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign_lab.base import paths
from maskalign_lab.cli import main
from maskalign_lab.data import stored_images
from maskalign_lab.data.image_folder import list_folder
from maskalign_lab.data.packing import unpacked
from maskalign_lab.encoders import encoding
from maskalign_lab.runs import preparing
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.preparing import prepare
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.runs.sources import encodings_of, load_sources

pytestmark = pytest.mark.usefixtures("own_folders")
WORDS = (
    "data.autoencoder=tiny data.size=64 data.n=60 network.patch_size=2 network.width=16 network.depth=2 network.heads=2 "
    "method.depth=1 method.projector_width=16 training.batch_size=8 training.warmup=1 training.steps=2 execution.workers=0"
)
START = """
import os, signal, sys
from maskalign_lab.data import cache_filling, stored_images
from maskalign_lab.encoders import encoding
from maskalign_lab.runs.preparing import prepare
from maskalign_lab.runs.presets import make_recipe
stored_images.IN_MEMORY = 0
encoding.rows_per_shard = lambda *given: 8
"""
PREPARE = START + "prepare(make_recipe('repa', 'smoke', sys.argv[1], overrides=sys.argv[2]), 'cpu')"
KILLED = START + """
add, left = cache_filling.add_line, [5]

def add_or_die(*given):
    left[0] -= 1
    os.kill(os.getpid(), signal.SIGKILL) if left[0] < 0 else add(*given)

cache_filling.add_line = add_or_die
""" + PREPARE.removeprefix(START)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of noisy JPEGs, sixty to train on."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(67):
        path = root / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + k, 40, 3), np.uint8)).save(path)
    return root


@pytest.fixture
def large(monkeypatch):
    """Sixty images are too many for the memory, and eight make a shard."""
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)
    monkeypatch.setattr(encoding, "rows_per_shard", lambda *given: 8)


def recipe(folder, more="", method="repa"):
    return make_recipe(method, "smoke", f"folder:{folder}", overrides=f"{WORDS} {more}")


def shards(cache: Path) -> dict[str, bytes]:
    """All rows on disk, by kind and name; the folders are named alike wherever the cache lies."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.safetensors"))}


def everything(cache: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(cache)): p.read_bytes()
        for p in sorted(cache.rglob("*"))
        if p.is_file() and ".lock" not in p.name
    }


def test_killed_or_shared_the_caches_are_the_same(forks, folder, tmp_path, large, monkeypatch):
    """One alone; one that was killed in the middle and gone on with; this process and another one at once."""
    words, places = (f"folder:{folder}", WORDS), [str(tmp_path / name) for name in ("killed", "pair")]
    killed = forks.start(KILLED, *words, MASKALIGN_LAB_CACHE=places[0])
    other = forks.start(PREPARE, *words, MASKALIGN_LAB_CACHE=places[1], RANK="1", WORLD_SIZE="2")
    prepare(recipe(folder), "cpu")
    alone = everything(paths.cache())
    with monkeypatch.context() as patch:
        for name, value in {"MASKALIGN_LAB_CACHE": str(tmp_path / "pair"), "RANK": "0", "WORLD_SIZE": "2"}.items():
            patch.setenv(name, value)
        prepare(recipe(folder), "cpu")  # waits for the other one's share
    assert (killed.wait(120), other.wait(120)) == (-signal.SIGKILL, 0)
    assert 0 < len(shards(tmp_path / "killed")) < len(shards(paths.cache())) == 16
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "killed"))
    seen = []
    read = stored_images.read_image
    monkeypatch.setattr(stored_images, "read_image", lambda source, *more: seen.append(source) or read(source, *more))
    prepare(recipe(folder), "cpu", verify=True)
    assert everything(tmp_path / "killed") == alone
    assert len(seen) == 60 - 16 + 60  # all but two shards, then all to verify
    rows = {name: content for name, content in alone.items() if name.endswith(".safetensors")}
    assert shards(tmp_path / "pair") == rows
    lines = [path.read_text().count("\n") for path in sorted((tmp_path / "pair").rglob("shards.*.jsonl"))]
    assert lines == [4, 4, 4, 4]


def test_an_image_is_decoded_once_and_a_training_decodes_none(folder, tmp_path, large, monkeypatch):
    seen, read = [], stored_images.read_image
    monkeypatch.setattr(stored_images, "read_image", lambda source, *more: seen.append(source) or read(source, *more))
    prepare(recipe(folder, "data.precision=int8"), "cpu")
    assert len(seen) == len(set(seen)) == 60
    train(recipe(folder, "data.precision=int8"), tmp_path / "run", "cpu", 0)
    assert len(seen) == 60
    train(recipe(folder, method="ahpa", more="data.precision=int8 method.dim=4"), tmp_path / "ahpa", "cpu", 0)
    assert (
        len(seen) == 60 + 3 * 60
    )  # the first are tried, and levels fitted to them, then all are encoded; latents are there


def test_how_long_it_takes_is_told_before_it_begins(folder, large, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "TRIAL", 4)
    begun = []
    monkeypatch.setattr(preparing, "encode_all", lambda *given: begun.append(capsys.readouterr().out))
    with pytest.raises(FileNotFoundError):  # of the caches that nobody makes here
        prepare(recipe(folder), "cpu")
    assert "60 images" in begun[0] and "as the first 4 images take it" in begun[0]


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_training_alone_makes_the_same_from_memory_and_from_disk(folder, tmp_path, monkeypatch):
    """And a small set that was decoded once is not decoded again for a training on what is cached."""
    train(recipe(folder), tmp_path / "memory", "cpu", 0)
    monkeypatch.setattr(stored_images, "read_image", lambda *given: pytest.fail("decoded"))
    train(recipe(folder), tmp_path / "memory again", "cpu", 0)
    monkeypatch.undo()
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)
    train(recipe(folder), tmp_path / "disk", "cpu", 0)
    weights = [
        (tmp_path / name / "steps" / "000002" / "ema.safetensors").read_bytes()
        for name in ("memory", "memory again", "disk")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_a_broken_file_of_a_large_set(folder, tmp_path, large, capsys):
    """It is found while the others are encoded, named once, and left out of every training after."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = list_folder(str(copy), "train").source(11)
    broken.write_bytes(broken.read_bytes()[:99])
    first = make_batches(recipe(copy), "cpu")  # a training that was not prepared finds it, too
    assert len(first.dataset) == 59 and first.facts.data_digest == first.dataset.digest
    assert "left out 1 of 60 images that cannot be read" in capsys.readouterr().out
    assert "left out 1 of 60 images that cannot be read" in (prepare(recipe(copy), "cpu") and capsys.readouterr().out)
    again = make_batches(recipe(copy), "cpu")
    assert again.facts == first.facts == load_sources(recipe(copy)).facts
    images = again.dataset.images()
    autoencoder, teacher = (getattr(load_sources(recipe(copy)), name) for name in ("autoencoder", "teacher"))
    torch.testing.assert_close(again.latents[:][:, 0], autoencoder.moments(images)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.features[0][:][:, 1:].float(), teacher(images).tokens, atol=5e-3, rtol=5e-3)
    levels = make_batches(recipe(copy, method="ahpa", more="method.dim=4"), "cpu")
    assert len(levels.levels) == 59 and levels.levels[:].isfinite().all()


def test_a_file_of_a_large_set_that_cannot_be_opened_today_is_not_left_out_for_good(folder, tmp_path, large):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    closed = list_folder(str(copy), "train").source(12)
    read = stored_images.read_image

    def refusing(source, *more):
        return f"PermissionError: [Errno 13] denied: '{source}'" if source == closed else read(source, *more)

    words = "execution.workers=0"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="1 images cannot be read now.*Permission"):
        patch.setattr(stored_images, "read_image", refusing)
        prepare(recipe(copy, words), "cpu")
    assert len(prepare(recipe(copy, words), "cpu", verify=True)) == 60


def test_a_file_that_broke_after_it_was_prepared_is_named_in_one_sentence(folder, tmp_path, large):
    """Also when it is a worker that meets it."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    recipe = make_recipe("sit", "smoke", f"folder:{copy}", overrides="data.n=60 execution.workers=1")
    broken = list_folder(str(copy), "train").source(11)
    broken.write_bytes(bytes(broken.stat().st_size))
    with pytest.raises(
        ValueError, match=r"^1 images cannot be read: .*`maskalign-lab prepare` finds and leaves out all such$"
    ):
        train(recipe, tmp_path / "run", "cpu", 0)


def test_a_training_on_pixels_is_prepared_by_trying_every_file(folder, tmp_path, large, capsys):
    words = "data.n=60 execution.workers=1"
    assert (
        main(
            ["prepare", "sit", *words.split(), "--preset", "smoke", "--dataset", f"folder:{folder}", "--device", "cpu"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "60 images of folder:" in said and "reads pixels" in said and "Next: maskalign-lab train sit" in said


def test_precisions_have_caches_of_their_own_and_small_errors(folder):
    rows, folders = {}, {}
    for precision in ("exact", "half", "int8"):
        batches = make_batches(recipe(folder, f"data.precision={precision}"), "cpu")
        rows[precision] = batches.latents[:], batches.features[0][:]
        folders[precision] = batches.latents.folder, batches.features[0].folder
    assert [len(set(part)) for part in zip(*folders.values())] == [2, 3]
    assert [part.dtype for part in rows["exact"]] == [torch.float32, torch.float16]
    assert [part.dtype for part in rows["int8"]] == [torch.float16, torch.int8]
    for precision, worst in (("half", 1e-3), ("int8", 1e-3)):
        latents, features = rows[precision]
        torch.testing.assert_close(latents.float(), rows["exact"][0], atol=2e-3, rtol=2e-3)
        cosine = torch.cosine_similarity(unpacked(features), rows["exact"][1].float(), dim=-1)
        assert 1 - cosine.mean() < worst
    with pytest.raises(ValueError, match="data.precision 'exakt'.*Did you mean 'exact'"):
        recipe(folder, "data.precision=exakt")


def test_images_that_were_written_anew_with_as_many_bytes_are_found_on_request(folder, tmp_path, large):
    copy, draw = tmp_path / "copy", np.random.default_rng(1)
    for k in range(67):
        path = copy / "ab"[k % 2] / f"{k}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    prepare(recipe(copy), "cpu")
    path = list_folder(str(copy), "train").source(18)
    Image.new("RGB", (20, 20)).save(path)
    prepare(recipe(copy), "cpu")  # names and sizes are as before
    with pytest.raises(ValueError, match=r"images 16 to 24 of folder:.* are not those that .* was made from; remove"):
        prepare(recipe(copy), "cpu", verify=True)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_small_set_in_which_a_file_broke_later_is_mended_by_prepare(folder, tmp_path):
    """Its size is as before, so nobody knows until it is looked at."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    words = "data.n=60 training.steps=1"
    load_sources(make_recipe("sit", "smoke", f"folder:{copy}", overrides=words))
    listing = list_folder(str(copy), "train")
    listing.source(2).write_bytes(bytes(listing.sizes[2]))  # none of those whose content is hashed
    recipe = make_recipe("sit", "smoke", f"folder:{copy}", overrides=words)
    with pytest.raises(ValueError, match="1 images cannot be read.*`maskalign-lab prepare`"):
        make_batches(recipe)
    assert len(prepare(recipe, "cpu")) == len(make_batches(recipe).dataset) == 59


def test_what_does_not_fit_is_refused_before_it_begins(folder, monkeypatch):
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: type("", (), {"free": 10**5}))
    with pytest.raises(OSError, match="the caches need [0-9.]+ MB in .*MASKALIGN_LAB_CACHE.*data.precision"):
        prepare(recipe(folder), "cpu")
    assert not (paths.cache() / "latents").exists()


def test_batches_of_networks_are_cut_alike_alone_and_together(folder):
    """So what a network says does not depend on which caches are made beside its own."""
    sources = load_sources(recipe(folder))
    for each, shard_rows in encoding.shard_groups(found := encodings_of(recipe(folder), sources), sources.dataset):
        assert each == found and all(shard_rows % one.batch == 0 for one in found)
    odd = [replace(one, batch=batch, row_bytes=10**6) for one, batch in zip(found, (113, 256))]
    assert [len(group) for group, _ in encoding.shard_groups(odd, sources.dataset)] == [1, 1]
