"""Fixtures for tests in a real browser: JupyterLab on a free port, Chromium with and without a network."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared.clone import ROOT

from maskalign_lab.base import paths

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab."""

    url: str
    folder: Path  # its root


def chromium_path() -> str | None:
    """The Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """JupyterLab with its root in `folder` and all its own files below it, without a token and without news."""
    port, home = free_port(), folder / ".jupyter"
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}  # fmt: skip
    env = os.environ | {name: str(home / path) for name, path in places.items()} | {"PYTHONPATH": str(ROOT)}
    env.pop("MASKALIGN_LAB_STATIC", None)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--ContentsManager.allow_hidden=False"]  # fmt: skip
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url + "/api", server, home / "server.log")
            yield Lab(url, folder)
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    """Return as soon as the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer at {url}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def chromium():
    """One Chromium for a module. Not for the session: Playwright keeps an event loop running in the main thread."""
    path = chromium_path()
    if path is None:
        pytest.skip(f"no Chromium found: none of {', '.join(NAMES)} is on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def listen(page) -> None:
    """Collect what goes wrong on a page in `page.errors`."""
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(f"page: {error}"))
    page.on(
        "console",
        lambda message: message.type == "error" and page.errors.append(f"{message.text} {message.location['url']}"),
    )


@pytest.fixture
def page(chromium):
    """A page in which `page.errors` collects what goes wrong."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000})
    page = context.new_page()
    listen(page)
    yield page
    context.close()


@pytest.fixture
def offline_page(chromium):
    """A page without a network: `page.requests` collects what it asked for beyond files."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_offline(True)
    page = context.new_page()
    listen(page)
    page.requests = []
    page.on("request", lambda request: request.url.startswith(("http", "ws")) and page.requests.append(request.url))
    yield page
    context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab in an empty folder."""
    with jupyterlab(tmp_path_factory.mktemp("lab")) as running:
        yield running


def run_all(page, lab: Lab, notebook: str, timeout: float = 90) -> None:
    """Open a notebook in JupyterLab and run all its cells."""
    page.goto(f"{lab.url}/lab/tree/{notebook}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=timeout * 1000)
    page.get_by_text("| Idle").first.wait_for(timeout=timeout * 1000)  # sooner, Lab asks which kernel to start
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def settled(page, seconds: float = 90) -> None:
    """Wait until no cell waits for the kernel."""
    page.wait_for_function(
        """() => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent);
                   return prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p)) }""",
        timeout=seconds * 1000,
    )  # fmt: skip


def messages(page) -> list[str]:
    """What the kernel said outside of cells: JupyterLab hides errors of callbacks in its log console."""
    button = page.locator(".jp-LogConsoleStatusItem [role=button]")
    if not button.count() or not button.first.is_visible():
        return []
    button.first.click()
    page.locator(".jp-LogConsolePanel .jp-OutputArea-child").first.wait_for(timeout=20_000)
    return page.locator(".jp-LogConsolePanel .jp-OutputArea-child").all_inner_texts()


SHOWN = """() => { const plot = document.querySelector('.js-plotly-plot');
  return JSON.stringify(plot.layout.annotations.map(a => a.text)) }"""


def scrub(page, lab: Lab, study: str, first: str, then: str, choice: str) -> None:
    """Run a study in JupyterLab, move the slider by one, and press a button of its controls; the words in the figure must follow."""
    shutil.copy(paths.notebooks() / f"{study}.ipynb", lab.folder)
    run_all(page, lab, f"{study}.ipynb")
    settled(page, 400)
    errors = ".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*='stderr']"
    assert page.locator(errors).all_text_contents() == []
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    assert first in page.evaluate(SHOWN)
    page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"then => ({SHOWN})().includes(then)", arg=then, timeout=10_000)
    before = page.evaluate(SHOWN)
    page.get_by_role("button", name=choice, exact=True).first.click()
    page.wait_for_function(f"before => ({SHOWN})() !== before", arg=before, timeout=10_000)
    assert not page.errors
