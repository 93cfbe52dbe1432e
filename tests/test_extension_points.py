"""What people want to change, each in one place: what is put there is what trains and samples.

The rows are those of the table "Where do I change what?" in README.md. How a notebook's own definitions are told apart: runs/test_edits.py.
"""

import json
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from shared.clone import ROOT

from maskalign_lab.base import averaging
from maskalign_lab.base.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.cli import main
from maskalign_lab.diffusion import guidance
from maskalign_lab.diffusion.guidance import is_guided
from maskalign_lab.diffusion.interpolants import INTERPOLANTS, TARGETS, Coefficients, Target
from maskalign_lab.diffusion.objectives import TIME_LAWS, TimeLaw
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.diffusion.solvers import SOLVERS, Solver, even_times
from maskalign_lab.encoders import teachers
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import NETWORKS, SiTConfig, from_json, identity, to_json
from maskalign_lab.runs.run import Run, load_run, train
from maskalign_lab.runs.sizes import DEPTHS
from maskalign_lab.training.methods import INSTALLED, METHODS, Losses, PlainSiT, denoise
from maskalign_lab.workbench.commands import COMMANDS, command

pytestmark = pytest.mark.usefixtures("own_folders")
TINY = "network.width=16 network.depth=2 network.heads=2 data.n=32 training.batch_size=8 training.warmup=1 training.steps=3"


@dataclass
class Greet:
    """Say hello."""

    name: str = "all"


