"""Representation autoencoders: the official numbers, exact statistics, diffusers' traps, and folders that tell the truth."""

import importlib.util
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderRAE
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared.golden import close, golden
from shared.rae import DECODER, PUBLISHED, random_rae, random_statistics, random_teacher
from torch import nn

from maskalign_lab.base import extras
from maskalign_lab.base.paths import absolute
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders import published_rae
from maskalign_lab.encoders.autoencoder_latents import cached_latents, latent_encoding
from maskalign_lab.encoders.autoencoders import load_autoencoder
from maskalign_lab.encoders.latent_statistics import (
    LatentStatistics,
    check_statistics,
    latent_statistics,
    merged,
    moments_of,
    read_statistics,
    statistics_of,
    write_statistics,
)
from maskalign_lab.encoders.published_rae import wrap_published
from maskalign_lab.encoders.rae_folders import rae_geometry, save_rae, teacher_encoder
from maskalign_lab.encoders.representation_autoencoders import (
    FrozenRAE,
    PixelDecoder,
    TeacherEncoder,
    build_decoder,
    wrap_rae,
)
from maskalign_lab.encoders.teachers import Teacher, build_vit, load_teacher, prepare

# ---- the official code


class Recorded(nn.Module):
    """Tokens that the official code was given in place of an encoder's."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, (_, n, self.channels) = tokens, tokens.shape
        self.grid, self.size, self.digest = int(n**0.5), 32, "recorded"

    def forward(self, images):
        return self.tokens.mT.unflatten(2, (self.grid, self.grid))


RENAMED = (("attention.attention.query", "attention.to_q"), ("attention.attention.key", "attention.to_k"),
           ("attention.attention.value", "attention.to_v"), ("attention.output.dense", "attention.to_out.0"))  # fmt: skip
NETWORK = ("hidden_size", "num_patches", "patch_size", "image_size", "num_channels", *DECODER)


@pytest.fixture(scope="module")
def official():
    """The recorded decoder in diffusers' network, behind recorded tokens."""
    record = golden("rae_decoder")
    decoder = PixelDecoder({k: record.config[k] for k in NETWORK}, record.inputs["img_mean"], record.inputs["img_std"])
    weights = dict(record.weights)
    decoder.decoder.decoder_pos_embed = weights.pop("decoder_pos_embed")  # which diffusers spaces otherwise, see below
    for old, new in RENAMED:
        weights = {name.replace(old, new): value for name, value in weights.items()}
    decoder.decoder.load_state_dict(weights)
    statistics = LatentStatistics(record.inputs["latent_mean"], record.inputs["latent_var"])
    return record, wrap_rae(Recorded(record.inputs["enc_tokens"]), decoder, statistics, "official")


def test_decoding_is_the_official_one(official):
    record, rae = official
    z = record.inputs["z"]
    with torch.no_grad():
        close(rae.decoder.decoder(z.flatten(2).mT).logits, record.out["decoder_tokens"])
    close(rae.decode(z), 2 * record.out["rae_decode"] - 1, atol=4e-5)  # twice as wide


def test_where_diffusers_positions_are_the_official_ones():
    """Spaced by one with 16 x 16 tokens; any other grid is stretched to the length of that."""
    told, made = golden("rae_decoder").weights["decoder_pos_embed"][0], {"cls_token": True, "extra_tokens": 1}
    table = partial(get_2d_sincos_pos_embed, 64, output_type="pt", **made)
    torch.testing.assert_close(table(8, base_size=8).float(), told)
    assert not torch.allclose(table(8).float(), told, atol=0.5)
    assert torch.equal(table(16), table(16, base_size=16))


def test_encoding_is_the_official_one(official):
    record, rae = official
    images = 2 * record.inputs["images"] - 1
    close(rae.encode(images), record.out["rae_encode_latent"])
    shown = prepare(images, record.inputs["img_mean"], record.inputs["img_std"], 32)
    close(shown, record.out["rae_encode_normalised_image"])


