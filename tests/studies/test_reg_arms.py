"""The table of arms of study 04: what is trained, what is read from a class token, and what is said of the rows."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch import nn

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, SampleStep
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.measure.findings import NONE, findings_table
from maskalign_lab.measure.wording import NotTrained, count_verdicts, difference, interval
from maskalign_lab.runs.experiments import run_arms
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.rung import BASELINE, trainable
from maskalign_lab.studies.reg import arm_findings, arm_tables, arms, opening, token_measures
from maskalign_lab.studies.reg.arms import (
    ARMS,
    BASELINES,
    CAUSES,
    EXPECTED,
    JUDGED,
    ORACLE,
    SCALES,
    VARIED,
    measure_reg,
)
from maskalign_lab.studies.reg.token_measures import beyond_chance, class_share, denoised_tokens, noise_left

# ---- arms


@pytest.mark.parametrize("preset", SCALES)
def test_an_arm_differs_from_reg_in_what_it_names_alone(preset):
    recipe_of = SCALES[preset].recipe_of(preset, "shapes")
    recipes = {arm.name: recipe_of(arm, 3) for arm in ARMS}
    reg = recipes["REG"]
    wide, long = recipes["twice as wide"], recipes["twice the steps"]
    narrow = recipes["half as wide"].network
    assert (wide.network.width, wide.network.heads) == (2 * reg.network.width, 2 * reg.network.heads)
    assert (narrow.width, narrow.heads) == (reg.network.width // 2, reg.network.heads // 2)
    assert replace(wide, network=reg.network) == replace(long, training=reg.training) == reg
    assert replace(recipes["half as wide"], network=reg.network) == reg
    assert long.training.steps == 2 * reg.training.steps
    for beta in (0.003, 0.3, 1):
        other = recipes[f"beta {beta}"]
        assert other.method.class_weight == beta and replace(other, method=reg.method) == reg
    assert replace(recipes["x-prediction"], objective=reg.objective) == reg
    assert recipes["REG, oracle"] == replace(reg, data=replace(reg.data, teacher="oracle"))
    assert all(each.training.cooldown == 0 for each in recipes.values())  # or looks on the way would mean nothing


def test_a_laptops_table_is_trained_at_the_scale_at_which_alignment_helps():
    """Also where the class token is looked at in another network; what is asked for wins."""
    recipe_of = SCALES["laptop"].recipe_of("laptop", "shapes", "training.steps=9 data.teacher=tiny:mine")
    _, repa, _ = BASELINES
    recipe = recipe_of(repa, 0)
    study = make_recipe("repa", "study", overrides="training.steps=9 data.teacher=tiny:mine")
    assert recipe == study and SCALES["laptop"].recipe_of("laptop", "shapes")(repa, 0).data.teacher == "tiny-4x4"


def test_overrides_of_the_method_are_for_reg_alone_and_yield_to_the_arms():
    recipe_of = SCALES["smoke"].recipe_of("smoke", "shapes", "method.class_weight=0.5 training.lr=1e-4")
    recipes = {arm.name: recipe_of(arm, 0) for arm in ARMS}
    assert recipes["REG"].method.class_weight == 0.5 and recipes["beta 1"].method.class_weight == 1
    assert {each.training.lr for each in recipes.values()} == {1e-4}


def test_the_oracle_is_asked_about_shapes_alone_and_every_suspect_has_an_arm():
    scale = SCALES["laptop"]
    assert trainable(scale.arms, "shapes") == ARMS and set(ARMS) - set(trainable(scale.arms, "digits")) == set(ORACLE)
    assert SCALES["smoke"].arms == BASELINES and BASELINES[0].name == BASELINE  # the unit of cost is there
    assert EXPECTED.keys() == {arm.name for arm in (*VARIED, ORACLE[1])} and set(EXPECTED.values()) == {-1, 1}


def test_an_arm_is_judged_beside_one_that_has_its_teacher():
    """REPA beside SiT, which has none; and each REG beside a REPA that is trained alike."""
    recipes = {arm.name: SCALES["laptop"].recipe_of("laptop", "shapes")(arm, 0) for arm in ARMS}
    assert {arm for arm, _, _ in JUDGED} == recipes.keys() - {"SiT"}
    for arm, other, claim in JUDGED:
        assert recipes[other].method.name == {"repa": "sit", "reg": "repa"}[recipes[arm].method.name]
        assert other == "SiT" or recipes[arm].data == recipes[other].data
        assert claim == (0 if arm in {each.name for each in VARIED} else -1)


def test_every_arm_trains_and_is_measured(own_folders, monkeypatch):
    """At the smallest size, on the way and at both budgets; only arms with a class token are read."""
    monkeypatch.setattr(arms, "QUICK", SamplerConfig("euler", 1, precision="float32"))

    def recipe_of(arm, seed):
        few = "data.n=32 network.depth=2 training.batch_size=8 training.warmup=1 training.cooldown=0 training.steps=2"
        return arm.recipe("smoke", "shapes", seed, few)

    measure = partial(measure_reg, images=8, samples=4, known=32)
    rows = run_arms(ARMS, (0,), recipe_of, BASELINE, measure, device="cpu", early=(0.5,))
    assert {row["arm"] for row in rows} == {arm.name for arm in ARMS}
    assert {row["budget"] for row in rows} == {"early", "steps", "flops"}
    assert all(np.isfinite([row["velocity"], row["frechet"], row["accuracy"]]).all() for row in rows)
    with_token = {row["arm"] for row in rows if "carried" in row}
    assert with_token == {arm.name for arm in ARMS if arm.method == "reg"}
    assert {row["arm"] for row in rows if "sampled token error" in row} == with_token - {"REG, oracle"}


def test_what_a_study_was_asked_for_reaches_its_table(monkeypatch, tmp_path, capsys):
    for name in ("studied_runs", "make_reader", "watch_both", "make_film"):
        monkeypatch.setattr(opening, name, lambda *given, **named: [SimpleNamespace(**SEEN)])
    monkeypatch.setattr(opening, "check_teacher", lambda recipe: None)
    monkeypatch.setattr(opening, "make_reader", lambda *given: SimpleNamespace(classes=()))
    trained = []
    monkeypatch.setattr(opening, "rung_rows", lambda *given: trained.append(given) or ["a row"])
    study = opening.open_study(
        "laptop", seeds=3, overrides="training.steps=9", out_dir=str(tmp_path), device="cpu", dataset="shapes"
    )
    assert opening.table_rows(study) == ["a row"]
    ((group, count, recipe_of, measure, _, keep, device),) = trained
    assert (group, count, keep, device) == (ARMS, 3, tmp_path / "04_rows.json", "cpu")
    assert recipe_of(group[0], 5).training.steps == 9
    assert measure.keywords == {"images": 250, "samples": 500, "known": 2000}
    assert opening.table_rows(opening.open_study(dataset="digits")) == []
    assert "No rows of 04_reg ship for preset 'laptop', dataset 'digits'" in capsys.readouterr().out
    assert opening.open_study("gpu").count == SCALES["gpu"].seeds and opening.open_study("gpu", seeds=1).count == 1


SEEN = {"recipe": SimpleNamespace(data=SimpleNamespace(name="shapes")), "name": "a run", "step": 1}


# ---- what is read


def test_kappa_is_cohens():
    draw = torch.Generator().manual_seed(0)
    for classes in (2, 5):
        guess, truth = torch.randint(classes, (2, 60), generator=draw)
        expected = cohen_kappa_score(guess.numpy(), truth.numpy())
        assert beyond_chance(guess, truth, classes) == pytest.approx(expected, abs=1e-6)
    assert beyond_chance(torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.long), 3) == 0


def test_the_share_of_the_classes_is_unbiased():
    """Nothing to be found is nothing on average, in samples where the plain share is a third."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 10
    found = [class_share(torch.randn(30, 3, generator=draw), labels) for _ in range(400)]
    assert abs(np.mean(found)) < 0.02
    assert class_share(torch.eye(10)[labels], labels) == pytest.approx(1)


