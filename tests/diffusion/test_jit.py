"""JiT: numbers recorded from the official code, and how its parts behave."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shared.golden import close, golden
from shared.jit import OBJECTIVE, objective, official
from torch.testing import assert_close

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion import objectives
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.jit import NAMES, SIZES, JiT, published_size
from maskalign_lab.diffusion.layers import Attention, SwiGLU, attend, rope_2d, rotate
from maskalign_lab.diffusion.objectives import Objective, denoising_loss, draw_time, predicted_velocity
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.diffusion.taps import taps
from maskalign_lab.runs.presets import PRESETS, make_recipe
from maskalign_lab.training.haste import HASTE, HASTEConfig
from maskalign_lab.training.irepa import IREPA, IREPAConfig
from maskalign_lab.training.methods import Batch, Draw, MethodConfig, PlainSiT, State
from maskalign_lab.training.repa import REPA, REPAConfig

OFF = dict(bottleneck=0, context_tokens=0, swiglu=False, rms_norm=False, rope=False, qk_norm=False)
SMALL = dict(input_size=16, patch_size=4, in_channels=3, width=32, depth=4, heads=4, num_classes=10)
PARTS = dict(bottleneck=6, context_tokens=5, context_start=2)


def small(network=JiT, **changes):
    """A little network in which every weight matters, in eval mode."""
    torch.manual_seed(0)
    net = network(**SMALL, **(PARTS | changes if network is JiT else changes))
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # a fresh network predicts zero
    return net.eval()


def inputs(n=3):
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(0, 11, (n,), generator=draw)
    return torch.randn(n, 3, 16, 16, generator=draw), torch.rand(n, generator=draw), y


# --- parity with the official code ------------------------------------------------------------------------------------


def test_the_network_gives_the_recorded_prediction_and_hidden_tokens():
    net, record = official().net, golden("jit")
    z, t, y = (record.inputs[k] for k in "zty")
    with taps(net, "blocks.?") as acts:
        out = net(z, 1 - t, y, collect=(1, 2, 3, 4))
    close(out.prediction, record.out["x_pred"])
    for depth in range(1, 5):
        recorded = record.out[f"h.block{depth - 1}"]
        close(acts[f"blocks.{depth - 1}"], recorded)  # with the context's tokens
        close(out.hidden[depth], recorded[:, -64:])
    assert recorded.shape[1] == 64 + net.context_tokens
    close(out.hidden[3], record.out["zs_unprojected.0"])
    close(official().projector(out.hidden[3]), record.out["zs.0"])


def test_the_parts_are_the_recorded_ones():
    net, record = official().net, golden("jit")
    close(net.x_embedder(record.inputs["z"]), record.out["h.patch_tokens_no_pos"])
    for name, table in (("cos", net.rope_cos), ("sin", net.rope_sin)):
        close(table, record.out[f"rope.incontext.{name}"])
        close(table[net.context_tokens :], record.out[f"rope.patch.{name}"])
    probe = record.inputs["probe_small"]
    exactly = dict(rtol=1e-4, atol=1e-6)
    close(net.blocks[0].norm1(probe), record.out["probe.block0_norm1"], **exactly)
    close(net.final_layer.norm_final(probe), record.out["probe.final_norm"], **exactly)


def test_the_times_are_the_recorded_ones(monkeypatch):
    record = golden("jit")
    monkeypatch.setattr(objectives.torch, "randn", lambda *_, **__: -record.inputs["t_randn"])
    close(draw_time(objective(), 3, torch.Generator()), 1 - record.out["t_sampled"])


def test_the_losses_are_the_recorded_ones():
    record, net, weight = golden("jit"), official().net, float(official().settings.proj_coeff)
    x, noise, labels, teacher = (record.inputs[k] for k in ("x", "e_unit", "labels", "zs.0"))
    draw = Draw(1 - record.out["t_sampled"], official().settings.noise_scale * noise, labels)
    repa = REPA(net, objective(), REPAConfig(depth=3, weight=weight), teacher_dims=(teacher.shape[2],))
    repa.projectors[0] = official().projector
    losses = repa.loss(State(net, net, 0), Batch(x, labels, teacher), draw)
    exactly = dict(rtol=1e-5, atol=1e-7, check_dtype=False)
    recorded = {k.removeprefix("loss."): v.squeeze() for k, v in record.out.items() if k.startswith("loss.")}
    assert_close(losses.parts["denoising"], recorded["denoise_loss"], **exactly)
    assert_close(losses.parts["denoising"], recorded["plain_jit_total"], **exactly)
    assert_close(losses.parts["alignment"], recorded["cosine"], **exactly)
    assert_close(losses.total, recorded["total"], **exactly)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.049, 0.05, 0.3, 1.0])
def test_loss_and_velocity_near_the_data_are_those_of_the_official_code(t):
    """No recorded time is below the clamp, so its formulas stand here: v = (x - z) / max(1 - t, 0.05) in JiT's time."""
    x, noise, guess = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.full((2,), t, dtype=torch.float64)
    z = interpolate(x, noise, times)
    v, v_guess = ((image - z) / max(t, 0.05) for image in (x, guess))
    assert_close(denoising_loss(OBJECTIVE, guess, x, noise, times), (v - v_guess).square().mean((1, 2, 3)))
    assert_close(predicted_velocity(OBJECTIVE, guess, z, times), -v_guess)


