"""What two arms share starts alike: weights are drawn by name, whatever else a network or a method has."""

import itertools
from dataclasses import replace

import pytest
import torch

from maskalign_lab.runs.experiments import COMMON
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.studies.ahpa.arms import BASELINES, CHOICES, ROUTED
from maskalign_lab.studies.maskalign.arms import ARMS
from maskalign_lab.studies.prediction_targets.jit_parts import JIT_ARMS

RECIPES = {f"05 {arm.name}": arm.recipe() for arm in ARMS}
RECIPES |= {f"06 {arm.name}": arm.recipe() for arm in (*BASELINES, *ROUTED, *CHOICES)}
RECIPES |= {f"03 {arm.name}": arm.recipe() for arm in JIT_ARMS}
RECIPES["plain JiT"] = make_recipe("jit", overrides="network.context_tokens=0 network.rms_norm=false")


@pytest.fixture(scope="module")
def built():
    latents = replace(COMMON, channels=4, factor=4)
    return {name: build(recipe, latents if recipe.data.autoencoder else COMMON) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("kind", [0, 1], ids=["network", "method"])
def test_modules_that_two_arms_share_start_alike(built, kind):
    first, compared = {}, 0
    for arm, parts in built.items():
        for name, value in parts[kind].state_dict().items():
            if "target mixing" in arm and name.startswith("heads."):
                continue  # its only head is of no level
            other, known = first.setdefault((name, value.shape), (arm, value))
            compared += other != arm
            assert torch.equal(value, known), (arm, other, name)
    assert compared > 100


def test_modules_of_one_network_start_apart(built):
    net, _ = built["05 two blocks behind"]
    weights = [block.attn.qkv.weight for block in net.blocks]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_another_seed_starts_elsewhere():
    first, second = (build(make_recipe("sit", seed=seed), COMMON)[0] for seed in (0, 1))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)
