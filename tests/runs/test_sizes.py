"""Networks by the field's names, anywhere among the overrides."""

import shlex

import pytest
import torch

from maskalign_lab.diffusion import jit
from maskalign_lab.runs.experiments import Arm, blank_step
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import override
from maskalign_lab.runs.requests import checked_overrides
from maskalign_lab.runs.sizes import FAMILIES, NAMES
from maskalign_lab.training_commands import Train
from maskalign_lab.workbench.commands import parse

LATENTS, PIXELS = Facts(1000, (768,), channels=4, factor=8), Facts(1000, (768,))
SIZE = ("width", "depth", "heads", "patch_size")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_network_that_was_published(name):
    recipe = make_recipe("jit" if name.startswith("JiT") else "sit", "paper", overrides=f"network={name}")
    published = FAMILIES[name.partition("-")[0].lower()].published_size(name)
    own = {field: getattr(recipe.network, field) for field in published if field != "input_size"}
    assert own == {field: value for field, value in published.items() if field != "input_size"}
    if name.startswith("JiT"):
        assert recipe.data.size == published["input_size"] and recipe.objective.noise_scale == recipe.data.size / 256
    assert override(recipe, f"network={name}") == recipe


@pytest.mark.parametrize(
    ("name", "millions"),
    [("SiT-S/2", 32.96), ("SiT-B/2", 130.51), ("SiT-L/2", 458.10), ("SiT-XL/2", 675.13)]
    + [("JiT-B/16", 131.3), ("JiT-L/16", 459.1), ("JiT-H/16", 952.8)],
)
def test_parameters_are_those_of_the_official_code(name, millions):
    method, facts, more = (
        ("jit", PIXELS, "") if name.startswith("JiT") else ("sit", LATENTS, " network.learn_sigma=true")
    )
    net = blank_step(make_recipe(method, "paper", overrides=f"network={name}{more}"), facts).net
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=5e-4)


@pytest.mark.parametrize(
    ("method", "size", "depth"),
    [("repa", "SiT-B/2", 4), ("repa", "SiT-L/2", 8), ("reg", "SiT-XL/2", 8), ("irepa", "SiT-B/2", 4)]
    + [("irepa", "JiT-B/16", 4), ("ahpa", "SiT-B/2", 3), ("ahpa", "SiT-XL/2", 7), ("sra2", "SiT-B/2", 2), ("sra2", "SiT-L/2", 8)],
)  # fmt: skip
def test_the_aligned_depth_follows(method, size, depth):
    assert make_recipe(method, "paper", overrides=f"network={size}").method.depth == depth


def test_it_follows_within_another_method_and_for_hastes_blocks():
    masked = make_recipe("maskalign", "paper", overrides="network=SiT-B/2")
    assert masked.method.inner.depth == 4 and masked.network.mixer_depth == 2
    wrapped = make_recipe("maskalign", "paper", overrides="network=SiT-B/2 method.inner.name=sra2")
    assert wrapped.method.inner.depth == 2
    haste = make_recipe("haste", "paper", overrides="network=SiT-B/2").method
    assert (haste.depth, haste.student_blocks) == (4, (1, 2, 3, 4))
    small = make_recipe("haste", overrides="network=SiT-B/4").method  # of the tiny teacher two blocks are aligned
    assert (small.student_blocks, small.teacher_blocks) == ((3, 4), (4, 5))


def test_what_is_said_besides_wins_wherever_it_stands():
    said = "network.depth=6 method.depth=3 network.heads=8"
    for overrides in (f"{said} network=SiT-B/2", f"network=SiT-B/2 {said}"):
        recipe = make_recipe("repa", "paper", overrides=overrides)
        assert (recipe.network.width, recipe.network.depth, recipe.network.heads, recipe.method.depth) == (768, 6, 8, 3)
    last = make_recipe("repa", "paper", overrides="network=SiT-B/2 network=SiT-L/2").network
    assert (last.width, last.depth) == (1024, 24)


def test_it_stands_wherever_overrides_do():
    typed = parse(Train, ["repa", "network=SiT-B/2", "--preset", "paper"])
    assert make_recipe("repa", "paper", overrides=shlex.join(typed.overrides)).network.width == 768
    assert Arm("large", "repa", "network=SiT-L/2").recipe("paper").network.depth == 24
    assert checked_overrides("network=JiT-B/16 network.bottleneck=64") == "network=JiT-B/16 network.bottleneck=64"


def test_a_folder_of_that_name_is_not_meant(tmp_path, monkeypatch):
    (tmp_path / "SiT-B" / "2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert checked_overrides("network=SiT-B/2") == "network=SiT-B/2"


@pytest.mark.parametrize(
    ("name", "nearest"), [("SiT-XL/3", "SiT-XL/"), ("sit-b/2", "SiT-B/2"), ("JiT-B/8", "JiT-B/"), ("SiT-H/2", "SiT-")]
)
def test_unknown_names_are_refused_with_the_nearest(name, nearest):
    for refused in (lambda: make_recipe(overrides=f"network={name}"), lambda: checked_overrides(f"network={name}")):
        with pytest.raises(ValueError, match=f"unknown network '{name}'. Did you mean '{nearest}"):
            refused()


def test_a_network_of_the_other_family_sees_what_it_was_made_for():
    """REPA on JiT: pixels, 256 tokens on the teacher's grid, and nothing of SiT's is left."""
    recipe = make_recipe("repa", "paper", overrides="network=JiT-B/16")
    blank = blank_step(recipe, PIXELS)
    assert isinstance(blank.net, jit.JiT) and blank.net.side**2 == 256 and blank.net.context_tokens == 32
    assert recipe.data.autoencoder == "" and recipe.method.depth == 4 and recipe.network.qk_norm
    assert blank.losses(0).total.device == torch.device("meta")


def test_sits_patches_on_large_pixels_are_refused():
    with pytest.raises(ValueError, match="128 x 128 tokens, expected at most 32 x 32.*network=JiT-B/16"):
        make_recipe("jit", "paper", overrides="network=SiT-B/2")
    latents = "network=SiT-B/2 data.autoencoder=stabilityai/sd-vae-ft-mse"
    assert make_recipe("jit", "paper", overrides=latents).network.name == "sit"
    assert make_recipe("sit", overrides="network=SiT-S/2").network.patch_size == 2  # of 32 pixels
