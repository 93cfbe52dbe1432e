"""Cosines of gradients against two naive backward passes, for every method that aligns."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.maskalign import MaskAlign, MaskAlignConfig
from maskalign_lab.measure.conflict import block_gradients, conflict, cosines, gradient_cosines, with_gradients
from maskalign_lab.reg import REG, REGConfig
from maskalign_lab.training.haste import HASTE, HASTEConfig
from maskalign_lab.training.irepa import IREPA, IREPAConfig
from maskalign_lab.training.methods import Batch, State
from maskalign_lab.training.repa import REPA, REPAConfig

SHORT = dict(depth=2, projector_width=24)
METHODS = {
    "repa": (REPA, REPAConfig(**SHORT), {}),
    "irepa": (IREPA, IREPAConfig(depth=2), {}),
    "haste": (HASTE, HASTEConfig(**SHORT, student_blocks=(1, 2), teacher_blocks=(1, 2), stop=5), {}),
    "reg": (REG, REGConfig(**SHORT), {"class_dim": 12}),
    "maskalign": (MaskAlign, MaskAlignConfig(inner=REGConfig(**SHORT)), {"class_dim": 12, "mixer_depth": 1}),
}


def made(name: str):
    """A frozen network away from the identity, its method, and a batch."""
    kind, config, more = METHODS[name]
    torch.manual_seed(0)
    net = SiT(input_size=16, patch_size=4, in_channels=3, width=32, depth=3, heads=4, num_classes=10, **more)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    method = kind(net.requires_grad_(False), Objective(), config, teacher_dims=(12,)).requires_grad_(False)
    return net, method, batch(0)


def batch(seed: int) -> Batch:
    torch.manual_seed(seed)
    tokens, attention = torch.randn(6, 16, 12), torch.randn(6, 2, 4, 16, 16)
    return Batch(torch.randn(6, 3, 16, 16), torch.arange(6), tokens, torch.randn(6, 12), attention)


def slope(p: torch.nn.Parameter) -> torch.Tensor:
    """A gradient, of zeros where the loss does not reach."""
    return (torch.zeros_like(p) if p.grad is None else p.grad).flatten()


@pytest.mark.parametrize("name", METHODS)
def test_the_cosine_is_that_of_two_backward_passes(name):
    net, method, data = made(name)
    parts = ("alignment", "attention") if name == "haste" else ("alignment",)
    found = gradient_cosines(method, net, data, [0.25, 0.75], [1, 2], parts, seed=3)
    assert found.shape == (len(parts), 2, 2)
    drawn = method.draw(data, 0, partial(generator, 3))
    net.requires_grad_(True)
    for k, part in enumerate(parts):
        for i, t in enumerate((0.25, 0.75)):
            slopes = []
            for loss in ("denoising", part):
                net.zero_grad(set_to_none=True)
                draw = replace(drawn, t=torch.full((6,), t), y=data.y)
                method.loss(State(net, net, 0), data, draw).parts[loss].backward()
                slopes.append([torch.cat([slope(p) for p in net.blocks[j].parameters()]) for j in (0, 1)])
            for j in (0, 1):
                naive = torch.cosine_similarity(slopes[0][j], slopes[1][j], dim=0).item()
                assert found[k, i, j].item() == pytest.approx(naive, abs=1e-5)


def test_a_loss_agrees_with_itself_and_opposes_its_negative():
    net, method, data = made("repa")
    assert gradient_cosines(method, net, data, [0.5], [1, 2, 3], ("denoising",)).min() > 1 - 1e-9
    block = [list(net.blocks[0].parameters())]
    with with_gradients(block[0]):
        loss = sum(p.square().sum() for p in block[0])
        one, other = block_gradients(loss, block), block_gradients(-3 * loss, block)
    assert cosines(one, other).item() == pytest.approx(-1)


def test_behind_the_aligned_block_there_is_nothing_to_compare():
    net, method, data = made("repa")
    assert gradient_cosines(method, net, data, [0.5], [2, 3]).isnan().tolist() == [[[False, True]]]


def test_a_method_that_has_stopped_is_asked_what_alignment_would_do():
    net, method, data = made("haste")
    assert "alignment" not in method.loss(State(net, net, 5), data, method.draw(data, 5, partial(generator, 0))).parts
    assert gradient_cosines(method, net, data, [0.5], [1]).isfinite().all()


def test_a_network_is_left_as_it_was():
    net, method, data = made("repa")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradient_cosines(method, net, data, [0.5], [1])
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(RuntimeError), with_gradients(list(net.parameters())):
        raise RuntimeError
    assert not any(p.requires_grad for p in net.parameters())


def test_batches_have_noise_of_their_own():
    net, method, _ = made("repa")
    found = conflict(method, net, map(batch, range(3)), [0.5], [1])
    each = [gradient_cosines(method, net, batch(k), [0.5], [1], seed=k) for k in range(3)]
    assert torch.equal(found, torch.stack(each, -1)) and found.shape == (1, 1, 1, 3)
    assert not torch.equal(conflict(method, net, [batch(0), batch(0)], [0.5], [1]).diff(), torch.zeros(1, 1, 1, 1))


def test_unknown_losses_depths_and_times_are_refused():
    net, method, data = made("repa")
    with pytest.raises(ValueError, match="loss of method repa 'alignmnt'.*alignment"):
        gradient_cosines(method, net, data, [0.5], [1], ("alignmnt",))
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        gradient_cosines(method, net, data, [0.5], [0])
    with pytest.raises(ValueError, match="outside"):
        gradient_cosines(method, net, data, [50], [1])
