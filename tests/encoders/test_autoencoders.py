"""Autoencoders: diffusers' own numbers, the published geometry, caches that know whose they are, a card that tells the truth."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab import cli
from maskalign_lab.base import paths
from maskalign_lab.base.seeding import generator
from maskalign_lab.data import caching
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders import autoencoder_latents, autoencoder_training, autoencoders, reconstruction
from maskalign_lab.encoders.autoencoder_latents import cached_latents
from maskalign_lab.encoders.autoencoders import Autoencoder, load_autoencoder
from maskalign_lab.encoders.frozen import latents_of
from maskalign_lab.studies import shipped_runs

SD_VAE = {  # config.json of stabilityai/sd-vae-ft-mse; without scaling_factor, so that diffusers takes 0.18215
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL = {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "shift_factor": 0.25}


def make_vae(seed: int = 0, **config) -> AutoencoderKL:
    n = len(config["block_out_channels"])
    torch.manual_seed(seed)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return AutoencoderKL(**kinds, **config)


@pytest.fixture(scope="module")
def small() -> Autoencoder:
    return autoencoders.wrap_autoencoder(make_vae(**SMALL), "small")


@pytest.fixture(scope="module")
def tiny() -> Autoencoder:
    return load_autoencoder("tiny")


@pytest.fixture(scope="module")
def photos():
    return load_dataset("photos", split="validation", n=20)


# ---- geometry


def test_the_published_geometry():
    """sd-vae-ft-mse at 256 pixels: the table of the encoder's stages, from a forward pass without numbers."""
    with torch.device("meta"):
        published = Autoencoder(AutoencoderKL.from_config(SD_VAE), "sd", "")
    assert sum(p.numel() for p in published.parameters()) == 83_653_863
    assert (published.factor, published.channels, published.scale, published.shift) == (8, 4, 0.18215, 0.0)
    levels = {
        name: tuple(x.shape[1:]) for name, x in published.levels(torch.empty(2, 3, 256, 256, device="meta")).items()
    }
    assert levels == published.level_shapes(256) == {
        "down.0": (128, 256, 256),
        "down.1": (256, 128, 128),
        "down.2": (512, 64, 64),
        "down.3": (512, 32, 32),
        "mid": (512, 32, 32),
        "latent": (4, 32, 32),
    }  # fmt: skip


def test_the_published_network_computes_with_random_weights(photos):
    """All 84 million of them: levels, latents and pictures are diffusers' own."""
    torch.manual_seed(0)
    published = Autoencoder(AutoencoderKL.from_config(SD_VAE), "sd", "")
    images = photos.images(slice(0, 1))
    levels, latents = published.levels(images), published.encode(images)
    assert {name: tuple(x.shape[1:]) for name, x in levels.items()} == published.level_shapes(images.shape[-1])
    with torch.no_grad():
        mean = published.vae.encode(images).latent_dist.mean
        picture = published.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(latents, mean * 0.18215)
    torch.testing.assert_close(published.decode(latents), picture)
    assert torch.equal(levels["latent"], latents) and all(x.isfinite().all() for x in levels.values())


@settings(deadline=None, max_examples=8)
@given(depth=st.integers(1, 4), multiple=st.integers(2, 5), layers=st.integers(1, 2), channels=st.integers(1, 5))
def test_shapes_are_those_of_a_forward_pass(depth, multiple, layers, channels):
    with torch.device("meta"):
        widths = tuple(4 * (k + 1) for k in range(depth))
        vae = make_vae(block_out_channels=widths, layers_per_block=layers, latent_channels=channels, norm_num_groups=4)
    one = Autoencoder(vae, "any", "")
    size = multiple * one.factor
    found = {name: tuple(x.shape) for name, x in one.levels(torch.empty(1, 3, size, size, device="meta")).items()}
    assert found == {name: (1, *shape) for name, shape in one.level_shapes(size).items()}
    assert tuple(one.level_names) == tuple(found)


# ---- diffusers' own numbers


