"""VGG16 with random weights, beside LPIPS's own weights of its channels: distances that mean nothing, and are no zero."""

import torch
from shared.golden import golden
from torchvision.models import vgg16


def random_vgg() -> dict[str, torch.Tensor]:
    """A state dict of torchvision's VGG16. Its classifier, which LPIPS does not ask, takes no room in a file."""
    with torch.device("meta"):
        blank = vgg16()
    random, found = torch.Generator().manual_seed(0), {}
    for name, value in blank.state_dict().items():
        if not name.startswith("features"):
            found[name] = torch.zeros(1).expand(value.shape)
            continue
        drawn = torch.randn(value.shape, generator=random)
        found[name] = drawn * (2 / drawn[0].numel()) ** 0.5 if drawn.ndim > 1 else 0.1 * drawn
    return found


def save_random_lpips(folder) -> None:
    """Both files, as torch keeps them in its folder of downloads."""
    folder.mkdir(parents=True)
    torch.save(random_vgg(), folder / "vgg16-397923af.pth")
    torch.save(golden("lpips").parts["model"], folder / "weights-vgg16-lpips.pth")