def test_noise_on_tokens_is_the_official_one(official):
    record, rae = official
    tokens = record.inputs["enc_tokens"]
    noised = tokens + record.config["noise_tau"] * record.inputs["noise_u"] * record.inputs["noise"]
    close(rae.normalise(noised.mT.unflatten(2, (8, 8))), record.out["rae_encode_noised_latent"])


# ---- statistics


@settings(deadline=None, max_examples=40)
@given(data=st.data(), n=st.integers(1, 60), offset=st.sampled_from([0.0, -3.0, 1e5]))
def test_any_parts_give_what_numpy_gives_at_once(data, n, offset):
    """In any sizes, and merged in any order."""
    values = np.random.default_rng(n).normal(offset, 0.5, (n, 2, 1, 3))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    parts = data.draw(st.permutations([moments_of(torch.from_numpy(part)) for part in np.split(values, cuts)]))
    while len(parts) > 1:
        k = data.draw(st.integers(0, len(parts) - 2))
        parts[k : k + 2] = [merged(parts[k], parts[k + 1])]
    (found,) = parts
    assert found.count == n
    np.testing.assert_allclose(found.mean.numpy(), values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((found.squares / n).numpy(), values.var(0), rtol=1e-7, atol=1e-14)
    assert statistics_of(found).var.dtype == torch.float32


def test_statistics_of_a_data_set_do_not_depend_on_the_batch():
    encoder, dataset = teacher_encoder("tiny-4x4", 32), load_dataset("shapes", n=50)
    whole = encoder(dataset.images()).double()
    for batch in (50, 16, 1):
        found = latent_statistics(encoder, dataset, batch)
        torch.testing.assert_close(found.mean.double(), whole.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.var.double(), whole.var(0, correction=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(var=s.var[:, :, :1]), r"var has shape \(4, 2, 1\), and the latents have \(4, 2, 2\)"),
        (lambda s: s._replace(mean=s.mean[:1]), r"mean has shape \(1, 2, 2\)"),
        (lambda s: s._replace(var=s.var.mean((1, 2))), r"var has shape \(4,\)"),
        (lambda s: s._replace(var=s.var * float("nan")), "not finite"),
        (lambda s: s._replace(var=s.var - 5), "no variance is below 0"),
    ],
)
def test_statistics_of_other_latents_are_refused(change, message):
    right = random_statistics((4, 2, 2))
    assert check_statistics(right, (4, 2, 2), "x") is right
    with pytest.raises(ValueError, match=message):
        check_statistics(change(right), (4, 2, 2), "x")


