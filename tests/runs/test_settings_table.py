"""The table of settings beside the papers': read from the recipes, with a source and a reason in every row, and short."""

import pytest

from maskalign_lab.base import paths
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.recipe import from_json
from maskalign_lab.runs.settings_table import ASKED, HEADER, WHY, rows_of, settings_table
from maskalign_lab.runs.shared_settings import KNOWN, OURS, SECOND_HAND
from maskalign_lab.studies.ahpa import arms as ahpa
from maskalign_lab.studies.maskalign import arms as maskalign
from maskalign_lab.studies.reg import arms as reg

MOST = 19  # lines, of methods whose settings differ as much as those of study 06


def shipped(*methods: str) -> list:
    return [from_json((paths.data() / "runs" / f"{name}-shapes" / "recipe.json").read_text()) for name in methods]


def of_04(preset: str) -> list:
    of = reg.SCALES[preset].recipe_of(preset, "shapes")
    return [of(arm, 0) for arm in reg.SCALES[preset].arms]


def of_05(preset: str) -> list:
    of = maskalign.SCALES[preset].recipe_of(preset, "shapes")
    return [of(arm, 0) for arm in maskalign.arms_of("pair repa") if arm.name != "SiT"]


def of_06(preset: str) -> list:
    of = ahpa.SCALES[preset].recipe_of(preset, "shapes")
    return [of(arm, 0) for arm in (ahpa.ROUTED[0], *ahpa.BASELINES[1:])]


STUDIES = {"01": shipped("repa", "sit", "reg", "maskalign"), "04": shipped("reg"), "08": shipped("dsd")}
STUDIES |= {
    f"{name} {preset}": of(preset)
    for name, of in (("04", of_04), ("05", of_05), ("06", of_06))
    for preset in maskalign.SCALES
}


def cells(table: str) -> list[list[str]]:
    lines = table.removeprefix(HEADER).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_tells_source_and_reason_of_whatever_differs(name):
    found = cells(settings_table(STUDIES[name]))
    assert len(found) <= MOST and all(len(row) == 6 for row in found)
    for setting, of, paper, source, here, why in found:
        assert source.startswith(tuple(f"*{standing}*" for standing in (KNOWN, SECOND_HAND, OURS)))
        if setting == "the same":
            assert (of, here, why) == ("", "the same", "")
        else:
            assert of and paper != here and why in WHY.values()


@pytest.mark.parametrize("name", ["sit", "repa", "reg", "maskalign", "haste", "irepa", "sra2", "ahpa", "dsd"])
def test_what_a_paper_trains_differs_in_nothing(name):
    rows = rows_of(make_recipe(name, "paper"))
    assert rows and all(row.paper == row.here for row in rows)
    assert {row[0] for row in cells(settings_table([make_recipe(name, "paper")]))} == {"the same"}


@pytest.mark.parametrize(
    ("method", "overrides", "setting", "here"),
    [
        ("repa", "method.weight=0.25", "weight", "0.25"),
        ("haste", "method.stop=40 training.steps=160", "stop", "25% of the steps"),
        ("maskalign", "method.inner.name=repa", "inner method", "repa"),
        ("maskalign", "method.inner.class_weight=1", "class weight", "1"),
        ("irepa", "method.gamma=0.8", "gamma", "0.8"),
    ],
)
def test_a_setting_that_was_asked_for_is_seen(method, overrides, setting, here):
    (row,) = [row for row in cells(settings_table([make_recipe(method, overrides=overrides)])) if row[0] == setting]
    assert row[4] == here and row[5] == ASKED


def test_what_dsd_does_not_tell_is_in_the_table_as_ours():
    rows = {row.name: row for row in rows_of(make_recipe("dsd", "paper"))}
    for name in (
        "latent dim",
        "latent norm",
        "time law",
        "hidden",
        "distillation",
        "reconstruction",
        "perceptual",
        "eyes",
    ):
        assert rows[name].setting.standing == OURS
    assert rows["trunks"].setting.standing == KNOWN and rows["heard from"].paper == "50% of the steps"
    assert "time law" not in {row.name for row in rows_of(make_recipe("repa", "paper"))}


def test_methods_that_agree_share_a_row_and_the_first_recipe_of_a_method_counts():
    repa, haste, other = (
        make_recipe(name, overrides=more) for name, more in (("repa", ""), ("haste", ""), ("repa", "network.width=12"))
    )
    rows = cells(settings_table([repa, haste, other]))
    of = {row[0]: row[1] for row in rows}
    assert of["depth"] == of["network"] == "all" and of["student blocks"] == "haste"
    assert "12 wide" not in str(rows) and "all: *weight* 0.5" in str(rows)
