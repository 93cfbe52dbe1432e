"""Seeds that are trained side by side are the seeds that are trained alone: losses, weights, files, wherever they are stopped."""

import json
import shutil
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from shared import survive
from shared.given import CASES, given, in_single, small
from shared.waits import Waits

from maskalign_lab.base.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Batch, Losses, MethodConfig, PlainSiT
from maskalign_lab.training.repa import REPA, REPAConfig
from maskalign_lab.training.side_by_side import (
    OnlyAlone,
    SeedsNotFinite,
    check_stackable,
    fit_side_by_side,
    in_step,
    with_logs,
)
from maskalign_lab.training.stopping import Guard

SEEDS = (0, 1, 2)
ALONE = [("ahpa", "method.router=bilevel"), ("dsd", "")]
STACKED = [case for case in CASES if case not in ALONE] + [
    ("maskalign", "network.mixer_radius=1"),
    ("dsd", "method.target=online"),
]


def noise(like: Batch, seed: int, step: int) -> Batch:
    """A batch of the same shapes for a seed and a step."""
    g = generator(seed, step, "batch")
    values = {f.name: v for f in fields(like) if f.name != "y" and (v := getattr(like, f.name)) is not None}
    drawn = {name: torch.randn(v.shape, generator=g, dtype=v.dtype) for name, v in values.items()}
    return replace(like, **drawn, y=torch.randint(0, 10, like.y.shape, generator=g))


# ---- every method


@pytest.mark.parametrize(("name", "more"), STACKED)
def test_every_method_trains_as_alone(name, more):
    """In float64, where sums in another order do not hide a mistake; HASTE passes its stop."""
    more += " method.stop=2" if name == "haste" else ""
    recipes = [small(name, f"training.seed={seed} training.steps=3 {more}") for seed in SEEDS[:2]]
    found = [given(recipe) for recipe in recipes]
    batches = [partial(noise, found[0][2], seed) for seed in SEEDS[:2]]
    configs = [recipe.training for recipe in recipes]
    together = list(fit_side_by_side([pair[:2] for pair in found], batches, configs, device="cpu"))
    for k, recipe in enumerate(recipes):
        alone = list(fit(*given(recipe)[:2], batches[k], configs[k], device="cpu"))
        for one, step in zip(alone, together, strict=True):
            for kind in ("losses", "norms"):
                mine, all_seeds = getattr(one, kind), getattr(step, kind)
                assert mine.keys() == all_seeds.keys()
                for key, value in mine.items():
                    torch.testing.assert_close(all_seeds[key][k], value, rtol=1e-6, atol=1e-8, check_dtype=False)
        for kind in ("model", "ema"):
            mine, stack = (getattr(steps[-1].state, kind).state_dict() for steps in (alone, together))
            for key, value in mine.items():
                torch.testing.assert_close(stack[key][k], value, rtol=1e-6, atol=1e-8)
    assert len(set(next(iter(together[0].losses.values())).tolist())) == 2  # other images, other noise


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precisions_agree_to_their_own_rounding(precision):
    recipes = [small("repa", f"training.seed={seed} training.precision={precision}") for seed in SEEDS]
    nets = [[part.float() for part in given(recipe)[:2]] for recipe in recipes]
    batches = [partial(noise, in_single(given(recipes[0])[2]), seed) for seed in SEEDS]
    steps = list(fit_side_by_side(nets, batches, [recipe.training for recipe in recipes], device="cpu"))
    for k, recipe in enumerate(recipes):
        pair = [part.float() for part in given(recipe)[:2]]
        *_, last = fit(*pair, batches[k], recipe.training, device="cpu")
        for key, value in last.losses.items():
            bound = 1e-5 if precision == "float32" else 2e-2
            torch.testing.assert_close(steps[-1].losses[key][k], value, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["repa", "maskalign", "haste"])
def test_no_step_waits_for_the_device(monkeypatch, name):
    """The guard looks twice, at the first and at the last step."""
    watch = Guard.watch

    def seldom(self, norm, step):
        self.every = 100
        watch(self, norm, step)

    monkeypatch.setattr(Guard, "watch", seldom)
    recipes = [small(name, f"training.seed={seed} training.save_every=100") for seed in SEEDS]
    found = [given(recipe) for recipe in recipes]
    batches = [partial(noise, found[0][2], seed) for seed in SEEDS]
    with Waits() as waits:
        list(fit_side_by_side([pair[:2] for pair in found], batches, [r.training for r in recipes], device="cpu"))
    assert waits.count == 2


# ---- runs


