"""Numbers recorded from the official code of REG, HASTE and iREPA, reproduced by the lab."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from shared.golden import close, golden, opened
from torch import nn
from torch.testing import assert_close

from maskalign_lab.diffusion.interpolants import coefficients, interpolate
from maskalign_lab.diffusion.objectives import Objective, denoising_loss
from maskalign_lab.diffusion.sit import Output, SiT
from maskalign_lab.training.haste import HASTE, HASTEConfig, attention_alignment, student_logits
from maskalign_lab.training.irepa import ConvProjector, spatial_norm
from maskalign_lab.training.methods import Batch, Draw, State, denoise
from maskalign_lab.training.repa import cosine_alignment, projector

PATHS = ("linear", "cosine")
exactly = dict(rtol=1e-5, atol=0)


def inputs(name, *keys):
    return (golden(name).inputs[key] for key in keys)


# --- REG --------------------------------------------------------------------------------------------------------------


def test_the_network_of_reg():
    official, out = opened("reg"), golden("reg").out
    net, (x, t, y, cls) = official.net, inputs("reg", "x", "t", "y", "cls")
    mine = net(x, t, y, cls=cls, collect=(1, 2, 3, 4))
    close(mine.prediction, out["pred"])
    close(mine.class_prediction, out["cls_pred"])
    for depth in range(1, 5):
        close(mine.hidden[depth], out[f"h.block{depth - 1}"])
    close(net.t_embedder(t), out["h.t_emb"])
    close(official.method.projectors[0](mine.hidden[2]), out["zs.0"])
    assert torch.equal(net.pos_embed[0, 0], torch.zeros(64))


def test_the_class_token_of_reg_enters_normalised():
    net, out = opened("reg").net, golden("reg").out
    cls, probe = inputs("reg", "cls", "probe_small")
    close(net.wg_norm(net.cls_projectors2(cls)), out["h.cls_in_after_wg_norm"])
    close(net.wg_norm(probe), out["probe.wg_norm"], rtol=1e-4, atol=1e-6)


def reg_step(path):
    """Batch, draw, and the recorded teacher rows (class token first), which are not the clean class token's."""
    images, y, zs, clean = inputs("reg", "images", "y", "zs.0", "cls_clean")
    t, noise, class_noise = inputs("reg", "t", "noise", "noise_cls")
    official = opened("reg")
    official.method.objective = Objective(path)
    official.net.zero_grad(set_to_none=True), official.method.zero_grad(set_to_none=True)
    return official, Batch(images, y, zs[:, 1:], clean), Draw(t, noise, y, class_noise), zs


def recorded_class_losses(path, prediction, batch, draw):
    """The class token's velocity losses as REG's code takes them, and as they should be.

    On the cosine path its coefficients have shape (b, 1, 1, 1) and the tokens (b, z), so that every time meets every token: the
    recorded losses are means over all pairs, and a method's own is the mean over the pairs that belong together.
    """
    c = coefficients(path, draw.t, draw.t)
    times = [value.expand(3).view(3, 1, 1) for value in (c.d_alpha, c.d_sigma)]
    target = times[0] * batch.class_token + times[1] * draw.class_noise  # (b times, b tokens, z)
    pairs = (prediction - target).square().mean(-1)
    return (pairs.diagonal() if path == "linear" else pairs.mean(1)), pairs.diagonal()


def recorded_parts(path):
    """Network, method and the parts of REG's loss, aligned with the recorded rows."""
    official, batch, draw, zs = reg_step(path)
    net, method = official.net, official.method
    x_t = interpolate(batch.x, draw.noise, draw.t, path)
    out = net(x_t, draw.t, draw.y, interpolate(batch.class_token, draw.class_noise, draw.t, path), collect=(2,))
    velocity = denoising_loss(method.objective, out.prediction, batch.x, draw.noise, draw.t)
    alignment = cosine_alignment(method.projectors[0](out.hidden[2]), zs).mean()
    taken, own = recorded_class_losses(path, out.class_prediction, batch, draw)
    total = velocity.mean() + method.config.weight * alignment + method.config.class_weight * taken.mean()
    return net, method, SimpleNamespace(velocity=velocity, alignment=alignment, taken=taken, own=own, total=total)


