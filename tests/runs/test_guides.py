"""Samples that go away from a weaker run: they are the library's, are told apart from others, and go on after a stop."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from shared.sampled import PLAIN, eye, plan, random_run

from maskalign_lab.cli import main
from maskalign_lab.diffusion import sampling
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.runs import sampling_shards
from maskalign_lab.runs.fidelity_evaluation import evaluate, evaluated_text, reference_of
from maskalign_lab.runs.guides import check_guide, load_guide
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.sample_plan import labels_of, made_from, plan_of, to_bytes
from maskalign_lab.runs.sampling_shards import BLOCK, Drawer, kept_samples, samples_folder

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    random_run(folder / "small", seed=2, step=3)
    return random_run(folder / "small")


@pytest.fixture(scope="module")
def weak(folder):
    return random_run(folder / "weak", seed=1, overrides="network.width=16 objective.time_shift=3.0")


# ---- samples


@pytest.mark.parametrize("step", [None, 3])
def test_the_grid_holds_what_the_library_draws_with_that_guide(run, weak, tmp_path, monkeypatch, step):
    drawn = []
    monkeypatch.setattr(sampling, "last_sample", lambda *of, **more: drawn.append(last_sample(*of, **more)) or drawn[0])
    spec = str(weak.path) if step is None else f"{run.path}@{step}"
    few = ["--classes", "1", "7", "--n", "2", "--steps", "2", "--guidance", "1.5", "--precision", "float32"]
    words = ["sample", str(run.path), *few, "--device", "cpu", "--out", str(tmp_path / "grid.png")]
    assert main([*words, "--guide", spec]) == 0
    guide = weak if step is None else load_run(run.path, step)
    config, y = SamplerConfig("heun", 2, 1.5, precision="float32"), torch.tensor([1, 1, 7, 7])
    assert torch.equal(drawn[0], last_sample(run.net, run.recipe.objective, y, config, guide=guide.net))
    assert not torch.allclose(drawn[0], last_sample(run.net, run.recipe.objective, y, config), atol=0.01)


def test_a_block_holds_what_the_library_draws_with_that_guide(run, weak):
    y = labels_of(range(BLOCK), 10, "balanced", 0)
    x = last_sample(run.net, run.recipe.objective, y, PLAIN, 0, numbers=range(BLOCK), guide=weak.net)
    assert torch.equal(Drawer(run, plan(guide=weak))(0, BLOCK), to_bytes(x, "nearest"))


def test_a_class_token_is_guided_too(folder):
    run, guide = (random_run(folder / f"reg{seed}", "reg", seed) for seed in (0, 1))
    check_guide(run, guide)
    assert not torch.equal(Drawer(run, plan(guide=guide))(0, 2), Drawer(run, plan())(0, 2))


# ---- files and rows


def evaluated(run, folder, *words):
    few = ["--n", "150", "--steps", "2", "--precision", "float32", "--shard-size", "64", "--no-figures"]
    return main(["evaluate", str(run.path), *few, "--samples", str(folder), "--device", "cpu", *words])


def test_a_stop_loses_nothing_and_no_other_guide_goes_on(run, weak, tmp_path, monkeypatch, capsys):
    guided, make = ["--guidance", "2", "--guide", str(weak.path)], sampling_shards.block_samples

    def stopped(*of):
        if of[-1] == 1:
            raise KeyboardInterrupt
        return make(*of)

    monkeypatch.setattr(sampling_shards, "block_samples", stopped)
    assert evaluated(run, tmp_path / "samples", *guided) == 130
    monkeypatch.undo()
    for other in ([], ["--guide", f"{run.path}@3"]):
        assert evaluated(run, tmp_path / "samples", *guided[:2], *other) == 2
        assert "was made with guide {'network'" in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*.safetensors")}
    assert len(before) == 1 and evaluated(run, tmp_path / "samples", *guided) == 0
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*.safetensors")}
    assert len(after) == 3 and before.items() <= after.items()
    asked = plan(150, guide=weak)
    assert torch.equal(kept_samples(run, asked, tmp_path / "samples")[:], Drawer(run, asked)(0, 150))


def test_folders_and_settings_name_the_guide(run, weak):
    plans = [plan_of(run, "repa", guide=guide) for guide in ("", str(weak.path), f"{run.path}@3")]
    assert [each.settings for each in plans] == ["repa", "repa, with guide=weak@5", "repa, with guide=small@3"]
    assert len({samples_folder(run, each) for each in plans}) == 3
    plain, *guided = (made_from(run, each) for each in plans)
    assert "guide" not in plain and all({**each, "guide": 0} == {**plain, "guide": 0} for each in guided)


def test_a_row_names_the_guide(run, weak, tmp_path):
    reference = reference_of(run, "validation", 12, most=40)
    rows = [
        evaluate(run, plan(20, guide=guide), tmp_path / str(guide and guide.name), eye(), reference, print_every=0)
        for guide in (weak, None)
    ]
    assert (rows[0]["guide"]["run"], rows[0]["guide"]["step"]) == ("weak", 5) and "guide" not in rows[1]
    assert "guidance 2 away from weak, step 5," in evaluated_text(rows[0])
    assert rows[0]["FID"] != rows[1]["FID"] and "away" not in evaluated_text(rows[1])


# ---- what does not fit


@pytest.mark.parametrize(
    ("method", "made", "message"),
    [
        ("repa", {"overrides": "data.size=32"}, "input (3, 32, 32): expected (3, 16, 16), as run 'small' has"),
        ("repa", {"num_classes": 9}, "number of classes 9: expected 10"),
        ("reg", {}, "channels of the class token 8: expected 0"),
        (
            "repa",
            {"overrides": "objective.prediction=x objective.loss_space=x"},
            "objective.prediction 'x': expected 'v'",
        ),
        ("repa", {"overrides": "objective.noise_scale=2.0"}, "objective.noise_scale 2.0: expected 1.0"),
        ("repa", {"overrides": "objective.interpolant=cosine"}, "objective.interpolant 'cosine': expected 'linear'"),
    ],
)
def test_a_guide_that_sees_or_says_something_else_is_refused(run, tmp_path, method, made, message):
    guide = random_run(tmp_path / "other", method, **made)
    with pytest.raises(ValueError) as error:
        load_guide(run, str(guide.path), PLAIN)
    assert str(error.value).startswith("guide 'other@5' has ") and message in str(error.value)
    assert f"an earlier step of the run itself fits, such as {run.path}@3" in str(error.value)


def test_other_classes_and_other_latents_of_the_same_shape_are_refused(run, tmp_path):
    cats, dogs = (
        random_run(tmp_path / name, classes=tuple(f"{name}{k}" for k in range(10))) for name in ("cat", "dog")
    )
    with pytest.raises(ValueError, match="guide 'dog@5' has classes"):
        check_guide(cats, dogs)
    check_guide(run, dogs)  # a run that does not tell its classes
    ours, theirs = replace(cats), replace(cats, path=tmp_path)
    for each, digest in ((ours, "a"), (theirs, "b")):
        each.autoencoder = SimpleNamespace(latents_digest=digest)
    with pytest.raises(ValueError, match="has latents 'b': expected 'a'"):
        check_guide(ours, theirs)


def test_a_network_that_makes_its_latents_shares_them_with_no_other(tmp_path):
    run = load_run("dsd-shapes")
    with pytest.raises(ValueError, match="has latents 'its own"):
        check_guide(run, replace(run, path=tmp_path))


def test_a_guide_that_would_do_nothing_is_refused(run, weak):
    with pytest.raises(ValueError, match="'weak@3' does nothing at guidance 1, which is off"):
        load_guide(run, "weak@3", replace(PLAIN, guidance=1.0))
    load_guide(run, str(weak.path), replace(PLAIN, guidance=1.0, class_guidance=2.0))
    with pytest.raises(
        ValueError, match="guide 'small@5' is the network that is sampled: expected a weaker one; an earlier"
    ):
        load_guide(run, f"{run.path}@5", PLAIN)
