"""The health check: each fault is found by step 200, no healthy training is accused, and no number of a training changes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.cli import main
from maskalign_lab.diffusion import interpolants
from maskalign_lab.diffusion.interpolants import Coefficients, linear
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.runs import run as runs_run
from maskalign_lab.runs.batches import Batches, make_batches
from maskalign_lab.runs.building import build
from maskalign_lab.runs.health import health_of
from maskalign_lab.runs.presets import NAMED, make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.runs.watching import glance, watched
from maskalign_lab.training import health
from maskalign_lab.training.config import TrainingConfig
from maskalign_lab.training.health import SETTLED, Look, latent_symptoms, linear_loss, path_symptoms, with_health
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import INSTALLED, Batch

pytestmark = pytest.mark.usefixtures("own_folders")
SHIPPED = ["sit-shapes", "repa-shapes", "reg-shapes", "maskalign-shapes", "ahpa-shapes", "ditdh-shapes", "dsd-shapes"]
SMALL = "network.width=16 network.depth=2 network.heads=2 data.n=64 training.batch_size=16"
EVERY = sorted({*INSTALLED, *NAMED})


def small(method="sit", steps=3, more="", **changes):
    aligned = (
        "" if method in ("sit", "jit") else " method.depth=1" if method != "maskalign" else " method.inner.depth=1"
    )
    recipe = make_recipe(method, "smoke", overrides=f"{SMALL} training.steps={steps} {more}{aligned}")
    return replace(recipe, **changes)


def told(run):
    path = run / "health.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- faults


def test_latents_without_their_scale_are_found_at_the_first_batch(tmp_path, monkeypatch, capsys):
    made = runs_run.make_batches

    def unscaled(*given):
        batches = made(*given)
        batches.scaling = (batches.scaling[0] / 0.18215, 0.0)
        return batches

    recipe = small(more="data.autoencoder=tiny network.patch_size=2")
    train(recipe, tmp_path / "well", "cpu", 0)
    monkeypatch.setattr(runs_run, "make_batches", unscaled)
    train(recipe, tmp_path / "ill", "cpu")
    assert told(tmp_path / "well") == [] and [each["name"] for each in told(tmp_path / "ill")] == ["latents"]
    said = capsys.readouterr().out
    assert said.count("WARNING, latents are not normalised") == 1 and "scaling_factor" in said


def turned_path(t):
    c = linear(t)
    return Coefficients(c.sigma, c.alpha, c.d_sigma, c.d_alpha)


def other_velocity(t):
    return replace(linear(t), d_alpha=torch.ones_like(t))


@pytest.mark.parametrize(
    ("path", "seen"), [(turned_path, "t = 0 is not the data"), (other_velocity, "not the derivative")]
)
def test_a_path_of_ones_own_is_looked_at_before_the_first_step(path, seen, tmp_path, monkeypatch):
    monkeypatch.setitem(interpolants.INTERPOLANTS, "mine", path)
    train(small(more="objective.interpolant=mine"), tmp_path / "run", "cpu", 0)
    (only,) = told(tmp_path / "run")
    assert only["name"] == "path" and seen in only["seen"] and "INTERPOLANTS['mine']" in only["remedy"]


@pytest.mark.parametrize("name", interpolants.INTERPOLANTS)
def test_paths_that_ship_are_right(name):
    assert path_symptoms(Objective(name)) == []


def tuned(turned):
    """What is said of a training that begins with the weights of a run, whose direction of time may be turned."""
    run, heard = load_run("sit-shapes"), []
    recipe = replace(run.recipe, training=replace(run.recipe.training, steps=2, batch_size=32, warmup=0))
    recipe = replace(recipe, data=replace(recipe.data, n=64))
    batches, net = make_batches(recipe), run.net.requires_grad_(True)
    net.data_at_one = turned
    steps = fit(net, run.method, batches, recipe.training, None, "cpu")
    for _ in with_health(steps, recipe.objective, glance(batches), recipe.training, False, heard.append):
        pass
    return heard


def test_weights_that_mean_another_direction_of_time_are_found_behind_the_first_step():
    assert tuned(False) == []
    (only,) = tuned(True)
    assert only.name == "direction" and "t and sign turned" in only.seen and "network.data_at_one" in only.remedy


@pytest.mark.parametrize(
    "name", ["reg-shapes", "ditdh-shapes", "dsd-shapes"]
)  # a class token; latents; its own latents
def test_a_shipped_run_is_well_and_is_found_ill_when_its_time_is_turned(name, monkeypatch):
    monkeypatch.setattr("maskalign_lab.runs.health.SEEN", 64)
    run = load_run(name)
    assert health_of(run).symptoms == []
    run.net.data_at_one = not run.net.data_at_one
    assert [symptom.name for symptom in health_of(run).symptoms] == ["direction"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_all_shipped_runs_are_well(name):
    assert health_of(load_run(name)).symptoms == []


def test_a_training_that_learns_nothing_is_found_at_step_200_and_by_the_command(tmp_path, capsys):
    train(small(steps=SETTLED, more="training.lr=1e-7"), tmp_path / "run", "cpu", 0)
    (only,) = told(tmp_path / "run")
    assert only["name"] == "learning" and "200 steps" in only["seen"]
    assert main(["health", str(tmp_path / "run")]) == 1 and "nothing was learned" in capsys.readouterr().out


def test_a_network_trained_from_the_start_with_a_turned_time_is_as_good_as_any(tmp_path):
    recipe = small(steps=SETTLED, more="network.data_at_one=true training.lr=1e-2")
    train(recipe, tmp_path / "run", "cpu", 0)
    assert told(tmp_path / "run") == [] and load_run(tmp_path / "run").net.data_at_one


# ---- no false alarms


@pytest.mark.parametrize("name", EVERY)
def test_no_healthy_training_is_accused(name, tmp_path, monkeypatch):
    """Small ones, looked at after few steps, which is harder for them."""
    monkeypatch.setattr(health, "SETTLED", 20)
    recipe = make_recipe(name, "smoke", overrides="data.n=64 training.batch_size=16 training.lr=4e-3")
    train(recipe, tmp_path / "run", "cpu", 0)
    assert told(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_no_healthy_training_is_accused_at_step_200(name, tmp_path):
    train(make_recipe(name, "smoke", overrides=f"training.steps={SETTLED}"), tmp_path / "run", "cpu", 0)
    assert told(tmp_path / "run") == []


@pytest.mark.parametrize("dataset", ["shapes", "photos", "digits"])
@pytest.mark.parametrize("autoencoder", ["tiny", "rae"])
def test_latents_of_the_autoencoders_that_ship_are_normalised(dataset, autoencoder):
    patch = 1 if autoencoder == "rae" else 2
    more = f"data.autoencoder={autoencoder} network.patch_size={patch} data.teacher=tiny-4x4"
    assert latent_symptoms(glance(make_batches(make_recipe("sit", "smoke", dataset, 0, f"{more} data.n=128"))).x) == []


def test_tokens_of_an_encoder_without_their_statistics_are_seen_by_single_channels():
    """Their deviation is that of healthy latents."""
    run = load_run("ditdh-shapes")
    latents, kept = run.inputs(run.survey_images(128)), run.autoencoder.statistics
    tokens = latents * kept.var.sqrt() + kept.mean
    assert latent_symptoms(latents) == [] and len(latent_symptoms(tokens)) == 1
    assert 1 / health.WIDEST < tokens.std(0).mean() < health.WIDEST


# ---- what it costs and changes


class Untouched:
    """A training's step of which nothing but its number is read, save where it is looked at."""

    def __init__(self, step):
        self.step = step

    @property
    def losses(self):
        raise AssertionError("a loss is read, and the device waited for")

    norms = losses


