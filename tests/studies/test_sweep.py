"""Depth and weight of the alignment: which recipes are swept, what is measured, and what diagram and figures say."""

import json

import numpy as np
import pytest

from maskalign_lab.runs.experiments import Length, run_identity
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.position_preference.layer_diagram import Taps, layer_diagram, taps_of
from maskalign_lab.studies.position_preference.sweep_arms import ARMS, SCALES, measure_sweep
from maskalign_lab.studies.position_preference.sweep_figures import layers_figure, layers_of_arms, sweep_figure, swept
from maskalign_lab.workbench.plots import png

SMALL = "data.n=64 training.steps=3 training.warmup=1"


def recipes(preset, overrides=""):
    of = SCALES["smoke" if preset == "smoke" else "laptop"].recipe_of(preset, "shapes", overrides)
    return {arm.name: of(arm, 5) for arm in ARMS}


# ---- arms


def test_the_rung_is_swept_over_blocks_1_to_5_and_weights_around_its_own():
    found = recipes("laptop")
    depths = {recipe.method.depth for name, recipe in found.items() if name.startswith("depth")}
    weights = {recipe.method.weight for name, recipe in found.items() if name.startswith("weight")}
    own = found["REPA"].method
    assert found["REPA"].network.depth == 6 and depths | {own.depth} == {1, 2, 3, 4, 5} and len(depths) == 4
    assert weights | {own.weight} == {0.25, 0.5, 1.0, 2.0, 4.0} and len(weights) == 4
    assert all(recipe.method.depth == own.depth for name, recipe in found.items() if name.startswith("weight"))


def test_repa_and_sit_are_those_of_every_other_table():
    found = recipes("laptop")
    for name, method in (("REPA", "repa"), ("SiT", "sit")):
        assert found[name] == make_recipe(method, "study", "shapes", 5)


@pytest.mark.parametrize("preset", ["smoke", "study", "study-gpu"])
def test_every_arm_fits_its_network_and_is_another_one_on_the_rung(preset):
    made = [arm.recipe(preset) for arm in ARMS]
    assert all(1 <= getattr(each.method, "depth", 1) < each.network.depth for each in made)
    assert preset == "smoke" or len({identity(each) for each in made}) == len(ARMS)


def test_overrides_of_the_method_reach_the_arms_that_have_one():
    found = recipes("laptop", "method.projector_width=32 training.steps=7")
    assert found["REPA"].method.projector_width == found["weight 4"].method.projector_width == 32
    assert all(recipe.training.steps == 7 for recipe in found.values()) and found["weight 4"].method.weight == 4


@pytest.mark.parametrize("name", ["SiT", "depth 3/6"])
def test_what_is_measured_is_plain_and_of_every_block(name, tmp_path):
    arm = next(arm for arm in ARMS if arm.name == name)
    run = load_run(train(arm.recipe("smoke", overrides=SMALL), tmp_path / "run", "cpu", print_every=0))
    found = measure_sweep(run, 40, 16, 0)
    assert json.loads(json.dumps(found)) == found
    for key in ("probe", "probe half", "CKNNA", "CKNNA half"):
        assert np.shape(found[key]) == (3, 4) and np.isfinite(found[key]).all()
    assert {key: found[key] for key in ("aligned", "weight") if key in found} == (
        {} if name == "SiT" else {"aligned": 2, "weight": 0.5}
    )
    assert len(run.survey_images(10)) == 10


def test_smoke_trains_what_it_says():
    scale = SCALES["smoke"]
    of = scale.recipe_of("smoke", "shapes")
    assert len({run_identity(of(arm, 5), Length(8)) for arm in scale.arms}) == len(scale.arms) == 3


# ---- figures


def row(arm, seed=0, aligned=None, weight=2.0, budget="steps", **more):
    tapped = {} if aligned is None else {"aligned": aligned, "weight": weight}
    return {"arm": arm, "seed": seed, "budget": budget, "velocity": 0.7 + seed / 100} | tapped | more


def test_a_sweep_holds_its_own_arms_in_order():
    rows = [row("depth 3/6", 0, 3), row("REPA", 0, 2), row("REPA", 1, 2), row("weight 4", 0, 2, 4.0), row("SiT")]
    rows.append(row("REPA", 2, 2, budget="flops"))
    assert swept(rows, "aligned", "velocity") == {2: [0.7, 0.71], 3: [0.7]}
    assert swept(rows, "weight", "velocity") == {2.0: [0.7, 0.71], 4.0: [0.7]}
    assert swept(rows, "weight", "frechet") == {} and png(sweep_figure(rows))


def test_layers_are_in_the_order_of_their_depth_with_a_mark_where_they_are_aligned():
    know = {"probe": np.arange(18).reshape(3, 6).tolist()}
    rows = [row("depth 5/6", 0, 5, **know), row("REPA", 0, 2, **know), row("SiT", 0, **know)]
    found = layers_of_arms(rows, "probe", [each["arm"] for each in rows])
    assert list(found) == ["SiT", "REPA", "depth 5/6"] and found["REPA"][1].shape == (1, 3, 6)
    axis = layers_figure(rows).axes[1]
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert marks == [(2, 7.0), (5, 10.0)]


# ---- the diagram


@pytest.mark.parametrize(
    ("method", "overrides", "taps"),
    [
        ("sit", "", Taps(6, 0, 1.0, False, (), "clean input", ())),
        ("repa", "", Taps(6, 0, 1.0, False, (2,), "teacher", ())),
        ("repa", "method.depth=(1,4)", Taps(6, 0, 1.0, False, (1, 4), "teacher", ())),
        ("haste", "", Taps(6, 0, 1.0, False, (2,), "teacher", (2, 3))),
        ("reg", "", Taps(6, 0, 1.0, True, (2,), "teacher", ())),
        ("maskalign", "", Taps(6, 2, 0.75, True, (2,), "teacher", ())),
        ("maskalign", "method.inner.name=repa network.mixer_depth=0", Taps(6, 0, 0.75, False, (2,), "teacher", ())),
        ("ahpa", "", Taps(6, 0, 1.0, False, (2,), "autoencoder", ())),
        ("irepa", "", Taps(6, 0, 1.0, False, (2,), "teacher", ())),
    ],
)
def test_where_a_recipe_taps(method, overrides, taps):
    recipe = make_recipe(method, "study", overrides=overrides)
    assert taps_of(recipe) == taps
    figure = layer_diagram({method: recipe})
    words = [text.get_text() for text in figure.axes[0].texts]
    assert [word.split(":")[0] for word in words if word.startswith("after")] == [
        f"after block {k}" for k in taps.outputs
    ]
    assert words.count("M") == taps.mixer and any("class token" in word for word in words) == taps.class_token


def test_every_method_can_be_drawn():
    names = ["sit", "repa", "haste", "irepa", "reg", "maskalign", "sra2", "ahpa", "jit"]
    assert png(layer_diagram({name: make_recipe(name, "smoke") for name in names}))
