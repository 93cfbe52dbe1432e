"""Arms, budgets and verdicts: what is trained, what is not trained twice, and when a difference counts."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest

from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import steps_of
from maskalign_lab.runs import experiments
from maskalign_lab.runs.experiments import (
    Arm,
    Length,
    arm_rows,
    extended,
    lengths,
    load_rows,
    own_facts,
    run_arms,
    save_rows,
    step_flops,
)
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import ensure_run

pytestmark = pytest.mark.usefixtures("own_folders")
ARMS = (Arm("narrow", "sit"), Arm("deep", "sit", "network.depth=8"))


def recipe_of(arm: Arm, seed: int):
    return arm.recipe("smoke", seed=seed, overrides="data.n=32 training.steps=4 training.warmup=1")


def weight(run) -> dict[str, float]:
    return {"sum": run.net.final_layer.linear.weight.abs().sum().item()}


@cache
def cost(method: str, overrides: str = "") -> float:
    """Operations of a step, counted once."""
    return step_flops(make_recipe(method, "smoke", overrides=overrides))


def test_flops_of_a_linear_network_by_hand():
    """Blocks without attention products: six operations per weight and token, twelve blocks' worth of nothing else."""
    recipe = make_recipe("sit", "smoke", overrides="network.patch_size=16 network.depth=1")  # 4 tokens
    more = replace(recipe, network=replace(recipe.network, depth=2))
    width, tokens = recipe.network.width, 4
    linear = 6 * 12 * width**2 * tokens + 6 * 6 * width**2  # qkv, proj, mlp; the modulation once per image
    products = 6 * 2 * tokens**2 * width
    assert step_flops(more) - step_flops(recipe) == linear + products


@pytest.mark.parametrize(
    "method", ["repa", "reg", "maskalign", "mask-loss", "mask-input", "mask-attention", "haste", "irepa"]
)
def test_every_method_can_be_counted(method):
    """Alignment costs something, and the projector sees the kept tokens only."""
    assert cost(method) > cost("sit") if method != "maskalign" else cost(method) < cost("mask-loss")


def test_attention_that_is_cut_costs_less_than_all_and_more_than_dropping():
    """Of n tokens two parts of k and n - k attend to k^2 + (n - k)^2 pairs; the mixer is counted once."""
    dropped, cut, whole = map(cost, ("maskalign", "mask-attention", "mask-loss"))
    deeper, deepest = (cost(name, "network.mixer_depth=3") for name in ("mask-attention", "mask-loss"))
    assert dropped < cut < whole and deeper - cut == deepest - whole


def test_a_method_that_stops_costs_what_its_two_phases_cost():
    """Before its stop, after it, and half and half."""
    until = {stop: cost("haste", f"method.stop={stop}") for stop in (1, 10, 20, 99)}
    after = 20 * until[1] / 19 - until[20] / 19  # of 20 steps one is before
    assert until[99] == until[20] and until[10] == pytest.approx((until[20] + after) / 2)
    assert after == pytest.approx(cost("sit"))


def test_a_router_that_looks_at_some_steps_costs_what_they_cost_in_the_mean():
    """A bilevel router does more in every second or fourth step, of which the count takes four."""
    bilevel = "network.depth=2 method.depth=1 method.router=bilevel method.probe_every="
    every, second, fourth = (cost("ahpa", f"{bilevel}{n}") for n in (1, 2, 4))
    assert fourth < second < every and 3 * second == every + 2 * fourth


def test_the_second_budget_costs_what_the_baseline_costs():
    plan = lengths({arm.name: recipe_of(arm, 0) for arm in ARMS}, "narrow")
    assert plan["narrow"] == Length(4, 4, 1.0) and plan["deep"].steps == 4 and plan["deep"].flops == 2
    with pytest.raises(ValueError, match="cooldown=0.5: expected 0"):
        cooled = recipe_of(ARMS[0], 0)
        lengths({"narrow": replace(cooled, training=replace(cooled.training, cooldown=0.5))}, "narrow")
    with pytest.raises(ValueError, match="Did you mean 'narrow'"):
        lengths({arm.name: recipe_of(arm, 0) for arm in ARMS}, "narow")