class Knowing(nn.Module):
    """Says the class token that it holds, in the objective's way; channels beyond its width it cannot say."""

    num_classes, class_dim = 3, 8

    def __init__(self, objective: Objective, tokens: torch.Tensor, width: int = 8):
        super().__init__()
        self.objective, self.tokens, self.width, self.asked = objective, tokens, width, []

    def forward(self, x, t, y, cls):
        self.asked.append(y)
        x_hat = torch.cat([self.tokens[:, : self.width], cls[:, self.width :]], 1)  # what it cannot say stays
        said = x_hat if self.objective.prediction == "x" else (cls - x_hat) / t[:, None]
        return Output(torch.zeros_like(x), said, {})


def run_of(net: nn.Module, tokens: torch.Tensor) -> SimpleNamespace:
    """What is asked of a run, on the linear path."""
    return SimpleNamespace(
        net=net, device="cpu", recipe=SimpleNamespace(objective=net.objective),
        inputs=lambda dataset: torch.zeros(len(tokens), 1, 2, 2), class_tokens=lambda dataset: tokens,
    )  # fmt: skip


class Held(SimpleNamespace):
    """A data set of which the labels are asked."""

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("told", [True, False])
def test_a_network_that_knows_the_token_gives_it_back(prediction, told):
    tokens, labels = torch.randn(40, 8, generator=generator(0, 0, "tokens")), torch.arange(40) % 3
    net = Knowing(Objective(prediction=prediction, clamp=0.05), tokens)
    noised, denoised = denoised_tokens(run_of(net, tokens), Held(labels=labels.numpy()), 0.5, told)
    torch.testing.assert_close(denoised, tokens, rtol=1e-5, atol=1e-5)
    assert abs((noised - 0.5 * tokens).std() - 0.5) < 0.05
    assert torch.equal(net.asked[0], labels if told else torch.full((40,), 3))


