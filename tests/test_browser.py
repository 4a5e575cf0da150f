"""The panel under a real hand: JupyterLab and Chromium, driven by Playwright.

Must stay true: notebook 16 runs to its end; sliders answer to keys and to typing without asking the model;
text grows, and stops when told to; two settings stand side by side; a bar writes its token; HTML in the text
stays text; nothing is cut or overlaps, in light and in dark, in a wide and in a narrow window.

OPTIMUS_PICTURES=1 also renews notebooks/images (with the newest run in ./checkpoints, where there is one).
"""
import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "16_generation_panel.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb"]
PATIENCE = 120  # seconds, for a busy machine; every wait ends as soon as its condition holds
pytestmark = pytest.mark.slow


def missing() -> str | None:
    """What this test lacks, or None."""
    if CHROMIUM is None: return "no chromium; on Debian: apt-get install chromium"
    try: import playwright.sync_api  # noqa: F401
    except ImportError: return "no playwright; pip install -e '.[dev]'"
    return None


def test_in_ci_this_file_does_not_skip():
    if not os.environ.get("CI"): pytest.skip("not CI")
    assert missing() is None


def until(condition, what: str, seconds: float = PATIENCE):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := condition(): return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


class Lab:
    """A JupyterLab server on a copy of the notebooks, with settings of its own."""
    def __init__(self, folder: Path):
        self.folder, self.token = folder / "notebooks", "optimus"
        shutil.copytree(ROOT / "notebooks", self.folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
        if os.environ.get("OPTIMUS_PICTURES") and (ROOT / "checkpoints").is_dir():
            (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
        for name, value in (("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
                            ("notebook-extension/tracker", {"windowingMode": "none"})):
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        places = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
                                                        "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
        environment = {**os.environ, **places, "JUPYTER_PREFER_ENV_PATH": "1",
                       "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
                       "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
        self.log = open(folder / "lab.log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1",
             f"--IdentityProvider.token={self.token}", "--ServerApp.disable_check_xsrf=True",
             f"--ServerApp.root_dir={self.folder}", "--LabApp.expose_app_in_browser=True"], env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def address(self) -> str | None:
        if self.process.poll() is not None: raise AssertionError((self.folder.parent / "lab.log").read_text()[-2000:])
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", (self.folder.parent / "lab.log").read_text())
        return found and found[0]

    def ask(self, address: str, /, **body):
        data = json.dumps(body).encode() if body else None
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + address, data, headers), timeout=10) as reply:
            return json.loads(reply.read() or "null")

    def start_kernel(self):
        self.url = until(self.address, "JupyterLab")
        until(lambda: self.ask("api/status"), "JupyterLab's answer")
        self.ask("api/sessions", path=NOTEBOOK, type="notebook", name=NOTEBOOK, kernel={"name": "python3"})

    def kernel(self) -> dict: return self.ask("api/kernels")[0]
    def idle(self) -> bool: return self.kernel()["execution_state"] == "idle" and self.kernel()["connections"] > 0

    def python(self, code: str):
        """The value of an expression in the notebook's kernel."""
        from jupyter_client.blocking import BlockingKernelClient

        client = BlockingKernelClient()
        client.load_connection_file(str(self.folder.parent / "JUPYTER_RUNTIME_DIR" / f"kernel-{self.kernel()['id']}.json"))
        client.start_channels()
        try:
            reply = client.execute("", user_expressions={"value": code}, reply=True, timeout=PATIENCE)
            value = reply["content"]["user_expressions"]["value"]
            assert value["status"] == "ok", value
            return ast.literal_eval(value["data"]["text/plain"])
        finally: client.stop_channels()

    def stop(self):
        with contextlib.suppress(OSError): self.ask("api/shutdown", now=True)
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        self.process.wait()
        self.log.close()


class Hand:
    """What a reader does with the panel, and sees."""
    def __init__(self, page, lab: Lab):
        self.page, self.lab, self.trouble = page, lab, []
        page.on("pageerror", lambda error: self.trouble.append(f"page error: {error}"))
        page.on("console", lambda m: self.trouble.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda d: (self.trouble.append(f"dialog: {d.message}"), d.dismiss()))

    def do(self, command: str, **arguments):
        self.page.evaluate("([c, a]) => window.jupyterapp.commands.execute(c, a)", [command, arguments])

    def open(self):
        self.page.goto(f"{self.lab.url}lab/tree/{NOTEBOOK}?token={self.lab.token}&reset", timeout=1000 * PATIENCE)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=1000 * PATIENCE)
        until(self.lab.idle, "the kernel")

    def run_all(self):
        self.do("notebook:run-all-cells")
        self.page.wait_for_selector(".optimus-panel .optimus-rows", timeout=1000 * PATIENCE)
        until(lambda: self.page.locator(".jp-InputPrompt", has_text="[*]").count() == 0, "the last cell")
        until(self.lab.idle, "the kernel")

    def find(self, css: str): return self.page.locator(f".optimus-panel {css}")
    def button(self, name: str): return self.find("button").get_by_text(name, exact=True)
    def text(self, lane: int = 0) -> str: return self.find(".optimus-page").nth(lane).get_attribute("data-text")
    def survivors(self) -> int: return self.find(".optimus-bar.in").count()
    def stopped(self) -> bool: return self.button("Generate").is_enabled()

    def slider(self, name: str, lane: int = 0):
        return self.find(".optimus-slider").filter(has_text=name).nth(lane)

    def type_into(self, name: str, value: str, lane: int = 0):
        """Type a number into a slider's readout."""
        readout = self.slider(name, lane).locator(".widget-readout")
        readout.click()
        readout.press("Control+a")
        self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def number(self, name: str, value: int):
        box = self.find(".widget-text").filter(has_text=name).locator("input").first
        box.fill(str(value))
        box.press("Tab")

    def write_prompt(self, text: str):
        self.find("textarea").fill(text)
        until(lambda: self.text() == text, "the prompt on the page")
