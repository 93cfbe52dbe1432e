"""Study 03 as its users run it: papermill end to end, what ships, and mistakes in seconds."""

import nbformat
import numpy as np
import pytest
from studies import check_figure, check_first_cells, check_smoke, own_folders, smoke_fixture  # noqa: F401  (fixtures)

from maskalign_lab import paths
from maskalign_lab.batch import run_study
from maskalign_lab.experiments import load_rows, results_file
from maskalign_lab.manifold import ToyConfig
from maskalign_lab.manifold_survey import energies, pick
from maskalign_lab.prediction_targets import KINDS, main_effects
from maskalign_lab.recipes import make_recipe, train
from maskalign_lab.targets import ARMS, AXES, BY_SIZE, JIT_ARMS, ONE_IMAGE, SCALES, versus_x
from maskalign_lab.targets_figures import nine_table
from maskalign_lab.targets_film import load_film
from maskalign_lab.verdicts import comparison

smoke = smoke_fixture("03")


def test_smoke_runs_end_to_end(smoke):
    check_smoke(smoke)


def test_figures_are_small_and_traceable(smoke):
    for name in ("03_filmstrip", "03_by_size", "03_width"):
        check_figure(smoke, "03_prediction_targets", name)


def test_the_tables_of_the_job_are_kept(smoke):
    rows = load_rows(smoke.path(".html").parent / "03_rows.json")
    assert {row["arm"] for row in rows} == {arm.name for arm in SCALES["smoke"].arms}
    assert load_film(smoke.path(".html").parent / "03_film.safetensors").predictions() == ["x", "eps", "v"]


def test_the_toy_is_traced_with_its_criterion(smoke):
    side = check_figure(smoke, "03_prediction_targets", "03_toy")
    told = {(row["data"], row["asked"]): row for row in side["criterion"]}
    assert len(told) == 6 and told["spiral", "at least 10"]["whole interval meets it"] is True
    assert {row["size"] for row in side["by_size"]} == {"16 px", "32 px"} and side["effects"] == []


def test_jit_is_trained_beside_itself_without_a_part(smoke):
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
    assert seeds.keys() <= {arm.name for arm in ARMS} and {arm.name for arm in BY_SIZE} <= seeds.keys()
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


def series(values, digits: int = 1) -> str:
    """ "3.9, 6.6 and 8.8" """
    *first, last = (f"{value:,.{digits}f}" for value in values)
    return f"{', '.join(first)} and {last}"


def test_the_findings_say_what_the_tables_say():
    """The numbers of the prose, made again from the rows that ship."""
    text = study_text()
    table = versus_x(load_rows(paths.data() / "results" / "03_targets_shapes.json"))
    table = table.set_index(["detail", "prediction", "size"]).sort_index()
    error, loss = (f"{name} / x's" for name in AXES.values())
    larger = ["32 px", "64 px", "128 px"]
    factors = {(d, kind): table.loc[d, kind].loc[larger] for d in ("true", "repeated") for kind in ("eps", "v")}
    v, eps, repeated = factors["true", "v"], factors["true", "eps"], factors["repeated", "v"]
    small = table.loc["true", "v"].loc["16 px"]
    for told in (
        f"its error of $\\hat x$ is {small[error]:.2f} of x's and its v-loss {small[loss]:.2f}",
        f"v's error of $\\hat x$ is {series(v[error])} times x's, its v-loss {series(v[loss])} times",
        f"{series(eps[error], 0)} times x's error of $\\hat x$, and {series(eps[loss], 0)} times its v-loss",
        f"{series(repeated[error])} on the error of $\\hat x$, {series(repeated[loss])} on the v-loss",
    ):
        assert told in text, told
    verdicts = [f"{name}: x is better" for name in AXES.values()]
    assert (small[verdicts] == "contradicted").all()
    assert all((of[verdicts] == "reproduced").all().all() for of in factors.values())