def trained(tmp_path, method="sit", overrides="", name="run", dataset="shapes") -> Run:
    aligned = " method.projector_width=16" if method == "repa" else ""
    recipe = make_recipe(method, "smoke", dataset, overrides=f"{TINY}{aligned} {overrides}")
    assert from_json(to_json(recipe)) == recipe
    return load_run(train(recipe, tmp_path / name, "cpu", 0))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_tensors(step_folder(run.path), "model")


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def log(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def test_another_time_law(tmp_path):
    """Times near the noise only; it names itself in the recipe, trains, and its density decides what is refused."""
    drawn = []

    def late(objective, n, generator):
        drawn.append(t := 0.5 + 0.5 * torch.rand(n, generator=generator))
        return t

    with patch.dict(TIME_LAWS, late=TimeLaw(late, lambda objective, t: 2.0 * (t >= 0.5))):
        trained(tmp_path, overrides="objective.time_law=late objective.prediction=x objective.loss_space=v")
        with pytest.raises(ValueError, match="late times come that near"):  # the density is not 0 at the noisy end
            trained(tmp_path, overrides="objective.time_law=late objective.prediction=eps", name="refused")
    assert len(drawn) == 3 and min(t.min() for t in drawn) >= 0.5
    with pytest.raises(ValueError, match="unknown time_law 'late'"):
        make_recipe("sit", overrides="objective.time_law=late")


def test_a_new_solver(tmp_path):
    """A step and a grid; every name in the table can be asked for, and one that is not there cannot."""
    visited = []

    def ralston(field, x, t, t_next, draw):
        visited.append(t)
        h, slope = t_next - t, field(x, t, t)
        return x + h / 4 * (slope + 3 * field(x + 2 / 3 * h * slope, t + 2 / 3 * h, t))

    run, y = trained(tmp_path), torch.arange(4)
    with patch.dict(SOLVERS, ralston=Solver(ralston, lambda config: even_times(config)[::2])):
        samples = last_sample(run.net, run.recipe.objective, y, SamplerConfig("ralston", steps=4))
    assert visited == [1.0, 0.5] and samples.isfinite().all()
    with pytest.raises(ValueError, match="unknown solver 'ralston'"):
        SamplerConfig("ralston")


def test_a_size_by_its_name(tmp_path):
    """What else is said wins; the depth that is aligned follows, from a table."""
    small = "network=SiT-S/8 network.width=16 network.depth=2 network.heads=2 network.patch_size=4"
    with patch.dict(DEPTHS, {"": {"S": 1}}):
        run = trained(tmp_path, "repa", small)
    assert run.net.width == 16 and run.method.config.depth == 1
    assert make_recipe("repa", "smoke", overrides="network=SiT-S/8").method.depth == 4


def test_a_new_network(tmp_path):
    """A class and its settings, which may be another one's."""

    class Deaf(SiT):
        def embed(self, x, t, y, cls=None):
            return super().embed(x, t, torch.full_like(y, self.num_classes), cls)

    with patch.dict(NETWORKS, deaf=(Deaf, SiTConfig)):
        run = trained(tmp_path, overrides="network.name=deaf", name="deaf")
        assert isinstance(run.net, Deaf) and run.recipe.network.name == "deaf"
    assert differ(weights(run), weights(trained(tmp_path)))
    with pytest.raises(ValueError, match="unknown network 'deaf'"):
        make_recipe("sit", overrides="network.name=deaf")


def test_another_path(tmp_path):
    """Noise that comes late: alpha = 1 - t^2, sigma = t^2."""

    def late(t):
        return Coefficients(1 - t**2, t**2, -2 * t, 2 * t)

    with patch.dict(INTERPOLANTS, late=late):
        run = trained(tmp_path, overrides="objective.interpolant=late", name="late")
        samples = last_sample(run.net, run.recipe.objective, torch.arange(4), SamplerConfig(steps=2))
    assert samples.isfinite().all() and differ(weights(run), weights(trained(tmp_path)))


def test_an_ema_ramp(tmp_path, monkeypatch):
    plain = trained(tmp_path, name="plain")
    monkeypatch.setattr(averaging, "decay_at", lambda decay, step: 0.0)  # no memory at all
    ramped = trained(tmp_path, name="ramped")
    model, ema = (load_tensors(step_folder(ramped.path), name) for name in ("model", "ema"))
    assert not differ(model, ema) and differ(model, load_tensors(step_folder(plain.path), "ema"))
    full = trained(tmp_path, overrides="training.ema_ramp=false", name="full")  # asks for no ramp
    slow, quick = (load_tensors(step_folder(run.path), "ema") for run in (full, plain))
    assert differ(slow, quick) and not differ(weights(full), weights(plain))


def test_a_new_teacher(tmp_path):
    """One loader under a prefix: here the tiny teacher with its channels in another order."""

    def reversed_tiny(name, size, grid):
        teacher = teachers.load_teacher("tiny")
        teacher.name, teacher.digest = name, "reversed"
        teacher.register_forward_hook(lambda module, given, out: type(out)(out.tokens.flip(-1), out.cls.flip(-1)))
        return teacher

    with patch.dict(teachers.LOADERS, mirror=reversed_tiny):
        mirrored = trained(tmp_path, "repa", "data.teacher=mirror:", "mirrored")
    plain = trained(tmp_path, "repa", "", "plain")
    assert json.loads((mirrored.path / "facts.json").read_text())["teacher_digest"] == "reversed"
    assert differ(weights(mirrored), weights(plain))


def test_the_rule_of_the_guidance_interval(tmp_path, monkeypatch):
    run, y, config = trained(tmp_path), torch.arange(4), SamplerConfig("euler", steps=4, guidance=3.0)
    for p in run.net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    always, asked = last_sample(run.net, run.recipe.objective, y, config), []
    monkeypatch.setattr(guidance, "is_guided", lambda config, t: asked.append(t) or False)
    never = last_sample(run.net, run.recipe.objective, y, config)
    assert asked == [1.0, 0.75, 0.5, 0.25] and is_guided(config, 0.5) and not torch.equal(always, never)


def test_a_new_prediction_target(tmp_path):
    """The angular velocity: trained with a loss on v, sampled by an ordinary solver."""
    with patch.dict(TARGETS, angular=Target(lambda c: (-c.sigma, c.alpha), "alpha^2 + sigma^2")):
        run = trained(tmp_path, overrides="objective.prediction=angular objective.loss_space=v")
        assert last_sample(run.net, run.recipe.objective, torch.arange(4), SamplerConfig(steps=2)).isfinite().all()


def test_a_new_loss(tmp_path):
    """A method of one's own: a class with a name. The definition that is there last is what trains."""
    with patch.dict(METHODS), patch.dict(INSTALLED):

        class Louder(PlainSiT, name="louder"):
            def loss(self, state, batch, draw, phase="main"):
                denoising = denoise(self, state.model, batch, draw).denoising
                return Losses(denoising + denoising.square(), {"denoising": denoising})

        assert differ(weights(trained(tmp_path, "louder", "", "louder")), weights(trained(tmp_path, "sit", "", "sit")))


def test_the_norm_of_the_projectors_gradient_is_logged(tmp_path):
    last = log(trained(tmp_path, "repa"))[-1]
    assert last["method_norm"] > 0
    assert last["gradient_norm"] == pytest.approx(
        (last["network_norm"] ** 2 + last["method_norm"] ** 2) ** 0.5, rel=1e-4
    )


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        ("method.depth=(1,2)", [(1, 0), (2, 0)]),
        ("data.teacher=tiny,oracle", [(2, 0), (2, 1)]),
        ("data.teacher=oracle,tiny method.depth=(2,1)", [(2, 0), (1, 1)]),
    ],
)
def test_a_second_aligned_layer_or_teacher(overrides, pairs, tmp_path):
    """A recipe, not a copy of a method: it trains, resumes, loads, and is another run."""
    run = trained(tmp_path, "repa", overrides)
    assert run.method.pairs == pairs and len(run.method.projectors) == 2
    plain = make_recipe("repa", "smoke", overrides=f"{TINY} method.projector_width=16")
    assert identity(run.recipe) != identity(plain)
    longer = make_recipe("repa", "smoke", overrides=f"{TINY} method.projector_width=16 {overrides}")
    assert identity(longer) == identity(run.recipe)
    assert log(run)[-1]["alignment"] < 0 or log(run)[-1]["alignment"] == pytest.approx(0, abs=1)


