"""A teacher or a judge that was trained is not lost, nor is one that was there before."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from maskalign_lab.encoders import teacher_training
from maskalign_lab.encoders.teachers import load_teacher
from maskalign_lab.measure import judge_training
from maskalign_lab.measure.judge import load_judge

TEACHER = teacher_training.TeachConfig(steps=1, batch_size=8, width=32, depth=1, heads=2, n=16, precision="float32")
JUDGE = judge_training.JudgeConfig(steps=1, batch_size=8, channels=(8, 8, 8, 8), n=16, precision="float32")
KINDS = {
    "teacher": (teacher_training, teacher_training.teach, TEACHER, "probe_card"),
    "judge": (judge_training, judge_training.train_judge, JUDGE, "examine"),
}


def images(root, counts):
    """A folder of small images: split/class -> how many."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (10 * number, 60, 90)).save(root / name / f"{number}.png")
    return f"folder:{root}"


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Module, function, settings, and the name of what measures; the training itself is one step."""
    return KINDS[request.param]


@pytest.fixture
def untrained(kind, monkeypatch):
    """A training would be too late to refuse."""
    monkeypatch.setattr(kind[0], "complete", lambda *_: pytest.fail("it was trained first"))


@pytest.mark.parametrize("held_out, message", [({"valid/a": 1}, "expected two classes")])
def test_held_out_images_of_one_class_are_refused_before_the_training(tmp_path, kind, untrained, held_out, message):
    spec = images(tmp_path / "images", {"train/a": 4, "train/b": 4} | held_out)
    with pytest.raises(ValueError, match=message):
        kind[1](spec, tmp_path / "out", kind[2], "cpu", 0)
    assert not (tmp_path / "out").exists()


def test_too_few_held_out_images_for_a_judge_are_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_training, "complete", lambda *_: pytest.fail("it was trained first"))
    spec = images(tmp_path / "images", {"train/a": 4, "train/b": 4, "valid/a": 4, "valid/b": 3})
    with pytest.raises(ValueError, match="two halves of the held-out images, 3 and 3; expected at least 4 in each"):
        judge_training.train_judge(spec, tmp_path / "out", JUDGE, "cpu", 0)


def test_enough_held_out_images_are_measured(tmp_path):
    spec = images(tmp_path / "images", {"train/a": 8, "train/b": 8, "valid/a": 4, "valid/b": 4})
    out = judge_training.train_judge(spec, tmp_path / "out", JUDGE, "cpu", 0)
    assert json.loads((out / "card.json").read_text())["floors"]["4"]["pictures"] == 4


def test_what_was_there_before_is_not_overwritten(tmp_path, kind, untrained):
    name = "teacher" if kind[0] is teacher_training else "judge"
    for part in (f"{name}.safetensors", "card.json"):
        (tmp_path / part).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds a {name} already; choose another folder"):
        kind[1]("digits", tmp_path, kind[2], "cpu", 0)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_a_device_that_is_not_there_is_refused_first(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(kind[0], "load_dataset", lambda *_, **__: pytest.fail("images were loaded"))
    with pytest.raises(ValueError, match="no device 'gpu'"):
        kind[1]("shapes", tmp_path / "out", kind[2], "gpu", 0)


def test_a_measuring_that_fails_does_not_lose_the_training(tmp_path, kind, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    module, train, config, measuring = kind
    monkeypatch.setattr(module, measuring, broken)
    with pytest.raises(OSError, match="no space left"):
        train("digits", tmp_path, replace(config, seed=1), "cpu", 0)
    if module is teacher_training:
        assert load_teacher(f"tiny:{tmp_path}", grid=8).dim == 32
    else:
        assert len(load_judge("digits", folder=tmp_path).classes) == 10
