"""For tests in a real browser: JupyterLab on a free port, Chromium with and without a network, a study run and scrubbed."""

import contextlib
import json
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
from shared.notebooks import needed

from maskalign_lab.base import paths

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab."""

    url: str
    folder: Path  # its root

    def kernels(self) -> set[str]:
        """The kernels that run."""
        with urllib.request.urlopen(f"{self.url}/api/kernels", timeout=10) as answer:
            return {kernel["id"] for kernel in json.load(answer)}

    def end(self, kernels: set[str]) -> None:
        """Shut kernels down."""
        for kernel in kernels:
            request = urllib.request.Request(f"{self.url}/api/kernels/{kernel}", method="DELETE")
            urllib.request.urlopen(request, timeout=30).close()


def chromium_path() -> str | None:
    """The Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(folder: Path, cache: Path):
    """JupyterLab with its root in `folder` and all its own files below it, without a token and without news."""
    port, home = free_port(), folder / ".jupyter"
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}  # fmt: skip
    env = os.environ | {name: str(home / path) for name, path in places.items()} | {"PYTHONPATH": str(ROOT)}
    env["MASKALIGN_LAB_CACHE"] = str(cache)
    env.pop("MASKALIGN_LAB_STATIC", None)
    settings = ("port_retries=0", "disable_check_xsrf=True", f"root_dir={folder}")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [
        "--IdentityProvider.token=",
        "--ContentsManager.allow_hidden=False",
        *(f"--ServerApp.{one}" for one in settings),
    ]
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


@contextlib.contextmanager
def new_page(chromium, width: int = 1440, height: int = 1000):
    """A page in which `page.errors` collects what goes wrong."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    listen(page)
    yield page
    context.close()


@pytest.fixture
def page(chromium):
    """A page of its own for a test."""
    with new_page(chromium) as page:
        yield page


@pytest.fixture
def offline_page(chromium):
    """A page without a network: `page.requests` collects what it asked for beyond files."""
    with new_page(chromium, 1280, 900) as page:
        page.context.set_offline(True)
        page.requests = []
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and page.requests.append(request.url))
        yield page


@pytest.fixture(scope="session")
def running_lab(tmp_path_factory, studies_cache):
    """One JupyterLab for all tests of a worker, started in an empty folder."""
    with jupyterlab(tmp_path_factory.mktemp("lab"), studies_cache) as running:
        yield running


@pytest.fixture
def lab(running_lab):
    """JupyterLab; the kernels that a test starts end with it."""
    before = running_lab.kernels()
    yield running_lab
    running_lab.end(running_lab.kernels() - before)


def run_all(page, lab: Lab, notebook: str, timeout: float = 90) -> None:
    """Open a notebook in JupyterLab and run all its cells."""
    page.goto(f"{lab.url}/lab/tree/{notebook}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=timeout * 1000)
    page.get_by_text("| Idle").first.wait_for(timeout=timeout * 1000)  # sooner, Lab asks which kernel to start
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


WRONG = ".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*='stderr']"


def settled(page, seconds: float = 90) -> None:
    """Wait until no cell waits for the kernel; a cell that fails ends the waiting of all."""
    page.wait_for_function(
        """wrong => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent);
                   return document.querySelector(wrong) || prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p)) }""",
        arg=WRONG,
        polling=500,  # else it is asked with every frame, which takes the kernel's time
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


FIGURE = """number => { const plot = document.querySelectorAll('.js-plotly-plot')[number];
  const maps = plot.data.filter(trace => trace.type === 'heatmap').map(map => Array.from(map.z, row => Array.from(row)));
  return JSON.stringify([plot.layout.annotations.map(a => a.text), maps]) }"""
HANDLE = ".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle"


def run_study_in_lab(page, lab: Lab, study: str, preset: str, also: tuple[str, ...] = ()) -> None:
    """Open a study in JupyterLab as far as its scrubber, run it, and bring the scrubber into view; nothing may be said in red.

    `also` names cells further below by words in them. They are run too, with those that they need; a job has run all.
    """
    book = json.loads((paths.notebooks() / f"{study}.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in book["cells"]]
    (tagged,) = (k for k, source in enumerate(sources) if 'preset: str = "laptop"' in source)
    book["cells"][tagged]["source"] = sources[tagged].replace('preset: str = "laptop"', f'preset: str = "{preset}"')
    last = next(k for k, source in enumerate(sources) if "show(scrubber" in source)
    code = {k: sources[k] for k, cell in enumerate(book["cells"]) if cell["cell_type"] == "code"}
    kept = needed(code, {k for k, source in code.items() if k <= last or any(words in source for words in also)})
    book["cells"] = [cell for k, cell in enumerate(book["cells"]) if k <= last or k in kept]
    (lab.folder / f"{study}.ipynb").write_text(json.dumps(book), encoding="utf-8")
    run_all(page, lab, f"{study}.ipynb")
    settled(page, 400)
    assert page.locator(WRONG).all_text_contents() == []
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()


def shown(page, number: int = 0) -> tuple[list[str], list]:
    """What a figure of the page shows: its words and its maps."""
    words, maps = json.loads(page.evaluate(FIGURE, number))
    return words, maps


def changed_by(page, act, number: int = 0) -> tuple[list[str], list]:
    """Do something and wait until a figure follows; what it shows then."""
    before = page.evaluate(FIGURE, number)
    act()
    follows = f"([number, before]) => ({FIGURE})(number) !== before"
    page.wait_for_function(follows, arg=[number, before], timeout=10_000)
    return shown(page, number)


def choose(page, label: str, number: int = 0) -> tuple[list[str], list]:
    """Press a button of a scrubber's controls, or take an entry of a list; what the figure shows then."""
    button = page.get_by_role("button", name=label, exact=True)
    entry = page.locator("option").get_by_text(label, exact=True)
    entries = page.locator(".jupyter-widgets select").filter(has=entry)
    act = button.first.click if button.count() else lambda: entries.first.select_option(label)
    return changed_by(page, act, number)


def there_and_back(page, first: str, then: str, place: str = "t = ") -> None:
    """One step of the slider by the keyboard, and back: the figure shows the next time, and then what it showed."""
    before = page.evaluate(FIGURE, 0)
    assert f"{place}{first}" in before
    page.locator(HANDLE).first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"then => ({FIGURE})(0).includes(then)", arg=f"{place}{then}", timeout=10_000)
    assert page.evaluate(FIGURE, 0) != before
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"before => ({FIGURE})(0) === before", arg=before, timeout=10_000)
