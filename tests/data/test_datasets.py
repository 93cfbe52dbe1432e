"""Data sets: what the generator promises, what real folders hold, and what is refused."""

import io
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation
from shared.clone import ROOT

from maskalign_lab.data import shapes
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.image_files import read_image
from maskalign_lab.data.image_folder import stratified_order, stratified_places

CARDS = ROOT / "data"
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
splits = st.sampled_from(["train", "validation"])


# shapes


@few
@given(seeds, splits, st.integers(1, 240), st.integers(1, 520))
def test_a_prefix_does_not_depend_on_how_many_follow(seed, split, n, more):
    short, long = (shapes.render(k, 8, seed, split) for k in (n, n + more))
    for name in short:
        assert np.array_equal(short[name], long[name][:n]), name


@few
@given(seeds, st.integers(10, 300), splits)
def test_prefixes_are_balanced_and_values_are_in_range(seed, n, split):
    data = load_dataset("shapes", 8, split, n, seed)
    counts = np.bincount(data.labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert data.pixels.dtype == np.uint8 and data.labels.dtype == np.int64
    assert set(np.unique(data.masks)) <= {0, 1}
    x, y, radius = (data.attributes[name] for name in ("x", "y", "scale"))
    assert (np.minimum(x, y) >= radius - 1e-9).all() and (np.maximum(x, y) <= 1 - radius + 1e-9).all()


@few
@given(seeds)
def test_splits_and_seeds_share_no_picture(seed):
    keys = [(seed, "train"), (seed, "validation"), (seed + 1, "train"), (seed + 1, "validation")]
    pictures = np.concatenate([shapes.render(100, 16, *key)["pixels"] for key in keys]).reshape(400, -1)
    assert len(np.unique(pictures, axis=0)) == 400


@few
@given(seeds, st.sampled_from(["left", "centre"]))
def test_placement_moves_the_object_and_nothing_else(seed, law):
    there, here = (shapes.render(30, 32, seed, "train", placement) for placement in (law, "uniform"))
    for name in set(there) - {"pixels", "masks", "x", "y"}:
        assert np.array_equal(there[name], here[name]), name
    near = binary_dilation(there["masks"] | here["masks"], np.ones((1, 3, 3)), iterations=3)  # antialiased tips
    assert np.array_equal(there["pixels"][~near], here["pixels"][~near])
    if law == "centre":
        assert np.allclose(there["x"], 0.5) and np.allclose(there["y"], 0.5)
    else:
        assert (there["x"] <= here["x"]).all()


def test_the_same_scene_at_every_size():
    small, large = shapes.render(50, 32), shapes.render(50, 128)
    reduced = large["pixels"].reshape(50, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(reduced - small["pixels"]).mean() < 2
    assert np.allclose(small["masks"].mean((1, 2)), large["masks"].mean((1, 2)), atol=0.02)


def test_masks_follow_the_attributes():
    data = load_dataset("shapes", 64, n=200)
    symmetric = np.isin(data.labels, [data.classes.index(name) for name in ("disc", "square", "ring", "cross", "bars")])
    y, x = (np.mgrid[:64, :64] + 0.5) / 64
    area = data.masks.sum((1, 2))
    for axis, name in ((x, "x"), (y, "y")):
        centre = (data.masks * axis).sum((1, 2)) / area
        assert np.abs(centre - data.attributes[name])[symmetric].max() < 0.01


def test_objects_can_be_seen():
    data = load_dataset("shapes", n=2000)
    grey, mask = data.pixels.astype(float).mean(-1), data.masks
    inside = (grey * mask).sum((1, 2)) / mask.sum((1, 2))
    outside = (grey * (1 - mask)).sum((1, 2)) / (1 - mask).sum((1, 2))
    assert np.abs(inside - outside).min() > 20
    assert mask.mean((1, 2)).min() > 0.03
    assert 0.4 < (inside > outside).mean() < 0.6


@pytest.fixture(scope="module")
def standard():
    """Both splits of the standard data set."""
    return [load_dataset("shapes", split=split) for split in ("train", "validation")]


def test_colour_does_not_tell_the_class(standard):
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    train, held = standard
    means = [data.pixels.mean((1, 2)) / 255 for data in (train, held)]
    assert LogisticRegression(max_iter=500).fit(means[0], train.labels).score(means[1], held.labels) < 0.13
    raw = [data.pixels[:, ::2, ::2].reshape(len(data), -1) / 255 for data in (train, held)]
    assert RidgeClassifier(100.0).fit(raw[0], train.labels).score(raw[1], held.labels) < 0.25


@pytest.mark.parametrize("placement", ["upside", {"z": (0, 1)}, {"x": (0.7, 0.2)}, {"x": (0, 2)}])
def test_placement_is_checked(placement):
    with pytest.raises(ValueError, match="placement"):
        load_dataset("shapes", n=1, placement=placement)


# the data set itself


def test_images_are_floats_in_range_and_equal_the_bytes():
    data = load_dataset("shapes", n=20)
    pictures = data.images()
    assert pictures.shape == (20, 3, 32, 32) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    assert torch.equal(data.images(np.array([3, 1])), pictures[[3, 1]])
    back = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(back.numpy(), data.pixels)


def test_images_do_not_share_memory_with_the_bytes():
    data = load_dataset("shapes", n=2)
    before = data.digest
    data.images().zero_()
    assert load_dataset("shapes", n=2).digest == before


def test_digest_names_pixels_and_labels():
    data = load_dataset("shapes", 16, n=50)
    assert data.digest == load_dataset("shapes", 16, n=50).digest and re.fullmatch("[0-9a-f]{16}", data.digest)
    shorter, seeded = load_dataset("shapes", 16, n=49), load_dataset("shapes", 16, n=50, seed=1)
    relabelled = replace(data, labels=data.labels[::-1].copy())
    assert len({data.digest, shorter.digest, seeded.digest, relabelled.digest}) == 4


def test_cards_state_the_digests(standard):
    others = (load_dataset(name, split=split) for name in ("digits", "photos") for split in ("train", "validation"))
    for data in (*standard, *others):
        assert f"{data.split} `{data.digest}`" in (CARDS / data.name / "card.md").read_text()


# digits


def test_digits_split():
    from sklearn.datasets import load_digits

    train, held = load_dataset("digits"), load_dataset("digits", split="validation")
    assert (len(train), len(held)) == (1500, 297) and set(np.bincount(held.labels)) <= {29, 30, 31}
    assert (train.pixels[..., 0] == train.pixels[..., 1]).all() and train.pixels.max() == 255
    both = np.concatenate([load_dataset("digits", 8, split).pixels[..., 0] for split in ("train", "validation")])
    expected = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))


