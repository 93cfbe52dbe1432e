"""Study 03 as a person meets it: run in JupyterLab and scrubbed, another prediction, loss and patch picked, the toy played."""

import pytest
from shared.browser import scrub

pytestmark = pytest.mark.browser

TITLES = """number => JSON.stringify(document.querySelectorAll('.js-plotly-plot')[number].layout.annotations.map(a => a.text))"""
CHANGED = f"([number, before]) => ({TITLES})(number) !== before"


def test_scrub_in_jupyterlab(page, lab):
    scrub(page, lab, "03_prediction_targets", "t = 0.50", "t = 0.65", "v")
    before = page.evaluate(TITLES, 0)
    page.locator(".jupyter-widgets select").first.select_option("x, 8")  # the x-loss, at 32 pixels
    page.wait_for_function(CHANGED, arg=[0, before], timeout=10_000)
    page.locator(".js-plotly-plot").nth(1).scroll_into_view_if_needed()
    before = page.evaluate(TITLES, 1)
    page.get_by_role("button", name="16", exact=True).first.click()  # the toy, in another dimension
    page.wait_for_function(CHANGED, arg=[1, before], timeout=10_000)
    assert not page.errors