@pytest.mark.parametrize("path", PATHS)
def test_the_losses_of_reg(path):
    out, (_, _, parts) = golden("reg").out, recorded_parts(path)
    assert_close(parts.velocity, out[f"loss.{path}.denoising"], **exactly)
    assert_close(parts.alignment, out[f"loss.{path}.proj"].squeeze(), **exactly)
    assert_close(parts.taken, out[f"loss.{path}.cls"], **exactly)
    assert_close(parts.total, out[f"loss.{path}.total_proj0.5_cls0.03"].squeeze(), **exactly)
    official, batch, draw, _ = reg_step(path)
    losses = official.method.loss(State(official.net, official.net, 0), batch, draw)
    assert_close(losses.parts["denoising"], out[f"loss.{path}.denoising"].mean(), **exactly)
    assert_close(losses.parts["class_denoising"], parts.own.mean(), **exactly)
    if path == "linear":
        assert_close(losses.parts["class_denoising"], out["loss.linear.cls"].mean(), **exactly)


@pytest.mark.parametrize("path", PATHS)
def test_the_alignment_of_reg_runs_over_class_token_and_patches(path):
    """The method takes the clean class token for the teacher's first row, as in training."""
    official, batch, draw, zs = reg_step(path)
    hidden = denoise(official.method, official.net, batch, draw).hidden[2]
    rows = torch.cat([batch.class_token.unsqueeze(1), zs[:, 1:]], 1)
    losses = official.method.loss(State(official.net, official.net, 0), batch, draw)
    assert_close(losses.parts["alignment"], cosine_alignment(official.method.projectors[0](hidden), rows).mean())
    weighed = losses.parts["denoising"] + 0.5 * losses.parts["alignment"] + 0.03 * losses.parts["class_denoising"]
    assert_close(losses.total, weighed)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradients_of_reg(path):
    net, method, parts = recorded_parts(path)
    parts.total.backward()
    own = {**dict(net.named_parameters()), **dict(method.named_parameters())}
    recorded = {k.removeprefix(f"grad.{path}."): v for k, v in golden("reg").out.items() if f"grad.{path}." in k}
    assert len(recorded) == 5 and {"wg_norm.weight", "cls_projectors2.weight"} < recorded.keys()
    for name, gradient in recorded.items():
        assert_close(own[name].grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


# --- HASTE ------------------------------------------------------------------------------------------------------------


def test_the_network_of_haste_and_its_attention():
    official, out = opened("haste"), golden("haste").out
    mine = official.net(*inputs("haste", "x", "t", "y"), collect=(3,), collect_qkv=(1, 2, 3))
    close(mine.prediction, out["pred"])
    close(mine.prediction, out["pred_no_act"])
    close(official.method.projectors[0](mine.hidden[3]), out["zs.0"])
    for block in (1, 3):
        close(student_logits(official.net, mine.qkv[block], block), out[f"attn_logits.{block - 1}"])


def test_the_attention_loss_of_haste():
    given = golden("haste").inputs
    pairs = [attention_alignment(given[f"attn_student.{i}"], given[f"attn_teacher.{i + 4}"]) for i in range(4, 8)]
    assert pairs[0].shape == (2, 12, 6)  # thirteen heads meet twelve
    assert_close(torch.stack(pairs).mean(), golden("haste").out["loss.attn"].squeeze(), **exactly)


class Recorded(nn.Module):
    """A network that says what was recorded; its queries and keys are looked up by the block's number."""

    def __init__(self, given):
        super().__init__()
        self.given, self.class_dim = given, None
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Identity()})}) for _ in range(8))

    def forward(self, x, t, y, cls=None, keep=None, collect=(), collect_qkv=()):
        hidden = {depth: self.given["proj_student"] for depth in collect}
        return Output(self.given["stub_pred"], None, hidden, dict.fromkeys(collect_qkv))


