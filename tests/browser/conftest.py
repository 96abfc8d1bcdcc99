"""JupyterLab and a browser for it: what a reader has in front of them.

The browser is one that the system has (`chromium` or Chrome); nothing is downloaded. Where it or playwright is missing,
these tests are skipped. Screenshots go to the folder that COURSE_ARTEFACTS names, else to a temporary one.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.base.paths import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 180_000  # milliseconds: the machine may be busy
QUIET_LAB = {
    "fetchNews": "false",
    "checkForUpdates": False,
    "doNotDisturbMode": True,
}  # no questions on its first start


@dataclass
class Lab:
    """A running JupyterLab: its address, its token, and the folder whose notebooks it shows."""

    url: str
    token: str
    folder: Path
    runs: Path  # where the course writes


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory):
    """Where screenshots are kept."""
    folder = Path(os.environ.get("COURSE_ARTEFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def lab_environment(home):
    """Everything that Jupyter would read or write in somebody's home lies below `home` instead."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
    environment.pop("COURSE_HEADLESS", None)
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "HOME": "home"}
    folders |= {"IPYTHONDIR": "ipython", "COURSE_RUNS": "runs", "MPLCONFIGDIR": "matplotlib"}
    for name, folder in folders.items():
        (home / folder).mkdir(parents=True)
        environment[name] = str(home / folder)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET_LAB))
    return environment | {"PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab with a copy of the playground, on a free port, until the tests end."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    shutil.copy(ROOT / "notebooks" / "playground.ipynb", folder)
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    log = home / "lab.log"
    with log.open("wb") as output:
        options = {"cwd": folder, "env": lab_environment(home), "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, token, process, log)
        yield Lab(url, token, folder, home / "runs")
    finally:
        process.send_signal(signal.SIGTERM)  # it stops its kernels, too
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(url, token, process, log, seconds=120):
    """Until the server answers. Fails with its log when it has stopped, or does not answer in time."""
    request = urllib.request.Request(f"{url}/api/status", headers={"Authorization": f"token {token}"})
    for _ in range(2 * seconds):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    """A browser of the system, driven by playwright, of which there can be one at a time."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()
