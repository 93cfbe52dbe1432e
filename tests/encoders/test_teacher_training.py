"""Training a tiny teacher: it learns, it is repeatable, its folder loads, its card tells the truth."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from maskalign_lab.base.seeding import generator
from maskalign_lab.base.small_training import Checkpoints, complete
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
    long = replace(SMALL, steps=120)  # the contrast of mean tokens falls late
    rows = [step.losses for step in teacher_training.teacher_steps(dataset, long, "cpu")]
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


def test_an_interrupted_teaching_goes_on(dataset, tmp_path, one_thread):
    """The weights are those of a training that nobody interrupted."""
    config = replace(SMALL, steps=6)
    kept = Checkpoints(tmp_path, 2, {"config": "mine"})
    whole = complete(teacher_training.teacher_steps(dataset, config, "cpu"), 0).model.state_dict()
    for step in teacher_training.teacher_steps(dataset, config, "cpu", kept):
        if step.step == 5:
            break
    rest = list(teacher_training.teacher_steps(dataset, config, "cpu", kept))
    assert [step.step for step in rest] == [4, 5, 6]
    assert all(torch.equal(value, whole[name]) for name, value in rest[-1].model.state_dict().items())


def test_attention_begins_with_places_that_know_their_neighbours():
    """The position codes of adjacent patches are alike, those of distant ones less."""
    vit = teacher_training.new_encoder(SMALL, torch.device("cpu")).vit
    codes = torch.nn.functional.normalize(vit.pos_embed[0, 1:], dim=1)
    likeness = (codes @ codes.T).unflatten(1, (8, 8))[0].detach()
    assert likeness[0, 1] > likeness[0, 4] and likeness[1, 0] > likeness[4, 0]


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


def test_frames_are_of_the_sides_and_turns_that_are_asked_for():
    frames = augmentation.random_frames(500, generator(0, 0, "frames"), (0.5, 1.0), 10.0)
    across, down = frames[:, :, 0], frames[:, :, 1]  # of length width and height, at right angles
    assert (across * down).sum(1).abs().max() < 1e-6
    side = (across.norm(dim=1) * down.norm(dim=1)).sqrt()
    assert 0.5 <= side.min() < 0.55 and 0.95 < side.max() <= 1
    turn = torch.rad2deg(torch.atan2(-down[:, 0], down[:, 1]))
    assert turn.abs().max() <= 10 and turn.min() < -9 and turn.max() > 9
    mirrored = torch.linalg.det(frames[:, :, :2]) < 0
    assert 0.4 < mirrored.float().mean() < 0.6


def test_grain_is_added_last_and_only_if_asked_for(dataset):
    images = dataset.images(slice(0, 50))
    smooth, rough = (augmentation.distort(images, generator(0, 0, "a"), grain) for grain in (0.0, 0.2))
    grain = (rough - smooth).flatten(1).std(1)
    assert grain.max() < 0.21 and grain.mean() > 0.05


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
    """Tokens that carry the coverage give a perfect mask score, and are the oracle's; tokens of noise are neither."""
    good = torch.from_numpy(oracle_features(dataset, 8))
    noise = torch.randn(good.shape, generator=generator(0, 0, "noise"))
    split = dataset, dataset
    scores = [teacher_probes.probe(Features(t, t.mean(1)), Features(t, t.mean(1)), split) for t in (good, noise)]
    for name in ("object IoU", "CKNNA of images", "CKNNA of patches"):
        assert scores[0][name] > 0.9 and scores[1][name] < 0.1, name


def test_other_teachers_stand_on_the_card(folder):
    """The same questions to the same images: a teacher beside itself has its own scores twice."""
    teacher = load_teacher(f"tiny:{folder}")
    card = teacher_probes.probe_card(teacher, "shapes", n=100, beside=(f"tiny:{folder}", "tiny"))
    assert list(card) == ["teacher", f"tiny:{folder}", "tiny", "random network", "raw pixels"]
    assert card["teacher"] == card[f"tiny:{folder}"] != card["tiny"]
    text = teacher_training.card_text(json.loads((folder / "card.json").read_text()) | {"probes": card})
    assert "| tiny |" in text and "* CKNNA of patches:" in text


def test_a_teacher_to_stand_beside_that_is_unknown(tmp_path):
    with pytest.raises(ValueError, match="unknown teacher 'tinny'"):
        teacher_training.teach("digits", tmp_path / "out", SMALL, "cpu", 0, ("tinny",))
    assert not (tmp_path / "out").exists()


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
