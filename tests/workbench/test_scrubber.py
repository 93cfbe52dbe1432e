"""Scrubbers without a browser: states, bursts, errors, and what is left of them under papermill."""

import asyncio
import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import papermill
import pytest
from nbformat import read, write
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from maskalign_lab.workbench import scrubber
from maskalign_lab.workbench.latest import Latest
from maskalign_lab.workbench.plots import Curve, Panels, Picture, TokenMap, filmstrip
from maskalign_lab.workbench.scrubber import Control, Scrubber, Stage

TIMES = Control("t", "t", [0.0, 0.5, 1.0], ["none", "half", "all"], 1, "slider")
KIND = Control("kind", "Kind", ["plain", "double"])


def view(t, kind, token=None):
    grid = np.add.outer(np.arange(4.0), np.arange(4.0)) * (1 + t) * (2 if kind == "double" else 1)
    curve = Curve("value", np.array(TIMES.values), {"token": np.array(TIMES.values)}, "t", "value", t)
    return Panels((Picture("picture", np.zeros((8, 8, 3), np.uint8)), TokenMap(f"t = {t}", grid, "norm")), curve, token)


def strip():
    return filmstrip({"map": [view(t, "plain").panels[1] for t in TIMES.values]}, TIMES.texts())


SCRUBBER = Scrubber(view, [TIMES, KIND], strip, "token")


def shown(stage):
    return stage.figure.data[3].z


# describing


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(default=3), "the default 3 is not an index of its 3 values"),
        (dict(labels=["a"]), "1 labels for 3 values"),
        (dict(kind="sldier"), "Did you mean 'slider'"),
        (dict(values=[]), "default 0 is not an index of its 0 values"),
    ],
)
def test_a_wrong_control_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Control(**dict(name="t", label="t", values=[1, 2, 3]) | wrong)


@pytest.mark.parametrize("controls", [[KIND], [TIMES, TIMES]])
def test_a_scrubber_has_one_slider(controls):
    with pytest.raises(ValueError, match="exactly one slider"):
        Scrubber(view, controls, strip)


# live


def test_every_control_moves_the_view():
    stage = Stage(SCRUBBER)
    found = scrubber.pickers(stage)
    assert np.allclose(shown(stage), view(0.5, "plain").panels[1].values)
    found["t"].index, found["kind"].index = 2, 1
    assert np.allclose(shown(stage), view(1.0, "double").panels[1].values)
    assert stage.figure.layout.annotations[1].text == "t = 1.0"


def test_a_click_chooses_a_token_and_another_takes_it_back():
    stage = Stage(SCRUBBER)
    hit, miss = (type("Points", (), {"xs": xs, "ys": ys}) for xs, ys in (([2.2], [0.8]), ([], [])))
    for points, token in ((hit, (1, 2)), (miss, (1, 2)), (hit, None)):
        scrubber._clicked(stage, stage.figure.data[3], points, None)
        assert stage.state["token"] == token


def test_restoring_brings_everything_back():
    stage = Stage(SCRUBBER)
    found = scrubber.pickers(stage)
    found["t"].index, found["kind"].index = 0, 1
    stage.set(token=(3, 3))
    scrubber._restore(stage, found).click()
    assert stage.state == SCRUBBER.defaults() and found["t"].index == 1 and found["kind"].index == 0
    assert np.allclose(shown(stage), view(0.5, "plain").panels[1].values)


def test_an_error_is_shown_and_forgotten():
    def fragile(t, kind, token):
        if t == 1.0:
            raise KeyError("no <map> there")
        return view(t, kind, token)

    stage = Stage(Scrubber(fragile, [TIMES, KIND], strip, "token"))
    stage.set(t=1.0)
    assert "KeyError" in stage.error.value and "no &lt;map&gt; there" in stage.error.value
    assert "fragile" in stage.error.value  # where
    stage.set(t=0.0)
    assert stage.error.value == "" and np.allclose(shown(stage), view(0.0, "plain").panels[1].values)


def test_a_figure_is_announced_whole_and_up_to_date():
    stage = Stage(SCRUBBER)
    assert len(stage.figure.get_state()["_widget_data"]) == len(stage.figure.data)
    stage.set(t=1.0)
    state = stage.figure.get_state()
    assert np.allclose(state["_widget_data"][3]["z"], shown(stage))
    assert state["_widget_layout"]["annotations"][1]["text"] == "t = 1.0"


# latest wins


def burst(requests, pause, **how):
    """Which of the requests were worked on."""
    seen, state = [], {}

    async def run():
        latest = Latest(lambda: seen.append(state["value"]), **how)
        for state["value"] in range(requests):
            latest()
            await asyncio.sleep(pause)
        await asyncio.sleep(0.5)

    asyncio.run(run())
    return seen


@pytest.mark.parametrize("pause", [0, 0.001, 0.01])
def test_the_last_request_wins(pause):
    seen = burst(100, pause, interval=0.05)
    assert seen[-1] == 99 and seen == sorted(set(seen)) and len(seen) < 60


def test_a_single_request_does_not_wait_and_slow_ones_are_all_served():
    assert burst(1, 0, interval=0.2) == [0]
    assert burst(3, 0.1, interval=0.01) == [0, 1, 2]


def test_a_browser_that_never_answers_only_slows_down():
    assert burst(100, 0.001, busy=lambda: True, interval=0.01, patience=0.05)[-1] == 99


def test_an_error_of_the_work_does_not_stop_the_next():
    seen = []

    async def run():
        latest = Latest(lambda: seen.append(1) or 1 / 0, interval=0.01)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        for _ in range(2):
            latest()
            await asyncio.sleep(0.05)

    asyncio.run(run())
    assert seen == [1, 1]


# where nobody watches


def test_without_a_kernel_the_filmstrip_is_shown(tmp_path, capsys):
    scrubber.show(SCRUBBER, "film", tmp_path / "new")
    picture = tmp_path / "new" / "film.png"
    assert picture.stat().st_size <= 100_000 and Image.open(picture).width > 300
    film = json.loads((tmp_path / "new" / "film.json").read_text())
    assert film["labels"] == ["none", "half", "all"] and film["default"] == 1 and film["label"] == "t"
    assert [frame["name"] for frame in film["plot"]["frames"]] == ["0", "1", "2"]


NOTEBOOK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_scrubber import SCRUBBER, scrubber
print(scrubber.watched())
scrubber.show(SCRUBBER, "film", out_dir)
"""


@pytest.mark.parametrize("static", ["1", None])
def test_papermill_leaves_a_picture_and_no_widgets(tmp_path, monkeypatch, static):
    monkeypatch.delenv("MASKALIGN_LAB_STATIC", raising=False)
    if static:
        monkeypatch.setenv("MASKALIGN_LAB_STATIC", static)
    cells = [new_code_cell(f"out_dir = {str(tmp_path)!r}"), new_code_cell(NOTEBOOK)]
    write(new_notebook(cells=cells), tmp_path / "book.ipynb")
    papermill.execute_notebook(
        tmp_path / "book.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False
    )
    book = read(tmp_path / "out.ipynb", 4)
    printed, picture = book.cells[1].outputs
    assert printed.text == "False\n" and "widgets" not in book.metadata
    assert picture.metadata == {"maskalign_lab": {"scrubber": "film.json"}}
    assert set(picture.data) == {"image/png", "text/plain"} and not re.search("0x[0-9a-f]+", picture.data["text/plain"])
    assert Image.open(io.BytesIO(base64.b64decode(picture.data["image/png"]))).format == "PNG"
    assert (tmp_path / "film.json").is_file()
