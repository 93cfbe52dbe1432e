"""SiT's transport as recorded: an analytic field instead of a network, seen as the lab's samplers see it."""

import torch
from shared.golden import golden
from torch import nn

from maskalign_lab.diffusion.guidance import Field
from maskalign_lab.diffusion.interpolants import coefficients
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig
from maskalign_lab.diffusion.sit import Output

PATHS = {"Linear": "linear", "GVP": "cosine", "VP": "vp"}
BY_LUCK = ("VP.sde.velocity.Heun.sigma.None",)  # 0 / 0 at the very end: finite upstream by a rounding of sigma alone


class Analytic(nn.Module):
    """The recorded field, in the lab's time: it means a velocity, a score or a noise, as `kind` says."""

    in_channels, side, patch_size, num_classes, class_dim = 4, 4, 1, 1, None

    def __init__(self, kind, path):
        super().__init__()
        self.kind, self.path, self.dtype_holder = kind, path, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y=None):
        s = (1 - t).view(-1, 1, 1, 1)
        given = torch.sin(1.3 * x) * (0.5 + s) - 0.2 * x + 0.1 * s
        if self.kind == "velocity":
            return Output(-given, None, {})
        noise = given if self.kind == "noise" else -coefficients(self.path, t, x).sigma * given
        return Output(noise, None, {})


def transport(path, kind, **config):
    """The field as the lab's samplers see it, and the recorded tensors in float64."""
    record, objective = golden("sit_transport"), Objective(PATHS[path], prediction="v" if kind == "velocity" else "eps")
    field = Field(Analytic(kind, PATHS[path]), objective, torch.zeros(3, dtype=torch.long), SamplerConfig(**config))
    return field, {k: v.double() for k, v in record.inputs.items()}, record.out, record.config


def cases(pattern):
    """Recorded keys `PATH.pattern.rest`, without those where upstream itself is not finite."""
    keys = [k for k in golden("sit_transport").out if k.split(".")[1] == pattern]
    return [k for k in keys if not k.endswith("NONFINITE") and k not in BY_LUCK]


def form_of(name):
    """The lab's name of a form of the diffusion."""
    return {"SBDM": "sbdm", "inccreasing-decreasing": "increasing-decreasing"}.get(name, name)