def pair_of(seed):
    torch.manual_seed(seed)
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=2, heads=2, num_classes=10)
    return net, REPA(net, Objective(), REPAConfig(depth=1, projector_width=16), 0.1, teacher_dims=(8,))


def batch_of(step, seed):
    g = generator(seed, step, "data")
    rest = torch.randint(0, 10, (8,), generator=g), torch.randn(8, 4, 8, generator=g)
    return Batch(torch.randn(8, 3, 8, 8, generator=g), *rest)


def configs(seeds=SEEDS, **changes):
    return [survive.config(seed=seed, second_ema=0.5, **changes) for seed in seeds]


def runs_in(folder, seeds=SEEDS):
    return [folder / f"seed-{seed}" for seed in seeds]


def train(runs, seeds=SEEDS, stop=None, batches=batch_of, **changes):
    """Train side by side into folders, or until a step."""
    for run in runs:
        run.mkdir(parents=True, exist_ok=True)
    told = configs(seeds, **changes)
    given = [partial(batches, seed=seed) for seed in seeds]
    steps = fit_side_by_side([pair_of(seed) for seed in seeds], given, told, runs, "cpu")
    for step, *_ in with_logs(steps, runs, 1, 0):
        if step.step == stop:
            break


def content(run, step=None):
    files = sorted(step_folder(run, step).glob("*.safetensors"))
    return {file.stem: load_tensors(file.parent, file.stem) for file in files}


def compare(one, other, **bounds):
    """Two checkpoints: the same files and names, and numbers within bounds."""
    assert one.keys() == other.keys()
    for file, values in one.items():
        assert values.keys() == other[file].keys()
        for name, value in values.items():
            torch.testing.assert_close(other[file][name], value, **bounds, msg=lambda m, n=name: f"{file} {n}: {m}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three seeds that nothing disturbed."""
    torch.set_num_threads(1)
    runs = runs_in(tmp_path_factory.mktemp("whole"))
    train(runs)
    return runs


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_each_seed_has_the_folder_of_a_training_alone(whole, tmp_path):
    from maskalign_lab.training.log import with_log

    for seed, run in zip(SEEDS, whole):
        (alone := tmp_path / str(seed)).mkdir()
        config = configs()[seed]
        for _ in with_log(fit(*pair_of(seed), partial(batch_of, seed=seed), config, alone, "cpu"), alone, 1, 0):
            pass
        files = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (alone, run)]
        assert files[0] == files[1] and (run / "latest").read_text() == (alone / "latest").read_text()
        for step in steps_of(alone):
            compare(content(alone, step), content(run, step), rtol=1e-3, atol=1e-5)
        for one, other in zip(lines(alone), lines(run), strict=True):
            assert one.keys() == other.keys()
            timeless = {name: value for name, value in one.items() if name not in ("seconds", "data_wait")}
            assert {name: other[name] for name in timeless} == pytest.approx(timeless, rel=1e-4)


def test_seeds_are_no_copies(whole):
    ends = [content(run)["model"]["blocks.0.attn.qkv.weight"] for run in whole]
    assert all((ends[0] - end).abs().max() > 1e-3 for end in ends[1:])


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_stopped_after_any_step_they_continue_to_the_same_bits(whole, tmp_path, stop):
    train(runs := runs_in(tmp_path), stop=stop)
    train(runs)
    for run, undisturbed in zip(runs, whole):
        compare(content(undisturbed), content(run), rtol=0, atol=0)


def test_a_kill_while_some_had_saved_goes_back_to_what_all_have(whole, tmp_path):
    train(runs := runs_in(tmp_path), stop=6)
    shutil.rmtree(step_folder(runs[2], 6))
    assert [steps_of(run)[-1] for run in runs] == [6, 6, 3] and list(in_step(runs)) == [3]
    train(runs)
    for run, undisturbed in zip(runs, whole):
        compare(content(undisturbed), content(run), rtol=0, atol=0)


def test_a_seed_that_is_further_by_more_is_a_group_of_its_own(tmp_path):
    runs = runs_in(tmp_path)
    *_, alone = fit(*pair_of(1), partial(batch_of, seed=1), configs(steps=6)[1], runs[1], "cpu")
    assert in_step(runs) == {0: [runs[0], runs[2]], 6: [runs[1]]}
    with pytest.raises(FileNotFoundError, match="has no step 0"):  # nothing is forgotten
        train(runs)
    assert steps_of(runs[1]) == [3, 6]


# ---- each seed by itself


