"""A step of several seeds of REPA at once against a step of each, one after the other.

The seeds are stacked, and the loss of all is one call under `torch.func.vmap`: as many kernels as for one seed, with more work
in each. Small networks leave a GPU idle between its kernels, so there the seeds come almost for free; a CPU is busy with one.
Before anything is timed, the losses of the seeds are compared with those of single trainings. The baseline does the step of one
seed as often as there are seeds, which takes as long, since no time depends on the weights.

    python benchmarks/side_by_side.py [--short] [--device cuda]
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import CLASSES, FACTS, TEACHER

from maskalign_lab.base.devices import resolve_precision
from maskalign_lab.base.seeding import generator
from maskalign_lab.runs.building import build
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Batch
from maskalign_lab.training.side_by_side import fit_side_by_side
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script

ONE, ALL = "one after the other", "ours: side by side"
PLANS = {  # preset -> seeds
    "short": {"smoke": 2},
    "cpu": {"smoke": 4, "laptop": 4},
    "cuda": {"laptop": 8, "gpu": 8},
}


def recipes_for(preset: str, seeds: int) -> list[Recipe]:
    """The same training with as many seeds."""
    return [make_recipe("repa", preset, seed=seed, overrides="training.steps=1000000000") for seed in range(seeds)]


def batch_for(recipe: Recipe, device: torch.device) -> Batch:
    """The seed's own batch of noise."""
    g, b, size = generator(recipe.training.seed, 0, "benchmark"), recipe.training.batch_size, recipe.data.size
    tokens = (size // recipe.network.patch_size) ** 2
    x, features = torch.randn(b, 3, size, size, generator=g), torch.randn(b, tokens, TEACHER, generator=g)
    return Batch(x.to(device), torch.randint(0, CLASSES, (b,), generator=g).to(device), features.to(device))


def ways(recipes: list[Recipe], device: torch.device, compile: str) -> dict[str, Callable[[], object]]:
    """The next step of all seeds, in both ways; the losses of the first ones must agree."""
    batches = [(lambda step, batch=batch_for(recipe, device): batch) for recipe in recipes]
    pairs, configs = [build(recipe, FACTS) for recipe in recipes], [recipe.training for recipe in recipes]
    place, execution = str(device), ExecutionConfig(compile)
    together = fit_side_by_side(pairs, batches, configs, None, place, execution)  # with copies of the networks
    found, expected = next(together).losses["denoising"], []
    for pair, batch, config in zip(pairs, batches, configs, strict=True):
        expected.append(next(fit(*pair, batch, config, None, place)).losses["denoising"])
    exact = resolve_precision("auto", device) == "float32"
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4 if exact else 2e-2, atol=1e-4)
    one = fit(*pairs[0], batches[0], configs[0], None, place, execution)
    return {ONE: lambda: [next(one) for _ in recipes], ALL: lambda: next(together)}


class Calls(TorchDispatchMode):
    """Counts the operators that the host calls; those that only look at a tensor otherwise start no kernel."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def calls_of(step: Callable[[], object]) -> int:
    """How many operators a step calls."""
    with Calls() as calls:
        step()
    return calls.count


def seeds_at_once(preset: str, seeds: int, rounds: int, device: torch.device, compile: str = "off") -> Comparison:
    """Steps of all seeds."""
    recipes = recipes_for(preset, seeds)
    steps, net = ways(recipes, device, compile), recipes[0].network
    seconds = in_turn(steps, rounds, device)
    facts = {"seeds": seeds, "width": net.width, "depth": net.depth, "batch": recipes[0].training.batch_size}
    facts |= {"precision": resolve_precision("auto", device)}
    title = f"seeds at once, preset {preset}"
    notes = []
    if compile == "off":
        one, all_seeds = (calls_of(step) for step in steps.values())
        notes = [f"operators that the host calls: {one:,} one after the other, {all_seeds:,} side by side"]
    return Comparison(title, seconds, ONE, facts, notes)


def compiled(short: bool, device: torch.device) -> list[Comparison]:
    """Both ways as one graph each, the small network; with little work they stay eager."""
    found = seeds_at_once("smoke", 2, 3, device) if short else seeds_at_once("laptop", 8, 7, device, "whole")
    return [replace(found, title=f"{found.title}, whole loss compiled")]


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """Eager steps."""
    plan = PLANS["short" if short else "cuda" if device.type == "cuda" else "cpu"]
    return [seeds_at_once(preset, seeds, 3 if short else 9, device) for preset, seeds in plan.items()]


if __name__ == "__main__":
    run_script(__file__)