def test_an_oracle_is_counted_as_the_teacher_that_it_stands_in_for():
    """Its few values would make the same method look cheaper."""
    tiny, oracle = (make_recipe("repa", "study", overrides=f"data.teacher={name}") for name in ("tiny-4x4", "oracle"))
    plan = lengths({"SiT": make_recipe("sit", "study"), "REPA": tiny, "oracle": oracle}, "SiT")
    assert plan["REPA"].relative == plan["oracle"].relative > 1
    assert own_facts(oracle).channels == own_facts(tiny).channels == 4


def test_rows_are_paired_and_never_trained_twice(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    rows = run_arms(ARMS, (0, 1), recipe_of, "narrow", weight, keep=file, device="cpu")
    assert [(row["seed"], row["arm"], row["budget"]) for row in rows] == [
        (seed, arm, budget) for seed in (0, 1) for arm in ("narrow", "deep") for budget in ("steps", "flops")
    ]
    monkeypatch.setattr(experiments, "ensure_run", lambda *_: pytest.fail("trained again"))
    assert run_arms(ARMS, (0, 1), recipe_of, "narrow", weight, keep=file, device="cpu") == rows
    assert run_arms(ARMS, (1,), recipe_of, "narrow", weight, known=rows, device="cpu") == rows[4:]


def test_a_row_measures_the_step_that_it_names(tmp_path):
    rows = run_arms(ARMS, (0,), recipe_of, "narrow", weight, device="cpu")
    steps = {(row["arm"], row["budget"]): row["step"] for row in rows}
    assert steps["deep", "steps"] == 4 and steps["deep", "flops"] == 2
    run = next((tmp_path / "cache" / "runs").glob("sit-*"))
    assert set(steps_of(run)) & {2, 4}


def test_the_seconds_of_a_training_that_was_found_are_those_that_it_took():
    """A table that was stopped behind a training and measured later tells the same; seeds trained at once share theirs."""
    recipe, length = recipe_of(ARMS[0], 3), Length(2)
    (row,) = arm_rows(ARMS[0], recipe, length, weight, "cpu")
    log = ensure_run(extended(recipe, length), "cpu", every_save=True).path / "log.jsonl"
    last = json.loads(log.read_text().splitlines()[-1]) | {"seconds": 100.0}
    log.write_text(json.dumps(last) + "\n")
    (again,), (shared,) = (arm_rows(ARMS[0], recipe, length, weight, "cpu", n) for n in (1, 4))
    assert again == row | {"seconds": 100.0} and shared["seconds"] == 25.0


def test_a_stopped_table_goes_on_where_it_stopped(tmp_path, monkeypatch):
    file, trained = tmp_path / "rows.json", []

    def stops_after_one(recipe, device, every_save):
        if trained:
            raise KeyboardInterrupt
        trained.append(recipe)
        return ensure(recipe, device, every_save)

    ensure = experiments.ensure_run
    monkeypatch.setattr(experiments, "ensure_run", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        run_arms(ARMS, (0,), recipe_of, "narrow", weight, keep=file, device="cpu")
    assert {row["arm"] for row in load_rows(file)} == {"narrow"}
    monkeypatch.setattr(experiments, "ensure_run", ensure)
    assert len(run_arms(ARMS, (0,), recipe_of, "narrow", weight, keep=file, device="cpu")) == 4


def test_files_hold_one_row_a_line(tmp_path):
    rows = [{"arm": "a", "seed": 0, "loss": 0.5}, {"arm": "b", "seed": 0, "loss": 0.25}]
    save_rows(tmp_path / "new" / "rows.json", rows)
    text = (tmp_path / "new" / "rows.json").read_text()
    assert load_rows(tmp_path / "new" / "rows.json") == json.loads(text)["rows"] == rows
    assert len(text.splitlines()) == 4 and load_rows(tmp_path / "none.json") == []


def test_arms_share_everything_that_they_do_not_name():
    recipes = [recipe_of(arm, 3) for arm in ARMS]
    assert recipes[0].training == recipes[1].training and recipes[0].data == recipes[1].data
    assert replace(recipes[1].network, depth=4) == recipes[0].network


def test_every_table_that_ships_is_on_the_card():
    folder = paths.data() / "results"
    card = (folder / "card.md").read_text()
    files = {path.name for path in folder.iterdir() if path.name != "card.md"}
    assert files == set(re.findall(r"`([\w-]+\.(?:json|npz|safetensors))`", card))
