"""Small representation autoencoders: of a teacher that learned nothing, and of diffusers."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from maskalign_lab.encoders.latent_statistics import LatentStatistics
from maskalign_lab.encoders.rae_folders import save_rae, teacher_encoder
from maskalign_lab.encoders.representation_autoencoders import FrozenRAE, build_decoder
from maskalign_lab.encoders.teachers import build_vit

DECODER = {
    f"decoder_{k}": v
    for k, v in dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).items()
}
PUBLISHED = dict(
    encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_input_size=56, patch_size=8, **DECODER
)  # 4 x 4 tokens


def random_teacher(folder: Path, seed: int = 0, **network: int) -> str:
    """The name of a teacher of random weights, written to a folder."""
    network = dict(size=32, patch_size=8, width=16, depth=1, heads=2) | network
    torch.manual_seed(seed)
    content = save({name: value.half() for name, value in build_vit(**network).state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher.safetensors").write_bytes(content)
    card = {"network": network, "weights": hashlib.blake2b(content, digest_size=8).hexdigest(), "dataset": "shapes"}
    (folder / "card.json").write_text(json.dumps(card))
    return f"tiny:{folder}"


def random_statistics(shape: tuple[int, int, int], seed: int = 0, mean: bool = True) -> LatentStatistics:
    """Some mean and variance."""
    drawn = torch.Generator().manual_seed(seed)
    return LatentStatistics(
        torch.randn(shape, generator=drawn) if mean else None, torch.rand(shape, generator=drawn) + 0.1
    )


def random_rae(
    folder: Path, teacher: str = "tiny-4x4", decodes: bool = True, seed: int = 0, size: int = 32, mean: bool = True
) -> FrozenRAE:
    """An autoencoder whose decoder learned nothing, written to a folder."""
    encoder = teacher_encoder(teacher, size)
    torch.manual_seed(seed)
    decoder = build_decoder(encoder, **DECODER) if decodes else None
    statistics = random_statistics((encoder.channels, encoder.grid, encoder.grid), mean=mean)
    return save_rae(folder, teacher, decoder, statistics, size)
