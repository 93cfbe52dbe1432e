"""Teachers: frozen, deterministic, independent of the batch, and clear about what they cannot do."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders import teachers
from maskalign_lab.encoders.teacher_features import dataset_features

RANDOM = "timm:vit_tiny_patch16_224?random"


def write_teacher(folder, weights, network):
    content = save(weights)
    (folder / "teacher.safetensors").write_bytes(content)
    card = {"network": network, "weights": hashlib.blake2b(content, digest_size=8).hexdigest()}
    (folder / "card.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes", n=20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as `teach` writes it, with random weights, and the network behind it."""
    folder = tmp_path_factory.mktemp("teacher")
    network = dict(size=32, patch_size=4, width=32, depth=2, heads=2)
    vit = teachers.build_vit(**network)
    write_teacher(folder, {key: value.half() for key, value in vit.state_dict().items()}, network)
    return folder, vit


def test_tiny_round_trip_through_half_precision(tiny, dataset):
    folder, vit = tiny
    teacher = teachers.load_teacher(f"tiny:{folder}")
    assert (teacher.grid, teacher.dim, len(teacher.digest)) == (8, 32, 16)
    vit.eval()
    for a, b in zip(teacher.vit.state_dict().values(), vit.state_dict().values()):
        assert torch.equal(a, b.half().float())
    with torch.no_grad():
        expected = vit.forward_features(dataset.images())
    features = teacher(dataset.images())
    torch.testing.assert_close(features.tokens, expected[:, 1:], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=2e-2, atol=1e-2)


def test_digest_follows_the_weights_and_the_card_must_fit(tiny, tmp_path):
    folder, vit = tiny
    other = {key: value.half() + 1 for key, value in vit.state_dict().items()}
    write_teacher(tmp_path, other, json.loads((folder / "card.json").read_text())["network"])
    assert teachers.load_teacher(f"tiny:{tmp_path}").digest != teachers.load_teacher(f"tiny:{folder}").digest
    (tmp_path / "card.json").write_text((folder / "card.json").read_text())
    with pytest.raises(ValueError, match="its card is of"):
        teachers.load_teacher(f"tiny:{tmp_path}")


def test_frozen(tiny, dataset):
    teacher = teachers.load_teacher(f"tiny:{tiny[0]}")
    images = dataset.images().requires_grad_()
    features = teacher(images)
    assert not features.tokens.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())


def test_features_do_not_depend_on_the_batch_size(tiny, dataset):
    name = f"tiny:{tiny[0]}"
    one, many, again = (dataset_features(name, dataset, 8, batch_size=size) for size in (1, 7, 7))
    assert one.tokens.shape == (20, 64, 32) and one.cls.shape == (20, 32) and one.cls.dtype == torch.float16
    for alone, together, repeated in zip(one, many, again, strict=True):
        torch.testing.assert_close(alone, together, rtol=2e-3, atol=2e-3)
        assert torch.equal(together, repeated)


def test_pictures_of_another_size_are_resized(tiny):
    teacher = teachers.load_teacher(f"tiny:{tiny[0]}", size=64)
    large = load_dataset("shapes", size=64, n=4)
    assert teacher(large.images()).tokens.shape == (4, 64, 32)


def test_timm_teacher_is_timm(dataset):
    """The same pixels through timm's own transform and forward pass give the same features."""
    import timm
    from timm.data import resolve_data_config
    from torchvision.transforms.functional import normalize

    teacher = teachers.load_teacher(RANDOM, grid=14)
    config = resolve_data_config(model=teacher.vit)
    assert config["mean"] == pytest.approx(teacher.mean.tolist())
    assert isinstance(teacher.vit, timm.models.VisionTransformer)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        expected = teacher.vit.forward_features(normalize((images + 1) / 2, config["mean"], config["std"]))
    features = teacher(images)
    torch.testing.assert_close(features.tokens, expected[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "vit_tiny_patch16_224"],
    ids=["registers", "no class token", "plain"],
)
@pytest.mark.parametrize("grid", [4, 5])
def test_any_grid_and_any_prefix(model, grid):
    """Registers and class token are split off; a network without class token gives the mean."""
    teacher = teachers.load_teacher(f"timm:{model}?random", grid=grid)
    features = teacher(torch.zeros(1, 3, 32, 32))
    assert features.tokens.shape == (1, grid**2, teacher.dim) and features.cls.shape == (1, teacher.dim)


def test_random_teachers_are_the_same_each_time_and_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    first, second = (teachers.load_teacher(RANDOM, grid=2) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_published_teachers_are_known_by_their_weights(monkeypatch):
    """Not by their name: the same name may get other weights."""
    first, again = (teachers.load_teacher(RANDOM, grid=2) for _ in range(2))
    assert first.digest == again.digest and len(first.digest) == 16
    create = teachers.create_vit

    def changed(*given, **named):
        vit = create(*given, **named)
        vit.norm.bias.data[-1] += 1e-3
        return vit

    monkeypatch.setattr(teachers, "create_vit", changed)
    assert teachers.load_teacher(RANDOM, grid=2).digest != first.digest


def test_oracle(dataset):
    assert dataset_features("oracle", dataset, 8).tokens.shape == (20, 64, 18)
    token = dataset_features("oracle", dataset, 8).cls.float()
    assert (token[:, :10].argmax(1).numpy() == dataset.labels).all()  # it knows the class
    torch.testing.assert_close(token.mean(1), torch.zeros(20), rtol=0, atol=2e-3)
    torch.testing.assert_close(token.var(1, correction=0), torch.ones(20), rtol=5e-3, atol=0)
    with pytest.raises(ValueError, match="exact masks.*digits"):
        dataset_features("oracle", load_dataset("digits", n=20), 8)
    with pytest.raises(ValueError, match="no network"):
        teachers.load_teacher("oracle")


def test_wrong_grid_is_refused_before_encoding(tiny, dataset, monkeypatch):
    monkeypatch.setattr(teachers.Teacher, "forward", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="8 x 8 tokens.*16 x 16"):
        dataset_features(f"tiny:{tiny[0]}", dataset, 16)


@pytest.mark.parametrize(
    "name, message",
    [
        ("tinny", "unknown teacher 'tinny'. Did you mean 'tiny'"),
        ("timm:", "unknown teacher"),
        ("timm:vit_tiny_patch16_223?random", "Did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224?rnd", "unknown option"),
        ("timm:resnet18?random", "no vision transformer"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError) as error:
        teachers.load_teacher(name, grid=4)
    assert message in str(error.value)


def test_the_shipped_teacher(dataset):
    teacher = teachers.load_teacher("tiny", grid=8)
    assert teacher(dataset.images()).tokens.shape == (20, 64, teacher.dim)


def test_teachers_that_ship_stay_what_they_were():
    """Runs and tables were aligned with these weights."""
    digests = {name: teachers.load_teacher(name).digest for name in teachers.TINY}
    assert digests == {"tiny": "e03f534752e40345", "tiny-4x4": "9523678063dae911"}
    assert teachers.load_teacher("tiny-4x4", grid=4).grid == 4


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="maskalign-lab teach"):
        teachers.load_teacher(f"tiny:{tmp_path / 'none'}")


def test_pictures_smaller_than_a_patch():
    with pytest.raises(ValueError, match="patches of 16 pixels"):
        teachers.load_teacher(RANDOM, size=8)
