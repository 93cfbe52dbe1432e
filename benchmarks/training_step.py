"""A training step of REPA and of JiT: what `fit` does against a plain one, and each ingredient on its own.

The plain step is how one writes it first, and how the published trainers do it: float32, eager, attention by
`scaled_dot_product_attention`, AdamW with foreach kernels, the averaged weights moved by a loop over tensors.
Both have the same network, batch, random draws and gradient clipping. JiT's step also tells images and operations
a second: on a GPU of B/16 at 256 pixels, in batches of 128, on a CPU of the laptop's size.

    python benchmarks/training_step.py [--short] [--device cuda]
    COMPILED=1 python benchmarks/training_step.py      # with a compiled arm; half a minute more on a CPU
"""

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from maskalign_lab.base.averaging import update_ema
from maskalign_lab.base.devices import resolve_precision
from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion import layers
from maskalign_lab.diffusion.layers import attend
from maskalign_lab.runs.experiments import step_flops
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Batch, Method, State
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script

PLAIN, OURS, COMPILED = "plain: float32, foreach AdamW, looped EMA", "ours: what fit does", "ours, blocks compiled"
CLASSES, TEACHER = 10, 192  # of the data; channels of the teacher's features
FACTS = Facts(CLASSES, (TEACHER,))


def recipe_for(short: bool, device: torch.device, name: str = "repa") -> Recipe:
    """The small network of the shipped runs; on a GPU one that keeps it busy, of JiT its B/16."""
    large, more = ("paper", " training.batch_size=128 training.second_ema=None") if name == "jit" else ("gpu", "")
    preset = "smoke" if short else large if device.type == "cuda" else "laptop"
    return make_recipe(name, preset, overrides="training.steps=1000000000" + (more if preset == "paper" else ""))


