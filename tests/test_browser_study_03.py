"""Study 03 as a person meets it: run in JupyterLab and scrubbed, with another prediction picked."""

import pytest
from browser import chromium, lab, page, scrub  # noqa: F401  (fixtures)

pytestmark = pytest.mark.browser


def test_scrub_in_jupyterlab(page, lab):  # noqa: F811
    scrub(page, lab, "03_prediction_targets", "t = 0.50", "t = 0.65", "v")
