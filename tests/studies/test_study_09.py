"""Study 09: what its notebook says of costs, recipes and faults is what the code does."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from shared.studies import check_figure

from maskalign_lab.base import paths
from maskalign_lab.evaluation_commands import Evaluate
from maskalign_lab.runs.estimates import GPUS, estimate, parts_needed
from maskalign_lab.runs.expectations import expect
from maskalign_lab.runs.experiments import step_flops
from maskalign_lab.runs.paper_settings import settings_of
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.sample_plan import NAMED
from maskalign_lab.studies.full_scale.costs import (
    IMAGENET,
    METHODS,
    cost_of,
    cost_table,
    costs_of,
    measured_rates,
    networks_of,
    paper_recipe,
    sampling_hours,
    shipped_costs,
)
from maskalign_lab.studies.full_scale.faults import CASES, as_expected, faults_figure, tell, told_table
from maskalign_lab.studies.full_scale.film import COURSES, load_film, miniature, roofline_figure, scrubber, strip, view
from maskalign_lab.studies.full_scale.opening import FILM
from maskalign_lab.studies.full_scale.paper_rows import ROWS, paper_table, row_costs
from maskalign_lab.studies.full_scale.roofline import (
    DATA,
    DATASHEETS,
    PARTS,
    Roof,
    Row,
    measure_step,
    part_of,
    shares_of,
)
from maskalign_lab.training.health import SETTLED
from maskalign_lab.training.methods import layers_of
from maskalign_lab.workbench import benchmarking
from maskalign_lab.workbench.benchmark_plan import plans
from maskalign_lab.workbench.commands import parse

BOOK = paths.notebooks() / "09_full_scale.ipynb"


@pytest.fixture(scope="module")
def film():
    return load_film(paths.data() / "results" / FILM)


def text() -> str:
    return " ".join(cell.source for cell in nbformat.read(BOOK, as_version=4).cells).replace("\n", " ")


# ---- parts of a step


def test_the_film_that_ships_has_all_steps_and_shares_that_sum_to_1(film):
    assert (film.methods, film.widths, film.tokens) == (["sit", "repa", "maskalign"], [48, 96, 192, 384], [16, 64])
    assert len(film.steps) == 24 and film.machine
    for step in film.steps:
        assert tuple(step.shares) == PARTS and min(step.shares.values()) >= 0
        assert sum(step.shares.values()) == pytest.approx(1)
        assert step.rate < film.roof.flops and step.flops == pytest.approx(step.rate * step.seconds)


def test_the_verdict_of_the_first_screen_is_the_films(film):
    """The host's share falls as the network grows, for every method and number of tokens."""
    for method in film.methods:
        for tokens in film.tokens:
            ends = [film.find(method, width, tokens).shares["host"] for width in (48, 384)]
            assert ends[0] > 1.5 * ends[1]
    narrow, wide = (film.find("sit", width, 64) for width in (48, 384))
    largest = [max((of := film.find("sit", width, 64).shares), key=of.get) for width in film.widths]
    assert largest == ["host", *["other kernels"] * 3] and "from 96 channels on other kernels are the largest" in text()
    host, matmul = ([round(100 * each.shares[part]) for each in (narrow, wide)] for part in ("host", "matmul"))
    assert f"falls from {host[0]} to {host[1]} %" in text() and f"only from {matmul[0]} to {matmul[1]} %" in text()


def test_how_near_the_widest_steps_come_to_the_roof_is_told(film):
    widest = [film.find(method, 384, n) for n in film.tokens for method in film.methods]
    near = {step.tokens: [] for step in widest}
    for step in widest:
        near[step.tokens].append(step.rate / film.roof.at(step.intensity))
    low, high = (f"{end:.2f}".lstrip("0") for end in (min(near[64]), max(near[16])))
    assert f"reach {low} (64 tokens) to {high} (16 tokens) of the roof" in text() and max(near[64]) < min(near[16])


def test_the_profilers_own_work_is_told(film):
    slower = sorted(step.overhead for step in film.steps)
    assert 1.3 < slower[-1] < 1.4 and slower[-2] < 1.2 and "up to 1.4 times as long" in text()


