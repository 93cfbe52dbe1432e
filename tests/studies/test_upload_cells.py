"""A picture of one's own through both lenses, by the handler of the cell and without a browser."""

import html
from datetime import datetime
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from maskalign_lab.gradient_norms import observe
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.studies.gradient_norms import film as norms
from maskalign_lab.studies.gradient_norms.arms import Scale
from maskalign_lab.studies.upload_cells import depth_lens, norms_lens, picture_of, shown_through
from maskalign_lab.workbench.plots import png
from maskalign_lab.workbench.upload import Upload

SMALL = "data.n=64 training.steps=2 training.warmup=1"


def photograph(width=80, height=60):
    file = BytesIO()
    slope = np.uint8(np.mgrid[:height, :width].sum(0)[..., None] + [0, 60, 100])
    Image.fromarray(slope).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {
        name: train(make_recipe(name, "smoke", overrides=SMALL), folder / name, "cpu", 0) for name in ("repa", "reg")
    }
    return {name: load_run(path) for name, path in made.items()}


def lens_of(kind, run):
    return norms_lens([observe(run)], Scale(40, 3)) if kind == "norms" else depth_lens([run], 3, 40)


@pytest.mark.parametrize("name", ["repa", "reg"])
@pytest.mark.parametrize("kind", ["norms", "depth"])
def test_a_picture_is_seen_through_a_lens(kind, name, runs):
    lens = lens_of(kind, runs[name])
    scrubber = lens(photograph(), "my desk")
    shown = scrubber.view(**scrubber.defaults())
    pictures = [panel for panel in shown.panels if hasattr(panel, "pixels")]
    assert pictures[0].title == "my desk"
    assert np.array_equal(pictures[0].pixels, picture_of(runs[name], photograph()).pixels[0])
    assert all(np.isfinite(panel.values).all() for panel in shown.panels if hasattr(panel, "values"))
    assert png(scrubber.strip())


def test_a_run_is_surveyed_when_a_picture_comes_and_only_once(runs, monkeypatch):
    """A notebook under papermill opens the lens, and nobody uploads anything."""
    asked = []
    survey_of = norms.survey_of
    monkeypatch.setattr(norms, "survey_of", lambda *given: asked.append(given) or survey_of(*given))
    lens = lens_of("norms", runs["repa"])
    assert not asked
    assert [len(lens(photograph(width)).strip().axes) > 0 and len(asked) for width in (80, 200)] == [1, 1]


def test_another_picture_has_other_maps_and_the_same_heat(runs):
    lens = lens_of("depth", runs["repa"])
    one, other = (lens(photograph(width)).view(0, 0, 1, 1) for width in (80, 200))
    assert np.array_equal(one.panels[0].values, other.panels[0].values)
    assert not np.array_equal(one.panels[3].values, other.panels[3].values)


def test_the_handler_of_the_cell(runs):
    cell = Upload(shown_through(lens_of("norms", runs["repa"])))

    def choose(name, content):
        told = {"type": "", "size": len(content), "last_modified": datetime(2026, 1, 1)}
        cell.button.value = ({"name": name, "content": memoryview(content), **told},)

    choose("desk.jpg", photograph())
    assert len(cell.shown.children) == 1 and cell.error.value == ""
    for name, content, message in (
        ("notes.txt", b"not a picture", "'notes.txt' cannot be read as a picture: it is none"),
        ("icon.png", photograph(16, 16), "'icon.png' has 16 x 16 pixels, and the network sees 32 x 32"),
    ):
        choose(name, content)
        assert message in html.unescape(cell.error.value) and cell.shown.children == ()
    choose("desk.jpg", photograph())
    assert len(cell.shown.children) == 1 and cell.error.value == ""


def test_a_network_of_latents_sees_it_too(tmp_path, own_folders):
    overrides = f"{SMALL} data.autoencoder=tiny data.teacher=tiny-4x4 network.patch_size=2 method.depth=1"
    run = load_run(train(make_recipe("repa", "smoke", overrides=overrides), tmp_path / "run", "cpu", print_every=0))
    shown = depth_lens([run], 2, 40)(photograph()).view(0, 0, 0, 0)
    assert shown.panels[3].values.shape == (4, 4) and shown.panels[2].pixels.shape == (32, 32, 3)


def test_the_oracle_has_no_word_on_a_photograph(tmp_path, own_folders):
    run = load_run(
        train(make_recipe("repa", "smoke", overrides=f"{SMALL} data.teacher=oracle"), tmp_path / "run", "cpu", 0)
    )
    with pytest.raises(ValueError, match="the oracle needs exact masks; dataset 'own picture' has none"):
        lens_of("depth", run)(photograph())