def batch_for(recipe: Recipe, device: torch.device) -> Batch:
    """One batch of noise: the time of a step does not depend on what the images show."""
    g, b, size = generator(0, 0, "benchmark"), recipe.training.batch_size, recipe.data.size
    tokens = (size // recipe.network.patch_size) ** 2
    x, features = torch.randn(b, 3, size, size, generator=g), torch.randn(b, tokens, TEACHER, generator=g)
    y = torch.randint(0, CLASSES, (b,), generator=g)
    return Batch(x.to(device), y.to(device), features.to(device))


# ---- the plain step, with switches


def looped_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """The usual loop of trainers: by name, two kernels for each tensor."""
    averaged = dict(ema.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            averaged[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0, sees: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's kernel, whatever the library would choose."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=dropout)


@contextmanager
def attention(written_out: bool):
    """Attention as the library chooses it, or always by the fused kernel."""
    with patch.object(layers, "attend", attend if written_out else fused):
        yield


def plain_step(
    recipe: Recipe,
    batch: Batch,
    bfloat16: bool = False,  # autocast
    written_out: bool = False,  # attention as two products and a softmax, where `attend` thinks it pays
    fused: bool = False,  # AdamW in one kernel
    foreach: bool = False,  # EMA in one call
    facts: Facts = FACTS,  # of the data
) -> Callable[[], None]:
    """A step with some ingredients."""
    device, (model, method) = batch.x.device, build(recipe, facts)
    model, method = model.to(device), method.to(device)
    ema, config, count = copy.deepcopy(model).requires_grad_(False), recipe.training, [0]
    learned = [p for m in (model, method) for p in m.parameters() if p.requires_grad]
    kernels = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.AdamW(
        learned, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, **kernels
    )
    averaged, current = list(ema.parameters()), list(model.parameters())

    def step() -> None:
        with attention(written_out):
            loss_of(method, model, ema, batch, count[0], bfloat16).backward()
        nn.utils.clip_grad_norm_(learned, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if foreach:
            update_ema(averaged, current, config.ema, count[0])
        else:
            looped_ema(ema, model, config.ema)
        count[0] += 1

    return step


def loss_of(method: Method, model: nn.Module, ema: nn.Module, batch: Batch, step: int, bfloat16: bool) -> torch.Tensor:
    """The loss of one step."""
    device = batch.x.device
    draw = method.draw(batch, step, partial(generator, 0, device=device))
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return method.loss(State(model, ema, step), batch, draw).total


def fit_step(recipe: Recipe, batch: Batch, compile: str = "off", facts: Facts = FACTS) -> Callable[[], object]:
    """The library's own step: the next one of `fit`, with all that it watches."""
    model, method = build(recipe, facts)
    steps = fit(model, method, lambda step: batch, recipe.training, None, str(batch.x.device), ExecutionConfig(compile))
    return partial(next, steps)


# ---- comparisons


def speed(recipe: Recipe, n: int, seconds: list[float]) -> str:
    """Images and operations a second of steps with n images; the card's peak beside the latter is their share of it."""
    images = n / np.median(seconds)
    return f"ours: {images:.4g} images/s, {1e-12 * images * step_flops(recipe, FACTS):.3g} TFLOP/s"


def jit_step(short: bool, device: torch.device, rounds: int, compiled: bool) -> Comparison:
    """The same of JiT."""
    recipe = recipe_for(short, device, "jit")
    batch = batch_for(recipe, device)
    found = whole_step(recipe, batch, rounds, compiled)
    sizes = found.facts | {"pixels": recipe.data.size, "patch": recipe.network.patch_size}
    notes = [speed(recipe, len(batch.x), found.seconds[OURS])]
    return replace(found, title="training step of JiT", facts=sizes, notes=notes)


def whole_step(recipe: Recipe, batch: Batch, rounds: int, compiled: bool) -> Comparison:
    """One ingredient after the other, up to what `fit` does."""
    device = batch.x.device
    arms = {PLAIN: plain_step(recipe, batch)}
    chosen = {}
    if resolve_precision(recipe.training.precision, device) == "bfloat16":
        chosen["bfloat16"] = True
        arms["+ bfloat16 autocast"] = plain_step(recipe, batch, **chosen)
    if chosen and device.type == "cpu":
        chosen["written_out"] = True
        arms["+ attention written out"] = plain_step(recipe, batch, **chosen)
    arms["+ fused AdamW"] = plain_step(recipe, batch, **chosen, fused=True)
    arms["+ foreach EMA"] = plain_step(recipe, batch, **chosen, fused=True, foreach=True)
    arms[OURS] = fit_step(recipe, batch)
    if compiled:
        arms[COMPILED] = fit_step(recipe, batch, "blocks")
    sizes = {"width": recipe.network.width, "depth": recipe.network.depth, "batch": len(batch.x)}
    return Comparison("training step", in_turn(arms, rounds, device), PLAIN, sizes)


def optimizer_alone(recipe: Recipe, device: torch.device, rounds: int) -> Comparison:
    """AdamW's kernels on the network's own tensors."""

    def stepper(**kernels: bool) -> Callable[[], None]:
        model = build(recipe, FACTS)[0].to(device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **kernels).step

    arms = {"foreach": stepper(foreach=True), "loop": stepper(foreach=False), "fused": stepper(fused=True)}
    return Comparison("AdamW alone", in_turn(arms, rounds, device), "foreach")


def ema_alone(recipe: Recipe, device: torch.device, rounds: int) -> Comparison:
    """Moving the averaged weights."""
    model, ema = (build(recipe, FACTS)[0].to(device) for _ in range(2))
    lists = [p.data for p in ema.parameters()], [p.data for p in model.parameters()]
    arms = {"looped": partial(looped_ema, ema, model, 0.999), "foreach": partial(update_ema, *lists, 0.999, 10**6)}
    return Comparison("EMA alone", in_turn(arms, rounds, device), "looped")


def attention_alone(recipe: Recipe, batch: Batch, rounds: int) -> Comparison:
    """Attention forward and backward in both precisions, as one fused kernel and written out."""
    device, net = batch.x.device, recipe.network
    shape = len(batch.x), net.heads, batch.features.shape[1], net.width // net.heads

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v

    def both_ways(function: Callable, dtype: torch.dtype) -> Callable[[], None]:
        qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        return lambda: function(*qkv).sum().backward()

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    arms = {f"{name}, SDPA": both_ways(fused, dtype) for name, dtype in kinds.items()}
    arms |= {f"{name}, written out": both_ways(written_out, dtype) for name, dtype in kinds.items()}
    sizes = {"heads": net.heads, "tokens": shape[2]}
    return Comparison("attention alone, both ways", in_turn(arms, rounds, device), "float32, SDPA", sizes)


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """The whole steps, then the parts of REPA's."""
    recipe = recipe_for(short, device)
    batch, rounds, parts = batch_for(recipe, device), 3 if short else 9, 3 if short else 40
    compiled = bool(os.environ.get("COMPILED"))
    return [
        whole_step(recipe, batch, rounds, compiled),
        jit_step(short, device, rounds, compiled),
        optimizer_alone(recipe, device, parts),
        ema_alone(recipe, device, parts),
        attention_alone(recipe, batch, parts),
    ]


if __name__ == "__main__":
    run_script(__file__)
