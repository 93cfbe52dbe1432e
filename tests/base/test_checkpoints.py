"""Files and checkpoints are whole or absent, whatever fails while they are written."""

import errno
import os

import pytest
import torch
from torch import nn

from maskalign_lab.base import checkpoints, files
from maskalign_lab.base.checkpoints import load_tensors, resume, save_step, step_folder, steps_of, store
from maskalign_lab.base.files import write_atomic


def failing_at(call, function, counted):
    """The function, whose call of that number meets a full disk."""

    def wrapped(*args, **kwargs):
        counted.append(function)
        if len(counted) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("content", ["text, with \u03b5", b"\x00bytes"])
def test_a_name_stands_for_the_old_content_until_it_stands_for_the_new(tmp_path, monkeypatch, content):
    path = tmp_path / "file"
    write_atomic(path, "old")
    for call in (1, 2):  # fsync, then replace
        counted = []
        monkeypatch.setattr(files.os, "fsync", failing_at(call, os.fsync, counted))
        monkeypatch.setattr(files.os, "replace", failing_at(call, os.replace, counted))
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, content)
        monkeypatch.undo()
        assert path.read_text() == "old"
    write_atomic(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [each.name for each in tmp_path.iterdir()] == ["file"]  # what a failure left behind is used again


def saved(run, step, value=1.0):
    return save_step(run, step, {"model": {"w": torch.full((2,), value)}}, {"loss": 0.5})


def test_a_step_that_fails_at_any_call_leaves_the_last_one(tmp_path, monkeypatch):
    saved(tmp_path, 3)
    counted = []
    monkeypatch.setattr(checkpoints.os, "fsync", failing_at(0, os.fsync, counted))
    monkeypatch.setattr(checkpoints.os, "replace", failing_at(0, os.replace, counted))
    saved(tmp_path, 4)
    calls = len(counted)
    assert calls >= 8  # two files, the folder, and `latest`
    for call in range(1, calls + 1):
        counted = []
        monkeypatch.undo()
        monkeypatch.setattr(checkpoints.os, "fsync", failing_at(call, os.fsync, counted))
        monkeypatch.setattr(checkpoints.os, "replace", failing_at(call, os.replace, counted))
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path, 4 + call, 2.0)
        reached = steps_of(tmp_path)[-1]
        assert load_tensors(step_folder(tmp_path), "model")["w"].tolist() == ([1, 1] if reached == 4 else [2, 2])
        if reached > 4:  # the step is whole, and only its announcement failed
            checkpoints.shutil.rmtree(step_folder(tmp_path, reached))


def test_a_step_is_listed_once_it_is_whole(tmp_path):
    assert steps_of(tmp_path) == []
    saved(tmp_path, 12), saved(tmp_path, 3)
    (tmp_path / "steps" / "000020").mkdir()  # without its state
    assert steps_of(tmp_path) == [3, 12] and step_folder(tmp_path).name == "000012"
    with pytest.raises(FileNotFoundError, match=r"no step 4; it has \[3, 12\]"):
        step_folder(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        step_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_come_back_in_single_precision_and_counts_as_counts(tmp_path, dtype):
    given = {"w": torch.tensor([1.5, -2.0], dtype=dtype), "step": torch.tensor(2**40)}
    found = load_tensors(save_step(tmp_path, 1, {"model": given}, {}), "model")
    assert found["w"].dtype == torch.float32 and found["w"].tolist() == [1.5, -2] and found["step"].item() == 2**40


def trained(steps, seed=0):
    """Two averaged networks, a method's layer, and their optimiser after some steps."""
    torch.manual_seed(seed)
    model, method = nn.Linear(3, 2), nn.Linear(2, 2)
    averages = {"ema": nn.Linear(3, 2), "ema2": nn.Linear(3, 2)}
    optimizer = torch.optim.AdamW([*model.parameters(), *method.parameters()])
    for _ in range(steps):
        advance(model, method, optimizer)
    return model, averages, method, optimizer


def advance(model, method, optimizer):
    optimizer.zero_grad()
    method(model(torch.ones(1, 3))).square().sum().backward()
    optimizer.step()


def test_a_training_goes_on_from_its_latest_step(tmp_path):
    model, averages, method, optimizer = trained(3)
    store(tmp_path, 3, model, averages, method, optimizer)
    other, others, heads, again = trained(0, seed=1)
    assert resume(tmp_path / "nothing", other, others, heads, again) == 0
    assert resume(tmp_path, other, others, heads, again) == 3
    advance(model, method, optimizer), advance(other, heads, again)
    for one, two in ((model, other), (method, heads), *((averages[name], others[name]) for name in averages)):
        assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())