@pytest.mark.parametrize(("warmup", "looks"), [(0, [1, 200]), (450, [1, 450])])
def test_two_steps_of_a_training_are_looked_at_and_no_other_is_read(warmup, looks, monkeypatch):
    seen, net = [], nn.Linear(1, 1)

    def look(model, *_):
        seen.append(model)
        return Look(torch.ones(2), {"as it is": torch.ones(2)}, torch.full((2,), 2.0), torch.full((2,), 4.0))

    class Step(Untouched):
        @property
        def state(self):
            seen.append(self.step)
            return SimpleNamespace(model=net)

    monkeypatch.setattr(health, "look_at", look)
    config, batch = TrainingConfig(warmup=warmup), Batch(torch.randn(4, 1, 2, 2), torch.zeros(4))
    done = list(with_health(map(Step, range(1, 501)), Objective(), batch, config, False, pytest.fail))
    assert len(done) == 500 and [each for each in seen if each is not net] == looks


@pytest.mark.parametrize("method", ["reg", "jit"])
def test_no_number_of_a_training_changes(method, tmp_path, monkeypatch):
    """Networks with a class token, and with dropout."""
    more = "network.dropout=0.1" if method == "jit" else ""
    recipe = make_recipe(method, "smoke", overrides=f"data.n=64 training.steps=6 training.batch_size=8 {more}")
    monkeypatch.setattr(health, "SETTLED", 3)
    watching = train(recipe, tmp_path / "watched", "cpu", 0)
    monkeypatch.setattr("maskalign_lab.runs.watching.watched", lambda steps, *_: steps)
    plain = train(recipe, tmp_path / "plain", "cpu", 0)
    for name in ("model", "ema", "optimizer"):
        one, other = (load_tensors(step_folder(run), name) for run in (watching, plain))
        assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()


def test_a_run_is_told_once_though_it_is_interrupted(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(interpolants.INTERPOLANTS, "mine", turned_path)
    recipe = small(steps=4, more="objective.interpolant=mine training.save_every=2")
    for _ in range(2):
        train(recipe, tmp_path / "run", "cpu")
    assert capsys.readouterr().out.count("WARNING") == len(told(tmp_path / "run")) == 1


def test_processes_beside_the_first_do_not_look(monkeypatch):
    monkeypatch.setattr("maskalign_lab.runs.watching.is_first", lambda: False)
    steps = iter([1, 2])
    assert watched(steps, small(), Batches(None, None, None, None), None) is steps


def test_the_reference_is_wieners_on_the_linear_path():
    t, variance = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0.5, 2.0])
    said = linear_loss(Objective(), variance, t)
    wanted = variance / ((1 - t[:, None]) ** 2 * variance + t[:, None] ** 2)
    torch.testing.assert_close(said, wanted.mean(1))


# ---- in a terminal


def test_health_as_a_command(capsys):
    assert main(["health", "sit-shapes"]) == 0
    said = capsys.readouterr().out
    assert "best linear denoiser" in said and "nothing is wrong" in said


def test_a_fresh_network_is_not_blamed_before_its_time():
    recipe = small()
    net, _ = build(recipe, make_batches(recipe).facts)
    look = health.look_at(net, recipe.objective, glance(make_batches(recipe)))
    assert health.network_symptoms(look, 1, False) == []
