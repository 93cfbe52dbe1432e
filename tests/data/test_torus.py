"""Shapes on a torus: no place is like a border, and all other placement laws are what they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from maskalign_lab.data import shapes, textures
from maskalign_lab.data.datasets import load_dataset

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31)
SIZE = 32


@pytest.fixture(scope="module")
def many():
    """3,000 images on a torus."""
    return load_dataset("shapes", 16, n=3000, seed=7, placement="torus")


# ---- what moves


def moved_lots(monkeypatch, shift, size):
    """From now on all places are drawn so many pixels further down and to the right."""
    lots = shapes.lots

    def moved(seed, split, block, name, *shape):
        down, right = np.array(shift) / size
        by = {"x": right, "y": down, "origin": np.array([right, down])}.get(name, 0)
        return (lots(seed, split, block, name, *shape) + by) % 1

    monkeypatch.setattr(shapes, "lots", moved)


@pytest.mark.parametrize("shift", [(0, 1), (16, 16), (-7, 3)])
@pytest.mark.parametrize("size", [16, SIZE, 40])
def test_a_whole_image_rolls_with_its_places(shift, size, monkeypatch):
    """Object, texture and specks, to the bit: so no pixel knows where the border is."""
    here = shapes.render(120, size, 3, placement="torus")
    moved_lots(monkeypatch, shift, size)
    there = shapes.render(120, size, 3, placement="torus")
    for name in ("pixels", "masks"):
        assert np.array_equal(there[name], np.roll(here[name], shift, (1, 2))), name
    for name in set(here) - {"pixels", "masks", "x", "y"}:
        assert np.array_equal(there[name], here[name]), name


@few
@given(seeds, st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), st.integers(0, 9))
def test_an_objects_coverage_rolls_with_its_centre(seed, down, right, label):
    random = np.random.default_rng(seed)
    pose = {"x": random.random(9), "y": random.random(9), "scale": 0.27 + 0.1 * random.random(9)}
    pose["rotation"] = 0.2 * random.random(9)
    moved = pose | {"x": (pose["x"] + right / SIZE) % 1, "y": (pose["y"] + down / SIZE) % 1}
    here, there = (shapes.object_coverage(label, each, SIZE, wrapped=True) for each in (pose, moved))
    assert np.array_equal(there, np.roll(here, (down, right), (1, 2)))
    middle = pose | {
        "x": np.full(9, 0.5),
        "y": np.full(9, 0.5),
    }  # where the border is far away, a torus is as good as a plane
    assert np.array_equal(*(shapes.object_coverage(label, middle, SIZE, wrapped) for wrapped in (False, True)))


@few
@given(seeds, st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), st.sampled_from(range(5)))
def test_a_ground_rolls_with_its_origin(seed, down, right, kind):
    random = np.random.default_rng(seed)
    lot, origin, knots = random.random((9, 4)), random.random((9, 2)), random.random((9, 11, 11))
    grids = {"cloud": knots[:, :7, :7], "grain": knots}
    moved = (origin + np.array([right, down]) / SIZE) % 1
    here, there = (textures.texture_field(np.full(9, kind), lot, grids, SIZE, place) for place in (origin, moved))
    np.testing.assert_allclose(there, np.roll(here, (down, right), (1, 2)), atol=1e-12)
    assert here.min() >= 0 and here.max() <= 1 and here.std((1, 2)).min() > 0.02


@pytest.mark.parametrize("kind", range(5), ids=textures.TEXTURES)
def test_a_texture_has_no_seam(kind):
    """The steps across the border are no larger than those within; those of a bounded texture are."""
    random = np.random.default_rng(kind)
    lot, origin, knots = random.random((400, 4)), random.random((400, 2)), random.random((400, 11, 11))
    grids, seams = {"cloud": knots[:, :7, :7], "grain": knots}, []
    for place in (None, origin):
        field = textures.texture_field(np.full(400, kind), lot, grids, SIZE, place)
        steps = np.abs(field - np.roll(field, 1, 2)).mean((0, 1))  # (SIZE,), the first is across the border
        seams.append(steps[0] / steps[1:].mean())
    assert seams[0] > 1.5 and 0.9 < seams[1] < 1.1


# ---- no place is special


def test_coverage_is_uniform(many):
    """Each of 256 shares is within 4.5 standard errors of the mean, which chance exceeds once in 500 such tests."""
    share, mean = many.masks.mean(0), many.masks.mean()
    error = np.sqrt(mean * (1 - mean) / len(many))
    assert np.abs(share - mean).max() < 4.5 * error < 0.04
    bounded = load_dataset("shapes", 16, n=3000, seed=7).masks.mean(0)
    assert np.ptp(bounded) > 0.3


def test_centres_are_uniform_and_independent(many):
    x, y = (many.attributes[name] for name in ("x", "y"))
    for values in (x, y, (x + y) % 1):
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    for name in ("scale", "rotation", "lightness", "hue"):
        assert np.abs(np.corrcoef([x, y, many.attributes[name]])[:2, 2]).max() < 0.07
    assert stats.chi2_contingency(np.histogram2d(many.labels, x, (10, 4))[0]).pvalue > 1e-3


def test_pixels_have_the_same_statistics_everywhere(many):
    """Mean, deviation and the step to the neighbour of every pixel, in standard errors over images."""
    grey = many.pixels.mean(-1)
    deviation = np.abs(grey - grey.mean((1, 2), keepdims=True))
    steps = [np.abs(grey - np.roll(grey, 1, axis)) for axis in (1, 2)]
    for values in (grey, deviation, *steps):
        errors = (values.mean(0) - values.mean()) / (values.std(0) / np.sqrt(len(many)))
        assert np.abs(errors).max() < 5


# ---- masks and attributes


def test_masks_follow_the_attributes_around():
    data = load_dataset("shapes", 64, n=200, placement="torus")
    symmetric = np.isin(data.labels, [data.classes.index(name) for name in ("disc", "square", "ring", "cross", "bars")])
    turn = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)  # on a circle the mean is that of directions
    for axis, name in ((1, "x"), (2, "y")):
        mean = np.angle((data.masks.mean(axis) * turn).mean(-1)) / (2 * np.pi)
        assert np.abs(textures.around(mean - data.attributes[name]))[symmetric].max() < 0.01
        assert data.attributes[name].min() < 0.1 and data.attributes[name].max() > 0.9


def test_objects_are_whole():
    """As many pixels as the same objects have in the middle of an image, whatever the border does to them."""
    torus, centre = (shapes.render(250, 64, placement=law)["masks"].sum((1, 2)) for law in ("torus", "centre"))
    assert np.abs(torus / centre - 1).max() < 0.1 and abs(torus.sum() / centre.sum() - 1) < 2e-3


def test_only_place_and_ground_differ_from_other_laws():
    torus, plane = (shapes.render(60, placement=law) for law in ("torus", "uniform"))
    assert set(torus) == set(plane)
    for name in set(plane) - {"pixels", "masks", "x", "y"}:
        assert np.array_equal(torus[name], plane[name]), name


def test_a_data_set_says_whether_it_wraps():
    torus = load_dataset("shapes", n=3, placement="torus")
    assert torus.wraps and torus.subset(np.arange(2)).wraps and not load_dataset("shapes", n=3).wraps
    assert load_dataset("shapes", 64, n=3, detail=32, placement="torus").wraps
    assert torus.digest != load_dataset("shapes", n=3).digest


def test_the_same_scene_at_every_size():
    small, large = (shapes.render(50, size, placement="torus") for size in (32, 128))
    reduced = large["pixels"].reshape(50, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(reduced - small["pixels"]).mean() < 2


@pytest.mark.parametrize(
    ("placement", "digest"),
    [
        ("uniform", "2b580d527212e63e"),
        ("middle", "c9324bd2a4a5cf99"),
        ("centre", "09385929249fb702"),
        ("left", "189db68f019d5faa"),
        ({"x": (0.2, 0.5)}, "54268531cf302402"),
    ],
    ids=str,
)
def test_other_laws_are_what_they_were(placement, digest):
    assert load_dataset("shapes", n=300, seed=3, placement=placement).digest == digest
