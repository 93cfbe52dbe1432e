"""Seeds of an arm that are trained at once: the runs and rows that they have one after the other, and what is told if that cannot be."""

import json

import pytest
import torch

from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.runs import experiments, side_by_side, watching
from maskalign_lab.runs.experiments import Arm, run_arms
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import cached_place, ensure_run, kept_run, train
from maskalign_lab.runs.side_by_side import train_side_by_side
from maskalign_lab.training import health
from maskalign_lab.training import side_by_side as training
from maskalign_lab.training.health import look_at

pytestmark = pytest.mark.usefixtures("own_folders")
SEEDS = (0, 1, 2)
FEW = "data.n=32 network.width=16 network.depth=2 training.batch_size=8 training.steps=4 training.warmup=1 training.log_every=1"
ALIGNED = "method.depth=1 method.projector_width=16"
LATENT = "data.autoencoder=tiny data.size=64 network.patch_size=2"


def recipes(method="repa", more=ALIGNED, seeds=SEEDS):
    return [make_recipe(method, "smoke", seed=s, overrides=f"{FEW} training.precision=float32 {more}") for s in seeds]


def content(run, step=None):
    folder = step_folder(run, step)
    return {file.stem: load_tensors(folder, file.stem) for file in sorted(folder.glob("*.safetensors"))}


def same(run, other, step=None, **bounds):
    """Two runs' checkpoints: the same files and names, and numbers within bounds."""
    one, two = content(run, step), content(other, step)
    assert one.keys() == two.keys()
    for file, values in one.items():
        for name, value in values.items():
            torch.testing.assert_close(two[file][name], value, **bounds)


def placed(given):
    return [cached_place(recipe) for recipe in given]


# ---- the same runs


@pytest.mark.parametrize(
    ("method", "more"), [("repa", ALIGNED), ("reg", f"{ALIGNED} {LATENT}"), ("sit", "data.n=9 network.qk_norm=true")]
)
def test_runs_are_those_of_single_trainings(method, more, tmp_path):
    """On pixels, on latents with their own posterior noise, and with epochs that end within a batch."""
    train_side_by_side(given := recipes(method, more), "cpu")
    for recipe, run in zip(given, placed(given), strict=True):
        alone = train(recipe, tmp_path / str(recipe.training.seed), "cpu")
        assert kept_run(recipe) == run and ensure_run(recipe, "cpu").path == run
        files = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (alone, run)]
        assert files[0] == files[1]
        for name in ("recipe.json", "facts.json", "latest"):
            assert (run / name).read_text() == (alone / name).read_text()
        same(alone, run, rtol=1e-3, atol=1e-5)
        one, other = (
            [json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()] for each in (alone, run)
        )
        assert [line.keys() for line in one] == [line.keys() for line in other]
        assert [line["denoising"] for line in other] == pytest.approx([line["denoising"] for line in one], rel=1e-4)


def test_rows_of_arms_are_those_of_single_trainings(monkeypatch, tmp_path):
    arms = (Arm("SiT", "sit"), Arm("REPA", "repa", ALIGNED))

    def rows(name, together):
        monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / name))
        return run_arms(arms, SEEDS, recipe_of, "SiT", weight, device="cpu", early=(0.5,), side_by_side=together)

    def recipe_of(arm, seed):
        return arm.recipe("smoke", seed=seed, overrides=f"{FEW} training.precision=float32")

    def weight(run):
        return {"sum": run.net.final_layer.linear.weight.abs().sum().item()}

    alone, together = rows("alone", False), rows("together", True)
    names = ("arm", "seed", "identity", "relative_flops", "budget", "step")
    assert [[row[name] for name in names] for row in together] == [[row[name] for name in names] for row in alone]
    assert [row["sum"] for row in together] == pytest.approx([row["sum"] for row in alone], rel=1e-3)
    assert len({row["sum"] for row in together}) == len({(row["arm"], row["seed"], row["step"]) for row in together})


@pytest.mark.parametrize(
    ("device", "asked", "calls"), [("cpu", None, 0), ("cpu", True, 1), ("cuda", None, 1), ("cuda", False, 0)]
)
def test_a_gpu_trains_seeds_at_once_unless_told_otherwise(monkeypatch, device, asked, calls):
    found = []
    monkeypatch.setattr(experiments, "resolve_device", lambda name: torch.device(name))
    monkeypatch.setattr(experiments, "train_side_by_side", lambda each, *_, **__: found.append(len(each)))
    monkeypatch.setattr(experiments, "arm_rows", lambda *_: [])
    run_arms(
        (Arm("SiT", "sit"),),
        SEEDS,
        lambda arm, seed: arm.recipe("smoke", seed=seed),
        None,
        dict,
        (),
        None,
        device,
        (),
        asked,
    )
    assert found == calls * [len(SEEDS)]


