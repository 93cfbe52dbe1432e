"""Study 06 as a person meets it: run in JupyterLab and scrubbed, with another run picked."""

import pytest
from browser import chromium, lab, page, scrub  # noqa: F401  (fixtures)

pytestmark = pytest.mark.browser


def test_scrub_in_jupyterlab(page, lab):  # noqa: F811
    scrub(page, lab, "06_ahpa", "t = 0.50", "t = 0.60", "coarse to fine")
