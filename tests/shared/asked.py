"""A small network that can be asked about noised images, without data, training or teacher."""

from types import SimpleNamespace

import torch

from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.gradient_norms import Observed
from maskalign_lab.measure.questions import Alignment, ClassLogit, Noised
from maskalign_lab.training.repa import projector

SIDE, CLASSES, TEACHER = 4, 10, 8


def observed(mixes: bool = True, class_dim: int | None = None, mixer_depth: int = 0, method: str = "repa") -> Observed:
    """A network in float64; if it does not mix, its blocks are the identity, as they are when training begins."""
    torch.manual_seed(0)
    sizes = {"input_size": 4 * SIDE, "patch_size": 4, "in_channels": 3, "width": 16, "depth": 4, "heads": 2}
    net = SiT(**sizes, num_classes=CLASSES, class_dim=class_dim, mixer_depth=mixer_depth).double()
    if mixes:
        for parameter in net.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    recipe = SimpleNamespace(method=SimpleNamespace(name=method, mask_ratio=0.25))
    run = SimpleNamespace(name="small", net=net.requires_grad_(False), device=torch.device("cpu"), recipe=recipe)
    return Observed("small", run, projector(16, 24, TEACHER).double().requires_grad_(False), 2)


def noised(seed: int = 0, images: int = 3, class_dim: int | None = None) -> Noised:
    """Random images, and stand-ins that are not far, so that the path between them is smooth."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    pictures = randn(images, 3, 4 * SIDE, 4 * SIDE)
    t, labels = torch.rand(images, generator=g).double(), torch.arange(images) % CLASSES
    cls = randn(images, class_dim) if class_dim else None
    return Noised(pictures, pictures + 0.5 * randn(*pictures.shape), t, labels, randn(images, SIDE**2, TEACHER), cls)


def question(name: str, of: Observed):
    """A question by its name, the probe being any linear map."""
    if name == "alignment":
        return Alignment(of)
    torch.manual_seed(1)
    return ClassLogit(of, torch.nn.Linear(16, CLASSES).double().requires_grad_(False))
