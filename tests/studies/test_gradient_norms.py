"""Gradient norms: closed form, equivariance, conservation, and the uniform null."""

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
    top_tokens,
)
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
