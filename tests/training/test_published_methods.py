"""HASTE and iREPA: brute force, an exact stop, invariances, what is refused, and small trainings."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.layers import modulate, patchify
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.diffusion.taps import taps
from maskalign_lab.encoders.teachers import Teacher, load_teacher
from maskalign_lab.runs.batches import Batches, make_batches
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import build, load_run, train
from maskalign_lab.runs.sources import load_sources
from maskalign_lab.training.haste import HASTE, HASTEConfig, attention_alignment, student_logits
from maskalign_lab.training.irepa import IREPA, ConvProjector, IREPAConfig, spatial_norm
from maskalign_lab.training.methods import Batch, MethodConfig, PlainSiT, Plan, State, denoise
from maskalign_lab.training.sra2 import SRA2, SRA2Config

SMALL = dict(input_size=16, patch_size=4, in_channels=3, width=16, depth=3, heads=2, num_classes=10)
CONFIG = HASTEConfig(depth=2, projector_width=12, student_blocks=(1, 3), teacher_blocks=(4, 5), stop=10)


def setting(config=CONFIG, **more):
    """A network whose attention matters, a HASTE, a batch with a teacher of three heads, and a draw."""
    torch.manual_seed(0)
    net = SiT(**SMALL, **more).double()
    for parameter in net.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    haste = HASTE(net, Objective(), config, teacher_dims=(6,)).double()
    batch = Batch(torch.randn(4, 3, 16, 16).double(), torch.randint(0, 10, (4,)), torch.randn(4, 16, 6).double())
    batch.attention = 3 * torch.randn(4, 2, 3, 16, 16).double()
    draw = haste.draw(batch, 0, partial(generator, 0))
    draw.t, draw.noise = draw.t.double(), draw.noise.double()
    return net, haste, batch, draw


def hooks(net):
    return sum(len(module._forward_hooks) for module in net.modules())


# --- HASTE: the loss --------------------------------------------------------------------------------------------------


def logits_by_hand(net, batch, draw, blocks):
    """The network's forward pass once more, keeping q k^T / sqrt(d) of some blocks."""
    t = draw.t.view(-1, 1, 1, 1)
    tokens, c = net.embed((1 - t) * batch.x + t * draw.noise, draw.t, draw.y)
    tokens, found = net.select(tokens, draw.keep), []
    for depth, block in enumerate(net.blocks, start=1):
        shift, scale = block.adaLN_modulation(c).chunk(6, dim=1)[:2]
        q, k, _ = block.attn.qkv(modulate(block.norm1(tokens), shift, scale)).chunk(3, dim=2)
        if depth in blocks:
            heads = zip(q.chunk(net.blocks[0].attn.heads, 2), k.chunk(net.blocks[0].attn.heads, 2))
            found.append([[a[i] @ b[i].T / a.shape[2] ** 0.5 for i in range(len(tokens))] for a, b in heads])
        tokens = block(tokens, c)
    return found  # [block][head][image] (k, k)


def loss_by_hand(net, batch, draw, config):
    """Four loops: over blocks, heads, images and tokens."""
    student, entropies = logits_by_hand(net, batch, draw, config.student_blocks), []
    for block, heads in enumerate(student):
        for head, images in enumerate(heads):
            for image, logits in enumerate(images):
                kept = range(16) if draw.keep is None else draw.keep[image].tolist()
                for row, i in enumerate(kept):
                    target = torch.stack([batch.attention[image, block, head, i, j] for j in kept]).exp()
                    p = logits[row].exp() / logits[row].exp().sum()
                    entropies.append(-(target / target.sum() * p.log()).sum())
    return torch.stack(entropies).mean()


