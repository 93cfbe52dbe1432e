"""A picture of one's own: cut as in a folder, of no class, and refused in words if it is none."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.own_picture import own_picture


def picture(width=70, height=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def content(pixels, kind="png", **how):
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("crop", ["fit", "adm"])
def test_it_is_cut_and_reduced_as_in_a_folder(tmp_path, crop):
    for k, name in enumerate("aabb"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{k}.png").write_bytes(content(picture(seed=k)))
    folder = load_dataset(f"folder:{tmp_path}", 32, "train", crop=crop)
    for k, row in enumerate(folder.pixels[:]):
        found = [own_picture(content(picture(seed=seed)), 32, 2, crop=crop).pixels[0] for seed in range(4)]
        assert any(np.array_equal(row, each) for each in found), k


@settings(max_examples=20, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.sampled_from(["png", "jpeg", "webp", "bmp"]))
def test_any_shape_and_kind_becomes_a_square_of_the_null_class(width, height, kind):
    found = own_picture(content(picture(width, height), kind), 32, 7, "mine")
    assert found.pixels.shape == (1, 32, 32, 3) and found.pixels.dtype == np.uint8 and len(found) == 1
    assert found.labels.tolist() == [7] and found.classes[7] == "mine" and len(found.classes) == 8
    assert found.images().shape == (1, 3, 32, 32) and -1 <= found.images().min() and found.images().max() <= 1


def test_grey_and_transparent_pictures_are_rgb():
    grey = own_picture(content(picture()[..., 0]), 32, 2)
    assert (grey.pixels[..., :1] == grey.pixels).all()
    clear = np.dstack([picture(), np.zeros((50, 70), np.uint8)])
    assert (own_picture(content(clear), 32, 2).pixels == 255).all()


def test_a_file_is_the_same_as_its_content(tmp_path):
    path = tmp_path / "my cat.jpg"
    path.write_bytes(content(picture(), "jpeg"))
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes())):
        assert np.array_equal(own_picture(source, 32, 2).pixels, own_picture(path.read_bytes(), 32, 2).pixels)
    assert own_picture(path, 32, 2).digest == own_picture(str(path), 32, 2).digest


def test_few_pixels_are_repeated_where_the_training_s_were():
    found = own_picture(content(picture(20, 20)), 32, 2, detail=16).pixels[0]
    assert found.shape == (32, 32, 3) and np.array_equal(found[::2, ::2], found[1::2, 1::2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"", "'notes' cannot be read as a picture: it is empty. Expected a JPEG or PNG"),
        (b"hello, I am a text", "'notes' cannot be read as a picture: it is none. Expected a JPEG or PNG"),
        (content(picture())[:200], r"it is damaged \("),
        (
            content(picture(31, 500)),
            "31 x 500 pixels, and the network sees 32 x 32: take one whose shorter side has 32",
        ),
        (content(picture(1, 1)), "1 x 1 pixels"),
    ],
)
def test_what_is_no_picture_or_too_small_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        own_picture(wrong, 32, 2, "notes")


def test_a_file_that_is_not_there_names_its_neighbour(tmp_path):
    (tmp_path / "cat.png").write_bytes(content(picture()))
    with pytest.raises(FileNotFoundError, match="does not exist. Did you mean 'cat.png'"):
        own_picture(tmp_path / "cta.png", 32, 2)
    with pytest.raises(FileNotFoundError, match="is a folder; use data set folder:PATH"):
        own_picture(tmp_path, 32, 2)