@pytest.mark.parametrize(("method", "tokens"), [("reg", 16), ("jit", 64)])
def test_a_step_is_measured_with_the_loop_that_trains(method, tokens):
    more = "network.context_start=1" if method == "jit" else ""
    recipe = miniature(method, 32, tokens, f"data.n=32 training.batch_size=8 {more}")
    step = measure_step(recipe, "cpu", 1)
    assert sum(step.shares.values()) == pytest.approx(1) and step.tokens == tokens and step.method == method
    assert all(step.shares[part] > 0 for part in ("matmul", "attention", "other kernels", "update", "data", "host"))
    facts = expect(recipe).facts
    assert step.flops == pytest.approx(8 * step_flops(recipe, facts))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (Row("aten::addmm", 1, ("aten::linear",)), "matmul"),
        (Row("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 1), "attention"),
        (Row("aten::_softmax_backward_data", 1), "attention"),
        (Row("aten::_fused_adamw_", 1), "update"),
        (Row("aten::index_select", 1, ("x", DATA)), "data"),
        (Row("aten::view", 1), "host"),
        (Row("AddmmBackward0", 1), "host"),
        (Row("aten::native_layer_norm", 1), "other kernels"),
        (Row("nvjet_hsh_128x256_64x4_1x2_h_bz_TNT", 1, on_gpu=True), "matmul"),
        (Row("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 1, on_gpu=True), "attention"),
        (Row("triton_poi_fused_gelu_3", 1, on_gpu=True), "other kernels"),
    ],
)
def test_operators_and_kernels_belong_to_parts(row, part):
    assert part_of(row) == part


def test_kernels_longer_than_the_clock_are_refused():
    with pytest.raises(ValueError, match="expected at most those"):
        shares_of([Row("aten::mm", 2.0)], 1.0)


def test_every_gpu_has_a_bandwidth_and_a_ridge():
    assert DATASHEETS.keys() == GPUS.keys()
    assert all(100 < Roof(name, GPUS[name].peak, DATASHEETS[name]).ridge < 400 for name in GPUS)


# ---- costs


def test_costs_that_ship_are_those_that_are_counted():
    """Of the cheapest method, and of one that asks its teacher at every step."""
    known = shipped_costs()
    for method, network in (("sit", "SiT-S/2"), ("maskalign", "SiT-XL/2"), ("haste", "SiT-S/2")):
        cost = known[identity(paper_recipe(method, network))]
        assert cost == cost_of(method, network)


def test_every_cost_that_the_notebook_shows_ships():
    known = shipped_costs()
    wanted = [paper_recipe(method, network) for method in METHODS for network in networks_of(method)]
    assert {identity(recipe) for recipe in (*wanted, *(row.recipe() for row in ROWS))} <= known.keys()


def test_a_cost_is_the_estimates():
    cost, found = cost_of("reg", "SiT-S/2"), estimate(paper_recipe("reg", "SiT-S/2"))
    assert (cost.flops, cost.memory) == (found.flops, sum(found.memory.values()))
    assert cost.hours("H100", 0.5) == pytest.approx(found.flops / (0.5 * GPUS["H100"].peak) / 3600)
    assert found.images.count == 1_281_167


def test_rows_ship_under_names_that_hold_everywhere(tmp_path, monkeypatch):
    here = identity(ROWS[0].recipe())
    monkeypatch.chdir(tmp_path)
    assert identity(ROWS[0].recipe()) == here


def test_a_row_with_other_settings_is_counted_anew():
    stale = replace(
        next(iter(shipped_costs().values())), method="sit", network="SiT-S/2", identity="another", flops=1.0
    )
    (found,) = costs_of(("sit",), ("SiT-S/2",), {"another": stale})
    assert found.flops > 1e18


def test_what_the_notebook_says_of_ratios_and_rates():
    """MaskAlign over REG at XL is .815 by operations, a quarter of the peak is about 347 images/s, and the numbers of the text."""
    of = {(cost.method, cost.network): cost for cost in costs_of()}
    assert of["maskalign", "SiT-XL/2"].gflops / of["reg", "SiT-XL/2"].gflops == pytest.approx(0.815, abs=2e-3)
    assert of["sit", "SiT-XL/2"].rate() == pytest.approx(347, rel=0.01)
    assert round(of["repa", "SiT-XL/2"].caches / 1e9) == 527 and "527 GB" in text()
    assert 0.03 < 1000 / of["sit", "SiT-S/2"].rate("H200", 1.0) < 0.04
    assert sampling_hours(of["sit", "SiT-XL/2"]) == pytest.approx(5.04e18 / (0.25 * 989e12) / 3600, rel=0.01)


def test_to_the_right_of_the_ridge_memory_binds_no_published_network():
    from maskalign_lab.studies.full_scale.film import intensity_of

    ridge = Roof("H200", GPUS["H200"].peak, DATASHEETS["H200"]).ridge
    assert all(intensity_of(cost) > ridge for cost in costs_of())


def measured_file(folder: Path, device: str) -> Path:
    seen = benchmarking.Comparison("step of sit, SiT-S/2", {"ours: fit": [0.25]}, "ours: fit", {"batch": 256})
    place = folder / "bench" / "gpu-cuda.json"
    place.parent.mkdir()
    place.write_text(benchmarking.to_json([seen], {"device": device}, "maskalign-lab bench gpu"))
    return place


def test_a_measured_rate_takes_the_place_of_a_derived_one_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path))
    costs = costs_of(("sit",), ("SiT-S/2", "SiT-B/2"))
    before = cost_table(costs, 2.0)
    measured_file(tmp_path, "NVIDIA H200")
    after = cost_table(costs, 2.0)
    assert set(before["source"]) == {"derived, 25% of H200"}
    assert list(after["source"]) == ["measured, NVIDIA H200", "derived, 25% of H200"] and after["images/s"][0] == 1000


