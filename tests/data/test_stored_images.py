"""Images in files: listed and not loaded, named by their listing, cut like the papers', and read alike from disk and memory."""

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from maskalign_lab.data import image_folder, stored_images
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.image_files import adm_crop, read_image
from maskalign_lab.data.image_folder import list_folder
from maskalign_lab.data.listing import known_unreadable, note_unreadable
from maskalign_lab.encoders.encoding import decoded, refreshed

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def folder(tmp_path):
    """Three classes of eight noisy JPEGs, each of its own shape."""
    draw = np.random.default_rng(0)
    for k in range(24):
        path = tmp_path / "images" / "abc"[k % 3] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24 + k, 40, 3), np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def on_disk(monkeypatch):
    """Every set is too large for the memory."""
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)


def load(folder: Path, **options):
    return load_dataset(f"folder:{folder}", 16, **options)


def break_one(folder: Path) -> Path:
    """Cut a training image short; the size stays, so only decoding finds it."""
    listing = list_folder(str(folder), "train")
    path = listing.source(5)
    path.write_bytes(path.read_bytes()[:100].ljust(listing.sizes[5], b"\0"))
    return path


# ---- the crop of the papers


def center_crop_arr(pil_image, image_size):
    """As in guided-diffusion's image_datasets."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 90), st.integers(3, 90), st.sampled_from([8, 16, 17]), st.integers(0, 99))
def test_adm_crop_is_theirs_to_the_byte(width, height, size, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    assert np.array_equal(np.asarray(adm_crop(image, size)), center_crop_arr(image, size))


def test_the_crop_is_a_choice_of_the_recipe(folder):
    fit, adm = load(folder), load(folder, crop="adm")
    path = fit.stored.listing.source(0)
    assert np.array_equal(adm.pixels[0], center_crop_arr(Image.open(path), 16)) and fit.digest != adm.digest
    assert np.array_equal(fit.pixels[0], read_image(path, 16))
    with pytest.raises(ValueError, match="data.crop 'amd'.*Did you mean 'adm'"):
        load(folder, crop="amd")
    with pytest.raises(ValueError, match="option of dataset 'shapes'"):
        load_dataset("shapes", crop="adm")


# ---- what names a folder


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_digest_is_that_of_the_listing(folder, tmp_path):
    before, listing = load(folder).digest, list_folder(str(folder), "train")
    name = listing.names[listing.labels == 0][0].decode()
    os.utime(folder / name, (0, 0))
    folder.rename(tmp_path / "moved")
    folder, path = tmp_path / "moved", tmp_path / "moved" / name
    assert load(folder).digest == before
    assert load_dataset(f"folder:{folder}", 8).digest != before and load(folder, n=12).digest != before
    content = path.read_bytes()
    for changed in (content + b"\0", content[:-1]):
        path.write_bytes(changed)
        assert load(folder).digest != before
    path.write_bytes(content)
    path.rename(path.with_name("new.jpg"))
    assert load(folder).digest != before
    path.with_name("new.jpg").rename(folder / "b" / path.name)
    assert load(folder).digest != before
    (folder / "b" / path.name).rename(path)
    assert load(folder).digest == before


def test_files_of_one_size_are_told_apart(tmp_path):
    """Formats that do not compress: another folder, or one written anew, has the same names and sizes."""
    for name in ("one", "other"):
        for k in range(8):
            path = tmp_path / name / "ab"[k % 2] / f"{k}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (k, len(name), 9)).save(path)
    one, other = (load(tmp_path / name) for name in ("one", "other"))
    assert one.stored.listing.sizes.tolist() == other.stored.listing.sizes.tolist() and one.digest != other.digest


# ---- classes


def test_some_classes_of_a_folder(folder):
    whole, some = load(folder), load(folder, classes=("c", "a"))
    assert some.classes == ("a", "c") and set(some.labels) == {0, 1}
    kept = whole.labels != 1
    order = [np.sort(names) for names in (whole.stored.listing.names[kept], some.stored.listing.names)]
    assert np.array_equal(*order)  # each class holds out the same images
    assert len(load(folder, classes=("c", "a"), split="validation")) == 2
    with pytest.raises(ValueError, match="unknown class in .* 'd'. Valid: a, b, c"):
        load(folder, classes=("a", "d"))
    with pytest.raises(ValueError, match="only one class"):
        load(folder, classes=("a",))


# ---- from disk as from memory


def test_what_is_read_from_disk_is_what_is_in_memory(folder, monkeypatch):
    memory = load(folder)
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)
    disk = load(folder)
    assert disk.digest == memory.digest and np.array_equal(disk.labels, memory.labels)
    assert isinstance(memory.pixels, np.ndarray) and disk.pixels.shape == memory.pixels.shape
    for index in (slice(2, 9), np.array([5, 0, 5]), [3], 4, np.arange(len(disk)) % 2 == 0):
        assert np.array_equal(disk.pixels[index], memory.pixels[index])
    assert torch.equal(disk.images([1, 7]), memory.images([1, 7]))
    some = np.array([4, 1, 9])
    assert np.array_equal(disk.subset(some).pixels[:], memory.subset(some).pixels)
    assert disk.subset(some).digest == memory.subset(some).digest != disk.digest
    large = [load_dataset(f"folder:{folder}", 32, detail=16), disk]
    assert np.array_equal(large[0].pixels[:3][:, ::2, 1::2], large[1].pixels[:3]) and large[0].digest != disk.digest


@pytest.mark.parametrize("workers", [0, 2])
def test_spans_are_decoded_in_their_order(folder, on_disk, workers):
    disk, spans = load(folder), [(0, 5), (10, 20)]
    for (start, stop), pixels in zip(spans, decoded(disk.stored, spans, workers), strict=True):
        assert np.array_equal(pixels, disk.pixels[start:stop])


def test_a_set_on_disk_goes_to_workers(folder, on_disk):
    disk = load(folder)
    batches = DataLoader(disk.pixels, batch_size=7, num_workers=1, collate_fn=np.stack)
    assert np.array_equal(np.concatenate(list(batches)), disk.pixels[:])


def test_a_small_set_is_decoded_when_it_is_looked_at(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(stored_images, "read_image", lambda *given: pytest.fail("decoded"))
    lazy = load(folder, lazy=True)
    assert lazy.digest == first.digest and len(lazy) == len(first)
    monkeypatch.undo()
    assert np.array_equal(lazy.pixels[3:5], first.pixels[3:5])


# ---- what cannot be read


def test_a_broken_file_of_a_large_set_is_named_and_then_left_out(folder, on_disk):
    path = break_one(folder)
    disk = load(folder)
    with pytest.raises(ValueError, match=f"{path}.*`maskalign-lab prepare`"):
        disk.images(slice(None))
    list(decoded(disk.stored, [(0, len(disk))], 0))
    assert list(known_unreadable(disk.stored.listed).why) == [5]
    for later in (load(folder), refreshed(disk)):
        assert len(later) == len(disk) - 1 and str(path) in later.skipped[0]
        assert later.stored.cached_as == disk.digest != later.digest
        assert np.array_equal(later.labels, np.delete(disk.labels, 5)) and len(later.images()) == len(later)
    path.write_bytes(path.read_bytes() + b"\0")  # repaired, or at least another file
    assert len(load(folder)) == len(disk)


def test_a_broken_file_of_a_small_set_is_warned_of_every_time(folder):
    break_one(folder)
    for lazy in (False, True, True):
        with pytest.warns(UserWarning, match="skipped 1 of 21 files"):
            assert len(load(folder, lazy=lazy)) == 20


def test_notes_of_several_processes_add_up():
    note_unreadable("ab", {3: "c"})
    note_unreadable("ab", {1: "a"})
    assert known_unreadable("ab").why == {1: "a", 3: "c"}


# ---- many


class Entry:
    """A file that is nowhere."""

    def __init__(self, name, folder=False):
        self.name, self.folder = name, folder

    def is_dir(self):
        return self.folder

    def is_file(self):
        return not self.folder

    def stat(self):
        return os.stat_result((0, 0, 0, 0, 0, 0, 110_000, 0, 0, 0))


def test_a_listing_takes_some_forty_bytes_a_file(monkeypatch, tmp_path):
    classes, each = 40, 1000

    def visible(place):
        if Path(place) == tmp_path:
            return (Entry(f"n{k:08}", folder=True) for k in range(classes))
        return (Entry(f"{Path(place).name}_{k}.JPEG") for k in range(each))

    (tmp_path / "n00000000").mkdir()
    monkeypatch.setattr(image_folder, "visible", visible)
    tracemalloc.start()
    listing = list_folder(str(tmp_path), "train")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listing) == 0.9 * classes * each and len(set(replace(listing).digest)) > 4
    assert held < 60 * classes * each and peak < 160 * classes * each


# ---- Hugging Face data sets


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b", "c"]))
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(30)]
    return datasets.Dataset.from_dict({"picture": pictures, "kind": [k % 3 for k in range(30)]}, features=features)


def test_a_table_is_read_as_a_folder_is(table, tmp_path, monkeypatch):
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    spec = f"hf:{tmp_path / 'saved'}"
    train, held = load_dataset(spec, 16), load_dataset(spec, 16, "validation")
    assert train.classes == ("a", "b", "c") and (len(train), len(held)) == (27, 3)
    for k, name in enumerate(train.stored.listing.names):
        row = table[int(name)]
        assert train.labels[k] == row["kind"]
        assert np.array_equal(train.pixels[k], read_image(train.stored.listing.source(k), 16))
    assert load_dataset(f"hf:{tmp_path / 'parquet'}", 16).digest == train.digest == load_dataset(spec, 16).digest
    assert load_dataset(spec, 16, classes=("c", "b")).classes == ("b", "c")
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)
    disk = load_dataset(spec, 16)
    (pixels,) = decoded(disk.stored, [(0, 27)], 1)
    assert np.array_equal(pixels, train.pixels) and disk.digest == train.digest


def test_splits_of_a_table_are_used(table, tmp_path):
    import datasets

    datasets.DatasetDict(train=table, Test=table.select(range(9))).save_to_disk(tmp_path / "two")
    parts = [load_dataset(f"hf:{tmp_path / 'two'}", 16, split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [30, 9]


def test_a_table_without_images_or_labels_is_refused(table, tmp_path):
    for name, column in (("Image", "picture"), ("ClassLabel", "kind")):
        table.remove_columns(column).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match=f"expected one column of type {name}, found 0; columns: "):
            load_dataset(f"hf:{tmp_path / name}", 16)
    with pytest.raises(FileNotFoundError, match="'/no/where' of data set hf:/no/where does not exist"):
        load_dataset("hf:/no/where", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="data set '.*empty' could not be loaded"):
        load_dataset(f"hf:{tmp_path / 'empty'}", 16)


def test_the_library_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'maskalign-lab\[hf\]'"):
        load_dataset("hf:cifar10", 16)
