"""JiT as it was recorded, and its official sampler, as far as one can tell it by its calls."""

from functools import cache
from types import SimpleNamespace

import torch
from shared.golden import golden
from torch import nn

from maskalign_lab.diffusion.jit import JiT
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.training.irepa import ConvProjector

OBJECTIVE = Objective("linear", "x", "v", time_law="logit-normal", time_mean=0.8, time_std=0.8, clamp=0.05)


@cache
def official():
    """The recorded network, its projector, and the settings of its loss and sampler."""
    record = golden("jit")
    c, weights = record.config["net"], {k.removeprefix("net."): v for k, v in record.weights.items()}
    sizes = {k: c[k] for k in ("input_size", "patch_size", "in_channels", "depth", "num_classes", "mlp_ratio")}
    sizes |= dict(width=c["hidden_size"], heads=c["num_heads"], bottleneck=c["bottleneck_dim"])
    sizes |= dict(context_tokens=c["in_context_len"], context_start=c["in_context_start"])
    net = JiT(**sizes, data_at_one=True).eval()
    net.load_state_dict(
        {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    )  # strict: all official keys
    projector = ConvProjector(net.width, c["z_dims"][0], c["proj_kwargs_kernel_size"], net.side)
    head = "projectors.0."
    projector.load_state_dict({k.removeprefix(head): v for k, v in weights.items() if k.startswith(head)})
    return SimpleNamespace(net=net, projector=projector, settings=SimpleNamespace(**record.config["den"]))


def objective():
    """The recorded settings, turned into the lab's time."""
    s = official().settings
    law = dict(time_law="logit-normal", time_mean=-s.P_mean, time_std=s.P_std)
    return Objective(prediction="x", loss_space="v", **law, noise_scale=s.noise_scale, clamp=s.t_eps)


class Diary(nn.Module):
    """Predicts zero and notes at which times it was asked for both, guided and not."""

    in_channels, side, patch_size, num_classes, class_dim = 1, 1, 1, 1, None

    def __init__(self):
        super().__init__()
        self.asked, self.weight = [], nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y):
        self.asked.append((round(t[0].item(), 6), len(x) == 2))
        return Output(torch.zeros_like(x), None, {})


def official_stages(steps, low, high):
    """Time, in the lab's direction, and guidance of every network call of the official Heun sampler, in its float32."""
    grid = torch.linspace(0, 1, steps + 1)
    stages = [t for pair in zip(grid[:-2], grid[1:-1]) for t in pair] + [grid[-2]]
    return [(round(1 - t.item(), 6), bool((t < high) & ((t > low) | (low == 0)))) for t in stages]
