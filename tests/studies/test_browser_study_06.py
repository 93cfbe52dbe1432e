"""Study 06 as a person meets it: run in JupyterLab and scrubbed, with another run picked."""

import pytest
from shared.browser import scrub

pytestmark = pytest.mark.browser


def test_scrub_in_jupyterlab(page, lab):
    scrub(page, lab, "06_ahpa", "t = 0.50", "t = 0.60", "coarse to fine")