@few
@given(st.integers(1, 297), splits)
def test_digits_prefixes(n, split):
    data = load_dataset("digits", 8, split, n)
    assert np.array_equal(data.pixels, load_dataset("digits", 8, split).pixels[:n])
    counts = np.bincount(data.labels, minlength=10)
    assert np.abs(counts - n / 10).max() <= 2


# folders


def write_classes(root, count=12):
    """Two classes of coloured pictures, each file of another shape."""
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (20 + 3 * k, 33), colour).save(root / name / f"{k:02}.jpg", quality=95)


def write_oddities(directory):
    """Every kind of picture that is not a plain RGB JPEG, all red, and the files that are no pictures."""
    red, alpha = Image.new("RGB", (40, 30), (255, 0, 0)), Image.new("L", (40, 30), 255)
    red.quantize(4).save(directory / "palette.png")
    red.quantize(4).save(directory / "palette.gif")
    Image.merge("RGBA", (*red.split(), alpha)).save(directory / "alpha.png")
    Image.merge("RGBA", (*red.split(), alpha)).save(directory / "alpha.webp", lossless=True)
    red.resize((1, 57)).save(directory / "column.bmp")
    red.resize((2001, 700)).save(directory / "LARGE.JPG")
    (directory / "notes.txt").write_text("not a picture")
    (directory / ".hidden.png").write_bytes(b"")
    whole = (directory / "LARGE.JPG").read_bytes()
    (directory / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (directory / "empty.png").write_bytes(b"")


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "data")
    return tmp_path / "data"


def test_folder_is_whole_disjoint_and_balanced(folder):
    train, held = load_dataset(f"folder:{folder}"), load_dataset(f"folder:{folder}", split="validation")
    assert train.classes == ("blue", "red") and train.skipped == ()
    assert np.bincount(train.labels).tolist() == [11, 11] and np.bincount(held.labels).tolist() == [1, 1]
    for data in (train, held):
        assert (data.pixels.mean((1, 2)).argmax(-1) == np.where(data.labels == 0, 2, 0)).all()
    assert np.bincount(load_dataset(f"folder:{folder}", n=8).labels).tolist() == [4, 4]
    assert load_dataset(f"folder:{folder}", n=8).pixels.tobytes() == train.pixels[:8].tobytes()


