"""The oracle: what it says is true, its dials do what their names say, and noise belongs to the image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.oracle import Oracle, mask_edges, oracle_features, oracle_of, part_means, token_means

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


@few
@given(seeds, st.sampled_from([1, 2, 4, 8, 16]))
def test_it_agrees_with_the_masks(seed, grid):
    data = load_dataset("shapes", 32, n=12, seed=seed)
    features = oracle_features(data, grid)
    assert features.shape == (12, grid * grid, 18) and features.dtype == np.float32
    kind, coverage, offset, edge, code = np.split(features, [10, 11, 13, 14], axis=-1)
    assert np.allclose(coverage.mean((1, 2)), data.masks.mean((1, 2)), atol=1e-6)
    assert np.array_equal(kind.max(1).argmax(-1), data.labels)
    assert np.allclose(kind.sum(-1, keepdims=True), coverage)
    assert (edge <= coverage + 1e-6).all() and not code.any()
    step = offset.reshape(12, grid, grid, 2)
    assert np.allclose(step[:, :, :-1, 0] - step[:, :, 1:, 0], 1 / grid, atol=1e-6)
    assert np.allclose(step[:, :-1, :, 1] - step[:, 1:, :, 1], 1 / grid, atol=1e-6)


def test_token_means_are_row_major():
    maps = np.zeros((1, 4, 6))[:, :, :4].copy()
    maps[0, 0:2, 2:4] = 1
    assert token_means(maps, 2).tolist() == [[0, 1, 0, 0]]
    assert part_means(maps[:, :2, 2:], 1, 2).tolist() == [[[1, 1, 1, 1]]]
    maps[0, 0, 3] = 0
    assert part_means(maps, 2, 2)[0, 1].tolist() == [1, 0, 1, 1]


# ---- dials


def test_noise():
    data = load_dataset("shapes", n=100)
    clean, noisy = (oracle_features(data, oracle=Oracle(noise)) for noise in (0, 0.5))
    noise = noisy - clean
    assert abs(noise.std() - 0.5) < 0.01 and abs(noise.mean()) < 0.01
    assert np.abs(np.corrcoef(noise.reshape(100, -1))[~np.eye(100, dtype=bool)]).max() < 0.2  # of each image its own
    twice = oracle_features(data, oracle=Oracle(1.0)) - clean
    assert np.allclose(twice, 2 * noise, atol=1e-5)


@few
@given(seeds, st.lists(st.integers(0, 59), min_size=1, max_size=20, unique=True))
def test_noise_belongs_to_the_image(seed, rows):
    """A feature is the same in a subset, in another order, and among more images: whatever was kept equals what is computed again."""
    data, oracle = load_dataset("shapes", 16, n=60, seed=seed), Oracle(0.5, 0.3, 2)
    features = oracle_features(data, 4, oracle)
    assert np.array_equal(features[rows], oracle_features(data.subset(np.array(rows)), 4, oracle))
    assert np.array_equal(features[:7], oracle_features(load_dataset("shapes", 16, n=7, seed=seed), 4, oracle))


def test_noise_is_the_same_in_another_process(forks):
    code = (
        "from maskalign_lab.data.datasets import load_dataset; from maskalign_lab.data.oracle import *;"
        "print(oracle_features(load_dataset('shapes', n=3), 8, Oracle(0.5)).tobytes().hex()[:4000])"
    )
    there = forks.start(code).communicate()[0].strip()
    assert there == oracle_features(load_dataset("shapes", n=3), 8, Oracle(0.5)).tobytes().hex()[:4000]


def test_position():
    data = load_dataset("shapes", n=100)
    clean, leaky = (oracle_features(data, oracle=Oracle(position=amount)) for amount in (0, 2))
    assert np.array_equal(leaky[..., :14], clean[..., :14])
    code = leaky[0, :, 14:]
    assert (leaky[..., 14:] == code).all() and len(np.unique(code.round(4), axis=0)) == 64
    assert 1.9 < np.abs(code).max() <= 2


@pytest.mark.parametrize("noise", [0, 0.5])
def test_detail_adds_the_quarters_and_leaves_the_rest_alone(noise):
    data = load_dataset("shapes", n=50)
    plain, fine = (oracle_features(data, oracle=Oracle(noise, detail=detail)) for detail in (0, 2))
    assert fine.shape == (50, 64, 22) and np.array_equal(fine[..., :18], plain)
    if not noise:
        assert np.allclose(fine[..., 18:].mean(-1), plain[..., 10]) and fine[..., 18:].std(-1).max() > 0.4
        upper_right = data.masks.reshape(50, 8, 4, 8, 4)[:, :, :2, :, 2:].mean((2, 4)).reshape(50, 64)
        assert np.allclose(fine[..., 19], upper_right)


# ---- names


@pytest.mark.parametrize("name", ["tiny", "tiny:oracle", "timm:oracle", "oracles", "oracl:noise=1"])
def test_other_teachers_are_no_oracle(name):
    assert oracle_of(name) is None


@pytest.mark.parametrize(
    ("name", "oracle", "digest"),
    [
        ("oracle", Oracle(), "oracle"),
        ("oracle:noise=0.5", Oracle(noise=0.5), "oracle:noise=0.5"),
        ("oracle:position=0.3, noise=5e-1", Oracle(0.5, 0.3), "oracle:noise=0.5,position=0.3"),
        ("oracle:detail=2", Oracle(detail=2), "oracle:detail=2"),
        ("oracle:detail=2.0,noise=1.0", Oracle(1, detail=2), "oracle:noise=1,detail=2"),
        ("oracle:noise=0,detail=0", Oracle(), "oracle"),
    ],
)
def test_dials_are_a_part_of_the_name(name, oracle, digest):
    assert oracle_of(name) == oracle and oracle_of(name).digest == digest
    assert oracle_of(digest) == oracle


@few
@given(*[st.floats(0, 1000)] * 2, st.integers(0, 8))
def test_the_digest_is_a_name_of_the_same_oracle(noise, position, detail):
    again = oracle_of(Oracle(noise, position, detail).digest)
    assert again.detail == detail and np.allclose([again.noise, again.position], [noise, position], rtol=1e-11)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        (
            "nois=0.5",
            r"dial of teacher 'oracle:nois=0.5' 'nois'. Did you mean 'noise'\? Valid: noise, position, detail",
        ),
        ("", "unknown dial.*Valid: noise, position, detail"),
        ("noise", "noise='' .*a number from 0 to 1000; such as noise=0.5"),
        ("noise=much", "noise='much' .*a number from 0 to 1000; such as noise=0.5"),
        ("noise=-0.5", "noise=-0.5 .*a number from 0 to 1000; the nearest is noise=0"),
        ("noise=1e5", "noise=100000 .*the nearest is noise=1000"),
        ("position=inf", "position=inf .*a number from 0 to 1000; such as position=0.5"),
        ("position=nan", "position=nan .*a number from 0 to 1000"),
        ("detail=1.7", "detail=1.7 .*a whole number from 0 to 1000; the nearest is detail=2"),
        ("detail=-3", "detail=-3 .*the nearest is detail=0"),
        ("detail=two", "detail='two' .*such as detail=2"),
        ("noise=1,noise=2", "sets noise twice"),
    ],
)
def test_dials_that_cannot_be_so_are_refused(dials, message):
    with pytest.raises(ValueError, match=message):
        oracle_of(f"oracle:{dials}")


def test_images_and_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'digits' has none.*shapes"):
        oracle_features(load_dataset("digits", n=10))
    one = load_dataset("shapes", n=1)
    with pytest.raises(ValueError, match="grid=5 .* 32 pixels"):
        oracle_features(one, grid=5)
    with pytest.raises(ValueError, match="detail=3 .* 4 pixels; the nearest that does is 2"):
        oracle_features(one, 8, Oracle(detail=3))


# ---- on a torus


def on_a_torus(n=300, **options):
    return load_dataset("shapes", n=n, placement="torus", **options)


def test_offsets_go_the_shortest_way_around():
    data = on_a_torus(50)
    offset = oracle_features(data)[..., 11:13].reshape(50, 8, 8, 2)
    assert np.abs(offset).max() <= 0.5 and np.abs(offset).max() > 0.45
    for axis, name in ((0, "x"), (1, "y")):
        centre = data.attributes[name][:, None]
        place = (np.arange(8) + 0.5) / 8
        ways = (
            centre[..., None] + np.array([-1, 0, 1]) - place[:, None]
        )  # through the left or upper border, within, through the other
        nearest = np.take_along_axis(ways, np.abs(ways).argmin(-1)[..., None], -1)[..., 0]  # (n, 8)
        found = offset[..., axis] if axis == 0 else offset[..., axis].swapaxes(1, 2)
        assert np.allclose(found, nearest[:, None], atol=1e-6)


def test_edges_are_not_at_the_border():
    data = on_a_torus(100)
    edges = mask_edges(data.masks, wrapped=True)
    for shift in ((5, 0), (0, -7), (11, 3)):
        rolled = np.roll(data.masks, shift, (1, 2))
        assert np.array_equal(mask_edges(rolled, wrapped=True), np.roll(edges, shift, (1, 2)))
    cut = data.masks[:, 0].any(-1) & data.masks[:, -1].any(-1)  # objects that the upper border cuts
    assert cut.sum() > 10 and (mask_edges(data.masks).sum((1, 2)) > edges.sum((1, 2)))[cut].mean() > 0.9
    seen = oracle_features(data)[..., 13]
    assert np.allclose(seen, token_means(edges, 8))


def test_every_token_sees_the_same_on_average():
    """Under the uniform law the mean features of a token tell where it is; on a torus they differ by luck alone."""
    spread = {}
    for law in ("uniform", "torus"):
        features = oracle_features(load_dataset("shapes", 16, n=3000, placement=law), 4)[..., 10:14]
        deviation = features.std((0, 1)) / np.sqrt(3000)
        spread[law] = np.abs(features.mean(0) - features.mean((0, 1))).max(0) / deviation  # in standard errors
    assert (spread["torus"] < 4.5).all() and (spread["uniform"] > 20).all()


def test_images_moved_by_a_token_move_the_features():
    """A token's features depend on what it shows, not on where it is."""
    data = on_a_torus(40)
    features = oracle_features(data, oracle=Oracle(detail=2)).reshape(40, 8, 8, 22)
    moved = data.subset(np.arange(40))
    moved.masks[:], moved.pixels[:] = np.roll(moved.masks, 4, 2), np.roll(moved.pixels, 4, 2)
    moved.attributes["x"][:] = (moved.attributes["x"] + 4 / 32) % 1
    there = oracle_features(moved, oracle=Oracle(detail=2)).reshape(40, 8, 8, 22)
    assert np.allclose(there, np.roll(features, 1, 2), atol=1e-6)
