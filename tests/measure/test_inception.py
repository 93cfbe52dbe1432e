"""torch-fidelity's Inception with random weights: looked at through our hands it gives what it gives by itself."""

import numpy as np
import pytest
import torch
from shared.inception import save_random_inception

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.measure.fidelity import (
    LAYERS,
    LOOKED_AT,
    gaussian_distance,
    gaussian_of,
    load_extractor,
    seen_in,
)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return load_extractor(save_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth"))


def test_its_features_are_those_that_torch_fidelity_extracts(extractor):
    from torch.utils.data import TensorDataset
    from torch_fidelity.utils import get_featuresdict_from_dataset

    class Images(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    pixels = torch.from_numpy(load_dataset("shapes", 32, "validation", LOOKED_AT).pixels.copy())
    images = Images(pixels.movedim(-1, 1).contiguous())
    theirs = get_featuresdict_from_dataset(images, extractor.module, LOOKED_AT, False, True, False)
    ours = seen_in(extractor, pixels).split([2048, 1008], 1)
    for name, found in zip(LAYERS, ours, strict=True):
        assert torch.equal(found, theirs[name]) and found.std() > 1e-3


def test_a_row_says_which_weights_they_were(extractor):
    assert extractor.dim == 2048
    assert "inception-v3-compat of torch-fidelity" in extractor.facts["extractor"]
    assert "299 x 299" in extractor.facts["resize"]


@pytest.mark.slow
def test_five_thousand_real_images_are_at_no_distance_from_themselves(extractor):
    pixels = load_dataset("shapes", 32, "validation", 5000).pixels
    features = seen_in(extractor, torch.from_numpy(np.array(pixels)))[:, :2048]
    same = gaussian_distance(gaussian_of(features), gaussian_of(features.flip(0)))
    scale = gaussian_of(features).sigma.trace()
    assert abs(same) < 1e-4 * scale
