"""The oracle in a recipe: its dials are a part of its name, so of a run's identity and of what is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.oracle import Oracle, oracle_features
from maskalign_lab.encoders.teacher_features import dataset_features, rows_of
from maskalign_lab.runs import sources
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.estimates import online_teacher
from maskalign_lab.runs.expectations import expect
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import DataConfig, from_json, identity, rooted, to_json
from maskalign_lab.runs.run import load_run, train

pytestmark = pytest.mark.usefixtures("own_folders")
TINY = "network.width=16 network.depth=2 network.heads=2 method.depth=1 method.projector_width=16 data.n=16"
SHORT = "training.steps=2 training.batch_size=8 training.warmup=1"
DIALS = "oracle:noise=0.5,position=0.3,detail=2"


def recipe(teacher, more=""):
    return make_recipe("repa", "smoke", overrides=f"{TINY} {SHORT} data.teacher={teacher} {more}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tiny", ["tiny"]),
        (DIALS, [DIALS]),
        ("tiny, oracle", ["tiny", "oracle"]),
        (f"tiny,{DIALS},oracle", ["tiny", DIALS, "oracle"]),
        ("oracle:noise=1, detail=2 ,tiny", ["oracle:noise=1, detail=2", "tiny"]),
        ("timm:vit@a=b.pth,oracle:noise=1", ["timm:vit@a=b.pth", "oracle:noise=1"]),
    ],
)
def test_dials_are_no_teachers(text, names):
    assert sources.teacher_names(DataConfig(teacher=text)) == names


def test_a_name_survives_every_way_that_a_recipe_goes():
    there = recipe(f"tiny,{DIALS}")
    assert there.data.teacher == f"tiny,{DIALS}" == rooted(there).data.teacher == from_json(to_json(there)).data.teacher


def test_dials_enter_the_identity():
    names = ["oracle", "oracle:noise=0.5", "oracle:noise=0.4", "oracle:position=0.5", "oracle:detail=2"]
    assert len({identity(recipe(name)) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("teacher", "dims"), [("oracle", (18,)), (DIALS, (22,)), (f"tiny,{DIALS}", (128, 22)), ("oracle:detail=4", (34,))]
)
def test_what_is_expected_is_what_is_loaded(teacher, dims):
    asked = recipe(teacher)
    loaded = sources.load_sources(asked).facts
    assert loaded.teacher_dims == dims
    assert expect(asked).facts == replace(loaded, data_digest="", teacher_digest="")
    assert loaded.teacher_digest.endswith(teacher.removeprefix("tiny,"))


def test_equal_dials_are_one_teacher_however_they_are_written():
    digests = {
        sources.load_sources(recipe(name)).facts.teacher_digest
        for name in ("oracle:noise=1,detail=2", "oracle:detail=2,noise=1.0", "oracle:noise=1e0,detail=2,position=0")
    }
    assert digests == {"oracle:noise=1,detail=2"}


def test_a_training_reads_what_the_dials_say():
    (features,) = make_batches(recipe(DIALS)).features
    told = torch.from_numpy(oracle_features(load_dataset("shapes", n=16), 8, Oracle(0.5, 0.3, 2))).half()
    assert torch.equal(features[:, 1:], told)
    assert torch.equal(features, rows_of(dataset_features(DIALS, load_dataset("shapes", n=16), 8)))


def test_two_oracles_teach_side_by_side():
    batch = make_batches(recipe("oracle:noise=0.5,oracle:detail=2"))(0)
    assert batch.features.shape == (8, 64, 18 + 22)


def test_kept_features_equal_those_of_a_part():
    """Noise is keyed by the image: what a run saw of an image is what an analysis sees of it later."""
    images = load_dataset("shapes", n=16)
    whole = sources.kept_features(Oracle(0.5), images, 8).tokens
    rows = np.array([11, 3])
    assert torch.equal(sources.kept_features(Oracle(0.5), images.subset(rows), 8).tokens, whole[rows])
    assert sources.kept_features(Oracle(0.5), images, 8) is sources.kept_features(Oracle(noise=0.5), images, 8)
    assert not torch.equal(sources.kept_features(Oracle(0.4), images, 8).tokens, whole)


def test_a_run_knows_its_oracle(tmp_path):
    train(recipe(DIALS, "data.variant=torus"), tmp_path / "run", "cpu", 0)
    run = load_run(tmp_path / "run")
    assert run.teacher == Oracle(0.5, 0.3, 2) and run.facts.teacher_digest == DIALS
    images = run.images("train")
    assert images.wraps
    assert torch.equal(rows_of(run.teacher_view(images)), make_batches(run.recipe).features[0])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("oracle:nois=0.5", "Did you mean 'noise'"),
        ("tiny,oracle:noise=-1", "the nearest is noise=0"),
        ("oracle:detail=3", "detail=3 does not divide a token's 4 pixels; the nearest that does is 2"),
        ("oracle,noise=1", "unknown teacher 'oracle,noise=1'"),
        ("orcale:noise=1", "unknown teacher 'orcale:noise=1'. Did you mean 'oracle"),
    ],
)
def test_dials_that_cannot_be_so_are_refused(teacher, message, tmp_path):
    for ask in (expect, lambda asked: train(asked, tmp_path / "run", "cpu", 0)):
        with pytest.raises(ValueError, match=message):
            ask(recipe(teacher))
    assert not (tmp_path / "run").exists()


def test_a_dial_is_refused_before_images_are_made(monkeypatch):
    monkeypatch.setattr(sources, "kept_images", lambda *_: pytest.fail("made images"))
    with pytest.raises(ValueError, match="Did you mean 'noise'"):
        sources.load_sources(recipe("oracle:nois=0.5"))


def test_an_oracle_has_a_class_token_and_no_attention():
    """The token knows the class, whatever the dials, and stands as high as a transformer's."""
    asked = make_recipe("reg", "smoke", overrides="data.n=16 data.teacher=oracle:noise=0.1,detail=2")
    images = load_dataset("shapes", n=16)
    token = make_batches(asked)(0).class_token
    assert sources.load_sources(asked).facts.teacher_dims == (22,) == token.shape[1:]
    kept = sources.kept_features(Oracle(0.1, detail=2), images, 8).cls.float()
    assert (kept[:, :10].argmax(1).numpy() == images.labels).all()
    torch.testing.assert_close(kept.var(1, correction=0), torch.ones(16), rtol=1e-2, atol=0)
    asked = make_recipe("haste", "smoke", overrides="data.n=16 data.teacher=oracle:noise=0.5")
    with pytest.raises(ValueError, match="teacher 'oracle:noise=0.5' has none"):
        sources.load_sources(asked)
    assert online_teacher(asked, expect(asked)) is None