@settings(deadline=None, max_examples=6)
@given(kept=st.sampled_from([None, 1, 5, 16]), seed=st.integers(0, 3))
def test_the_attention_loss_is_what_loops_give(kept, seed):
    net, haste, batch, draw = setting()
    if kept:
        scores = torch.rand(4, 16, generator=torch.Generator().manual_seed(seed))
        draw.keep = scores.argsort(1)[:, :kept]
    losses = haste.loss(State(net, net, 0), batch, draw)
    by_hand = loss_by_hand(net, batch, draw, CONFIG)
    torch.testing.assert_close(losses.parts["attention"], by_hand, rtol=1e-10, atol=0)
    total = losses.parts["denoising"] + 0.5 * losses.parts["alignment"] + 0.5 * losses.parts["attention"]
    torch.testing.assert_close(losses.total, total)


def test_the_order_of_kept_tokens_does_not_matter():
    net, haste, batch, draw = setting()
    draw.keep = torch.stack([torch.randperm(16)[:7] for _ in range(4)])
    first = haste.loss(State(net, net, 0), batch, draw)
    draw.keep = draw.keep[:, torch.randperm(7)]
    torch.testing.assert_close(haste.loss(State(net, net, 0), batch, draw).total, first.total, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=20)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_the_attention_loss_ignores_what_softmax_ignores_and_is_least_for_the_teacher(shift, seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, 2, 6, 6, generator=g, dtype=torch.float64)
    loss = attention_alignment(student, teacher)
    torch.testing.assert_close(attention_alignment(student + shift, teacher - shift), loss)
    assert (loss >= attention_alignment(teacher, teacher) - 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sharp_attention_gives_no_nan(dtype):
    student = (3e4 * torch.eye(5)).to(dtype).expand(1, 2, 5, 5).clone().requires_grad_()
    loss = attention_alignment(student, -student.detach())
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and student.grad.isfinite().all()


def test_a_class_token_of_the_student_is_cut_off():
    torch.manual_seed(0)
    net = SiT(**SMALL, class_dim=6)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 2])
    with taps(net, "blocks.1.attn.qkv") as acts:
        qkv = net(*inputs, cls=torch.randn(2, 6), collect_qkv=(2,)).qkv
    assert set(qkv) == {2} and torch.equal(qkv[2], acts["blocks.1.attn.qkv"])
    q, k, _ = qkv[2].view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 8**0.5)[:, :, 1:, 1:]
    torch.testing.assert_close(student_logits(net, qkv[2], 2), expected)