def test_files_of_statistics(tmp_path):
    both, scaled = random_statistics((4, 2, 2)), random_statistics((4, 2, 2), mean=False)
    for k, statistics in enumerate((both, scaled)):
        write_statistics(tmp_path / f"{k}.safetensors", statistics)
        torch.save(statistics._asdict(), tmp_path / f"{k}.pt")  # as released: mean may be None
        for kind in ("safetensors", "pt"):
            assert read_statistics(tmp_path / f"{k}.{kind}").digest == statistics.digest
    assert read_statistics(tmp_path / "1.pt").mean is None
    torch.save({"mean": both.mean}, tmp_path / "no var.pt")
    torch.save({"var": both.var, "std": both.var}, tmp_path / "std.pt")
    torch.save(both.var, tmp_path / "bare.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:-3])
    with open(tmp_path / "code.pt", "wb") as file:
        pickle.dump({"var": print}, file)
    for name, message in {"no var.pt": "hold mean; expected var", "std.pt": "unknown part of .*'std'", "bare.pt": "hold Tensor",
                          "cut.safetensors": "cannot be read", "code.pt": "cannot be read"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no statistics .*nowhere.pt"):
        read_statistics(tmp_path / "nowhere.pt")


# ---- ours


@settings(deadline=None, max_examples=12)
@given(
    grid=st.integers(1, 4),
    patch=st.integers(2, 4),
    scale=st.integers(1, 3),
    heads=st.integers(1, 2),
    mean=st.booleans(),
)
def test_shapes_and_the_way_back(grid, patch, scale, heads, mean):
    """For any grid and any size that has whole cells on it: latents as told, normalised and restored."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Teacher(build_vit(grid * patch, patch, 8 * heads, 1, heads), "random", grid, "d")
        encoder = TeacherEncoder(teacher, grid * scale)
        decoder = build_decoder(encoder, **DECODER)
        statistics = random_statistics((8 * heads, grid, grid), mean=mean)
        rae = wrap_rae(encoder, decoder, statistics, "random")
        images = torch.rand(2, 3, grid * scale, grid * scale) * 2 - 1
    latents, std = rae.moments(images)
    assert latents.shape == (2, *rae.latent_shape(grid * scale)) == (2, 8 * heads, grid, grid) and not std.any()
    assert rae.factor == scale and rae.decode(latents).shape == images.shape
    told = encoder(images)
    expected = (told - (statistics.mean if mean else 0)) / torch.sqrt(statistics.var + 1e-5)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(rae.restore(latents), told, rtol=1e-4, atol=1e-5)
    assert torch.equal(rae.encode(images, torch.randn(latents.shape)), latents)  # noise changes nothing
    torch.testing.assert_close(told.mean(1), torch.zeros(2, grid, grid), atol=1e-5, rtol=0)  # a norm without weights


def test_the_norm_loses_its_weights_and_the_teacher_of_others_keeps_them():
    teacher, images = load_teacher("tiny-4x4"), load_dataset("shapes", n=8).images()
    told, norm = teacher(images).tokens, teacher.vit.norm
    bare = teacher_encoder("tiny-4x4", 32)(images).flatten(2).mT
    torch.testing.assert_close(bare * norm.weight + norm.bias, told, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bare, told, atol=0.1) and torch.equal(teacher(images).tokens, told)


def test_frozen_and_in_float32_whatever_surrounds_it(tmp_path):
    rae, images = random_rae(tmp_path / "rae"), load_dataset("shapes", n=4).images().requires_grad_()
    nn.Sequential(rae).train()
    assert not any(module.training for module in rae.modules())
    assert not any(p.requires_grad for p in rae.parameters())
    alone = rae.encode(images), rae.decode(torch.ones(1, 128, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        within = rae.encode(images), rae.decode(torch.ones(1, 128, 4, 4))
    for a, b in zip(alone, within, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32 and not a.requires_grad


def test_a_folder_comes_back(tmp_path):
    images = load_dataset("shapes", n=4).images()
    for decodes, mean in ((True, True), (False, False)):
        written = random_rae(tmp_path / f"{decodes}", decodes=decodes, mean=mean)
        again = load_autoencoder(f"rae:{tmp_path / str(decodes)}")
        assert (again.digest, again.latents_digest) == (written.digest, written.latents_digest)
        assert torch.equal(again.encode(images), written.encode(images)) and (again.decoder is None) is not decodes
        assert (again.statistics.mean is None) is not mean
    assert rae_geometry(f"rae:{tmp_path / 'False'}") == (128, 4, 32)
    with pytest.raises(ValueError, match="has no decoder"):
        again.decode(again.encode(images))


def test_the_digest_follows_all_that_counts(tmp_path):
    """Latents: teacher, statistics, size. The whole: the decoder too."""
    one = random_rae(tmp_path / "one")
    others = {
        "decoder": random_rae(tmp_path / "decoder", seed=1),
        "teacher": random_rae(tmp_path / "teacher", "tiny-4x4?random"),
        "mean": random_rae(tmp_path / "mean", mean=False),
        "size": random_rae(tmp_path / "size", size=64),
    }
    assert len({one.digest, *(each.digest for each in others.values())}) == 5
    assert {name for name, each in others.items() if each.latents_digest == one.latents_digest} == {"decoder"}


def test_folders_that_do_not_belong_together(tmp_path):
    teacher, place = random_teacher(tmp_path / "teacher"), tmp_path / "rae"
    random_rae(place, teacher)
    name, config = f"rae:{place}", json.loads((place / "config.json").read_text())
    for part in ("config.json", "statistics.safetensors", "card.json"):
        (place / part).rename(tmp_path / part)
        with pytest.raises(FileNotFoundError, match=f"{place / part}"):
            load_autoencoder(name)
        (tmp_path / part).rename(place / part)
    weights = load_file(place / "decoder.safetensors")
    save_file(weights | {"decoder_pred.bias": weights["decoder_pred.bias"] + 1}, place / "decoder.safetensors")
    with pytest.raises(ValueError, match="its card is of"):
        load_autoencoder(name)
    save_file(weights, place / "decoder.safetensors")
    (place / "config.json").write_text(json.dumps(config | {"size": 64}))
    with pytest.raises(
        ValueError, match="makes 32 pixels of 4 tokens a side, and the encoder makes 4 tokens of 64 pixels"
    ):
        load_autoencoder(name)
    (place / "config.json").write_text(json.dumps(config))
    random_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(ValueError, match="was made for a teacher .* with digest"):
        load_autoencoder(name)


def test_statistics_behind_the_name(tmp_path):
    rae, images = random_rae(tmp_path / "rae"), load_dataset("shapes", n=4).images()
    write_statistics(tmp_path / "other.safetensors", other := random_statistics((128, 4, 4), seed=1, mean=False))
    found = load_autoencoder(f"rae:{tmp_path / 'rae'}@{tmp_path / 'other.safetensors'}")
    torch.testing.assert_close(
        found.encode(images), rae.restore(rae.encode(images)) / other.deviation, rtol=1e-4, atol=1e-4
    )
    assert found.latents_digest != rae.latents_digest
    write_statistics(tmp_path / "small.safetensors", random_statistics((128, 2, 2)))
    for name, kind, message in (
        (f"rae:{tmp_path / 'rae'}@{tmp_path / 'small.safetensors'}", ValueError, "latents have"),
        (f"rae:{tmp_path / 'rae'}@{tmp_path / 'none.pt'}", FileNotFoundError, "no statistics"),
        (f"tiny@{tmp_path / 'other.safetensors'}", ValueError, "takes no statistics"),
    ):
        with pytest.raises(kind, match=message):
            load_autoencoder(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raee", "unknown autoencoder 'raee'. Did you mean 'rae'"),
        ("rae:", "unknown autoencoder 'rae:'. Did you mean 'rae'"),
        ("rae-latent:tiny", "Did you mean 'rae-latents:TEACHER'"),
        (
            "rae-latents:timm:vit_tiny_patch16_224",
            "expected rae-latents: and a tiny teacher, such as rae-latents:tiny-4x4.random",
        ),
        ("rae-latents:tiny?randomm", "Did you mean 'random'"),
        ("rae-latents:tiny-4x4?permuted", "ends in NormThenMove, and .* plain layer norm; take such as tiny"),
    ],
)
def test_names_that_stand_for_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        load_autoencoder(name)


def test_paths_in_names_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_statistics(tmp_path / "s.safetensors", random_statistics((1, 1, 1)))
    for name, expected in (
        ("rae", "rae"),
        ("rae:mine", f"rae:{tmp_path / 'mine'}"),
        ("rae:mine@s.safetensors", f"rae:{tmp_path / 'mine'}@{tmp_path / 's.safetensors'}"),
        ("owner/name@s.safetensors", f"owner/name@{tmp_path / 's.safetensors'}"),
        ("owner/name@nowhere", "owner/name@nowhere"),
        ("rae-latents:tiny:mine", f"rae-latents:tiny:{tmp_path / 'mine'}"),
        ("rae-latents:tiny-4x4?random", "rae-latents:tiny-4x4?random"),
        ("folder:a@s.safetensors", f"folder:{tmp_path / 'a@s.safetensors'}"),
        ("tiny:a@b", f"tiny:{tmp_path / 'a@b'}"),
    ):
        assert absolute(name) == expected


def test_a_random_encoder_without_a_way_back():
    random, learned = load_autoencoder("rae-latents:tiny-4x4?random"), load_autoencoder("rae-latents:tiny-4x4")
    latents = random.encode(load_dataset("shapes", n=200).images())
    assert latents.shape == (200, 128, 4, 4) and random.latents_digest != learned.latents_digest
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.1


# ---- caches


def test_a_point_is_kept_once_and_shared_by_decoders(tmp_path, own_folders):
    one, other = random_rae(tmp_path / "one"), random_rae(tmp_path / "other", seed=1)
    dataset = load_dataset("shapes", n=10)
    rows = cached_latents(one, dataset)
    assert rows.shape == (10, 1, 128, 4, 4) and torch.equal(rows[:][:, 0], one.encode(dataset.images()))
    assert cached_latents(other, dataset).folder == rows.folder
    whole, half = latent_encoding(one, dataset), latent_encoding(one, dataset, "half")
    assert whole.row_bytes == 4 * 128 * 16 == 2 * half.row_bytes
    torch.testing.assert_close(half.of(dataset.pixels).float(), rows[:], rtol=1e-3, atol=1e-3)


# ---- diffusers'


@pytest.fixture(scope="module")
def statistics():
    return random_statistics((64, 4, 4))


def published(statistics=None, **config) -> AutoencoderRAE:
    torch.manual_seed(0)
    told = {}
    if statistics:
        told = {"latents_mean": statistics.mean, "latents_std": (statistics.var + 1e-5).sqrt()}
    return AutoencoderRAE(**PUBLISHED | told | config).eval()


def test_a_published_one_is_diffusers_with_the_official_formula(statistics, tmp_path):
    published(statistics).save_pretrained(tmp_path / "rae")
    rae, images = load_autoencoder(str(tmp_path / "rae")), load_dataset("shapes", n=4).images()
    bare = published()
    bare._latents_std.sub_(1e-5)  # upstream adds it
    with torch.no_grad():
        tokens = bare.encode(images / 2 + 0.5).latent
        expected = (tokens - statistics.mean) / torch.sqrt(statistics.var + 1e-5)
        decoded = bare.decode(expected * torch.sqrt(statistics.var + 1e-5) + statistics.mean).sample
    torch.testing.assert_close(rae.encode(images), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(rae.decode(expected), 2 * decoded - 1, rtol=1e-4, atol=2e-5)
    assert (rae.factor, rae.channels, rae.grid, rae.size) == (8, 64, 4, 32)
    again = load_autoencoder(str(tmp_path / "rae"))
    assert (again.digest, again.latents_digest) == (rae.digest, rae.latents_digest)
    assert wrap_published(published(statistics), "in memory").digest == rae.digest


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_upstream_resizes_without_a_word_and_here_it_is_refused(kind, statistics):
    vae = published(statistics, encoder_type=kind)
    assert vae.encode(torch.zeros(1, 3, 32, 48)).latent.shape == vae.encode(torch.zeros(1, 3, 64, 64)).latent.shape
    assert vae.decode(torch.zeros(1, 64, 4, 4)).sample.shape == (1, 3, 32, 32)
    rae = wrap_published(vae, "small")
    for call, message in (
        (
            lambda: rae.encode(torch.zeros(1, 3, 32, 48)),
            "takes images of 32 x 32 pixels and no others, got a side of 48",
        ),
        (lambda: rae.encode(torch.zeros(1, 3, 64, 64)), "take data.size=32"),
        (lambda: rae.decode(torch.zeros(1, 64, 8, 8)), r"decodes latents \(b, 64, 4, 4\), got \(1, 64, 8, 8\)"),
        (lambda: rae.decode(torch.zeros(1, 32, 4, 4)), r"got \(1, 32, 4, 4\)"),
        (lambda: rae.latent_shape(30), "got a side of 30"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_noise_even_where_upstream_trains(statistics):
    vae = published(statistics, noise_tau=0.8).train()
    images = load_dataset("shapes", n=2).images()
    with torch.no_grad():
        assert not torch.equal(vae.encode(images).latent, vae.encode(images).latent)
    rae = wrap_published(vae, "small").train()
    assert torch.equal(rae.encode(images), rae.encode(images))


def test_a_mean_that_is_not_there_is_not_invented(statistics):
    rae = wrap_published(published(statistics, latents_mean=None), "scaled")
    assert rae.statistics.mean is None
    torch.testing.assert_close(rae.statistics.var, statistics.var, rtol=1e-5, atol=1e-6)
    images = load_dataset("shapes", n=2).images()
    both = wrap_published(published(statistics), "both")
    torch.testing.assert_close(
        rae.encode(images), both.encode(images) + statistics.mean / both.deviation, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latents_std": None}, "has no latents_std.*name a file of them by x@PATH"),
        ({"latents_std": torch.ones(64, 1, 1)}, r"var has shape \(64, 1, 1\), and the latents have \(64, 4, 4\)"),
        ({"latents_mean": torch.zeros(64, 8, 8)}, r"mean has shape \(64, 8, 8\)"),
        ({"scaling_factor": 0.5}, "has scaling_factor 0.5; expected 1.0"),
        ({"reshape_to_2d": False}, "has reshape_to_2d False; expected True"),
    ],
)
def test_published_ones_that_are_refused(config, message, statistics):
    with pytest.raises(ValueError, match=message):
        wrap_published(published(statistics, **config), "x")


def test_statistics_given_to_one_that_has_none(statistics, tmp_path):
    published().save_pretrained(tmp_path / "rae")
    write_statistics(tmp_path / "s.safetensors", statistics)
    with pytest.raises(ValueError, match="@PATH"):
        load_autoencoder(str(tmp_path / "rae"))
    found = load_autoencoder(f"{tmp_path / 'rae'}@{tmp_path / 's.safetensors'}")
    assert found.statistics.digest == statistics.digest


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE"}))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else real(name, *a)
    )
    with pytest.raises(ValueError, match=r"needs the package `transformers`: pip install 'maskalign-lab\[rae\]'"):
        load_autoencoder(str(tmp_path))


def test_a_transformers_that_cannot_build_siglip_is_told_before_the_weights(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", "encoder_type": "siglip2"}))
    monkeypatch.setattr(published_rae, "builds_siglip2", lambda: False)
    with pytest.raises(ValueError, match="transformers .* cannot build the encoder siglip2.*5.3.0 has it"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", "encoder_type": "dino"}))
    with pytest.raises(ValueError, match="unknown encoder_type .*Did you mean 'dinov2'"):
        load_autoencoder(str(tmp_path))


def test_whether_siglip_can_be_built_is_what_diffusers_finds():
    try:
        AutoencoderRAE(encoder_type="siglip2", **PUBLISHED | {"encoder_hidden_size": 64})
        assert extras.builds_siglip2()
    except AttributeError:
        assert not extras.builds_siglip2()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_given, **_named):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoencoderKL, "load_config", offline)
    with pytest.raises(OSError, match="RAE-dinov2.*couldn't connect(.|\n)*HF_HOME"):
        load_autoencoder("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08")


def test_any_teacher_of_timm_is_an_encoder_too(tmp_path):
    """The released DINOv2 with registers is a name of timm: its tokens at the grid that the statistics have."""
    name, size = "timm:vit_tiny_patch16_224?random", 64
    encoder = teacher_encoder(name, size, 4)
    written = save_rae(tmp_path, name, None, random_statistics((192, 4, 4)), size)
    images = load_dataset("shapes", size, n=2).images()
    torch.testing.assert_close(written.restore(written.encode(images)), encoder(images), rtol=1e-4, atol=1e-4)
    assert isinstance(load_autoencoder(f"rae:{tmp_path}"), FrozenRAE) and rae_geometry(f"rae:{tmp_path}") == (
        192,
        4,
        64,
    )
