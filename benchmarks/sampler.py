"""Drawing guided samples: the library's sampler against a plain one.

The plain one writes attention out and asks the network twice for a guided velocity. The library takes the fused
kernel and asks once, for a batch of double size. Autocast is shown too; the library leaves it to the caller.

    python benchmarks/sampler.py [--short] [--device cuda]
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from maskalign_lab.diffusion import layers, sampling
from maskalign_lab.diffusion.guidance import Field
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script

PLAIN, OURS = "plain: attention written out, two calls", "ours: SDPA, one call"


def written_out(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:  # (b, heads, n, head_dim) each
    """Attention as two products and a softmax."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v


class TwoCalls(Field):
    """Guidance by two calls of the network."""

    def __call__(self, x: Tensor, t: float, began: float | None = None) -> Tensor:
        null = torch.full_like(self.y, self.net.num_classes)
        conditional, unconditional = (self._velocity(x, t, y)[0] for y in (self.y, null))
        return unconditional + self.config.guidance * (conditional - unconditional)


def drawer(
    net: nn.Module,
    y: Tensor,  # (b,)
    config: SamplerConfig,
    attend: Callable | None = None,  # None: as the library chooses
    field: type[Field] = Field,
    bfloat16: bool = False,  # autocast
) -> Callable[[], Tensor]:
    """Draws the samples in one of the ways."""

    def draw() -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(patch.object(layers, "attend", attend or layers.attend))
            stack.enter_context(patch.object(sampling, "Field", field))
            stack.enter_context(torch.autocast(y.device.type, torch.bfloat16, enabled=bfloat16))
            return last_sample(net, Objective(), y, config)

    return draw


def trained_looking(short: bool, device: torch.device) -> nn.Module:
    """The network of the preset with random weights everywhere, also where training starts from zero."""
    preset = "smoke" if short else "gpu" if device.type == "cuda" else "laptop"
    net, _ = build(make_recipe("sit", preset), Facts(10))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.to(device).eval().requires_grad_(False)


def check(ways: dict[str, Callable[[], Tensor]]) -> float:
    """The largest difference between the samples of the float32 ways, relative to their size."""
    exact, *others = [draw() for name, draw in ways.items() if "bfloat16" not in name]
    error = max((other - exact).abs().max() / exact.abs().max() for other in others).item()
    if not error < 1e-3:
        raise AssertionError(f"two ways to sample differ by {error:.1e}")
    return error


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """One arm for each ingredient."""
    net, n = trained_looking(short, device), 4 if short else 512 if device.type == "cuda" else 8
    y = torch.arange(n, device=device) % 10
    make = partial(drawer, net, y, SamplerConfig("heun", steps=2 if short else 4, guidance=2.0))
    ways = {
        PLAIN: make(written_out, TwoCalls),
        "SDPA, two calls": make(None, TwoCalls),
        "attention written out, one call": make(written_out),
        OURS: make(),
        "bfloat16 autocast, SDPA, one call": make(bfloat16=True),
        "bfloat16 autocast, written out, one call": make(written_out, bfloat16=True),
    }
    facts = {"images": n, "difference": f"{check(ways):.0e}"}
    return [Comparison("guided sampling", in_turn(ways, 3 if short else 9, device, 1), PLAIN, facts)]


if __name__ == "__main__":
    run_script(__file__)
