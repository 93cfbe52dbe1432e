"""LPIPS on random weights in the published layout: the authors' numbers, what is refused, and two trainings that it judges."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from shared.golden import golden
from shared.lpips import save_random_lpips

from maskalign_lab.base import paths
from maskalign_lab.cli import main
from maskalign_lab.encoders.lpips import load_lpips
from maskalign_lab.measure import decoder_training
from maskalign_lab.measure.decoder_training import DecoderConfig, materials, perception_facts, train_decoder
from maskalign_lab.measure.judge_training import JudgeConfig
from maskalign_lab.measure.rae_card import perception_text
from maskalign_lab.runs import run as runs
from maskalign_lab.runs import side_by_side
from maskalign_lab.runs.expectations import expect
from maskalign_lab.runs.eyes import check_perception_there
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json, identity, override, to_json
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.runs.side_by_side import train_group

HEADS, VGG = "weights-vgg16-lpips.pth", "vgg16-397923af.pth"
FEW = "network.width=16 network.depth=2 network.heads=2 method.depth=1 data.n=64 training.steps=2 training.batch_size=4"
DECODER = DecoderConfig(
    steps=2, batch_size=4, width=16, depth=1, heads=2, n=24, save_every=1, precision="float32", adversarial=0.0
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for TORCH_HOME that has both files."""
    save_random_lpips((folder := tmp_path_factory.mktemp("torch")) / "hub" / "checkpoints")
    return folder


@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(home))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for TORCH_HOME that has neither."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def lpips(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        before = torch.random.get_rng_state()
        found = load_lpips()
        assert torch.equal(torch.random.get_rng_state(), before)
    return found


# ---- the distance


@pytest.mark.parametrize("casting", [False, True])
def test_distances_and_gradients_are_those_of_the_authors(lpips, casting):
    """In a training that computes in bfloat16 too."""
    record = golden("lpips")
    decoded, images = (record.inputs[name].clone().requires_grad_() for name in ("decoded", "images"))
    with torch.autocast("cpu", torch.bfloat16, enabled=casting):
        found = lpips(decoded, images)
    torch.testing.assert_close(found, record.out["distance"].mean(), rtol=1e-4, atol=0)
    gradient, none = torch.autograd.grad(2 * found, (decoded, images), allow_unused=True)
    assert none is None and (gradient - record.out["gradient"]).norm() < 1e-3 * record.out["gradient"].norm()


def test_nothing_of_it_learns_or_drops_out(lpips):
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not any(module.training for module in lpips.net.modules())
    a, b = torch.rand(2, 3, 3, 16, 16)
    assert lpips(a, a) == 0 and lpips(a, b) == lpips(a, b) > 0


# ---- what is refused, and when


def refuse(*_, **__):
    pytest.fail("it had begun")


@pytest.mark.parametrize("there", [(), (HEADS,)])
def test_weights_that_are_not_there_are_told_before_anything_is_loaded(elsewhere, there, monkeypatch, tmp_path, capsys):
    elsewhere.mkdir(parents=True)
    for name in there:
        (elsewhere / name).touch()
    for module in (runs, side_by_side):
        monkeypatch.setattr(module, "load_sources", refuse)
    recipe = make_recipe("dsd", "smoke", overrides=f"{FEW} data.perception=lpips")
    for start in (lambda: train(recipe, tmp_path / "run", "cpu", 0), lambda: train_group({tmp_path: recipe}, "cpu", 0)):
        with pytest.raises(FileNotFoundError, match="perception classifier, which needs no download") as caught:
            start()
        told = str(caught.value)
        assert f"{elsewhere / VGG} (from https://download.pytorch.org/models/{VGG})" in told and "TORCH_HOME" in told
        assert (str(elsewhere / HEADS) in told) == (not there)
    assert not (tmp_path / "run").exists()
    words = ["train", "dsd", "--preset", "smoke", "data.perception=lpips", "--out", str(tmp_path / "run")]
    assert main(words) == 2 and VGG in capsys.readouterr().err


def test_a_decoder_is_not_begun_without_them_either(elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(decoder_training, "teacher_encoder", refuse)
    with pytest.raises(FileNotFoundError, match=VGG):
        materials("shapes", replace(DECODER, perception="lpips"), torch.device("cpu"))
    for changes, message in (
        ({"perception": "lpip"}, "unknown perception 'lpip'. Did you mean 'lpips'"),
        ({"perception": "lpips", "size": 8}, "perception=lpips: its VGG sees nothing of 8 pixels.*16 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            materials("shapes", replace(DECODER, **changes), torch.device("cpu"))


def test_files_of_something_else_are_told_by_name(home, elsewhere):
    elsewhere.mkdir(parents=True)
    (elsewhere / VGG).symlink_to(home / "hub" / "checkpoints" / VGG)
    for held in ({"weight": torch.zeros(1)}, None):
        torch.save(held, elsewhere / HEADS)
        with pytest.raises(ValueError, match=f"{HEADS} are not the weights of"):
            load_lpips()
    (elsewhere / HEADS).write_bytes(b"half")
    with pytest.raises(ValueError, match="are cut off"):
        load_lpips()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.perception=LPIPS", "data.perception 'LPIPS'. Did you mean 'lpips'"),
        ("data.perception=lpips data.size=8", "data.perception=lpips: its VGG sees nothing of 8 pixels"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_recipe("dsd", "smoke", overrides=overrides)


def test_who_names_it_has_another_run_and_who_does_not_keeps_his(elsewhere):
    plain = make_recipe("dsd", "smoke")
    other = override(plain, "data.perception=lpips")
    assert identity(plain) == identity(override(other, "data.perception=classifier")) != identity(other)
    assert from_json(to_json(other)) == other and expect(other).facts.num_classes == 10  # a dry run wants no weights


# ---- trainings


def test_dsd_is_trained_with_it_and_looked_at_without(there, own_folders, monkeypatch, tmp_path):
    recipe = make_recipe("dsd", "smoke", overrides=f"{FEW} data.perception=lpips training.log_every=1")
    path = train(recipe, tmp_path / "run", "cpu", 0)
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and all(line["perceptual"] > 0 for line in lines if "perceptual" in line)
    assert "perceptual" in lines[-1] and not (paths.cache() / "perception").exists()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_run(path).recipe.data.perception == "lpips"


def test_a_decoder_is_trained_with_it_and_says_so(there, tmp_path, monkeypatch, lpips):
    monkeypatch.setattr(decoder_training, "judge_steps", refuse)  # no classifier is needed
    config = replace(DECODER, perception="lpips")
    given = materials("shapes", config, torch.device("cpu"))
    train_decoder(given, config, JudgeConfig(), tmp_path, "shapes", "cpu", 0)
    facts = perception_facts(given, JudgeConfig())
    assert facts == {"lpips": lpips.digest} and f"LPIPS, as RAE's, with weights `{lpips.digest}`" == perception_text(
        facts
    )
    assert '"perceptual"' in (tmp_path / "log.jsonl").read_text()
    assert perception_facts(replace(given, lpips=None), JudgeConfig()) == asdict(JudgeConfig())


@pytest.mark.parametrize("words", ["dsd method.perceptual=0", "sit"])
def test_a_training_that_compares_no_pictures_asks_for_no_weights(words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    method, *more = words.split()
    recipe = make_recipe(method, "smoke", overrides=" ".join(["data.perception=lpips", *more]))
    check_perception_there(recipe)
    with pytest.raises(FileNotFoundError, match="vgg16"):
        check_perception_there(make_recipe("dsd", "smoke", overrides="data.perception=lpips"))
