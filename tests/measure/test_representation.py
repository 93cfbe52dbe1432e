"""Probes and CKNNA over depth: of features whose answer is known, of every kind of network, and of imported ones."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shared.golden import golden

from maskalign_lab.base.seeding import generator
from maskalign_lab.base.statistics import cknna, gram, share_half
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.jit import JiT
from maskalign_lab.diffusion.objectives import Objective, draw_noise
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.encoders.teachers import Features
from maskalign_lab.measure.representation import (
    cknna_interval,
    hidden_over_depth,
    images_noise,
    over_depth,
    pooled_hidden,
    probe_hits,
)
from maskalign_lab.runs.official_files import import_run
from maskalign_lab.runs.run import load_run

SIZES = dict(input_size=16, patch_size=4, in_channels=3, width=32, depth=3, heads=4, num_classes=10)
NETS = {
    "sit": lambda: SiT(**SIZES),
    "class token": lambda: SiT(**SIZES, class_dim=6),
    "mixer": lambda: SiT(**SIZES, mixer_depth=1),
    "both": lambda: SiT(**SIZES, class_dim=6, mixer_depth=1),
    "jit": lambda: JiT(**SIZES, bottleneck=8, context_tokens=2, context_start=1),
}


def run_of(net, objective=Objective()):
    """A network away from the identity, with what a run has that is asked for."""
    torch.manual_seed(0)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    inputs = lambda dataset, index=slice(None): dataset.images(index)  # noqa: E731
    return SimpleNamespace(name="made", net=net.eval(), inputs=inputs, recipe=SimpleNamespace(objective=objective))


def pictures(n=20):
    return load_dataset("shapes", 16, "validation", n)


def said(n=20, dim=6):
    draw = torch.Generator().manual_seed(3)
    return Features(torch.randn(n, 16, dim, generator=draw), torch.randn(n, dim, generator=draw))


# ---- hidden tokens


@pytest.mark.parametrize("kind", NETS)
def test_hidden_tokens_are_those_of_one_pass_with_the_null_class(kind):
    run, dataset, features = run_of(NETS[kind](), Objective(noise_scale=0.5)), pictures(), said()
    parts = list(hidden_over_depth(run, dataset, features, 0.3, [1, 3], seed=4, batch_size=7))
    assert [part.stop - part.start for part, _ in parts] == [7, 7, 6]
    tokens = torch.cat([tokens for _, tokens in parts], 1)
    assert tokens.shape == (2, 20, 16, 32)
    times, x = torch.full((20,), 0.3), dataset.images()
    noise = torch.stack(
        [draw_noise(Objective(noise_scale=0.5), (3, 16, 16), generator(4, i, "probing")) for i in range(20)]
    )
    given = {}
    if run.net.class_dim:
        eps = torch.stack(
            [draw_noise(Objective(noise_scale=0.5), (6,), generator(4, i, "probing class")) for i in range(20)]
        )
        given["cls"] = interpolate(features.cls, eps, times)
    with torch.no_grad():
        hidden = run.net(interpolate(x, noise, times), times, torch.full((20,), 10), collect=(1, 3), **given).hidden
    for found, depth in zip(tokens, (1, 3), strict=True):
        torch.testing.assert_close(found, hidden[depth][:, -16:])


def test_one_pass_of_a_time_serves_all_depths():
    run, passes = run_of(NETS["sit"]()), []
    run.net.register_forward_hook(lambda *_: passes.append(1))
    over_depth(run, pictures(40), [0.2, 0.7], features=said(40))
    assert len(passes) == 2


def test_pooled_tokens_do_not_depend_on_the_batch():
    run, dataset = run_of(NETS["both"]()), pictures()
    small, large = (pooled_hidden(run, dataset, said(), 0.3, [2], batch_size=size) for size in (3, 256))
    torch.testing.assert_close(small, large)


def test_noise_belongs_to_the_image():
    both, second = images_noise(Objective(), (2, 3), [4, 9]), images_noise(Objective(), (2, 3), [9])
    assert torch.equal(both[1:], second) and not torch.equal(both[:1], second)
    assert not torch.equal(images_noise(Objective(), (2, 3), [4], seed=1), both[:1])


# ---- probes and CKNNA


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 5), st.integers(0, 99))
def test_a_probe_reads_the_class_where_it_stands_and_guesses_from_noise(kinds, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, kinds, (400,), generator=draw)
    told = torch.eye(kinds)[labels] @ torch.randn(kinds, 12, generator=draw)
    assert probe_hits(told, labels).all()
    hits = probe_hits(torch.randn(400, 12, generator=draw), labels)
    chance = labels.bincount().max() / len(labels)
    assert hits.float().mean() < chance + 2 * share_half(hits)


def test_cknna_is_one_with_itself_and_its_interval_is_of_the_same_images():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 120, 6, generator=draw)
    turned = 2 * a @ torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    value, half = cknna_interval(a, gram(turned))
    assert value == pytest.approx(1, abs=1e-5) and half < 1e-4
    value, half = cknna_interval(a + 0.5 * b, gram(a))
    assert value == pytest.approx(cknna(a + 0.5 * b, a), abs=1e-9) and 0 < half < 0.3


def test_tokens_resemble_features_that_are_made_of_them():
    run, dataset = run_of(NETS["sit"]()), pictures(64)
    tokens = torch.cat([t for _, t in hidden_over_depth(run, dataset, said(64), 0.0, [2])], 1)[0]
    found = over_depth(run, dataset, [0.0, 1.0], [1, 2, 3], Features(tokens, tokens.mean(1)), k=5)["CKNNA"]
    assert found.values.shape == found.halves.shape == (2, 3) and found.depths == (1, 2, 3)
    assert found.values[0, 1] == pytest.approx(1, abs=1e-5) and abs(found.values[0] - 1).argmin() == 1
    assert found.values[1].max() < 0.5


def test_a_class_that_can_be_seen_is_found_until_noise_hides_it():
    run, dataset = run_of(NETS["jit"]()), pictures(300)
    bright = (np.arange(300) % 2).astype(np.int64)
    pixels = np.clip(dataset.pixels // 3 + 160 * bright[:, None, None, None], 0, 255).astype(np.uint8)
    dataset = replace(dataset, pixels=pixels, labels=bright)
    probe = over_depth(run, dataset, [0.1, 1.0], features=said(300))["probe"]
    assert probe.values[0].min() > 0.95 and probe.values[1].max() < 0.65 and probe.chance == 0.5
    assert (probe.halves > 0).all()


# ---- runs that ship, and published files


def test_a_shipped_run_with_class_token_and_mixer():
    run = load_run("maskalign-shapes")
    found = over_depth(run, run.images("validation", 60), [0.3], [4, 12])
    assert found["probe"].values.shape == (1, 2) and found["CKNNA"].values[0, 0] > 0.05


@pytest.mark.parametrize("name", ["sit_ls1", "repa", "reg", "haste", "irepa"])
def test_an_imported_latent_network_is_looked_at(name, tmp_path):
    record = golden(name)
    save_file(
        record.weights, tmp_path / "in.safetensors", {"family": name.split("_")[0], "config": json.dumps(record.config)}
    )
    run = load_run(import_run(tmp_path / "in.safetensors", tmp_path / "run", dataset="shapes", autoencoder="tiny"))
    dataset = load_dataset("shapes", run.recipe.data.size, "validation", 40)
    found = over_depth(run, dataset, [0.5], features=said(40, run.net.class_dim or 6))
    assert found["CKNNA"].values.shape == (1, run.net.depth) and np.isfinite(found["probe"].values).all()


def test_an_imported_pixel_network_is_looked_at(tmp_path):
    record = golden("jit")
    save_file(record.weights, tmp_path / "in.safetensors", {"family": "jit", "config": json.dumps(record.config)})
    run = load_run(import_run(tmp_path / "in.safetensors", tmp_path / "run"))
    dataset = load_dataset("shapes", run.recipe.data.size, "validation", 40)
    assert over_depth(run, dataset, [0.5], [1], said(40))["probe"].values.shape == (1, 1)


# ---- bad input


def test_what_cannot_be_asked_is_refused():
    run, dataset = run_of(NETS["class token"]()), pictures(40)
    with pytest.raises(ValueError, match="class token of 6 channels, and these features have one of 5"):
        over_depth(run, dataset, [0.5], features=said(40, 5))
    with pytest.raises(ValueError, match="depth 4 is outside the network: it has blocks 1 to 3"):
        over_depth(run, dataset, [0.5], [4], said(40))
    with pytest.raises(ValueError, match="t = 500 is outside"):
        over_depth(run, dataset, [500], features=said(40))
    one = dataset.subset(np.flatnonzero(dataset.labels == dataset.labels[0]))
    with pytest.raises(ValueError, match="a probe needs two classes"):
        over_depth(run, one, [0.5], features=said(len(one)))
