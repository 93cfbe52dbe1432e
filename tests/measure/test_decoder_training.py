"""A decoder for a teacher's tokens: what is refused, what survives an interruption, and what is told of it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from maskalign_lab import cli
from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.encoders.autoencoders import load_autoencoder
from maskalign_lab.measure import decoder_training, rae_card
from maskalign_lab.measure.decoder_training import DecoderConfig, decoder_steps, teach_decoder
from maskalign_lab.measure.judge_training import JudgeConfig
from maskalign_lab.studies import shipped_runs

CONFIG = DecoderConfig(
    steps=4, batch_size=4, width=16, depth=1, heads=2, n=24, save_every=1, learns=0.25, heard=0.5, precision="float32"
)
PERCEPTION = JudgeConfig(steps=1, batch_size=8, channels=(8, 8, 8, 8), n=16, stream=1003, seed=1, precision="float32")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The card asks about few images."""
    monkeypatch.setattr(decoder_training, "examine", partial(rae_card.examine, n=24))


def teach(out, config=CONFIG, spec="shapes", **more):
    return teach_decoder(spec, out, config, "cpu", 0, "the command", PERCEPTION, **more)


def test_what_was_taught_is_an_autoencoder_with_a_card(tmp_path):
    out = teach(tmp_path / "mine")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "decoder.safetensors", "statistics.safetensors", "card.json", "card.md"
    }  # fmt: skip
    rae, card = load_autoencoder(f"rae:{out}"), json.loads((out / "card.json").read_text())
    assert rae.digest == card["weights"] and card["latents"] == [128, 4, 4] and card["pictures"] == 24
    assert rae.decode(rae.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)
    text = (out / "card.md").read_text()
    assert "Made again by `the command`." in text and max(map(len, text.splitlines())) <= 140
    for name in ("this one", "tiny VAE", "real pictures", "0.8"):
        assert f"| {name} |" in text
    assert card["fidelity"]["vae"]["PSNR"] > card["fidelity"]["rae"]["PSNR"]


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("shapes", {"teacher": "tiny-5x5"}, "'tiny-5x5'.*'tiny-4x4'"),
        ("shapes", {"eyes": "tinny"}, "'tinny'.*'tiny'"),
        ("shapes", {"eyes": "tiny-4x4"}, "eyes='tiny-4x4' is the encoder itself.*such as tiny,"),
        ("shapes", {"blocks": (6,)}, "has blocks 1 to 5; the discriminator asks for 6"),
        ("shapes", {"law": "gaussian"}, "law of noise 'gaussian'"),
        ("shapes", {"tau": -1.0}, "tau=-1.0"),
        ("shapes", {"heard": 0.1}, "heard_from=0: .* learns from step 1"),
        ("shapes", {"steps": 0}, "steps=0 must be at least 1"),
        ("shapes", {"heads": 3}, "must be divisible by"),
        ("photos", {}, "no judge for 'photos'.*maskalign-lab judge photos"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, monkeypatch, spec, changes, message):
    monkeypatch.setattr(decoder_training, "train_decoder", lambda *_: pytest.fail("it was trained first"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        teach(tmp_path / "out", replace(CONFIG, **changes), spec)
    assert not (tmp_path / "out").exists()


def test_what_was_there_before_is_not_overwritten(tmp_path):
    for part in ("decoder.safetensors", "card.md"):
        (tmp_path / part).write_text("mine")
    with pytest.raises(FileExistsError, match="holds a representation autoencoder already; choose another folder"):
        teach(tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_an_interrupted_training_goes_on_and_another_does_not(tmp_path, monkeypatch):
    whole = teach(tmp_path / "whole")

    def interrupted(*given):
        for step in decoder_steps(*given):
            yield step
            if step.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(decoder_training, "decoder_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        teach(tmp_path / "parts")
    monkeypatch.setattr(decoder_training, "decoder_steps", decoder_steps)
    assert steps_of(tmp_path / "parts" / "training")[-1] == 2
    with pytest.raises(FileExistsError, match="was trained with config .*'steps': 4.*, which is now .*'steps': 5"):
        teach(tmp_path / "parts", replace(CONFIG, steps=5))
    parts = teach(tmp_path / "parts")
    assert (parts / "decoder.safetensors").read_bytes() == (whole / "decoder.safetensors").read_bytes()


def test_a_measuring_that_fails_does_not_lose_the_training(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    measuring = decoder_training.examine
    monkeypatch.setattr(decoder_training, "examine", broken)
    with pytest.raises(OSError, match="no space left"):
        teach(tmp_path / "out", work=tmp_path / "work")
    monkeypatch.setattr(decoder_training, "examine", measuring)
    monkeypatch.setattr(decoder_training, "judge_steps", lambda *_: pytest.fail("it was trained again"))
    out = teach(tmp_path / "out", work=tmp_path / "work")
    assert (out / "card.md").exists() and steps_of(tmp_path / "work")[-1] == 4


def test_without_perception_and_discriminator_neither_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_training, "judge_steps", lambda *_: pytest.fail("no classifier was asked for"))
    out = teach(tmp_path / "out", replace(CONFIG, perceptual=0.0, adversarial=0.0, tau=0.0))
    text = (out / "card.md").read_text()
    assert "adversarial" not in text and "No noise was put on the tokens." in text


def test_both_commands_know_it(tmp_path, monkeypatch, capsys):
    asked = []

    def taught(spec, out, config, device, **told):
        asked.append((spec, out.name, config, device, told["command"]))
        return out

    monkeypatch.setattr(decoder_training, "teach_decoder", taught)
    monkeypatch.setattr(shipped_runs, "teach_decoder", taught)
    assert cli.main(["make", "rae-clean", "--device", "cpu"]) == 0
    words = ["teach-decoder", "shapes", "--tau", "0.5", "--out", str(tmp_path / "mine")]
    assert cli.main([*words, "--steps", "7", "--device", "cpu"]) == 0
    assert asked == [
        ("shapes", "rae-clean", DecoderConfig(tau=0.0), "cpu", "maskalign-lab make rae-clean"),
        (
            "shapes",
            "mine",
            DecoderConfig(tau=0.5, steps=7),
            "cpu",
            "maskalign-lab teach-decoder shapes --steps 7 --tau 0.5",
        ),
    ]
    assert f"data.autoencoder=rae:{tmp_path / 'mine'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_runs.DECODERS)
def test_what_ships_is_what_its_card_tells(name):
    folder = paths.data() / name
    rae, card = load_autoencoder(name), json.loads((folder / "card.json").read_text())
    assert rae.digest == card["weights"] and rae_card.card_text(card) == (folder / "card.md").read_text()
    assert card["command"] == f"maskalign-lab make {name}" and (card["config"]["tau"] == 0) == (name == "rae-clean")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
