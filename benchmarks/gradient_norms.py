"""Norms of the alignment gradient at every token: one backward pass for all of them against one for each.

A projector maps tokens one by one, so the gradient of the summed loss at token i is that of token i's own loss.
The naive loop does not use this: it calls `backward()` for every token, which fills the projector's gradients too. A careful
loop asks `autograd.grad` for the token's gradient alone. All must agree, which is checked in float64 before anything is timed.

    python benchmarks/gradient_norms.py [--short] [--device cuda]
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from maskalign_lab.base.seeding import generator
from maskalign_lab.gradient_norms import pulled_back, token_gradient_norms
from maskalign_lab.training.repa import cosine_alignment, projector
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script

TOLERANCE = 1e-10  # of the relative difference in float64
SIZES = {"small": (96, 256, 192, 256), "SiT-B": (768, 2048, 768, 64)}  # width, hidden, teacher, tokens of the loop


def naive(mlp: nn.Module, hidden: Tensor, features: Tensor) -> Tensor:  # (b, n)
    """One forward pass and one `backward()` for each token."""
    norms = torch.empty(hidden.shape[:2], dtype=hidden.dtype, device=hidden.device)
    for at in np.ndindex(*hidden.shape[:2]):
        token = hidden[at].detach().requires_grad_()
        mlp.zero_grad()
        cosine_alignment(mlp(token[None]), features[at][None]).sum().backward()
        norms[at] = token.grad.norm()
    return norms


def careful(mlp: nn.Module, hidden: Tensor, features: Tensor) -> Tensor:  # (b, n)
    """The same loop without the gradients that nobody asked for."""
    norms = torch.empty(hidden.shape[:2], dtype=hidden.dtype, device=hidden.device)
    for at in np.ndindex(*hidden.shape[:2]):
        token = hidden[at].detach().requires_grad_()
        loss = cosine_alignment(mlp(token[None]), features[at][None]).sum()
        norms[at] = torch.autograd.grad(loss, token)[0].norm()
    return norms


def closed(mlp: nn.Module, hidden: Tensor, features: Tensor) -> Tensor:  # (b, n)
    """The closed form at the projector's output, pulled back."""
    return pulled_back(mlp, hidden, features).norm(dim=-1)


def given(name: str, short: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A projector, hidden tokens (b, n, d) and teacher tokens (b, n, z), in float64."""
    width, inside, teacher, tokens = SIZES[name]
    shape = (1, 16) if short else (tokens // 64, 64)
    g = generator(0, 0, "benchmark")
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = projector(width, inside, teacher).double()
    return mlp, draw(*shape, width), draw(*shape, teacher)


def difference(mlp: nn.Module, hidden: Tensor, features: Tensor) -> float:
    """The largest relative difference of any way from the naive loop."""
    exact = naive(mlp, hidden, features)
    return max(
        ((way(mlp, hidden, features) - exact).abs() / exact).max().item()
        for way in (careful, token_gradient_norms, closed)
    )


def compare(name: str, short: bool, device: torch.device) -> Comparison:
    """Check in float64, then time in float32."""
    mlp, hidden, features = given(name, short)
    error = difference(mlp, hidden, features)
    if not error <= TOLERANCE:
        raise AssertionError(f"{name}: the norms differ from the naive loop by {error:.1e}, more than {TOLERANCE}")
    on = [thing.float().to(device) for thing in (mlp, hidden, features)]
    ways = {"naive: backward() for each token": naive, "careful: autograd.grad for each token": careful}
    ways |= {"one backward pass": token_gradient_norms, "closed form": closed}
    seconds = in_turn({way: partial(f, *on) for way, f in ways.items()}, 3 if short else 10, device)
    facts = {"tokens": hidden.shape[0] * hidden.shape[1], "float64 difference": f"{error:.0e}"}
    return Comparison(f"gradient norms, {name} projector", seconds, next(iter(ways)), facts)


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """A small projector and one of SiT-B."""
    return [compare(name, short, device) for name in (["small"] if short else SIZES)]


if __name__ == "__main__":
    run_script(__file__)
