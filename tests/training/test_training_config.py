"""Training settings: what cannot be meant is refused at once; compiled blocks train the same and leave no trace."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.survive import batches, tiny
from torch import nn

from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.diffusion.jit import JiT
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.training.compiling import compile_blocks
from maskalign_lab.training.config import RANGES, TrainingConfig
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import AVERAGES, fit
from maskalign_lab.training.methods import MethodConfig, PlainSiT
from maskalign_lab.training.stopping import NonFinite

# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cooldown", -0.1, "in [0, 1]"),
        ("cooldown", 1.1, "in [0, 1]"),
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("ema", 1.0, "in [0, 1)"),
        ("ema", -0.5, "in [0, 1)"),
        ("label_dropout", 1.5, "in [0, 1]"),
        ("clip", 0.0, "above 0"),
        ("lr", -1e-3, "at least 0"),
        ("warmup", -1, "at least 0"),
        *((name, math.nan, "") for name in RANGES),
    ],
)
def test_what_cannot_be_meant_is_refused_with_field_value_and_range(name, value, expected):
    with pytest.raises(ValueError) as error:
        TrainingConfig(**{name: value})
    assert str(error.value).startswith(f"{name}={value} must be {expected}")


def test_a_mistyped_precision_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        TrainingConfig(precision="bfloat")


def test_a_recipe_refuses_them_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"ema=1.0 must be in \[0, 1\)"):
        make_recipe("sit", "smoke", overrides="training.ema=1")


@given(cooldown=st.floats(0, 1), ema=st.floats(0, 1, exclude_max=True), dropout=st.floats(0, 1), steps=st.integers(1))
def test_the_ends_of_the_ranges_are_allowed(cooldown, ema, dropout, steps):
    config = TrainingConfig(steps=steps, cooldown=cooldown, ema=ema, label_dropout=dropout, warmup=0)
    assert config.steps == steps


def test_ranges_name_fields_that_exist():
    assert set(RANGES) <= {field.name for field in fields(TrainingConfig)}


# ---- compiled blocks


def losses(folder=None, steps=6, compile="off", **changes):
    """Losses of a small training, and its network and average."""
    given, how = dict(steps=steps, save_every=3, warmup=2, precision="float32") | changes, ExecutionConfig(compile)
    found = []
    for step in fit(*tiny(), batches, TrainingConfig(**given), folder, "cpu", how):
        found.append(step.losses["denoising"].item())
    return found, step.state


def test_traced_blocks_train_the_same_and_the_average_stays_eager(traced):
    eager, plain = losses()
    assert not traced
    compiled, state = losses(compile="blocks")
    assert traced and compiled == pytest.approx(eager, rel=1e-5)
    assert state.model.state_dict().keys() == plain.model.state_dict().keys() == state.ema.state_dict().keys()
    assert all(block._compiled_call_impl is not None for block in state.model.blocks)
    assert all(block._compiled_call_impl is None for block in state.ema.blocks)


@pytest.mark.parametrize("ways", [("off", "blocks"), ("blocks", "off")])
def test_a_checkpoint_goes_on_either_way(traced, tmp_path, ways):
    whole, _ = losses()
    losses(tmp_path, steps=3, compile=ways[0])
    rest, _ = losses(tmp_path, compile=ways[1])
    assert rest == pytest.approx(whole[3:], rel=1e-5)
    assert set(load_tensors(step_folder(tmp_path), "model")) == set(tiny()[0].state_dict())


def test_the_culprit_is_found_inside_a_compiled_block(traced):
    net, method = tiny()
    steps = fit(
        net, method, batches, TrainingConfig(steps=3, precision="float32"), None, "cpu", ExecutionConfig("blocks")
    )
    next(steps)
    with torch.no_grad():
        net.blocks[1].mlp.fc1.weight.fill_(3e38)
    with pytest.raises(NonFinite, match=r"model\.blocks\.1\.mlp\.fc1 \(forward\)"):
        list(steps)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="needs a network with `blocks`, which Linear has not"):
        compile_blocks(nn.Linear(2, 2), torch.device("cpu"))


def test_a_machine_without_a_compiler_is_told_before_training(tmp_path):
    code = (
        "import torch; from torch import nn; from maskalign_lab.training.compiling import check_compiler\n"
        "try: check_compiler(torch.device('cpu'))\nexcept ValueError as error: print(error)"
    )
    nowhere = {name: value for name, value in os.environ.items() if name not in ("CXX", "TORCH_INDUCTOR_INSTALL_GXX")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=nowhere | {"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "needs a C++ compiler, and none was found" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["blocks", "whole"])
def test_compiled_code_trains_the_same(way):
    eager, _ = losses()
    compiled, _ = losses(compile=way)
    assert compiled == pytest.approx(eager, rel=1e-4)


# ---- two averages, and dropout


def test_two_averages_are_kept_resumed_and_loaded(tmp_path):
    """Each follows its own decay, a resumed run has the same, and a run with one has no second."""
    small = "network.width=16 network.depth=2 data.n=64 training.batch_size=8 training.steps=4 training.save_every=2"
    recipe = make_recipe("sit", "smoke", overrides=f"{small} training.ema=0.9 training.second_ema=0.1")
    whole = train(recipe, tmp_path / "whole", "cpu", 0)
    train(recipe, tmp_path / "broken", "cpu", 0)
    shutil.rmtree(tmp_path / "broken" / "steps" / "000004")
    train(recipe, tmp_path / "broken", "cpu", 0)
    for name in AVERAGES:
        a, b = (load_tensors(step_folder(tmp_path / run), name) for run in ("whole", "broken"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    slow, fast = (load_run(whole, average=name).net.blocks[0].mlp.fc1.weight for name in AVERAGES)
    now = load_tensors(step_folder(whole), "model")["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(slow, fast) and (fast - now).abs().max() < (slow - now).abs().max()
    with pytest.raises(ValueError, match="unknown average of repa-shapes 'second_ema'"):
        load_run("repa-shapes", average="second_ema")


def test_dropout_is_a_function_of_the_step(tmp_path):
    """Stopping changes nothing, the global generator is left alone, and dropout does act."""

    def trained(folder, steps, dropout=0.5):
        torch.manual_seed(0)
        net = JiT(8, 4, 3, width=16, depth=4, heads=2, num_classes=10, bottleneck=0, context_tokens=0, dropout=dropout)
        method = PlainSiT(net, Objective(), MethodConfig())
        config = TrainingConfig(steps, save_every=2, warmup=0, precision="float32")
        before = torch.get_rng_state()
        for step in fit(net, method, batches, config, folder, "cpu"):
            pass
        assert torch.equal(torch.get_rng_state(), before)
        return step.state.model.state_dict()

    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "parts", 2)
    parts = trained(tmp_path / "parts", 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    without = trained(tmp_path / "without", 6, dropout=0.0)
    assert not torch.equal(whole["blocks.1.mlp.w12.weight"], without["blocks.1.mlp.w12.weight"])
