"""A training step of MaskAlign against one of REG, at the widths of SiT-S, B and XL and 256 tokens.

MaskAlign drops a share of the patches behind a mixer of two blocks. The step is the one of `fit`, with the projector
on the tokens that stay. Its time over REG's is told beside the ratio of the FLOPs, which PyTorch counts on the
forward and backward pass of the same step: the aim is at most 0.04 more than that ratio.

A GPU runs the published sizes, a CPU S and B whole and XL at half its depth with half its mixer, in small batches; the
FLOP ratio of the whole network is counted without running it. Memory, estimated: 80 GB on a GPU, 16 GB on a CPU.

    python benchmarks/masked_step.py [--short] [--device cuda]
"""

from collections.abc import Callable
from functools import partial

import torch
from _published import LATENTS, MIXER, SIDE, TEACHER, batch_for, drop, flops, numbers, recipe_for
from torch import Tensor

from maskalign_lab.base.devices import resolve_precision
from maskalign_lab.diffusion.sit import SIZES
from maskalign_lab.maskalign import count_kept
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Batch
from maskalign_lab.training.repa import cosine_alignment, projector
from maskalign_lab.workbench.benchmarking import Comparison, Ratio, in_turn, ratio, run_script

REG, RATIOS, BAR = "REG, all tokens", (0.0, 0.25, 0.5, 0.75), 0.04
INSIDE = 2048  # the projector
PLANS = {  # size -> blocks, batch
    "short": {"S": (2, 1)},
    "cpu": {"S": (12, 4), "B": (12, 4), "XL": (14, 4)},
    "cuda": {"S": (12, 256), "B": (12, 256), "XL": (28, 64)},
}


# ---- FLOPs


def flop_ratios(size: str, depth: int | None = None) -> dict[float, float]:
    """MaskAlign's FLOPs over REG's for each ratio of dropped patches."""
    (reg,) = flops(recipe_for("reg", size, depth))
    return {share: n / reg for share, n in zip(RATIOS, flops(recipe_for("maskalign", size, depth), RATIOS))}


def by_hand(size: str, share: float) -> float:
    """The same of a whole network on paper: 12 d^2 + 2 n d products for each token in a block of n, and the projector."""
    d, depth = SIZES[size]["width"], SIZES[size]["depth"]
    tokens, kept = 1 + SIDE**2, 1 + count_kept(SIDE**2, share)  # and the class token

    def blocks(n: int) -> int:
        return n * (12 * d**2 + 2 * n * d)

    mlp = INSIDE * (d + INSIDE + TEACHER)
    return (MIXER * blocks(tokens) + depth * blocks(kept) + kept * mlp) / (depth * blocks(tokens) + tokens * mlp)


# ---- time


def stepper(recipe: Recipe, batch: Batch) -> Callable[[float], object]:
    """The next step of `fit` that drops a share. All shares use one network, since a step's time does not depend on weights."""
    device, (model, method) = batch.x.device, build(recipe, LATENTS)
    execution = ExecutionConfig(
        "blocks" if device.type == "cuda" else "off"
    )  # one compilation for each number of tokens
    steps = fit(model, method, lambda step: batch, recipe.training, None, str(device), execution)

    def step(share: float) -> object:
        drop(method, share)
        return next(steps)

    return step


def verdict(time: Ratio, flop: float) -> str:
    """Whether the time ratio is within the bar, as far as its interval tells."""
    decided = "within" if time.high <= flop + BAR else "not within" if time.low > flop + BAR else "undecided about"
    return f"{time.median - flop:+.3f}, {decided} {BAR}"


def told(seconds: dict[str, list[float]], ratios: dict[float, float]) -> list[str]:
    """Time beside FLOPs, a line for each ratio."""
    lines = []
    for share, flop in ratios.items():
        time = ratio(seconds[way(share)], seconds[REG])  # this way over REG
        found = f"{time.median:.3f} [{time.low:.3f}, {time.high:.3f}] of REG's time"
        lines.append(f"ratio {share:.2f}: {found}, {flop:.3f} of its FLOPs: {verdict(time, flop)}")
    return lines


def way(share: float) -> str:
    """The name of an arm."""
    return f"MaskAlign, ratio {share:.2f}"


def whole_step(size: str, depth: int, n: int, rounds: int, device: torch.device) -> Comparison:
    """Steps of REG and of MaskAlign with each ratio."""
    recipes = [recipe_for(name, size, depth, n) for name in ("reg", "maskalign")]
    reg, masked = (stepper(recipe, batch_for(recipe, device)) for recipe in recipes)
    seconds = in_turn({REG: partial(reg, 0)} | {way(r): partial(masked, r) for r in RATIOS}, rounds, device, 1)
    whole = flop_ratios(size)
    ran = whole if depth == SIZES[size]["depth"] else flop_ratios(size, depth)
    of = f"FLOP ratios of the whole SiT-{size}/2"
    paper = f"{of}: {numbers(whole.values())}; on paper {numbers(by_hand(size, r) for r in RATIOS)}"
    network = {name: getattr(recipes[1].network, name) for name in ("width", "depth", "mixer_depth")}
    facts = network | {"batch": n, "tokens": SIDE**2, "precision": resolve_precision("auto", device)}
    return Comparison(f"masked step, SiT-{size}", seconds, REG, facts, [*told(seconds, ran), paper])


def projector_alone(size: str, n: int, rounds: int, device: torch.device) -> Comparison:
    """The projector with its loss, both ways, on all tokens and on those that stay."""
    width = SIZES[size]["width"]
    mlp = projector(width, INSIDE, TEACHER).to(device)
    bfloat16 = resolve_precision("auto", device) == "bfloat16"

    def both_ways(hidden: Tensor, features: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = cosine_alignment(mlp(hidden), features).mean()
        loss.backward()

    def on(tokens: int) -> Callable[[], None]:
        hidden = torch.randn(n, tokens, width, device=device, requires_grad=True)
        return partial(both_ways, hidden, torch.randn(n, tokens, TEACHER, device=device))

    all_tokens, kept = f"all {1 + SIDE**2} tokens", {r: 1 + count_kept(SIDE**2, r) for r in RATIOS[1:]}
    arms = {all_tokens: on(1 + SIDE**2)} | {f"{k} kept, ratio {r:.2f}": on(k) for r, k in kept.items()}
    share = 6 * (1 + SIDE**2) * INSIDE * (width + INSIDE + TEACHER) / flops(recipe_for("reg", size))[0]
    notes = [f"on all tokens it is {share:.1%} of the FLOPs of the whole SiT-{size}/2's REG step"]
    return Comparison(f"projector alone, SiT-{size}", in_turn(arms, rounds, device), all_tokens, {"batch": n}, notes)


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """Steps, then projectors."""
    plan = PLANS["short" if short else "cuda" if device.type == "cuda" else "cpu"]
    rounds, parts = (
        (2, 2) if short else (9, 15) if device.type == "cuda" else (6, 9)
    )  # a step of XL takes seconds there
    steps = [whole_step(size, *sizes, rounds, device) for size, sizes in plan.items()]
    return steps + [projector_alone(size, n, parts, device) for size, (_, n) in plan.items()]


if __name__ == "__main__":
    run_script(__file__)
