"""Study 04: what its figures hold, and its measures against brute force and known answers."""

import json

import nbformat
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.clone import ROOT
from shared.displayed import displayed_markdown, section_prose
from shared.studies import check_figure, smoke_fixture
from torch import nn

from maskalign_lab.base import devices, paths
from maskalign_lab.diffusion.guidance import Field, pack
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.diffusion.sit import Output, SiT
from maskalign_lab.measure.findings import check_words, findings_table, headline
from maskalign_lab.measure.verdicts import by_seed
from maskalign_lab.measure.wording import between, difference, plain, signed
from maskalign_lab.runs.experiments import lengths, load_rows, results_file, run_identity
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.rung import BASELINE, EARLY, table_seeds
from maskalign_lab.studies.reg.arm_findings import all_findings, by_judge, cost, pixels_changed
from maskalign_lab.studies.reg.arm_tables import carried_table, mean_by_arm
from maskalign_lab.studies.reg.arms import BASELINES, SCALES, VARIED
from maskalign_lab.studies.reg.exchange import changed_share, exchange_all, partners, slope
from maskalign_lab.studies.reg.findings import (
    WHEN,
    at,
    class_effect,
    class_effects,
    effect_in_words,
    measured,
    read_off,
)
from maskalign_lab.studies.reg.opening import open_study
from maskalign_lab.studies.reg.trace import Trace, class_attention, look, make_reader, settled, trace

FIGURES = (
    "class_over_t",
    "attention",
    "exchange_grid",
    "exchange_class",
    "exchange_pixels",
    "likeness",
    "directions",
    "following",
    "description_over_t",
    "transfer",
    "filmstrip",
    "arms",
    "course",
    "shape",
)


smoke = smoke_fixture("04")


# ---- the study


@pytest.mark.parametrize("name", FIGURES)
def test_findings_of_a_figure_are_one_a_measure_and_way(smoke, name):
    side = check_figure(smoke, "04_reg", f"04_{name}")
    found = {(row["sampled with"], row["measure"]): row for row in side["findings"]}
    assert len(found) == len(side["findings"]) and {way for way, _ in found} == {"label given", "no label"}
    assert all(
        row["value"] is None or (-1 <= row["value"] <= 1) for row in side["findings"] if "likeness" in row["measure"]
    )


def test_the_table_of_the_job_is_paired_kept_and_told(smoke):
    rows = load_rows(smoke.path(".html").parent / "04_rows.json")
    assert {(row["arm"], row["seed"], row["budget"]) for row in rows} == {
        (arm.name, seed, budget)
        for arm in BASELINES
        for seed in table_seeds(2)
        for budget in ("early", "steps", "flops")
    }
    assert all(("carried" in row) is (row["arm"] == "REG") for row in rows)
    shown, measures = displayed_markdown(smoke.path(".ipynb")), measures_of(smoke.path(".html").parent)
    assert findings_table(all_findings(rows, measures)).data in shown and effect_in_words(measures) in shown


def measures_of(folder) -> pd.DataFrame:
    """What a job has measured of the network that it looks at."""
    return pd.DataFrame(json.loads((folder / "04_filmstrip.json").read_text())["findings"])


# ---- the table that ships


@pytest.fixture(scope="module")
def shipped():
    return load_rows(results_file("04_reg", "shapes"))


def test_the_table_that_ships_is_paired(shipped):
    """Every arm has the first of the seeds that the search has not seen, those of the claim three or more, with every metric."""
    seeds = {}
    for row in shipped:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
        assert {"velocity", "frechet", "accuracy"} <= row.keys()
        assert ("carried" in row) is row["arm"].startswith(("REG", *(arm.name for arm in VARIED)))
    assert all(of == set(table_seeds(len(of))) for of in seeds.values())
    assert all(len(seeds[arm.name]) >= 3 for arm in BASELINES)


