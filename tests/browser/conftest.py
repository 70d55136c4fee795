"""A real JupyterLab in a real browser, as a reader has it: fixtures for tests that press keys and look.

`lab` starts one server for a run (the second notebook opens three times as fast as the first), on a copy of the course
(JupyterLab saves what it opens) with folders of its own for settings, data and workspaces, a random token and a free
port. `reader` gives a page in Chromium that collects what the browser's console complains about, and shuts the kernels
down that were started. What tests are written with is in `harness`.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from harness import CLOCK, SECONDS, Lab, Reader
from patience import patiently
from project import ROOT

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
}


def find_browser() -> str | None:
    """A Chromium that is installed."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no browser on a machine that should have one: .ci/run installs Debian's chromium")
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    expect.set_options(timeout=1000 * CLOCK)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS, timeout=1000 * CLOCK)
        yield started
        started.close()


@pytest.fixture(scope="session")
def course_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a reader clones, as far as notebooks need it."""
    folder = tmp_path_factory.mktemp("lab") / "course"
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def lab(course_folder: Path) -> Iterator[Lab]:
    running = Lab(f"http://127.0.0.1:{_free_port()}", secrets.token_hex(16))
    log = course_folder.parent / "server.log"
    with log.open("w") as output:
        command = _command(running, course_folder)
        environment = _environment(course_folder.parent)
        server = subprocess.Popen(command, env=environment, cwd=course_folder, stdout=output, stderr=output)
    try:
        patiently(lambda: _answers(running) or _stopped(server, log), "JupyterLab answers", SECONDS)
        yield running
    finally:
        server.terminate()
        server.wait(timeout=CLOCK)


@pytest.fixture
def reader(browser: Browser, lab: Lab) -> Iterator[Reader]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield Reader(context.new_page(), lab)
    context.close()
    for session in json.loads(_ask(lab, "sessions")):
        _ask(lab, f"sessions/{session['id']}", "DELETE")


def _command(lab: Lab, folder: Path) -> list[str]:
    options = {
        "ServerApp.port": lab.address.rsplit(":", 1)[1],
        "ServerApp.port_retries": "0",
        "ServerApp.root_dir": str(folder),
        "IdentityProvider.token": lab.token,
        "LabApp.expose_app_in_browser": "True",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.news_url": "None",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *given]


def _environment(folder: Path) -> dict[str, str]:
    """Folders of its own, so that the settings of whoever runs the test neither help nor hurt."""
    for name, content in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    return {**os.environ, **{name: str(folder / place) for name, place in own.items()}, "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ask(lab: Lab, what: str, method: str = "GET") -> bytes:
    """What the server's API says."""
    request = urllib.request.Request(f"{lab.address}/api/{what}?token={lab.token}", method=method)
    with urllib.request.urlopen(request, timeout=CLOCK) as reply:
        return reply.read()


def _answers(lab: Lab) -> bool:
    try:
        return bool(_ask(lab, "status"))
    except OSError:
        return False


def _stopped(server: subprocess.Popen, log: Path) -> bool:
    if server.poll() is not None:
        pytest.fail(f"JupyterLab stopped with {server.returncode}:\n{log.read_text()[-2000:]}")
    return False