def test_what_a_cpu_measured_is_no_rate_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path))
    measured_file(tmp_path, "cpu")
    assert measured_rates("cpu") == {}


# ---- rows of papers


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.place}-{row.network}-{row.steps}")
def test_each_rows_command_is_a_recipe(row):
    words = shlex.split(row.command())
    assert words[:2] == ["maskalign-lab", "train"] and words[3:7] == [
        "--preset",
        "paper",
        "--dataset",
        IMAGENET,
    ]
    recipe = make_recipe(words[2], "paper", words[6], 0, shlex.join(words[7:]))
    assert recipe == row.recipe() and recipe.training.steps == row.steps
    assert recipe.data.size == 256 and recipe.training.batch_size == (
        1024 if recipe.network.name in ("jit", "ditdh") else 256
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.place}-{row.network}-{row.steps}")
def test_each_rows_figure_has_a_command(row):
    """With the guidance that the row speaks of; RAE's goes away from a second network."""
    typed = parse(Evaluate, shlex.split(row.evaluation("here", "weak"))[2:])
    assert typed.guide == "weak" * (row.method == "ditdh" and row.guided)
    plan = NAMED[typed.as_]
    guidance = plan.sampler.guidance if typed.guidance is None else typed.guidance
    assert (typed.run, typed.step, guidance > 1) == ("here", row.steps, row.guided)
    token = row.recipe().network.name == "sit" and layers_of(row.recipe().method)[-1].name == "reg"
    assert (typed.as_ == "reg") == token  # who has a class token is sampled as who has one
    assert typed.as_ == row.method or row.method in ("maskalign", "sra2", "ahpa", "dsd")


def test_steps_of_shorter_rows_are_kept_by_the_longest_or_named_in_the_text():
    kept = {
        (row.method, row.network, row.overrides): row.recipe().training.kept
        for row in sorted(ROWS, key=lambda r: r.steps)
    }
    lost = {row.steps for row in ROWS if row.steps not in kept[row.method, row.network, row.overrides]}
    more = "training.save_at=(250200,)"
    assert lost == {250_200} <= paper_recipe("jit", "JiT-B/16", f"training.steps=750600 {more}").training.kept
    assert f'"{more}"' in text()


