"""Gradient norms: closed form, equivariance, conservation, the uniform null, and how unevenness is measured."""

import numpy as np
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
from maskalign_lab.position_preference import gini_again, peak_again
from maskalign_lab.runs.studied_runs import studied_runs
from maskalign_lab.studies.gradient_norms.findings import finding, share_rows
from maskalign_lab.studies.gradient_norms.opening import open_study
from maskalign_lab.studies.gradient_norms.unevenness import TIMES, unevenness
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


# ---- how unevenness is measured


def random_norms(images: int = 2048, seed: int = 0) -> torch.Tensor:
    """Norms at all times that prefer nothing; an image has them anew at every time."""
    return torch.rand(len(TIMES), images, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("images", [64, 2048])
def test_chance_leaves_every_measure_where_it_says(images):
    """Whatever the number of images: the mean of several surveys is within five errors of it."""
    found = [unevenness(random_norms(images, seed), None) for seed in range(30)]
    for name, chance in (("peak", 1), ("gini", 0), ("same t", 0), ("over t", 0), ("both ends", 0)):
        values = np.array([each[name] for each in found])
        assert abs(values.mean() - chance) < 5 * values.std(ddof=1) / 30**0.5, name


def test_noise_that_an_image_keeps_over_t_makes_no_two_maps_alike():
    """Maps of the same images would correlate by 1 here."""
    still = [random_norms(512, seed)[:1].expand(len(TIMES), -1, -1) for seed in range(30)]
    same_images = top_tokens(still[0][:2]).float().mean(1)
    assert np.corrcoef(same_images)[0, 1] == pytest.approx(1)
    found = np.array([unevenness(each, None)["over t"] for each in still])
    assert abs(found.mean()) < 5 * found.std(ddof=1) / 30**0.5


def test_measures_are_bounded_and_reach_their_ends():
    norms = torch.full((len(TIMES), 64, 16), 1e-9)
    norms[:, :, 5], norms[:, :, 6] = 2.0, 1.0
    found = unevenness(norms, None)
    assert found["peak"] == 8 and found["held"] == pytest.approx(1)  # two of 16 are marked, at most every time
    assert found["gini"] == pytest.approx((15 * 2 + 13) / (16 * 3), abs=1e-3)
    assert found["same t"] == found["over t"] == found["both ends"] == 1
    assert np.shape(found["marks"]) == (len(TIMES), 16) and np.mean(found["marks"]) == pytest.approx(2 / 16)


def test_a_preference_that_turns_over_t_is_seen_at_both_ends():
    norms = random_norms()
    norms[:2, :, :8] += 0.5
    norms[-2:, :, 8:] += 0.5
    found = unevenness(norms, None)
    assert found["both ends"] < -0.9 and found["same t"] > 0.6 > found["over t"]


def test_maps_are_put_beside_where_objects_stand():
    masks = np.zeros((256, 8, 8), np.uint8)
    masks[:, 2:6, 2:6] = 1  # the four tokens in the middle of 4 by 4
    norms = random_norms(256)
    middle = torch.zeros(4, 4, dtype=torch.bool)
    middle[1:3, 1:3] = True
    norms[0] += ~middle.flatten()
    norms[-1] += middle.flatten()
    found = unevenness(norms, masks)
    assert found["object at t = 0"] < -0.5 and found["object at t = 1"] > 0.8
    assert found["object per t"][0] == found["object at t = 0"] and len(found["object per t"]) == len(norms)
    assert found["objects"] == middle.flatten().float().tolist()


def test_the_favourite_of_other_images_is_asked():
    picked, asked = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3.0, 1.0, 2.0])
    assert peak_again(picked, asked) == 0.5 and peak_again(asked, asked) == 1.5
    assert gini_again(asked, asked) == pytest.approx(2 / 9, abs=1e-6)
    assert gini_again(picked, asked) == pytest.approx(-2 / 9, abs=1e-6)


# ---- the networks of the first screen


def probability(peak: float) -> np.ndarray:
    found = np.full(64, 0.1)
    found[0] = peak
    return found


def test_a_favourite_is_above_chance():
    favoured, even = (finding(probability(peak), 4096) for peak in (0.3, 0.1))
    assert (favoured["above chance"], even["above chance"]) == ("yes", "no")
    assert favoured["peak"] == pytest.approx(0.3 / probability(0.3).mean()) and favoured["ratio"] == pytest.approx(3)
    never = probability(0.3)
    never[1] = 0
    assert finding(never, 4096)["ratio"] == float("inf")


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
