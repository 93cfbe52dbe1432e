"""A small run with random weights, as a folder, and a stand-in for Inception: for tests that sample and compare."""

from dataclasses import asdict

import torch
from torch import nn

from maskalign_lab.base.checkpoints import save_step
from maskalign_lab.base.files import write_atomic
from maskalign_lab.diffusion.sampling import SamplerConfig
from maskalign_lab.measure.fidelity import Extractor
from maskalign_lab.runs.building import build
from maskalign_lab.runs.facts import Facts, write_facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import to_json
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.sample_plan import SamplePlan

SIZES = "data.size=16 network.patch_size=4 network.width=32 network.depth=2 network.heads=2 method.depth=1"
PLAIN = SamplerConfig("heun", 2, 2.0, precision="float32")


def random_run(folder, method="repa", seed=0, sampler=None, overrides="", step=5, **found):
    """A run of 16-pixel images whose network gives something for every input."""
    recipe = make_recipe(method, "smoke", "shapes", 0, f"{SIZES} {overrides}")
    facts = Facts(**{"num_classes": 10, "teacher_dims": (8,), "sampler": sampler and asdict(sampler)} | found)
    torch.manual_seed(seed)
    net, trained = build(recipe, facts)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_step(folder, step, {"ema": net.state_dict(), "method": trained.state_dict()}, {"source": "random"})
    write_facts(folder, facts)
    write_atomic(folder / "recipe.json", to_json(recipe))
    return load_run(folder)


def plan(n=10, **changes):
    return SamplePlan(**{"n": n, "sampler": PLAIN, **changes})


class Eye(nn.Module):
    """Twelve features and five logits of an image, of bytes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(12, 5)
        self.asked = []  # numbers of images

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.asked.append(len(images))
        features = 30 * self.layers(images / 127.5 - 1)
        return features, self.last(features)


def eye():
    return Extractor(Eye().requires_grad_(False), {"extractor": "eye", "resize": "none"}, 12)
