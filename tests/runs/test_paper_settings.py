"""What preset `paper` trains: every setting as it is written down in paper_settings.json, and beside a source.

The file is a copy of what the recipes were when they were checked against the papers; a line of it is changed together with its source.
"""

import json
from dataclasses import asdict, fields, is_dataclass

import pytest
from shared.clone import ROOT

from maskalign_lab.runs.paper_settings import SETTINGS, paper_overrides, settings_of
from maskalign_lab.runs.presets import NAMED, make_recipe
from maskalign_lab.runs.recipe import Recipe, override
from maskalign_lab.runs.shared_settings import KNOWN, OURS, SECOND_HAND
from maskalign_lab.runs.sizes import size_overrides
from maskalign_lab.training.methods import INSTALLED

FROZEN = json.loads((ROOT / "tests" / "runs" / "paper_settings.json").read_text())
NAMES = sorted(FROZEN)
ASKED = ("data.name", "training.seed", "training.log_every")  # whoever trains says them
REPA_FAMILY = ("repa", "reg", "maskalign", "haste", "irepa")


def leaves(settings, defaults: bool = False, prefix: str = "") -> dict:
    """Every field of a tree of settings, or its default."""
    found = {}
    for field in fields(settings):
        value, path = getattr(settings, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            found |= leaves(value, defaults, f"{path}.")
        elif path not in ASKED and not path.startswith("execution."):
            found[path] = field.default if defaults else value
    return found


def plain(values: dict) -> dict:
    return json.loads(json.dumps(values))


def tokens(recipe: Recipe) -> int:
    factor = 16 if "RAE" in recipe.data.autoencoder else 8 if recipe.data.autoencoder else 1
    return (recipe.data.size // factor // recipe.network.patch_size) ** 2


def test_every_name_that_a_paper_has_is_here():
    variants = {"mask-loss", "mask-input", "mask-attention"}  # controls of study 05
    ours = {name for name, method in INSTALLED.items() if method.__module__.startswith("maskalign_lab.")}
    assert set(NAMES) == {*ours, *NAMED} - variants == set(SETTINGS) - {""}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_what_was_written_down(name):
    """A field that came later is at its default."""
    recipe = make_recipe(name, "paper")
    found, default = plain(leaves(recipe)), plain(leaves(recipe, defaults=True))
    assert {path: found[path] for path in FROZEN[name]} == FROZEN[name]
    assert {path: value for path, value in found.items() if path not in FROZEN[name]} == {
        path: value for path, value in default.items() if path not in FROZEN[name]
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_field_that_is_no_default_has_its_source(name):
    recipe = make_recipe(name, "paper")
    found, default, told = leaves(recipe), leaves(recipe, defaults=True), settings_of(name, recipe.method)
    size = told["network"].value
    covered = {*told, *(path for path, _ in size_overrides(recipe.method, size) if path.startswith("network."))}
    names = {path for path in found if path.endswith(".name")}  # of the method itself
    assert {path for path in found if found[path] != default[path]} <= covered | names
    assert override(recipe, paper_overrides(name, recipe.method)) == recipe  # and each has the value of the table
    assert all(setting.standing in (KNOWN, SECOND_HAND, OURS) and setting.source for setting in told.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_trains_256_tokens_of_latents_or_pixels(name):
    recipe = make_recipe(name, "paper")
    assert tokens(recipe) == 256 and recipe.data.size == 256
    others = {"jit": "", "dsd": "", "ditdh": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"}
    assert recipe.data.autoencoder == others.get(name, "stabilityai/sd-vae-ft-mse")


@pytest.mark.parametrize("name", NAMES)
def test_what_no_paper_has_is_off(name):
    training = make_recipe(name, "paper").training
    assert not training.ema_ramp and (training.warmup == 0 or name == "jit")
    assert (training.cooldown, training.cooldown_to) == ((0.95, 0.1) if name == "ditdh" else (0, 0))


@pytest.mark.parametrize("name", REPA_FAMILY)
def test_repas_family_trains_alike(name):
    """Batch, rate, average and teacher are one; HASTE alone trains for longer."""
    told, repa = (make_recipe(each, "paper") for each in (name, "repa"))
    assert told.data == repa.data and told.objective == repa.objective
    alike = asdict(told.training) | ({"steps": repa.training.steps} if name == "haste" else {})
    assert alike == asdict(repa.training)


def test_controls_train_as_the_method_that_they_control():
    masked = make_recipe("maskalign", "paper")
    for name in ("mask-loss", "mask-input", "mask-attention"):
        control = make_recipe(name, "paper")
        assert (control.data, control.network, control.training) == (masked.data, masked.network, masked.training)
        assert control.method.inner == masked.method.inner and control.method.mask_ratio == masked.method.mask_ratio


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_table_changes_nothing_when_it_is_asked_for_again(name):
    """The depth that is aligned stands in the table and follows from the size; both say the same."""
    recipe = make_recipe(name, "paper")
    size = settings_of(name, recipe.method)["network"].value
    assert make_recipe(name, "paper", overrides=f"network={size}") == recipe