def test_logits_are_float32_under_autocast_and_normalised_where_the_network_does():
    net, _, batch, draw = setting(qk_norm=True)
    net = net.float()
    with torch.autocast("cpu", torch.bfloat16):
        qkv = net(batch.x.float(), draw.t.float(), draw.y, collect_qkv=(1,)).qkv[1]
        logits = student_logits(net, qkv, 1)
    assert qkv.dtype == torch.bfloat16 and logits.dtype == torch.float32
    attn, qkv = net.blocks[0].attn, qkv.float()
    q, k, _ = qkv.view(4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(logits, attn.q_norm(q) @ attn.k_norm(k).mT / 8**0.5, rtol=0.02, atol=0.02)


def test_gradients_reach_queries_and_keys_of_the_aligned_blocks_only():
    net, haste, batch, draw = setting()
    haste.loss(State(net, net, 0), batch, draw).parts["attention"].backward()
    queries, keys, values = net.blocks[2].attn.qkv.weight.grad.chunk(3)
    assert queries.abs().max() > 0 and keys.abs().max() > 0 and values.abs().max() == 0
    assert net.blocks[2].mlp.fc1.weight.grad is None and net.blocks[0].mlp.fc1.weight.grad.abs().max() > 0


# --- HASTE: the stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 11, 10_000])
def test_after_the_stop_it_is_plain_sit_to_the_bit(step):
    net, haste, batch, draw = setting()
    plain = PlainSiT(net, Objective(), MethodConfig()).loss(State(net, net, step), batch, draw)
    plain.total.backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    batch.features = batch.attention = None  # nobody asks for them
    losses = haste.loss(State(net, net, step), batch, draw)
    losses.total.backward()
    assert torch.equal(losses.total, plain.total) and set(losses.parts) == {"denoising"}
    assert all(torch.equal(p.grad, expected[name]) for name, p in net.named_parameters() if p.grad is not None)
    assert all(p.grad is None for p in haste.parameters())


def test_before_the_stop_it_is_repa_and_attention():
    net, haste, batch, draw = setting()
    assert set(haste.loss(State(net, net, 9), batch, draw).parts) == {"denoising", "alignment", "attention"}


def test_needs_end_at_the_stop_also_inside_of_maskalign():
    assert Plan(CONFIG).at(9) == {"features", "attention"} and Plan(CONFIG).at(10) == set()
    masked = make_recipe("maskalign", "smoke", overrides="method.inner.name=haste method.inner.stop=3").method
    assert "attention" in Plan(masked).at(2) and Plan(masked).at(3) == set()


def test_no_hook_is_left_even_if_the_loss_fails():
    net, haste, batch, draw = setting()
    haste.loss(State(net, net, 0), batch, draw)
    assert hooks(net) == 0
    batch.features = batch.features[:, :9]
    with pytest.raises(ValueError, match="grids and channels"):
        haste.loss(State(net, net, 0), batch, draw)
    assert hooks(net) == 0


# --- HASTE: what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_blocks": (5,)}, "must be pairs"),
        ({"student_blocks": (), "teacher_blocks": ()}, "at least one"),
        ({"student_blocks": (3, 4)}, "depth 4 is outside the network: it has blocks 1 to 3"),
        ({"student_blocks": (0, 1)}, "counted from 1"),
        ({"stop": 0}, "stop 0 must be at least 1; method sit"),
        ({"depth": 4}, "depth 4 is outside"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        HASTE(SiT(**SMALL), Objective(), HASTEConfig(**(vars(CONFIG) | change)), teacher_dims=(6,))


def test_a_compiled_network_shows_its_attention_as_well():
    net, haste, batch, draw = setting()
    expected = haste.loss(State(net, net, 0), batch, draw)
    for block in net.blocks:
        block.compile(dynamic=False, backend="eager")
    found = haste.loss(State(net, net, 0), batch, draw)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.parts["attention"], expected.parts["attention"])


def test_a_teacher_with_another_grid_is_refused():
    net, haste, batch, draw = setting()
    batch.attention = batch.attention[..., :9, :9]
    with pytest.raises(ValueError, match="attends to 16 tokens, the teacher to 9"):
        haste.loss(State(net, net, 0), batch, draw)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.teacher=oracle", "aligns attention, and teacher 'oracle' has none"),
        ("method.teacher_blocks=(5,6)", "has blocks 1 to 5, counted from 1; teacher_blocks asks for 6"),
        ("data.teacher=timm:vit_small_patch16_dinov3?random", "plain Attention only"),
    ],
)
def test_a_teacher_whose_attention_cannot_be_had_is_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_sources(make_recipe("haste", "smoke", overrides=overrides))


# --- the teacher's attention ------------------------------------------------------------------------------------------


def probabilities(teacher, images, block):
    """timm's own attention probabilities, (b, heads, tokens, tokens), from its unfused path."""
    attn, seen = teacher.vit.blocks[block - 1].attn, []
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    teacher(images)
    handle.remove()
    attn.fused_attn = True
    return seen[0]


def normed_teacher():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(32, 8, num_classes=0, embed_dim=32, depth=3, num_heads=4, qk_norm=True)
    return Teacher(vit, "normed", 4, "")


