"""Study 03: what its smoke run leaves, the tables that ship, and what its text says of them."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from shared.studies import check_figure, run_job, smoke_fixture

from maskalign_lab.base import paths
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sampling import SamplerConfig, sample
from maskalign_lab.diffusion.sit import Output
from maskalign_lab.measure.verdicts import beside, comparison
from maskalign_lab.prediction_targets import KINDS, SIDE, main_effects
from maskalign_lab.runs.experiments import load_rows, results_file
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
from maskalign_lab.studies.prediction_targets.arms import (
    ARMS,
    BY_SIZE,
    JIT_ARMS,
    JIT_WORDS,
    ONE_IMAGE,
    SCALES,
    film_arms,
    sheet_arms,
    target_arm,
)
from maskalign_lab.studies.prediction_targets.figures import nine_table
from maskalign_lab.studies.prediction_targets.film import load_film
from maskalign_lab.studies.prediction_targets.manifold import DATA, LEFT, ToyConfig
from maskalign_lab.studies.prediction_targets.manifold_survey import energies, paired_ratio, pick
from maskalign_lab.studies.prediction_targets.measures import AXES, JITS_TIMES, versus_x, width_bound, with_jits_times

smoke = smoke_fixture("03")
THREE = AXES | JITS_TIMES  # metric of the rows -> what it is called
VERDICTS = [f"{name}: verdict" for name in THREE.values()]
LARGER = ["32 px", "64 px", "128 px"]


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
    assert load_film(smoke.path(".html").parent / "03_film.safetensors").predictions() == ["x", "eps", "v"]


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


def series(values, digits: int = 1) -> str:
    """ "3.9, 6.6 and 8.8" """
    *first, last = (f"{value:,.{digits}f}" for value in values)
    return f"{', '.join(first)} and {last}"


def versus(dataset: str):
    """Factors and verdicts of the rows that ship on all three axes, by detail, prediction and size."""
    rows = with_jits_times(load_rows(results_file("03_targets", dataset)))
    return versus_x(rows, metrics=THREE).set_index(["detail", "prediction", "size"]).sort_index()


def test_the_findings_say_what_the_tables_say():
    """The numbers of the prose, made again from the rows that ship."""
    text, table = study_text(), versus("shapes")
    error, loss, jits = (f"{name} / x's" for name in THREE.values())
    factors = {(d, kind): table.loc[d, kind].loc[LARGER] for d in ("true", "repeated") for kind in ("eps", "v")}
    v, eps, repeated = factors["true", "v"], factors["true", "eps"], factors["repeated", "v"]
    small = table.loc["true", "v"].loc["16 px"]
    for told in (
        f"v is slightly better: {small[error]:.2f} of x's error of $\\hat x$ and {small[loss]:.2f} of its v-loss",
        f"v's error of $\\hat x$ is {series(v[error])} times x's, its v-loss {series(v[loss])} times, "
        f"and over JiT's times {series(v[jits])} times",
        f"{series(eps[error], 0)} times x's error of $\\hat x$, and {series(eps[loss], 0)} times its v-loss",
        f"{series(repeated[error])} on the error of $\\hat x$, {series(repeated[loss])} on the v-loss",
    ):
        assert told in text, told
    assert (small[VERDICTS] == "lower").all()
    assert all((of[VERDICTS] == "reproduced").all().all() for of in factors.values())


def test_the_findings_on_wider_networks_and_louder_noise_say_what_their_rows_say():
    text, rows = study_text(), load_rows(results_file("03_targets", "shapes"))
    mean = lambda arm, metric: np.mean([row[metric] for row in rows if row["arm"] == arm.name])  # noqa: E731
    wide = {kind: [mean(target_arm(kind, "v", 64, width=w), "velocity") for w in (0, 192, 384)] for kind in "xv"}
    matched = {kind: [target_arm(kind, "v", size, "matched") for size in (32, 64, 128)] for kind in "xv"}
    above = [
        100 * (mean(arm, "velocity") / width_bound("v", "velocity", 96, 3 * (size // SIDE) ** 2, size / 16) - 1)
        for arm, size in zip(matched["v"], (32, 64, 128), strict=True)
    ]
    errors = [mean(arm, "x error") for arm in matched["x"]]
    small = mean(target_arm("x", "v"), "x error")
    times = [mean(arm, "x error") / error for arm, error in zip(matched["v"], errors, strict=True)]
    over = [value - bound for value, bound in zip(wide["v"], (0.875, 0.75, 0.5), strict=True)]
    across = [mean(arm, "across") / mean(arm, "x error") for arm in matched["v"]]
    for told in (
        f"stays {min(over):.2f} to {max(over):.2f} above it",
        f"With louder noise (`matched`) v's is {series(across, 2)}.",
        f"its bound, {series(wide['v'], 2)} beside 0.875, 0.75 and 0.5",
        f"x gains from the width as well ({series(wide['x'], 2)}), "
        f"so v's stays {series(np.divide(wide['v'], wide['x']))} times x's",
        f"its error of $\\hat x$ is {series(errors, 3)}, as at 16 pixels ({small:.3f})",
        f"is {above[0]:.0f}, {above[1]:.1f} and {above[2]:.1f} % above its bound",
        f"its error of $\\hat x$ {series(times, 0)} times x's",
    ):
        assert told in text, told


def test_the_findings_on_photographs_say_what_their_table_says():
    text, table = study_text(), versus("photos")
    error, loss, jits = (f"{name} / x's" for name in THREE.values())
    true, repeated = table.loc["true", "v"].loc[["16 px", *LARGER]], table.loc["repeated", "v"].loc[LARGER]
    small, large = true.iloc[0], true.iloc[-1]
    for told in (
        f"v's error of $\\hat x$ is {small[error]:.2f} (undecided), {series(true[error][1:])} times x's",
        f"its v-loss {small[loss]:.2f}, {true[loss].iloc[1]:.1f}, {true[loss].iloc[2]:.1f} and {large[loss]:.2f} times, the last",
        f"over JiT's times {small[jits]:.2f}, {series(true[jits][1:])} times",
        f"With repeated pixels {series(repeated[error])}, and {series(repeated[loss])}",
    ):
        assert told in text, told
    cifar = versus("folder:cifar10/train").loc["true", "v"].loc[["16 px", *LARGER]]
    assert f"true detail, {cifar[error].iloc[0]:.2f} times at 16 pixels, then {series(cifar[error][1:])}" in text
    assert f"on the v-loss {cifar[loss].iloc[0]:.2f}, {series(cifar[loss][1:])};" in text
    assert (cifar[VERDICTS][1:] == "reproduced").all().all()
    assert small["error of x̂: verdict"] == "undecided (3 seeds)"
    decided = pd.concat(
        [table.loc[d, kind].loc[LARGER][VERDICTS] for d in ("true", "repeated") for kind in ("eps", "v")]
    )
    assert (decided != "reproduced").sum().tolist() == [0, 1, 0] and large["v-loss: verdict"] == "undecided (3 seeds)"


def test_the_findings_on_jits_parts_say_what_their_table_says():
    text, rows = study_text(), with_jits_times(load_rows(results_file("03_jit", "shapes")))
    (jits,) = JITS_TIMES
    claims = {arm.name: arm.claim for arm in JIT_ARMS}
    loss, over_times, judge = (
        comparison(rows, m, "JiT", claims).set_index("arm") for m in ("velocity", jits, "frechet")
    )
    jit, bare, rope = loss.loc["JiT"], loss.loc["without bottleneck"], over_times.loc["without rope"]
    seen = judge.loc["without bottleneck"]
    share = np.mean([row["x error per t"][0] / 0.05**2 / 10 / row["velocity"] for row in rows if row["arm"] == "JiT"])
    for told in (
        f"JiT's own v-loss is {jit['velocity']:.2f}, with a deviation of {jit['spread']:.2f}",
        f"Without the bottleneck the v-loss is lower ({bare['difference']:.2f} +/- {bare['+/-']:.2f})",
        f"({seen['difference']:+.1f} +/- {seen['+/-']:.1f}, undecided)",
        f"owes {share:.0%}".replace("%", " %") + " to t = 0.05",
        f"leaving out the rotary positions is worse ({rope['difference']:+.4f} +/- {rope['+/-']:.4f})",
    ):
        assert told in text, told
    assert {bare["verdict"], over_times.loc["without bottleneck", "verdict"]} == {"contradicted"}
    assert rope["verdict"] == "reproduced" and seen["verdict"] == "undecided (3 seeds)"
    by_seed = {arm: {row["seed"]: row["frechet"] for row in rows if row["arm"] == arm} for arm in claims}
    assert all(by_seed["without bottleneck"][k] > by_seed["JiT"][k] for k in range(3))
    others = pd.concat([loss.drop(["JiT", "without bottleneck"]), judge.drop("JiT")])
    assert others["verdict"].str.startswith("undecided").all() and set(JIT_WORDS) < set(loss.index)


def test_the_loss_space_by_the_judge_is_told_as_it_is():
    """x-loss less v-loss, by the judge, paired over seeds."""
    text, rows = study_text(), load_rows(results_file("03_targets", "shapes"))

    def less(kind: str, size: int):
        of = [{r["seed"]: r["frechet"] for r in rows if r["arm"] == f"{kind}, {s}-loss, {size} px"} for s in "xv"]
        return beside(*of)

    v, x = ([less(kind, size) for size in (16, 64, 128)] for kind in "vx")
    told = [f"{abs(each.mean):.1f} +/- {each.half:.1f}" for each in v]
    assert f"for v at all three sizes (by {told[0]}, {told[1]} and {told[2]})" in text
    assert f"for v at all three sizes (-{', -'.join(told)})" in text
    assert f"for x at 16 pixels ({-x[0].mean:.1f} +/- {x[0].half:.1f}; undecided" in text
    assert f"for x at 16 pixels ({x[0].mean:.1f} +/- {x[0].half:.1f}; undecided" in text
    assert [each.verdict(0).split()[0] for each in (*v, *x)] == ["lower"] * 4 + ["undecided"] * 2
    assert all(each.mean < 0 for each in x)


def test_the_text_on_shares_ranks_and_the_judge_says_what_the_tables_say():
    text, rows = study_text(), load_rows(paths.data() / "results" / "03_targets_shapes.json")
    shares = [main_effects(nine_table(rows, "velocity", size)[:, [0, 2]])["prediction"] for size in (64, 128)]
    judge = [nine_table(rows, "frechet", 16)[2, column] for column in (0, 2)]
    assert f"it cannot tell x from v ({series(judge)})" in text
    spread = [[main_effects(nine_table([row for row in rows if row["seed"] == seed], "velocity", size)[:, [0, 2]])["prediction"]
               for seed in range(3)] for size in (64, 128)]  # fmt: skip
    small, large = (f"{min(each):.2f} to {max(each):.2f}" for each in spread)
    assert f"shares of {shares[0]:.2f} ({small} over seeds) and {shares[1]:.2f} ({large}) of the v-loss" in text
    near = {
        kind: np.mean([r["x error per t"][0] for r in rows if r["arm"] == f"{kind}, v-loss, 128 px"]) for kind in KINDS
    }
    assert f"the error of $\\hat x$ is {near['x']:.3f} for x-prediction and {near['v']:.3f} for the other two" in text
    assert f"{near['eps']:.3f}" == f"{near['v']:.3f}"


def mean_of(metric: str, size: int, kind: str = "x") -> np.ndarray:
    """A list-valued metric of an arm with v-loss, over seeds."""
    rows = load_rows(results_file("03_targets", "shapes"))
    return np.mean([row[metric] for row in rows if row["arm"] == f"{kind}, v-loss, {size} px"], 0)


def test_the_text_on_ranks_and_scales_says_what_the_rows_say():
    text = study_text()
    x, v, eps = ({size: mean_of("rank per t", size, kind) for size in (16, 32, 64, 128)} for kind in ("x", "v", "eps"))
    noise, larger = np.concatenate([eps[64], eps[128]]), np.concatenate([x[size] for size in (32, 64, 128)])
    for told in (
        f"{noise.min():.0f} to {noise.max():.0f} of 96 at all times",
        f"{v[64].min():.0f} to {v[64].max():.0f} at 64 pixels and {v[128].min():.0f} to {v[128].max():.0f} at 128",
        f"gets along with {larger.min():.0f} to {larger.max():.0f} from 32 pixels on",
        f"at 128 pixels its rank rises from {x[128][0]:.1f} to {x[128][-1]:.1f}, at 64 from {x[64][0]:.0f} to {x[64].max():.0f}",
        f"from {x[32].max():.0f} to {x[32][-1]:.0f}, and at 16 from {x[16].max():.0f} to {x[16][-1]:.0f}",
    ):
        assert told in text, told
    x, v, eps = (mean_of("spectrum", 128, kind)[:-1] for kind in ("x", "v", "eps"))  # the last ring holds the corners
    assert f"at 128 pixels and {len(v) - 1} cycles it is {v[-1]:.0f} for v and {eps[-1]:.0f} for $\\varepsilon$" in text
    assert f"From {np.flatnonzero(x > 1)[0]} cycles on it is above 1 also for x, up to {x.max():.1f}" in text
    assert (
        (x[10:] > 1).all() and (v[:10] < x[:10]).all() and v[10] > x[10] and (eps[:6] < x[:6]).all() and eps[6] > x[6]
    )


def test_the_text_on_the_error_near_the_data_says_what_is_true():
    text, t = study_text(), 0.05
    power = load_dataset("shapes", 128, n=64).images().square().mean().item()
    unchanged, scaled = t**2 * (1 + power), (t / (1 - t)) ** 2  # of x_t and x_t / (1 - t), for noise of variance 1
    v, eps = (mean_of("x error per t", 128, kind)[0] for kind in ("v", "eps"))
    assert (
        f"wrong by {unchanged:.4f} and $x_t/(1-t)$ by {scaled:.4f}; v ({v:.5f}) and $\\varepsilon$ ({eps:.5f})" in text
    )


def test_the_text_on_the_share_across_the_plane_says_what_the_rows_say():
    text, rows, shares = study_text(), load_rows(results_file("03_targets", "shapes")), {}
    for kind in KINDS:
        of = [[r for r in rows if r["arm"] == f"{kind}, v-loss, {size} px, repeated"] for size in (32, 64, 128)]
        shares[kind] = [np.mean([row["across"] / row["x error"] for row in each]) for each in of]
    noise = [1 - 1 / block**2 for block in (2, 4, 8)]
    assert f"is {series(shares['v'], 2)}, which from 64 pixels on is near the {series(noise, 2)} of pure noise" in text
    assert max(shares["x"]) < 5e-4 and np.allclose(shares["eps"], noise, atol=0.03)


def test_the_text_on_one_image_says_what_the_fits_say():
    text, rows = study_text(), load_rows(paths.data() / "results" / "03_one_image.json")
    v = [row for row in rows if row["prediction"] == "v"]
    over = [100 * (row["loss"] / row["bound"] - 1) for row in v if row["bound"]]
    free, x = (
        max(row["loss"] for row in of) for of in ([r for r in v if not r["bound"]], [r for r in rows if r not in v])
    )
    assert f"{min(over):.0f} to {max(over):.0f} % more where there is a bound, and at most {free:.3f} where" in text
    assert f"x's loss is at most {x:.3f}, at any width" in text
    assert f"to within {min(over):.0f} to {max(over):.0f} % of v's bound, and by x to {x:.3f} or better" in text


def test_the_text_on_weighting_says_what_the_nine_say():
    text, rows = study_text(), load_rows(results_file("03_targets", "shapes"))
    tables = [nine_table(rows, "velocity", size) for size in (64, 128)]
    shares = [main_effects(table[:, [0, 2]]) for table in tables]
    low, high = sorted(share["loss space"] for share in shares)
    assert (
        f"beside {low:.2f} to {high:.2f} of the loss space and {shares[0]['interaction']:.2f} of both together" in text
    )
    assert f"the v-loss of x trained with the x-loss is {series(t[0, 0] / t[2, 0] for t in tables)} times that" in text


def test_the_cost_of_preset_gpu_is_the_sum_of_its_steps():
    text, scale, toy = study_text(), SCALES["gpu"], load_rows(paths.data() / "results" / "03_manifold.json")
    recipe_of, jit_of = scale.recipe_of("gpu", "shapes"), scale.jit_recipe_of("gpu", "shapes")
    plan = [recipe_of(arm, seed) for seed in range(scale.seeds) for arm in scale.arms]
    plan += [jit_of(arm, seed) for seed in range(scale.seeds) for arm in scale.jit_arms]
    plan += [recipe_of(arm, 0) for arm in film_arms("gpu").values() if arm not in scale.arms]
    plan += [scale.recipe_of("gpu", "shapes", scale.longer)(arm, 0) for arm in sheet_arms(scale).values()]
    assert f"takes {sum(recipe.training.steps for recipe in plan):,} steps in batches of 256 (384 channels" in text
    assert (
        f"trains the {len(toy)} networks of the toy on the processor, {sum(r['seconds'] for r in toy) / 60:.0f} minutes"
        in text
    )
    assert {recipe.training.batch_size for recipe in plan} == {256}


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


def test_the_text_on_leaving_and_on_the_criterion_says_what_the_toy_says():
    text, toy = study_text(), load_rows(paths.data() / "results" / "03_manifold.json")
    high = {kind: pick(toy, dim=512, prediction=kind) for kind in KINDS}
    assert all(row["left"] == 1 and row["leaving"] > 0.95 for kind in ("eps", "v") for row in high[kind])
    some = pick(toy, dim=16, prediction="eps")
    assert all(row["leaving"] > 0.95 for row in some)  # the median, so more than half in the first of 20 steps
    assert f"and {np.mean([row['left'] for row in some]):.0%}".replace("%", " %") + " in the end" in text
    assert not any(row["left"] for row in toy if row["prediction"] == "x" and row["width"] == 256)
    assert f"the threshold is {LEFT / 510**0.5:.1%}".replace("%", " %") + " of the noise's length" in text
    found = {d: (pick(toy, data=d, dim=512, prediction="v"), pick(toy, data=d, dim=512)) for d in DATA}
    assert all(paired_ratio(v, x, "off")[1] > 10 for v, x in found.values())
    on = {d: paired_ratio(x, pick(toy, data=d, dim=2), "on") for d, (_, x) in found.items()}
    assert f"for the spiral ({on['spiral'][0]:.2f}, at most {on['spiral'][2]:.2f})" in text
    told = {d: "{:.2f}, {:.2f} to {:.2f}".format(*on[d]) for d in ("moons", "gaussians")}
    assert f"for moons ({told['moons']}) and Gaussians ({told['gaussians']}) that is undecided" in text
    assert on["spiral"][2] < 2 and all(on[d][1] < 2 < on[d][2] for d in told)
    base = ToyConfig()
    changes = ({}, {"steps": 4 * base.steps}, {"width": 1024}, {"lr": base.lr / 3}, {"lr": 3 * base.lr})
    controls = [pick(toy, prediction="v", **change) for change in (*changes, {"width": 1024, "steps": 4 * base.steps})]
    stray = [energies(rows)["stray distance"] for rows in controls]
    assert f"points stray {min(stray):.2f} to {max(stray):.2f} in all six" in text
    assert all(row["left"] == 1 for rows in controls for row in rows)


def test_a_run_of_jit_is_looked_at(tmp_path, after_smoke):
    after_smoke("03")
    more = "network.width=16 training.steps=2 data.n=64"
    path = train(make_recipe("jit", "smoke", overrides=more), tmp_path / "mine", "cpu", 0)
    job = run_job("03", {"preset": "smoke", "run": str(path)}, tmp_path / "job")
    assert job.status == "ok", job.error