# --- sizes, keys, initialisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("B", 131.3), ("L", 459.1), ("H", 952.8)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        net = JiT(**published_size(f"JiT-{size}/16"))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_every_published_size_has_256_tokens():
    for name in NAMES:
        with torch.device("meta"):
            assert JiT(**published_size(name) | dict(depth=12)).side ** 2 == 256
    assert {name.split("/")[0] for name in NAMES} == {f"JiT-{size}" for size in SIZES}
    with pytest.raises(ValueError, match="Did you mean 'JiT-B/16'"):
        published_size("JiT-B/6")


def test_a_fresh_network_predicts_zero_and_starts_as_the_official_one():
    torch.manual_seed(0)
    net = JiT(**SMALL | dict(width=256, heads=4), bottleneck=24, context_tokens=32, context_start=1)
    x, t, y = inputs()
    out = net(x, t, y, collect=(1, 4))
    assert out.prediction.abs().max() == 0 and torch.equal(out.hidden[1], out.hidden[4])
    for weight in (net.x_embedder.proj1.weight, net.x_embedder.proj2.weight, net.blocks[0].mlp.w12.weight):
        bound = (6 / (weight[0].numel() + len(weight))) ** 0.5  # Xavier's, of the flattened weight
        assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(net.in_context_posemb.std() - 0.02) < 0.001
    assert not any(bias.any() for name, bias in net.named_parameters() if name.endswith("bias"))
    assert all(
        torch.equal(net.get_parameter(f"blocks.0.{name}.weight"), torch.ones(256)) for name in ("norm1", "norm2")
    )


def test_tables_are_not_saved_and_follow_the_network():
    net = small()
    assert not [name for name in net.state_dict() if "rope" in name or "mixer" in name]
    assert small(rope=False).state_dict().keys() == net.state_dict().keys()
    x, t, y = inputs()
    close(net(x, t, y).prediction, copy.deepcopy(net).double()(x.double(), t.double(), y).prediction.float())
    assert copy.deepcopy(net).to("meta").rope_cos.device.type == "meta"


# --- the parts --------------------------------------------------------------------------------------------------------


def test_without_its_parts_it_is_sit():
    sit, net, (x, t, y) = small(SiT), small(**OFF), inputs()
    for name, weight in sit.state_dict().items():
        assert torch.equal(weight, net.state_dict()[name])  # a seed gives the same weights
    net.load_state_dict(small(SiT).state_dict())
    theirs, ours = (each(x, t, y, collect=(1, 4)) for each in (sit, net))
    assert torch.equal(theirs.prediction, ours.prediction) and torch.equal(theirs.hidden[4], ours.hidden[4])


