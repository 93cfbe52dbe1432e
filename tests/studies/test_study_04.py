"""Study 04: what its figures hold, and its measures against brute force and known answers."""

import json

import nbformat
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.displayed import displayed_markdown
from shared.studies import check_figure, smoke_fixture
from torch import nn

from maskalign_lab.base import devices
from maskalign_lab.diffusion.guidance import Field, pack
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.diffusion.sit import Output, SiT
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.run import load_run
from maskalign_lab.studies.reg.arm_findings import arm_findings
from maskalign_lab.studies.reg.exchange import changed_share, exchange_all, partners, slope
from maskalign_lab.studies.reg.findings import at, class_effect, findings_text, measured, read_off
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
        (arm, seed, budget) for arm in ("REPA", "REG") for seed in (0, 1) for budget in ("early", "steps", "flops")
    }
    assert all(("carried" in row) is (row["arm"] == "REG") for row in rows)
    assert arm_findings(rows) in displayed_markdown(smoke.path(".ipynb"))


def test_a_run_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match="no class token; take a run of method reg"):
        make_reader(load_run("sit-shapes"))


def test_an_unknown_preset_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        open_study("smkoe")


def test_the_findings_are_told_below_their_table(smoke):
    book = nbformat.read(smoke.path(".ipynb"), as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    (text,) = (text for text in texts if text.startswith("* **Class.**"))
    rows = pd.DataFrame(json.loads((smoke.path(".html").parent / "04_filmstrip.json").read_text())["findings"])
    assert "(not measured)" not in text
    (likeness,) = (line for line in text.splitlines() if "**Token after an exchange.**" in line)
    found = rows.loc[rows["measure"] == "likeness of the final token to the donor's token, t = 0.6", "value"]
    assert f"{found.min():.2f}" in likeness and f"{found.max():.2f}" in likeness


# ---- the findings in words


WAYS = ("label given", "no label")


def findings(effects: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Made up rows; the effect of the token's class by way of sampling, with its interval."""
    rows = []
    for i, way in enumerate(WAYS):
        rows.append({"measure": "reader finds the final class in the final class token", "value": 0.09 + 0.03 * i})
        rows.append({"measure": "changed: token of another class at t = 0.6", "value": 0.187 - 0.02 * i})
        value, half = effects[way]
        rows.append({"measure": "own class: same class less another class, t = 0.6", "value": value, "+/-": half})
        rows[-3:] = [{"sampled with": way, "+/-": 0.05, "n": 40} | row for row in rows[-3:]]
    return pd.DataFrame(rows)


def test_findings_are_ranges_over_the_ways_of_sampling():
    text = findings_text(findings({"label given": (-0.025, 0.11), "no label": (0.2, 0.16)}), 0.1, 0.43)
    assert "in 9 to 12 % of the final tokens (chance 10 %), in 43 % of real ones." in text
    assert "changes 17 to 19 % of the pixels" in text
    assert "costs -0.03 +/- 0.11 (label given, detectable 0.16) and 0.20 +/- 0.16 (no label) more" in text
    assert "is seen for samples with no label." in text
    assert text.endswith("\n\nOf 2 verdicts luck would decide about 0.1 if there were nothing to be seen.")


def test_an_effect_within_its_interval_is_not_seen():
    text = findings_text(findings(dict.fromkeys(WAYS, (0.1, 0.16))), 0.1, 0.43)
    assert "That the token's class acts on the image's is not seen." in text and text.count("detectable 0.23") == 2


def test_what_was_not_measured_is_not_told():
    text = findings_text(findings(dict.fromkeys(WAYS, (0.1, 0.16))), 0.1, 0.43)
    assert text.count("\n* ") == 1 and "Contrast" not in text and "Fit" not in text


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