def test_the_table_that_ships_is_what_todays_recipes_would_train(shipped):
    """`-p seeds 5` finds the rows by the identity of their runs: nothing is trained again; at both budgets and two looks on the way."""
    scale = SCALES["laptop"]
    recipe_of, arms = scale.recipe_of("laptop", "shapes"), {arm.name: arm for arm in scale.arms}
    recipes = {name: recipe_of(arm, table_seeds(1)[0]) for name, arm in arms.items()}
    plan = lengths(recipes, BASELINE, early=EARLY)
    found = {}
    for row in shipped:
        assert row["identity"] == run_identity(recipe_of(arms[row["arm"]], row["seed"]), plan[row["arm"]])
        assert row["relative_flops"] == plan[row["arm"]].relative
        found.setdefault((row["arm"], row["seed"]), []).append((row["budget"], row["step"]))
    for (arm, _), looks in found.items():
        assert looks == plan[arm].looks and len({step for _, step in looks}) >= 3


def test_the_first_screen_says_its_verdict_in_one_line_as_the_rows_do(shipped):
    book = nbformat.read(paths.notebooks() / "04_reg.ipynb", as_version=4)
    assert f"**Verdict.** {headline(by_judge(shipped))} Distance" in book.cells[0].source.replace("\n", " ")


def test_the_first_screen_says_what_changes_what_tokens_carry(shipped):
    first = nbformat.read(paths.notebooks() / "04_reg.ipynb", as_version=4).cells[0].source
    table = carried_table(shipped).set_index("arm")
    for arm in ("REG, oracle", "beta 1", "half as wide"):
        found = table.loc[arm]
        assert f"{signed(found['difference'], 2)} +/- {plain(found['+/-'], 2)}" in first, arm
        assert found["verdict"] == "seen"
    free = [mean for arm, mean in mean_by_arm(shipped, "class in free tokens").items()]
    assert f"next to nothing of the class ({plain(min(free), 2)} to {plain(max(free), 2)})" in first and max(free) < 0.1


def test_the_first_screen_and_the_findings_tell_of_equal_operations(shipped):
    book = nbformat.read(paths.notebooks() / "04_reg.ipynb", as_version=4)
    far, right = (difference(shipped, "REG", "REPA", metric, "flops") for metric in ("frechet", "accuracy"))
    told = f"{signed(far.mean, 2)} +/- {plain(far.half, 2)}"
    words = f"after equal operations REG is worse than REPA by distance, {told}, and accuracy is undecided"
    assert words in book.cells[0].source.replace("\n", " ")
    assert f"after equal operations REG's distance is {told} above REPA's" in section_prose(book_path(), "Findings")
    assert far.verdict(0) == "higher" and right.verdict(0).startswith("undecided")


def test_what_is_said_of_x_prediction_and_of_the_papers_shape_is_what_the_rows_hold(shipped):
    cells = [cell.source for cell in nbformat.read(book_path(), as_version=4).cells]
    left, carried = (by_seed(shipped, metric) for metric in ("noise left", "carried"))
    ((seed, least),) = left["x-prediction"].items()
    words = f"it leaves the least noise of all ({plain(least, 3)}, REG {plain(left['REG'][seed], 3)}) and carries less, not more (one seed)"
    assert any(words in text for text in cells)
    assert least <= min(min(of.values()) for of in left.values())
    assert carried["x-prediction"][seed] < carried["REG"][seed]
    gains = {
        (arm, metric): abs(difference(shipped, arm, "SiT", metric).mean)
        for arm in ("REG", "REPA")
        for metric in ("frechet", "accuracy")
    }
    assert gains["REG", "frechet"] < gains["REPA", "frechet"]
    assert gains["REG", "accuracy"] == pytest.approx(gains["REPA", "accuracy"], rel=0.15)
    assert sum("it gains about as much by accuracy, and no more by distance" in text for text in cells) == 1


def test_a_found_training_counts_as_the_others_of_its_arm_take():
    rows = [
        {"arm": "SiT", "identity": name, "seconds": seconds, "step": 1000}
        for name, seconds in (("a", 3600.0), ("b", 7200.0), ("c", 0.1))
    ]
    assert cost(rows) == "3 trainings of up to 1,000 steps, 4.5 h in all" and cost([]) == "nothing was trained"


def book_path():
    """The notebook of the study."""
    return paths.notebooks() / "04_reg.ipynb"


