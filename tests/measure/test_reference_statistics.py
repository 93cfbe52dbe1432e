"""Which array of a file of statistics counts, and what is no such file."""

import numpy as np
import pytest

from maskalign_lab.measure.reference_statistics import read_reference

WIDTH = 6
MU, SIGMA = np.arange(WIDTH, dtype=np.float32), np.diag(np.arange(1.0, WIDTH + 1))
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


def saved(folder, **arrays):
    np.savez(folder / "reference.npz", **arrays)
    return folder / "reference.npz"


def test_of_adms_file_the_statistics_are_for_fid_and_the_images_for_precision(tmp_path):
    spatial = {"mu_s": np.zeros(5), "sigma_s": np.eye(5)}
    found = read_reference(saved(tmp_path, arr_0=IMAGES, mu=MU, sigma=SIGMA, **spatial), WIDTH)
    assert (found.gaussian.mu == MU).all() and found.gaussian.sigma.dtype == np.float64
    assert (found.images == IMAGES).all()
    assert found.facts["FID"] == "mu, sigma" and found.facts["precision and recall"] == "arr_0, 12 images"
    assert sorted(found.facts["not read"]) == ["mu_s", "sigma_s"]


def test_jits_file_has_no_images(tmp_path):
    found = read_reference(saved(tmp_path, mu=MU, sigma=SIGMA), WIDTH)
    assert found.images is None and found.facts["precision and recall"] is None and found.facts["not read"] == []


def test_images_alone_are_a_reference_of_all_figures(tmp_path):
    found = read_reference(saved(tmp_path, arr_0=IMAGES), WIDTH)
    assert found.gaussian is None and found.facts["FID"] == "arr_0, 12 images"


def test_the_digest_tells_files_apart(tmp_path):
    first = read_reference(saved(tmp_path, mu=MU, sigma=SIGMA), WIDTH).facts["digest"]
    assert first != read_reference(saved(tmp_path, mu=MU + 1, sigma=SIGMA), WIDTH).facts["digest"]


ASYMMETRIC = SIGMA + np.triu(np.ones((WIDTH, WIDTH)), 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, "holds mu; expected mu and sigma, or images in arr_0"),
        ({"mu_s": MU, "sigma_s": SIGMA}, "mu_s and sigma_s are of sFID, which is not computed here"),
        ({"arr_1": MU}, "holds arr_1; expected mu and sigma"),
        ({"mu": MU[:-1], "sigma": SIGMA}, r"mu has shape \(5,\) and sigma \(6, 6\), expected \(6,\) and \(6, 6\)"),
        ({"mu": MU, "sigma": SIGMA[0]}, "they are of another extractor"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "not finite"),
        ({"mu": MU, "sigma": ASYMMETRIC}, "sigma is no covariance"),
        ({"mu": MU, "sigma": -SIGMA}, "without negative variances"),
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \(12, 8, 8, 3\), expected images of bytes"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \(12, 3, 8, 8\)"),
        ({"arr_0": IMAGES[0]}, "expected images of bytes"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "no npz file of arrays"),
    ],
)
def test_other_arrays_are_named(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read_reference(saved(tmp_path, **arrays), WIDTH)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .* with statistics of real images"):
        read_reference(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "alone.npy", MU)
    (tmp_path / "alone.npy").rename(tmp_path / "alone.npz")
    for name in ("cut.npz", "alone.npz"):
        with pytest.raises(ValueError, match="is cut off, or no npz file of arrays"):
            read_reference(tmp_path / name)
