"""Study 04 as a person meets it: opened in JupyterLab, run, scrubbed; and its page, opened from disk without a network."""

import pytest
from shared.browser import run_all, settled

from maskalign_lab.base import paths
from maskalign_lab.workbench.jobs import run_study

pytestmark = pytest.mark.browser

MAP = """() => { const plot = document.querySelector('.js-plotly-plot');
  const map = plot.data.filter(trace => trace.type === 'heatmap')[0];
  return JSON.stringify(Array.from(map.z, row => Array.from(row))) + plot.layout.annotations.map(a => a.text).join() }"""


def test_run_all_and_drag_the_slider_in_jupyterlab(page, lab):
    book = (paths.notebooks() / "04_reg.ipynb").read_text(encoding="utf-8")
    (lab.folder / "04_reg.ipynb").write_text(book.replace('preset: str = \\"laptop\\"', 'preset: str = \\"smoke\\"'))
    run_all(page, lab, "04_reg.ipynb")
    settled(page, 300)
    assert (
        page.locator(
            ".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*='stderr']"
        ).count()
        == 0
    )
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    before = page.evaluate(MAP)
    page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"before => ({MAP})() !== before", arg=before, timeout=10_000)
    after = page.evaluate(MAP)
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"after => ({MAP})() !== after", arg=after, timeout=10_000)
    assert page.evaluate(MAP) == before
    assert not page.errors


def test_the_page_works_from_disk_without_a_network(offline_page, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    job = run_study("04", {"preset": "smoke"}, tmp_path / "job")
    offline_page.goto(job.path(".html").as_uri())
    offline_page.locator(".film.live .js-plotly-plot").first.wait_for(timeout=20_000)
    images = "() => document.querySelector('.film .film-controls output').textContent"
    before = offline_page.evaluate(images)
    offline_page.locator(".film input[type=range]").first.focus()
    offline_page.keyboard.press("ArrowRight")
    offline_page.wait_for_function(f"before => ({images})() !== before", arg=before, timeout=5_000)
    assert not offline_page.errors and not offline_page.requests
