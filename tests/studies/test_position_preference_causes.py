"""Study 02, where a position map comes from: every cause is taken away alone, and tables of known maps say what was put in."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.known_maps import known_rows, true_shares

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.data.oracle import token_means
from maskalign_lab.diffusion.interpolants import coefficients, interpolate
from maskalign_lab.encoders.teacher_variants import moved_order
from maskalign_lab.encoders.teachers import load_teacher
from maskalign_lab.gradient_norms import analysis_noise, noised_inputs, observe, read_depth
from maskalign_lab.measure.decomposition import Fitted
from maskalign_lab.measure.findings import findings_table
from maskalign_lab.measure.wording import NotTrained
from maskalign_lab.position_preference import parts_at
from maskalign_lab.runs.experiments import run_arms
from maskalign_lab.runs.recipe import identity, override
from maskalign_lab.runs.run import load_run, train
from maskalign_lab.runs.rung import trainable
from maskalign_lab.studies.gradient_norms import arms as study_01
from maskalign_lab.studies.gradient_norms.unevenness import TIMES
from maskalign_lab.studies.position_preference import causes, grid
from maskalign_lab.studies.position_preference.arms import ARMS, BY_NAME, SCALES, measure_causes
from maskalign_lab.studies.position_preference.cause_figures import (
    COLUMNS,
    PATHS,
    WITH,
    cause_figure,
    laid_out,
    stacked,
)
from maskalign_lab.studies.position_preference.cause_findings import (
    cause_findings,
    cause_table,
    cell,
    explained,
    follows,
    likeness,
    log_peak,
)
from maskalign_lab.studies.position_preference.causes import PLAIN, TEACHERS, attention_cut, untrained, with_teacher

FEW = "training.steps=3 training.warmup=1 data.n=64"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKALIGN_LAB_CACHE", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder


def trained(cache, name, overrides=""):
    recipe = SCALES["smoke"].recipe_of("smoke", "shapes", f"{FEW} {overrides}")(BY_NAME[name], 0)
    return load_run(train(recipe, cache / f"{name}{overrides}".replace(" ", "-"), "cpu", print_every=0))


@pytest.fixture(scope="module")
def sit(cache):
    return trained(cache, "SiT")


@pytest.fixture(scope="module")
def repa(cache):
    return trained(cache, "REPA")


def told(map_, teacher="as taught", student="REPA", change="", seed=0, **others):
    """A case whose maps are the same in both halves and at all times."""
    map_ = torch.as_tensor(map_, dtype=torch.float32)
    logs = (map_ - map_.mean()).expand(2, len(TIMES), -1)
    case = grid.Case(student, teacher, change, seed, logs.softmax(-1), logs, logs[0], map_, None)
    return case._replace(**others)


# ---- the arms


def test_arms_that_another_study_trains_too_are_the_same_trainings():
    """So that they are found in the cache, and not trained twice."""
    mine, theirs = (module.SCALES["laptop"].recipe_of("laptop", "shapes") for module in (causes_arms(), study_01))
    shared = {arm.name: arm for arm in study_01.ARMS}
    for name in ("SiT", "REPA", "REPA, oracle", "MaskAlign"):
        assert identity(mine(BY_NAME[name], 5)) == identity(theirs(shared[name], 5))
    assert len({identity(mine(arm, 5)) for arm in ARMS}) == len(ARMS)


def causes_arms():
    from maskalign_lab.studies.position_preference import arms

    return arms


def test_an_arm_changes_one_thing():
    recipe_of = SCALES["laptop"].recipe_of("laptop", "shapes")
    plain = recipe_of(BY_NAME["REPA"], 5)
    for name, change in {
        "REPA, permuted": "data.teacher=tiny-4x4?permuted",
        "REPA, oracle with position": "data.teacher=oracle:position=0.3",
        "REPA, torus": "data.variant=torus",
        "REPA, vp path": "objective.interpolant=vp",
        "REPA, logit-normal times": "objective.time_law=logit-normal",
    }.items():
        assert recipe_of(BY_NAME[name], 5) == override(plain, change), name


def test_a_teacher_of_ones_own_has_the_same_variants():
    recipe_of = SCALES["laptop"].recipe_of("laptop", "digits", "data.teacher=tiny:/mine")
    assert recipe_of(BY_NAME["MaskAlign, centred"], 5).data.teacher == "tiny:/mine?centred"
    told = [arm.name for arm in trainable(ARMS, "digits")]
    assert "REPA, random" in told and not any("oracle" in name or "torus" in name for name in told)
    assert trainable(ARMS, "shapes") == ARMS


# ---- what is taken away


def test_a_permuted_teacher_says_the_same_elsewhere(sit):
    pictures = sit.survey_images(16)
    plain, moved = (with_teacher(sit, name).teacher_view(pictures) for name in ("tiny", "tiny?permuted"))
    assert torch.equal(moved.tokens, plain.tokens[:, moved_order(64)]) and torch.equal(moved.cls, plain.cls)
    assert sit.recipe.data.teacher == "tiny"  # the run itself is as it was


def test_a_centred_teacher_differs_between_positions_by_no_more_than_chance(sit):
    """Of images that the means were not taken from."""
    pictures = sit.survey_images(600).images()
    for name, low, high in (("tiny-4x4", 5, np.inf), ("tiny-4x4?centred", 0, 2)):
        tokens = load_teacher(name)(pictures).tokens.float()
        chance = tokens.var(0).mean() / len(tokens)  # less, if tokens of an image are alike
        assert low < tokens.mean(0).var(0).mean() / chance < high, name


def test_a_torus_covers_all_positions_alike():
    """Each of 16 means is within 4 standard errors of their mean; on the plane the middle is far out."""
    for placement, near in (("torus", True), ("uniform", False)):
        covered = token_means(load_dataset("shapes", n=3000, seed=1, placement=placement).masks, 4)
        errors = (covered.mean(0) - covered.mean()) / (covered.std(0) / len(covered) ** 0.5)
        assert (np.abs(errors).max() < 4) == near


def test_the_untrained_network_is_the_one_that_training_began_from(sit):
    first = untrained(sit)
    assert first.step == 0 and sit.step == 3
    again = untrained(trained_elsewhere := replace(sit))
    for one, other in zip(first.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(one, other) and not one.requires_grad
    moved = [not torch.equal(a, b) for a, b in zip(first.net.parameters(), trained_elsewhere.net.parameters())]
    assert any(moved)


def hidden_with_another_corner(run):
    """Hidden tokens of an image, and of one that differs in its first patch."""
    pictures, index = run.survey_images(2), np.arange(2)
    x_t, t, y, _ = noised_inputs(run, pictures, index, torch.full((2,), 0.3), 0)
    other = x_t.clone()
    other[:, :, : run.net.patch_size, : run.net.patch_size] += 1
    return (run.net.hidden(x, t, y, 2)[:, 1:] for x in (x_t, other))


def test_without_attention_a_token_depends_on_its_own_patch(repa):
    one, other = hidden_with_another_corner(repa)
    assert not torch.allclose(one, other)
    with attention_cut(repa.net):
        cut, also = hidden_with_another_corner(repa)
    assert torch.equal(cut, also) and not torch.allclose(cut, one)
    assert torch.equal(next(hidden_with_another_corner(repa)), one)  # and is put back
    assert torch.equal(*hidden_with_another_corner(untrained(repa)))


@pytest.mark.parametrize("path", ["cosine", "vp"])
def test_a_network_is_shown_the_path_that_it_was_trained_on(repa, path):
    changed = replace(repa, recipe=override(repa.recipe, f"objective.interpolant={path}"))
    pictures, index, t = repa.survey_images(4), np.arange(4), torch.tensor([0.1, 0.4, 0.6, 0.9])
    shown, straight = (noised_inputs(run, pictures, index, t, 3)[0] for run in (changed, repa))
    x = repa.inputs(pictures, index)
    assert torch.equal(shown, interpolate(x, analysis_noise(x, 3), t, path)) and not torch.allclose(shown, straight)


# ---- maps


def test_maps_are_those_of_the_pull(repa):
    pictures, observed = repa.survey_images(40), observe(repa)
    maps = {name: torch.tensor(value) for name, value in causes.position_maps(observed, pictures).items()}
    norms = parts_at(observed, pictures, TIMES).sum(1).exp()  # (T, b, n)
    assert maps["marks"].shape == maps["logs"].shape == (2, len(TIMES), 64) and maps["angles"].shape == (len(TIMES), 64)
    half = norms[:, :20].log().mean(1)
    torch.testing.assert_close(maps["logs"][0], half - half.mean(-1, keepdim=True), rtol=0, atol=6e-4)
    count = torch.zeros(len(TIMES), 64).scatter_add_(
        1, norms[:, 20:].topk(6).indices.flatten(1), torch.ones(len(TIMES), 120)
    )
    torch.testing.assert_close(maps["marks"][1], count / 20, rtol=0, atol=6e-4)


def test_spread_is_about_the_mean_direction_of_each_position():
    features = torch.zeros(4, 3, 2)
    features[:, 0] = torch.tensor([1.0, 0.0])  # no spread
    features[:, 1] = torch.tensor([[1.0, 0.1], [1.0, -0.1]] * 2)
    features[:, 2] = torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 2)
    found = causes.spread_map(features)
    assert found[0] < found[1] < found[2] and found.sum().abs() < 1e-5
    torch.testing.assert_close(causes.spread_map(7 * features), found)


def test_a_row_is_plain_and_small(cache, sit, repa):
    row = measure_causes(repa, 32, 16, 0, 2)
    assert json.loads(json.dumps(row)) == row
    own, fitted, cut = row["cases"]
    assert [each["student"] for each in row["cases"]] == ["REPA", "REPA, fitted projector", "REPA, attention cut"]
    assert fitted["logs"] != own["logs"] and fitted["spread"] == own["spread"] and cut["logs"] != fitted["logs"]
    read = measure_causes(sit, 32, 16, 0, 2, (PLAIN, "permuted"))["cases"]
    assert [(each["student"], each["teacher"]) for each in read] == [
        (student, teacher) for teacher in (PLAIN, "permuted") for student in ("untrained", "SiT")
    ]


def test_masked_networks_have_maps_too(cache):
    found = measure_causes(trained(cache, "MaskAlign, oracle"), 32, 16, 0, 2)["cases"]
    assert [(each["student"], each["teacher"]) for each in found] == [
        (student, "oracle") for student in ("MaskAlign", "MaskAlign, fitted projector")
    ]


def test_a_fitted_projector_reads_the_aligned_block_and_is_not_the_run_s_own(repa, sit):
    fitted, own = causes.read(repa, 2), observe(repa)
    assert fitted.depth == own.depth == read_depth(repa) == read_depth(sit)
    assert fitted.projector is not own.projector and fitted.net is own.net
    assert not torch.equal(fitted.projector[0].weight, own.projector[0].weight)


def test_readers_are_those_that_know_the_images(sit):
    assert causes.readers_of(sit, tuple(TEACHERS)) == list(TEACHERS)
    elsewhere = replace(sit, recipe=override(sit.recipe, "data.name=digits"))
    assert not any("oracle" in label for label in causes.readers_of(elsewhere, tuple(TEACHERS)))
    torus = replace(sit, recipe=override(sit.recipe, "data.variant=torus"))
    assert causes.readers_of(torus, tuple(TEACHERS)) == list(causes.ON_TORUS)


# ---- known tables


@pytest.fixture(scope="module")
def known():
    return known_rows(3)


SIZES = st.floats(0.1, 1)


@settings(max_examples=15, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_shares_are_those_that_were_put_in(content, teacher, student):
    """With next to no chance: all of them, and together they are 1."""
    found = grid.variance_shares(grid.cases_in(known_rows(1, 1e-4, content, teacher, student)), 1)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx(true_shares(content, teacher, student), abs=2e-3)


@settings(max_examples=10, deadline=None)
@given(SIZES, st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1))
def test_no_share_is_negative_beyond_the_noise_of_its_estimate(content, teacher, student, chance):
    """The mean of many draws of the noise is not below 0 by more than five of its errors; each draw sums to 1."""
    drawn = [known_rows(1, chance, content, teacher, student, draw) for draw in range(6)]
    found = np.array(
        [list(grid.variance_shares(grid.cases_in(rows), at).values()) for rows in drawn for at in range(len(TIMES))]
    )
    assert found.sum(1) == pytest.approx(1, abs=1e-12)
    assert (found.mean(0) > -5 * found.std(0, ddof=1) / len(found) ** 0.5 - 1e-9).all()


def test_noise_is_taken_off_content_too():
    """No objects, no teacher, no student: the mean of every share but chance's is 0, within four errors."""
    rows = [known_rows(1, 0.5, 0, 0, 0, draw) for draw in range(40)]
    parts = np.array([variances(grid.cases_in(each), at) for each in rows for at in range(len(TIMES))])
    errors = parts.std(0, ddof=1) / len(parts) ** 0.5
    assert (np.abs(parts.mean(0)[:-1]) < 4 * errors[:-1]).all()
    assert parts.mean(0)[-1] == pytest.approx(0.5**2 / 2 * 15 / 16, rel=0.02)


