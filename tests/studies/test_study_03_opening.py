"""Study 03 is opened by one call, in every way that its parameters allow."""

import inspect
from dataclasses import replace

import pytest

from maskalign_lab.base import paths
from maskalign_lab.runs.experiments import load_rows
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.prediction_targets import opening
from maskalign_lab.studies.prediction_targets.arms import SCALES, film_arms, sheet_arms, target_arm
from maskalign_lab.studies.prediction_targets.film import load_film
from maskalign_lab.studies.prediction_targets.opening import Study, open_study, rows_of
from maskalign_lab.workbench.study_parameters import study_parameters

NOTEBOOK = paths.notebooks() / "03_prediction_targets.ipynb"
DEFAULTS = {parameter.name: parameter.default for parameter in study_parameters(NOTEBOOK).values()}


def opened(**given) -> Study:
    return open_study(**DEFAULTS | given)


@pytest.fixture
def filmed(monkeypatch):
    """What would be trained for a film, in place of the training."""
    calls = []
    monkeypatch.setattr(opening, "trained_film", lambda *given: calls.append(given) or "a film")
    return calls


@pytest.fixture
def trained(monkeypatch):
    """What would be trained for a table, in place of the training."""
    calls = []
    monkeypatch.setattr(opening, "run_arms", lambda *given: calls.append(given) or ["a row"])
    return calls


def test_the_call_takes_every_parameter_of_the_study_by_name():
    known = inspect.signature(open_study).parameters
    assert set(known) == set(DEFAULTS)
    assert all(each.kind is each.KEYWORD_ONLY and each.default is each.empty for each in known.values())
    with pytest.raises(TypeError, match="presett"):
        opened(presett="smoke")


def test_the_film_that_ships_is_shown_with_the_laptops_settings(filmed, capsys):
    study, film = opened(), load_film(paths.data() / "results" / "03_film.npz")
    assert study.film.outputs.keys() == film.outputs.keys() and study.film.errors == film.errors
    assert study.count == 0 and study.scale is SCALES["laptop"] and not filmed and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "given",
    [{"preset": "smoke"}, {"seeds": 2}, {"dataset": "digits"}, {"overrides": "training.steps=7"}, {"preset": "gpu"}],
)
def test_any_other_settings_train_the_networks_of_their_film(given, filmed, tmp_path):
    study = opened(**given, seed=4, device="cpu", out_dir=str(tmp_path))
    ((recipes, device, keep),) = filmed
    assert study.film == "a film" and (device, keep) == ("cpu", tmp_path / "03_film.npz")
    assert recipes.keys() == film_arms(study.preset, study.seeds).keys()
    for recipe in recipes.values():
        assert recipe.training.seed == 4 and recipe.data.name == study.dataset
        assert (recipe.training.steps == 7) is ("overrides" in given)


def test_a_run_that_is_named_is_looked_at_whatever_the_preset(filmed, tmp_path):
    recipe = SCALES["smoke"].recipe_of("smoke", "shapes")(target_arm("v", "v", 32), 0)
    path = train(recipe, tmp_path / "mine", "cpu", 0)
    study = opened(run=str(path), preset="gpu", device="cpu")
    assert list(study.film.outputs) == [("v", "v", 32)] and not filmed
    assert study.film.labels == opening.film_of_run(load_run(path)).labels


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'laptp'. Did you mean 'laptop'"):
        opened(preset="laptp")


@pytest.mark.parametrize(
    ("given", "answered"),
    [({}, True), ({"seeds": 1}, False), ({"preset": "smoke"}, False), ({"dataset": "digits"}, False)],
)
def test_a_seed_that_nothing_is_trained_with_is_not_passed_over_in_silence(given, answered, filmed, capsys):
    opened(seed=3, **given)
    assert ("seed 3 is not used" in capsys.readouterr().out) is answered


def test_files_are_kept_where_there_is_a_folder(tmp_path):
    assert opened().kept_in("03_rows.json") is None
    assert replace(opened(), out_dir=str(tmp_path)).kept_in("03_rows.json") == tmp_path / "03_rows.json"


def test_a_table_that_ships_is_read_and_one_that_does_not_is_empty(trained, filmed, capsys):
    study = opened()
    rows = rows_of(study, "03_targets", "03_rows.json", study.scale.arms, study.recipe_of)
    assert rows == load_rows(paths.data() / "results" / "03_targets_shapes.json") and not trained
    digits = opened(dataset="digits")
    assert rows_of(digits, "03_targets", "03_rows.json", digits.scale.arms, digits.recipe_of) == []
    assert "No rows of 03_targets ship for preset 'laptop', dataset 'digits'" in capsys.readouterr().out


@pytest.mark.parametrize(("dataset", "samples"), [("shapes", 256), ("digits", 0)])
def test_a_table_is_trained_with_as_many_seeds_as_asked_for(dataset, samples, trained, filmed, tmp_path):
    study = opened(seeds=2, dataset=dataset, device="cpu", out_dir=str(tmp_path))
    rows = rows_of(study, "03_targets", "03_rows.json", study.scale.arms, study.recipe_of)
    ((arms, seeds, recipe_of, baseline, measure, known, keep, device),) = trained
    assert rows == ["a row"] and (arms, seeds, baseline, device) == (study.scale.arms, range(2), None, "cpu")
    assert measure.keywords == {"images": 256, "samples": samples} and keep == tmp_path / "03_rows.json"
    assert len(known) == (156 if dataset == "shapes" else 0) and recipe_of is study.recipe_of
    rows_of(study, "03_longer", "03_longer.json", [], opening.longer_recipe_of(study), seeds=1)
    assert trained[1][1] == range(1) and trained[1][2](target_arm("x"), 0).training.steps == 4000


def test_the_toy_ships_unless_everything_is_trained(filmed, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(opening, "survey_toy", lambda cases, keep: calls.append((cases, keep)) or ["a row"])
    assert len(opening.toy_tables(opened())[0]) == len(opening.toy_tables(opened(seeds=1))[0]) == 277 and not calls
    rows, flows = opening.toy_tables(opened(preset="gpu", seeds=1, out_dir=str(tmp_path)))
    ((cases, keep),) = calls
    assert (rows, flows, keep) == (["a row"], {}, tmp_path / "03_manifold.json") and {case.seed for case in cases} == {
        0
    }
    opening.toy_tables(opened(preset="gpu"))
    assert len(calls[1][0]) == 277 and calls[1][1].parent == paths.cache()


def test_samples_ship_for_the_laptops_settings_alone(filmed):
    study = opened()
    assert opening.sample_sheets(study).keys() == sheet_arms(study.scale).keys()
    assert opening.sample_sheets(opened(dataset="digits")) == {}


def test_fits_of_one_image_are_as_many_as_the_seeds(filmed, monkeypatch):
    monkeypatch.setattr(opening, "one_image_rows", lambda image_of, cases, keep: [case.seed for case in cases])
    assert len(opening.one_image_table(opened())) == len(opening.one_image_table(opened(preset="smoke"))) == 90
    assert opening.one_image_table(opened(seeds=1)) == [0] * 30
