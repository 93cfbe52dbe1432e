"""Spatial metrics against loops over pairs, against known answers, and against what must not change them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.measure.spatial import (
    METRICS,
    VARIANTS,
    cds,
    far_from,
    lds,
    manhattan,
    per_image,
    places_only,
    rmsc,
    shuffled,
    spatial_metrics,
    srss,
    without_places,
)

seeds = st.integers(0, 99)


def cloud(seed, b=3, side=5, d=6):
    """Tokens, and which of them lie on an object."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(b, side**2, d, generator=draw), torch.rand(b, side**2, generator=draw) < 0.5


def pairs(side):
    """Every ordered pair of different tokens, with its distance."""
    for i, j in itertools.permutations(range(side**2), 2):
        yield i, j, abs(i // side - j // side) + abs(i % side - j % side)


def cosine(tokens, i, j):
    return F.cosine_similarity(tokens[i], tokens[j], dim=0).item()


# ---- against loops


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([3, 4, 6]))
def test_metrics_are_the_loops_over_pairs(seed, side):
    tokens, _ = cloud(seed, 1, side)
    near = [cosine(tokens[0], i, j) for i, j, step in pairs(side) if step == 1]
    far = [cosine(tokens[0], i, j) for i, j, step in pairs(side) if step >= far_from(side)]
    assert lds(tokens).item() == pytest.approx(sum(near) / len(near) - sum(far) / len(far), abs=1e-5)
    means = []
    for distance in range(1, max(2, side // 2) + 1):
        at = [cosine(tokens[0], i, j) for i, j, step in pairs(side) if step == distance]
        means.append(sum(at) / len(at))
    x = torch.arange(1.0, len(means) + 1)
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), torch.tensor(means)).solution[0].item()
    assert cds(tokens).item() == pytest.approx(-slope, abs=1e-5)
    unit = F.normalize(tokens[0], dim=-1)
    spread = sum((each - unit.mean(0)).square().sum().item() for each in unit) / side**2
    assert rmsc(tokens).item() == pytest.approx(spread**0.5, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_srss_is_the_loop_over_anchors(seed):
    tokens, objects = cloud(seed, 1)
    found = []
    for anchor in objects[0].nonzero().flatten().tolist():
        mine = [(j, step) for i, j, step in pairs(5) if i == anchor]
        beside = [cosine(tokens[0], anchor, j) for j, step in mine if step == 1 and objects[0, j]]
        beyond = [cosine(tokens[0], anchor, j) for j, step in mine if step >= 2 and not objects[0, j]]
        if beside and beyond:
            found.append(sum(beside) / len(beside) - sum(beyond) / len(beyond))
    value = srss(tokens, objects).item()
    assert value == pytest.approx(sum(found) / len(found), abs=1e-5) if found else math.isnan(value)


def test_a_grid_of_16_has_the_published_distances():
    assert far_from(16) == 6 and manhattan(16).max() == 30
    tokens, _ = cloud(0, 2, 16)
    assert torch.equal(lds(tokens), lds(tokens, 1, 6)) and torch.equal(cds(tokens), cds(tokens, 8))
    assert not torch.allclose(lds(tokens), lds(tokens, near=7, far=8))


# ---- what must not change them


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(METRICS))
def test_rotations_lengths_and_mirrors_change_nothing(seed, metric):
    tokens, objects = cloud(seed)
    value = per_image(metric, tokens, objects)
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    lengths = torch.rand(3, 25, 1, generator=draw) + 0.1
    mirror = lambda values: values.unflatten(1, (5, 5)).flip(2).flatten(1, 2)  # noqa: E731
    for changed, on in (
        (tokens @ turn, objects),
        (tokens * lengths, objects),
        (mirror(tokens), mirror(objects)),
        (tokens.unflatten(1, (5, 5)).transpose(1, 2).flatten(1, 2), objects.unflatten(1, (5, 5)).mT.flatten(1)),
    ):
        torch.testing.assert_close(per_image(metric, changed, on), value, atol=1e-5, rtol=1e-4, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(METRICS))
