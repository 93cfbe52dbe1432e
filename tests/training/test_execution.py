"""A training may be compiled, or worked in parts: it stays the same training."""

import pytest
import torch
from shared import survive
from shared.given import CASES, given, in_single, small
from torch import nn

from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.training import compiling
from maskalign_lab.training.compiling import SHORT, WHOLE, Compiled, way_to_compile
from maskalign_lab.training.config import TrainingConfig
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import Trainee, fit, make_trainer, pieces, work
from maskalign_lab.training.methods import Losses, Method, MethodConfig, PlainSiT, trait
from maskalign_lab.training.prefetch import WholeBatches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BILEVEL = ("ahpa", "method.router=bilevel")
WHOLES = [
    *(case for case in CASES if case != BILEVEL),
    ("maskalign", "method.inner.name=haste method.inner.student_blocks=1,2"),
]


class Bare(Method, name=None):
    """A method that asks for nothing."""

    def __init__(self):
        nn.Module.__init__(self)


def is_static(graphs) -> bool:
    """Whether no graph has a size that may change."""
    return all(isinstance(each, torch.Tensor) and {*map(type, each.shape)} <= {int} for each in sum(graphs, []))


def losses_and_slopes(trainee, compiled, batch, draw, step=0):
    trainee.zero_grad(set_to_none=True)
    losses = compiled(lambda: trainee(trainee.model, compiled.step(step), batch, draw))
    losses.total.backward()
    return losses, {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}


# ---- the whole loss


@pytest.mark.parametrize(("name", "more"), WHOLES)
def test_every_loss_is_one_static_graph_and_the_same_number(traced, name, more):
    net, method, batch, draw = given(small(name, more))
    trainee = Trainee(net, method)
    found = []
    for way in ("off", "whole"):
        compiled = Compiled(trainee, ExecutionConfig(way), CPU, 1, 6)
        found.append(losses_and_slopes(trainee, compiled, batch, draw))
        for step in (1, 2):  # no graph of its own for each step
            losses_and_slopes(trainee, compiled, batch, draw, step)
    (eager, expected), (whole, slopes) = found
    assert len(traced) == 1 and is_static(traced)
    assert whole.parts.keys() == eager.parts.keys() and slopes.keys() == expected.keys()
    for part, value in eager.parts.items():
        torch.testing.assert_close(whole.parts[part], value, rtol=1e-9, atol=1e-12)
    for name, slope in expected.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-6, atol=1e-9)


def test_haste_is_two_graphs_before_and_after_its_stop(traced):
    net, method, batch, draw = given(small("haste", "method.stop=3"))
    trainee = Trainee(net, method)
    compiled = Compiled(trainee, ExecutionConfig("whole"), CPU, 1, 6)
    parts = [set(losses_and_slopes(trainee, compiled, batch, draw, step)[0].parts) for step in range(6)]
    assert parts == 3 * [{"denoising", "alignment", "attention"}] + 3 * [{"denoising"}] and len(traced) == 2


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_arms_of_one_process_get_static_shapes_each(traced, way):
    """The second number of tokens that a function sees would have a symbolic size, and the graph would be slower."""
    for name in ("repa", "maskalign", "repa"):
        net, method, batch, draw = given(small(name), images=4 if name == "repa" else 6)
        trainee, before = Trainee(net, method), len(traced)
        losses_and_slopes(trainee, Compiled(trainee, ExecutionConfig(way), CPU, 1, 6), batch, draw)
        assert len(traced) == before + (2 if (name, way) == ("maskalign", "blocks") else 1)  # mixer: all tokens
    assert is_static(traced)


def test_a_whole_training_is_the_eager_one(traced):
    config, ends = TrainingConfig(steps=4, batch_size=8, warmup=0, precision="float32"), []
    for way in ("off", "whole"):
        *_, last = fit(*survive.tiny(), survive.batches, config, None, "cpu", ExecutionConfig(way))
        ends.append(last.state.model.state_dict())
    assert len(traced) == 1 and ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


# ---- what cannot be compiled


def test_a_bilevel_router_says_so(capsys):
    net, method, *_ = given(small(*BILEVEL))
    with pytest.raises(ValueError, match="compile=whole, and router=bilevel takes gradients within the loss"):
        Compiled(Trainee(net, method), ExecutionConfig("whole"), CPU, 1, 6)
    assert way_to_compile(Trainee(net, method), "auto", GPU, 1, SHORT) == "off"
    assert "not compiled, because router=bilevel takes gradients" in capsys.readouterr().out


class Stepped(PlainSiT, name="stepped"):
    """Depends on the step, and does not say so."""

    def loss(self, state, batch, draw, phase="main"):
        found = super().loss(state, batch, draw, phase)
        return Losses(found.total * (2 if state.step == 1 else 1), found.parts)


class Shy(PlainSiT, name="shy"):
    """Goes by a number, which no graph can."""

    def loss(self, state, batch, draw, phase="main"):
        found = super().loss(state, batch, draw, phase)
        return found if found.total < 1e9 else Losses(0 * found.total, found.parts)


def run_of(kind, way):
    net, _ = survive.tiny()
    config = TrainingConfig(steps=3, batch_size=8, warmup=0, precision="float32")
    *_, last = fit(net, kind(net, Objective(), MethodConfig()), survive.batches, config, None, "cpu", way)
    return last.state.model.state_dict()