def variances(cases, at):
    """What shares are shares of: of noise alone their sum is near 0, and a ratio of two means nothing."""
    shares = list(grid.variance_shares(cases, at).values())
    chance = torch.stack([case.logs[0, at] - case.logs[1, at] for case in cases if case.change != "torus"])
    return np.array(shares) * (chance.double().square().mean().item() / 4 / shares[-1])


def test_maps_of_another_path_are_those_of_the_same_noise():
    """On the vp path there is as much noise at t = 0.25 as on the linear one at 0.49."""
    quarter = coefficients("vp", torch.tensor([0.25]), torch.zeros(1))
    assert (quarter.sigma / quarter.alpha).item() == pytest.approx(0.49 / 0.51, abs=0.02)
    clock = np.broadcast_to(np.arange(5)[:, None], (2, 5, 16)).tolist()
    maps = {"logs": clock, "marks": clock, "angles": clock[0]}
    known = known_rows(1)[0]
    for change, at in {"cosine path": [0, 1, 2, 3, 4], "vp path": [0, 1, 1, 2, 4], "torus": [0, 1, 2, 3, 4]}.items():
        row = known | {"arm": f"SiT, {change}", "cases": [known["cases"][0] | maps]}
        (seen,) = grid.cases_in([row])
        for found in (*seen.logs, *seen.marks, seen.angles):
            assert found[:, 0].tolist() == at and (found == found[:, :1]).all()


