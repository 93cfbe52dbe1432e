"""Teachers with one thing taken away: exactly that one, under a name of their own."""

import json
import shutil

import pytest
import torch

from maskalign_lab.base.paths import data
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders import teacher_variants
from maskalign_lab.encoders.teacher_features import dataset_features, description, feature_encoding
from maskalign_lab.encoders.teacher_variants import AVERAGED, VARIANTS, moved_order, vary
from maskalign_lab.encoders.teachers import TINY, load_teacher
from maskalign_lab.runs.expectations import expected_teacher
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.sources import encodings_of, load_sources


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes", split="validation", n=12)


@pytest.fixture(scope="module")
def images(dataset):
    return dataset.images()


@pytest.fixture(scope="module")
def asked():
    """Every variant of the small teacher, and the teacher as taught under the empty name."""
    return {variant: load_teacher(f"tiny-4x4?{variant}" if variant else "tiny-4x4") for variant in ("", *VARIANTS)}


def folder_with(tmp_path, **card):
    """A copy of the teacher that ships, with another card."""
    shutil.copytree(data() / "teacher" / TINY["tiny-4x4"], tmp_path / "own")
    path = tmp_path / "own" / "card.json"
    told = {name: value for name, value in {**json.loads(path.read_text()), **card}.items() if value is not None}
    path.write_text(json.dumps(told))
    return f"tiny:{tmp_path / 'own'}"


@pytest.mark.parametrize("name", TINY)
def test_permuted_features_are_the_plain_ones_moved(name, images):
    plain, moved = (load_teacher(each)(images) for each in (name, f"{name}?permuted"))
    order = moved_order(plain.tokens.shape[1])
    assert sorted(order.tolist()) == list(range(len(order))) and order.tolist() != sorted(order.tolist())
    assert torch.equal(moved.tokens, plain.tokens[:, order]) and torch.equal(moved.cls, plain.cls)


def test_the_permutation_of_4_x_4_moves_every_token_and_does_not_follow_the_middle():
    order = moved_order(16)
    assert (order != torch.arange(16)).all()
    row, column = order // 4, order % 4
    middle = ((row - 1.5).abs() < 1) & ((column - 1.5).abs() < 1)
    assert middle[[5, 6, 9, 10]].sum() < 2  # one is what chance gives


def test_centred_features_have_equal_means_and_differ_by_a_constant(asked, images):
    plain, centred = asked[""](images), asked["centred"](images)
    taken = plain.tokens - centred.tokens
    torch.testing.assert_close(taken, taken[:1].expand_as(taken), rtol=0, atol=1e-5)
    torch.testing.assert_close(taken[0].mean(0), torch.zeros(128), rtol=0, atol=1e-5)
    assert taken.abs().max() > 0.1 and torch.equal(centred.cls, plain.cls)
    taught_on = load_dataset("shapes", n=AVERAGED)
    means = teacher_variants.position_means(asked["centred"], taught_on)
    torch.testing.assert_close(means, means.mean(0).expand_as(means), rtol=0, atol=1e-4)


def test_without_positions_a_permutation_of_patches_permutes_the_tokens(asked, images):
    order = moved_order(16)
    patches = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mixed = patches[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    free, plain = asked["positionless"], asked[""]
    torch.testing.assert_close(free(mixed).tokens, free(images).tokens[:, order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(free(mixed).cls, free(images).cls, rtol=1e-3, atol=1e-3)
    assert (plain(mixed).tokens - plain(images).tokens[:, order]).abs().max() > 0.1


def test_random_weights_are_all_drawn_anew_and_always_the_same(asked):
    again = load_teacher("tiny-4x4")
    before = torch.random.get_rng_state()
    vary(again, "random", {})
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, drawn), same, taught in zip(
        asked["random"].named_parameters(), again.parameters(), asked[""].parameters(), strict=True
    ):
        assert torch.equal(drawn, same) and not drawn.requires_grad
        assert not torch.equal(drawn, taught), name


def test_each_has_a_digest_and_a_cache_of_its_own(asked, dataset):
    digests = {variant: teacher.digest for variant, teacher in asked.items()}
    assert digests == {  # runs are named by them
        "": "9523678063dae911",
        "centred": "87df8cfde37880f0",
        "positionless": "b5eb319c393a847b",
        "random": "27db9dc28c628f3e",
        "permuted": "e0abff4fb8a1a52e",
    }
    folders = {feature_encoding(teacher, dataset).folder for teacher in asked.values()}
    codes = {description(teacher, dataset)["code"] for teacher in asked.values()}
    assert len(folders) == len(asked) and len(codes) == 1


def test_a_recipe_names_them_and_the_network_fits(dataset):
    recipe = make_recipe("repa", "study", "shapes", 0, "data.teacher=tiny-4x4?permuted data.n=16")
    sources = load_sources(recipe)
    (encoding,) = [each for each in encodings_of(recipe, sources) if each.kind == "features"]
    assert sources.facts.teacher_digest == encoding.description["teacher"] == load_teacher("tiny-4x4?permuted").digest
    features = dataset_features("tiny-4x4?permuted", dataset, 4)
    plain = dataset_features("tiny-4x4", dataset, 4)
    assert torch.equal(features.tokens, plain.tokens[:, moved_order(16)]) and torch.equal(features.cls, plain.cls)
    assert expected_teacher("tiny-4x4?permuted", 32, 4).dim == 128


def test_one_of_your_own(tmp_path, asked, images):
    name = folder_with(tmp_path, pictures=64)
    few, permuted = (load_teacher(f"{name}?{variant}") for variant in ("centred", "permuted"))
    assert permuted.digest == asked["permuted"].digest  # the same weights and the same change
    assert few.digest != asked["centred"].digest  # averaged over other images
    assert torch.equal(permuted(images).tokens, asked["permuted"](images).tokens)


@pytest.mark.parametrize("card, message", [
    ({"dataset": None}, "does not say what it was taught on"),
    ({"dataset": "folder:/nowhere/at/all"}, "folder:/nowhere/at/all, which cannot be loaded"),
])  # fmt: skip
def test_centred_is_refused_without_images(tmp_path, card, message):
    name = folder_with(tmp_path, **card)
    assert load_teacher(f"{name}?positionless").grid == 4
    with pytest.raises(ValueError, match=message):
        load_teacher(f"{name}?centred")


@pytest.mark.parametrize("name, message", [
    ("tiny-4x4?centered", "Did you mean 'centred'"),
    ("tiny?", "unknown option of teacher 'tiny?' ''"),
    ("tinny?centred", "unknown teacher 'tinny?centred'"),
    ("oracle?permuted", "unknown teacher 'oracle?permuted'"),
])  # fmt: skip
def test_what_does_not_exist_is_told(name, message):
    for load in (load_teacher, lambda name: expected_teacher(name, 32, 4)):
        with pytest.raises(ValueError) as error:
            load(name)
        assert message in str(error.value)