@pytest.mark.parametrize("path", PATHS)
def test_the_losses_of_haste(path, monkeypatch):
    record = golden("haste")
    given, out = record.inputs, record.out
    small = SiT(input_size=16, patch_size=2, in_channels=4, width=16, depth=8, heads=2)
    config = HASTEConfig(depth=8, student_blocks=(5, 6, 7, 8), teacher_blocks=(9, 10, 11, 12), stop=250_000)
    haste = HASTE(small, Objective(path), config, teacher_dims=(32,))
    haste.projectors[0] = nn.Identity()
    monkeypatch.setattr(
        "maskalign_lab.training.haste.student_logits", lambda _net, _acts, block: given[f"attn_student.{block - 1}"]
    )
    teacher = torch.stack([given[f"attn_teacher.{block - 1}"] for block in config.teacher_blocks], 1)
    batch = Batch(given["images"], given["y"], given["proj_teacher"], attention=teacher)
    state = State(Recorded(given), None, 0)
    losses = haste.loss(state, batch, Draw(given["t"], given["noise"], given["y"]))
    assert_close(losses.parts["denoising"], out[f"loss.{path}.denoising"].mean(), **exactly)
    assert_close(losses.parts["alignment"], out["loss.proj"].squeeze(), **exactly)
    assert_close(losses.parts["attention"], out["loss.attn"].squeeze(), **exactly)
    assert_close(losses.total, out[f"loss.{path}.total_proj0.5_attn0.5"].squeeze(), **exactly)


# --- iREPA ------------------------------------------------------------------------------------------------------------


def test_the_network_of_irepa():
    official, out = opened("irepa"), golden("irepa").out
    mine = official.net(*inputs("irepa", "x", "t", "y"), collect=(2,))
    close(mine.prediction, out["pred"])
    close(mine.hidden[2], out["zs_unprojected.0"])
    close(official.method.projectors[0](mine.hidden[2]), out["zs.0"])


def test_the_projectors_of_irepa():
    record = golden("irepa")
    parts, out, tokens = record.parts, record.out, record.inputs["tokens"]
    conv, mlp = ConvProjector(64, 48, 3, side=8), projector(64, 64, 48)
    conv.load_state_dict(parts["proj_conv"])
    close(conv(tokens), out["projector.conv"])
    mlp.load_state_dict({name.removeprefix("projection_layer."): value for name, value in parts["proj_mlp"].items()})
    close(mlp(tokens), out["projector.mlp"])
    weight, bias = (parts["proj_linear"][f"projection_layer.{name}"] for name in ("weight", "bias"))
    close(F.linear(tokens, weight, bias), out["projector.linear"])


@pytest.mark.parametrize("gamma", [0.6, 0.8, 1.0])
def test_the_spatial_norm_of_irepa(gamma):
    close(spatial_norm(golden("irepa").inputs["feat"], gamma), golden("irepa").out[f"spnorm.alpha{gamma}"])


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_the_losses_of_irepa(path, weight):
    """In float64: the cosines nearly cancel, so in float32 their mean depends on the order in which a processor adds."""
    record, official = golden("irepa"), opened("irepa")
    given = {name: each.double() if each.is_floating_point() else each for name, each in record.inputs.items()}
    out, (net, method) = record.out, (deepcopy(each).double() for each in (official.net, official.method))
    assert (method.config.weight, method.config.gamma) == (1.0, 0.6)
    method.objective, method.config = Objective(path), replace(method.config, weight=weight)
    batch = Batch(given["images"], given["y"], given["zs.0"])
    losses = method.loss(State(net, None, 0), batch, Draw(given["t"], given["noise"], given["y"]))
    velocity, projection = out[f"loss.{path}.denoising"].mean(), out[f"loss.{path}.proj_weighted_coeff{weight}"]
    assert_close(losses.parts["denoising"].float(), velocity, **exactly)
    assert_close(losses.parts["alignment"].float(), out[f"loss.{path}.cosine_unweighted"].squeeze(), **exactly)
    assert_close(losses.total.float(), velocity + projection.squeeze(), **exactly)
