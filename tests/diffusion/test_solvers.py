"""Every solver: against exact solutions, on the way back, and on the samples that the official code drew."""

import math
from functools import partial

import pytest
import torch
from shared.golden import close, golden, opened
from shared.jit import OBJECTIVE, Diary, objective, official, official_stages
from shared.transport import cases, form_of, transport
from torch import nn
from torch.testing import assert_close

from maskalign_lab.diffusion import solvers
from maskalign_lab.diffusion.guidance import Field
from maskalign_lab.diffusion.interpolants import coefficients
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample, sample
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.diffusion.solvers import SOLVERS, denoise_last, dopri5, euler_maruyama, runge_kutta, stochastic_heun

ORDERS = {"euler": 1, "heun": 2, "heun3": 3, "midpoint": 2, "rk4": 4}  # of single steps
CALLS = {"euler": 1, "heun": 2, "heun3": 3, "midpoint": 2, "rk4": 4, "euler-maruyama": 1, "stochastic-heun": 2}
NOISY = {"euler-maruyama": euler_maruyama, "stochastic-heun": stochastic_heun}


def test_no_solver_is_forgotten():
    assert {*ORDERS, *NOISY, "dopri5"} == SOLVERS.keys() == {*CALLS, "dopri5"}


# --- exact solutions --------------------------------------------------------------------------------------------------


class Known(nn.Module):
    """One pixel with a velocity of our choice; the null class stands still."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 1, 1, 3, None

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.calls, self.weight = velocity, 0, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, y):
        self.calls += 1
        return Output(self.velocity(x, t.view(-1, 1, 1, 1)) * (y != self.num_classes).view(-1, 1, 1, 1), None, {})


Y, START = torch.tensor([0, 1]), torch.ones(2, 1, 1, 1, dtype=torch.float64)


def growth(x, t):
    """x(t) = x(1) exp(t - 1)."""
    return x


def curved(x, t):
    """x(t) = 1 / (2 - t^2) from x(1) = 1: neither linear nor steady."""
    return 2 * t * x**2


def sampled(velocity, solver, steps=25, seed=0, **config):
    net = Known(velocity)
    return last_sample(net, Objective(), Y, SamplerConfig(solver, steps, **config), seed, START).double().mean().item()


def walked(solver, steps, start=1.0, end=0.5, x=START):
    """The state at a time away from the data, where every step is the solver's own."""
    field = Field(Known(curved), Objective(), Y, SamplerConfig(solver))
    if solver == "dopri5":
        return [state for _, state in dopri5(field, x, start, end)][-1]
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:]):
        x = SOLVERS[solver].step(field, x, t, t_next, torch.Generator())
    return x


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
@pytest.mark.parametrize(("velocity", "exact"), [(growth, math.exp(-1)), (curved, 0.5)])
def test_a_deterministic_solver_finds_the_exact_solution(velocity, exact, solver):
    within = {"euler": 5e-3, "dopri5": 5e-3}.get(solver, 1e-5)  # dopri5 stops at its own tolerance
    assert sampled(velocity, solver, 400) == pytest.approx(exact, rel=within)


@pytest.mark.parametrize("solver", ORDERS)
def test_the_error_shrinks_with_the_order_of_the_steps(solver):
    errors = [(walked(solver, steps) - 1 / (2 - 0.5**2)).abs().max().item() for steps in (10, 20, 40)]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.5)