def test_odd_files_are_read_and_broken_ones_named(folder):
    write_oddities(folder / "red")
    with pytest.warns(UserWarning, match=r"skipped \d of") as caught:
        parts = [load_dataset(f"folder:{folder}", 16, split) for split in ("train", "validation")]
    assert len(caught) == 2 and Path(caught[0].filename) == Path(__file__)
    assert sum(map(len, parts)) == 24 + 6
    for data in parts:
        reds = data.pixels[data.labels == 1].reshape(-1, 3)
        assert (reds[:, 0] > 245).all() and (reds[:, 1:] < 15).all()
    skipped = {Path(line.split(" (")[0]).name for data in parts for line in data.skipped}
    assert skipped == {"notes.txt", "truncated.jpg", "empty.png"}


def test_grey_deep_transparent_and_turned_pictures(tmp_path):
    grey = np.full((20, 20), 128, np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(grey).save(tmp_path / name / "1.jpg")
        Image.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / name / "2.png")
        Image.fromarray(grey).convert("CMYK").save(tmp_path / name / "3.jpg")
        Image.fromarray(grey).convert("1").save(tmp_path / name / "4.png")
    data = load_dataset(f"folder:{tmp_path}", 8)
    assert len(data) == 6 and np.abs(data.pixels.mean((1, 2, 3)) - 128).max() < 4
    turned = Image.new("RGB", (20, 20))
    turned.paste("white", (0, 0, 10, 20))  # the left half, which is the top one once turned
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    for name in ("c", "d"):
        (tmp_path / "new" / name).mkdir(parents=True)
        turned.save(tmp_path / "new" / name / "turned.png", exif=exif)
        clear.save(tmp_path / "new" / name / "clear.png")
    parts = [load_dataset(f"folder:{tmp_path / 'new'}", 8, split).pixels for split in ("train", "validation")]
    kinds = {tuple((picture[[0, -1], [4, 4], 0] > 127).tolist()) for picture in np.concatenate(parts)}
    assert kinds == {(True, False), (True, True)}


def test_given_splits_are_used(tmp_path):
    write_classes(tmp_path / "train", 5)
    write_classes(tmp_path / "test", 3)
    assert len(load_dataset(f"folder:{tmp_path}")) == 10
    assert len(load_dataset(f"folder:{tmp_path}", split="validation")) == 6
    (tmp_path / "test" / "green").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "green" / "1.png")
    with pytest.raises(ValueError, match="unknown class .*'green'"):
        load_dataset(f"folder:{tmp_path}", split="validation")


def test_hold_out_does_not_depend_on_where_the_folder_lies(tmp_path):
    for place in ("here", "there"):
        write_classes(tmp_path / place, 15)
    here, there = (load_dataset(f"folder:{tmp_path / place}", split="validation") for place in ("here", "there"))
    assert here.digest == there.digest


@few
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_hold_out_is_a_tenth_of_each_class(counts, random):
    names = np.array([f"c{k}/{i}.png".encode() for k, count in enumerate(counts) for i in range(count)])
    labels, shuffled = np.repeat(np.arange(len(counts)), counts), random.sample(range(len(names)), len(names))
    (rows, held_out), (again, held_again) = (stratified_order(names[o], labels[o]) for o in (slice(None), shuffled))
    assert set(names[rows][held_out]) == set(names[shuffled][again][held_again])
    labels = labels[rows]
    for k, count in enumerate(counts):
        held = int(held_out[labels == k].sum())
        assert held == 0 if count == 1 else 1 <= held <= max(1, count / 10 + 1)


@few
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), seeds)
def test_every_prefix_is_stratified(labels, seed):
    labels = np.array(labels)
    order = np.argsort(stratified_places(labels, np.random.default_rng(seed).permutation(len(labels))), kind="stable")
    shares = np.bincount(labels, minlength=5) / len(labels)
    for n in range(1, len(labels) + 1):
        assert np.abs(np.bincount(labels[order[:n]], minlength=5) - n * shares).max() <= 5 / 2


# what is refused


def test_refused_names():
    with pytest.raises(ValueError, match=r"'shpaes'.*'shapes'.*shapes, digits, photos, folder:PATH"):
        load_dataset("shpaes")
    with pytest.raises(ValueError, match="'validaton'.*'validation'"):
        load_dataset("shapes", split="validaton")
    with pytest.raises(ValueError, match="'placment'.*'placement'"):
        load_dataset("shapes", placment="left")
    with pytest.raises(ValueError, match="option of dataset 'digits'"):
        load_dataset("digits", placement="left")
    with pytest.raises(ValueError, match="folder:PATH"):
        load_dataset("folder:")
    with pytest.raises(ValueError, match="n=0"):
        load_dataset("digits", n=0)


