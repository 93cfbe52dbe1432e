"""Study 03: what its smoke run leaves, the tables that ship, and what it says of them."""

import re

import nbformat
import pytest
import torch
from shared.studies import check_figure, run_cells, smoke_fixture, with_tables

from maskalign_lab.base import paths
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.runs.experiments import load_rows, results_file
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.studies.prediction_targets.arms import ARMS, BY_SIZE, ONE_IMAGE, SCALES
from maskalign_lab.studies.prediction_targets.conclusions import size_conclusion, toy_conclusion
from maskalign_lab.studies.prediction_targets.costs import gpu_text
from maskalign_lab.studies.prediction_targets.film import load_film
from maskalign_lab.studies.prediction_targets.findings import in_words, judge_text
from maskalign_lab.studies.prediction_targets.manifold_findings import (
    controls_text,
    diagram_text,
    leaving_text,
    stray_text,
)
from maskalign_lab.workbench.refresh import is_fresh

smoke = smoke_fixture("03")


def test_a_side_file_holds_the_numbers_of_its_figure(smoke):
    side = {
        name: check_figure(smoke, "03_prediction_targets", f"03_{name}") for name in ("by_size", "width", "spectrum")
    }
    assert {row["size"] for row in side["by_size"]["by_size"]} == {"16 px", "32 px"} and "criterion" not in side[
        "by_size"
    ]
    fits = load_rows(paths.data() / "results" / "03_one_image.json")
    assert max(row["loss"] for row in side["width"]["largest loss"]) == max(row["loss"] for row in fits)
    assert [len(ring) for ring in side["spectrum"]["spectrum"].values()] == [9] * 3 + [17] * 3


def test_the_tables_of_the_job_are_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "03_rows.json")
    assert {row["arm"] for row in rows} == {arm.name for arm in SCALES["smoke"].arms}
    assert load_film(smoke.path(".html").parent / "03_film.npz").predictions() == ["x", "eps", "v"]


def test_the_toy_is_traced_with_its_criterion(smoke):
    side = check_figure(smoke, "03_prediction_targets", "03_toy")
    told = {(row["data"], row["asked"]): row for row in side["criterion"]}
    assert len(told) == 6 and told["spiral", "at least 10"]["whole interval meets it"] is True


def test_jit_is_trained_beside_itself_without_a_part(smoke):
    told = check_figure(smoke, "03_prediction_targets", "03_jit_parts")
    assert [row["arm"] for row in told["v-loss"]] == ["JiT", "without bottleneck"]
    rows = load_rows(smoke.path(".html").parent / "03_jit.json")
    assert [row["arm"] for row in rows] == ["JiT", "without bottleneck"]


@pytest.mark.parametrize(
    "path", sorted((paths.data() / "results").glob("03_targets_*.json")), ids=lambda path: path.stem
)
def test_the_tables_that_ship_are_paired(path):
    """x, eps and v stand beside each other with the same seeds, or a factor would compare different trainings."""
    seeds: dict[str, set[int]] = {}
    for row in load_rows(path):
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    needed = {arm.name for arm in BY_SIZE if path.stem[11:] in ("shapes", "photos") or "repeated" not in arm.name}
    assert seeds.keys() <= {arm.name for arm in ARMS} and needed <= seeds.keys()
    for setting in {arm.split(", ", 1)[1] for arm in seeds}:
        kinds = ("x", "v") if "width" in setting else ("x", "eps", "v")
        first, *others = (seeds.get(f"{kind}, {setting}") for kind in kinds)
        assert first and all(other == first for other in others), setting


def test_the_fits_of_one_image_are_paired():
    rows = load_rows(paths.data() / "results" / "03_one_image.json")
    cases = {kind: {(r["width"], r["size"], r["seed"]) for r in rows if r["prediction"] == kind} for kind in ("x", "v")}
    assert cases["x"] == cases["v"] and cases["x"] <= {(c.width, c.size, c.seed) for c in ONE_IMAGE}


def study_text() -> str:
    book = nbformat.read(paths.notebooks() / "03_prediction_targets.ipynb", as_version=4)
    return " ".join(" ".join(cell.source for cell in book.cells if cell.cell_type == "markdown").split())


def executed_text(job) -> str:
    """All Markdown that the cells of an executed copy displayed."""
    book = nbformat.read(job.path(".ipynb"), as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))


def test_findings_are_displayed_and_a_line_stands_where_the_rows_have_none(smoke):
    """The toy's tables ship, and are the same with every preset; those of preset smoke hold two sizes alone."""
    text, toy = executed_text(smoke), load_rows(paths.data() / "results" / "03_manifold.json")
    for finding in (stray_text, leaving_text, diagram_text, controls_text, toy_conclusion):
        assert in_words(finding, toy).data in text
    assert gpu_text() in text and text.count("nothing is said here, since") >= 10
    assert "there are no rows of wider networks" in text


def test_the_committed_copy_displays_what_the_rows_say():
    """Where its outputs are those of its code."""
    notebook = paths.notebooks() / "03_prediction_targets.ipynb"
    if not is_fresh(notebook):
        pytest.skip("the outputs are of an older copy; `lab.py refresh 03` makes them again")
    book = nbformat.read(notebook, as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    text = "\n".join(output["data"].get("text/markdown", "") for output in outputs if "data" in output)
    assert "nothing is said here" not in text
    rows = load_rows(results_file("03_targets", "shapes"))
    assert in_words(size_conclusion, rows, 96).data in text and in_words(judge_text, rows).data in text


def test_numbers_that_were_measured_stand_in_no_prose():
    """Factors, shares and distances are in displayed text alone, which is made from the rows; the first screen's are compared with them."""
    text = study_text()
    for number in ("3.9", "6.6", "8.8", "279", "0.93", "22.2", "0.69", "1,009", "11.0 +/-", "1.24", "0.43"):
        assert not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", text), number


@pytest.mark.parametrize(("steps", "percent"), [(20, 2), (12, 4)])
def test_noise_that_a_perfect_noise_network_leaves_after_one_step(steps, percent):
    """Data are 0, so x_t = t eps, and a network that knows this says eps = x_t / t."""

    class Perfect(torch.nn.Module):
        num_classes, class_dim = 0, None

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))  # the sampler asks for a device

        def forward(self, x, t, y=None):
            return Output(self.scale * x / t.view(-1, 1), None, {})

    start, objective = torch.ones(1, 4, dtype=torch.float64), Objective(prediction="eps", clamp=0.05)
    steps = sample(Perfect(), objective, torch.zeros(1, dtype=torch.long), SamplerConfig("heun", steps), start=start)
    first = [next(steps) for _ in range(2)][1]
    assert round(100 * (first.x.mean().item() - first.t)) == percent
    assert "the first of 20 steps leaves 2 % more noise than it should, and the first of 12 steps 4 %" in study_text()


def test_a_run_of_jit_is_looked_at(tmp_path, after_smoke):
    out = with_tables(after_smoke("03"), tmp_path / "out", "03_rows.json", "03_jit.json")
    more = "network.width=16 training.steps=2 data.n=64"
    path = train(make_recipe("jit", "smoke", overrides=more), tmp_path / "mine", "cpu", 0)
    run_cells("03", {"preset": "smoke", "run": str(path), "out_dir": out})
    assert (tmp_path / "out" / "03_filmstrip.png").exists()
