"""REG: its loss from parts, its start beside REPA's, and joint sampling with a known answer."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.guidance import Field, pack, unpack
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample, sample
from maskalign_lab.diffusion.sit import Output, SiT
from maskalign_lab.diffusion.solvers import SOLVERS
from maskalign_lab.reg import REG, REGConfig
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.methods import Batch, State, shard
from maskalign_lab.training.repa import REPA, REPAConfig


def setting(n: int = 6, **config):
    """A network whose outputs are not zero, REG on it, a batch and its draws, in float64."""
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=3, heads=2, num_classes=10, class_dim=6)
    for name, parameter in net.named_parameters():
        if name != "pos_embed":
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    method = REG(
        net, Objective(), REGConfig(**{"depth": 2, "projector_width": 12} | config), teacher_dims=(6,)
    ).double()
    batch = Batch(torch.randn(n, 3, 8, 8), torch.randint(0, 10, (n,)), torch.randn(n, 4, 6), torch.randn(n, 6))
    draw = method.draw(batch, 5, partial(generator, 0))
    return net.double(), method, *(as_double(values) for values in (batch, draw))


def as_double(values):
    floats = {k: v.double() for k, v in vars(values).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return replace(values, **floats)


def test_the_loss_is_the_papers_sum_of_three_parts():
    net, method, batch, draw = setting(weight=0.3, class_weight=0.07)
    losses = method.loss(State(net, net, 5), batch, draw)
    t, t_image = draw.t[:, None], draw.t[:, None, None, None]
    x_t = (1 - t_image) * batch.x + t_image * draw.noise
    c_t = (1 - t) * batch.class_token + t * draw.class_noise
    # the network by hand: embed both, class token first, run the blocks, two output layers
    front = net.wg_norm(net.cls_projectors2(c_t))[:, None]
    tokens = torch.cat([front, net.x_embedder(x_t) + net.pos_embed[:, 1:]], 1)
    c = net.t_embedder(draw.t) + net.y_embedder(draw.y)
    for depth, block in enumerate(net.blocks, start=1):
        tokens = block(tokens, c)
        if depth == 2:
            aligned = method.projectors[0](tokens)
    patches, v_c = net.final_layer(tokens, c)
    v = patches.view(-1, 2, 2, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(batch.x.shape)
    teacher = torch.cat([batch.class_token[:, None], batch.features], 1)
    parts = {
        "denoising": (v - (draw.noise - batch.x)).square().mean(),
        "alignment": -torch.cosine_similarity(aligned, teacher, dim=-1).mean(),
        "class_denoising": (v_c - (draw.class_noise - batch.class_token)).square().mean(),
    }
    for name, expected in parts.items():
        torch.testing.assert_close(losses.parts[name], expected, rtol=1e-10, atol=1e-12)
    total = parts["denoising"] + 0.3 * parts["alignment"] + 0.07 * parts["class_denoising"]
    torch.testing.assert_close(losses.total, total, rtol=1e-10, atol=1e-12)


def test_the_weights_are_the_papers():
    assert (REGConfig().weight, REGConfig().class_weight) == (0.5, 0.03)


def test_with_one_seed_reg_starts_as_repas_network_and_projector():
    reg, repa = (build(make_recipe(name, "smoke", seed=3), Facts(10, (16,))) for name in ("reg", "repa"))
    ours, theirs = reg[0].state_dict(), repa[0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if name != "pos_embed")
    assert torch.equal(ours["pos_embed"][:, 1:], theirs["pos_embed"]) and not ours["pos_embed"][:, 0].any()
    assert set(ours) - set(theirs) == {
        f"{layer}.{kind}"
        for layer in ("cls_projectors2", "wg_norm", "final_layer.linear_cls")
        for kind in ("weight", "bias")
    }
    for name, value in repa[1].state_dict().items():
        assert torch.equal(reg[1].state_dict()[name], value)


def test_draws_beyond_the_class_noise_are_repas():
    _, method, batch, draw = setting()
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=3, heads=2, num_classes=10)
    repa = REPA(net, Objective(), REPAConfig(depth=2, projector_width=12), teacher_dims=(6,))
    theirs = as_double(repa.draw(batch, 5, partial(generator, 0)))
    assert torch.equal(draw.t, theirs.t) and torch.equal(draw.noise, theirs.noise) and torch.equal(draw.y, theirs.y)
    assert draw.class_noise.shape == batch.class_token.shape and theirs.class_noise is None


def test_the_class_velocity_teaches_its_output_layer_and_the_blocks_but_not_the_images_output():
    net, method, batch, draw = setting()
    method.loss(State(net, net, 0), batch, draw).parts["class_denoising"].backward()
    for module in (net.final_layer.linear_cls, net.cls_projectors2, net.wg_norm, *(b.attn.qkv for b in net.blocks)):
        assert module.weight.grad.abs().sum() > 0
    assert net.x_embedder.proj.weight.grad.abs().sum() > 0  # through attention: the token listens to the image
    assert net.final_layer.linear.weight.grad is None
    assert all(p.grad is None for p in method.projectors.parameters())


def test_the_images_velocity_listens_to_the_class_token():
    net, method, batch, draw = setting()
    before = method.loss(State(net, net, 0), batch, draw).parts["denoising"]
    after = method.loss(State(net, net, 0), batch, replace(draw, class_noise=draw.class_noise + 1)).parts["denoising"]
    assert (before - after).abs() > 1e-6


def test_shards_share_out_the_class_noise():
    net, method, batch, draw = setting(n=6)
    parts = [shard(draw, rank, 2) for rank in range(2)]
    assert torch.equal(torch.stack([p.class_noise for p in parts], 1).flatten(0, 1), draw.class_noise)
    losses = [method.loss(State(net, net, 0), shard(batch, r, 2), parts[r]).total for r in range(2)]
    torch.testing.assert_close(sum(losses) / 2, method.loss(State(net, net, 0), batch, draw).total)


class ExactPair(nn.Module):
    """The optimal velocities for an image of N(0.5, 0.3^2) and a class token of N(-1, 0.2^2), the linear path."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 4, 1, 1, 32

    def __init__(self):
        super().__init__()
        self.holder = nn.Parameter(torch.zeros((), dtype=torch.float64))

    @staticmethod
    def velocity(x_t, t, mean, std):
        t = t.view(-1, *[1] * (x_t.ndim - 1))
        surprise = (x_t - (1 - t) * mean) / (((1 - t) * std) ** 2 + t**2)
        return t * surprise - mean - (1 - t) * std**2 * surprise

    def forward(self, x, t, y, cls):
        return Output(self.velocity(x, t, 0.5, 0.3), self.velocity(cls, t, -1.0, 0.2), {})