def test_what_the_first_screen_says_of_the_network_that_ships_is_what_its_figures_hold():
    """Token and image belong and settle together, the token carries no class but steers the image; of its class one effect is seen."""
    measures = measures_of(ROOT / "figures").set_index(["measure", "sampled with"])
    for way in WAYS:
        right = measures.loc["reader finds the final class in the final class token", way]
        assert abs(right["value"] - 0.1) < right["+/-"]
        own, others = (measures.loc[f"likeness of token and {whose}", way] for whose in ("own image", "other images"))
        assert own["value"] - own["+/-"] > others["value"] + others["+/-"]
    effects = class_effects(measures.reset_index())
    assert effects.loc[effects["seen"], ["sampled with", "t"]].to_numpy().tolist() == [["no label", WHEN]]
    assert len(effects) == 2 * 5
    (seen,) = effects[effects["seen"]].to_dict("records")
    first = nbformat.read(book_path(), as_version=4).cells[0].source.replace("\n", " ")
    assert f"at one time only (no label, +{100 * seen['value']:.0f} +/- {100 * seen['+/-']:.0f} %)" in first
    contrast = measures.loc["transfer of contrast from another class, t = 0.6"]
    assert (contrast["value"] > contrast["+/-"]).all()
    assert f"moves contrast by {between(100 * contrast['value'], '.0f')} % of the way" in first
    changed, above = pixels_changed(measures.reset_index())
    assert above and changed == "pixels changed 15 to 19 % (own token 1 %)"
    assert "changes 15 to 19 % of the pixels (the own token, noised anew: 1 %)" in first
    for way in WAYS:
        apart = measures.loc["t when settled: token minus image", way]
        assert abs(apart["value"]) < apart["+/-"]


def test_the_findings_are_a_table_of_at_most_ten_rows_and_250_words(shipped):
    shown = findings_table(all_findings(shipped, measures_of(ROOT / "figures"))).data
    prose = section_prose(paths.notebooks() / "04_reg.ipynb", "Findings")
    assert check_words(f"{prose} {shown}") > 100
    assert shown.count("\n| ") <= 10 and shown.splitlines()[2].startswith("| Is REG better than REPA? |")


def test_a_run_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match="no class token; take a run of method reg"):
        make_reader(load_run("sit-shapes"))


def test_an_unknown_preset_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        open_study("smkoe")


# ---- the findings in words


WAYS = ("label given", "no label")