@settings(deadline=None, max_examples=40)
@given(st.fixed_dictionaries({part: st.booleans() for part in ("swiglu", "rms_norm", "rope", "qk_norm")}),
       st.integers(0, 7), st.integers(0, 4), st.integers(0, 3), st.booleans())  # fmt: skip
def test_every_combination_of_parts_works(switches, bottleneck, context_tokens, context_start, data_at_one):
    sizes = dict(bottleneck=bottleneck, context_tokens=context_tokens, context_start=context_start)
    net, (x, t, y) = small(**switches, **sizes, data_at_one=data_at_one), inputs()
    with taps(net, "blocks.?") as acts:
        out = net(x, t, y, collect=(1, 2, 3, 4))
    assert out.prediction.shape == x.shape and out.prediction.isfinite().all()
    assert out.class_prediction is None and net.class_dim is None
    for depth in range(1, 5):
        whole = acts[f"blocks.{depth - 1}"]
        assert whole.shape[1] == 16 + (context_tokens if depth > context_start else 0)
        assert torch.equal(out.hidden[depth], whole[:, -16:])  # the context's tokens never come out
        assert torch.equal(net.hidden(x, t, y, depth), out.hidden[depth])


def test_weights_with_data_at_one_are_asked_about_the_turned_time():
    net, turned, (x, _, y) = small(), small(data_at_one=True), inputs()
    t = torch.tensor([0.25, 0.5, 0.875])  # so that 1 - t is exact
    assert torch.equal(turned(x, t, y).prediction, net(x, 1 - t, y).prediction)
    assert torch.equal(turned.hidden(x, t, y, 3), net.hidden(x, 1 - t, y, 3))


@pytest.mark.parametrize("part", ["rope", "qk_norm", "rms_norm", "swiglu"])
def test_every_part_has_an_effect(part):
    net, without, args = small(), small(**{part: False}), inputs()
    shared = {k: v for k, v in net.state_dict().items() if k in without.state_dict() and "mlp" not in k}
    without.load_state_dict(shared, strict=False)
    assert not torch.allclose(net(*args).prediction, without(*args).prediction, atol=1e-3)


def test_the_context_enters_where_it_should_and_carries_the_class():
    net, (x, t, y) = small(), inputs()
    before = net(x, t, y, collect=(1, 2, 3))
    with torch.no_grad():
        net.in_context_posemb += 1
    after = net(x, t, y, collect=(1, 2, 3))
    assert all(torch.equal(before.hidden[depth], after.hidden[depth]) for depth in (1, 2))
    assert not torch.allclose(before.hidden[3], after.hidden[3], atol=1e-3)
    with taps(net, "blocks.2.norm1") as acts:
        net(x, t, y)
    label = net.y_embedder(y).unsqueeze(1) + net.in_context_posemb
    close(acts["blocks.2.norm1"][:, :5], net.blocks[2].norm1(label))


SIDE = 8
places = st.tuples(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1))


@settings(deadline=None, max_examples=50)
@given(places, places, places, st.integers(0, 99))
def test_rotary_logits_depend_on_relative_positions_alone(query, key, moved, seed):
    vectors = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turned = rotate(vectors[:, None].expand(2, SIDE**2, 12), *rope_2d(12, SIDE)).unflatten(1, (SIDE, SIDE))
    there = tuple(k + m - q for k, m, q in zip(key, moved, query))  # as far from `moved` as the key from the query
    assume(all(0 <= at < SIDE for at in there))
    logits = [turned[0][q] @ turned[1][k] for q, k in ((query, key), (moved, there))]
    assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_tokens_in_front_of_the_grid_are_not_turned():
    q, (cos, sin) = torch.randn(1, 2, 18, 8, generator=torch.Generator().manual_seed(0)), rope_2d(8, side=4, unplaced=2)
    turned = rotate(q, cos, sin)
    assert torch.equal(turned[:, :, :2], q[:, :, :2])
    assert torch.equal(turned[:, :, 2:], rotate(q[:, :, 2:], *rope_2d(8, side=4)))


