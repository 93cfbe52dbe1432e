"""The images of a run: few, none held out, or of a data set that nobody named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskalign_lab.runs import evaluation
from maskalign_lab.runs import run as runs
from maskalign_lab.runs.evaluation import judge_samples, measure
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.studies.prediction_targets.film import make_film


def run_on_folder(path: Path, counts: dict[str, int]) -> runs.Run:
    """An untrained run on a split folder of so many images."""
    for name, count in counts.items():
        (path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(path / "images" / name / f"{number}.png")
    recipe, facts = make_recipe("sit", "smoke", f"folder:{path / 'images'}"), Facts(2, classes=("a", "b"))
    return runs.Run(path, recipe, facts, 1, *runs.build(recipe, facts))


def test_a_folder_that_holds_nothing_out_is_surveyed_by_its_training_images(tmp_path):
    run = run_on_folder(tmp_path, {"train/a": 3, "train/b": 3, "valid/a": 1})
    with pytest.raises(ValueError, match="expected two classes"):
        run.images("validation")
    assert run.survey_images(4).split == "train" and len(run.survey_images(4)) == 6


def test_a_folder_that_holds_out_three_images_is_looked_at_by_three(tmp_path):
    run = run_on_folder(tmp_path, {"train/a": 3, "train/b": 3, "valid/a": 2, "valid/b": 1})
    film = make_film({("v", "v", 32): run})
    assert film.labels == ["a", "b"] and np.isfinite(film.errors["v", "v", 32]).all()


def test_too_few_images_to_judge_by_are_counted_in_words(tmp_path, monkeypatch):
    run = run_on_folder(tmp_path, {"train/a": 3, "train/b": 3, "valid/a": 2, "valid/b": 1})
    monkeypatch.setattr(evaluation, "load_judge", lambda *given, **options: None)
    with pytest.raises(ValueError, match="to judge 2 samples takes 4 held-out images, and .* has 3"):
        judge_samples(run, 2)


def test_an_imported_run_that_names_no_data_or_no_autoencoder_says_what_to_do(tmp_path):
    recipe = make_recipe("sit", "smoke", overrides="data.name=latents")
    facts = Facts(10, channels=4)
    run = runs.Run(tmp_path, recipe, facts, 1, *runs.build(recipe, facts))
    with pytest.raises(ValueError, match="import it again with --dataset"):
        run.images()
    with pytest.raises(ValueError, match="import it again with --dataset"):  # and not to train a judge of "latents"
        measure(run, 8)
    with pytest.raises(ValueError, match="import it again with --autoencoder"):
        run.inputs(None)