def test_content_is_what_lies_along_the_coverage():
    coverage = torch.tensor([0.0, 1.0, 2.0, 3.0])
    direction = (coverage - 1.5).double()
    said = lambda map_, noise=0.0: Fitted({"common": {"all": map_}}, {}, {"common": noise})  # noqa: E731
    whole = (4 * direction.square()).mean().item()
    assert grid.content_of(said(2 * direction), coverage) == pytest.approx(whole)
    assert grid.content_of(said(2 * direction, 0.3), coverage) == pytest.approx(whole - 0.1)
    assert grid.content_of(said(torch.tensor([1.0, -1.0, -1.0, 1.0]).double()), coverage) == pytest.approx(0)
    assert grid.content_of(said(direction), None) == 0


def test_seeds_whose_grid_is_narrower_have_no_shares(known):
    """They would be shares of something else."""
    lacking = [row for row in known if not (row["seed"] == 1 and row["arm"] == "SiT")]
    whole, shares = (grid.all_shares(grid.cases_in(rows)) for rows in (known, lacking))
    for name in grid.SHARES:
        torch.testing.assert_close(shares[name], whole[name][:, [0, 2]])
    assert grid.all_shares([]) == grid.all_shares(grid.cases_in(known)[:2]) == {}


def test_bars_end_at_one_whatever_chance_does():
    negative = {"one": torch.tensor([[-0.2, -0.1]]), "two": torch.tensor([[0.8, 0.7]]), "three": torch.tensor([[0.4]])}
    bars = stacked(negative)
    assert sum(bars.values()) == pytest.approx(1) and bars["one"] == 0 and bars["two"] > bars["three"] > 0


