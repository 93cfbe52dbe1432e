"""FID and its kin are what torch-fidelity gives for the same images, and do not depend on how these are divided."""

import numpy as np
import pytest
import torch
from shared.sampled import eye
from torch.utils.data import Dataset

from maskalign_lab.data.cache_filling import Span
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.measure.fidelity import (
    LOOKED_AT,
    check_weights,
    gaussian_distance,
    gaussian_of,
    inception_score,
    load_extractor,
    precision_recall,
    rows_of,
    seen_in,
)

WIDTH = 12  # features of the stand-in


class Pixels(Dataset):
    """Images as torch-fidelity reads them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]).movedim(-1, 0)


@pytest.fixture(scope="module")
def sets():
    """Two sets of images, 32 pixels a side."""
    return load_dataset("shapes", 32, "validation", 300).pixels, load_dataset("photos", 32, "train", 200).pixels


@pytest.fixture(scope="module")
def theirs(sets):
    """All figures by torch-fidelity's one call, with a small extractor that is registered with it."""
    from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **more):
            super().__init__(name, features_list)
            self.eye = eye().module

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            both = dict(zip(("features", "logits"), self.eye(images)))
            return tuple(both[name] for name in self.features_list)

    register_feature_extractor("eye", Registered)
    real, fake = sets
    wanted = dict(fid=True, isc=True, prc=True, feature_extractor="eye", batch_size=LOOKED_AT)
    quiet = dict(cuda=False, verbose=False, save_cpu_ram=True, cache=False)
    return calculate_metrics(input1=Pixels(fake), input2=Pixels(real), **wanted, **quiet)


def both(images):
    return seen_in(eye(), torch.from_numpy(np.array(images))).split([WIDTH, 5], 1)


def test_every_figure_is_torch_fidelitys(sets, theirs):
    (real, _), (fake, logits) = map(both, sets)
    ours = gaussian_distance(gaussian_of(real), gaussian_of(fake))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5) and ours > 1
    keys = "inception_score_mean", "inception_score_std"
    assert inception_score(logits) == pytest.approx([theirs[key] for key in keys], rel=1e-6)
    assert precision_recall(real, fake) == (theirs["precision"], theirs["recall"])
    assert 0 < theirs["precision"] < 1 and theirs["inception_score_mean"] > 1.01


def test_real_images_are_at_no_distance_from_themselves(sets):
    features, _ = both(sets[0])
    assert abs(gaussian_distance(gaussian_of(features), gaussian_of(features.flip(0)))) < 1e-6
    assert precision_recall(features, features) == (1, 1)


def test_halves_of_one_set_are_nearer_than_two_sets(sets):
    (real, _), (fake, _) = map(both, sets)
    halves = gaussian_of(real[::2]), gaussian_of(real[1::2])
    assert 0 < gaussian_distance(*halves) < gaussian_distance(gaussian_of(real), gaussian_of(fake)) / 10


@pytest.mark.parametrize("size", [8, 16, 64])
def test_features_do_not_depend_on_the_file_that_they_go_to(sets, size):
    images, extractor = sets[0][:101], eye()
    spans = [Span(start, min(start + size, 101), ()) for start in range(0, 101, size)]
    found = torch.cat([rows for (rows,), _ in rows_of(extractor, images)(spans)])
    assert torch.equal(found, torch.cat(both(images), 1)) and set(extractor.module.asked) == {LOOKED_AT}


def test_statistics_of_another_extractor_do_not_compare():
    wide, narrow = (gaussian_of(torch.randn(20, width)) for width in (4, 3))
    with pytest.raises(ValueError, match="statistics of 4 and of 3 features"):
        gaussian_distance(wide, narrow)


# ---- the weights


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [(Harmful(), "holds more than tensors"), ({"a": torch.zeros(1)}, "no weights of torch-fidelity's Inception")],
)
def test_a_file_that_is_something_else_is_refused_before_anything_runs(tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        check_weights(tmp_path / "weights.pth")
    assert "this ran" not in capsys.readouterr().out


def test_another_inception_is_refused_by_its_names(tmp_path):
    """torchvision's has the same layers by name, and others beside them."""
    known = {"Mixed_7c.branch_pool.conv.weight": torch.zeros(1), "AuxLogits.fc.weight": torch.zeros(1)}
    torch.save(known, tmp_path / "inception_v3_google.pth")
    with pytest.raises(ValueError, match="another Inception than torch-fidelity's.*expected a file as https"):
        load_extractor(tmp_path / "inception_v3_google.pth")


def test_a_cut_file_and_none_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(ValueError, match="is cut off"):
        check_weights(tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="torch-fidelity fetches them from https"):
        check_weights(tmp_path / "none.pth")


def test_weights_that_cannot_be_fetched_are_asked_for_by_name(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    def refused(*words, **more):
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(theirs, "load_state_dict_from_url", refused)
    with pytest.raises(OSError, match="could not be fetched: no network; name a copy of https.* by --inception"):
        load_extractor()
