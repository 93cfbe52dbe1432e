"""Named settings are those of the repositories, number by number, and pixels become bytes as their scripts make them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.sampled import plan, random_run

from maskalign_lab.diffusion.sampling import SamplerConfig
from maskalign_lab.diffusion.solvers import SOLVERS
from maskalign_lab.runs.official import DOORS
from maskalign_lab.runs.sample_plan import NAMED, made_from, own_plan, plan_of, to_bytes

# solver, evaluations of the field, guidance, its interval in the lab's time, labels, how bytes are made
PUBLISHED = {
    "sit": ("euler-maruyama", 250, 1.5, (0, 1), "random", "sit"),
    "repa": ("euler-maruyama", 250, 1.8, (0, 0.7), "random", "repa"),
    "reg": ("euler-maruyama", 250, 2.3, (0, 0.85), "random", "repa"),
    "haste": ("euler-maruyama", 250, 1.65, (0, 0.72), "random", "repa"),
    "irepa": ("euler-maruyama", 250, 1.8, (0, 0.7), "random", "repa"),
    "jit": ("heun", 99, 2.9, (0, 0.9), "balanced", "nearest"),
    "ditdh": ("euler", 49, 1.0, (0, 1), "random", "repa"),
}


@pytest.mark.parametrize("name", DOORS)
def test_named_settings_are_the_published_ones(name):
    found, (solver, evaluations, guidance, interval, labels, rounding) = NAMED[name], PUBLISHED[name]
    sampler = found.sampler
    assert (sampler.solver, sampler.guidance) == (solver, guidance)
    assert (sampler.guidance_low, sampler.guidance_high) == pytest.approx(interval, abs=1e-5)
    assert (found.labels, found.rounding, found.settings, found.n) == (labels, rounding, name, 50_000)
    stages = {"heun": 2}.get(solver, 1)
    assert stages * sampler.steps - (stages - 1) == evaluations  # the last step of Heun's is Euler's


def test_the_stochastic_ones_differ_in_what_the_repositories_differ_in():
    sit, repa, reg = (NAMED[name].sampler for name in ("sit", "repa", "reg"))
    assert (sit.diffusion, sit.guided_channels) == ("sigma", 3) and (repa.diffusion, repa.guided_channels) == (
        "linear",
        None,
    )
    assert {each.last_step for each in (sit, repa, reg)} == {0.04} and {each.last for each in (sit, repa, reg)} == {
        "mean"
    }
    times = SOLVERS["euler-maruyama"].times(repa)
    assert np.allclose(times, [*np.linspace(1, 0.04, 250), 0])
    assert reg.class_guidance in (None, 2.3)  # the class token is guided as the image


def test_jit_guides_every_stage_by_its_own_time():
    assert NAMED["jit"].sampler.guide_stages and NAMED["jit"].sampler.steps == 50


# ---- bytes


def theirs(name, x):
    """Numpy's and PyTorch's operations in the order of the official scripts."""
    if name == "repa":
        return torch.clamp(255.0 * ((x + 1) / 2.0), 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    if name == "sit":
        return torch.clamp(127.5 * x + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    images = np.transpose(((x + 1) / 2).numpy(), (0, 2, 3, 1))
    return np.round(np.clip(images * 255, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("name", ["repa", "sit", "nearest"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 0.7, 3.0]))
def test_bytes_are_those_of_the_official_scripts(name, seed, spread):
    x = spread * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    ours, wanted = to_bytes(x, name).numpy(), theirs(name, x)
    if name == "nearest":  # a half may fall to either side
        assert np.abs(ours.astype(int) - wanted).max() <= 1 and (ours != wanted).mean() < 0.01
    else:
        assert (ours == wanted).all()


# ---- plans


def test_a_run_of_the_labs_is_sampled_as_it_is_measured(tmp_path):
    run = random_run(tmp_path / "run")
    assert own_plan(run).sampler == SamplerConfig(precision="float32")
    found = plan_of(run, n=7, guidance=1.5, steps=None, precision="float32", seed=3)
    assert (found.n, found.seed, found.sampler.guidance, found.sampler.steps) == (7, 3, 1.5, 25)


def test_an_imported_run_is_sampled_by_its_own_sampler_in_its_familys_way(tmp_path):
    own = SamplerConfig("euler", 7, 1.2)
    run = random_run(tmp_path / "run", sampler=own)
    found = plan_of(run, precision="float32")
    assert (found.sampler.solver, found.sampler.steps, found.sampler.guidance) == ("euler", 7, 1.2)
    assert (found.settings, found.labels, found.rounding) == ("repa", "random", "repa")
    assert plan_of(run, "jit", labels="random", precision="float32").sampler.solver == "heun"


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ({}, "repa"),
        ({"n": 12, "seed": 3, "precision": "bfloat16"}, "repa"),
        ({"steps": 2, "labels": "balanced"}, "repa, with labels=balanced, steps=2"),
    ],
)
def test_settings_that_were_changed_do_not_keep_the_name_alone(tmp_path, typed, settings):
    assert plan_of(random_run(tmp_path / "run"), "repa", **typed).settings == settings
    assert plan_of(random_run(tmp_path / "other"), **typed).settings == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": "rega"}, "unknown settings 'rega'. Did you mean 'reg'?"),
        ({"labels": "balance"}, "unknown labels 'balance'. Did you mean 'balanced'?"),
        ({"n": 0}, "n=0 samples"),
        ({"solver": "hein"}, "unknown solver 'hein'. Did you mean 'heun'?"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path, given, message):
    with pytest.raises(ValueError) as error:
        plan_of(random_run(tmp_path / "run"), **given)
    assert message in str(error.value)


def test_what_samples_are_made_from_tells_the_weights_apart(tmp_path):
    told = [made_from(random_run(tmp_path / str(seed) / "run", seed=seed), plan()) for seed in (0, 1)]
    assert [name for name in told[0] if told[0][name] != told[1][name]] == ["network"]
