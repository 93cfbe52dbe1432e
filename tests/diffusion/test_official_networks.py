"""Numbers recorded from the official code of SiT and REPA, reproduced by the lab."""

import pytest
import torch
from shared.golden import close, golden, opened
from shared.transport import PATHS, cases, form_of, transport
from torch import nn
from torch.testing import assert_close

from maskalign_lab.diffusion.interpolants import coefficients, convert, interpolate, score, velocity
from maskalign_lab.diffusion.layers import TimestepEmbedder, patchify, sincos_2d
from maskalign_lab.diffusion.objectives import Objective, denoising_loss
from maskalign_lab.diffusion.solvers import DIFFUSIONS, diffusion
from maskalign_lab.training.methods import Batch, Draw, PlainSiT, State

# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sit_ls1", "repa"])
def test_the_network_gives_the_recorded_prediction_and_hidden_tokens(name):
    net, record = opened(name).net, golden(name)
    x, t, y = (record.inputs[k] for k in "xty")
    flip = net.data_at_one
    out = net(x, 1 - t if flip else t, y, collect=(1, 2, 3, 4))
    close(-out.prediction if flip else out.prediction, record.out["pred"])
    for depth in range(1, 5):
        close(out.hidden[depth], record.out[f"h.block{depth - 1}"])
    close(net.t_embedder(t), record.out["h.t_emb"])
    close(net.pos_embed[0], sincos_2d(64, 8))
    probe = record.inputs["probe_small"]
    close(net.blocks[0].norm1(probe), record.out["probe.block0_norm1"], rtol=1e-4, atol=1e-6)


def test_the_parts_of_sit_are_the_recorded_ones():
    net, record = opened("sit_ls1").net, golden("sit_ls1")
    close(net.x_embedder(record.inputs["x"]), record.out["h.patch_tokens_no_pos"])
    frequencies = TimestepEmbedder(64)
    frequencies.mlp = nn.Sequential(nn.Identity())
    frequencies.mlp[0].weight = torch.zeros(1)  # its dtype is looked at
    close(frequencies(record.inputs["t_freq_probe"]), record.out["t_freq"])
    close(
        net.final_layer.norm_final(record.inputs["probe_small"]), record.out["probe.final_norm"], rtol=1e-4, atol=1e-6
    )


def test_the_projector_gives_the_recorded_features():
    official, record = opened("repa"), golden("repa")
    hidden = official.net(*(record.inputs[k] for k in "xty"), collect=(2,)).hidden[2]
    close(official.method.projectors[0](hidden), record.out["zs.0"])


# --- losses and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_the_loss_of_sit(path):
    net, record = opened("sit_ls1").net, golden("sit_ls1")
    noise, x, t, y = (record.inputs[k] for k in ("x0", "x1", "t", "y"))
    objective, t = Objective(PATHS[path]), 1 - t
    losses = denoising_loss(objective, net(interpolate(x, noise, t, PATHS[path]), t, y).prediction, x, noise, t)
    assert_close(losses, record.out[f"loss.{path}.velocity"], rtol=1e-5, atol=0)


