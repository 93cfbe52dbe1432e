"""Gradient norms: closed form, equivariance, conservation, the uniform null, and what the findings say in words."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.gradient_norms import (
    check_times,
    concentration,
    null_concentration,
    projected_gradients,
    pulled_back,
    token_gradient_norms,
    token_gradients,
    top_share,
    top_tokens,
)
from maskalign_lab.measure.wording import between
from maskalign_lab.runs.studied_runs import studied_runs
from maskalign_lab.studies.gradient_norms.findings import finding, findings_text, share_rows, verdict
from maskalign_lab.studies.gradient_norms.opening import open_study
from maskalign_lab.training.repa import projector


def tokens(seed: int, b: int = 3, n: int = 9):
    torch.manual_seed(seed)
    return projector(8, 12, 6).double(), torch.randn(b, n, 8).double(), torch.randn(b, n, 6).double()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_closed_form_pulled_back_equals_autograd(seed):
    mlp, h, r = tokens(seed)
    exact, closed = token_gradients(mlp, h, r), pulled_back(mlp, h, r)
    assert (exact - closed).abs().max() <= 1e-10 * exact.abs().max()
    z = mlp(h).detach()
    c = torch.cosine_similarity(z, r, dim=-1)
    norm = projected_gradients(z, r).norm(dim=-1)
    torch.testing.assert_close(norm, (1 - c**2).clamp(min=0).sqrt() / z.norm(dim=-1), rtol=1e-8, atol=1e-12)


def test_norms_do_not_depend_on_batch_or_neighbours():
    mlp, h, r = tokens(0)
    norms = token_gradient_norms(mlp, h, r)
    torch.testing.assert_close(
        token_gradient_norms(mlp, h[1:2, 3:4], r[1:2, 3:4])[0, 0], norms[1, 3], rtol=1e-12, atol=0
    )
    order = torch.randperm(9)
    torch.testing.assert_close(token_gradient_norms(mlp, h[:, order], r[:, order]), norms[:, order], rtol=1e-12, atol=0)


def test_norms_work_under_no_grad_and_leave_the_projector_alone():
    mlp, h, r = tokens(0)
    with torch.no_grad():
        norms = token_gradient_norms(mlp, h, r)
    assert not norms.requires_grad and all(p.grad is None for p in mlp.parameters())


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 300), share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_each_image_marks_the_same_number_of_tokens(n, share, seed):
    norms = torch.rand(4, n, generator=torch.Generator().manual_seed(seed))
    top = top_tokens(norms, share)
    assert (top.sum(-1) == max(1, round(share * n))).all()
    if not top.all():
        assert norms[top].view(4, -1).amin(-1).ge(norms[~top].view(4, -1).amax(-1)).all()


def test_uniform_norms_look_like_the_null_and_a_preference_does_not():
    norms = torch.rand(4096, 64, generator=torch.Generator().manual_seed(0))
    null = null_concentration(4096, 64)
    assert concentration(top_tokens(norms).float().mean(0)) < null.max() * 1.1
    norms[:, 5] += 0.3
    assert concentration(top_tokens(norms).float().mean(0)) > 2 * null.max()


def test_few_images_bias_the_ratio_upwards():
    assert null_concentration(128, 64).mean() > 1.5 * null_concentration(4096, 64).mean()


@pytest.mark.parametrize("t", [-0.1, 1.1, 500])
def test_times_outside_the_unit_interval_are_refused(t):
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*never multiplied by 1000"):
        check_times([0.5, t])


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 300), share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_the_top_holds_at_least_its_share(n, share, seed):
    norms = torch.rand(4, n, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    held, even = top_share(norms, share), max(1, round(share * n)) / n
    assert (held >= even - 1e-9).all() and (held <= 1 + 1e-9).all()
    torch.testing.assert_close(top_share(torch.ones(4, n).double(), share), torch.full((4,), even).double())


# ---- the findings


def probability(peak: float) -> np.ndarray:
    found = np.full(64, 0.1)
    found[0] = peak
    return found


SHARES = pd.DataFrame({"one": [0.131, 0.2], "other": [0.3, 0.334]}, pd.Index([0.0, 0.5], name="t"))
POSITIONS = pd.DataFrame(
    [{"run": name, "t": 0.5, "images": 4096} | finding(probability(p), 4096) for name, p in (("a", 0.3), ("b", 0.1))]
)
ON_OBJECT = pd.DataFrame(
    {"t": [0.0, 1.0], "on the object": [0.032, 0.504], "+/-": 0.01, "object's share of the area": 0.169}
)
PLACES = pd.DataFrame({"run": ["a", "b"], "t": 0.5, "correlation with coverage": [-0.87, 0.96]})


def test_the_verdict_says_what_the_rows_say():
    text = verdict(SHARES, POSITIONS)
    assert "13 to 33 % of an image's summed norm, less than half" in text
    assert (
        "at t = 0.50, in a survey of 4,096" in text
        and "1.0 to 2.9 times" in text
        and "is 1 to 3 (by chance 1.3)" in text
    )
    assert "above chance in 1 of 2 networks" in text and "*undecided*, nothing detectable." in text
    assert text.endswith("Of 2 verdicts luck would decide about 0.1 if there were nothing to be seen.")
    assert "less than half" not in verdict(SHARES + 0.3, POSITIONS)


def test_a_position_that_is_never_marked_reads_as_infinite():
    never = probability(0.3)
    never[1] = 0
    rows = POSITIONS.iloc[:1].assign(**finding(never, 4096))
    assert "is infinite (by chance" in verdict(SHARES, rows)


def test_findings_hold_every_row_and_say_when_there_are_no_masks():
    text = findings_text(SHARES, POSITIONS, ON_OBJECT, PLACES)
    assert (
        text.count("\n* ") == 2
        and "3 % of the marked tokens lie on the object at t = 0.00 and 50 % at t = 1.00" in text
    )
    assert "would hit it in 17 %" in text and "correlate by -0.87 to 0.96" in text
    assert "has no masks" in findings_text(SHARES, POSITIONS, pd.DataFrame(), pd.DataFrame())


def test_share_rows_are_means_over_images():
    norms = torch.rand(5, 3, 20, generator=torch.Generator().manual_seed(0))
    rows = share_rows({"one": norms}, np.array([0, 0.5, 1]))
    assert rows.loc[0.5, "one"] == pytest.approx(top_share(norms[:, 1]).mean().item())


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [
        ([9.4, 12.2], ".0f", "9 to 12"),
        ([0.2, float("inf")], ".1f", "0.2 to infinite"),
        ([float("nan")], ".1f", "(not measured)"),
    ],
)
def test_ranges_in_words(values, form, expected):
    assert between(values, form) == expected


# ---- the opening


def test_a_given_run_is_shown_as_it_is_and_says_so(capsys):
    given = dict(preset="smoke", dataset="shapes", device="cpu", seed=0, shipped=(), trained=())
    assert [run.name for run in studied_runs("sit-shapes", overrides="", **given)] == ["sit-shapes"]
    assert not capsys.readouterr().out
    studied_runs("sit-shapes", overrides="training.steps=2", **given)
    assert "overrides would change what is trained" in capsys.readouterr().out


def test_an_unknown_preset_or_parameter_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        open_study("smkoe")
    with pytest.raises(TypeError, match="preest"):
        open_study(preest="smoke")
