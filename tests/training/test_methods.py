"""Methods: the registry, edits in a notebook, and randomness that does not depend on who draws."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.runs.edits import edit_digest
from maskalign_lab.training.methods import INSTALLED, METHODS, Batch, Method, MethodConfig, PlainSiT, State, shard
from maskalign_lab.training.repa import REPA, REPAConfig, cosine_alignment


def setting(n: int = 8):
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=3, heads=2, num_classes=10)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net, Batch(torch.randn(n, 3, 8, 8), torch.randint(0, 10, (n,)), torch.randn(n, 4, 6))


def test_repa_is_velocity_plus_weighted_alignment():
    net, batch = setting()
    repa = REPA(net, Objective(), REPAConfig(weight=0.3, depth=2, projector_width=12), teacher_dims=(6,))
    draw = repa.draw(batch, 5, partial(generator, 0))
    losses = repa.loss(State(net, net, 5), batch, draw)
    plain = PlainSiT(net, Objective(), MethodConfig()).loss(State(net, net, 5), batch, draw)
    torch.testing.assert_close(losses.parts["denoising"], plain.total)
    x_t = (1 - draw.t)[:, None, None, None] * batch.x + draw.t[:, None, None, None] * draw.noise
    hidden = net(x_t, draw.t, draw.y, collect=(2,)).hidden[2]
    expected = -torch.cosine_similarity(repa.projectors[0](hidden), batch.features, dim=-1).mean()
    torch.testing.assert_close(losses.parts["alignment"], expected)
    torch.testing.assert_close(losses.total, plain.total + 0.3 * expected)


def test_methods_with_one_seed_draw_the_same():
    net, batch = setting()
    first = PlainSiT(net, Objective(), MethodConfig()).draw(batch, 7, partial(generator, 3))
    second = REPA(net, Objective(), REPAConfig(depth=2, projector_width=12), teacher_dims=(6,))
    second = second.draw(batch, 7, partial(generator, 3))
    assert torch.equal(first.t, second.t) and torch.equal(first.noise, second.noise) and torch.equal(first.y, second.y)


@settings(deadline=None, max_examples=20)
@given(world=st.integers(1, 4), per=st.integers(1, 3))
def test_shards_partition_batch_and_draw(world, per):
    net, batch = setting(world * per)
    draw = PlainSiT(net, Objective(), MethodConfig()).draw(batch, 0, partial(generator, 0))
    for whole, name in ((batch, "y"), (draw, "t")):
        parts = torch.cat([getattr(shard(whole, rank, world), name) for rank in range(world)])
        assert torch.equal(parts.sort().values, getattr(whole, name).sort().values)


def test_held_out_images_are_sharded_too():
    net, batch = setting(5)
    batch.held_out = Batch(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5))
    parts = [shard(batch, rank, 2) for rank in range(2)]
    assert [part.held_out.y.tolist() for part in parts] == [[0, 2, 4], [1, 3]]
    assert all(len(part.y) == len(part.held_out.y) for part in parts)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(1e-4, 1e6), seed=st.integers(0, 99))
def test_alignment_ignores_scale_and_stays_in_range(scale, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 7, generator=g)
    loss = cosine_alignment(a * scale, b)
    assert (loss.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(loss, cosine_alignment(a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_huge_and_constant_tokens_give_no_nan(dtype):
    values = [[[0.0, 0.0], [3e4, 3e4], [1e-7, 1e-7], [1.0, 1.0]]]
    tokens = torch.tensor(values, dtype=dtype, requires_grad=True)
    loss = cosine_alignment(tokens, torch.ones(1, 4, 2))
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.sum().backward()
    limit = 2e6 if dtype != torch.float16 else float("inf")  # float16 cannot hold the gradient of a zero token
    assert not tokens.grad.isnan().any() and tokens.grad.abs().max() <= limit


def test_a_teacher_with_another_grid_is_refused():
    with pytest.raises(ValueError, match="the network gives 4 tokens of 6 channels, the teacher 9 of 6"):
        cosine_alignment(torch.ones(1, 4, 6), torch.ones(1, 9, 6))


def test_alignment_beyond_the_net_is_refused_at_once():
    with pytest.raises(ValueError, match="depth 4 is outside the network: it has blocks 1 to 3"):
        REPA(setting()[0], Objective(), REPAConfig(depth=4), teacher_dims=(6,))


def test_the_notebooks_definition_wins_whichever_comes_last(monkeypatch):
    monkeypatch.setitem(METHODS, "repa", REPA)
    monkeypatch.setitem(INSTALLED, "repa", REPA)

    class Edited(Method, name="repa"):
        __module__ = "__main__"

    assert METHODS["repa"] is Edited

    class InstalledLater(Method, name="repa"):
        __module__ = "somewhere.installed"

    assert METHODS["repa"] is Edited


def test_an_edited_class_method_is_an_edit(monkeypatch):
    monkeypatch.setitem(METHODS, "sit", PlainSiT)

    def edited(body):
        class Edited(PlainSiT, name="sit"):
            __module__ = "__main__"
            needed = classmethod(body)

        return edit_digest(MethodConfig())

    first, second = (
        edited(lambda cls, config, step: cls.needs),
        edited(lambda cls, config, step: () if step else cls.needs),
    )
    assert first and second and first != second
