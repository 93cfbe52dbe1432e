"""How far a mixer's tokens see: no farther than its radius, block by block, and the class token not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.diffusion.layers import Attention
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.runs.building import build
from maskalign_lab.runs.experiments import COMMON
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, identity, override, to_json

SIDE = 5
GRID = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))  # (n, 2) row and column


def net_of(radius: int | None, depth: int = 2, class_dim: int | None = None) -> SiT:
    torch.manual_seed(0)
    sizes = dict(input_size=2 * SIDE, patch_size=2, in_channels=3, width=16, depth=2, heads=2, num_classes=10)
    net = SiT(**sizes, class_dim=class_dim, mixer_depth=depth, mixer_radius=radius).double()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # a fresh block is the identity
    return net.eval()


def tokens_of(class_token: bool, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, SIDE**2 + class_token, 16).double(), torch.randn(n, 16).double()


def felt_of(net: SiT, changed: int, tokens: torch.Tensor, c: torch.Tensor) -> torch.Tensor:  # (n,)
    """Which tokens behind the mixer differ when one in front of it does, in one channel: a norm hides a shift of all."""
    other = tokens.clone()
    other[:, changed, 0] += 1
    return (net.mix(other, c) != net.mix(tokens, c)).any(2).all(0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, SIDE), st.integers(1, 3), st.integers(0, SIDE**2 - 1), st.booleans())
def test_a_patch_is_felt_as_far_as_the_blocks_reach_and_no_farther(radius, depth, patch, class_token):
    net, (tokens, c) = net_of(radius, depth, 6 if class_token else None), tokens_of(class_token)
    felt = felt_of(net, patch + class_token, tokens, c)
    reached = (GRID - GRID[patch]).abs().amax(1) <= radius * depth
    assert felt[class_token:].equal(reached)
    assert not class_token or not felt[0]


@pytest.mark.parametrize("radius", [0, 1, SIDE - 1, SIDE])
def test_the_class_token_carries_nothing_past_a_mask(radius):
    """With a radius it neither sees nor is seen, so that a dropped patch comes back through patches alone."""
    net, (tokens, c) = net_of(radius, class_dim=6), tokens_of(True)
    felt = felt_of(net, 0, tokens, c)
    assert felt[0] and not felt[1:].any()


@pytest.mark.parametrize("radius", [SIDE - 1, SIDE + 7])
def test_a_radius_of_the_whole_grid_is_none(radius):
    tokens, c = tokens_of(False)
    torch.testing.assert_close(net_of(radius).mix(tokens, c), net_of(None).mix(tokens, c), rtol=1e-12, atol=1e-12)


def test_with_radius_0_nothing_dropped_reaches_the_kept():
    net = net_of(0, class_dim=6)
    torch.manual_seed(2)
    x, t, y, cls = torch.randn(2, 3, 10, 10).double(), torch.rand(2).double(), torch.tensor([1, 10]), torch.randn(2, 6)
    x.requires_grad_()
    net(x, t, y, cls.double(), keep=torch.tensor([[0, 7, 12], [3, 4, 24]])).prediction.square().sum().backward()
    felt = x.grad.abs().amax(1).unflatten(1, (SIDE, 2)).unflatten(3, (SIDE, 2)).amax((2, 4)).flatten(1)  # (b, n)
    assert (felt > 0).nonzero().tolist() == [[0, 0], [0, 7], [0, 12], [1, 3], [1, 4], [1, 24]]


def test_without_a_radius_no_mask_is_made():
    """The fast path is the one that there was: attention is called without a mask, and there is no buffer."""
    tokens, c = tokens_of(False)
    net, masks = net_of(None), []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args, kw: masks.append(kw.get("sees")), with_kwargs=True)
    net.mix(tokens, c)
    assert masks == [None, None] and dict(net.named_buffers()) == {}
    assert net.state_dict().keys() == net_of(1).state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_every_precision_what_is_far_is_not_seen(dtype):
    net, (tokens, c) = net_of(1).to(dtype), (each.to(dtype) for each in tokens_of(False))
    felt = felt_of(net, 0, tokens, c)
    assert not felt[GRID.amax(1) > 2].any() and felt[0]


def test_blocks_that_are_compiled_give_the_same():
    net, (tokens, c) = net_of(1).float(), (each.float() for each in tokens_of(False))
    plain = net.mix(tokens, c)
    for block in net.mixer:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(net.mix(tokens, c), plain)


@pytest.mark.parametrize("radius", [-1, -2, 1.5, True, "1"])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ValueError, match=r"mixer_radius .*expected a whole number from 0, or None"):
        net_of(radius)


def test_a_radius_without_a_mixer_is_refused():
    with pytest.raises(ValueError, match="mixer_radius 1 has no mixer: take mixer_depth of 1 or more"):
        net_of(1, depth=0)
    with pytest.raises(ValueError, match="mixer_radius 1 has no mixer"):
        build(make_recipe("reg", "smoke", overrides="network.mixer_radius=1"), COMMON)


def test_recipes_say_it_and_those_without_are_what_they_were():
    plain = make_recipe("maskalign", "smoke")
    near = override(plain, "network.mixer_radius=1")
    assert from_json(to_json(near)) == near and near.network.mixer_radius == 1
    assert len({identity(plain), identity(near), identity(override(plain, "network.mixer_radius=0"))}) == 3
    assert identity(override(near, "network.mixer_radius=none")) == identity(plain)
    older = to_json(plain).replace('  "mixer_radius": null,\n', "")
    assert older != to_json(plain) and from_json(older) == plain
    (net, _), (same, _) = build(near, COMMON), build(plain, COMMON)
    assert net.mixer_sees.shape == 2 * (net.side**2 + 1,) and same.mixer_sees is None


@pytest.mark.parametrize(("value", "why"), [("-1", "at least 0, or none"), ("1.5", "got float"), ("far", "got str")])
def test_bad_overrides_are_refused(value, why):
    with pytest.raises(ValueError, match=rf"network.mixer_radius=.*{why}"):
        make_recipe("maskalign", "smoke", overrides=f"network.mixer_radius={value}")