TEACHERS = {
    "class token": partial(load_teacher, "tiny"),
    "query-key norms": normed_teacher,
    "registers": partial(load_teacher, "timm:vit_small_patch14_reg4_dinov2?random", grid=4),
    "no class token": partial(load_teacher, "timm:vit_base_patch16_siglip_gap_224?random", grid=4),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_teacher_attention_is_timms_own_before_the_softmax(kind):
    teacher = TEACHERS[kind]()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    logits = teacher.attention(images, (3, 1))
    assert not logits.requires_grad and hooks(teacher) == 0
    for index, block in enumerate((3, 1)):
        whole = probabilities(teacher, images, block)
        patches = whole[:, :, teacher.vit.num_prefix_tokens :, teacher.vit.num_prefix_tokens :]
        expected = patches / patches.sum(-1, keepdim=True)  # a softmax over the patches alone
        torch.testing.assert_close(logits[:, index].softmax(-1), expected, rtol=1e-4, atol=1e-6)


# --- iREPA ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    scale=st.floats(0.1, 100),
    shift=st.floats(-10, 10),
    gamma=st.floats(0, 1),
    seed=st.integers(0, 99),
    n=st.integers(4, 20),
)
def test_the_spatial_norm_is_a_z_score(scale, shift, gamma, seed, n):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, 3, generator=g, dtype=torch.float64) + 1
    plain = spatial_norm(features, gamma)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close(spatial_norm(scale * features, gamma), plain)  # the scale is gone
    close(spatial_norm(features + shift, 1.0), spatial_norm(features, 1.0))  # and at gamma 1 the mean
    order = torch.randperm(n, generator=g)
    close(spatial_norm(features[:, order], gamma), plain[:, order], rtol=1e-9, atol=1e-9)
    deviation = ((features - features.mean(1, keepdim=True)).square().sum(1) / (n - 1)).sqrt()
    close(plain, (features - gamma * features.mean(1, keepdim=True)) / deviation[:, None])
    assert torch.equal(spatial_norm(features[:1], gamma), plain[:1])  # pictures do not know of each other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_constant_features_give_no_nan(dtype):
    normed = spatial_norm(torch.ones(1, 9, 2, dtype=dtype), 1.0)
    assert normed.dtype == torch.float32 and torch.equal(normed, torch.zeros(1, 9, 2))


def test_the_conv_projector_shifts_with_its_input():
    projector, grid = ConvProjector(5, 3, 3, side=6), torch.randn(1, 6, 6, 5)
    out = projector(grid.flatten(1, 2)).unflatten(1, (6, 6))
    moved = projector(grid.roll((1, 1), (1, 2)).flatten(1, 2)).unflatten(1, (6, 6))
    torch.testing.assert_close(moved[:, 2:-1, 2:-1], out[:, 1:-2, 1:-2])  # away from the border


def test_the_conv_projector_takes_whole_grids_only():
    projector = ConvProjector(5, 3, 3, side=6)
    with pytest.raises(RuntimeError):
        projector(torch.randn(1, 25, 5))  # a square number, but not of this grid
    with pytest.raises(ValueError, match="kernel 2 must be odd"):
        ConvProjector(5, 3, 2, side=6)


def test_the_conv_projector_starts_as_torch_starts_a_convolution():
    torch.manual_seed(3)
    mine = ConvProjector(5, 3, 3, side=6).state_dict()
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(5, 3, 3, padding=1).state_dict()
    assert all(torch.equal(mine[f"projection_layer.{name}"], value) for name, value in plain.items())


def test_irepa_is_velocity_plus_weighted_alignment():
    net, _, batch, draw = setting()
    irepa = IREPA(net, Objective(), IREPAConfig(weight=0.7, depth=2, gamma=0.5), teacher_dims=(6,)).double()
    losses = irepa.loss(State(net, net, 0), batch, draw)
    plain = PlainSiT(net, Objective(), MethodConfig()).loss(State(net, net, 0), batch, draw)
    assert torch.equal(losses.parts["denoising"], plain.total)
    t = draw.t.view(-1, 1, 1, 1)
    hidden = net((1 - t) * batch.x + t * draw.noise, draw.t, draw.y, collect=(2,)).hidden[2]
    target = (batch.features - 0.5 * batch.features.mean(1, keepdim=True)) / (
        batch.features.std(1, keepdim=True) + 1e-6
    )
    expected = -torch.cosine_similarity(irepa.projectors[0](hidden), target, dim=-1).mean()
    torch.testing.assert_close(losses.total, plain.total + 0.7 * expected)


def test_maskalign_over_irepa_is_refused_when_built():
    recipe = make_recipe("maskalign", "smoke", overrides="method.inner.name=irepa")
    with pytest.raises(ValueError, match="irepa.*convolution over the whole grid"):
        build(recipe, Facts(10, (16,)))


