"""A scrubber in real JupyterLab, and its offline page with the network off."""

import inspect
import statistics
import textwrap

import nbformat
import numpy as np
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from shared.browser import messages, new_page, run_all, settled

from maskalign_lab.workbench.offline_page import write_page
from maskalign_lab.workbench.plots import Curve, Panels, Points, filmstrip
from maskalign_lab.workbench.scrubber import Control, Scrubber, save_film

pytestmark = pytest.mark.browser

TITLE = "# A demonstration\n\nThe norm $g_i = \\lVert \\partial L / \\partial h_i \\rVert_2$ of token $i$."


def demonstration():
    import numpy as np

    from maskalign_lab.workbench.plots import Curve, Panels, Picture, TokenMap, filmstrip
    from maskalign_lab.workbench.scrubber import Control, Scrubber, show

    times, draw = np.linspace(0, 1, 21), np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 31
    clean = [np.stack([x, y, (x - a) ** 2 + (y - b) ** 2 < 0.06], -1) * 255 for a, b in ((0.3, 0.4), (0.6, 0.5))]
    noise, wobble = draw.normal(128, 90, (32, 32, 3)), 0.3 * draw.random((21, 8, 8))

    def view(t, image, token=None):
        picture = clean[image]
        noised = ((1 - times[t]) * picture + times[t] * noise).clip(0, 255).astype(np.uint8)
        edges = picture.reshape(8, 4, 8, 4, 3).std((1, 3, 4)) / 128
        norms = edges * (1 - times[:, None, None] / 2) + times[:, None, None] * wobble
        top = (norms[t] >= np.sort(norms[t].ravel())[-6]).astype(float)
        row, column = token or (0, 0)
        lines = {"this token": norms[:, row, column], "mean": norms.mean((1, 2))}
        curve = Curve(f"token {token}", times, lines, "t (0: data, 1: noise)", "norm", times[t])
        maps = TokenMap("gradient norm", norms[t], "norm", (0, 1)), TokenMap("top 10 %", top, "top")
        return Panels(
            (Picture("image", picture.astype(np.uint8)), Picture(f"t = {times[t]:.2f}", noised), *maps), curve, token
        )

    def strip():
        columns = range(0, 21, 5)
        rows = {"noised": 1, "gradient norm": 2, "top 10 %": 3}
        panels = {name: [view(t, 0).panels[i] for t in columns] for name, i in rows.items()}
        return filmstrip(panels, [f"t = {times[t]:.2f}" for t in columns])

    def fragile(t, image, token):
        if t == 20:
            raise RuntimeError("nothing to see at the end")
        return view(t, image, token)

    labels = [f"{t:.2f}" for t in times]
    controls = [
        Control("t", "t", range(21), labels, 10, "slider"),
        Control("image", "Image", [0, 1], ["first", "second"]),
    ]
    show(Scrubber(fragile if fails else view, controls, strip, "token"), "demo", out_dir)  # noqa: F821


def write_demonstration(path, fails=False, out_dir=None):
    body = textwrap.dedent(inspect.getsource(demonstration).split("\n", 1)[1])
    parameters = new_code_cell(f"fails = {fails}\nout_dir = {out_dir!r}")
    book = new_notebook(cells=[new_markdown_cell(TITLE), parameters, new_code_cell(body)])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    nbformat.write(book, path)


# What a person sees, read from the figure itself. Trips are from a key to the drawing of the view that it asked for.
SPY = """() => {
  const figure = document.querySelector(".js-plotly-plot");
  window.seen = () => figure.layout.annotations[1].text;
  window.map = () => JSON.stringify(figure.data.find(trace => trace.type === "heatmap").z);
  window.words = () => figure.layout.annotations.map(annotation => annotation.text).join(" | ");
  window.trips = []; window.drawings = 0;
  let pressed = null, last = seen();
  document.addEventListener("keydown", () => { pressed = performance.now(); }, true);
  figure.on("plotly_afterplot", () => {
    drawings += 1;
    if (seen() !== last && pressed) { trips.push(performance.now() - pressed); pressed = null; }
    last = seen();
  });
}"""