def test_the_noise_that_a_width_cannot_hold_stays():
    """Six of eight channels are faint; of these a width of four holds two, so that two thirds of the noise stay."""
    spread = torch.tensor([1.0, 1, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])
    tokens = spread * torch.randn(240, 8, generator=generator(0, 0, "tokens"))
    run, held = run_of(Knowing(Objective(), tokens, width=4), tokens), Held(labels=np.zeros(240, int))
    for t in (0.25, 0.75):
        _, denoised = denoised_tokens(run, held, t, told=True)
        assert noise_left(denoised, tokens, tokens, t) == pytest.approx(4 / 6, abs=0.08)
    assert noise_left(tokens, tokens, tokens, 0.5) == 0


def test_samples_that_are_real_carry_what_real_tokens_carry(monkeypatch):
    """Real pairs in the place of samples: the reader finds as much, and their tokens are the teacher's."""
    run = load_run("reg-shapes")
    held = run.images("validation", 120)
    asked, tokens = torch.as_tensor(held.labels), run.teacher_view(held).cls
    ends = [SampleStep(0.0, held.images().double(), tokens.double())]
    monkeypatch.setattr(token_measures, "final_steps", lambda run, labels, sampler: iter(ends))
    found = token_measures.measure_sampled(run, asked, ends, SamplerConfig(), 300)
    reader = token_measures.reader_of(run, 300)
    real = beyond_chance(reader.tokens(tokens.float()).argmax(-1), asked, 10)
    assert found["class in sampled tokens"] == pytest.approx(real) and real > 0.1
    assert found["class in free tokens"] == pytest.approx(real, abs=0.03)  # the judge sees what they show
    assert found["sampled token error"] < 0.01


# ---- what is said


COMMON = {"budget": "steps", "step": 800, "relative_flops": 1.0, "seconds": 1800, "velocity": 0.1}
READ = {"class share": 0.02, "noise left": 0.3, "least noise left": 0.25, "class under least noise": 0.06}
READ |= {"class in real tokens": 0.4, "class in free tokens": 0.1}
READ |= {f"class in {kind} tokens": [0.15, 0.1, 0.0] for kind in ("noised", "denoised", "told")}


def made(values: dict[str, float], seeds: int = 4) -> list[dict]:
    """Rows of arms by what their sampled tokens carry; a little noise of its own for each seed."""
    draw, rows = np.random.default_rng(0), []
    for arm, carried in values.items():
        for seed in range(seeds):
            row = COMMON | {"arm": arm, "seed": seed, "identity": f"{arm}{seed}"}
            row |= {"frechet": 9 - carried + seed / 10, "accuracy": 0.2 + carried / 2 + seed / 100}
            row["velocity"] += seed / 1000
            if not arm.startswith(("REPA", "SiT")):
                mine = carried + 0.01 * draw.standard_normal()
                row |= READ | {"carried": mine, "class in sampled tokens": 0.4 * mine}
            rows.append(row)
    early = [row | {"budget": "early", "step": 200, "carried": row["carried"] / 2} for row in rows if "carried" in row]
    return rows + early