# ---- stopped, and partly there


def stop_after(monkeypatch, step):
    """The training is interrupted once a step is logged."""
    logs = side_by_side.with_logs

    def stopping(*given):
        for each in logs(*given):
            yield each
            if each[0].step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "with_logs", stopping)


def test_what_was_stopped_goes_on_and_what_is_finished_is_left_alone(monkeypatch, tmp_path):
    given = recipes(more=f"{ALIGNED} training.steps=6 training.save_every=2")
    done = ensure_run(given[1], "cpu").path
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 5)
        train_side_by_side(given, "cpu")
    assert [steps_of(run)[-1] for run in placed(given)] == [4, 6, 4]
    train_side_by_side(given, "cpu")
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    for run in placed(given):
        assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "other"))
    train_side_by_side([given[0], given[2]], "cpu")
    for recipe, run in zip(given, [tmp_path / "cache" / "runs" / cached_place(each).name for each in given]):
        if recipe is not given[1]:
            same(cached_place(recipe), run, rtol=0, atol=0)


def test_a_folder_that_is_further_is_not_taken_back(monkeypatch, capsys):
    given = recipes(more=f"{ALIGNED} training.steps=6 training.save_every=2")
    longer, logged = placed(given)[0], watching.with_log

    def stopping(*told):
        for step in logged(*told):
            yield step
            if step.step == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(watching, "with_log", stopping)
        train(given[0], longer, "cpu")
    train_side_by_side(given, "cpu")
    assert steps_of(longer) == [2, 4] and "training seeds [1, 2] side by side" in capsys.readouterr().out
    assert all(kept_run(recipe) for recipe in given[1:]) and ensure_run(given[0], "cpu").step == 6


# ---- what cannot be


def test_recipes_of_other_settings_are_refused_before_any_work():
    with pytest.raises(ValueError, match="differ in .*'training': .*'lr': 0.0003"):
        train_side_by_side([recipes()[0], recipes(more=f"{ALIGNED} training.lr=3e-4")[1]], "cpu")
    assert not (paths.cache() / "runs").exists()


def test_a_bilevel_router_is_left_to_single_trainings(capsys):
    given = recipes("ahpa", "method.depth=1 method.projector_width=16 method.router=bilevel")
    train_side_by_side(given, "cpu")
    told = capsys.readouterr().out
    assert (
        "seeds [0, 1, 2] are trained one after the other, because router=bilevel takes gradients within the loss"
        in told
    )
    assert not any(run.exists() for run in placed(given))


def test_seeds_that_do_not_fit_at_once_are_halved(monkeypatch, capsys):
    fit, tried = side_by_side.fit_side_by_side, []

    def small(pairs, *given):
        tried.append(len(pairs))
        if len(pairs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(pairs, *given)

    monkeypatch.setattr(side_by_side, "fit_side_by_side", small)
    train_side_by_side(given := recipes(seeds=range(4)), "cpu")
    assert tried == [4, 2, 2] and all(kept_run(recipe) for recipe in given)
    assert "seeds [0, 1, 2, 3] do not fit into the memory" in capsys.readouterr().out


def test_a_seed_that_is_not_finite_is_left_to_its_own_error(monkeypatch, capsys):
    draw = training.SideBySide.draw

    def spoilt(self, whole, step, device):
        found = draw(self, whole, step, device)
        for k, seed in enumerate(self.seeds):
            if (seed, step) == (1, 2):
                found.noise[k] /= 0
        return found

    monkeypatch.setattr(training.SideBySide, "draw", spoilt)
    train_side_by_side(given := recipes(), "cpu")
    assert [kept_run(recipe) is not None for recipe in given] == [True, False, True]
    assert "step 3: not finite, of seed 1; the others go on without" in capsys.readouterr().out


# ---- an eye on the first of them


def test_the_first_seed_is_looked_at_as_a_single_training_is(monkeypatch, tmp_path):
    """Its losses over t behind the first step are those of the network that trains alone."""
    looks = []
    monkeypatch.setattr(health, "look_at", lambda *given: looks.append(look_at(*given)) or looks[-1])
    train_side_by_side(given := recipes(seeds=SEEDS[:2]), "cpu")
    train(given[0], tmp_path / "alone", "cpu")
    (together, alone) = (look.losses["as it is"] for look in looks)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_the_data_is_told_of_seeds_side_by_side_too(monkeypatch, capsys):
    monkeypatch.setattr(health, "WIDEST", 1.0)  # no latents are so well normalised
    train_side_by_side(given := recipes("reg", f"{ALIGNED} {LATENT}", SEEDS[:2]), "cpu")
    assert capsys.readouterr().out.count("latents are not normalised") == 1
    first, other = (path / "health.jsonl" for path in placed(given))
    assert json.loads(first.read_text())["name"] == "latents" and not other.exists()
