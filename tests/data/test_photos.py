"""Photographs: regions that share no pixel, streams that can be relied on, a control that keeps texture only."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared.clone import ROOT

from maskalign_lab.data import photos
from maskalign_lab.data.datasets import load_dataset

SHIPPED = ROOT / "data" / "photos"
few = settings(max_examples=6, deadline=None)
seeds = st.integers(0, 2**31)
splits = st.sampled_from(["train", "validation"])


def rectangles(size: int, seed: int, split: str, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and (x, y, side) of the first crops, as `cut` draws them, without cutting."""
    bounds = np.array([photos.region(photos.read_photograph(name).size, split) for name in photos.CLASSES])
    labels = [photos.draw_labels(seed, split, block) for block in range(blocks)]
    crops = [photos.draw_crops(size, seed, split, block, bounds[labels[block]]) for block in range(blocks)]
    return np.concatenate(labels), np.concatenate(
        [np.stack([crop[k] for k in ("x", "y", "side")], 1) for crop in crops]
    )


# the hold-out


@pytest.mark.parametrize("size", [16, 32, 64, 128, 192])
def test_no_pixel_is_shared_by_any_two_crops_of_the_two_splits(size):
    """Every pair of rectangles, of two different seeds, 12,000 and 2,000 of each."""
    for train_seed, held_seed in ((0, 0), (1, 7)):
        labels, crops = rectangles(size, train_seed, "train", 48)
        held_labels, held = rectangles(size, held_seed, "validation", 8)
        for label in range(len(photos.CLASSES)):
            (x, y, side), (u, v, width) = crops[labels == label].T[..., None], held[held_labels == label].T[:, None]
            assert not ((x < u + width) & (u < x + side) & (y < v + width) & (v < y + side)).any()


@few
@given(seeds, st.sampled_from([16, 128, 192]))
def test_crops_lie_inside_their_photograph_and_are_never_enlarged(seed, size):
    for split in ("train", "validation"):
        labels, crops = rectangles(size, seed, split, 2)
        sizes = np.array([photos.read_photograph(name).size for name in photos.CLASSES])[labels]
        assert (crops[:, :2] >= 0).all() and (crops[:, :2] + crops[:, 2:] <= sizes).all()
        assert crops[:, 2].min() >= max(size, 64) and crops[:, 2].max() <= 192


def test_a_crop_does_not_depend_on_pixels_beyond_it(monkeypatch):
    """The same validation crops, with everything that trains painted green."""
    before = photos.cut(252, 16, split="validation")
    read = photos.read_photograph

    def painted(name: str) -> Image.Image:
        picture = read(name).copy()
        picture.paste((0, 255, 0), photos.region(picture.size, "train"))
        return picture

    monkeypatch.setattr(photos, "read_photograph", painted)
    after = photos.cut(252, 16, split="validation")
    assert np.array_equal(before["pixels"], after["pixels"])
    assert not np.array_equal(photos.cut(9, 16)["pixels"], before["pixels"][:9])


def test_pixels_are_those_of_the_rectangles():
    """At the largest size nothing is resampled: the crop is the photograph's own bytes."""
    data = load_dataset("photos", photos.LARGEST, "validation", 18)
    for picture, label, x, y, side in zip(data.pixels, data.labels, *data.attributes.values()):
        photograph = np.asarray(photos.read_photograph(data.classes[label]))
        assert np.array_equal(picture, photograph[y : y + side, x : x + side])
    small = load_dataset("photos", 32, "train", 18)
    for picture, label, x, y, side in zip(small.pixels, small.labels, *small.attributes.values()):
        photograph = np.asarray(photos.read_photograph(small.classes[label]))[y : y + side, x : x + side]
        assert np.abs(picture.mean((0, 1)) - photograph.mean((0, 1))).max() < 3


# the stream


@few
@given(seeds, splits, st.integers(1, 200), st.integers(1, 200), st.sampled_from(photos.PHASES))
def test_a_prefix_does_not_depend_on_how_many_follow(seed, split, n, more, phase):
    short, long = (photos.cut(k, 8, seed, split, phase) for k in (n, n + more))
    assert all(np.array_equal(short[name], long[name][:n]) for name in short)
    counts = np.bincount(short["labels"], minlength=len(photos.CLASSES))
    assert counts.max() - counts.min() <= 1


@few
@given(seeds)
def test_seeds_and_splits_give_other_crops(seed):
    keys = [(seed, "train"), (seed, "validation"), (seed + 1, "train"), (seed + 1, "validation")]
    pictures = np.concatenate([photos.cut(50, 16, *key)["pixels"] for key in keys]).reshape(200, -1)
    assert len(np.unique(pictures, axis=0)) == 200


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_size_of_the_studies(size):
    data = load_dataset("photos", size, "validation", 18, 3)
    assert data.pixels.shape == (18, size, size, 3) and data.pixels.dtype == np.uint8
    assert data.labels.dtype == np.int64 and (np.bincount(data.labels) == 2).all()
    assert data.masks is None and set(data.attributes) == {"x", "y", "side"}
    assert data.digest == load_dataset("photos", size, "validation", 18, 3).digest