FLAT = {arm.name: 0.1 for arm in ARMS}


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_is_seen_where_an_arm_differs_as_expected(name):
    arm, sign = next(iter(CAUSES[name].items()))
    found = arm_findings.cause(made(FLAT | {arm: 0.1 + 0.3 * sign}), name)
    rest = ["undecided"] * (len(CAUSES[name]) - 1)
    assert found.verdict == f"{', '.join(['seen', *rest])} (4 seeds)" and found.verdicts == len(CAUSES[name])
    against = arm_findings.cause(made(FLAT | {arm: 0.1 - 0.3 * sign}), name)
    assert against.verdict == f"{', '.join(['seen the other way', *rest])} (4 seeds)"  # which is no cause


def test_one_seed_sees_nothing():
    rows = made(FLAT | {"twice as wide": 0.9}, seeds=1)
    found = arm_findings.cause(rows, "width")
    assert (found.verdict, found.detectable, found.verdicts) == ("undecided (1 seed)", NONE, 0)
    assert arm_findings.by_judge(rows).verdict == "undecided (1 seed)"
    assert arm_findings.lost(rows).verdict.startswith("none; ")
    assert arm_findings.lost(rows).verdict.endswith("unlabelled undecided (1 seed)")


@pytest.mark.parametrize(
    ("told", "denoised", "sampled", "free", "stages"),
    [
        (0.1, 0.1, 0.1, 0.1, "only told (t = .25), denoised (t = .25), sampled, unlabelled"),
        (0.4, 0.1, 0.1, 0.1, "only denoised (t = .25), sampled, unlabelled"),
        (0.4, 0.4, 0.1, 0.1, "only sampled, unlabelled"),
        (0.4, 0.4, 0.4, 0.1, "only unlabelled"),
        (0.4, 0.4, 0.4, 0.4, "none"),
        (0.2, 0.4, 0.4, 0.1, "only unlabelled; told (t = .25) undecided"),  # just half
    ],
)
def test_the_stages_that_have_less_than_half_of_the_class_are_named(told, denoised, sampled, free, stages):
    rows, draw = made({"REG": 0.1}), np.random.default_rng(0)
    for row in rows:
        noise = 0.01 * draw.standard_normal() - 0.01 * (row["seed"] - 1.5)
        row["class in told tokens"], row["class in denoised tokens"] = [told + noise, 0, 0], [denoised + noise, 0, 0]
        row["class in sampled tokens"], row["class in free tokens"] = sampled + noise, free + noise
    found = arm_findings.lost(rows)
    assert found.verdict == f"{stages} (4 seeds)" and found.verdicts == 4
    assert "(.40)" in found.question and found.effect.startswith("told (t = .25) .")


def test_the_findings_say_what_their_rows_say():
    rows = made(FLAT | {"REG, oracle": 0.8})
    shown = findings_table(arm_findings.all_findings(rows, MEASURES)).data
    assert shown.count("\n| ") == 10 and "no rows here" not in shown
    assert f"| REG, oracle {interval(difference(rows, 'REG, oracle', 'REG', 'carried'), 2)} | " in shown
    distance, accuracy = (difference(rows, "REG, oracle", "REPA, oracle", each) for each in ("frechet", "accuracy"))
    effect = f"distance {interval(distance, 2)}, accuracy {interval(accuracy, 3)}"
    assert f"with the oracle? | {effect} | " in shown and "| reproduced (4 seeds) | 04_course |" in shown
    told = "pixels changed 15 to 19 % (own token 1 %); class label given -2.5 +/- 11.0 %, no label 20.0 +/- 16.0 %"
    assert told in shown and "pixels seen; class undecided, seen (one network)" in shown
    verdicts = 2 * 4 + 4 + len(EXPECTED) + 2
    assert f"Of {verdicts} verdicts" in shown
    assert arm_findings.cost(rows) == f"{4 * len(ARMS)} trainings of up to 800 steps, {2 * len(ARMS)}.0 h in all"


MEASURES = pd.DataFrame(
    [
        {"sampled with": way, "measure": "own class: same class less another class, t = 0.6", "value": value}
        | {"+/-": half, "n": 40}
        for way, value, half in (("label given", -0.025, 0.11), ("no label", 0.2, 0.16))
    ]
    + [
        {"sampled with": "label given", "measure": f"changed: token of {whose}", "value": value, "+/-": 0.01, "n": 40}
        for whose, value in (("the same class", 0.15), ("another class", 0.19), ("its own, noised anew", 0.006))
    ]
)


