"""Training a tiny teacher: it learns, it is repeatable, its folder loads, its card tells the truth."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from maskalign_lab.base.seeding import generator
from maskalign_lab.data import augmentation
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.oracle import oracle_features
from maskalign_lab.encoders import teacher_probes, teacher_training
from maskalign_lab.encoders.teacher_features import dataset_features
from maskalign_lab.encoders.teachers import Features, load_teacher

SMALL = teacher_training.TeachConfig(
    steps=30, batch_size=32, width=32, depth=1, heads=2, warmup=5, n=200, precision="float32"
)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes", n=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return teacher_training.teach("digits", tmp_path_factory.mktemp("out") / "digits", SMALL, device="cpu")


def test_losses_fall(dataset):
    rows = [step.losses for step in teacher_training.teacher_steps(dataset, SMALL, "cpu")]
    for name in rows[0]:
        early, late = (sum(float(row[name]) for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert late < 0.98 * early, name


@pytest.fixture
def one_thread():
    """Sums that several threads share may differ in their last bit, because addition is not associative."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_teaching_is_repeatable_and_leaves_the_global_state_alone(dataset, one_thread):
    def weights():
        for step in teacher_training.teacher_steps(dataset, SMALL, "cpu"):
            if step.step == 3:
                return step.model.state_dict()

    before = torch.random.get_rng_state()
    first = weights()
    torch.rand(100)
    second = weights()
    torch.random.set_rng_state(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_is_a_teacher(folder):
    teacher = load_teacher(f"tiny:{folder}", grid=8)
    card = json.loads((folder / "card.json").read_text())
    assert card["weights"] == teacher.digest and card["dataset"] == "digits"
    assert card["dataset_digest"] == load_dataset("digits", n=200).digest
    assert set(card["probes"]) == {"teacher", "random network", "raw pixels"}
    assert "object IoU" not in card["probes"]["teacher"]  # digits have no masks
    assert "maskalign-lab teach digits --steps 30" in (folder / "card.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "card.md", "teacher.safetensors"]


def test_features_of_a_taught_teacher(folder):
    digits = load_dataset("digits", n=10)
    features = dataset_features(f"tiny:{folder}", digits, 8).tokens
    assert features.shape == (10, 64, 32) and features.isfinite().all()


def test_views_stay_in_range_and_differ(dataset):
    images = dataset.images(slice(0, 50))
    view = augmentation.distort(images, generator(0, 0, "a"))
    assert view.abs().max() <= 1 and view.shape == images.shape
    assert torch.equal(view, augmentation.distort(images, generator(0, 0, "a")))
    assert (view - images).abs().mean((1, 2, 3)).min() > 0.01


def test_crops_stay_inside():
    crops = augmentation.random_crops(500, generator(0, 0, "crops"))
    corners = crops[:, :, :2].abs().sum(-1) + crops[:, :, 2].abs()
    assert corners.max() <= 1 + 1e-6


def test_agreement_is_infonce():
    """Against the sum written out, in float64 arithmetic."""
    first, second = torch.randn(2, 6, 5, generator=generator(0, 0, "z")).double()
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    terms = []
    for i in range(12):
        others = torch.stack([z[i] @ z[k] / 0.2 for k in range(12) if k != i])
        terms.append(others.logsumexp(0) - z[i] @ z[(i + 6) % 12] / 0.2)
    found = teacher_training.agreement(first, second, 0.2).double()
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_probe_finds_the_object_in_its_own_mask(dataset):
    """Tokens that carry the coverage give a perfect mask score; tokens of noise give none."""
    good = torch.from_numpy(oracle_features(dataset, 8))
    noise = torch.randn(good.shape, generator=generator(0, 0, "noise"))
    split = dataset, dataset
    scores = [teacher_probes.probe(Features(t, t.mean(1)), Features(t, t.mean(1)), split) for t in (good, noise)]
    assert scores[0]["object IoU"] > 0.9 and scores[1]["object IoU"] < 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size": 5}, "patch_size=5"),
        ({"heads": 3}, "heads=3"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_impossible_settings(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        teacher_training.teach("digits", tmp_path, replace(SMALL, **change))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_one_class(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "only" / "a.png")
    with pytest.raises(ValueError, match="only one class"):
        teacher_training.teach(f"folder:{tmp_path}", tmp_path / "out", SMALL)