def test_a_row_and_a_column_are_told_apart():
    cos, sin = rope_2d(8, side=4)
    q = torch.randn(8, generator=torch.Generator().manual_seed(0))
    turned = rotate(q.expand(1, 1, 16, 8), cos, sin)[0, 0].view(4, 4, 8)
    assert torch.equal(turned[2, :, :4], turned[2, :1, :4].expand(4, 4))  # the first half knows the row
    assert torch.equal(turned[:, 2, 4:], turned[:1, 2, 4:].expand(4, 4))  # the second half knows the column
    assert not torch.allclose(turned[1], turned[2]) and not torch.allclose(turned[:, 1], turned[:, 2])


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 12, 24, 32])
@pytest.mark.parametrize("swiglu", [False, True])
def test_dropout_is_in_the_middle_half(depth, swiglu):
    net = JiT(**SMALL | dict(depth=depth), **PARTS | dict(context_start=1), dropout=0.3, swiglu=swiglu)
    middle = [depth // 4 * 3 > i >= depth // 4 for i in range(depth)]  # the official condition
    inside = [block.mlp.dropout if swiglu else block.mlp.drop1.p for block in net.blocks]
    assert [block.attn.dropout for block in net.blocks] == inside == [0.3 if each else 0.0 for each in middle]


@pytest.mark.parametrize("swiglu", [False, True])
def test_dropout_acts_in_training_alone(swiglu):
    net, without, args = small(dropout=0.3, swiglu=swiglu), small(swiglu=swiglu), inputs()
    assert torch.equal(net(*args).prediction, without(*args).prediction)
    net.train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(net(*args, collect=(1, 2, 3, 4)))
    assert torch.equal(runs[0].prediction, runs[1].prediction)
    assert torch.equal(runs[0].hidden[1], runs[2].hidden[1])  # depth // 4 = 1 block without dropout
    assert not torch.allclose(runs[0].hidden[2], runs[2].hidden[2], atol=1e-3)
    state = torch.get_rng_state()
    without.train()(*args)
    assert torch.equal(state, torch.get_rng_state())  # no dropout, no random number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_attention_keeps_its_mean(dtype):
    """In both kernels; bfloat16 is written out on a CPU."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 2, 64, 16, dtype=dtype)
    mixed = attend(q, k, torch.ones(2, 2, 64, 16, dtype=dtype).requires_grad_(), dropout=0.25)
    shares = mixed[..., 0].float()  # the probabilities that are left, over 1 - 0.25
    assert shares.std() > 0.02 and abs(shares.mean() - 1) < 0.02
    assert_close(attend(q, k, torch.ones_like(q), dropout=0.0), torch.ones_like(q), rtol=1e-2, atol=0)


def test_dropout_acts_on_the_output_of_attention_and_inside_of_the_mlp():
    torch.manual_seed(0)
    tokens = torch.randn(1, 500, 16)
    mixed = Attention(16, 2, dropout=0.25)(tokens)
    assert abs((mixed == 0).float().mean() - 0.25) < 0.03
    mlp = SwiGLU(16, 16, dropout=0.25)
    mlp.w3.weight.data, mlp.w3.bias.data = torch.eye(16), torch.zeros(16)
    assert abs((mlp(tokens) == 0).float().mean() - 0.25) < 0.03


# --- methods and precision --------------------------------------------------------------------------------------------


def method(name, net):
    if name == "sit":
        return PlainSiT(net, OBJECTIVE, MethodConfig())
    if name == "repa":
        return REPA(net, OBJECTIVE, REPAConfig(depth=3, projector_width=16), teacher_dims=(12,))
    return IREPA(net, OBJECTIVE, IREPAConfig(depth=3), teacher_dims=(12,))


def batch(n=4):
    x, _, y = inputs(n)
    return Batch(x, y % 10, torch.randn(n, 16, 12, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["sit", "repa", "irepa"])
def test_a_training_step_reaches_every_parameter(name, dropout):
    net = small(dropout=dropout).train()
    method_ = method(name, net)
    losses = method_.loss(State(net, net, 0), batch(), method_.draw(batch(), 0, partial(generator, 0)))
    losses.total.backward()
    assert losses.total.isfinite()
    for parameter in [*net.parameters(), *method_.parameters()]:
        assert parameter.grad is None if parameter is net.pos_embed else parameter.grad.abs().max() > 0


def test_training_lowers_the_loss():
    net = small().train()
    repa, data = method("repa", net), batch()
    optimizer = torch.optim.AdamW([*net.parameters(), *repa.parameters()], lr=3e-3)
    totals = []
    for _ in range(30):
        losses = repa.loss(State(net, net, 0), data, repa.draw(data, 0, partial(generator, 0)))
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.5 * totals[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 100.0])
def test_half_precision_is_finite(scale, dtype):
    net = small(dropout=0.2).train()
    repa, data = method("repa", net), batch()
    data.x = data.x * scale
    with torch.autocast("cpu", dtype):
        losses = repa.loss(State(net, net, 0), data, repa.draw(data, 0, partial(generator, 0)))
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in [*net.parameters(), *repa.parameters()] if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_half_precision_is_near(dtype, whole):
    """Under autocast, and as a network that is converted as a whole."""
    net, (x, t, y) = small(), inputs()
    exact = net(x, t, y).prediction
    if whole:
        rough = net.to(dtype)(x.to(dtype), t.to(dtype), y).prediction.float()
    else:
        with torch.autocast("cpu", dtype):
            rough = net(x, t, y).prediction.float()
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotations_are_exact_in_half_precision(dtype):
    q, table = torch.randn(1, 2, 16, 8).to(dtype), rope_2d(8, side=4)
    for cos, sin in (table, tuple(each.to(dtype) for each in table)):  # of a network as it is, and converted as a whole
        assert torch.equal(rotate(q, cos, sin), rotate(q.float(), cos.float(), sin.float()).to(dtype))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 does not divide input_size 16"),
        ({"heads": 5}, "width 32 must be a multiple of heads"),
        ({"heads": 16}, "2 channels a head.*take width 64, or rope=False"),
        ({"context_start": 4}, "context_start 4 .* blocks 0 to 3"),
        ({"context_start": -1}, "context_start -1"),
        ({"bottleneck": -3}, "bottleneck -3"),
        ({"context_tokens": -1}, "context_tokens -1 must not be below 0"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout -0.1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        JiT(**SMALL | PARTS | change)


def test_what_is_not_there_need_not_fit():
    JiT(**SMALL | dict(heads=16), bottleneck=0, context_tokens=0, context_start=99, rope=False)
    JiT(**SMALL | dict(width=64, heads=16), context_start=0)  # what the message advised


def test_class_tokens_and_dropped_patches_are_refused():
    net, (x, t, y) = small(), inputs()
    for refused, message in (
        (dict(cls=torch.randn(3, 8)), "network sit"),
        (dict(keep=torch.zeros(3, 2)), "whole grid"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x, t, y, **refused)
        with pytest.raises(ValueError, match=message):
            net.hidden(x, t, y, 1, **refused)


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_a_depth_beyond_the_net_is_refused(depth):
    net, args = small(), inputs()
    with pytest.raises(ValueError, match="blocks 1 to 4"):
        net(*args, collect=(depth,))
    with pytest.raises(ValueError, match="blocks 1 to 4"):
        net.hidden(*args, depth)


def test_haste_refuses_attention_that_it_would_misread():
    with pytest.raises(ValueError, match="network sit, or method repa"):
        HASTE(
            small(), Objective(), HASTEConfig(depth=2, student_blocks=(1, 2), teacher_blocks=(4, 5)), teacher_dims=(6,)
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_the_recipes_noise_grows_with_the_image(preset, size):
    """JiT's deviation is pixels / 256, unless one says otherwise; other recipes keep theirs."""
    sized = f"data.size={size}"
    assert make_recipe("jit", preset, overrides=sized).objective.noise_scale == size / 256
    assert make_recipe("jit", preset, overrides=f"objective.noise_scale=3 {sized}").objective.noise_scale == 3
    assert make_recipe("sit", preset, overrides=sized).objective.noise_scale == 1
    assert make_recipe("repa", preset, overrides=f"network.name=jit {sized}").objective.noise_scale == 1
