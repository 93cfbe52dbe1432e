"""Samplers against a velocity field whose solution is known."""

import math

import pytest
import torch
from torch import nn

from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample, sample
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.diffusion.solvers import even_times


class Growth(nn.Module):
    """v(x, t) = c x with c = 1 for real labels and 0 for the null class, so x(0) = x(1) exp(-c)."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 2, 2, 3, None

    def __init__(self):
        super().__init__()
        self.calls, self.weight = 0, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, y):
        self.calls += 1
        return Output(x * (y != 3).view(-1, 1, 1, 1), None, {})


Y = torch.tensor([0, 1])
START = torch.ones(2, 1, 4, 4)


def error(solver: str, steps: int, **kwargs) -> float:
    x = last_sample(Growth(), Objective(), Y, SamplerConfig(solver, steps, **kwargs), start=START)
    return abs(x.mean().item() - math.exp(-1))


def test_orders_of_convergence():
    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    # the last of Heun's steps is an Euler step, whose error also shrinks with the square of the step
    assert 3.0 < error("heun", 20) / error("heun", 40) < 4.6


def test_guidance_scales_the_difference_inside_its_interval_only():
    guided = last_sample(Growth(), Objective(), Y, SamplerConfig("heun", 200, guidance=2.0), start=START)
    assert abs(guided.mean() - math.exp(-2)) < 1e-3
    config = SamplerConfig("heun", 200, guidance=2.0, guidance_low=0.5)
    half = last_sample(Growth(), Objective(), Y, config, start=START)
    assert abs(half.mean() - math.exp(-1.5)) < 5e-3


@pytest.mark.parametrize(("solver", "calls"), [("euler", 10), ("heun", 19), ("euler-maruyama", 10)])
def test_network_evaluations(solver, calls):
    net = Growth()
    last_sample(net, Objective(), Y, SamplerConfig(solver, 10))
    assert net.calls == calls


def test_the_sampler_yields_every_time_and_can_be_stopped():
    times = [step.t for step in sample(Growth(), Objective(), Y, SamplerConfig("euler", 4))]
    assert times == even_times(SamplerConfig("euler", 4)) == [1, 0.75, 0.5, 0.25, 0]
    for step in sample(Growth(), Objective(), Y, SamplerConfig("euler", 4)):
        break
    assert step.t == 1


@pytest.mark.parametrize("solver", ["euler", "heun", "euler-maruyama"])
def test_a_seed_fixes_the_sample(solver):
    config = SamplerConfig(solver, 5)
    first, again, other = (last_sample(Growth(), Objective(), Y, config, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": "huen"}, "Did you mean 'heun'"),
        ({"steps": 0}, "steps 0"),
        ({"guidance_low": 0.8, "guidance_high": 0.2}, r"\[0.8, 0.2\]"),
        ({"guidance_high": 700}, r"\[0.0, 700\]"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**kwargs)


@pytest.mark.parametrize("name", ["guidance", "class_guidance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_guidance_that_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} .* must be a finite number"):
        SamplerConfig(**{name: value})
