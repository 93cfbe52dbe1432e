"""The benchmarks run, agree on results before they time anything, and say where their figures come from. No clocks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.clone import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskalign_lab.base import paths
from maskalign_lab.cli import main
from maskalign_lab.diffusion import guidance
from maskalign_lab.workbench import benchmarking
from maskalign_lab.workbench.benchmarking import (
    Comparison,
    Ratio,
    bench,
    from_json,
    function_of,
    in_turn,
    ratio,
    scripts,
    table,
)

NAMES = [
    "data_path",
    "gradient_norms",
    "import_time",
    "masked_step",
    "sampler",
    "scrub",
    "side_by_side",
    "stopping",
    "training_step",
]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CPU = torch.device("cpu")


def script(name: str) -> dict:
    """What a script defines."""
    return function_of(ROOT / "benchmarks" / f"{name}.py", "measure").__globals__


# ---- measuring


def test_candidates_run_in_turn_and_warm_up_apart():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = in_turn(work, rounds=3, warmup=2)
    assert "".join(calls) == "abcabc" + "abc" + "cba" + "abc"
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.01, 100))
def test_a_ratio_lies_in_its_interval_and_knows_nothing_of_the_machine(times, slower):
    times = np.array(times)
    found = ratio(times, times[::-1])
    assert found.low <= found.median <= found.high
    slowed = ratio(slower * times, slower * times[::-1])
    assert (slowed.low, slowed.median, slowed.high) == pytest.approx((found.low, found.median, found.high))
    assert ratio(3 * times, times).median == pytest.approx(3)


def test_one_bad_round_does_not_move_the_ratio():
    baseline, candidate = [2.0] * 11, [1.0] * 11
    candidate[4] = 1000.0
    found = ratio(baseline, candidate)
    assert (found.median, found.low, found.high) == (2, 2, 2)


def test_a_baseline_must_be_among_the_ways():
    with pytest.raises(ValueError, match="Did you mean 'plain'"):
        Comparison("x", {"plain": [1.0], "ours": [1.0]}, "plian")


# ---- the scripts


@pytest.mark.parametrize("name", NAMES)
def test_every_script_runs_and_prints_ratios(name, tmp_path, capsys):
    comparisons = bench([name], short=True, device="cpu", out=str(tmp_path / "made" / "out.json"))
    printed = capsys.readouterr().out
    for each in comparisons:
        assert each.title in printed and len(each.seconds) > 1
        assert all(found.median > 0 and np.isfinite(found.median) for found in each.ratios().values())
        assert all(f"{found}" in printed for way, found in each.ratios().items() if way != each.baseline)
    tree = json.loads((tmp_path / "made" / "out.json").read_text())
    assert tree["made_by"] == f"maskalign-lab bench {name} --short"
    assert {"cpu", "cores", "threads", "capabilities", "load", "device", "versions", "git"} <= tree["machine"].keys()
    assert [each.ratios().keys() for each in from_json(json.dumps(tree))[0]] == [c.ratios().keys() for c in comparisons]


def test_the_list_is_that_of_the_folder():
    assert sorted(scripts()) == NAMES


def test_norms_agree_with_the_naive_loop_in_float64():
    found = script("gradient_norms")
    assert found["TOLERANCE"] == 1e-10
    assert found["difference"](*found["given"]("small", short=True)) <= 1e-10


def test_norms_that_differ_are_not_timed(monkeypatch):
    found = script("gradient_norms")
    found["compare"].__globals__["difference"] = lambda *_: 1e-9
    with pytest.raises(AssertionError, match="differ from the naive loop by 1.0e-09"):
        found["compare"]("small", True, CPU)


def test_plain_step_and_ours_train_alike():
    """The arms of the training step differ in speed only: in float32, with one ingredient or another, losses agree."""
    found = script("training_step")
    recipe = found["recipe_for"](True, CPU)
    batch = found["batch_for"](recipe, CPU)
    trained = []
    for switches in ({}, {"fused": True, "foreach": True}):
        step = found["plain_step"](recipe, batch, **switches)
        for _ in range(3):
            step()
        inside = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__)))
        trained.append(torch.cat([p.flatten() for p in inside["model"].parameters()]))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_jit_is_measured_at_its_published_size_on_a_gpu():
    found = script("training_step")
    large, small = (found["recipe_for"](False, torch.device(name), "jit") for name in ("cuda", "cpu"))
    assert (large.data.size, large.network.patch_size, large.network.width, large.network.depth) == (256, 16, 768, 12)
    assert large.training.second_ema is None and large.training.batch_size == 128 and small.data.size < 256
    told = found["speed"](found["recipe_for"](True, CPU, "jit"), 8, [0.5, 2.0, 4.0])
    assert told.startswith("ours: 4 images/s, ") and told.endswith(" TFLOP/s")


def test_guidance_in_two_calls_is_guidance_in_one():
    found = script("sampler")
    net, y = found["trained_looking"](True, CPU).net, torch.tensor([0, 1])
    config = found["SamplerConfig"]("euler", steps=2, guidance=2.0, precision="float32")
    draws = [found["drawer"](net, y, config, field=field)() for field in (found["Field"], found["TwoCalls"])]
    torch.testing.assert_close(*draws, rtol=1e-4, atol=1e-5)
    assert found["Field"] is guidance.Field


def test_the_baseline_of_sampling_is_repas_sampler():
    """One call a step for both halves, the projector in each, and the samples that the library draws in float32."""
    found = script("sampler")
    theirs, y, start = found["trained_looking"](True, CPU), torch.tensor([0, 1, 2]), torch.randn(3, 3, 32, 32)
    heads = []
    theirs.head.register_forward_hook(lambda module, given, projected: heads.append(len(projected)))
    config = found["SamplerConfig"]("euler", steps=3, guidance=1.8, precision="float32")
    drawn = found["upstream_samples"](theirs, start, y, config)
    assert heads == 3 * [2 * len(y) * theirs.net.side**2]
    torch.testing.assert_close(drawn, found["drawer"](theirs.net, y, config, start)(), rtol=1e-4, atol=1e-5)


def test_samplers_that_differ_are_not_timed():
    found, one = script("sampler"), torch.ones(2, 3)
    ways = {"float32": lambda: one, "float32, two calls": lambda: 1.1 * one, "bfloat16": lambda: 2 * one}
    with pytest.raises(AssertionError, match="differ by 1.0e-01"):
        found["check"](ways, 1e-3)
    assert found["check"](ways, 0.2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.2, 0.4, "within"), (0.41, 0.5, "not within"), (0.3, 0.5, "undecided about")]
)
def test_a_share_of_repas_time_is_judged_by_its_whole_interval(low, high, verdict):
    assert script("sampler")["told"](Ratio(0.4, low, high)).endswith(f"of REPA's time, {verdict} 0.4")


@pytest.mark.parametrize(("size", "published"), [("S", 0.867), ("B", 0.896), ("XL", 0.815)])
def test_flops_of_whole_networks_are_those_on_paper(size, published):
    """Counted on the real loss; on paper they are the products of blocks and projector, and nothing else."""
    found = script("masked_step")
    counted = found["flop_ratios"](size)
    assert counted[0.25] == pytest.approx(published, abs=6e-4)
    assert counted == pytest.approx({share: found["by_hand"](size, share) for share in counted}, abs=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_flops_counted_without_computing_are_those_of_a_step_of_fit(share):
    found = script("masked_step")
    recipe = found["recipe_for"]("maskalign", "S", depth=6, batch=2)
    step = found["stepper"](recipe, found["batch_for"](recipe))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        done = step(share)
    assert found["flops"](recipe, (share,)) == [counter.get_total_flops()]
    assert done.state.model.depth == 6 and len(done.state.model.mixer) == 1  # as 12 to 2


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.8, 0.83, "within 0.04"), (0.85, 0.9, "not within 0.04"), (0.8, 0.9, "undecided")]
)
def test_an_aim_is_met_or_missed_only_if_the_interval_says_so(low, high, told):
    verdict = script("masked_step")["verdict"](Ratio((low + high) / 2, low, high), 0.8)
    assert verdict.split(", ")[1].startswith(told)


# ---- the command


def test_an_unknown_benchmark_is_told_with_the_nearest(capsys):
    assert main(["bench", "scrab"]) == 2
    told = capsys.readouterr()
    assert "unknown benchmark 'scrab'. Did you mean 'scrub'?" in told.err and not told.out


def test_the_command_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmarking, "bench", lambda *given: seen.append(given))
    assert main(["bench", "scrub", "--short", "--device", "cpu", "--out", "x.json"]) == 0
    assert main(["bench"]) == 0
    assert seen == [(["scrub"], True, "cpu", "x.json"), ([], False, "auto", "")]


@pytest.mark.parametrize("clone", [False, True])
def test_without_the_scripts_it_says_where_they_are(monkeypatch, capsys, tmp_path, clone):
    monkeypatch.setattr(paths, "clone", lambda: tmp_path if clone else None)
    assert main(["bench"]) == 2
    assert "come with the repository" in capsys.readouterr().err


# ---- what is kept


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_tell_their_machine_and_the_readme_shows_them(path):
    comparisons, facts = from_json(path.read_text())
    assert facts["cpu"] and facts["cores"] and facts["load"] and facts["versions"]["torch"] and facts["git"]["commit"]
    assert json.loads(path.read_text())["made_by"].startswith("maskalign-lab bench")
    assert len({each.title for each in comparisons}) == len(comparisons)
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert table(comparisons) in readme, "run `python benchmarks/_readme.py`"