def test_images_do_not_know_each_other(seed, metric):
    tokens, objects = cloud(seed, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    turned = per_image(metric, tokens[order], objects[order])
    torch.testing.assert_close(turned, per_image(metric, tokens, objects)[order], equal_nan=True)


# ---- known answers


@pytest.mark.parametrize("side", [4, 8, 16])
def test_independent_tokens_have_no_arrangement(side):
    tokens = torch.randn(100, side**2, 64, generator=torch.Generator().manual_seed(0))
    found = spatial_metrics(tokens, torch.rand(100, side**2) < 0.5)
    for metric in ("LDS", "CDS", "SRSS"):
        value, half = found[metric]
        assert abs(value) < 3 * half + 1e-3 and half < 0.05
    assert found["RMSC"][0] == pytest.approx((1 - 1 / side**2) ** 0.5, abs=0.01)


def test_tokens_that_are_all_alike_have_no_contrast():
    tokens = torch.randn(1, 1, 5).expand(3, 16, 5)
    found = spatial_metrics(tokens, torch.arange(16).expand(3, 16) < 6)
    assert all(abs(value) < 1e-3 for value, _ in found.values())


def test_tokens_of_places_alone_reach_the_ends():
    """Distant tokens that oppose each other, and neighbours that do."""
    angle = torch.arange(8) / 7 * torch.pi
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    ramp = torch.cat([turn[:, None].expand(8, 8, 2), turn[None].expand(8, 8, 2)], -1).reshape(1, 64, 4)
    assert lds(ramp, far=14).item() > 1.9 and lds(ramp).item() > 0.6 and cds(ramp).item() > 0.05
    rows, columns = torch.arange(64) // 8, torch.arange(64) % 8
    board = torch.where((rows + columns) % 2 == 0, 1.0, -1.0)[None, :, None]
    assert lds(board).item() < -0.9 and lds(board, far=2).item() < -0.9


def test_an_object_that_is_told_apart_is_seen():
    objects = torch.zeros(1, 64, dtype=torch.bool)
    objects[0, [9, 10, 17, 18]] = True
    tokens = torch.where(objects[..., None], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert srss(tokens, objects).item() == pytest.approx(1)
    assert (
        srss(tokens, torch.zeros_like(objects)).isnan().all() and srss(tokens, ~torch.zeros_like(objects)).isnan().all()
    )
    assert srss(-tokens, objects).item() == pytest.approx(1)


def test_images_without_an_object_are_left_out_of_the_mean():
    tokens, objects = cloud(0, 4)
    objects[1] = False
    value, _ = spatial_metrics(tokens, objects)["SRSS"]
    assert value == pytest.approx(srss(tokens, objects)[[0, 2, 3]].mean().item(), abs=1e-6)
    assert math.isnan(spatial_metrics(tokens)["SRSS"][0])


# ---- variants


def test_places_and_what_they_leave_add_up():
    tokens, _ = cloud(0, 40)
    whole = places_only(tokens) + without_places(tokens) - tokens.mean((0, 1))
    torch.testing.assert_close(whole, tokens)
    torch.testing.assert_close(without_places(tokens).mean(0), tokens.mean((0, 1)).expand(25, 6), atol=1e-6, rtol=1e-4)
    assert places_only(tokens).var(0).max() < 1e-10


def test_shuffling_keeps_every_token_of_every_image():
    tokens, _ = cloud(0, 6)
    other = shuffled(tokens)
    assert not torch.equal(other, tokens) and torch.equal(other.sum(-1).sort(1).values, tokens.sum(-1).sort(1).values)
    torch.testing.assert_close(rmsc(other), rmsc(tokens))
    assert VARIANTS["as it is"](tokens) is tokens


# ---- bad input


def test_what_is_no_grid_or_metric_is_refused():
    with pytest.raises(ValueError, match="12 tokens are no square grid.*the nearest has 9"):
        lds(torch.randn(2, 12, 3))
    with pytest.raises(ValueError, match="1 tokens are no square grid.*the nearest has 4"):
        cds(torch.randn(2, 1, 3))
    with pytest.raises(ValueError, match="far=9: .* the largest distance is 6"):
        lds(torch.randn(2, 16, 3), far=9)
    with pytest.raises(ValueError, match=r"objects of shape \(2, 9\)"):
        srss(torch.randn(2, 16, 3), torch.zeros(2, 9).bool())
    with pytest.raises(ValueError, match="spatial metric 'LSD'"):
        per_image("LSD", torch.randn(2, 16, 3))