@pytest.mark.parametrize("kind", [Stepped, Shy])
def test_what_fails_is_an_error_if_it_was_asked_for(traced, kind):
    with pytest.raises(ValueError, match="execution.compile=whole: .*; take execution.compile=off"):
        run_of(kind, ExecutionConfig("whole"))


@pytest.mark.parametrize("kind", [Stepped, Shy])
def test_what_fails_goes_on_eagerly_and_says_so_if_nobody_asked(traced, kind, monkeypatch, capsys):
    expected = run_of(kind, ExecutionConfig("off"))
    monkeypatch.setattr(compiling, "way_to_compile", lambda *_: "whole")
    found = run_of(kind, ExecutionConfig("auto"))
    assert capsys.readouterr().out.count("steps are not compiled, because compiling failed: ") == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_shape_too_many_is_an_error_and_not_an_eager_step(traced, monkeypatch):
    monkeypatch.setattr(compiling, "SHAPES", 2)
    net, method = survive.tiny()
    compiled = Compiled(Trainee(net, method), ExecutionConfig("blocks"), CPU, 1, 6)
    with pytest.raises(ValueError, match="execution.compile=blocks: "):
        for images in range(2, 6):
            compiled(lambda n=images: net(torch.randn(n, 3, 8, 8), torch.rand(n), torch.zeros(n, dtype=torch.long)))


@pytest.mark.parametrize(
    ("size", "device", "processes", "way"),
    [(WHOLE, GPU, 1, "whole"), (WHOLE + 1, GPU, 1, "blocks"), (1, GPU, 2, "blocks"), (1, CPU, 1, "off")],
)
def test_auto_goes_by_device_size_processes_and_steps(size, device, processes, way):
    with torch.device("meta"):
        net = nn.Linear(size, 1, bias=False)
    trainee = Trainee(net, Bare())
    assert way_to_compile(trainee, "auto", device, processes, SHORT) == way
    assert way_to_compile(trainee, "auto", device, processes, SHORT - 1) == "off"


# ---- parts of a batch


@pytest.mark.parametrize(("name", "more"), [*WHOLES])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name, more):
    net, method, batch, _ = given(small(name, more), images=8)
    net, method, batch = net.float(), method.float(), in_single(batch)
    config, found = TrainingConfig(batch_size=8, precision="float32"), []
    for accumulate in (1, 2, 4):
        trainer = make_trainer(Trainee(net, method), config, ExecutionConfig(accumulate=accumulate), "cpu")
        trainer.feed = WholeBatches(lambda _, batch=batch: batch, CPU)
        assert [len(part.y) for _, part, _ in pieces(trainer, 0)] == [8 // accumulate] * accumulate
        losses = work(trainer, 0, pieces(trainer, 0))
        slopes = {key: p.grad for key, p in trainer.trainee.named_parameters() if p.grad is not None}
        found.append((losses, slopes))
        trainer.trainee.zero_grad(set_to_none=True)
    (whole, expected), *others = found
    for losses, slopes in others:
        assert losses.keys() == whole.keys() and slopes.keys() == expected.keys()
        for part in whole.keys() - {"spread", "rank"}:  # which are told of the images of each part, and are in no loss
            torch.testing.assert_close(losses[part], whole[part], rtol=1e-5, atol=1e-6)
        for key, slope in expected.items():
            torch.testing.assert_close(slopes[key], slope, rtol=1e-4, atol=1e-5 * slope.abs().max().item())


def test_parts_leave_the_training_what_it_is():
    config, ends = TrainingConfig(steps=5, batch_size=8, warmup=0, precision="float32"), []
    for accumulate in (1, 4):
        how = ExecutionConfig(accumulate=accumulate)
        *_, last = fit(*survive.tiny(), survive.batches, config, None, "cpu", how)
        ends.append(last.state.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-5)


def test_parts_that_are_not_equal_are_refused_before_any_work():
    with pytest.raises(ValueError, match="training.batch_size=8 cannot be cut into 3 equal parts"):
        next(fit(*survive.tiny(), None, TrainingConfig(batch_size=8), None, "cpu", ExecutionConfig(accumulate=3)))


def test_a_loss_that_is_no_mean_over_samples_is_refused_in_parts():
    net, method, *_ = given(small(*BILEVEL))
    with pytest.raises(ValueError, match="execution.accumulate=2, and router=bilevel compares the halves of a batch"):
        next(fit(net, method, None, TrainingConfig(batch_size=8), None, "cpu", ExecutionConfig(accumulate=2)))


# ---- several processes


@pytest.mark.parametrize(("name", "more"), CASES)
def test_who_leaves_a_parameter_idle_says_so(name, more):
    """For others nobody looks for parameters without a gradient, and processes would wait for it."""
    net, method, batch, draw = given(small(name, more))
    trainee = Trainee(net, method)
    steps = (0, 1, 10_000) if trait(method, "idle") else (0,)
    idle = set()
    for step in steps:
        _, slopes = losses_and_slopes(trainee, Compiled(trainee, ExecutionConfig("off"), CPU, 1, 6), batch, draw, step)
        idle |= {name for name, p in trainee.named_parameters() if p.requires_grad} - slopes.keys()
    assert bool(idle) == bool(trait(method, "idle"))