@pytest.fixture(scope="module")
def opened(chromium, running_lab):
    """The demonstration, open in JupyterLab with all cells run."""
    write_demonstration(running_lab.folder / "demo.ipynb")
    with new_page(chromium) as page:
        run_all(page, running_lab, "demo.ipynb")
        page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for(timeout=90_000)
        settled(page)
        page.evaluate(SPY)
        yield page


@pytest.fixture
def demo(opened):
    """The demonstration as it was when it was opened; nothing may have gone wrong when a test is done."""
    opened.get_by_role("button", name="Restore defaults").click()
    sees(opened, "t = 0.50 | ")
    sees(opened, "token None")
    opened.locator(".js-plotly-plot").scroll_into_view_if_needed()
    at_rest(opened.locator(".js-plotly-plot"))
    opened.evaluate("trips.length = 0")
    yield opened
    assert opened.errors == []
    assert messages(opened) == []


def at_rest(locator):
    """Wait until an element has not moved for half a second: JupyterLab scrolls on while cells grow."""
    before, now = None, locator.bounding_box()
    while now != before:
        locator.page.wait_for_timeout(500)
        before, now = now, locator.bounding_box()


def press(page, key="ArrowRight"):
    """Press a key on the slider and wait for the view that it asks for."""
    before = page.evaluate("trips.length")
    page.keyboard.press(key)
    page.wait_for_function(f"trips.length > {before}", timeout=20_000)


def sees(page, text):
    page.wait_for_function("text => words().includes(text)", arg=text, timeout=20_000)


def middle(box, across, down):
    return box["x"] + box["width"] * across, box["y"] + box["height"] * down


