"""The images of a run: few, none held out, or of a data set that nobody named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskalign_lab.data import stored_images
from maskalign_lab.encoders.teachers import Teacher
from maskalign_lab.gradient_norms import fit_observer
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
    assert run.survey_images(6).split == "train" and len(run.survey_images(9)) == 6


def test_of_a_large_set_no_more_is_read_and_encoded_than_is_looked_at(tmp_path, monkeypatch):
    """Study 01 looks at n images, and fits an observer on a bounded number; a teacher sees these, and files are read for these alone."""
    run = run_on_folder(tmp_path, {"train/a": 20, "train/b": 20, "valid/a": 10, "valid/b": 10})
    seen, read = [], []
    monkeypatch.setattr(stored_images, "IN_MEMORY", 0)  # as with a set that does not fit: nothing is read beforehand
    monkeypatch.setattr(runs, "SEEN_TO_FIT", 12)
    monkeypatch.setattr(Teacher, "forward", counted(Teacher.forward, lambda self, images: seen.append(len(images))))
    reads = counted(stored_images.read_rows, lambda listing, rows, *rest: read.append(len(rows)))
    monkeypatch.setattr(stored_images, "read_rows", reads)
    few = run.survey_images(6)
    assert len(few) == 6 and few is run.survey_images(6) and few.split == "validation"
    run.teacher_view(few)
    assert sum(seen) == 6 and sum(read) == 6
    fit_observer(run, 1, steps=2)
    assert sum(seen) == 6 + 12 and sum(read) == 6 + 12 + 2 * 64  # the teacher's images, and two batches


def counted(function, note):
    """A function that notes what it is called with."""

    def called(*given, **named):
        note(*given)
        return function(*given, **named)

    return called


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