# --- trainings --------------------------------------------------------------------------------------------------------


def trained(tmp_path, name, steps, overrides=""):
    more = f"training.steps={steps} training.batch_size=8 data.n=32 training.precision=float32 training.save_every=3"
    return train(make_recipe(name, "smoke", overrides=f"{more} {overrides}"), tmp_path, "cpu", print_every=0)


@pytest.mark.parametrize("name", ["haste", "irepa"])
def test_a_run_survives_saving_and_going_on(name, tmp_path):
    once = load_run(trained(tmp_path / "once", name, 6, "method.stop=4" if name == "haste" else ""))
    trained(tmp_path / "twice", name, 6, "method.stop=4" if name == "haste" else "")
    (tmp_path / "twice" / "steps" / "000006").rename(tmp_path / "lost")  # as if killed after the first checkpoint
    (tmp_path / "twice" / "latest").write_text("000003")
    trained(tmp_path / "twice", name, 6, "method.stop=4" if name == "haste" else "")
    twice = load_run(tmp_path / "twice")
    for module in ("net", "method"):
        mine, theirs = (getattr(run, module).state_dict() for run in (once, twice))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert once.method.config == twice.method.config and once.method.config.name == name


def test_the_projector_rests_after_the_stop(tmp_path):
    run = trained(tmp_path / "run", "haste", 6, "method.stop=3")
    early, late = (load_run(run, step).method.state_dict() for step in (3, 6))
    assert all(torch.equal(early[key], late[key]) for key in early)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert "attention" not in log[-1] and "denoising" in log[-1]


def test_the_teacher_is_asked_at_each_step_until_the_stop(monkeypatch):
    asked, ask = [], Teacher.attention
    monkeypatch.setattr(Teacher, "attention", lambda *given: asked.append(1) or ask(*given))
    batches = make_batches(make_recipe("haste", "smoke", overrides="method.stop=2 data.n=32 training.batch_size=4"))
    shapes = [None if (a := batches(step).attention) is None else tuple(a.shape) for step in range(4)]
    assert shapes == [(4, 2, 4, 64, 64)] * 2 + [None] * 2 and len(asked) == 2
    assert make_batches(make_recipe("repa", "smoke", overrides="data.n=32"))(0).attention is None
    assert isinstance(batches, Batches)


def test_maskalign_trains_over_haste(tmp_path):
    run = load_run(
        trained(tmp_path / "run", "maskalign", 3, "method.inner.name=haste method.inner.student_blocks=(1,2)")
    )
    assert run.method.config.inner.name == "haste" and run.step == 3
    log = json.loads((run.path / "log.jsonl").read_text().splitlines()[-1])
    assert log["attention"] > 0


# ---- SRA 2


@pytest.mark.parametrize("depth", [1, 3])
def test_sra2_is_the_smooth_distance_of_a_block_to_the_clean_input(depth):
    """Value by value, with the corner at 0.05; no teacher is asked, and the target gets no gradient of its own."""
    torch.manual_seed(0)
    net = SiT(**SMALL).double()
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    method = SRA2(net, Objective(), SRA2Config(depth=depth, weight=0.5), 0).double()
    batch = Batch(torch.randn(2, 3, 16, 16).double(), torch.tensor([1, 2]))
    draw = method.draw(batch, 0, partial(generator, 0))
    draw.t, draw.noise = draw.t.double(), draw.noise.double()
    found = method.loss(State(net, net, 0), batch, draw)
    hidden = denoise(method, net, batch, draw).hidden[depth]
    wrong = (method.projector(hidden) - patchify(batch.x, 4)).abs().flatten()
    by_hand = sum(0.5 * d * d / 0.05 if d < 0.05 else d - 0.025 for d in wrong.tolist()) / len(wrong)
    assert found.parts["alignment"].item() == pytest.approx(by_hand, rel=1e-6)
    assert found.total.item() == pytest.approx(found.parts["denoising"].item() + 0.5 * by_hand, rel=1e-6)
    assert sum(isinstance(part, torch.nn.Linear) for part in method.projector) == 5 and method.needs == ()
