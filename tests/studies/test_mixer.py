"""The mixer's doses: which arms they are, what a reader hears of dropped patches, and what the rows are made to say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.diffusion.layers import patchify
from maskalign_lab.gradient_norms import observe
from maskalign_lab.measure.findings import findings_table
from maskalign_lab.runs.building import build
from maskalign_lab.runs.experiments import load_rows, results_file
from maskalign_lab.runs.presets import PRESETS, make_recipe
from maskalign_lab.runs.recipe import identity
from maskalign_lab.runs.run import Run, load_run, train
from maskalign_lab.runs.sources import load_sources
from maskalign_lab.studies.maskalign import arms as masked
from maskalign_lab.studies.maskalign.measures import look
from maskalign_lab.studies.position_preference.gap_quality import (
    ALIKE,
    correlation_table,
    gap_figure,
    gap_findings,
    gap_note,
)
from maskalign_lab.studies.position_preference.mixer_arms import (
    ALL,
    ARMS,
    DEPTHS,
    NEARBY,
    NONE,
    RADII,
    SCALES,
    measure_mixer,
)
from maskalign_lab.studies.position_preference.mixer_figures import dose_figure, dose_table, mixer_findings
from maskalign_lab.studies.position_preference.mixer_probe import (
    contents,
    explained,
    kept_means,
    partition,
    rebuilt,
    ridge,
)

SHIPPED = load_rows(results_file("05_maskalign", "shapes"))


def by_hand(strength: float, more: str = "") -> Run:
    """A network whose first mixer block gives every token the mean of those that it sees; the rest passes on."""
    told = f"data.size=16 data.teacher=oracle network.width=64 {more}"
    recipe = make_recipe("maskalign", "smoke", overrides=told)
    run = Run(Path("by hand"), recipe, (facts := load_sources(recipe).facts), 0, *build(recipe, facts))
    d = run.net.width
    with torch.no_grad():
        for block in list(run.net.mixer)[:1]:
            block.attn.qkv.weight.copy_(torch.cat([torch.zeros(2 * d, d), torch.eye(d)]))
            block.attn.proj.weight.copy_(torch.eye(d))
            block.adaLN_modulation[1].bias[2 * d : 3 * d] = strength
    return run


def test_arms_of_study_05_are_found_again():
    for preset in set(SCALES) & set(PRESETS):
        mine, theirs = (scales[preset].recipe_of(preset, "shapes") for scales in (SCALES, masked.SCALES))
        names = {arm.name: arm for arm in masked.ARMS}
        for arm in ARMS:
            if arm not in NEARBY:
                assert identity(mine(arm, 5)) == identity(theirs(names[arm.name], 5))
    of = SCALES["laptop"].recipe_of("laptop", "shapes", "training.steps=10")
    assert len({identity(of(arm, 5)) for arm in ARMS}) == len(ARMS)
    assert [of(arm, 5).network.mixer_radius for arm in NEARBY] == [0, 1, 2, 3]
    assert {of(arm, 5).network.mixer_depth for arm in (*NEARBY, ALL)} == {2} and of(ALL, 5).training.steps == 10


def test_the_doses_of_the_tables_grid_end_where_all_is_seen():
    recipe = SCALES["laptop"].recipe_of("laptop", "shapes")(NEARBY[-1], 5)
    net = build(recipe, load_sources(recipe).facts)[0]
    assert net.side == 4 and net.mixer_sees[1:, 1:].all() and not net.mixer_sees[0, 1:].any()
    assert list(RADII.values()) == [0, 1, 2, 3, 4] and list(DEPTHS.values()) == [0, 1, 2, 3]


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 100), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 9))
def test_masks_drop_every_patch_once(tokens, ratio, seed):
    parts = partition(tokens, ratio, seed)
    assert torch.cat(parts).sort().values.equal(torch.arange(tokens))
    assert all(len(part) == len(parts[0]) for part in parts[:-1]) and len(parts[-1]) <= len(parts[0])


def test_a_mask_that_drops_nothing_is_refused():
    with pytest.raises(ValueError, match="ratio 0.0 drops no patch, so that there is none to rebuild; expected more"):
        partition(16, 0.0)


def test_the_reader_finds_a_linear_map_and_its_penalty():
    torch.manual_seed(0)
    features = torch.randn(400, 6) * torch.tensor([1, 10, 0.1, 1, 1, 1])
    truth = features @ torch.randn(6, 3).double().float()
    said = ridge(features[:200], truth[:200], features[200:])
    torch.testing.assert_close(said.float(), truth[200:], rtol=0.05, atol=0.5)
    noise = ridge(features[:200], torch.randn(200, 1), features[200:])
    assert noise.std() < 0.2  # what cannot be known is answered by the mean


def test_explained_has_a_sign_and_no_scale():
    a, b = torch.tensor([1.0, -1, 2, -2]).double(), torch.tensor([1.0, 1, -1, -1]).double()
    assert explained(a, 3 * a) == pytest.approx(1) and explained(a, -a) == pytest.approx(-1)
    assert explained(a, a * 0) == 0 and 0 <= abs(explained(a, b)) < 0.2


def test_the_mean_is_that_of_the_kept_patches():
    observed = observe(by_hand(8.0))
    seen = look(observed, observed.run.images("validation", 3), np.arange(3), 0.5)
    parts = partition(16, 0.25)
    masked_means, full_means = (kept_means(observed, seen, parts, view) for view in (True, False))
    keep = torch.tensor([i for i in range(16) if i not in parts[1].tolist()])
    hidden = observed.net.hidden(seen.x_t, seen.t, seen.y, observed.depth, seen.cls_t)[:, 1:]
    torch.testing.assert_close(full_means[1], hidden[:, keep].mean(1))
    alone = observed.net.hidden(seen.x_t, seen.t, seen.y, observed.depth, seen.cls_t, keep.expand(3, -1))[:, 1:]
    torch.testing.assert_close(masked_means[1], alone.mean(1))


def test_what_has_to_be_said_makes_up_what_is_shown():
    observed = observe(by_hand(0.0))
    images, index = observed.run.images("validation", 4), np.arange(4)
    what, seen = contents(observed, images, index), look(observed, images, index, 0.3)
    shown = patchify(seen.x_t, observed.net.patch_size)
    torch.testing.assert_close(0.7 * what["latents"] + 0.3 * what["noise"], shown)
    assert torch.equal(what["teacher"], seen.teacher[:, 1:])


@pytest.mark.parametrize(
    ("more", "heard"),
    [("", True), ("network.mixer_radius=1", True), ("network.mixer_radius=0", False), ("network.mixer_depth=0", False)],
)
def test_noise_is_heard_through_a_mixer_that_sees_others_alone(more, heard):
    observed = observe(by_hand(8.0, more))
    found = rebuilt(observed, observed.run.images("validation", 1024), 1.0)["noise"]
    assert (found["masked"] > 0.003) == heard and abs(found["masked"]) < (1 if heard else 0.001)
    assert found["full"] == pytest.approx(found["masked"], abs=1e-6)  # the blocks behind it pass on what they get


def test_too_few_images_are_refused():
    observed = observe(by_hand(0.0))
    with pytest.raises(ValueError, match="3 images cannot teach and ask a reader: expected at least 4"):
        rebuilt(observed, observed.run.images("validation", 3), 0.5)


def test_a_network_is_measured_and_one_without_projector_by_its_quality_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    told = "training.steps=2 training.warmup=1 data.n=64 data.teacher=oracle"
    for method, more in (("maskalign", "network.mixer_radius=1"), ("sit", "")):
        recipe = make_recipe(method, "smoke", overrides=f"{told} {more}")
        found = measure_mixer(load_run(train(recipe, tmp_path / method, "cpu", print_every=0)), 16, 0, 16)
        names = {f"{view} {what}" for view in ("rebuilt", "unmasked") for what in ("latents", "teacher", "noise")}
        assert names <= set(found) if method == "maskalign" else not names & set(found)
        assert ("restored" in found) == (method == "maskalign") and "velocity" in found


def made_up(slope: float, noise: float = 1e-5) -> list[dict]:
    """Rows in which the gap follows what is restored by a slope."""
    draw = np.random.default_rng(0)
    doses = {"REG": 0.0, NONE.name: 0.0, "mixer of 1": 0.25, "mixer of 3": 0.45}
    doses |= {arm: 0.1 * dose for arm, dose in RADII.items()}
    return [
        {"arm": arm, "seed": seed, "budget": "steps", "restored": dose, "gap": 1e-3 + slope * dose + noise * draw.normal()}
        | {"rebuilt latents": 0.5 + 0.1 * dose, "rebuilt noise": 0.01 * dose + 1e-4 * draw.normal()}
        | {"unmasked latents": 0.6, "unmasked noise": 0.006, "velocity": 0.7 + 1e-3 * draw.normal(), "frechet": 5.0}
        for arm, dose in doses.items()
        for seed in (5, 6, 7)
    ]  # fmt: skip


def test_a_leak_that_buys_the_gap_is_found_and_one_that_does_not_is_not():
    bought, free = (
        findings_table([*mixer_findings(made_up(slope)).values()]).data.splitlines() for slope in (-1e-3, 1e-3)
    )
    assert "| +" in bought[2] and "reproduced (8 arms, 3 seeds)" in bought[2] and "contradicted" in free[2]
    smaller = next(line for line in bought if "carries nothing?" in line)
    assert "reproduced (3 seeds)" in smaller and "-.0004" in smaller
    noise = next(line for line in bought if "noise can be rebuilt" in line)
    assert "+.4" in noise and " % " in noise and "reproduced" in noise


def test_findings_that_lack_rows_are_counted_and_figures_take_what_is_there():
    assert (
        "missing here" in findings_table([*mixer_findings([]).values()]).data
        and "missing" in findings_table([*gap_findings([]).values()]).data
    )
    assert dose_figure([]) is None and gap_figure([]) is None and dose_table([]).empty and "needed" in gap_note([])
    assert set(dose_table(SHIPPED).index) >= {NONE.name, ALL.name} and len(dose_figure(SHIPPED).axes) >= 4
    rows = made_up(-1e-3)
    table, figure = dose_table(rows), dose_figure(rows)
    assert table.loc["mixer radius 2", "restored"] == pytest.approx(0.2) and len(table) == 8
    shown = [axis for axis in figure.axes if axis.get_xlabel()]
    assert len(shown) == 12 and [label.get_text() for label in shown[0].get_xticklabels()] == [
        "0",
        "1",
        "2",
        "3",
        "all",
    ]


def test_losses_are_compared_among_those_told_alike():
    table = correlation_table(SHIPPED)
    velocity = table[table["metric"] == "velocity loss"]
    assert len(velocity) and set(velocity["among"]) == {"told alike"}
    assert velocity["arms"].max() == len({row["arm"] for row in SHIPPED if "gap" in row} & set(ALIKE))
    wide = table[table["among"] == "all arms"]
    assert wide["arms"].min() > velocity["arms"].max() and not {"SiT", "iREPA"} & set(ALIKE)
    assert table["p"].between(0, 1).all() and (table["low"] <= table["high"]).all()
    note = gap_note(SHIPPED)
    assert note.startswith(f"{len(table)} correlations") and all(word in note for word in set(table["verdict"]))


def test_a_small_gap_that_makes_good_networks_reads_positive():
    good = [
        {"arm": arm, "seed": seed, "budget": "steps", "gap": 1e-4 * k, "velocity": 0.7 + 0.01 * k, "frechet": 5.0 + k}
        | {"accuracy": 0.9 - 0.1 * k}
        for k, arm in enumerate(ALIKE[:6])
        for seed in (5, 6)
    ]  # fmt: skip
    table = correlation_table(good)
    between = table[table["part"] == "between"]
    assert len(between) == 5 and (between["rho"] > 0.99).all() and set(between["verdict"]) == {"reproduced"}
    assert "Between arms rho is +1.00" in gap_note(good)
