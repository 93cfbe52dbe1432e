"""Drawing guided samples: the library's sampler against REPA's, with the same network, steps and guidance.

REPA's sampler as its authors run it: float32, the state in float64, both halves of the guidance in one batch, and the
projector at every step, since it lives inside of their network. Two things are given to it that its scripts do not
do: attention is fused (`generate.py` writes it out unless told otherwise), and the batch is doubled once, not twice.
On a GPU it may use TF32, as there. The library's own ingredients stand beside it, one an arm.

    python benchmarks/sampler.py [--short] [--device cuda]
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from maskalign_lab.base.devices import resolve_precision
from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion import layers, sampling
from maskalign_lab.diffusion.guidance import Field
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.diffusion.sit import Block, SiT, published_size
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.repa import projector
from maskalign_lab.workbench.benchmarking import Comparison, Ratio, in_turn, ratio, run_script

THEIRS, OURS, AIM = "REPA's: float32, projector at every step", "ours", 0.4


# ---- REPA's way


class Upstream(nn.Module):
    """A trained SiT in the modules of its authors: timm's patches and attention, and the projector that trained it."""

    def __init__(self, net: SiT, head: nn.Module, depth: int):
        super().__init__()
        self.net, self.head, self.depth = net, head, depth
        self.patches = PatchEmbed(net.side * net.patch_size, net.patch_size, net.in_channels, net.width)
        self.patches.load_state_dict(net.x_embedder.state_dict())
        self.attention = nn.ModuleList()
        for block in net.blocks:
            self.attention.append(Attention(net.width, block.attn.heads, qkv_bias=True))
            self.attention[-1].load_state_dict(block.attn.state_dict())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # velocity, projected tokens
        net = self.net
        tokens, c = self.patches(x) + net.pos_embed, net.t_embedder(t) + net.y_embedder(y)
        for depth, (block, attention) in enumerate(zip(net.blocks, self.attention), start=1):
            tokens = self.through(block, attention, tokens, c)
            if depth == self.depth:
                projected = self.head(tokens.flatten(0, 1))
        return layers.unpatchify(net.final_layer(tokens, c)[0], net.patch_size), projected

    def through(self, block: Block, attention: nn.Module, tokens: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        tokens = tokens + gate_a * attention(block.norm1(tokens) * (1 + scale_a) + shift_a)
        return tokens + gate_m * block.mlp(block.norm2(tokens) * (1 + scale_m) + shift_m)


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of a GPU in TF32; a CPU does not care."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def upstream_samples(net: Upstream, start: Tensor, y: Tensor, config: SamplerConfig) -> Tensor:
    """REPA's Euler sampler with guidance at all times."""
    x, labels = start.double(), torch.cat([y, torch.full_like(y, net.net.num_classes)])
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64)
    with tf32():
        for t, t_next in zip(times, times[1:]):
            given = torch.cat([x, x])
            at = torch.ones(len(given), device=x.device, dtype=torch.float64) * t
            v, _ = net(given.to(start.dtype), at.to(start.dtype), labels)
            conditional, unconditional = v.double().chunk(2)
            x = x + (t_next - t) * (unconditional + config.guidance * (conditional - unconditional))
    return x.float()


# ---- the library's way, and its ingredients


def fused(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, sees: Tensor | None = None
) -> Tensor:  # (b, heads, n, head_dim) each
    """Attention by PyTorch's kernel in every precision."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=dropout)


class TwoCalls(Field):
    """Guidance by two calls of the network."""

    def __call__(self, x: Tensor, t: float, began: float | None = None) -> Tensor:
        null = torch.full_like(self.y, self.net.num_classes)
        conditional, unconditional = (self._velocity(self.net, x, t, y)[0] for y in (self.y, null))
        return unconditional + self.config.guidance * (conditional - unconditional)


def drawer(
    net: nn.Module,
    y: Tensor,  # (b,)
    config: SamplerConfig,
    start: Tensor | None = None,  # None: the sampler's own noise
    attend: Callable | None = None,  # None: as the library chooses
    field: type[Field] = Field,
) -> Callable[[], Tensor]:
    """Draws the samples in one of the ways."""

    def draw() -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(patch.object(layers, "attend", attend or layers.attend))
            stack.enter_context(patch.object(sampling, "Field", field))
            return last_sample(net, Objective(), y, config, start=start)

    return draw


def trained_looking(short: bool, device: torch.device, published: str = "") -> Upstream:
    """A published SiT, or the preset's, with random weights everywhere, also where training starts from zero."""
    if published:
        net = SiT(**published_size(published))
        head, depth = projector(net.width, 2048, 768), 8 if "XL" in published else 4
    else:
        net, method = build(make_recipe("repa", "smoke" if short else "laptop"), Facts(10, (64,)))
        head, depth = method.projectors[0], method.config.depth
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Upstream(net, head, depth).to(device).eval().requires_grad_(False)


# ---- both


def check(ways: dict[str, Callable[[], Tensor]], bound: float) -> float:
    """The largest difference between the samples of the float32 ways, relative to their size."""
    exact, *others = [draw() for name, draw in ways.items() if "float32" in name]
    error = max((other - exact).abs().max() / exact.abs().max() for other in others).item()
    if not error < bound:
        raise AssertionError(f"two ways to sample differ by {error:.1e}")
    return error


def compare(title: str, upstream: Upstream, n: int, steps: int, rounds: int, device: torch.device) -> Comparison:
    """One arm for each ingredient; the last is what a user gets."""
    net, y, best = upstream.net, torch.arange(n, device=device) % 10, resolve_precision("auto", device)
    side = net.side * net.patch_size
    start = torch.randn(n, net.in_channels, side, side, generator=generator(0, 0, "start")).to(device)
    config = SamplerConfig("euler", steps, guidance=1.8, precision="float32")
    make, rounded = partial(drawer, net, y, config, start), replace(config, precision="bfloat16")
    ways = {
        THEIRS: partial(upstream_samples, upstream, start, y, config),
        "float32, two calls": make(field=TwoCalls),
        "float32": make(),
        "bfloat16, fused attention": drawer(net, y, rounded, start, fused),
        f"{OURS}: {best}": drawer(net, y, replace(config, precision="auto"), start),
    }
    error = check(ways, 1e-2 if device.type == "cuda" else 1e-3)
    seconds = in_turn(ways, rounds, device, 1)
    note = told(ratio(seconds[f"{OURS}: {best}"], seconds[THEIRS]))
    facts = {"images": n, "steps": steps, "difference": f"{error:.0e}"}
    return Comparison(f"guided sampling, {title}", seconds, THEIRS, facts, [note])


def told(share: Ratio) -> str:
    """The share of REPA's time, and whether the whole interval is on one side of the aim."""
    verdict = "within" if share.high <= AIM else "not within" if share.low > AIM else "undecided about"
    return f"ours takes {share.median:.2f} [{share.low:.2f}, {share.high:.2f}] of REPA's time, {verdict} {AIM}"


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """The preset's network, and a published one of a size that the device can bear."""
    preset, n, rounds = ("smoke", 4, 3) if short else ("laptop", 8, 21)
    small = compare(f"preset {preset}", trained_looking(short, device), n, 4, rounds, device)
    if short:
        return [small]
    name, n = ("SiT-XL/2", 64) if device.type == "cuda" else ("SiT-S/2", 2)
    return [small, compare(name, trained_looking(short, device, name), n, 2, 21, device)]


if __name__ == "__main__":
    run_script(__file__)
