"""The decoder of a representation autoencoder: its noise, its losses, and its two phases."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.golden import close, golden
from torch import nn

from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.base.seeding import generator
from maskalign_lab.encoders.representation_autoencoders import TeacherEncoder, build_decoder
from maskalign_lab.encoders.teachers import Teacher, build_vit
from maskalign_lab.training.adversarial import Discriminator, adaptive_weight, as_bytes, augment, discriminator_loss
from maskalign_lab.training.config import TrainingConfig
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import METHODS, Batch, State, shard
from maskalign_lab.training.rae_decoding import (
    DecodingConfig,
    DecodingDraw,
    RAEDecoding,
    decode,
    noise_levels,
    perceptual_distance,
)


def random_teacher(seed=1):
    torch.manual_seed(seed)
    return Teacher(build_vit(16, 4, 16, 2, 2), "random", 4, "")


def edges(images):
    return [images.diff(dim=2), images.diff(dim=3)]


look = partial(perceptual_distance, edges)


def setting(b=4, **options):
    """A decoder, its method and a batch."""
    encoder = TeacherEncoder(random_teacher(), 16)
    torch.manual_seed(0)
    decoder = build_decoder(
        encoder,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    method = RAEDecoding(DecodingConfig(**options), look, discriminator(random_teacher(2), (2, 1)))
    images = torch.rand(b, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return decoder, method, Batch(images, torch.arange(b), features=encoder(images).flatten(2).mT)


def discriminator(eyes, blocks):
    return Discriminator(eyes.dim, blocks).look_through(eyes)


def drawn(method, batch, step=3):
    return method.draw(batch, step, partial(generator, 0))


# ---- noise


def test_noised_tokens_are_the_official_ones():
    """RAE adds noise to the tokens before they are standardised; a network that hands them back shows what it was given."""
    record = golden("rae_decoder")
    tokens, noise, u = (record.inputs[name] for name in ("enc_tokens", "noise", "noise_u"))
    method = RAEDecoding(DecodingConfig(perceptual=0, adversarial=0))
    seen = []

    class Given(nn.Module):
        grid = 8

        def forward(self, latents):
            seen.append(latents)
            return latents

    batch = Batch(torch.zeros(2, 24, 8, 8), torch.zeros(2), features=tokens)
    draw = DecodingDraw(record.whole["noise_tau"] * u[:, 0, 0], noise, batch.y)
    method.loss(State(Given(), None, 0), batch, draw)
    mean, var = record.inputs["latent_mean"], record.inputs["latent_var"]
    close((seen[0] - mean) / (var + record.whole["eps"]).sqrt(), record.out["rae_encode_noised_latent"])


@settings(deadline=None, max_examples=30)
@given(tau=st.floats(0, 2), seed=st.integers(0, 99))
def test_levels_follow_their_law(tau, seed):
    uniform, normal = (noise_levels(law, tau, 4000, generator(seed, 0, "u")) for law in ("uniform", "normal"))
    assert (uniform >= 0).all() and (uniform <= tau).all() and (normal >= 0).all()
    assert abs(uniform.mean() - tau / 2) < 0.03 * tau + 1e-9
    assert abs(normal.square().mean().sqrt() - tau) < 0.06 * tau + 1e-9


@settings(deadline=None, max_examples=10)
@given(world=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_draws_look_at_no_image_and_are_cut_like_the_batch(world, seed):
    _, method, batch = setting()
    draw = method.draw(batch, seed, partial(generator, 0))
    blind = dataclasses.replace(batch, x=batch.x * torch.nan, features=batch.features * torch.nan)
    other = method.draw(blind, seed, partial(generator, 0))
    for field in ("t", "noise", "views"):
        whole = getattr(draw, field)
        assert torch.equal(whole, getattr(other, field))
        parts = torch.stack([getattr(shard(draw, rank, world), field) for rank in range(world)], 1)
        assert torch.equal(parts.flatten(0, 1), whole)


def test_without_noise_only_the_noise_goes():
    (_, noisy, batch), (_, clean, _) = setting(), setting(tau=0.0)
    first, second = drawn(noisy, batch), drawn(clean, batch)
    assert (first.t > 0).all() and (second.t == 0).all()
    assert torch.equal(first.noise, second.noise) and torch.equal(first.views, second.views)


# ---- losses


def test_the_losses_are_what_they_are_called():
    decoder, method, batch = setting(perceptual=0.3, adversarial=0.5)
    draw = drawn(method, batch)
    method.discriminator.eval()
    losses = method.loss(State(decoder, None, 3), batch, draw)
    decoded = decode(decoder, batch.features + draw.t[:, None, None] * draw.noise)
    pixels = ((decoded + 1) / 2 - (batch.x + 1) / 2).abs().mean()  # RAE counts in [0, 1]
    torch.testing.assert_close(losses.parts["pixels"], pixels)
    perceptual = perceptual_distance(edges, decoded, batch.x)
    fooled = -method.discriminator(augment(decoded, draw.views[:, 0])).mean()
    weight = adaptive_weight(pixels + 0.3 * perceptual, fooled, decoder.decoder.decoder_pred.weight)
    torch.testing.assert_close(losses.parts["weight"], weight)
    torch.testing.assert_close(losses.total, pixels + 0.3 * perceptual + 0.5 * weight * fooled)


def test_the_discriminator_is_shown_bytes_that_were_decoded_without_noise():
    decoder, method, batch = setting()
    draw, state = drawn(method, batch), State(decoder, None, 3)
    method.discriminator.eval()
    losses = method.loss(state, batch, draw, "discriminator")
    fake = as_bytes(decode(decoder, batch.features))
    real, fake = (method.discriminator(augment(images, draw.views[:, k])) for images, k in ((batch.x, 1), (fake, 2)))
    torch.testing.assert_close(losses.total, discriminator_loss(real, fake, "hinge"))
    losses.total.backward()
    assert all(p.grad is None for p in decoder.parameters())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), contrast=st.floats(0.1, 4))
def test_the_perceptual_distance_is_one_of_directions(seed, contrast):
    random = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 3, 3, 8, 8, generator=random)
    assert 0 <= perceptual_distance(edges, a, b) <= 4
    torch.testing.assert_close(perceptual_distance(edges, contrast * a, b), perceptual_distance(edges, a, b))
    assert perceptual_distance(edges, a, a) < 1e-10


def test_all_of_the_decoder_learns_and_nothing_of_what_looks():
    decoder, method, batch = setting()
    method.discriminator.requires_grad_(False)
    method.loss(State(decoder, None, 3), batch, drawn(method, batch)).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    assert all(p.grad is None for p in method.parameters())


# ---- phases


CONFIG = TrainingConfig(steps=5, batch_size=4, warmup=0, save_every=1, precision="float32", ema=0.9)


def train(run=None, stop=None, config=CONFIG, **options):
    decoder, method, batch = setting(**{"learns_from": 1, "heard_from": 3} | options)
    found = []
    for step in fit(decoder, method, lambda _: batch, config, run, "cpu", ExecutionConfig(compile="off")):
        found.append(step)
        if step.step == stop:
            break
    return found


def test_the_discriminator_learns_and_is_heard_when_its_time_comes():
    parts = [{*step.losses} for step in train()]
    main, told = {"pixels", "perceptual"}, {f"discriminator {name}" for name in ("loss", "real", "decoded")}
    assert parts == [main, main | told, main | told] + 2 * [main | told | {"adversarial", "weight"}]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, stop):
    train(tmp_path / "whole")
    train(tmp_path / "parts", stop)
    train(tmp_path / "parts")
    ends = [step_folder(tmp_path / name) for name in ("whole", "parts")]
    files = {path.stem for path in ends[0].glob("*.safetensors")}
    assert files == {"model", "ema", "method", "optimizer", "optimizer-discriminator"}
    for name in files:
        one, other = (load_tensors(end, name) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_without_a_voice_there_is_no_discriminator():
    found = train(adversarial=0.0, learns_from=0, heard_from=0)
    assert {*found[-1].losses} == {"pixels", "perceptual"}
    assert not RAEDecoding(DecodingConfig(adversarial=0), look, discriminator(random_teacher(), (1,))).phases()


def test_parts_of_a_batch_are_refused_with_a_discriminator_and_equal_without(tmp_path):
    """The weight between the losses compares gradients of the whole batch."""
    decoder, method, batch = setting()
    with pytest.raises(ValueError, match="execution.accumulate=2, and the discriminator's weight compares gradients"):
        next(fit(decoder, method, lambda _: batch, CONFIG, None, "cpu", ExecutionConfig(accumulate=2)))
    found = []
    for parts in (1, 2):
        decoder, method, batch = setting(adversarial=0.0)
        found.append(
            next(fit(decoder, method, lambda _: batch, CONFIG, None, "cpu", ExecutionConfig(accumulate=parts)))
        )
    for name in ("losses", "norms"):
        torch.testing.assert_close(*(getattr(step, name) for step in found), rtol=1e-4, atol=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "normals"}, "'normals'.*'normal'"),
        ({"margin": "hing"}, "'hing'.*'hinge'"),
        ({"tau": -0.1}, "tau=-0.1: expected at least 0"),
        ({"adversarial": -1}, "adversarial=-1: expected at least 0"),
        ({"learns_from": 5, "heard_from": 4}, "heard_from=4: .* learns from step 5"),
        ({"views": 1.5}, "views=1.5: expected a probability"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**options)


def test_a_weight_without_its_network_is_refused():
    with pytest.raises(ValueError, match="perceptual=1 needs a network"):
        RAEDecoding(DecodingConfig(adversarial=0))
    with pytest.raises(ValueError, match="adversarial=0.75 needs a network"):
        RAEDecoding(DecodingConfig(), look)


def test_no_recipe_can_name_it():
    assert RAEDecoding not in METHODS.values()