def test_a_map_follows_its_teacher_or_stays():
    random, order = np.random.default_rng(0), moved_order(16)
    map_ = torch.from_numpy(random.standard_normal(16)).float()
    plain, moved, still = told(map_), told(map_[order], "permuted"), told(map_, "permuted")
    assert likeness(moved, plain, order) == pytest.approx(1, abs=1e-5) and abs(likeness(moved, plain)) < 0.9
    assert likeness(still, plain) == pytest.approx(1, abs=1e-5) and abs(likeness(still, plain, order)) < 0.9


def test_an_even_map_has_no_peak_and_a_favourite_is_asked_of_other_images():
    even = told(torch.zeros(16))
    assert log_peak(even) == pytest.approx(0, abs=1e-6)
    marks = torch.full((2, len(TIMES), 16), 0.1)
    marks[0, :, 3], marks[1, :, 5] = 0.9, 0.9  # each half has another favourite
    assert log_peak(even._replace(marks=marks)) < 0


def test_findings_of_a_known_table(known):
    text = findings_table(
        [make for name, make in cause_findings(known).items() if name not in ("centred", "unaligned")]
    ).data
    assert text.count("\n| ") == 10 and "(3 seeds)" in text and "02_causes" in text
    content = explained(known, "content", "?")
    assert content.verdict == "higher (3 seeds)" and 40 < float(content.effect.split()[0]) < 75