def test_refused_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dta.*Did you mean .*data"):
        load_dataset(f"folder:{tmp_path / 'dta'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        load_dataset(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="12 loose images and no directory"):
        load_dataset(f"folder:{folder / 'red'}")
    with pytest.raises(ValueError, match="only one class, 'data'"):
        load_dataset(f"folder:{tmp_path}")


def test_a_class_of_broken_files_only(folder):
    for path in (folder / "red").iterdir():
        path.write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="11 readable images"):
            load_dataset(f"folder:{folder}")


def test_an_empty_class_directory_is_named(folder):
    (folder / "green").mkdir()
    with pytest.warns(UserWarning, match="green"):
        assert load_dataset(f"folder:{folder}").classes == ("blue", "red")


# ---- folders as people bring them


def classes_in(root, *names, count=4):
    """Folders of one-coloured images, a class each."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 9), (40 * k, 20 * i, 90)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("train", "held_out", "chosen"),
    [
        ("train", ["valid"], "valid"),
        ("Train", ["Dev"], "Dev"),
        ("TRAINING", ["VAL", "test"], "VAL"),
        ("train", ["test", "valid"], "valid"),
        ("train", ["Testing"], "Testing"),
    ],
)
def test_split_folders_are_splits_and_no_classes(train, held_out, chosen, tmp_path):
    classes_in(tmp_path / train, "a", "b", count=6)
    for k, name in enumerate(held_out):
        classes_in(tmp_path / name, "a", "b", count=2 + k)
    train_set, held = (load_dataset(f"folder:{tmp_path}", 8, split) for split in ("train", "validation"))
    assert train_set.classes == held.classes == ("a", "b")
    assert (len(train_set), len(held)) == (12, 2 * (2 + held_out.index(chosen)))


def test_train_alone_is_the_folder_and_a_class_called_train_is_a_class(tmp_path):
    classes_in(tmp_path / "split" / "train", "a", "b", count=20)
    assert load_dataset(f"folder:{tmp_path / 'split'}", 8).classes == ("a", "b")
    classes_in(tmp_path / "vehicles", "bus", "train")
    assert load_dataset(f"folder:{tmp_path / 'vehicles'}", 8).classes == ("bus", "train")


def test_two_folders_for_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        classes_in(tmp_path / name, "a", "b")
    with pytest.raises(ValueError, match="'val' and 'valid': expected one of them"):
        load_dataset(f"folder:{tmp_path}", 8)


def test_previews_and_hidden_folders_are_not_trained_on_and_links_are_followed(tmp_path):
    root = classes_in(tmp_path / "data", "a", "b", count=10)
    classes_in(tmp_path / "elsewhere", "more", count=5)
    for junk in ("@eaDir", ".thumbnails", "__MACOSX"):
        classes_in(root / "a", junk, count=7)
    (root / "b" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "b" / "linked" / "loop").symlink_to(root / "b")  # must not be walked for ever
    parts = [load_dataset(f"folder:{root}", 8, split) for split in ("train", "validation")]
    assert np.bincount(np.concatenate([part.labels for part in parts])).tolist() == [10, 15]
    assert not any(part.skipped for part in parts)


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.full((9, 9), 0x8000, np.int32), 128),
        (np.full((9, 9), 200, np.int32), 200),
        (np.full((9, 9), 0.5, np.float32), 128),
        (np.full((9, 9), 77.0, np.float32), 77),
    ],
)
def test_wide_tiffs_keep_their_grey(values, grey, tmp_path):
    Image.fromarray(values).save(tmp_path / "wide.tiff")
    assert (read_image(tmp_path / "wide.tiff", 8) == grey).all()


def test_a_range_that_cannot_be_told_is_named(tmp_path):
    Image.fromarray(np.array([[-3.0, 5000.0]], np.float32)).save(tmp_path / "odd.tiff")
    assert "grey values from -3 to 5000: expected" in read_image(tmp_path / "odd.tiff", 8)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "pnm"])
def test_what_pillow_reads_is_an_image(suffix, tmp_path):
    formats = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "pnm": "PPM"}
    try:
        Image.new("RGB", (9, 9), "red").save(io.BytesIO(), formats[suffix])
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {suffix}")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", (9, 9), "red").save(tmp_path / name / f"{k}.{suffix}", formats[suffix])
    parts = [load_dataset(f"folder:{tmp_path}", 8, split) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 4 and not any(part.skipped for part in parts)
