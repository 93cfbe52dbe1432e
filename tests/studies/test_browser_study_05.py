"""Study 05 as a person meets it: run in JupyterLab and scrubbed, with the dropped tokens grey."""

import shutil

import pytest
from shared.browser import run_all, settled

from maskalign_lab.base import paths
from maskalign_lab.workbench.jobs import run_study

pytestmark = pytest.mark.browser

STATE = """() => { const plot = document.querySelector('.js-plotly-plot');
  const maps = plot.data.filter(trace => trace.type === 'heatmap');
  const last = maps[maps.length - 1];
  const grey = Array.from(maps[0].z, row => Array.from(row)).flat().filter(v => v === null || Number.isNaN(v)).length;
  return JSON.stringify([grey, Array.from(last.z, row => Array.from(row)), plot.layout.annotations.map(a => a.text)]) }"""

PLACE = """() => { const plot = document.querySelector('.js-plotly-plot');
  const map = plot._fullData.find(trace => trace.type === 'heatmap'), box = plot.getBoundingClientRect();
  const axes = [map.xaxis, map.yaxis].map(name => plot._fullLayout[name[0] + 'axis' + name.slice(1)]);
  return [box.x + axes[0]._offset + 0.8 * axes[0]._length, box.y + axes[1]._offset + 0.8 * axes[1]._length] }"""
OUTPUT = "() => document.querySelector('.film .film-controls output').textContent"


def test_scrub_in_jupyterlab(page, lab):
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
    before = page.evaluate(STATE)
    x, y = page.evaluate(PLACE)
    page.mouse.move(x - 2, y)
    page.mouse.click(x, y)  # another token: what is mixed into it
    page.wait_for_function(f"before => ({STATE})() !== before", arg=before, timeout=10_000)
    assert not page.errors


def test_the_page_works_from_disk_without_a_network(offline_page, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    job = run_study("05", {"preset": "smoke"}, tmp_path / "job")
    offline_page.goto(job.path(".html").as_uri())
    offline_page.locator(".film.live .js-plotly-plot").first.wait_for(timeout=20_000)
    before = offline_page.evaluate(OUTPUT)
    offline_page.locator(".film input[type=range]").first.focus()
    offline_page.keyboard.press("ArrowRight")
    offline_page.wait_for_function(f"before => ({OUTPUT})() !== before", arg=before, timeout=5_000)
    assert not offline_page.errors and not offline_page.requests
