"""What a loss is given, without data, teachers or autoencoder: a network, a method, a batch of noise and a draw."""

from dataclasses import replace
from functools import partial

import torch

from maskalign_lab.base.seeding import generator
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import LATENTS, NAMED, make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.methods import METHODS, Batch, Plan

NAMES = sorted({*METHODS, *NAMED})
CASES = [
    *((name, "") for name in NAMES),
    ("ahpa", "method.router=bilevel"),
    ("ahpa", "method.way=rotated method.mix=targets"),
    ("maskalign", "method.inner.name=ahpa"),
]


def small(name: str, more: str = ""):
    """A recipe that trains in seconds."""
    latents = LATENTS[""] if "ahpa" in name + more else ""
    few = "data.n=64 training.steps=6 training.batch_size=8 training.precision=float32 network.depth=3"
    return make_recipe(name, "smoke", overrides=f"{latents} {few} {more}")


def given(recipe, images: int = 4):
    """Network, method, a batch of noise that holds all that the method may need, and a draw; all on the CPU, in float64."""
    latent = bool(recipe.data.autoencoder)
    facts, size = ({"channels": 4, "factor": 4}, recipe.data.size // 4) if latent else ({}, recipe.data.size)
    net, method = build(recipe, Facts(10, (24,), **facts))
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator(0, 0, "given")))
    g, b, n = generator(0, 0, "batch"), images, net.side**2
    randn = partial(torch.randn, generator=g, dtype=torch.float64)
    needs, heads = Plan(recipe.method).needs, net.blocks[0].attn.heads
    batch = Batch(randn(b, facts.get("channels", 3), size, size), torch.arange(b) % 10)
    more = {
        "features": randn(b, n, 24),
        "class_token": randn(b, 24),
        "attention": randn(b, 2, heads, n, n),
        "levels": randn(b, 4, n, 16),
        "held_out": replace(batch, x=randn(*batch.x.shape)),
    }
    batch = replace(batch, **{name: value for name, value in more.items() if name in needs})
    draw = method.draw(batch, 0, partial(generator, 0))
    return net.double(), method.double(), batch, in_double(draw)


def in_double(values):
    """A batch or draw whose floating-point tensors are float64."""
    return in_precision(values, torch.float64)


def in_single(values):
    """The same in float32."""
    return in_precision(values, torch.float32)


def in_precision(values, dtype):
    tensors = {name: v for name, v in vars(values).items() if isinstance(v, torch.Tensor)}
    return replace(values, **{name: v.to(dtype) for name, v in tensors.items() if v.is_floating_point()})
