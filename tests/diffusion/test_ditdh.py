"""DiT-DH: numbers recorded from the official code, and how its head behaves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.golden import close, golden
from torch.testing import assert_close

from maskalign_lab.diffusion.ditdh import NAMES, DiTDH, published_size
from maskalign_lab.diffusion.guidance import Field
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.objectives import Objective, denoising_loss, shifted
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.diffusion.taps import taps

SMALL = dict(input_size=4, in_channels=24, width=32, depth=3, heads=4, num_classes=10, head_width=48, head_heads=4)


def official(part="model"):
    """A recorded network: the main one, or the weaker one that guides it."""
    record = golden("ditdh")
    c = record.whole[part]
    (width, head_width), (depth, head_depth), (heads, head_heads) = (
        c[k] for k in ("hidden_size", "depth", "num_heads")
    )
    sizes = {k: c[k] for k in ("input_size", "patch_size", "in_channels", "num_classes", "mlp_ratio")}
    head = dict(head_width=head_width, head_depth=head_depth, head_heads=head_heads)
    net = DiTDH(**sizes, width=width, depth=depth, heads=heads, **head).eval()
    net.load_state_dict(record.parts[part])  # strict: all official keys
    return net


def small(**changes):
    """A little network in which every weight matters, in eval mode."""
    torch.manual_seed(0)
    net = DiTDH(**(SMALL | changes))
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # a fresh network predicts zero
    return net.eval()


def inputs(n=3):
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(0, 11, (n,), generator=draw)
    return torch.randn(n, 24, 4, 4, generator=draw), torch.rand(n, generator=draw), y


# --- parity with the official code ------------------------------------------------------------------------------------


def test_the_network_gives_the_recorded_prediction_and_hidden_tokens():
    net, record = official(), golden("ditdh")
    x, t, y = (record.inputs[k] for k in "xty")
    with taps(net, "blocks.?") as acts:
        out = net(x, t, y, collect=(1, 2, 3))
    close(out.prediction, record.out["pred"])
    close(net.t_embedder(t), record.out["h.t_emb"])
    for number in range(5):
        close(acts[f"blocks.{number}"], record.out[f"h.block{number}"])
    for depth in (1, 2, 3):
        close(out.hidden[depth], record.out[f"h.block{depth - 1}"])
        assert torch.equal(net.hidden(x, t, y, depth), out.hidden[depth])


def test_norms_have_the_official_epsilon():
    record = golden("ditdh")
    assert_close(
        official().blocks[0].norm1(record.inputs["probe_small"]), record.out["probe.block0_norm1"], rtol=1e-4, atol=0
    )


# --- how it behaves ---------------------------------------------------------------------------------------------------


def test_positions_and_frequencies_are_the_tables_that_were_recorded():
    net = official()
    fresh = DiTDH(8, 1, 16, 64, 3, 4, 10, head_width=96, head_heads=4)
    assert_close(fresh.pos_embed, net.pos_embed, rtol=1e-5, atol=1e-6)
    for name in ("enc_feat_rope", "dec_feat_rope"):
        for own, recorded in zip(getattr(fresh, name)(), getattr(net, name)(), strict=True):
            assert_close(own, recorded, rtol=1e-5, atol=1e-5)


def test_a_token_reaches_its_own_velocity_through_the_head_alone():
    """With the backbone's word held still, the head's first map sees the token: its width is what lets noise through."""
    net, (x, t, y) = small(), inputs(1)
    s, time, _ = net._backbone(x, t, y, net.depth)
    assert s.shape[-1] == 32 and net.x_embedder(x).shape[-1] == net.head_width == 48
    moved = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(net(moved, t, y).prediction, net(x, t, y).prediction)


def test_what_cannot_work_is_refused():
    net, (x, t, y) = small(), inputs()
    with pytest.raises(ValueError, match="class token.*network sit"):
        net(x, t, y, cls=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="takes the whole grid"):
        net(x, t, y, keep=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        net(x, t, y, collect=(4,))  # a block of the head has another width
    with pytest.raises(ValueError, match="multiple"):
        DiTDH(**SMALL | {"head_width": 50})
    with pytest.raises(ValueError, match="DiTDH-XL"):
        published_size("DiTDH-XXL")


def test_shared_modules_start_alike_whatever_the_head_is():
    torch.manual_seed(0)
    one = DiTDH(**SMALL).state_dict()
    torch.manual_seed(0)
    other = DiTDH(**SMALL | {"head_depth": 4}).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and len(other) > len(one)


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_build(name):
    with torch.device("meta"):
        net = DiTDH(**published_size(name))
    assert net.side == 16 and len(net.blocks) == net.depth + 2


# --- guidance, time and sampling, as the official code has them ---------------------------------------------------------

PLAIN = SamplerConfig("euler", precision="float32")


def guided(config, guide=None):
    """The guided velocity of recorded images, each at a time of its own."""
    record, net = golden("ditdh"), official()
    x, t, y = (record.inputs[key] for key in (("x_cfg", "t_cfg", "y_cfg") if guide is None else "xty"))
    fields = (Field(net, Objective(), label[None], config, guide) for label in y)
    n = 2 if guide is None else 3
    return torch.cat([field(x[k : k + 1].double(), t[k].item()) for k, field in zip(range(n), fields)]).float()


@pytest.mark.parametrize("low, high, recorded", [(0.0, 1.0, "pred_cfg_full"), (0.3, 0.8, "pred_cfg_interval_0.3_0.8")])
def test_guidance_acts_on_its_interval(low, high, recorded):
    config = replace(PLAIN, guidance=1.8, guidance_low=low, guidance_high=high)
    close(guided(config), golden("ditdh").out[recorded][:2])


def test_a_weaker_network_guides():
    close(guided(replace(PLAIN, guidance=1.42), official("guide")), golden("ditdh").out["pred_autoguidance"])


@pytest.mark.parametrize("law", ["uniform", "logit-normal_0_1"])
def test_losses_at_the_recorded_times(law):
    record, net = golden("ditdh"), official()
    noise, x, t = record.inputs["x0"], record.inputs["x1"], record.out[f"time.{law}"]
    prediction = net(interpolate(x, noise, t), t, record.inputs["y"]).prediction
    close(denoising_loss(Objective(), prediction, x, noise, t), record.out[f"loss.{law}"])


def truncated(law, u):
    """The official draw of a time before the shift: an inverse distribution function, cut off at .999."""
    if law == "uniform":
        return 0.999 * u
    mean, std = map(float, law.split("_")[1:])
    normal, ends = torch.distributions.Normal(mean, std), torch.tensor([0.0, 0.999]).logit()
    below = normal.cdf(ends)
    return torch.sigmoid(normal.icdf(below[0] + (below[1] - below[0]) * u))


@pytest.mark.parametrize("law", ["uniform", "logit-normal_0_1", "logit-normal_-0.5_1.3"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.928203230275509])
def test_times_are_shifted_as_recorded(law, shift):
    record = golden("rae_transport")
    times = shifted(truncated(law, record.inputs["rand_u"]), shift)
    assert_close(times, record.out[f"time.shift{shift:.3f}.{law}"], rtol=1e-5, atol=1e-6)


class Analytic(torch.nn.Module):
    """The field that the transport was recorded with."""

    in_channels, side, patch_size, num_classes, class_dim = 4, 4, 1, 10, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        return Output(torch.sin(1.3 * x) * (0.5 + t) - 0.2 * x + 0.1 * t, None, {})


@pytest.mark.parametrize("solver, official_name", [("euler", "euler"), ("heun", "heun2"), ("dopri5", "dopri5")])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.928203230275509])
def test_the_shifted_grid_and_its_samples_are_the_recorded_ones(shift, solver, official_name):
    record, objective = golden("rae_transport"), Objective(time_shift=shift)
    config = SamplerConfig(solver, steps=5, end=0.001)
    start, y = record.inputs["init"], torch.zeros(3, dtype=torch.long)
    steps = list(sample(Analytic(), objective, y, config, start=start))
    if solver != "dopri5":
        grid = torch.tensor([step.t for step in steps])
        assert_close(grid, record.out[f"ode_grid.shift{shift:.3f}"], rtol=1e-5, atol=1e-6)
    last = record.out[f"ode.shift{shift:.3f}.{official_name}"]
    assert_close(
        steps[-1].x.float(), last, rtol=2e-3 if solver == "dopri5" else 1e-4, atol=1e-3 if solver == "dopri5" else 2e-5
    )


@pytest.mark.parametrize("kind", ["nocfg", "cfg", "autoguidance"])
def test_samples_are_the_recorded_ones(kind):
    record, net = golden("ditdh"), official()
    whole = record.whole
    scale = {"nocfg": 1.0, "cfg": 1.8, "autoguidance": 1.42}[kind]
    config = replace(PLAIN, steps=whole["num_steps"] - 1, end=0.001, guidance=scale)
    y = record.inputs["y_cfg"]
    n = 2 if kind == "cfg" else 4
    guide = official("guide") if kind == "autoguidance" else None
    objective = Objective(time_shift=whole["time_dist_shift"])
    for step in sample(net, objective, y[:n], config, start=record.inputs["init"][:n], guide=guide):
        pass
    close(step.x.float(), record.out[f"sample.{kind}.euler"][:n])


@given(shift=st.floats(0.1, 20), t=st.floats(0, 1))
def test_a_shift_keeps_ends_and_order_and_can_be_taken_back(shift, t):
    assert shifted(0.0, shift) == 0 and shifted(1.0, shift) == 1
    assert abs(shifted(shifted(t, shift), 1 / shift) - t) < 1e-9
    assert (shifted(t, shift) >= t) == (shift >= 1) or t in (0.0, 1.0) or abs(shifted(t, shift) - t) < 1e-12


def test_bad_times_are_refused():
    with pytest.raises(ValueError, match="time_shift=0"):
        Objective(time_shift=0.0)
    with pytest.raises(ValueError, match="end 1"):
        SamplerConfig("euler", end=1.0)
    with pytest.raises(ValueError, match="end 0.001 must be 0 for euler-maruyama"):
        SamplerConfig("euler-maruyama", end=0.001)
