"""Zero, huge and constant tokens in half precision: losses and gradients stay finite (REPA issue 46 and its kin)."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.gradient_norms import token_gradient_norms
from maskalign_lab.training.methods import Batch, State
from maskalign_lab.training.repa import REPA, REPAConfig, cosine_alignment

HALVES = (torch.float16, torch.bfloat16)


def tokens(kind, shape=(2, 16, 12), dtype=torch.float32):
    """Tokens that break a careless cosine."""
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = {
        "zero": torch.zeros(shape),
        "huge": 3e4 * random.clamp(-2, 2),  # the square overflows float16
        "tiny": 1e-6 * random,
        "constant": torch.full(shape, 7.0),
        "one zero": random * (torch.arange(shape[1]) > 0).view(1, -1, *[1] * (len(shape) - 2)),
    }
    return values[kind].to(dtype)


KINDS = ("zero", "huge", "tiny", "constant", "one zero")


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(HALVES))
def test_the_cosine_and_its_gradient_are_finite(ours, theirs, dtype):
    projected = tokens(ours, dtype=dtype).requires_grad_()
    losses = cosine_alignment(projected, tokens(theirs, dtype=dtype))
    losses.mean().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and losses.abs().max() <= 1 + 1e-4
    assert projected.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("images", KINDS)
@pytest.mark.parametrize("features", KINDS)
def test_a_training_step_is_finite(images, features, dtype):
    torch.manual_seed(0)
    net = SiT(input_size=16, patch_size=4, in_channels=3, width=32, depth=2, heads=2, num_classes=10)
    repa = REPA(net, Objective(), REPAConfig(depth=1, projector_width=16), teacher_dims=(12,))
    x = tokens(images, (2, 3, 16, 16)).clamp(-100, 100)
    batch = Batch(x, torch.zeros(2, dtype=torch.long), tokens(features))
    with torch.autocast("cpu", dtype):
        losses = repa.loss(State(net, net, 0), batch, repa.draw(batch, 0, partial(generator, 0)))
    losses.total.backward()
    assert losses.total.isfinite() and losses.parts["alignment"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in [*net.parameters(), *repa.parameters()] if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norms_of_study_01_are_finite(kind):
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.SiLU(), torch.nn.Linear(16, 12))
    norms = token_gradient_norms(projector, tokens(kind), tokens("one zero"))
    assert norms.isfinite().all()
