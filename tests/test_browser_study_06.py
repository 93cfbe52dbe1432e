"""Study 06 as a person meets it: run in JupyterLab and scrubbed, with another run picked."""

import shutil

import pytest
from browser import chromium, lab, page, run_all, settled  # noqa: F401  (fixtures)

from maskalign_lab import paths

pytestmark = pytest.mark.browser

STATE = """() => { const plot = document.querySelector('.js-plotly-plot');
  return JSON.stringify(plot.layout.annotations.map(a => a.text)) }"""


def test_scrub_in_jupyterlab(page, lab):  # noqa: F811
    shutil.copy(paths.notebooks() / "06_ahpa.ipynb", lab.folder)
    run_all(page, lab, "06_ahpa.ipynb")
    settled(page, 400)
    errors = ".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*='stderr']"
    assert page.locator(errors).all_text_contents() == []
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    before = page.evaluate(STATE)
    assert "t = 0.50" in before
    page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"before => ({STATE})() !== before", arg=before, timeout=10_000)
    assert "t = 0.60" in page.evaluate(STATE)
    before = page.evaluate(STATE)
    page.get_by_role("button", name="bilevel", exact=True).first.click()
    page.wait_for_function(f"before => ({STATE})() !== before", arg=before, timeout=10_000)
    assert not page.errors