def repa_losses(path, t=None):
    official, record = opened("repa"), golden("repa")
    method, net = official.method, official.net.zero_grad(set_to_none=True) or official.net
    method.objective = Objective(path)
    batch = Batch(record.inputs["images"], record.inputs["y"], record.inputs["zs.0"])
    draw = Draw(record.inputs["t"] if t is None else t, record.inputs["noise"], record.inputs["y"])
    return method, net, method.loss(State(net, net, 0), batch, draw)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_losses_of_repa(path):
    _, _, losses = repa_losses(path)
    out = golden("repa").out
    assert_close(losses.parts["denoising"], out[f"loss.{path}.denoising"].mean(), rtol=1e-5, atol=0)
    assert_close(losses.parts["alignment"], out[f"loss.{path}.proj"].squeeze(), rtol=1e-5, atol=0)
    assert_close(losses.total, out[f"loss.{path}.total_coeff0.5"].squeeze(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_losses_of_repa_at_lognormal_noise_levels(path):
    sigma, out = golden("repa").inputs["lognormal_z"].exp(), golden("repa").out
    t = sigma / (1 + sigma) if path == "linear" else 2 / torch.pi * torch.atan(sigma)
    _, _, losses = repa_losses(path, t)
    assert_close(losses.parts["denoising"], out[f"loss_lognormal.{path}.denoising"].mean(), rtol=1e-5, atol=0)
    assert_close(losses.parts["alignment"], out[f"loss_lognormal.{path}.proj"].squeeze(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_gradients_of_repa(path):
    method, net, losses = repa_losses(path)
    method.zero_grad(set_to_none=True)
    losses.total.backward()
    recorded = {k: v for k, v in golden("repa").out.items() if k.startswith(f"grad.{path}.") and "global_norm" not in k}
    own = {**dict(net.named_parameters()), **dict(method.named_parameters())}
    assert len(recorded) == 7 and {name.split(".")[2] for name in recorded} >= {"blocks", "projectors"}
    for name, gradient in recorded.items():
        mine = own[name.removeprefix(f"grad.{path}.")].grad
        assert_close(mine, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    norm = torch.cat([p.grad.flatten() for p in own.values() if p.grad is not None]).norm()
    assert_close(norm, golden("repa").out[f"grad.{path}.global_norm"].squeeze(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_score_of_repa(path):
    record = golden("repa_sampler")
    v, x, t = (record.inputs[k].double() for k in ("sv", "sx", "st"))
    assert_close(score(v, x, t, path), record.out[f"score_from_velocity.{path}"].double(), rtol=1e-6, atol=1e-6)


# --- SiT's transport ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_coefficients_of_sit(path):
    _, given, out, _ = transport(path, "velocity")
    c = coefficients(PATHS[path], 1 - given["t"], given["t"])
    for name, mine in (("alpha", c.alpha), ("sigma", c.sigma), ("d_alpha", -c.d_alpha), ("d_sigma", -c.d_sigma)):
        close(mine.float(), out[f"{path}.{name}"], rtol=1e-4)
    close((-c.d_alpha / c.alpha).float(), out[f"{path}.d_alpha_over_alpha"])
    x, noise = given["x1"], given["x0"]
    close(interpolate(x, noise, 1 - given["t"], PATHS[path]).float(), out[f"{path}.xt"])
    close(-velocity(x, noise, 1 - given["t"], PATHS[path]).float(), out[f"{path}.ut"])


@pytest.mark.parametrize("path", PATHS)
def test_the_drift_of_sit(path):
    _, given, out, _ = transport(path, "velocity")
    t, x = 1 - given["t"], given["x"]
    c = coefficients(PATHS[path], t, x)
    close((c.d_alpha / c.alpha * x).float(), out[f"{path}.drift_mean"])
    variance = DIFFUSIONS["sbdm"](t.view(-1, 1, 1, 1), c)
    close(variance.expand_as(x).float(), out[f"{path}.drift_var"].expand_as(x))


@pytest.mark.parametrize("key", cases("diffusion"))
def test_the_diffusions_of_sit(key):
    path, _, form = key.split(".")
    _, given, out, _ = transport(path, "velocity")
    mine = [
        diffusion(form_of(form), PATHS[path], 1 - t.item(), torch.zeros(1, dtype=torch.float64)).item()
        for t in given["t"]
    ]
    close(torch.tensor(mine), out[key].flatten().expand(3))


@pytest.mark.parametrize("path", PATHS)
def test_scores_and_noises_of_sit(path):
    _, given, out, _ = transport(path, "velocity")
    t, x, v = 1 - given["t"], given["x"], given["v"]
    close(score(-v, x, t, PATHS[path]).float(), out[f"{path}.score_from_velocity"], rtol=1e-3)
    close(convert(-v, "v", "eps", x, t, PATHS[path]).float(), out[f"{path}.noise_from_velocity"], rtol=1e-3)
    noise = -coefficients(PATHS[path], t, x).sigma * v
    close(-convert(noise, "eps", "v", x, t, PATHS[path]).float(), out[f"{path}.velocity_from_score"], rtol=1e-3)


@pytest.mark.parametrize("key", cases("ode_drift") + cases("score"))
def test_drift_and_score_of_every_prediction_of_sit(key):
    path, what, kind = key.split(".")
    field, given, out, _ = transport(path, kind)
    t, x = 1 - given["t"], given["x"]
    v = convert(field.net(x, t).prediction, field.objective.prediction, "v", x, t, PATHS[path])
    close((-v if what == "ode_drift" else score(v, x, t, PATHS[path])).float(), out[key], rtol=1e-3)


@pytest.mark.parametrize("key", cases("loss"))
def test_the_losses_of_sit_transport(key):
    path, _, kind, weight = key.split(".")
    field, given, out, _ = transport(path, kind)
    start, end = out[f"{path}.interval.{kind}"][:2].double()
    t, x, noise = 1 - (given["rand_u"] * (end - start) + start), given["x1"], given["x0"]
    prediction = field.net(interpolate(x, noise, t, PATHS[path]), t).prediction
    space = "v" if kind == "velocity" or weight == "velocity" else "eps"  # SiT's weight "velocity" is the velocity loss
    losses = denoising_loss(Objective(PATHS[path], field.objective.prediction, space), prediction, x, noise, t)
    if weight == "likelihood":
        c = coefficients(PATHS[path], t, t)
        losses = losses * DIFFUSIONS["sbdm"](t, c) / c.sigma**2
    assert_close(losses.float(), out[key], rtol=1e-3, atol=1e-6)


def test_patches_are_ordered_as_in_the_official_code():
    record = golden("sit_ls1")
    tokens = record.out["h.final_tokens"].view(3, 64, 4, 2, 4)  # pixel, half, channel; the second half is sigma
    image = opened("sit_ls1").net(record.inputs["x"], 1 - record.inputs["t"], record.inputs["y"]).prediction
    close(patchify(-image, 2), tokens[:, :, :, 0].reshape(3, 64, 16))


def test_plain_sit_is_what_a_file_without_projectors_holds():
    assert isinstance(opened("sit_ls1").method, PlainSiT)
