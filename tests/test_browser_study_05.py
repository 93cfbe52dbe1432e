"""Study 05 as a person meets it: run in JupyterLab and scrubbed, with the dropped tokens grey."""

import shutil

import pytest
from browser import chromium, lab, page, run_all, settled  # noqa: F401  (fixtures)

from maskalign_lab import paths

pytestmark = pytest.mark.browser

STATE = """() => { const plot = document.querySelector('.js-plotly-plot');
  const maps = plot.data.filter(trace => trace.type === 'heatmap');
  const last = maps[maps.length - 1];
  const grey = Array.from(maps[0].z, row => Array.from(row)).flat().filter(v => v === null || Number.isNaN(v)).length;
  return JSON.stringify([grey, Array.from(last.z, row => Array.from(row)), plot.layout.annotations.map(a => a.text)]) }"""


def test_scrub_in_jupyterlab(page, lab):  # noqa: F811
    shutil.copy(paths.notebooks() / "05_maskalign.ipynb", lab.folder)
    run_all(page, lab, "05_maskalign.ipynb")
    settled(page, 400)
    errors = ".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*='stderr']"
    assert page.locator(errors).all_text_contents() == []
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    before = page.evaluate(STATE)
    assert before.startswith("[16,")  # a quarter of 64 patches is grey
    page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"before => ({STATE})() !== before", arg=before, timeout=10_000)
    page.get_by_role("button", name="50%", exact=True).first.click()
    page.wait_for_function(f"() => ({STATE})().startsWith('[32,')", timeout=10_000)  # half of them are grey
    assert not page.errors