def test_the_slider_moves_the_map(demo, record_property):
    slider = demo.locator(".noUi-handle").first
    slider.focus()
    before = demo.evaluate("map()")
    press(demo)
    assert demo.evaluate("map()") != before and demo.evaluate("seen()") == "t = 0.55"
    press(demo, "ArrowLeft")
    assert demo.evaluate("map()") == before
    for i in range(30):
        press(demo, "ArrowLeft" if i // 10 % 2 else "ArrowRight")
        demo.wait_for_timeout(80)
    trips = sorted(demo.evaluate("trips"))[:30]
    record_property("round trip, median and p95 in ms", (statistics.median(trips), trips[28]))
    print(f"round trip: median {statistics.median(trips):.0f} ms, p95 {trips[28]:.0f} ms")


def test_a_hundred_fast_drags_end_in_the_last(demo):
    track, handle = (demo.locator(name).first.bounding_box() for name in (".noUi-base", ".noUi-handle"))
    demo.mouse.move(*middle(handle, 0.5, 0.5))
    demo.mouse.down()
    for i in range(100):
        demo.mouse.move(*middle(track, (i * 37 % 100) / 100, 0.5))
    demo.mouse.move(*middle(track, 0.751, 0.5))
    demo.mouse.up()
    sees(demo, "t = 0.75")
    drawings = demo.evaluate("drawings")
    demo.wait_for_timeout(1000)
    assert demo.evaluate("seen()") == "t = 0.75" and demo.evaluate("drawings") - drawings <= 2


def test_a_clicked_token_moves_the_curve_and_defaults_come_back(demo):
    box = demo.locator(".js-plotly-plot .heatmaplayer image").first.bounding_box()
    demo.mouse.move(*middle(box, 3.5 / 8, 5.5 / 8))
    demo.locator(".hoverlayer .hovertext").first.wait_for()  # plotly has noticed the mouse
    demo.mouse.click(*middle(box, 3.5 / 8, 5.5 / 8))
    sees(demo, "token (5, 3)")
    demo.get_by_role("button", name="second").click()
    demo.locator(".noUi-handle").first.focus()
    press(demo)
    sees(demo, "t = 0.55")
    demo.get_by_role("button", name="Restore defaults").click()
    sees(demo, "t = 0.50 | ")
    sees(demo, "token None")


def test_playing_moves_on(demo):
    demo.locator(".widget-play button").first.click()
    sees(demo, "t = 0.65")
    demo.locator(".widget-play button").first.click()


def test_a_page_that_is_loaded_again_shows_the_present_view(demo):
    demo.keyboard.press("Control+s")
    demo.locator(".noUi-handle").first.focus()
    press(demo)
    press(demo)
    demo.wait_for_timeout(500)
    demo.reload()
    demo.locator(".js-plotly-plot .heatmaplayer image").first.wait_for(timeout=90_000)
    demo.evaluate(SPY)
    assert demo.evaluate("seen()") == "t = 0.60"


def test_an_error_of_the_view_is_read_under_the_figure(page, lab):
    write_demonstration(lab.folder / "fragile.ipynb", fails=True)
    run_all(page, lab, "fragile.ipynb")
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for(timeout=90_000)
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("End")
    page.locator(".scrubber-error").wait_for(timeout=20_000)
    assert "RuntimeError: nothing to see at the end" in page.locator(".scrubber-error").inner_text()
    page.keyboard.press("ArrowLeft")
    page.locator(".scrubber-error").wait_for(state="detached", timeout=20_000)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The page of the demonstration, executed by papermill."""
    folder = tmp_path_factory.mktemp("page")
    write_demonstration(folder / "demo.ipynb", out_dir=str(folder))
    papermill.execute_notebook(folder / "demo.ipynb", folder / "out.ipynb", kernel_name="python3", progress_bar=False)
    return write_page(folder / "out.ipynb", folder / "out.html")


SHOWN = """() => { const figure = document.querySelector(".film-figure");
  return [figure.layout.annotations[1].text, JSON.stringify(figure.data.find(t => t.type === "heatmap").z)] }"""


def test_the_offline_page_moves_its_slider(offline, offline_page):
    page = offline_page
    page.goto(offline.as_uri())
    page.locator(".film-figure .heatmaplayer image").first.wait_for(timeout=60_000)
    words, values = page.evaluate(SHOWN)
    assert words == "t = 0.50" and page.locator(".film output").inner_text() == "0.50"
    page.locator(".film input").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"({SHOWN})()[0] === 't = 0.55'", timeout=20_000)
    assert page.evaluate(SHOWN)[1] != values and page.locator(".film output").inner_text() == "0.55"
    page.locator(".film button").click()
    page.wait_for_function(f"({SHOWN})()[0] === 't = 0.65'", timeout=20_000)
    assert page.locator("math").count() == 2 and page.locator(".film img").count() == 0
    assert page.errors == [] and page.requests == []
    assert offline.stat().st_size < 1_000_000


def test_without_plotly_the_page_shows_the_filmstrip(offline, offline_page, tmp_path):
    lonely = tmp_path / "lonely.html"
    lonely.write_bytes(offline.read_bytes())
    offline_page.goto(lonely.as_uri())
    assert offline_page.locator(".film img").is_visible() and not offline_page.locator(".film-controls").is_visible()


def write_flow(folder):
    """A page with a player of points."""
    ring = np.stack([np.cos(np.arange(60) / 9), np.sin(np.arange(60) / 9)], 1)

    def view(t):
        panels = tuple(Points(f"t = {t}", (1 + t) * ring, 4.0, ring, labels=("first", "second")) for _ in range(2))
        return Panels(panels, Curve("size", np.arange(3), {"ring": np.arange(3)}, "t", "size", t))

    control = Control("t", "t", [2, 1, 0], default=0, kind="slider")
    save_film(Scrubber(view, [control], lambda: filmstrip({"ring": view(0).panels}, ["a", "b"])), folder / "flow.json")
    data = {"image/png": "iVBORw0KGgo=", "text/plain": "filmstrip"}
    shown = new_output("display_data", data=data, metadata={"maskalign_lab": {"scrubber": "flow.json"}})
    nbformat.write(new_notebook(cells=[new_code_cell("show(player)", outputs=[shown])]), folder / "flow.ipynb")
    return write_page(folder / "flow.ipynb", folder / "flow.html")


PLACES = """() => document.querySelector(".film-figure").data[1].x[0]"""


def test_points_move_on_the_offline_page(offline_page, tmp_path):
    page = offline_page
    page.goto(write_flow(tmp_path).as_uri())
    page.locator(".film-figure .scatterlayer .point").first.wait_for(timeout=60_000)
    assert page.evaluate(PLACES) == 3
    page.locator(".film input").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"({PLACES})() === 2", timeout=20_000)
    assert page.locator(".film-figure .xtitle").first.text_content() == "first"
    assert page.locator(".film-figure .scatterlayer .point").count() >= 240
    assert page.errors == [] and page.requests == []
