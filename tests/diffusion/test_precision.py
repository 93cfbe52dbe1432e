"""The network of a sampler runs in one precision or another; its state, its noise and float64 networks do not feel it."""

import pytest
import torch
from torch import nn

from maskalign_lab.base import devices
from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.guidance import unpack
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample, sample
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.diffusion.solvers import SOLVERS, Solver

Y = torch.tensor([0, 1, 2])
NAMES = ("float32", "bfloat16", "auto")
SETTINGS = {"heun": {}, "euler-maruyama": {}, "dopri5": {}, "euler": {"guidance": 2.0, "guidance_high": 0.6}}


def network(class_dim=None, trained=True):
    """A small network, with weights everywhere if it is to look trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SiT(8, 2, 3, width=32, depth=2, heads=2, num_classes=3, class_dim=class_dim).eval()
        for parameter in net.parameters() if trained else ():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def drawn(net, solver="heun", precision="float32", **settings):
    return last_sample(net, Objective(), Y, SamplerConfig(solver, 6, precision=precision, **settings))


class Watcher(nn.Module):
    """Passes on what a network says, and notes whether autocast was on."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []
        for name in ("in_channels", "side", "patch_size", "num_classes", "class_dim"):
            setattr(self, name, getattr(net, name))

    def forward(self, *args, **kwargs):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return self.net(*args, **kwargs)


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("class_dim", [None, 12])
def test_states_are_float64_in_every_precision(precision, class_dim):
    for step in sample(network(class_dim), Objective(), Y, SamplerConfig("heun", 3, 2.0, precision=precision)):
        assert step.x.dtype == torch.float64 and (step.cls is None) is (class_dim is None)
        assert step.cls is None or step.cls.dtype == torch.float64


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_what_the_device_is_best_at(native, monkeypatch):
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: native)
    net = network()
    best, other = ("bfloat16", "float32") if native else ("float32", "bfloat16")
    assert torch.equal(drawn(net, precision="auto"), drawn(net, precision=best))
    assert not torch.equal(drawn(net, precision="auto"), drawn(net, precision=other))


@pytest.mark.parametrize(("solver", "settings"), SETTINGS.items())
def test_samples_in_bfloat16_are_near_those_in_float32(solver, settings):
    exact, rounded = (drawn(network(), solver, precision, **settings) for precision in ("float32", "bfloat16"))
    assert 0 < (exact - rounded).norm() < 0.02 * exact.norm()


def test_a_class_token_is_near_too():
    ends = []
    for precision in ("float32", "bfloat16"):
        *_, last = sample(network(12), Objective(), Y, SamplerConfig("heun", 6, precision=precision))
        ends.append(last.cls)
    assert 0 < (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


@pytest.mark.parametrize(("solver", "settings"), SETTINGS.items())
def test_a_float64_network_stays_one(solver, settings):
    samples = [drawn(network().double(), solver, precision, **settings) for precision in NAMES]
    assert all(torch.equal(samples[0], each) for each in samples)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dopri5"])
def test_noise_does_not_feel_the_precision(solver):
    """A fresh network says zero in every precision, so what is left is the start and what the solver draws."""
    samples = [drawn(network(trained=False), solver, precision) for precision in NAMES]
    assert all(torch.equal(samples[0], each) for each in samples) and samples[0].std() > 0.1


def test_only_the_network_is_under_autocast():
    net = Watcher(network())
    for _ in sample(net, Objective(), Y, SamplerConfig("euler", 3, precision="bfloat16")):
        assert not torch.is_autocast_enabled("cpu")  # whoever looks at a state computes as before
    assert net.seen == [True] * 3


def test_float32_is_meant_where_it_is_named():
    """Also by a caller who is under autocast."""
    plain = drawn(network())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(drawn(network()), plain)


def test_a_solver_of_ones_own_need_not_know(monkeypatch):
    def double_step(field, x, t, t_next, draw):
        middle = (t + t_next) / 2
        x = x + (middle - t) * field(x, t)
        return x + (t_next - middle) * field(x, middle)

    monkeypatch.setitem(SOLVERS, "double", Solver(double_step))
    ours, plain = (
        last_sample(network(), Objective(), Y, SamplerConfig(name, steps, precision="bfloat16"))
        for name, steps in (("double", 4), ("euler", 8))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        SamplerConfig(precision="bfloat")


def test_the_start_is_the_seeds():
    net, start = network(), torch.randn(3, 3, 8, 8, generator=generator(0, 0, "start", torch.device("cpu")))
    for precision in NAMES:
        first = next(iter(sample(net, Objective(), Y, SamplerConfig(precision=precision))))
        assert torch.equal(unpack(net, first.x)[0].float(), start)