def test_three_depths_for_two_teachers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one of either, or equally many"):
        trained(tmp_path, "repa", "data.teacher=tiny,oracle network.depth=3 method.depth=(1,2,3)")


def test_a_command(capsys):
    """Options are a dataclass, and its docstring is the help."""
    with patch.dict(COMMANDS):

        @command("greet", Greet)
        def run_greet(options: Greet) -> int:
            print(f"hello {options.name}")
            return 0

        assert main(["greet", "--name", "you"]) == 0
        assert capsys.readouterr().out == "hello you\n"
    assert main(["greet"]) == 2 and "unknown command 'greet'" in capsys.readouterr().err


def test_a_plain_folder(tmp_path):
    from PIL import Image

    for k in range(12):
        (folder := tmp_path / "images" / "train" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * k, 100, 50)).save(folder / f"{k}.png")
    run = trained(tmp_path, dataset=f"folder:{tmp_path / 'images' / 'train'}", overrides="data.n=none")
    assert run.net.num_classes == 2


def test_resume(tmp_path):
    whole = trained(tmp_path, overrides="training.steps=6", name="whole")
    short = make_recipe("sit", "smoke", overrides=f"{TINY} training.steps=6 training.save_every=2 execution.keep=3")
    train(short, tmp_path / "halves", "cpu", 0)
    for step in steps_of(tmp_path / "halves")[1:]:
        for file in (tmp_path / "halves" / "steps" / f"{step:06d}").iterdir():
            file.unlink()
    resumed = load_run(train(short, tmp_path / "halves", "cpu", 0))
    assert not differ(weights(whole), weights(resumed))


ROWS = {
    "another law of times": test_another_time_law,
    "a new solver": test_a_new_solver,
    "a size by its name": test_a_size_by_its_name,
    "a new network": test_a_new_network,
    "another path from noise to data": test_another_path,
    "an EMA ramp": test_an_ema_ramp,
    "a new teacher": test_a_new_teacher,
    "another rule for the guidance interval": test_the_rule_of_the_guidance_interval,
    "a new prediction target": test_a_new_prediction_target,
    "a new loss": test_a_new_loss,
    "to log something, such as the projector's gradient norm": test_the_norm_of_the_projectors_gradient_is_logged,
    "a second aligned layer, or a second teacher": test_a_second_aligned_layer_or_teacher,
    "a command of `maskalign-lab`": test_a_command,
    "my own folder of images": test_a_plain_folder,
    "to stop and go on": test_resume,
}


def test_every_row_of_the_readme_has_its_test_here():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Where do I change what") :].split("\n## ")[0]
    rows = [[part.strip() for part in line.split("|")] for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == list(ROWS)
    for row in rows:
        assert all((ROOT / part).exists() for part in row[2].split("`") if part.startswith("nbs/")), row[2]
