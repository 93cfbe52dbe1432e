"""The table of teachers in space: which tokens are asked, and what a data set without masks gives."""

import math

import numpy as np
import pytest
import torch

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders.teacher_features import dataset_features
from maskalign_lab.measure.spatial import METRICS, lds
from maskalign_lab.studies.position_preference.teacher_space import ASKED, space_figure, space_rows, teacher_tokens
from maskalign_lab.workbench.plots import png


@pytest.fixture(scope="module")
def images():
    return load_dataset("shapes", 32, "validation", 24)


def test_a_row_for_every_teacher_and_variant(images):
    rows = space_rows(images, {"tiny-4x4": 4, "oracle": 8})
    assert [(row["teacher"], row["variant"]) for row in rows] == [(t, v) for t in ("tiny-4x4", "oracle") for v in ASKED]
    value = lds(dataset_features("tiny-4x4", images, 4).tokens.float()).mean().item()
    assert rows[0]["LDS"] == pytest.approx(value, rel=1e-3)
    assert all(math.isfinite(row[key]) for row in rows for metric in METRICS for key in (metric, f"{metric} half"))
    assert png(space_figure(rows))


def test_the_untaught_network_is_another_one_and_always_the_same(images):
    one, again = (teacher_tokens("untrained tiny", images, 8) for _ in range(2))
    assert torch.equal(one, again) and one.shape == teacher_tokens("tiny", images, 8).shape
    assert not torch.allclose(one, teacher_tokens("tiny", images, 8), atol=0.1)


def test_images_without_masks_have_no_object():
    photos = load_dataset("photos", 32, "validation", 6)
    (row, *_) = space_rows(photos, {"tiny": 8})
    assert math.isnan(row["SRSS"]) and np.isfinite(row["LDS"])
    with pytest.raises(ValueError, match="oracle needs exact masks"):
        space_rows(photos, {"oracle": 8})
