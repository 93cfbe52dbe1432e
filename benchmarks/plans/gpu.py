"""What is measured on a GPU that is lent for minutes: `maskalign-lab bench gpu`, on a CPU with `--short`.

Every part stands alone and says how long it takes; the command goes on where an earlier call ended. Throughput is told in
images and model operations a second, as shares of the rate at which this device multiplies matrices and of its datasheet,
beside a plain eager step of the same process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _published import batch_for, facts_of, recipe_for
from masked_step import whole_step
from side_by_side import compiled
from training_step import fit_step, plain_step

from maskalign_lab.base import paths
from maskalign_lab.runs.estimates import GPUS
from maskalign_lab.runs.experiments import step_flops
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.training.methods import layers_of
from maskalign_lab.workbench.benchmark_plan import Part
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, measure_of

PLAIN = "plain: eager, bfloat16, foreach AdamW"
METHODS = ("sit", "reg", "maskalign", "repa", "ahpa")
SECONDS = {"S": 10, "B": 12, "XL": 22}  # of a method's part: building, compiling, and the steps
STEPS = {"S": 10, "B": 5, "XL": 2, "JiT-B/16": 3}  # that follow each other without waiting, as in a training


def peak(device: torch.device) -> float | None:
    """TFLOP/s of the datasheet, if it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((round(1e-12 * gpu.peak) for model, gpu in GPUS.items() if model in name), None)


def batch_size(size: str, device: torch.device) -> int:
    """Images of a step: the papers' 256, or what fits beside a plain step's memory."""
    if device.type == "cpu":
        return 2
    large = torch.cuda.get_device_properties(device).total_memory > 100e9
    return {"XL": 128 if large else 64, "JiT-B/16": 128}.get(size, 256)


def short_of(recipe: Recipe) -> str:
    """Overrides that leave a network of two blocks."""
    aligned = "method" + ".inner" * (len(layers_of(recipe.method)) - 1)
    small = {"depth": 1, "projector_width": 64}
    more = [f"{aligned}.{name}={v}" for name, v in small.items() if hasattr(layers_of(recipe.method)[-1], name)]
    more += ["network.context_start=1"] if recipe.network.name == "jit" else []
    return " ".join(["network.width=48 network.heads=2 network.depth=2", *more])


# ---- what the device can do


@torch.no_grad()
def matmul_rate(n: int, device: torch.device) -> list[float]:
    """Seconds of products of two bfloat16 matrices, ten in a row."""
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return [t / 10 for t in in_turn({"": lambda: [x @ y for _ in range(10)]}, 7, device)[""]]


def ceilings(short: bool, device: torch.device) -> list[Comparison]:
    """Products of matrices, copies in memory, and what a launch costs the host."""
    n, big = (256, 2**20) if short else (8192, 2**31)
    source = torch.zeros(big, dtype=torch.uint8, device=device)
    target, tiny = torch.empty_like(source), torch.zeros(1, device=device)
    ways = {"copy": lambda: target.copy_(source), "1,000 launches": lambda: [tiny.add_(1) for _ in range(1000)]}
    seconds = {"matmul": matmul_rate(n, device)} | in_turn(ways, 7, device)
    rate, copied, launch = (float(np.median(times)) for times in seconds.values())
    notes = [
        f"matmul of {n}: {2e-12 * n**3 / rate:.4g} TFLOP/s, datasheet {peak(device) or 'unknown'}",
        f"copy: {2e-9 * big / copied:.4g} GB/s read and written; a launch costs the host {1e3 * launch:.3g} us",
    ]
    return [Comparison("what the device can do", seconds, "matmul", {"n": n}, notes)]


# ---- steps


def in_a_row(step: Callable[[], object], n: int) -> Callable[[], None]:
    """Steps that follow each other without waiting for the device."""

    def work() -> None:
        for _ in range(n):
            step()

    return work