def test_levels_are_those_of_the_whole_forward_pass(small, photos):
    """Hooks on diffusers' encode; asking for a part, in any order, changes no bit of it."""
    images, seen, encoder = photos.images(), {}, small.vae.encoder
    modules = {f"down.{k}": block.resnets[-1] for k, block in enumerate(encoder.down_blocks)} | {
        "mid": encoder.mid_block
    }
    handles = [
        m.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out})) for name, m in modules.items()
    ]
    with torch.no_grad():
        seen["latent"] = (small.vae.encode(images).latent_dist.mean - 0.25) * small.scale
    for handle in handles:
        handle.remove()
    found = small.levels(images)
    assert tuple(found) == small.level_names and all(torch.equal(found[name], seen[name]) for name in seen)
    for names in (("down.0",), ("mid", "down.1"), ("latent",), ("latent", "down.2")):
        part = small.levels(images, names)
        assert tuple(part) == names and all(torch.equal(part[name], seen[name]) for name in names)
    assert not any(module._forward_hooks for module in small.modules())


def test_the_encoder_stops_after_the_deepest_level(small, photos, monkeypatch):
    monkeypatch.setattr(small.vae.encoder.down_blocks[2], "forward", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr(small.vae.encoder.mid_block, "forward", lambda *_: pytest.fail("went on"))
    assert set(small.levels(photos.images(), ("down.1", "down.0"))) == {"down.0", "down.1"}


def test_encode_and_decode_are_diffusers_up_to_scale_and_shift(small, photos):
    images = photos.images()
    with torch.no_grad():
        posterior = small.vae.encode(images).latent_dist
        decoded = small.vae.decode(posterior.mean).sample
    mean, std = small.moments(images)
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    latents = small.encode(images)
    assert torch.equal(latents, (posterior.mean - 0.25) * 0.18215)
    torch.testing.assert_close(latents / small.scale + small.shift, mean)
    torch.testing.assert_close(small.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_a_sample_is_mean_plus_deviation_times_noise(small, photos):
    """The same noise as diffusers draws gives diffusers' sample; nothing is drawn here."""
    images, before = photos.images(), torch.random.get_rng_state()
    noise = torch.randn(20, 4, 8, 8, generator=generator(0, 0, "posterior"))
    mean, std = small.moments(images)
    sample = small.vae.encode(images).latent_dist.sample(generator(0, 0, "posterior"))
    torch.testing.assert_close(small.encode(images, noise), (sample - small.shift) * small.scale)
    assert torch.equal(small.encode(images, noise), latents_of(mean, std, small.scale, small.shift, noise))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_and_in_float32_whatever_surrounds_it(small, photos):
    images = photos.images().requires_grad_()
    torch.nn.Sequential(small).train()
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad for p in small.parameters())
    alone = small.encode(images), small.levels(images, ("down.1",))["down.1"], small.decode(torch.ones(1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        within = small.encode(images), small.levels(images, ("down.1",))["down.1"], small.decode(torch.ones(1, 4, 8, 8))
    for a, b in zip(alone, within, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32 and not a.requires_grad


# ---- identity


def test_the_digest_follows_weights_and_settings():
    digest = lambda vae: autoencoders.wrap_autoencoder(vae, "any").digest  # noqa: E731
    same, other_scale, other_groups = (
        make_vae(**SMALL),
        make_vae(**SMALL, scaling_factor=0.5),
        make_vae(**SMALL | {"norm_num_groups": 2}),
    )
    changed = make_vae(**SMALL)
    changed.quant_conv.bias.data[-1] += 1e-6
    digests = [digest(vae) for vae in (make_vae(**SMALL), same, other_scale, other_groups, changed)]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_a_folder_of_diffusers_is_an_autoencoder(small, photos, tmp_path):
    small.vae.save_pretrained(tmp_path / "vae")
    again = load_autoencoder(str(tmp_path / "vae"))
    assert again.digest == small.digest and torch.equal(again.encode(photos.images()), small.encode(photos.images()))


# ---- caches


def test_cached_moments_make_the_latents(small, photos, own_folders):
    images, noise = photos.images(), torch.randn(20, 4, 8, 8, generator=generator(0, 0, "posterior"))
    rows = cached_latents(small, photos)
    assert rows.shape == (20, 2, 4, 8, 8) and rows.dtype == torch.float32
    assert torch.equal(latents_of(*rows[:].unbind(1), small.scale, small.shift, noise), small.encode(images, noise))


def test_what_is_cached_is_not_encoded_again(small, photos, own_folders, monkeypatch):
    first = cached_latents(small, photos)
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_: pytest.fail("encoded"))
    assert torch.equal(cached_latents(small, photos)[:], first[:])


def test_a_cache_of_another_autoencoder_is_refused(small, photos, own_folders):
    """In the folder of one autoencoder lies what another one made, as after a copy by hand."""
    other = autoencoders.wrap_autoencoder(make_vae(seed=1, **SMALL), "other")
    folder = caching.place("latents", autoencoder_latents.description(other, photos))
    assert cached_latents(small, photos).folder != folder
    shutil.copytree(cached_latents(small, photos).folder, folder)
    with pytest.raises(ValueError, match=f"autoencoder '{small.digest}', wanted is autoencoder '{other.digest}'"):
        cached_latents(other, photos)


def test_a_cut_shard_is_named(small, photos, own_folders):
    shard = cached_latents(small, photos).folder / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{shard} has .* bytes"):
        cached_latents(small, photos)


# ---- what is refused


def test_errors_name_value_and_choice(small, photos):
    for call, message in (
        (lambda: small.encode(torch.zeros(1, 3, 32, 30)), "30 pixels are no multiple.*nearest valid: 32"),
        (lambda: small.level_shapes(2), "nearest valid: 4"),
        (lambda: small.encode(torch.zeros(1, 1, 32, 32)), r"\(b, 3, h, w\), got \(1, 1, 32, 32\)"),
        (lambda: small.decode(torch.zeros(1, 3, 8, 8)), r"\(b, 4, h, w\), got \(1, 3, 8, 8\)"),
        (lambda: small.levels(photos.images(), ("down.22",)), "unknown level 'down.22'. Did you mean 'down.2'"),
        (lambda: small.levels(photos.images(), ()), "no level was asked for"),
        (lambda: small.encode(photos.images(), torch.zeros(20, 4, 4, 4)), r"noise has shape \(20, 4, 4, 4\)"),
        (lambda: load_autoencoder("tinny"), "unknown autoencoder 'tinny'. Did you mean 'tiny'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_folders_that_are_none(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="maskalign-lab make autoencoder"):
        load_autoencoder(f"tiny:{tmp_path}")
    small.vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match="'AutoencoderTiny', expected 'AutoencoderKL' or 'AutoencoderRAE'"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="Expected an AutoencoderKL or AutoencoderRAE of diffusers"):
        load_autoencoder(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_given, **_named):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoencoderKL, "load_config", offline)
    with pytest.raises(OSError, match="stabilityai/sd-vae-ft-mse.*couldn't connect(.|\n)*'tiny' ships"):
        load_autoencoder("stabilityai/sd-vae-ft-mse")


def test_latents_normalised_per_channel_are_refused():
    with pytest.raises(ValueError, match="latents_mean"):
        Autoencoder(make_vae(**SMALL, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4), "per channel", "")


# ---- the one that ships


def test_the_card_tells_the_truth(tiny):
    """Measured again on the first of the held-out pictures, which differ from all of them by their sampling alone."""
    card = json.loads((paths.data() / "autoencoder" / "card.json").read_text())
    assert (tiny.digest, tiny.scale, tiny.shift) == (card["weights"], card["scale"], card["shift"])
    for name in ("photos", "shapes", "digits"):
        told, found = card["held out"][name], reconstruction.measure(tiny, load_dataset(name, split="validation", n=90))
        assert found["PSNR"] == pytest.approx(told["PSNR"], abs=0.5), name
        assert found["PSNR of draws"] <= found["PSNR"] + 0.05 and found["PSNR"] > found["PSNR of coarse pictures"] + 3
        assert found["KL"] == pytest.approx(told["KL"], rel=0.1)


def test_it_takes_larger_pictures(tiny):
    images = load_dataset("photos", 64, "validation", n=4).images()
    found = {name: tuple(level.shape[1:]) for name, level in tiny.levels(images).items()}
    assert found == tiny.level_shapes(64) and found["latent"] == (4, 16, 16)
    assert tiny.decode(tiny.encode(images)).shape == images.shape


# ---- how it was made

SHORT = autoencoder_training.CompressConfig(
    steps=12, batch_size=8, widths=(8, 16, 16), groups=4, mix=(("photos", 40), ("digits", 20)), save_every=4, warmup=2
)


@pytest.fixture
def one_thread():
    """Sums that several threads share may differ in their last bit, because addition is not associative."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns_and_is_repeatable(one_thread):
    pictures, before = autoencoder_training.mixture(SHORT), torch.random.get_rng_state()
    config = replace(SHORT, steps=30)
    runs = [list(autoencoder_training.autoencoder_steps(pictures, config, device="cpu")) for _ in range(2)]
    losses = [float(step.losses["pixels"]) for step in runs[0]]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    first, second = (run[-1].model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("stop", [5, 8])
def test_a_training_that_was_stopped_goes_on(stop, one_thread, tmp_path):
    """From the last checkpoint, to the same bits."""
    pictures = autoencoder_training.mixture(SHORT)
    *_, whole = autoencoder_training.autoencoder_steps(pictures, SHORT, device="cpu")
    for step in autoencoder_training.autoencoder_steps(pictures, SHORT, tmp_path, "cpu"):
        if step.step == stop:
            break
    rest = list(autoencoder_training.autoencoder_steps(pictures, SHORT, tmp_path, "cpu"))
    assert [step.step for step in rest] == list(range(4 * (stop // 4), 13))
    for name, value in rest[-1].model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_finished_training_is_measured_and_saved(tmp_path):
    others = {"other photographs": load_dataset("photos", split="validation", n=10, seed=7)}
    out = autoencoder_training.compress(tmp_path / "out", tmp_path / "work", SHORT, "cpu", others, 20, print_every=0)
    names = ["card.json", "card.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    found, card = load_autoencoder(f"tiny:{out}"), json.loads((out / "card.json").read_text())
    assert card["weights"] == found.digest and list(card["held out"]) == ["photos", "digits", "other photographs"]
    assert "other photographs" in (out / "card.md").read_text() and "maskalign-lab make autoencoder" in card["command"]
    rows = cached_latents(found, pictures := autoencoder_training.mixture(SHORT))[:]
    noise = torch.randn(60, 4, 8, 8, generator=generator(0, 0, "posterior"))
    latents = latents_of(*rows.unbind(1), found.scale, found.shift, noise)
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02
    again = autoencoder_training.compress(tmp_path / "again", tmp_path / "work", SHORT, "cpu", n=20, print_every=0)
    assert (again / names[3]).read_bytes() == (out / names[3]).read_bytes()  # nothing was left to train
    with pytest.raises(FileExistsError, match="trained with config"):
        next(autoencoder_training.autoencoder_steps(pictures, replace(SHORT, lr=1.0), tmp_path / "work", "cpu"))
    with pytest.raises(FileExistsError, match=f"trained with data '{pictures.digest}'"):
        next(autoencoder_training.autoencoder_steps(load_dataset("digits", n=30), SHORT, tmp_path / "work", "cpu"))


def test_variations_keep_what_they_should(photos):
    images = photos.images()
    varied = autoencoder_training.vary(images, generator(0, 0, "vary"))
    assert varied.shape == images.shape and varied.abs().max() <= 1 and not torch.equal(varied, images)
    plain = autoencoder_training.vary(
        grey := images.mean(1, keepdim=True).expand(-1, 3, -1, -1), generator(0, 0, "vary")
    )
    torch.testing.assert_close(plain.flatten(1).sort().values, grey.flatten(1).sort().values, rtol=0, atol=1e-5)
    positions = torch.stack([grey, grey.flip(3), grey.mT, grey.flip(3).mT])  # colours leave grey as it is
    far = (positions - plain).abs().amax((2, 3, 4))  # (4, pictures)
    assert (far.min(0).values < 1e-5).all() and far.argmin(0).unique().tolist() == [0, 1, 2, 3]


def test_signal_to_noise_of_known_errors():
    """An error of 0.2 everywhere is 20 dB; what overshoots the range is no error."""
    images = torch.full((2, 3, 8, 8), 0.5)
    assert reconstruction.psnr(images, images - 0.2).tolist() == pytest.approx([20, 20], abs=1e-4)
    white = torch.ones(1, 3, 8, 8)
    assert reconstruction.psnr(white, 1.7 * white).item() == float("inf")


def test_divergence_is_torch_distributions(small, photos):
    mean, std = small.moments(photos.images())
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(reconstruction.divergence(mean, std), expected.sum((1, 2, 3)), rtol=1e-4, atol=1e-3)


def test_the_command_knows_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        shipped_runs, "compress", lambda out, work, device: f"{out.parent.name}/{out.name} {work.name} {device}"
    )
    assert cli.main(["make", "autoencoder", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "data/autoencoder autoencoder cpu\n"
    assert cli.main(["make", "autoencoderr"]) == 2
    assert "Did you mean 'autoencoder'" in capsys.readouterr().err