def test_a_gradient_is_clipped_by_its_own_norm():
    def loud(step, seed):
        batch = batch_of(step, seed)
        return replace(batch, x=batch.x * (30 if seed == 1 else 1))

    told = configs(clip=2.0, steps=2)
    steps = list(
        fit_side_by_side([pair_of(s) for s in SEEDS], [partial(loud, seed=s) for s in SEEDS], told, None, "cpu")
    )
    norms = steps[0].norms["gradient"]
    assert norms[1] > 2 * told[0].clip and norms[0] < told[0].clip and norms[2] < told[0].clip
    for seed in SEEDS:
        *_, last = fit(*pair_of(seed), partial(loud, seed=seed), told[seed], None, "cpu")
        for stack, weight in zip(steps[-1].state.model.parameters(), last.state.model.parameters(), strict=True):
            torch.testing.assert_close(stack[seed], weight, rtol=1e-4, atol=1e-5)


def test_a_seed_that_is_not_finite_is_named_and_spoils_no_other(whole, tmp_path):
    def spoilt(step, seed):
        batch = batch_of(step, seed)
        return replace(batch, x=batch.x / 0) if (seed, step) == (1, 4) else batch

    runs = runs_in(tmp_path)
    with pytest.raises(SeedsNotFinite, match="step 5: not finite, of seed 1$") as met:
        train(runs, batches=spoilt)
    assert met.value.places == [1] and [steps_of(run) for run in runs] == 3 * [[3]]
    train([runs[0], runs[2]], (0, 2), batches=spoilt)
    for k in (0, 2):
        compare(content(whole[k]), content(runs[k]), rtol=1e-4, atol=1e-6)


# ---- what goes alone


class Shy(PlainSiT, name="shy-seed"):
    """Goes by a number, which differs from seed to seed."""

    def loss(self, state, batch, draw, phase="main"):
        found = super().loss(state, batch, draw, phase)
        return found if found.total < 1e9 else Losses(0 * found.total, found.parts)


class Averaged(PlainSiT, name="averaged-seed"):
    """Looks at the averaged network."""

    def loss(self, state, batch, draw, phase="main"):
        found = super().loss(state, batch, draw, phase)
        return Losses(found.total + state.ema(batch.x, draw.t, draw.y).prediction.mean(), found.parts)


@pytest.mark.parametrize("kind", [Shy, Averaged])
def test_a_loss_without_a_batched_form_says_so_before_a_weight_moves(kind, tmp_path):
    def pair(seed):
        net, _ = pair_of(seed)
        return net, kind(net, Objective(), MethodConfig())

    batches = [partial(batch_of, seed=seed) for seed in SEEDS]
    with pytest.raises(OnlyAlone, match="cannot be taken of all seeds at once"):
        list(fit_side_by_side([pair(seed) for seed in SEEDS], batches, configs(), runs_in(tmp_path), "cpu"))
    assert [steps_of(run) for run in runs_in(tmp_path)] == 3 * [[]]


@pytest.mark.parametrize(
    ("case", "execution", "why"),
    [
        (("ahpa", "method.router=bilevel"), {}, "router=bilevel takes gradients within the loss"),
        (("dsd", ""), {}, "the averaged encoder gives the target"),
        (("jit", "network.dropout=0.1"), {}, "dropout draws from one generator"),
        (("sit", ""), {"compile": "blocks"}, "execution.compile=blocks"),
        (("sit", ""), {"accumulate": 2}, "execution.accumulate=2"),
    ],
)
def test_what_is_known_to_go_alone_is_told_before_any_work(case, execution, why):
    net, method, *_ = given(small(*case))
    with pytest.raises(OnlyAlone, match=why):
        check_stackable(net, method, ExecutionConfig(**execution))
    assert check_stackable(*pair_of(0), ExecutionConfig()) is None


def test_large_networks_go_alone(monkeypatch):
    from maskalign_lab.training import side_by_side

    monkeypatch.setattr(side_by_side, "WHOLE", 1000)
    with pytest.raises(OnlyAlone, match="million parameters fills a device by itself"):
        check_stackable(*pair_of(0), ExecutionConfig())


# ---- compiled


def test_all_seeds_are_one_static_graph(traced):
    ends = []
    for way in ("off", "whole"):
        pairs, batches = [pair_of(seed) for seed in SEEDS], [partial(batch_of, seed=seed) for seed in SEEDS]
        *_, last = fit_side_by_side(pairs, batches, configs(steps=3), None, "cpu", ExecutionConfig(way))
        ends.append(last)
    assert len(traced) == 1
    for one, other in zip(*(end.state.model.parameters() for end in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