def test_a_likeness_is_held_against_maps_as_smooth():
    """Seeds that agree on two maps say nothing of whether the maps belong together."""
    rows = known_rows(3, 0.01, content=0, student=0)
    moved, left = follows(rows, True), follows(rows, False)
    assert moved.effect.startswith("+1.00") and moved.verdict == "higher (3 seeds)"
    assert left.effect.startswith("+.2") and left.verdict == "undecided (3 seeds)"
    assert 0.2 < float(left.effect.rpartition(" ")[2].strip(")")) < 0.6
    assert follows([row for row in rows if not row["seed"]], True).verdict == "undecided (1 seed)"


def test_what_was_not_trained_is_left_out(known):
    few = [row for row in known if row["arm"] in ("SiT", "REPA")]
    with pytest.raises(NotTrained, match="permuted"):
        follows(few, True)
    with pytest.raises(NotTrained, match="torus"):
        cell(few, "REPA", "oracle", "torus")
    text = findings_table(
        [make for name, make in cause_findings(few).items() if name not in ("centred", "unaligned")]
    ).data
    assert "moved along" not in text and "Without training?" in text
    assert cause_figure([]) is None and cause_figure([{"arm": "SiT", "seed": 5, "budget": "steps"}]) is None


def test_the_figure_shows_every_cell(known):
    laid = laid_out(grid.cases_in(known))
    assert laid.lines == [*TEACHERS, WITH] and tuple(laid.columns) == COLUMNS
    assert len(laid.cells[0, 2]) == 3 and not laid.cells[1, len(COLUMNS) - 1]  # no centred teacher on the torus
    assert all(len(laid.cells[len(TEACHERS), place]) == 3 for place in range(len(PATHS)))
    plain = laid_out([case for case in grid.cases_in(known) if case.change not in PATHS])
    assert (
        plain.lines == list(TEACHERS) and not plain.paths and max(line for line, _ in plain.cells) == len(TEACHERS) - 1
    )
    few = [row for row in known if row["arm"].startswith("REPA") and row["arm"].endswith(("path", "times"))]
    assert cause_figure(few) is not None  # more paths than columns
    figure = cause_figure(known, 1.0)
    titles = [axis.get_title() for axis in figure.findobj(lambda each: hasattr(each, "get_title"))]
    assert {title for *_, title in COLUMNS} <= set(titles)
    assert len(cause_table(known)) == len({case[:3] for case in grid.cases_in(known)})


# ---- all of it


def test_the_smallest_grid_end_to_end(cache, tmp_path):
    scale = SCALES["smoke"]
    recipe_of = scale.recipe_of("smoke", "shapes", FEW)
    measure = lambda run: measure_causes(run, 32, 16, 0, 2, scale.readers)  # noqa: E731
    keep = tmp_path / "rows.json"
    rows = run_arms(scale.arms, (5, 6), recipe_of, None, measure, keep=keep, device="cpu")
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm.name, seed) for seed in (5, 6) for arm in scale.arms]
    assert {row["budget"] for row in rows} == {"steps"}
    again = run_arms(
        scale.arms, (5, 6), recipe_of, None, pytest.fail, json.loads(keep.read_text())["rows"], device="cpu"
    )
    assert again == rows
    assert (
        cause_figure(rows) is not None
        and "With a teacher" not in findings_table([*cause_findings(rows).values()][:10]).data
    )
    assert {"peak, t = 0", "with objects, t = 1", "angle's share, t = 0"} <= set(cause_table(rows).columns)