def effects(of: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Made up rows: the effect of the token's class by way of sampling, with its interval."""
    measure = "own class: same class less another class, t = 0.6"
    return pd.DataFrame(
        [
            {"sampled with": way, "measure": measure, "value": value, "+/-": half, "n": 40}
            for way, (value, half) in of.items()
        ]
    )


def test_the_effect_of_an_exchange_is_told_by_way_of_sampling():
    text = effect_in_words(effects({"label given": (-0.025, 0.11), "no label": (0.2, 0.16)}))
    assert (
        "one of their own class: -2.5 +/- 11.0 % (label given, detectable 15.6 %), 20.0 +/- 16.0 % (no label)." in text
    )
    assert "Of 2 such contrasts, over ways of sampling and times, 1 excludes zero: no label at t = 0.6." in text
    assert text.endswith("\n\nOf 2 verdicts luck would decide about 0.1 if there were nothing to be seen.")


def test_an_effect_within_its_interval_is_not_seen():
    text = effect_in_words(effects(dict.fromkeys(WAYS, (0.1, 0.16))))
    assert "0 exclude zero.\n" in text and text.count("detectable 22.7 %") == 2


def test_luck_counts_all_times_at_which_tokens_were_exchanged():
    more = [
        measured(way, f"own class: same class less another class, t = {t}", [1, -1] * 20)
        for way in WAYS
        for t in (0.2, 1)
    ]
    rows = pd.concat([effects(dict.fromkeys(WAYS, (0.2, 0.16))), pd.DataFrame(more)])
    text = effect_in_words(rows)
    assert (
        "Of 6 such contrasts, over ways of sampling and times, 2 exclude zero: label given at t = 0.6, no label at"
        in text
    )
    assert text.endswith("Of 6 verdicts luck would decide about 0.3 if there were nothing to be seen.")


def test_an_exchange_that_nobody_made_is_not_told_of():
    nothing = measured("no label", "own class: same class less another class, t = 0.6", [])
    assert effect_in_words(pd.DataFrame([nothing])) == "No token was exchanged."


def test_rows_leave_out_what_never_came_about():
    row = measured("no label", "t when settled", [0.4, float("nan"), 0.6])
    assert row["value"] == pytest.approx(0.5) and row["n"] == 2


def test_lines_are_read_off_at_the_nearest_time():
    line = ([1.0, 0.6, 0.2], [1, 2, 3], [0.1, 0.2, 0.3])
    assert read_off("no label", "likeness", line, 0.5, 7) == {
        "sampled with": "no label", "measure": "likeness, t = 0.5", "value": 2, "+/-": 0.2, "n": 7
    }  # fmt: skip


def test_the_class_effect_pairs_samples_and_leaves_out_those_without_both():
    frame = pd.DataFrame(
        [(0.6, 0, "same class", "own class"), (0.6, 0, "another class", "donor's class"),
         (0.6, 1, "same class", "another"), (0.6, 1, "another class", "own class"),
         (0.6, 2, "same class", "own class"), (0.2, 0, "same class", "another")],
        columns=["t", "sample", "token of", "shows"],
    )  # fmt: skip
    assert class_effect(frame, 0.5).tolist() == [1, -1]
    assert len(class_effect(frame.iloc[:0], 0.5)) == 0


def test_an_exchange_that_nobody_could_make_has_no_value():
    summary = pd.DataFrame({"token of": ["same class"], "t": [0.6], "n": [4], "changed": [0.1], "+/- changed": [0.02]})
    assert at(summary, "same class", 0.5, "changed") == {"value": 0.1, "+/-": 0.02, "n": 4}
    assert at(summary, "another class", 0.5, "changed") == {"value": None, "+/-": None, "n": 0}


# ---- what image tokens read


def small_net(qk_norm: bool = False, **kwargs) -> SiT:
    torch.manual_seed(0)
    sizes = dict(input_size=8, patch_size=4, in_channels=3, width=16, depth=3, heads=2, num_classes=3, class_dim=6)
    net = SiT(**sizes, qk_norm=qk_norm, **kwargs).double().eval()
    for name, p in net.named_parameters():
        if name != "pos_embed":
            p.data.add_(0.3 * torch.randn_like(p))
    return net.requires_grad_(False)


def brute_attention(attn, tokens) -> torch.Tensor:
    """Attention of one sequence to its token 0, one head, query and key at a time."""
    n, d = tokens.shape
    size = d // attn.heads
    q, k, _ = attn.qkv(tokens).split(d, dim=-1)
    found = torch.zeros(attn.heads, n - 1, dtype=tokens.dtype)
    for head in range(attn.heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(1, n):
            query = attn.q_norm(q[i, part])
            logits = torch.stack([(query * attn.k_norm(k[j, part])).sum() / size**0.5 for j in range(n)])
            found[head, i - 1] = logits[0].exp() / logits.exp().sum()
    return found


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_brute_force(qk_norm):
    net = small_net(qk_norm, mixer_depth=1)
    y, state = torch.tensor([0, 3]), torch.randn(2, 3 * 64 + 6, dtype=torch.float64)
    _, attention = look(Field(net, Objective(), y, SamplerConfig()), state, 0.7)
    assert attention.shape == (3, 2, 2, 4)
    x, cls, t = state[:, :192].view(2, 3, 8, 8), state[:, 192:], torch.full((2,), 0.7, dtype=torch.float64)
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in net.blocks]
    net(x, t, y, cls)
    for hook in hooks:
        hook.remove()
    for depth, tokens in enumerate(inputs):
        for i in range(2):
            torch.testing.assert_close(
                attention[depth, i], brute_attention(net.blocks[depth].attn, tokens[i]), rtol=1e-10, atol=1e-12
            )


def test_attention_with_guidance_is_that_of_the_labelled_half_and_leaves_no_hooks():
    net, state = small_net(), torch.randn(2, 198, dtype=torch.float64)
    y = torch.tensor([0, 2])
    plain, guided = (look(Field(net, Objective(), y, SamplerConfig(guidance=g)), state, 0.5)[1] for g in (1.0, 2.0))
    torch.testing.assert_close(plain, guided)
    assert sum(len(module._forward_hooks) for module in net.modules()) == 0


def test_weights_are_shares():
    net = small_net()
    weights = class_attention(net.blocks[0].attn, torch.randn(5, 5, 48, dtype=torch.float64))
    assert (weights > 0).all() and (weights < 1).all()


# ---- when a class is decided


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 2))
def test_settled_is_the_start_of_the_last_unbroken_stretch(read, final):
    times = [1 - i / len(read) for i in range(len(read))]
    expected = None
    for t, c in reversed(list(zip(times, read, strict=True))):
        if c != final:
            break
        expected = t
    found = settled(torch.tensor(read)[:, None], torch.tensor([final]), times).item()
    assert found != found if expected is None else found == pytest.approx(expected)


