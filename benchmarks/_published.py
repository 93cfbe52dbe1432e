"""Steps of the published sizes: recipes on ImageNet's latents, a batch of noise for each, and FLOPs counted without computing."""

from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.sit import SIZES
from maskalign_lab.maskalign import MaskAlign, count_kept
from maskalign_lab.runs.experiments import blank_batch
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import Recipe
from maskalign_lab.runs.run import build
from maskalign_lab.runs.sizes import DEPTHS
from maskalign_lab.training.methods import Batch, Draw, Method, Plan, State
from maskalign_lab.training.prefetch import to_device

CLASSES, TEACHER, SIDE = 1000, 768, 16  # of ImageNet; DINOv2-B's channels; tokens along a side
LATENTS = Facts(CLASSES, (TEACHER,), channels=4, factor=8)  # of SD-VAE at 256 pixels
PIXELS = Facts(CLASSES, (TEACHER,))  # of JiT
MIXER = 2  # blocks of the mixer, of the whole network


def recipe_for(
    method: str,
    size: str,  # of SIZES
    depth: int | None = None,  # blocks; None: all of them
    batch: int = 1,  # images
    overrides: str = "",  # last of all
) -> Recipe:
    """A published size, or one of fewer blocks in which mixer and aligned depth shrink alike."""
    changes, whole = f"network=SiT-{size}/2", SIZES[size]["depth"]
    if depth not in (None, whole):
        aligned = DEPTHS.get(method, DEPTHS[""])[size]
        at = {"sit": "", "maskalign": "method.inner.depth"}.get(method, "method.depth")
        changes += f" network.depth={depth}"
        changes += f" {at}={max(1, aligned * depth // whole)}" if at else ""
        changes += f" network.mixer_depth={MIXER * depth // whole}" if method == "maskalign" else ""
    more = f"training.batch_size={batch} training.steps=1000000000 data.size=256"
    return make_recipe(method, "paper", overrides=f"{changes} {more} {overrides}")


def facts_of(recipe: Recipe) -> Facts:
    """What its data are like."""
    return PIXELS if recipe.network.name == "jit" else LATENTS


def batch_for(recipe: Recipe, device: str | torch.device = "cpu") -> Batch:
    """One batch of noise with all that the method needs: the time of a step does not depend on what the images show."""
    blank = blank_batch(recipe, facts_of(recipe), SIDE, recipe.network.heads)
    g, b, wanted = generator(0, 0, "benchmark"), recipe.training.batch_size, {"x", *Plan(recipe.method).needs}
    shapes = {f.name: getattr(blank, f.name).shape[1:] for f in fields(blank) if f.name in wanted - {"held_out"}}
    noise = {name: torch.randn(b, *shape, generator=g) for name, shape in shapes.items()}
    return to_device(Batch(y=torch.randint(0, CLASSES, (b,), generator=g), **noise), torch.device(device))


def drop(method: Method, share: float) -> None:
    """Let the next steps of MaskAlign drop this share of the patches; other methods have nothing to drop."""
    if isinstance(method, MaskAlign):
        method.kept = count_kept(method.tokens, share)


@lru_cache
def flops(recipe: Recipe, shares: tuple[float, ...] = (0.0,)) -> list[int]:
    """FLOPs of a step's forward and backward pass, counted without computing anything.

    Attention is counted as its products: the fused kernel computes one of them again, which is no work of the model.
    """
    meta, batch, counted = torch.device("meta"), batch_for(recipe), []
    with meta:
        net, method = build(recipe, facts_of(recipe))
    for share in shares:
        drop(method, share)
        drawn = vars(method.draw(batch, 0, partial(generator, 0)))
        draw = Draw(**{name: value if value is None else value.to(meta) for name, value in drawn.items()})
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            method.loss(State(net, net, 0), to_device(batch, meta), draw).total.backward()
        counted.append(counter.get_total_flops())
    return counted


def numbers(values: Iterable[float]) -> str:
    """As they stand in a line."""
    return " ".join(f"{value:.3f}" for value in values)