@pytest.mark.parametrize("solver", SOLVERS)
def test_joint_sampling_finds_both_gaussians_with_every_solver(solver):
    for step in sample(ExactPair(), Objective(), torch.zeros(256, dtype=torch.long), SamplerConfig(solver, steps=100)):
        pass
    assert step.x.shape == (256, 1, 4, 4) and step.cls.shape == (256, 32)
    assert abs(step.x.mean() - 0.5) < 0.02 and abs(step.x.std() - 0.3) < 0.03
    assert abs(step.cls.mean() + 1) < 0.02 and abs(step.cls.std() - 0.2) < 0.03


def test_the_image_starts_from_the_same_noise_with_and_without_a_class_token():
    small = dict(input_size=8, patch_size=4, in_channels=3, width=16, depth=1, heads=2, num_classes=10)
    y = torch.zeros(3, dtype=torch.long)
    first = [next(iter(sample(SiT(**small, class_dim=dim), Objective(), y, seed=7))).x for dim in (None, 6)]
    assert torch.equal(*first)


class Labelled(nn.Module):
    """Velocities that differ with and without a label: 1 and 0 for the image, 2 and 1 for the class token."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 2, 1, 3, 5

    def __init__(self):
        super().__init__()
        self.holder = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y, cls):
        told = (y != self.num_classes).double()
        image = told.view(-1, 1, 1, 1).expand_as(x)
        return Output(image, 1 + told[:, None].expand_as(cls), {})


def velocities(t: float = 0.5, **guidance):
    net, y = Labelled(), torch.tensor([0, 2])
    state = pack(torch.zeros(2, 1, 2, 2), torch.zeros(2, 5)).double()
    v, v_c = unpack(net, Field(net, Objective(), y, SamplerConfig(**guidance))(state, t))
    assert v.unique().numel() == v_c.unique().numel() == 1
    return v.unique().item(), v_c.unique().item()


def test_two_guidance_scales_act_apart():
    assert velocities() == (1, 2)
    assert velocities(class_guidance=3.0) == (1, 4)  # the image's velocity is left alone
    assert velocities(guidance=3.0, class_guidance=1.0) == (3, 2)  # and the class token's
    assert velocities(guidance=3.0, class_guidance=2.0) == (3, 3)


def test_equal_scales_are_one_scale_and_both_keep_to_the_interval():
    assert velocities(guidance=2.3) == velocities(guidance=2.3, class_guidance=2.3) == (2.3, 1 + 2.3)
    assert velocities(t=0.9, guidance=2.3, guidance_high=0.85) == (1, 2)
    y = torch.tensor([0, 2])
    one, two = (
        last_sample(Labelled(), Objective(), y, SamplerConfig(guidance=2.3, class_guidance=scale))
        for scale in (None, 2.3)
    )
    assert torch.equal(one, two)


def test_a_forgotten_class_token_is_refused():
    net, *_ = setting()
    with pytest.raises(ValueError, match="class token of 6 channels, and cls is missing"):
        net(torch.zeros(1, 3, 8, 8).double(), torch.zeros(1).double(), torch.zeros(1, dtype=torch.long))