# ---- what an exchange does


class Follower(nn.Module):
    """The class token stays what it is, and the image becomes its mean: velocities 0 and (x_t - c) / t."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 2, 2, 3, 5

    def __init__(self, follows: bool):
        super().__init__()
        self.follows, self.holder = follows, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y, cls):
        goal = cls.mean(1).view(-1, 1, 1, 1) if self.follows else 0.25
        return Output((x - goal) / t.view(-1, 1, 1, 1), torch.zeros_like(cls), {})


def followed(follows: bool, b: int = 6) -> Trace:
    field = Field(Follower(follows), Objective(), torch.arange(b) % 3, SamplerConfig("heun", 5))
    steps = list(sample(field.net, field.objective, field.y, field.config))
    states = torch.stack([pack(step.x, step.cls) for step in steps])
    nothing = torch.zeros(len(steps), 1, b, 4)
    return Trace(field, [step.t for step in steps], states, states, nothing, nothing[..., 0])


CLASSES, ROWS = torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6)


def test_an_image_that_follows_its_token_becomes_the_donors():
    told = followed(True)
    final, tokens = told.parts(told.states[-1])
    torch.testing.assert_close(final, tokens.mean(1).view(-1, 1, 1, 1).expand_as(final))
    for each in exchange_all(told, CLASSES, [1, 0.6, 0.2], ROWS):
        if each.source != "own, noised anew":
            torch.testing.assert_close(each.images, final[each.donor])
            assert slope((each.images - final)[:, 0, 0, 0], (final[each.donor] - final)[:, 0, 0, 0])[
                0
            ] == pytest.approx(1)


def test_an_image_that_ignores_its_token_stays():
    alone = followed(False)
    final, _ = alone.parts(alone.states[-1])
    exchanged = exchange_all(alone, CLASSES, [1, 0.6, 0.2, 0], ROWS)
    assert len(exchanged) == 4 * 3
    assert all(torch.equal(each.images, final[each.rows]) for each in exchanged)


def test_an_exchange_at_the_end_changes_no_pixel_and_one_at_the_start_does():
    net = small_net()
    sampled = trace(net, Objective(), torch.arange(6) % 3, SamplerConfig(steps=4))
    final, _ = sampled.parts(sampled.states[-1])
    for each in exchange_all(sampled, CLASSES, [1, 0], ROWS):
        assert torch.equal(each.images, final[each.rows]) == (each.t == 0)
        assert (changed_share(each.images, final[each.rows], 0.0) > 0).all() == (each.t == 1)


def test_what_is_seen_on_the_way_is_seen_in_float32(monkeypatch):
    """It enters the findings, which are compared across machines."""
    net, y, seen = small_net().float(), torch.arange(6) % 3, {}
    for native in (False, True):
        monkeypatch.setattr(devices, "native_bfloat16", lambda device, native=native: native)
        seen[native] = trace(net, Objective(), y)
    assert torch.equal(seen[True].states, seen[False].states)
    assert torch.equal(seen[True].attention, seen[False].attention)


def test_a_token_noised_anew_keeps_its_message_near_the_end():
    told = followed(True)
    final, _ = told.parts(told.states[-1])
    near, far = (
        next(e for e in exchange_all(told, CLASSES, [t], ROWS) if e.source == "own, noised anew") for t in (0.2, 1)
    )
    assert (near.images - final).abs().mean() < (far.images - final).abs().mean()


def test_a_solver_with_noise_is_refused():
    noisy = followed(True)
    noisy.field.config = SamplerConfig("euler-maruyama", 5)
    with pytest.raises(ValueError, match="needs one without noise"):
        exchange_all(noisy, CLASSES, [1], ROWS)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.booleans())
def test_partners_are_the_nearest_that_fit(classes, same):
    found = partners(torch.tensor(classes), same).tolist()
    for i, partner in enumerate(found):
        others = [(i + k) % len(classes) for k in range(1, len(classes))]
        fits = [j for j in others if (classes[j] == classes[i]) == same]
        assert partner == (fits[0] if fits else -1)