def test_the_findings_on_photographs_say_what_their_table_says():
    table = (
        versus_x(load_rows(results_file("03_targets", "photos")))
        .query("prediction == 'v'")
        .set_index(["detail", "size"])
    )
    for detail, axis, told in (
        ("true", "error of x̂ / x's", (1.03, 3.7, 5.6, 6.1)),
        ("true", "v-loss / x's", (0.82, 1.6, 1.5, 1.03)),
        ("repeated", "error of x̂ / x's", (4.6, 8.0, 11.4)),
        ("repeated", "v-loss / x's", (3.0, 5.3, 6.2)),
    ):
        np.testing.assert_allclose(table.loc[detail, axis], told, atol=0.051)
    assert table.loc[("true", "128 px"), "v-loss: x is better"] == "undecided (3 seeds)"


def test_the_findings_on_jits_parts_say_what_their_table_says():
    rows = load_rows(results_file("03_jit", "shapes"))
    table = comparison(rows, "velocity", "JiT", {arm.name: arm.claim for arm in JIT_ARMS}).set_index("arm")
    assert table.loc["JiT", "velocity"] == pytest.approx(0.71, abs=5e-3)
    left_out = table.loc["without bottleneck"]
    assert left_out["verdict"] == "contradicted" and left_out["difference"] == pytest.approx(-0.16, abs=5e-3)
    assert table.drop(["JiT", "without bottleneck"])["verdict"].str.startswith("undecided").all()


def test_the_text_on_shares_ranks_and_the_judge_says_what_the_tables_say():
    text, rows = study_text(), load_rows(paths.data() / "results" / "03_targets_shapes.json")
    shares = [main_effects(nine_table(rows, "velocity", size)[:, [0, 2]])["prediction"] for size in (64, 128)]
    assert f"shares of {series(shares, 2)} of the v-loss even between x and v alone" in text
    judge = [nine_table(rows, "frechet", 16)[2, column] for column in (0, 2)]
    assert f"it cannot tell x from v ({series(judge)})" in text
    rank = np.mean([row["rank per t"] for row in rows if row["arm"] == "x, v-loss, 128 px"], 0)
    assert f"its rank rises from {rank[0]:.1f} to {rank[-1]:.1f}" in text
    near = {
        kind: np.mean([r["x error per t"][0] for r in rows if r["arm"] == f"{kind}, v-loss, 128 px"]) for kind in KINDS
    }
    assert f"the error of $\\hat x$ is {near['x']:.3f} for x-prediction and {near['v']:.3f} for the other two" in text
    assert f"{near['eps']:.3f}" == f"{near['v']:.3f}"


def test_the_text_on_the_toy_says_what_the_table_says():
    text, toy = study_text(), load_rows(paths.data() / "results" / "03_manifold.json")
    found = {kind: energies(pick(toy, dim=16, prediction=kind)) for kind in KINDS}
    stray = [found[kind]["stray distance"] for kind in ("eps", "v")]
    assert f"stray {series(stray, 2)} deviations from the spiral, those of x {found['x']['stray distance']:.3f}" in text
    assert f"{found['eps']['share that leaves']:.0%}".replace("%", " %") + " of the trajectories" in text
    steps = 4 * ToyConfig().steps
    left = [
        energies(pick(toy, prediction="v", **change))["energy per coordinate"]
        for change in ({}, {"steps": steps}, {"width": 1024}, {"width": 1024, "steps": steps})
    ]
    more, wider, both = (f"{value:.2f}" for value in left[1:])
    assert (
        f"the energy falls from {left[0]:.2f} to {more} with four times the steps, to {wider} with four times" in text
    )
    assert f"and to {both} with both" in text


def test_the_scrubber_comes_by_the_third_code_cell():
    check_first_cells("03_prediction_targets")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "smoke", "overrides": "objective.clmap=0.1"}, "Did you mean 'objective.clamp'"),
        ({"preset": "smoke", "overrides": "objective.clamp=0"}, "set objective.clamp"),
        ({"run": "reg-shapes"}, "needs a class token"),
    ],
)
def test_mistakes_fail_with_a_clear_error(given, message, tmp_path):
    job = run_study("03", given, tmp_path / "job")
    assert job.status == "failed" and message in job.error


def test_a_run_of_jit_is_looked_at(tmp_path):
    more = "network.width=16 training.steps=2 data.n=64"
    path = train(make_recipe("jit", "smoke", overrides=more), tmp_path / "mine", "cpu", 0)
    job = run_study("03", {"preset": "smoke", "run": str(path)}, tmp_path / "job")
    assert job.status == "ok", job.error
