"""Published weights without a network: what is said, and where else they may lie."""

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from maskalign_lab.base.paths import absolute
from maskalign_lab.cli import main
from maskalign_lab.data import shapes
from maskalign_lab.encoders.autoencoders import load_autoencoder
from maskalign_lab.encoders.teachers import load_teacher

MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub's client that asks no network, and has nothing kept."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a network's weights, its head among them, and the network."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = timm.create_model(MODEL)
    save_file(vit.state_dict(), (folder := tmp_path_factory.mktemp("weights")) / "model.safetensors")
    return folder / "model.safetensors", vit


@pytest.mark.parametrize(
    ("load", "named", "otherwise"),
    [
        (lambda: load_teacher(f"timm:{MODEL}", 64, grid=4), f"data.teacher=timm:{MODEL}@PATH", "?random"),
        (lambda: load_autoencoder("stabilityai/sd-vae-ft-mse"), "data.autoencoder=FOLDER", "'tiny' ships"),
    ],
)
def test_missing_weights_are_told_in_one_sentence(load, named, otherwise, offline):
    with pytest.raises(OSError) as error:
        load()
    told = str(error.value)
    assert "\n" not in told and ". " not in told.replace("huggingface.co", "").partition("; without")[2]
    for way in (named, "HF_HOME", "HF_HUB_OFFLINE=1", "HF_ENDPOINT", otherwise):
        assert way in told


def test_they_are_told_before_any_work(offline, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes, "render", lambda *_: pytest.fail("images were made before the weights were looked for"))
    words = f"train repa --preset smoke data.n=17 data.teacher=timm:{MODEL} --out {tmp_path / 'run'}"
    assert main(words.split()) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "HF_HOME" in told.err and not told.out
    assert not (tmp_path / "run" / "recipe.json").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["file", "folder"])
def test_a_teachers_weights_from_a_file(weights, whole, offline):
    file, vit = weights
    name = f"timm:{MODEL}@{file if whole else file.parent}"
    teacher = load_teacher(name, 64, grid=4)
    assert torch.equal(teacher.vit.blocks[3].attn.qkv.weight, vit.blocks[3].attn.qkv.weight)
    assert teacher.name == name and teacher.digest != load_teacher(f"timm:{MODEL}?random", 64, grid=4).digest
    assert teacher(torch.zeros(1, 3, 64, 64)).tokens.shape == (1, 16, 192)


def test_what_is_no_file_of_weights(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*none.pth; expected a file of weights"):
        load_teacher(f"timm:{MODEL}@{tmp_path / 'none.pth'}", 64)
    with pytest.raises(FileNotFoundError, match="no .*model.safetensors and no .*pytorch_model.bin"):
        load_teacher(f"timm:{MODEL}@{tmp_path}", 64)
    with pytest.raises(ValueError, match="holds no weights of timm model 'vit_small_patch16_224'"):
        load_teacher(f"timm:vit_small_patch16_224@{weights[0]}", 64)


def test_the_file_is_remembered_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("tiny,timm:vit@mine.pth") == f"tiny,timm:vit@{tmp_path / 'mine.pth'}"
