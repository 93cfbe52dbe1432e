"""A plan of benchmarks: in order, within its time, gone on with where it ended. No clocks: the time is the test's own."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskalign_lab.cli import main
from maskalign_lab.workbench import benchmark_plan
from maskalign_lab.workbench.benchmark_plan import ENOUGH, Part, follow, measured_before, plans, run_parts
from maskalign_lab.workbench.benchmarking import Comparison, from_json, scripts

PARTS = ("first", "second", "third")


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """A plan of three parts that can be told to fail; what was measured, and the file."""
    measured, broken = [], set()

    def measure(name):
        measured.append(name)
        if name in broken:
            raise RuntimeError(f"{name} does not run here")
        return [Comparison(f"table of {name}", {"plain": [2.0, 2.0], "ours": [1.0, 1.0]}, "plain")]

    made = [Part(name, 1.0, lambda name=name: measure(name)) for name in PARTS]
    monkeypatch.setattr(benchmark_plan.benchmarking, "function_of", lambda path, name: lambda short, device: made)
    return measured, broken, tmp_path / "made" / "gpu.json"


def test_a_failure_is_named_and_the_next_call_measures_only_what_is_missing(plan, capsys):
    measured, broken, file = plan
    broken.add("second")
    assert main(["bench", "gpu", "--short", "--device", "cpu", "--out", str(file)]) == 1
    assert "second: failed, RuntimeError: second does not run here" in capsys.readouterr().out
    broken.clear(), measured.clear()
    assert main(["bench", "gpu", "--short", "--device", "cpu", "--out", str(file)]) == 0
    assert measured == ["second"]
    titles = [each.title for each in from_json(file.read_text())[0]]
    assert sorted(titles) == sorted(f"table of {name}" for name in PARTS)


def test_results_are_kept_after_every_part(plan, monkeypatch):
    measured, _, file = plan
    written = []
    keep = benchmark_plan.write_atomic
    monkeypatch.setattr(benchmark_plan, "write_atomic", lambda path, text: (written.append(text), keep(path, text)))
    follow("gpu", True, "cpu", str(file))
    assert [len(json.loads(text)["parts"]) for text in written] == [1, 2, 3]


def test_results_of_another_machine_or_version_do_not_stand_beside_new_ones(plan):
    _, _, file = plan
    follow("gpu", True, "cpu", str(file))
    tree = json.loads(file.read_text())
    tree["machine"]["device"] = "NVIDIA H100"
    file.write_text(json.dumps(tree))
    with pytest.raises(FileExistsError, match="made on NVIDIA H100 .* give another --out"):
        follow("gpu", True, "cpu", str(file))


@given(seconds=st.lists(st.floats(0.1, 100), min_size=1, max_size=8), limit=st.floats(1, 200))
def test_no_part_is_begun_that_cannot_end_in_time(seconds, limit):
    """With a clock that each part moves by what it was expected to take."""
    now, began = [0.0], {}

    def measure(name, cost):
        began[name] = now[0]
        now[0] += cost
        return []

    parts = [Part(str(k), cost, lambda k=k, cost=cost: measure(str(k), cost)) for k, cost in enumerate(seconds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_plan.time, "perf_counter", lambda: now[0])
        patch.setattr(benchmark_plan.gc, "collect", lambda: None)
        found = dict(run_parts(parts, {}, limit))
    for part in parts:
        fits = part.name in began
        assert found[part.name].status == ("ok" if fits else "no time")
        if fits:
            assert limit - began[part.name] >= ENOUGH * part.seconds


def test_a_plan_is_named_like_a_benchmark(capsys):
    assert "gpu" in plans() and not set(plans()) & set(scripts())
    assert main(["bench", "gpo"]) == 2
    assert "unknown benchmark 'gpo'. Did you mean 'gpu'?" in capsys.readouterr().err


def test_every_part_of_the_plan_for_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    """But for those that are whole scripts: `test_benchmarks` runs these."""
    asked = []

    def measure_of(name):
        return lambda short, device: asked.append(name) or [Comparison(name, {"plain": [1.0]}, "plain")]

    monkeypatch.setattr(benchmark_plan.benchmarking, "measure_of", measure_of)
    outcomes = follow("gpu", True, "cpu", str(tmp_path / "gpu.json"), limit=1e9)  # however slow the machine is
    assert {name: each.error for name, each in outcomes.items() if each.status != "ok"} == {}
    comparisons = from_json((tmp_path / "gpu.json").read_text())[0]
    told = "\n".join(note for each in comparisons for note in each.notes)
    assert "TFLOP/s" in told and "images/s" in told and "skipped" in told
    assert asked and set(asked) < set(scripts())


def test_the_whole_plan_fits_into_nine_minutes():
    parts = benchmark_plan.benchmarking.function_of(plans()["gpu"], "parts")(False, torch.device("cpu"))
    assert sum(part.seconds for part in parts) <= 540
    assert len({part.name for part in parts}) == len(parts)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "gpu.json").write_text('{"machine":')
    with pytest.raises(ValueError, match="gpu.json holds no results .*; give another --out, or remove the file"):
        measured_before(tmp_path / "gpu.json", {}, "bench gpu")
