"""A training step with its data over the same step with one batch again and again.

The step is the one of `fit` with REG, its rows are those of ImageNet at 256 pixels: latents of 2 x 4 x 32 x 32 and features of
257 x 768, sixteen bits each, in caches on disk that are made here. Read ahead by a thread, or picked out of the device's
memory, they may cost 5 % of a step at most. The plain way makes the whole batch, as floats, in the thread that trains.

A GPU runs SiT-S and B. A CPU takes seconds for their steps, beside which data are nothing; so it also runs a network whose step
is about as short as on a GPU. There its cores make the floats too, which is part of what data cost on any device.

    python benchmarks/data_path.py [--short] [--device cuda]
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskalign_lab.base.devices import resolve_precision
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.cache_filling import fill
from maskalign_lab.data.caching import Cache
from maskalign_lab.data.datasets import Dataset
from maskalign_lab.runs.batches import Batches
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Plan
from maskalign_lab.training.prefetch import to_device
from maskalign_lab.workbench.benchmarking import Comparison, Ratio, in_turn, ratio, run_script

ONE, PLAIN, AHEAD, DEVICE, BAR = "one batch again", "plain: floats, inline", "ours: ahead", "ours: on the device", 1.05
FACTS = Facts(1000, (768,), channels=4)  # ImageNet's classes, DINOv2-B, latents
ROWS = {"latents": (2, 4, 32, 32), "features": (257, 768)}
SIZES = {"tiny": (64, 1, 1, 64), "S": (384, 12, 6, 2048), "B": (768, 12, 12, 2048)}  # width, depth, heads, projector
PLANS = {  # images, then size -> batch, steps of a round, rounds
    "short": (24, {"tiny": (2, 2, 2)}),
    "cpu": (2048, {"tiny": (64, 8, 7), "S": (2, 2, 3)}),
    "cuda": (4096, {"S": (256, 20, 7), "B": (256, 12, 5)}),
}


def recipe_for(size: str, batch: int) -> Recipe:
    """REG on a network of this size, on 256 tokens."""
    width, depth, heads, inside = SIZES[size]
    network = f"network.width={width} network.depth={depth} network.heads={heads} network.patch_size=2"
    method = f"method.depth={min(4, depth)} method.projector_width={inside}"
    training = f"training.batch_size={batch} training.steps=1000000000"
    return make_recipe("reg", "paper", overrides=f"data.size=32 data.autoencoder='' {network} {method} {training}")


def noise(kind: str, folder: Path, n: int) -> Cache:
    """A cache of noise with rows of ImageNet's size."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.randn(stop - start, *ROWS[kind], generator=generator(0, start, kind)).half()

    return fill(folder / kind, {"made of": "noise"}, n, rows, shard_rows=32, print_every=0)


def dataset_of(n: int) -> Dataset:
    """Labels for n images that nobody looks at."""
    labels = np.arange(n) % FACTS.num_classes
    return Dataset(
        "noise", "train", np.empty((n, 1, 1, 3), np.uint8), labels, tuple(map(str, range(FACTS.num_classes)))
    )


def arms(
    recipe: Recipe, batches: Batches, device: torch.device, leaving: ExitStack
) -> dict[str, Callable[[int], None]]:
    """Trainings that differ in where their batches come from; each does so many steps when it is called."""
    once = to_device(batches(0), device)
    sources = {ONE: lambda step: once, PLAIN: lambda step: batches(step), AHEAD: batches, DEVICE: batches}
    found = {}
    for name, source in sources.items():
        execution = ExecutionConfig(placement="device" if name == DEVICE else "host")
        steps = fit(*build(recipe, FACTS), source, recipe.training, device=str(device), execution=execution)
        leaving.enter_context(closing(steps))
        found[name] = partial(lambda steps, count: [None for _ in islice(steps, count)], steps)
    return found


def verdict(time: Ratio) -> str:
    """Whether a ratio is within the bar, as far as its interval tells."""
    decided = "within" if time.high <= BAR else "not within" if time.low > BAR else "undecided about"
    return f"{time.median:.3f} [{time.low:.3f}, {time.high:.3f}] of the time with one batch, {decided} {BAR}"


def whole_step(size: str, caches: dict[str, Cache], plan: tuple[int, int, int], device: torch.device) -> Comparison:
    """Steps with data and without."""
    batch, count, rounds = plan
    recipe, n = recipe_for(size, batch), len(caches["latents"])
    batches = Batches(dataset_of(n), recipe.training, Plan(recipe.method), FACTS, (caches["features"],))
    batches.latents = caches["latents"]
    with ExitStack() as leaving:
        ways = arms(recipe, batches, device, leaving)
        seconds = in_turn({name: partial(way, count) for name, way in ways.items()}, rounds, device, 1)
    seconds = {name: [each / count for each in times] for name, times in seconds.items()}
    notes = [f"{name}: {verdict(ratio(seconds[name], seconds[ONE]))}" for name in (PLAIN, AHEAD, DEVICE)]
    facts = {"batch": batch, "images": n, "precision": resolve_precision("auto", device)}
    return Comparison(f"step with data, {size}", seconds, ONE, facts, notes)


def rows_alone(cache: Cache, batch: int, rounds: int) -> Comparison:
    """The rows of a batch in memory that is fresh, and in memory that was used before."""
    index = torch.randint(0, len(cache), (batch,), generator=generator(0, 0, "rows"))
    out = torch.zeros(batch, *cache.shape[1:], dtype=cache.dtype)
    assert torch.equal(cache[index], cache.read(index, out))
    ways = {"fresh memory": lambda: cache[index], "a buffer used again": lambda: cache.read(index, out)}
    return Comparison("rows of features alone", in_turn(ways, rounds), "fresh memory", {"rows": batch})


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """Rows, then steps."""
    n, sizes = PLANS["short" if short else "cuda" if device.type == "cuda" else "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        caches = {kind: noise(kind, Path(folder), n) for kind in ROWS}
        rows = rows_alone(caches["features"], 4 if short else 256, 3 if short else 15)
        return [rows] + [whole_step(size, caches, plan, device) for size, plan in sizes.items()]


if __name__ == "__main__":
    run_script(__file__)
