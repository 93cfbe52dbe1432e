"""On a CUDA device: the same numbers as on a CPU, the same bits after a stop, and every method trains."""

import json
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from shared.given import CASES, given, in_single, small

from maskalign_lab.ahpa import AHPAConfig, Router
from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.encoders.autoencoder_levels import fit_levels
from maskalign_lab.encoders.teacher_features import rows_of
from maskalign_lab.encoders.teachers import load_teacher
from maskalign_lab.gradient_norms import token_gradient_norms
from maskalign_lab.measure.metrics import validation_loss
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.run import build, ensure_run, load_run, train
from maskalign_lab.runs.side_by_side import train_side_by_side
from maskalign_lab.runs.sources import kept_autoencoder
from maskalign_lab.studies.shipped_runs import pack, write_card
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import State
from maskalign_lab.training.prefetch import SETTLED, feeding, portions, to_device
from maskalign_lab.training.stopping import NonFinite

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


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


@pytest.mark.parametrize("compiled", ["off", "whole"])
@pytest.mark.parametrize("name", ["sit", "repa", "reg", "maskalign"])
def test_seeds_side_by_side_are_those_of_single_trainings(own_folders, tmp_path, name, compiled):
    """Also as one CUDA graph. The losses of the last step, since an optimiser makes much of the rounding of small gradients."""
    recipes = [small(name, f"training.seed={k} training.log_every=1 execution.compile={compiled}") for k in range(3)]
    train_side_by_side(recipes, "cuda")
    for k, recipe in enumerate(recipes):
        alone, together = train(recipe, tmp_path / str(k), "cuda", 0), ensure_run(recipe, "cuda").path
        one, other = (json.loads((run / "log.jsonl").read_text().splitlines()[-1]) for run in (alone, together))
        assert other["denoising"] == pytest.approx(one["denoising"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "compiled"), [("sit", "off"), ("ahpa", "off"), ("maskalign", "off"), ("maskalign", "whole")]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_was_stopped_continues_to_the_same_bits(tmp_path, monkeypatch, name, compiled, precision):
    """Also by a CUDA graph, which the second part records anew."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        recipe = small(name, f"training.precision={precision} training.save_every=2 execution.compile={compiled}")
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


QUICK = [("maskalign", ""), ("ahpa", ""), ("haste", "method.stop=3")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK and "bilevel" not in case[1]]


def trained(recipe, tmp_path, **how):
    """The network at the end of a training that is executed in some way."""
    execution = replace(recipe.execution, **how)
    name = "-".join(f"{key}={value}" for key, value in how.items())
    return load_run(train(replace(recipe, execution=execution), tmp_path / name, "cuda", 0)).net.state_dict()


def check_near(recipe, one, other):
    """Two trainings that end much nearer to each other than to their beginning."""
    facts = Facts(10, (24,), channels=4, factor=4) if recipe.data.autoencoder else Facts(10, (24,))
    start = build(recipe, facts)[0].state_dict()
    same = [key for key in start if start[key].shape == one[key].shape]
    moved = torch.cat([(one[key] - start[key]).flatten() for key in same])
    apart = torch.cat([(one[key] - other[key]).flatten() for key in same])
    assert apart.norm() < 0.02 * moved.norm()


@pytest.mark.parametrize(("name", "more"), [*QUICK, *SLOW])
def test_a_compiled_loss_trains_to_what_an_eager_one_does(tmp_path, name, more):
    """By a CUDA graph."""
    recipe = small(name, f"{more} training.steps=5")
    check_near(recipe, trained(recipe, tmp_path, compile="off"), trained(recipe, tmp_path, compile="whole"))


def test_compiled_blocks_train_to_what_eager_ones_do(tmp_path):
    recipe = small("ahpa", "training.steps=4")
    check_near(recipe, trained(recipe, tmp_path, compile="off"), trained(recipe, tmp_path, compile="blocks"))


@pytest.mark.parametrize("compiled", ["off", "whole"])
def test_a_batch_in_parts_trains_to_what_the_whole_does(tmp_path, compiled):
    recipe = small("maskalign", "training.steps=4")
    whole = trained(recipe, tmp_path, compile="off")
    check_near(recipe, whole, trained(recipe, tmp_path, compile=compiled, accumulate=4))


def steps_of_a_training(compiled, batches=None, run=None, **training):
    """The steps of a small training on a batch that lies on the device."""
    recipe = small("ahpa", "training.precision=bfloat16")
    net, method, batch, _ = given(recipe)
    batch = to_device(in_single(batch), GPU)
    config = replace(recipe.training, **dict(steps=40) | training)
    return fit(
        net.float(), method.float(), batches or (lambda step: batch), config, run, "cuda", ExecutionConfig(compiled)
    )


def test_losses_outlive_the_step_that_a_graph_replays():
    now, later = [], []
    for step in steps_of_a_training("whole", steps=8):
        later.append((step.losses, step.norms))
        now.append([{name: value.item() for name, value in each.items()} for each in later[-1]])
    assert now == [[{name: value.item() for name, value in each.items()} for each in pair] for pair in later]


def test_a_checkpoint_holds_the_moment_it_was_taken_at(tmp_path):
    """Though the weights move on while it is copied and written."""
    for step in steps_of_a_training("off", run=tmp_path, steps=9, save_every=3):
        if step.step == 6:
            then = {name: value.clone() for name, value in step.state.model.state_dict().items()}
    found = load_tensors(step_folder(tmp_path, 6), "model")
    assert all(torch.equal(found[name], value.cpu()) for name, value in then.items())


@pytest.mark.parametrize("compiled", ["off", "whole"])
def test_a_number_that_is_not_finite_is_noticed_though_nobody_waits(tmp_path, compiled):
    good = to_device(in_single(given(small("ahpa"))[2]), GPU)
    bad = replace(good, x=good.x * float("nan"))
    with pytest.raises(NonFinite, match="step 4: not finite, first in .*; the state before it is .*000003"):
        for _ in steps_of_a_training(compiled, lambda step: bad if step == 3 else good, tmp_path, save_every=100):
            pass


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


@pytest.mark.parametrize("compiled", ["off", "blocks", "whole"])
def test_a_step_does_not_wait_for_the_device(compiled):
    """Nor does the guard's look, which falls among these steps; a step that waits leaves the device idle."""
    steps = steps_of_a_training(compiled)
    for _ in range(12):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", ["host", "device", "auto"])
def test_rows_reach_the_device_as_they_are_and_nobody_waits(placement):
    """By a thread's copies or picked there; two processes' parts."""
    batches, todo = make_batches(small("maskalign")), partial(portions, 0, 9, 1, 2)
    with feeding(batches, GPU, ExecutionConfig(placement=placement), todo) as feed:
        for portion in todo():
            torch.cuda.set_sync_debug_mode("error" if portion.step > SETTLED else "default")
            try:
                mine, whole = feed(portion)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            there = batches(*portion)
            for name in ("x", "y", "features", "class_token"):
                value = getattr(mine, name)
                assert value.device.type == "cuda" and value.is_contiguous() is (name != "y")
                torch.testing.assert_close(value.cpu(), getattr(there, name), rtol=0, atol=0 if name != "x" else 1e-6)
            assert whole.x.shape == (8, 3, 32, 32) and len(whole.y) == 8
        assert bool(feed.resident) is (placement != "host")
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("placement", ["host", "device"])
def test_where_rows_live_changes_no_number(placement):
    recipe = small("ahpa", "execution.compile=off")
    batches, ends = make_batches(recipe, "cuda"), []
    for execution in (ExecutionConfig("off", placement=placement), ExecutionConfig("off")):
        net, method = build(recipe, batches.facts)
        *_, last = fit(net, method, batches, recipe.training, None, "cuda", execution)
        ends.append({name: value.item() for name, value in last.losses.items()})
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_runs_of_one_recipe_are_found_again_from_either_device(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path))
    path = ensure_run(small("sit"), "cuda").path
    monkeypatch.setattr("maskalign_lab.runs.run.train", lambda *_: pytest.fail("trained again"))
    assert ensure_run(small("sit"), "cpu").path == path