def steps_of(title: str, recipe: Recipe, size: str, short: bool, device: torch.device) -> list[Comparison]:
    """A step of `fit` with compiled blocks beside a plain eager one."""
    n, batch, facts = 1 if short else STEPS[size], batch_for(recipe, device), facts_of(recipe)
    bfloat16 = device.type == "cuda"
    arms = {
        PLAIN if bfloat16 else PLAIN.replace("bfloat16", "float32"): plain_step(recipe, batch, bfloat16, facts=facts),
        "ours: fit": fit_step(recipe, batch, "off" if short else "blocks", facts),
    }
    if size in "SB" and recipe.method.name in ("repa", "maskalign") and not short:
        arms["ours: fit, whole loss compiled"] = fit_step(recipe, batch, "whole", facts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = in_turn({name: in_a_row(step, n) for name, step in arms.items()}, 3 if short else 5, device)
    seconds = {name: [t / n for t in times] for name, times in found.items()}
    notes = rates(recipe, seconds, device)
    if device.type == "cuda":
        notes.append(f"peak of all ways together: {torch.cuda.max_memory_allocated() / 1e9:.0f} GB")
    return [Comparison(title, seconds, next(iter(arms)), {"batch": len(batch.x), "steps in a row": n}, notes)]


def rates(recipe: Recipe, seconds: dict[str, list[float]], device: torch.device) -> list[str]:
    """Images and operations a second of each way, as shares of what the device can do."""
    each, matmul, notes = step_flops(recipe, facts_of(recipe)), 2e-12 * 8192**3, []
    measured = matmul / float(np.median(matmul_rate(8192, device))) if device.type == "cuda" else None
    for way, times in seconds.items():
        images = recipe.training.batch_size / float(np.median(times))
        rate = 1e-12 * images * each
        shares = [
            f"{rate / top:.1%} of the {name}"
            for name, top in (("matmul rate", measured), ("datasheet", peak(device)))
            if top
        ]
        notes.append(f"{way}: " + ", ".join([f"{images:.4g} images/s", f"{rate:.4g} TFLOP/s", *shares]))
    return notes


def published(method: str, size: str, short: bool, device: torch.device) -> list[Comparison]:
    """A method at a published size."""
    recipe = recipe_for(method, size, batch=batch_size(size, device))
    if short:
        recipe = recipe_for(method, size, overrides=short_of(recipe), batch=2)
    return steps_of(f"step of {method}, SiT-{size}/2", recipe, size, short, device)


def jit(short: bool, device: torch.device) -> list[Comparison]:
    """JiT-B/16 on pixels."""
    size = "JiT-B/16"
    more = f"training.second_ema=None training.batch_size={batch_size(size, device)} training.steps=1000000000"
    recipe = make_recipe("jit", "paper", overrides=more)
    if short:
        recipe = make_recipe("jit", "paper", overrides=f"{more} {short_of(recipe)}")
    return steps_of("step of JiT-B/16", recipe, size, short, device)


def masked(size: str, short: bool, device: torch.device) -> list[Comparison]:
    """MaskAlign's step over REG's at each ratio, beside the ratio of their operations."""
    depth, n = {"S": 12, "B": 12, "XL": 28}[size], batch_size(size, device)
    return [whole_step(size, *((2, 1) if short else (depth, n)), 3 if short else 7, device)]


# ---- the tests, and a training as a user starts it


def tests(short: bool, device: torch.device) -> list[Comparison]:
    """What only a GPU can be asked; without one every test is skipped."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", *([] if short else ["-n", "6"])]
    began = time.perf_counter()
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=paths.clone(), env=env)
    if done.returncode not in (0, 5):  # 5: nothing was collected
        raise AssertionError(done.stdout[-3000:])
    told = done.stdout.strip().splitlines()[-1]
    return [Comparison("tests/test_gpu.py", {"pytest": [time.perf_counter() - began]}, "pytest", notes=[told])]


def interrupted(short: bool, device: torch.device) -> list[Comparison]:
    """A training is told to stop as a cluster does it, and goes on by the same command."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        more = (
            ["training.steps=60", "training.log_every=5"]
            if short
            else ["training.steps=3000", "training.log_every=50", "data.n=4096"]
        )
        words = [sys.executable, "-m", "maskalign_lab.cli", "train", "repa", "--preset", "smoke" if short else "gpu"]
        words += ["--device", device.type, "--out", str(run), *more]
        seconds = [stopped(words, run / "log.jsonl"), whole(words)]
        log = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    every = 5 if short else 50
    if log != list(range(every, log[-1] + 1, every)):
        raise AssertionError(f"the log has gaps or doubles: {log}")
    title = "a training that is stopped and goes on"
    return [
        Comparison(
            title, {"until it had stopped": seconds[:1], "the rest": seconds[1:]}, "the rest", {"steps": log[-1]}
        )
    ]


def stopped(words: list[str], log: Path) -> float:
    """Start, send SIGTERM once the training logs, and wait; seconds."""
    began = time.perf_counter()
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while run.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        run.send_signal(signal.SIGTERM)
    said = run.communicate()[0]
    if run.returncode != 75:
        raise AssertionError(f"SIGTERM: expected exit code 75, got {run.returncode}\n{said[-2000:]}")
    return time.perf_counter() - began


def whole(words: list[str]) -> float:
    """Run to the end; seconds."""
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - began


# ---- the plan


def parts(short: bool, device: torch.device) -> list[Part]:
    """In the order of their worth; with little work the sizes do not differ."""
    sizes, scripts = ["S"] if short else list(SECONDS), {"gradient_norms": 10, "data_path": 25, "sampler": 25}

    def of(method: str) -> list[Part]:
        return [Part(f"{method} {s}", SECONDS[s], partial(published, method, s, short, device)) for s in sizes]

    return [
        Part("ceilings", 10, partial(ceilings, short, device)),
        *(part for method in METHODS[:3] for part in of(method)),
        Part("tests", 70, partial(tests, short, device)),
        Part("interrupted", 40, partial(interrupted, short, device)),
        *(Part(name, seconds, partial(measure_of(name), short, device)) for name, seconds in scripts.items()),
        *(Part(f"masked {s}", 2 * SECONDS[s], partial(masked, s, short, device)) for s in sizes),
        Part("side by side", 12, partial(measure_of("side_by_side"), short, device)),
        Part("side by side, compiled", 22, partial(compiled, short, device)),
        Part("jit", 18, partial(jit, short, device)),
        *(part for method in METHODS[3:] for part in of(method)),
    ]
