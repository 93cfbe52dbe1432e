"""On a CUDA device: the same numbers as on a CPU, the same bits after a stop, and every method trains."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from maskalign_lab.ahpa import AHPAConfig, Router
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.encoders.autoencoder_levels import fit_levels
from maskalign_lab.encoders.teacher_features import rows_of
from maskalign_lab.encoders.teachers import load_teacher
from maskalign_lab.gradient_norms import token_gradient_norms
from maskalign_lab.measure.metrics import validation_loss
from maskalign_lab.runs.batches import kept_autoencoder
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import LATENTS, NAMED, make_recipe
from maskalign_lab.runs.run import build, ensure_run, load_run, train
from maskalign_lab.studies.shipped_runs import pack, write_card
from maskalign_lab.training.loop import fit, to_device
from maskalign_lab.training.methods import METHODS, Batch, Plan, State

pytestmark = pytest.mark.gpu
GPU, NAMES = torch.device("cuda"), sorted({*METHODS, *NAMED})
CASES = [
    *((name, "") for name in NAMES),
    ("ahpa", "method.router=bilevel"),
    ("ahpa", "method.way=rotated method.mix=targets"),
]
CASES += [("maskalign", "method.inner.name=ahpa")]


def small(name: str, more: str = ""):
    """A recipe that trains in seconds."""
    latents = LATENTS[""] if "ahpa" in name + more else ""
    few = "data.n=64 training.steps=6 training.batch_size=8 training.precision=float32"
    return make_recipe(name, "smoke", overrides=f"{latents} {few} {more}")


def given(recipe):
    """Network, method, a batch of noise that holds all that the method may need, and a draw; all on the CPU, in float64."""
    latent = bool(recipe.data.autoencoder)
    facts, size = ({"channels": 4, "factor": 4}, 16) if latent else ({}, recipe.data.size)
    net, method = build(recipe, Facts(10, (24,), **facts))
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator(0, 0, "given")))
    g, b, n = generator(0, 0, "batch"), 4, net.side**2
    randn = partial(torch.randn, generator=g, dtype=torch.float64)
    needs, heads = Plan(recipe.method).needs, net.blocks[0].attn.heads
    batch = Batch(randn(b, net.in_channels, size, size), torch.tensor([0, 1, 2, 3]))
    more = {
        "features": randn(b, n, 24),
        "class_token": randn(b, 24),
        "attention": randn(b, 2, heads, n, n),
        "levels": randn(b, 4, n, 16),
        "held_out": replace(batch, x=randn(*batch.x.shape)),
    }
    batch = replace(batch, **{name: value for name, value in more.items() if name in needs})
    draw = method.draw(batch, 0, partial(generator, 0))
    draw = replace(draw, **{k: v.double() for k, v in vars(draw).items() if v is not None and v.is_floating_point()})
    return net.double(), method.double(), batch, draw


@pytest.mark.parametrize(("name", "more"), CASES)
def test_losses_and_gradients_are_those_of_the_cpu(name, more):
    found = []
    for device in ("cpu", GPU):
        net, method, batch, draw = given(small(name, more))
        net, method, batch = net.to(device), method.to(device), to_device(batch, device)
        draw = replace(draw, **{k: v.to(device) for k, v in vars(draw).items() if v is not None})
        losses = method.loss(State(net, net, 0), batch, draw)
        losses.total.backward()
        learned = [*net.named_parameters(), *method.named_parameters()]
        found.append((losses, {key: p.grad.cpu() for key, p in learned if p.grad is not None}))
    (ours, slopes), (theirs, others) = found
    for part, value in ours.parts.items():
        torch.testing.assert_close(value, theirs.parts[part].cpu(), rtol=1e-5, atol=1e-6)
    assert slopes.keys() == others.keys()
    whole, other = (torch.cat([each[key].flatten() for key in slopes]) for each in (slopes, others))
    assert (whole - other).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("name", ["sit", "ahpa", "maskalign"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_was_stopped_continues_to_the_same_bits(tmp_path, monkeypatch, name, precision):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        recipe = small(name, f"training.precision={precision} training.save_every=2")
        whole = load_run(train(recipe, tmp_path / "whole", "cuda", 0), device="cuda")
        shorter = replace(recipe, training=replace(recipe.training, steps=3))
        train(shorter, tmp_path / "parts", "cuda", 0)
        (tmp_path / "parts" / "recipe.json").write_text((tmp_path / "whole" / "recipe.json").read_text())
        parts = load_run(train(recipe, tmp_path / "parts", "cuda", 0), device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole.step == parts.step == 6
    for ours, theirs in ((whole.net, parts.net), (whole.method, parts.method)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize(("name", "more"), CASES)
def test_every_method_trains(tmp_path, name, more):
    """In bfloat16, through caches that the GPU fills."""
    path = train(small(name, f"{more} training.precision=bfloat16"), tmp_path / "run", "cuda", 0)
    run = load_run(path, device="cuda")
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert run.device.type == "cuda" and lines[-1]["step"] == 6
    assert all(p.isfinite().all() for p in run.net.parameters())


def test_a_run_is_packed_and_told_of(tmp_path):
    path = train(small("ahpa", "data.n=16"), tmp_path / "run", "cuda", 0)
    write_card(load_run(path, device="cuda"), pack(path, tmp_path / "packed"), "by hand", SamplerConfig(steps=2))
    assert {"card.json", "card.md", "loss.png", "samples.png"} <= {
        file.name for file in (tmp_path / "packed").iterdir()
    }


def test_compiled_blocks_train_to_what_eager_ones_do(tmp_path):
    nets = {}
    for compiled in ("off", "blocks"):
        recipe = small("ahpa", f"execution.compile={compiled} training.steps=4")
        nets[compiled] = load_run(train(recipe, tmp_path / compiled, "cuda", 0)).net.state_dict()
    start = build(small("ahpa"), Facts(10, channels=4, factor=4))[0].state_dict()
    moved = torch.cat([(nets["off"][k] - start[k]).flatten() for k in start])
    apart = torch.cat([(nets["off"][k] - nets["blocks"][k]).flatten() for k in start])
    assert apart.norm() < 0.02 * moved.norm()


def test_a_router_is_finite_and_adds_up_under_autocast():
    torch.manual_seed(0)
    router = Router(AHPAConfig().levels, "coarse-to-fine", num_classes=3).to(GPU)
    for p in router.parameters():
        p.data.add_(torch.randn_like(p))
    t = torch.linspace(0, 1, 10_001, device=GPU)
    with torch.autocast("cuda", torch.bfloat16):
        weights = router(t, torch.full((len(t),), 3, device=GPU))
    assert weights.dtype == torch.float32 and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(t))


def test_latents_levels_and_features_are_those_of_the_cpu():
    images = load_dataset("shapes", 64, "train", 32)
    found = []
    for device in (torch.device("cpu"), GPU):
        vae = kept_autoencoder("tiny", device)
        x = images.images(slice(0, 16), device)
        levels = fit_levels(vae, images, AHPAConfig().levels, 8)
        teacher = load_teacher("tiny", 64, device, 8)
        with torch.no_grad():
            seen = rows_of(teacher(x))
            parts = {
                "latents": vae.encode(x),
                "levels": levels(x),
                "features": seen,
                "decoded": vae.decode(vae.encode(x)),
            }
        found.append({key: value.float().cpu() for key, value in parts.items()})
    for key, value in found[0].items():
        bound = 1e-4 if key in ("latents", "decoded") else 2e-3  # components may turn a little; the teacher uses TF32
        assert (value - found[1][key]).norm() < bound * value.norm(), key


def test_samples_and_validation_losses_are_those_of_the_cpu():
    net, method, batch, _ = given(small("sit"))
    net, (x, labels) = net.float().eval(), (batch.x.float(), batch.y)
    y, config = torch.tensor([1, 2]), SamplerConfig(steps=4, guidance=1.5, precision="float32")
    start = torch.randn(2, 3, 32, 32, generator=generator(0, 0, "start"))
    found, losses = [], []
    for device in ("cpu", GPU):
        there = net.to(device)
        steps = list(sample(there, method.objective, y.to(device), config, start=start.to(device)))
        found.append(steps[-1].x.cpu())
        losses.append(validation_loss(there, method.objective, x.to(device), labels.to(device)).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_gradient_norms_are_those_of_the_cpu():
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.SiLU(), torch.nn.Linear(16, 12)).double()
    hidden, features = torch.randn(2, 3, 9, 12, dtype=torch.float64).unbind()
    here = token_gradient_norms(mlp, hidden, features)
    there = token_gradient_norms(mlp.to(GPU), hidden.to(GPU), features.to(GPU)).cpu()
    torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


def test_a_step_does_not_wait_for_the_device():
    """Apart from moving the batch there; a step that waits leaves the device idle."""
    recipe = small("ahpa", "training.steps=40 training.precision=bfloat16")
    net, method, batch, _ = given(recipe)
    batch = replace(batch, x=batch.x.float(), levels=batch.levels.float())
    steps = fit(net.float(), method.float(), lambda step: to_device(batch, GPU), recipe.training, device="cuda")
    for _ in range(12):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_of_one_recipe_are_found_again_from_either_device(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path))
    path = ensure_run(small("sit"), "cuda").path
    monkeypatch.setattr("maskalign_lab.runs.run.train", lambda *_: pytest.fail("trained again"))
    assert ensure_run(small("sit"), "cpu").path == path
