"""Identities are a contract: what was trained under one is found again, whatever moves or is renamed.

`identities.json` holds those of every run that ships, of every name at every preset, and of every arm of the studies, as they were
when the tables were made. A line that changes here makes somebody's trained run disappear; a new arm or method is added by hand.
"""

import json
from dataclasses import replace

import pytest
from shared.clone import ROOT

from maskalign_lab.base import paths
from maskalign_lab.runs.presets import NAMED, PRESETS, make_recipe
from maskalign_lab.runs.recipe import from_json, identity, to_json
from maskalign_lab.studies.ahpa import arms as ahpa
from maskalign_lab.studies.maskalign import arms as maskalign
from maskalign_lab.studies.position_preference.tables import EXPERIMENTS
from maskalign_lab.studies.prediction_targets import arms as targets
from maskalign_lab.studies.rae import arms as rae
from maskalign_lab.studies.reg import arms as reg
from maskalign_lab.training.methods import INSTALLED

FROZEN = json.loads((ROOT / "tests" / "runs" / "identities.json").read_text())
SHIPPED = sorted((paths.data() / "runs").glob("*/recipe.json"))
SD_LEVELS = ("down.1", "down.2", "mid", "latent")  # of the autoencoder of preset paper


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_a_run_that_ships_keeps_its_identity(path):
    """Yesterday's recipe.json is read by today's code, and written back as text that means the same."""
    recipe = from_json(path.read_text())
    assert identity(recipe) == identity(from_json(to_json(recipe))) == FROZEN[f"run {path.parent.name}"]


@pytest.mark.parametrize("preset", PRESETS)
def test_names_keep_their_identities(preset):
    names = {name for name in (*INSTALLED, *NAMED) if f"recipe {name} {preset}" in FROZEN}
    assert len(names) >= 10
    found = {f"recipe {name} {preset}": identity(make_recipe(name, preset)) for name in names}
    assert found == {name: FROZEN[name] for name in found}


@pytest.mark.parametrize("preset", targets.SCALES)
def test_arms_keep_their_identities(preset):
    """Arms of studies 02 to 07, the oracle's among them."""
    of = targets.SCALES[preset].recipe_of(preset, "shapes")
    found = {f"03 {arm.name} {preset}": of(arm, 0) for arm in (*targets.ARMS, *targets.JIT_ARMS)}
    for what, study in (("04", reg), ("05", maskalign)):
        of = study.SCALES[preset].recipe_of(preset, "shapes")
        found |= {f"{what} {arm.name} {preset}": of(arm, 0) for arm in study.ARMS}
    scale = ahpa.SCALES[preset]
    scale = replace(scale, levels=SD_LEVELS) if preset == "paper" else scale
    for what, more in (("06", ""), ("06 oracle", scale.oracle)):
        of = scale.recipe_of(preset, "shapes", more)
        found |= {f"{what} {arm.name} {preset}": of(arm, 0) for arm in (*scale.arms, *scale.tried, *scale.traced)}
    for what, experiment in EXPERIMENTS.items():
        of, arms = experiment.scales[preset].recipe_of(preset, "shapes"), experiment.scales["laptop"].arms
        found |= {f"02 {what} {arm.name} {preset}": of(arm, 0) for arm in arms}
    scale = rae.SCALES[preset]
    of = scale.recipe_of(preset, "shapes")
    arms = scale.table("head shift latents width") + tuple(rae.film_arms(scale).values())
    found |= {f"07 {arm.name} {preset}": of(arm, 0) for arm in arms}
    there = {name: identity(recipe) for name, recipe in found.items()}
    assert there == {name: FROZEN[name] for name in there}
    assert len(there) == sum(name.endswith(f" {preset}") and not name.startswith("recipe ") for name in FROZEN)