@pytest.mark.parametrize(
    ("make", "needs"),
    [
        (partial(arm_findings.by_judge, arm="REG"), ["REG", "REPA"]),
        (partial(arm_findings.by_judge, arm="REPA"), ["REPA", "SiT"]),
        (partial(arm_findings.by_judge, arm="REG, oracle"), ["REG, oracle", "REPA, oracle"]),
        (arm_findings.lost, ["REG"]),
        (lambda rows: arm_findings.cause(rows, "teacher"), ["REG", "REG, oracle"]),
        (lambda rows: arm_findings.cause(rows, "steps"), ["REG", "twice the steps"]),
    ],
)
def test_a_finding_is_left_out_if_an_arm_is_missing(make, needs):
    rows = made(FLAT)
    assert make([row for row in rows if row["arm"] in needs])
    for arm in needs:
        with pytest.raises(NotTrained):
            make([row for row in rows if row["arm"] != arm])


def test_a_suspect_is_told_of_by_the_arms_that_were_trained():
    """The table names the others."""
    rows = made({"REG": 0.1, "beta 1": 0.5})
    found = arm_findings.cause(rows, "weight")
    assert found.effect.startswith("beta 1 +") and "," not in found.effect and found.verdict == "seen (4 seeds)"
    table = arm_tables.carried_table(rows).set_index("arm")["verdict"]
    assert table["beta 1"] == "seen" and (table.drop("beta 1") == "not trained").all()
    assert count_verdicts(arm_tables.carried_table(rows)) == 1
    assert arm_tables.reached_table(rows)["seeds"].to_dict() == dict.fromkeys(FLAT, 0) | {"REG": 4, "beta 1": 4}


def test_only_networks_that_are_shown_the_same_are_compared_by_their_loss():
    """The judge compares REG with REPA; no table sets their velocity losses beside each other, nor those of two teachers' tokens."""
    losses, method_of = arm_tables.velocity_table(made(FLAT)), {arm.name: arm.method for arm in ARMS}
    for _, arm, other in losses.index:
        assert (method_of[arm] == "reg") is (method_of[other] == "reg")
    assert "REG, oracle" not in losses.index.get_level_values("arm")
    drawn = arm_tables.arms_course(made(FLAT))
    by_title = {axis.get_title(): axis.get_legend_handles_labels()[1] for axis in drawn.axes}
    assert by_title["velocity loss"] == ["SiT", "REPA", "REPA, oracle"]
    assert by_title["judge's distance"] == ["SiT", *arm_tables.DRAWN]


def test_the_papers_claim_is_put_to_both_of_the_judges_metrics_after_equal_steps():
    """REG is claimed to be better: nearer to real images, and its wanted class is seen more often. Of equal operations nothing is."""
    rows = made(FLAT | {"REG": 0.5})  # what is carried lowers the distance and raises the accuracy
    rows += [row | {"budget": "flops"} for row in rows if row["budget"] == "steps"]
    table = arm_tables.judge_table(rows)
    pairs = [("distance", "REG", "REPA"), ("accuracy", "REG", "REPA")]
    assert [table["equal steps", "verdict"][pair] for pair in pairs] == ["reproduced", "reproduced"]
    assert [table["equal operations", "verdict"][pair] for pair in pairs] == ["lower", "higher"]
    assert len(table) == 2 * len(JUDGED)


def test_tables_of_a_part_of_the_arms_are_a_part_of_the_tables():
    """The baselines alone, one method alone, nothing at all."""
    some = made({arm.name: 0.1 for arm in BASELINES})
    assert list(arm_tables.stage_table(some).index) == ["REG"]
    alone = [row for row in some if row["arm"] == "REPA"]
    for rows in (alone, []):
        assert arm_tables.stage_table(rows).empty and set(arm_tables.carried_table(rows)["verdict"]) == {"not trained"}
        assert arm_tables.lost_figure(rows) is arm_tables.arms_course(rows) is arm_tables.papers_shape(rows) is None
    assert arm_tables.judge_table([]).empty and arm_tables.velocity_table([]).empty
    unsampled = ("carried", "class in sampled tokens", "frechet", "accuracy")
    never = [{k: v for k, v in row.items() if k not in unsampled} for row in some]
    assert len(arm_tables.lost_figure(never).axes) == 2 and arm_tables.judge_table(never).empty  # the map and its bar
