"""The network's sizes and the taps that look into it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.diffusion.sit import SiT, published_size
from maskalign_lab.diffusion.taps import taps


def small(depth: int = 3) -> SiT:
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=depth, heads=2, num_classes=10)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # a fresh network predicts zero
    return net.eval()


def inputs(n: int = 2):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.rand(n), torch.randint(0, 11, (n,))


@pytest.mark.parametrize(("size", "millions"), [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        net = SiT(**published_size(f"SiT-{size}/2"), learn_sigma=True)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


@settings(deadline=None, max_examples=15)
@given(st.sets(st.integers(1, 3), min_size=1))
def test_collect_equals_taps_and_changes_nothing(depths):
    net, args = small(), inputs()
    plain = net(*args).prediction
    with taps(net, *(f"blocks.{d - 1}" for d in depths)) as acts:
        out = net(*args, collect=tuple(depths))
    assert torch.equal(out.prediction, plain)
    for d in depths:
        assert torch.equal(out.hidden[d], acts[f"blocks.{d - 1}"])
        assert torch.equal(out.hidden[d], net.hidden(*args, d))


def hooks(net) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def test_a_thousand_taps_leave_no_hook():
    net = small()
    for _ in range(1000):
        with taps(net, "blocks.*"), taps(net, "blocks.0"):
            pass
    assert hooks(net) == 0


def test_a_failure_inside_leaves_no_hook():
    net = small()
    with pytest.raises(KeyError), taps(net, "blocks.*"):
        raise KeyError
    assert hooks(net) == 0


def test_a_wrong_name_is_refused_before_any_hook_is_set():
    net = small()
    with pytest.raises(ValueError, match="Did you mean 'blocks.0'"), taps(net, "blocks.1", "block.0"):
        pass
    assert hooks(net) == 0


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_a_depth_beyond_the_net_is_refused(depth):
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        small()(*inputs(), collect=(depth,))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch_size 5 does not divide input_size 32"):
        SiT(input_size=32, patch_size=5)
    with pytest.raises(ValueError, match="width 30"):
        SiT(input_size=8, patch_size=4, width=30, heads=4)


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'SiT-XL/"):
        published_size("SiT-XL/3")