def test_the_text_counts_the_rates_that_the_benchmark_measures():
    names = {part.name for part in benchmarking.function_of(plans()["gpu"], "parts")(False, torch.device("cpu"))}
    costs = costs_of()
    seen = [c for c in costs if f"{c.method} {c.network.removeprefix('SiT-').removesuffix('/2')}" in names]
    assert "jit" in names  # of JiT the smallest network
    assert f"in the table for {len(seen) + 1} of its {len(costs)} rows" in text()


def test_rows_cover_the_papers_that_are_named():
    assert {row.method for row in ROWS} == set(METHODS)
    assert len({(row.place, row.method, row.network, row.steps, row.guided) for row in ROWS}) == len(ROWS)


def test_overrides_of_a_row_change_what_the_preset_has():
    """An override that repeats the preset's value would stand there in vain, but for what AHPA's second source has."""
    for row in ROWS:
        plain = settings_of("jit" if row.method == "jit" else row.method, paper_recipe(row.method, row.network).method)
        for each in shlex.split(row.overrides):
            path, _, value = each.partition("=")
            assert path not in plain or plain[path].value != value


def test_the_table_says_money_disk_and_whose_fid_it_is():
    table = paper_table(ROWS, 2.0).set_index(["row", "network", "steps"])
    row = table.loc["REPA, in MaskAlign table 1", "SiT-XL/2", "400,000"]
    assert row["paper's FID"] == "7.9" and row["one GPU"] == "whole batch" and row["disk, GB"] > 527
    assert row["money"] == pytest.approx(2 * row["H200 hours"], rel=0.1)
    assert table.loc["RAE, 800 epochs", "DiTDH-XL", "1,000,800"]["one GPU"] == "in 4 parts"


def test_the_parts_of_a_row_are_those_that_its_dry_run_asks_for():
    for row, cost in zip(ROWS, row_costs(ROWS)):
        if row.network in ("JiT-H/16", "SiT-S/2", "DiTDH-XL"):
            assert cost.parts("H200") == parts_needed(estimate(row.recipe()), GPUS["H200"])
            words = shlex.split(row.command(IMAGENET, 8))
            asked = make_recipe(words[2], "paper", words[6], 0, shlex.join(words[7:]))
            assert asked.execution.accumulate == 8 and identity(asked) == identity(row.recipe())


def test_a_rate_of_another_gpu_is_not_the_chosen_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path))
    measured_file(tmp_path, "NVIDIA A100-SXM4-80GB")
    sources = [cost_table(costs_of(("sit",), ("SiT-S/2",)), 2.0, gpu)["source"][0] for gpu in ("H200", "A100")]
    assert sources == ["derived, 25% of H200", "measured, NVIDIA A100-SXM4-80GB"]


# ---- faults


def test_faults_that_show_at_the_beginning_are_told_and_the_healthy_training_is_not():
    """What shows at step 200 is tested in training/test_health.py, with longer trainings."""
    found = [tell(case, 2) for case in CASES if case.expected != "learning"]
    assert as_expected(found) and told_table(found)["expected"].tolist() == told_table(found)["told"].tolist()
    assert [max([0, *(step for step, _ in each.symptoms)]) for each in found] == [0, 0, 0, 1]
    assert len(faults_figure(found).axes) == len(found)


# ---- pictures, and the page


def test_the_scrubber_shows_every_step(film):
    shown = scrubber(film)
    for course in COURSES:
        panels = view(film, 96, 16, course)
        assert len(panels.panels) == 3 and panels.curve.marker == 96
    assert shown.slider().name == "width" and len(strip(film).axes) == 6
    assert len(roofline_figure(film, costs_of(("sit", "jit"))).axes) == 2


def test_the_page_says_plainly_that_no_gpu_has_run_it():
    said = text()
    assert "no number on this page was timed on a GPU" in said and "What no GPU has run" in said
    assert "derived" in said and f"step {SETTLED}" in said


def test_the_job_keeps_its_film_and_its_figures_name_the_machine(smoke_job):
    job = smoke_job("09")
    film = load_film(job.path(".html").parent / FILM)
    assert film.methods == ["sit", "maskalign"]
    side = check_figure(job, "09_full_scale", "09_roofline")
    assert side["machine"] == film.machine and json.dumps(side["costs"])