def test_the_same_scene_up_to_64_pixels():
    small, large = load_dataset("photos", 32, n=90), load_dataset("photos", 64, n=90)
    assert all(np.array_equal(small.attributes[name], large.attributes[name]) for name in small.attributes)
    reduced = large.pixels.reshape(90, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(reduced - small.pixels).mean() < 6


def test_sides_are_even_on_a_log_scale():
    _, crops = rectangles(32, 0, "train", 40)
    below = [(np.log(crops[:, 2] + 0.5) < np.log(64) + share * np.log(193 / 64)).mean() for share in (0.25, 0.5, 0.75)]
    assert np.allclose(below, [0.25, 0.5, 0.75], atol=0.03)


# the control


@pytest.fixture(scope="module")
def both():
    """The same crops, natural and scrambled, as floats."""
    sets = [load_dataset("photos", n=360, phase=phase) for phase in photos.PHASES]
    assert all(np.array_equal(sets[0].attributes[name], sets[1].attributes[name]) for name in sets[0].attributes)
    assert np.array_equal(sets[0].labels, sets[1].labels)
    return [data.pixels.astype(float) for data in sets]


def test_the_control_keeps_spectrum_and_colour(both):
    means = [values.mean((1, 2)) for values in both]
    assert np.abs(means[0] - means[1]).mean() < 1
    spectra = [np.abs(np.fft.fft2(values - values.mean((1, 2), keepdims=True), axes=(1, 2))) for values in both]
    off = np.sqrt(((spectra[0] - spectra[1]) ** 2).sum((1, 2, 3)) / (spectra[0] ** 2).sum((1, 2, 3)))
    assert off.mean() < 0.05 and np.quantile(off, 0.95) < 0.15
    spread = [np.stack([np.cov(picture.reshape(-1, 3).T) for picture in values]) for values in both]
    apart = np.linalg.norm(spread[0] - spread[1], axis=(1, 2)) / np.linalg.norm(spread[0], axis=(1, 2))
    assert np.median(apart) < 0.05, "the covariance of the three channels"


def test_the_control_destroys_structure(both):
    centred = [(values - values.mean((1, 2), keepdims=True)).reshape(360, -1) for values in both]
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(*centred)]
    assert abs(np.mean(alike)) < 0.05
    steps = [np.diff(values.mean(-1), axis=2).reshape(360, -1) for values in both]
    peaked = [np.median((step**4).mean(1) / (step**2).mean(1) ** 2) for step in steps]
    assert peaked[0] > 1.2 * peaked[1], "edges make a few steps large; scrambled steps are nearly Gaussian (3)"
    assert abs(peaked[1] - 3) < 0.5


@few
@given(st.integers(4, 20), st.integers(0, 99))
def test_adding_a_phase_is_exact_before_bytes(size, seed):
    random = np.random.default_rng(seed)
    picture, noise = random.integers(0, 256, (2, size, size, 3)), random.standard_normal((2, size, size))
    turned = photos.add_phase(picture, noise)
    cross = [np.fft.fft2(values, axes=(1, 2)) for values in (picture, turned)]
    assert np.allclose(np.abs(cross[0]), np.abs(cross[1]))
    between = [spectrum[..., 0] * spectrum[..., 1].conj() for spectrum in cross]
    assert np.allclose(*between), "phases between channels, hence colours"
    assert np.allclose(picture.mean((1, 2)), turned.mean((1, 2)))


# what ships


def test_what_ships_is_small_and_named_on_the_card():
    files = {path.name for path in SHIPPED.iterdir()}
    assert files == {"card.md", *(f"{name}.png" for name in photos.CLASSES)}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 3_000_000
    card = (SHIPPED / "card.md").read_text()
    for name, digest in photos.PHOTOGRAPHS.items():
        (line,) = (line for line in card.splitlines() if line.startswith(f"| `{name}`"))
        assert digest in line and re.search("CC0|public domain", line)


def test_the_command_on_the_card_makes_the_same_photographs(tmp_path):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    assert photos.REMAKE in (SHIPPED / "card.md").read_text()
    code = photos.REMAKE.split('"')[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    for name in photos.CLASSES:
        again, shipped = (photos.read_photograph(name, root / "data" / "photos") for root in (tmp_path, ROOT))
        assert again.tobytes() == shipped.tobytes() and max(again.size) <= photos.LONGER_SIDE


def test_scikit_image_is_not_imported_for_crops():
    code = "import sys; from maskalign_lab.data import photos; photos.cut(9); print('skimage' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# what is refused


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="'scramble'.*Did you mean 'scrambled'"):
        load_dataset("photos", n=1, phase="scramble")
    with pytest.raises(ValueError, match="option of dataset 'photos' 'phse'.*'phase'"):
        load_dataset("photos", n=1, phse="natural")
    with pytest.raises(ValueError, match="option of dataset 'photos' 'placement'.*phase"):
        load_dataset("photos", n=1, placement="left")
    with pytest.raises(ValueError, match="size=256.*8 to 192"):
        load_dataset("photos", 256, n=1)
    with pytest.raises(ValueError, match="'test'.*train, validation"):
        photos.cut(1, split="test")
    with pytest.raises(ValueError, match="photograph 'chelsae'.*'chelsea'"):
        photos.read_photograph("chelsae")
    with pytest.raises(FileNotFoundError, match="brick.png.*store_photographs"):
        photos.read_photograph("brick", tmp_path)
    Image.new("RGB", (512, 512)).save(tmp_path / "brick.png")
    with pytest.raises(ValueError, match=f"brick.png has digest .* expected {photos.PHOTOGRAPHS['brick']}"):
        photos.read_photograph("brick", tmp_path)