@pytest.mark.parametrize("solver", ORDERS)
def test_the_order_survives_the_end_or_becomes_two(solver):
    """A solver whose step would look at t = 0 ends with Euler's, whose error shrinks with the square of the step."""
    order = ORDERS[solver] if solvers.last_solver(solver) == solver else 2
    errors = [abs(sampled(growth, solver, steps) - math.exp(-1)) for steps in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_the_way_back_ends_at_the_start(solver):
    missed = [(walked(solver, steps, 0.5, 1.0, walked(solver, steps)) - START).abs().max().item() for steps in (20, 40)]
    assert 0 < missed[0] < (0.1 if solver == "euler" else 0.01)
    assert solver == "dopri5" or math.log2(missed[0] / missed[1]) > ORDERS[solver] - 0.25


# --- data whose network is known exactly ------------------------------------------------------------------------------

MEAN, STD = 0.5, 0.3


class Exact(nn.Module):
    """The optimal network for pixels of N(0.5, 0.3^2), with any prediction."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 16, 1, 1, None

    def __init__(self, prediction, path):
        super().__init__()
        self.prediction, self.path = prediction, path
        self.holder = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t, y):
        c = coefficients(self.path, t, x_t)
        surprise = (x_t - c.alpha * MEAN) / ((c.alpha * STD) ** 2 + c.sigma**2)
        x, noise = MEAN + c.alpha * STD**2 * surprise, c.sigma * surprise
        return Output({"x": x, "eps": noise, "v": c.d_alpha * x + c.d_sigma * noise}[self.prediction], None, {})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_every_prediction_finds_the_data_by_every_solver(path, prediction, solver):
    aim = Objective(path, prediction, clamp=0.0 if prediction == "v" else 1e-3)
    labels, config = torch.zeros(64, dtype=torch.long), SamplerConfig(solver, steps=100)
    x = last_sample(Exact(prediction, path), aim, labels, config)
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - STD) < 0.03


def moments(solver, steps, form):
    """Errors of mean and variance at t = 0.2. Its steps are affine in state and noise, so both are known without a draw."""
    field = Field(Exact("v", "cosine"), Objective("cosine"), torch.zeros(1).long(), SamplerConfig(diffusion=form))
    zero, one = torch.zeros(1, 1, 16, 16, dtype=torch.float64), torch.ones(1, 1, 16, 16, dtype=torch.float64)
    times = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
    mean, variance = 0.0, 1.0
    for t, t_next in zip(times.tolist(), times[1:].tolist()):
        pairs = (zero, zero), (one, zero), (zero, one)
        still, moved, shaken = (NOISY[solver](field, x, t, t_next, noise).mean().item() for x, noise in pairs)
        mean, variance = still + (moved - still) * mean, (moved - still) ** 2 * variance + (shaken - still) ** 2
    end = coefficients("cosine", times[-1:], times[-1:])
    return abs(mean - end.alpha.item() * MEAN), abs(variance - (end.alpha.item() * STD) ** 2 - end.sigma.item() ** 2)


@pytest.mark.parametrize("form", sorted(solvers.DIFFUSIONS.keys() - {"sbdm"}))  # w of sbdm is infinite at t = 1
@pytest.mark.parametrize(("solver", "order"), [("euler-maruyama", 1), ("stochastic-heun", 2)])
def test_a_stochastic_solver_keeps_to_the_marginals(solver, order, form):
    """The mean with its order, the variance with order one, whatever the diffusion."""
    coarse, fine = (moments(solver, steps, form) for steps in (100, 200))
    assert [math.log2(before / after) for before, after in zip(coarse, fine)] == pytest.approx([order, 1], abs=0.1)
    assert max(fine) < 5e-3


# --- what every solver keeps to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_times_fall_from_one_to_zero_and_the_way_can_be_left(solver):
    config = SamplerConfig(solver, 5)
    walk = partial(sample, Known(growth), Objective(), Y, config)
    times = [step.t for step in walk()]
    assert times[0] == 1 and times[-1] == 0 and times == sorted(set(times), reverse=True)
    if solver != "dopri5":
        assert times == SOLVERS[solver].times(config) and len(times) == 6
        assert (times[-2] == config.last_step) is (solver in NOISY)
    assert next(iter(walk())).t == 1


def test_deterministic_steps_are_of_equal_length():
    assert SOLVERS["euler"].times(SamplerConfig("euler", 4)) == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("solver", CALLS)
def test_network_evaluations(solver):
    """The last step of a solver that would look at t = 0 asks once, and so does the one without noise."""
    net, each = Known(growth), CALLS[solver]
    last_sample(net, Objective(), Y, SamplerConfig(solver, 10))
    assert net.calls == 9 * each + (each if solver in ("midpoint", "heun3") else 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seed_fixes_the_sample(solver):
    config = SamplerConfig(solver, 5)
    first, again, other = (last_sample(Known(growth), Objective(), Y, config, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seed_moves_what_a_solver_draws_and_nothing_else(solver):
    samples = {sampled(growth, solver, 5, seed) for seed in (0, 0, 1)}  # all from one start
    assert len(samples) == (2 if solver in NOISY else 1)


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_guidance_scales_the_difference(solver):
    assert sampled(growth, solver, 400, guidance=2.0) == pytest.approx(math.exp(-2), abs=1e-3)


def test_guidance_acts_inside_its_interval_only():
    assert sampled(growth, "heun", 200, guidance=2.0, guidance_low=0.5) == pytest.approx(math.exp(-1.5), abs=5e-3)


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


# --- REPA's samplers --------------------------------------------------------------------------------------------------

OF_REPA = {
    "nocfg": {}, "cfg": {"guidance": 2.5},
    "cfg_int": {"guidance": 2.5, "guidance_low": 0.25, "guidance_high": 0.7},
    "cfg_high": {"guidance": 1.8, "guidance_high": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("mode", OF_REPA)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_deterministic_samplers_of_repa(solver, mode):
    record, official = golden("repa_sampler"), opened("repa_sampler")
    config = SamplerConfig(solver, record.config["num_steps"], precision="float32", **OF_REPA[mode])
    assert_close(torch.tensor(SOLVERS[config.solver].times(config)), record.out["euler.t_steps"].float())
    *_, last = sample(official.net, official.objective, record.inputs["y"], config, start=record.inputs["latents"])
    close(last.x, record.out[f"{solver}.{mode}"])


@pytest.mark.parametrize("mode", OF_REPA)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_stochastic_sampler_of_repa(path, mode, monkeypatch):
    record, official = golden("repa_sampler"), opened("repa_sampler")
    config = SamplerConfig("euler-maruyama", record.config["num_steps"], precision="float32", **OF_REPA[mode])
    assert_close(torch.tensor(SOLVERS[config.solver].times(config)), record.out["em.t_steps"].float())
    noises = iter(record.inputs["em_noises"])
    monkeypatch.setattr(solvers.torch, "randn", lambda *_, **__: next(noises))
    *_, last = sample(official.net, Objective(path), record.inputs["y"], config, start=record.inputs["latents"])
    close(last.x, record.out[f"em.{path}.{mode}"])


# --- SiT's solvers and guidance ---------------------------------------------------------------------------------------


def test_sit_guides_three_channels():
    official, record = opened("sit_ls1"), golden("sit_ls1")
    x, t, y = record.inputs["x_cfg"][:2].double(), record.inputs["t_cfg"], record.inputs["y_cfg"]
    config = SamplerConfig(guidance=float(record.inputs["cfg_scale"]), guided_channels=3, precision="float32")
    for i in range(2):  # the recorded times differ
        field = Field(official.net, official.objective, y[i : i + 1], config)
        close(-field(x[i : i + 1], 1 - t[i].item()).float(), record.out["pred_cfg_first3ch"][i : i + 1])


@pytest.mark.parametrize("key", cases("ode"))
def test_the_ode_solvers_of_sit(key):
    path, _, kind, solver = key.split(".")
    field, given, out, config = transport(path, kind)
    start, end = out[f"{path}.interval.{kind}"][2:4].double().tolist()
    if solver == "dopri5":
        *_, (_, x) = dopri5(field, given["init"], 1 - start, 1 - end)
        error = (x - out[key]).norm() / out[key].norm()  # adaptive: two implementations agree to the solver's own error
        assert error < (1e-3 if kind == "velocity" else 5e-2)
        return
    times, x = torch.linspace(1 - start, 1 - end, config["ode_points"], dtype=torch.float64).tolist(), given["init"]
    for t, t_next in zip(times, times[1:]):
        x = runge_kutta("heun" if solver == "heun2" else solver, field, x, t, t_next)
    assert_close(x.float(), out[key], rtol=1e-3, atol=1e-3 * out[key].abs().max().item())


@pytest.mark.parametrize("key", cases("sde"))
def test_the_sde_solvers_of_sit(key):
    path, _, kind, solver, form, last = key.split(".")
    settings = dict(diffusion=form_of(form), last="mean" if last == "None" else last.lower())
    field, given, out, config = transport(path, kind, **settings)
    start, end = out[f"{path}.interval.{kind}"][4:6].double().tolist()
    end = 1 - 1e-7 if last == "None" else end  # upstream is finite at the very end only where it rounds sigma off zero
    times, x = torch.linspace(1 - start, 1 - end, config["sde_num_steps"], dtype=torch.float64).tolist(), given["init"]
    step = euler_maruyama if solver == "Euler" else stochastic_heun
    for noise, t, t_next in zip(given["sde_noises"], times, times[1:]):
        x = step(field, x, t, t_next, noise)
    x = x if last == "None" else denoise_last(field, x, times[-1])
    assert_close(x.float(), out[key], rtol=1e-3, atol=1e-3 * out[key].abs().max().item())


# --- JiT's sampler ----------------------------------------------------------------------------------------------------


OF_JIT = {
    "nocfg": {}, "cfg_full": {"guidance": 2.9},
    "cfg_interval": {"guidance": 2.9, "guidance_high": 0.9, "guide_stages": True},  # JiT's (0.1, 1), turned
}  # fmt: skip


def generated(solver, **config):
    s, record = official().settings, golden("jit")
    start = s.noise_scale * record.inputs["gen_noise_unit"]
    config = SamplerConfig(solver, s.num_sampling_steps, precision="float32", **config)
    return last_sample(official().net, objective(), record.inputs["labels"], config, start=start)


@pytest.mark.parametrize("mode", OF_JIT)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_samples_are_the_recorded_ones(solver, mode):
    s = official().settings
    assert (s.cfg, s.interval_min, s.interval_max) == (2.9, 0.1, 1.0)
    close(generated(solver, **OF_JIT[mode]), golden("jit").out[f"generate.{solver}.{mode}"])


def test_guidance_of_single_stages_makes_a_difference_to_heun_alone():
    whole = OF_JIT["cfg_interval"] | {"guide_stages": False}
    assert torch.equal(generated("euler", **whole), generated("euler", **OF_JIT["cfg_interval"]))
    assert (generated("heun", **whole) - generated("heun", **OF_JIT["cfg_interval"])).abs().max() > 0.1


@pytest.mark.parametrize("steps", [5, 10, 20, 25, 50, 100])
def test_the_published_interval_guides_the_same_stages(steps):
    """Its end at 0.9 may fall on the grid, where the official interval is open: hence a hair less."""
    diary = Diary()
    config = SamplerConfig("heun", steps, guidance=2.9, guidance_high=0.9 - 1e-6, guide_stages=True)
    last_sample(diary, OBJECTIVE, torch.zeros(1, dtype=torch.long), config)
    assert diary.asked == official_stages(steps, 0.1, 1.0)
    assert not all(guided for _, guided in diary.asked)
