"""The adversarial loss: parity, proportion, views, and what the discriminator may see and learn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.golden import close, golden
from torch import nn

from maskalign_lab.encoders.teachers import Teacher, build_vit
from maskalign_lab.training.adversarial import (
    Discriminator,
    adaptive_weight,
    as_bytes,
    augment,
    block_tokens,
    discriminator_loss,
    draw_views,
    generator_loss,
    move,
    recolour,
)


def random_teacher(side=16, patch=4, depth=3):
    """Eyes that were never taught."""
    torch.manual_seed(1)
    return Teacher(build_vit(side, patch, 16, depth, 2), "random", side // patch, "")


def pictures(b=3, side=16, seed=0):
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- losses


def test_losses_are_the_official_ones():
    record = golden("rae_decoder")
    real, fake = record.inputs["enc_tokens"]
    close(discriminator_loss(real, fake, "hinge"), record.out["gan.hinge_d"][0])
    close(discriminator_loss(real, fake, "vanilla"), record.out["gan.vanilla_d"][0])
    close(generator_loss(fake), record.out["gan.vanilla_g"][0])


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'hinges'.*'hinge'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "hinges")


@settings(deadline=None, max_examples=40)
@given(margin=st.sampled_from(["hinge", "vanilla"]), seed=st.integers(0, 99), shift=st.floats(0.01, 5))
def test_telling_better_costs_less(margin, seed, shift):
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
    before = discriminator_loss(*logits, margin)
    assert discriminator_loss(logits[0] + shift, logits[1] - shift, margin) <= before
    assert generator_loss(logits[1] + shift) < generator_loss(logits[1])


@settings(deadline=None, max_examples=40)
@given(first=st.floats(1e-3, 1e3), second=st.floats(1.0, 1e3))
def test_after_weighting_both_losses_pull_equally_hard(first, second):
    last = torch.tensor([0.3, -2.0, 1.0], requires_grad=True)
    losses = first * last.square().sum(), second * last.sum()
    weight = adaptive_weight(*losses, last)
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(weight * norms[1], norms[0], rtol=1e-3, atol=0)
    assert not weight.requires_grad and 0 <= weight <= 1e4


# ---- views


@settings(deadline=None, max_examples=30)
@given(b=st.integers(1, 4), height=st.integers(4, 20), width=st.integers(4, 20), seed=st.integers(0, 99))
def test_a_move_is_a_roll_whose_rest_is_empty(b, height, width, seed):
    random = torch.Generator().manual_seed(seed)
    images, lots = torch.rand(b, 3, height, width, generator=random) + 1, torch.rand(b, 2, generator=random)
    far = [round(side / 8) for side in (height, width)]
    for image, lot, moved in zip(images, lots, move(images, lots), strict=True):
        down, across = (int(value * (2 * most + 1)) - most for value, most in zip(lot.tolist(), far))
        rolled = image.roll((-down, -across), (1, 2))
        rows, columns = torch.arange(height)[:, None] + down, torch.arange(width) + across
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        assert torch.equal(moved, rolled * inside)


@settings(deadline=None, max_examples=30)
@given(lots=st.lists(st.floats(0, 0.999), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_colours_by_the_official_steps(lots, seed):
    image = pictures(1, 6, seed)[0]
    lightness, saturation, contrast = lots
    expected = image + (lightness - 0.5)
    expected = (expected - expected.mean(0)) * (2 * saturation) + expected.mean(0)
    expected = (expected - expected.mean()) * (contrast + 0.5) + expected.mean()
    torch.testing.assert_close(recolour(image[None], torch.tensor([lots]))[0], expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(b=st.integers(1, 6), seed=st.integers(0, 99))
def test_one_draw_decides_for_all_images_of_a_call(b, seed):
    lots = draw_views(b, torch.Generator().manual_seed(seed))
    assert lots.shape == (b, 7) and (lots >= 0).all() and (lots < 1).all()
    assert (lots[:, 5:] == lots[:1, 5:]).all() and len(lots[:, 0].unique()) == b
    images = pictures(b)
    assert torch.equal(augment(images, lots, 0.0), images)
    gates = lots[0, 5:] < 0.5
    seen = augment(images, lots, 0.5)
    expected = move(images, lots[:, :2]) if gates[0] else images
    torch.testing.assert_close(seen, recolour(expected, lots[:, 2:5]) if gates[1] else expected)


def test_gradients_pass_every_view():
    images = pictures().requires_grad_()
    augment(images, draw_views(3, torch.Generator().manual_seed(0))).square().sum().backward()
    assert (images.grad != 0).float().mean() > 0.7  # what was moved out of the frame gets none


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 3))
def test_rounding_to_bytes_keeps_bytes_and_moves_the_rest_by_half_a_step(seed, scale):
    values = scale * pictures(1, 5, seed)
    rounded = as_bytes(values)
    assert torch.equal(as_bytes(rounded), rounded)
    assert ((rounded - values.clamp(-1, 1)).abs() <= 1 / 255 + 1e-6).all()


# ---- the discriminator


def test_tokens_of_blocks_come_in_the_order_asked_for():
    teacher = random_teacher()
    found = block_tokens(teacher, pictures(), (3, 1, 3))
    assert [each.shape for each in found] == [(3, 16, 16)] * 3 and torch.equal(found[0], found[2])
    tokens = teacher.vit._pos_embed(teacher.vit.patch_embed(pictures()))
    torch.testing.assert_close(found[1], teacher.vit.blocks[0](tokens)[:, 1:])
    torch.testing.assert_close(found[0], teacher.vit.blocks(tokens)[:, 1:])  # without the last norm


def test_images_of_another_size_are_brought_to_the_eyes_own():
    assert block_tokens(random_teacher(), pictures(2, 40), (1,))[0].shape == (2, 16, 16)


def watching(eyes, blocks):
    return Discriminator(eyes.dim, blocks).look_through(eyes)


@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_judged_alone(training):
    discriminator = watching(random_teacher(), (3, 1)).train(training)
    discriminator(pictures())
    alone = watching(random_teacher(), (3, 1)).train(training)
    alone.load_state_dict(discriminator.state_dict())
    torch.testing.assert_close(discriminator(pictures())[1:2], alone(pictures()[1:2]))


def test_only_in_training_are_singular_values_looked_for():
    discriminator = watching(random_teacher(), (3,))
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    discriminator.eval()(pictures())
    assert all(torch.equal(value, state[name]) for name, value in discriminator.state_dict().items())
    discriminator.train()(pictures())
    changed = {name for name, value in discriminator.state_dict().items() if not torch.equal(value, state[name])}
    assert changed and all(name.endswith(("_u", "_v")) for name in changed)


def test_eyes_are_frozen_and_not_kept_and_images_get_their_gradient():
    teacher = random_teacher()
    discriminator, images = watching(teacher, (3, 1)), pictures().requires_grad_()
    discriminator(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    own = sum(p.numel() for p in discriminator.parameters())
    assert own == 2 * sum(p.numel() for p in discriminator.heads[0].parameters())
    assert not any(isinstance(module, Teacher) for module in discriminator.modules())


def test_a_head_is_the_official_one_layer_by_layer():
    """Norm over the tokens of one image, a ring of tokens, the sum of branch and input divided by the root of 2."""
    head = watching(random_teacher(), (3,)).heads[0].eval()
    tokens = block_tokens(random_teacher(), pictures(), (3,))[0].mT

    def layer(part, x, reach):
        conv, norm = part[0], part[1]
        x = torch.cat([x[..., x.shape[-1] - reach // 2 :], x, x[..., : reach // 2]], -1)
        x = nn.functional.conv1d(x, conv.weight, conv.bias)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return nn.functional.leaky_relu(x * norm.weight[:, None] + norm.bias[:, None], 0.2)

    hidden = layer(head.inward, tokens, 1)
    hidden = (layer(head.along, hidden, 9) + hidden) / 2**0.5
    expected = nn.functional.conv1d(hidden, head.outward.weight, head.outward.bias)[:, 0]
    torch.testing.assert_close(head(tokens.mT), expected)


@pytest.mark.parametrize("blocks", [(0,), (4,), (1, 9)])
def test_blocks_that_the_eyes_lack_are_refused(blocks):
    with pytest.raises(ValueError, match=f"has blocks 1 to 3; the discriminator asks for {max(blocks)}"):
        watching(random_teacher(), blocks)


def test_too_few_tokens_for_a_head_are_refused():
    with pytest.raises(ValueError, match="has 4 tokens, and a head sees 9 in a row"):
        watching(random_teacher(8, 4), (1,))
