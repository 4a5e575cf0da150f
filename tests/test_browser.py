"""The panel under a real hand: JupyterLab and Chromium, driven by Playwright.

Must stay true: notebook 16 runs to its end; sliders answer to keys and to typing without asking the model;
text grows, and stops when told to; two settings stand side by side; a bar writes its token; HTML in the text
stays text; nothing is cut or overlaps, in light and in dark, in a wide and in a narrow window.

OPTIMUS_PICTURES=1 also renews notebooks/images (with the newest run in ./checkpoints, where there is one).
"""
import ast
import contextlib
import functools
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
PATIENCE = 60  # seconds, for a busy machine; every wait ends as soon as its condition holds
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
        shutil.copytree(ROOT / "notebooks", self.folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        if os.environ.get("OPTIMUS_PICTURES") and (ROOT / "checkpoints").is_dir():
            (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
        quiet = {"fetchNews": "false", "checkForUpdates": False}
        for name, value in (("apputils-extension/notification", quiet),
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
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0",
             "--ip=127.0.0.1", f"--IdentityProvider.token={self.token}",
             "--ServerApp.disable_check_xsrf=True",
             f"--ServerApp.root_dir={self.folder}", "--LabApp.expose_app_in_browser=True"],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def address(self) -> str | None:
        said = (self.folder.parent / "lab.log").read_text()
        assert self.process.poll() is None, said[-2000:]
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        return found and found[0]

    def ask(self, address: str, /, **body):
        data = json.dumps(body).encode() if body else None
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + address, data, headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read() or "null")

    def start_kernel(self):
        self.url = until(self.address, "JupyterLab")
        until(lambda: self.ask("api/status"), "JupyterLab's answer")
        self.ask("api/sessions", path=NOTEBOOK, type="notebook", name=NOTEBOOK, kernel={"name": "python3"})

    def kernel(self) -> dict: return self.ask("api/kernels")[0]
    def idle(self) -> bool:
        kernel = self.kernel()
        return kernel["execution_state"] == "idle" and kernel["connections"] > 0

    @functools.cached_property
    def client(self):
        """A second client of the notebook's kernel."""
        from jupyter_client.blocking import BlockingKernelClient

        client = BlockingKernelClient()
        places = self.folder.parent / "JUPYTER_RUNTIME_DIR"
        client.load_connection_file(str(places / f"kernel-{self.kernel()['id']}.json"))
        client.start_channels()
        return client

    def python(self, code: str):
        """The value of an expression in the notebook's kernel."""
        reply = self.client.execute("", user_expressions={"value": code}, reply=True, timeout=PATIENCE)
        value = reply["content"]["user_expressions"]["value"]
        assert value["status"] == "ok", value
        return ast.literal_eval(value["data"]["text/plain"])

    def stop(self):
        if "client" in vars(self): self.client.stop_channels()
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
        self.page.goto(f"{self.lab.url}lab/tree/{NOTEBOOK}?token={self.lab.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.add_style_tag(content="* { transition: none !important }")  # a theme's colours fade in
        until(self.lab.idle, "the kernel")

    def run_all(self):
        self.do("notebook:run-all-cells")
        self.page.wait_for_selector(".optimus-panel .optimus-rows")
        until(lambda: self.page.locator(".jp-InputPrompt", has_text="[*]").count() == 0, "the last cell")
        until(self.lab.idle, "the kernel")

    def find(self, css: str): return self.page.locator(f".optimus-panel {css}")
    def button(self, name: str): return self.find("button").get_by_text(name, exact=True)
    def text(self, i: int = 0) -> str: return self.find(".optimus-page").nth(i).get_attribute("data-text")
    def survivors(self) -> int: return self.find(".optimus-bar.in").count()
    def stopped(self) -> bool: return self.button("Generate").is_enabled()

    def slider(self, name: str, column: int = 0):
        return self.find(".optimus-slider").filter(has_text=name).nth(column)

    def type_into(self, name: str, value: str, column: int = 0):
        """Type a number into a slider's readout."""
        readout = self.slider(name, column).locator(".widget-readout")
        readout.click()
        readout.press("Control+a")
        self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def number(self, name: str, value: int):
        box = self.find(".widget-text").filter(has_text=name).locator("input").first
        box.fill(str(value))
        box.press("Tab")

    def wait_until_heard(self):
        """Wait until all that was done so far has reached the kernel: messages keep their order."""
        seed = self.lab.python("panel.seed.value") + 1
        self.number("seed", seed)
        until(lambda: self.lab.python("panel.seed.value") == seed, "the kernel to hear")

    def write_prompt(self, text: str):
        self.find("textarea").fill(text)
        until(lambda: self.text() == text, "the prompt on the page")

    def wait(self, run, what: str):
        """Start something and wait until the run that follows is over, here and in the kernel."""
        if not self.lab.python("hasattr(panel, 'ends')"):  # how often Generate could be pressed again
            count = "lambda change: setattr(panel, 'ends', panel.ends + (not change['new']))"
            self.lab.python("setattr(panel, 'ends', 0)")
            self.lab.python(f"panel.generate_button.observe({count}, 'disabled')")
        self.ends = self.lab.python("panel.ends") + 1
        run()
        until(lambda: self.lab.python("panel.ends") >= self.ends, what)
        until(lambda: self.stopped() and self.text() == self.lab.python("panel.written"), what)

    def picture(self, name: str, theme: str = "Light", width: int = 1280):
        """The panel's looks: nothing cut, nothing overlapping; saved to the folder of pictures."""
        self.do("apputils:change-theme", theme=f"JupyterLab {theme}")
        self.page.set_viewport_size({"width": width, "height": 1900})
        light = "true" if theme == "Light" else "false"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")
        panel = self.page.locator(".optimus-panel")
        panel.scroll_into_view_if_needed()
        path = self.lab.folder.parent / f"{name}.png"
        panel.screenshot(path=path, animations="disabled")
        assert self.page.evaluate(FAULTS_OF_LAYOUT) == [], name
        return path


FAULTS_OF_LAYOUT = """() => {
  const panel = document.querySelector('.optimus-panel'), outer = panel.getBoundingClientRect(), faults = [];
  const shown = e => e.offsetParent && e.getBoundingClientRect().width > 0;
  const name = e => e.textContent.slice(0, 30) || e.className;
  const parts = [...panel.querySelectorAll('button, select, input, textarea, label, .widget-readout, ' +
    '.optimus-header span, .optimus-bar > span, .optimus-legend span, .optimus-status')].filter(shown);
  for (const e of parts) {
    const r = e.getBoundingClientRect();
    if (r.left < outer.left - 1 || r.right > outer.right + 1) faults.push('outside: ' + name(e));
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
      faults.push('cut: ' + name(e));
  }
  const controls = parts.filter(e => e.matches('button, select, input, textarea, label, .widget-readout'));
  for (const [i, a] of controls.entries()) for (const b of controls.slice(i + 1)) {
    const r = a.getBoundingClientRect(), s = b.getBoundingClientRect();
    if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1 &&
        Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 1)
      faults.push(name(a) + ' overlaps ' + name(b));
  }
  return faults;
}"""


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    if reason := missing(): (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.start_kernel()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            context = browser.new_context(viewport={"width": 1280, "height": 1400})
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            hand = Hand(context.new_page(), lab)
            hand.page.set_default_timeout(1000 * PATIENCE)
            hand.open()
            hand.run_all()
            hand.do("application:toggle-left-area")
            yield hand
            browser.close()
    finally: lab.stop()


@pytest.fixture(autouse=True)
def no_trouble(request):
    """The console is clean before and after each test with a browser."""
    yield
    if "hand" in request.fixturenames: assert request.getfixturevalue("hand").trouble == []


ALIVE = "sum(t.name == 'optimus-panel' for t in __import__('threading').enumerate())"


def test_notebook_16_runs_to_its_end(hand):
    stderr = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'
    errors = hand.page.locator(f"{stderr}, .jp-OutputArea-error")
    assert errors.count() == 0, errors.first.inner_text()
    counts = hand.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert len(counts) > 30 and counts == [f"[{i}]:" for i in range(1, len(counts) + 1)]


def test_sliders_move_the_bars_without_a_model_call(hand):
    hand.write_prompt("The public")
    hand.type_into("temperature", "1.50")
    until(lambda: hand.lab.python("panel.temperature.value") == 1.5, "the temperature")
    hand.lab.python("panel.join(30) and setattr(panel, 'calls', 0)")
    count = "lambda *_: setattr(panel, 'calls', panel.calls + 1)"
    hand.lab.python(f"[panel.writer.texts.items[0].generation.cached_model.model.register_forward_hook({count})].clear()")
    handle = hand.slider("top-p").locator(".noUi-handle")
    handle.focus()
    for key, times in (("ArrowLeft", 15), ("ArrowRight", 5)):
        before, top_p = hand.find(".optimus-head").inner_text(), hand.lab.python("panel.top_p.value")
        for _ in range(times): handle.press(key)
        top_p += 0.01 * times * (1 if key == "ArrowRight" else -1)
        until(lambda p=top_p: hand.lab.python("panel.top_p.value") == pytest.approx(p), "the slider")
        until(lambda old=before: hand.find(".optimus-head").inner_text() != old, "other survivors")
    survivors = hand.lab.python("panel.next_token_view.bars.value.count('optimus-bar in')")
    assert hand.survivors() == survivors and hand.lab.python("panel.calls") == 0


def test_text_grows_stops_and_goes_on(hand):
    hand.number("new tokens", 3000)
    hand.number("seed", 5)
    hand.button("Generate").click()
    sizes = [until(lambda: len(hand.text()), "the text")]
    for _ in range(3): sizes.append(until(lambda: (n := len(hand.text())) > sizes[-1] and n, "more text"))
    assert hand.button("Stop").is_enabled() and not hand.button("Generate").is_enabled()
    handle = hand.slider("temperature").locator(".noUi-handle")
    handle.press("ArrowLeft")  # a slider is not dead during a run
    until(lambda: hand.lab.python("panel.temperature.value") == pytest.approx(1.45), "the slider")
    sizes.append(until(lambda: (n := len(hand.text())) > sizes[-1] and n, "more text"))
    hand.button("Stop").click()
    until(lambda: hand.stopped() and hand.text() == hand.lab.python("panel.written"), "the stop")
    frozen = hand.text()
    until(lambda: hand.lab.python(ALIVE) == 0, "the end of the thread")
    hand.wait_until_heard()
    assert hand.text() == frozen and hand.stopped()
    assert "tokens/s" in hand.find(".optimus-status").inner_text()
    hand.number("new tokens", 5)
    hand.wait(hand.button("Continue").click, "the rest")
    assert hand.text().startswith(frozen) and hand.text() != frozen


def test_two_quick_clicks_are_one_run(hand):
    hand.number("new tokens", 60)
    hand.wait(hand.button("Generate").dblclick, "one run")
    hand.wait_until_heard()
    assert hand.lab.python("not panel.running and panel.ends") == hand.ends


def test_html_in_the_text_stays_text(hand):
    asked = []
    hand.page.on("request", lambda request: asked.append(request.url))
    evil = "<img src=/optimus-evil onerror=alert(1)> <b>bold</b> <script>alert(2)</script>"
    hand.write_prompt(evil)
    hand.number("new tokens", 5)
    hand.wait(hand.button("Generate").click, "a run")
    assert hand.find(".optimus-scroll").first.inner_text().startswith(evil)
    assert hand.find(".optimus-page img, .optimus-page script, .optimus-page b").count() == 0
    assert not [url for url in asked if "evil" in url]


def test_a_bar_writes_its_token(hand):
    hand.write_prompt("The public")
    until(lambda: hand.lab.python("panel.join(30) and panel.written") == "The public", "the draft")
    labels = hand.lab.python("[button.description for button in panel.next_token_view.buttons]")
    until(lambda: hand.find(".optimus-pick").all_inner_texts() == labels, "the bars of this text")
    label = labels[1]
    hand.find(".optimus-pick").nth(1).click()
    until(lambda: len(hand.text()) > len("The public"), "the token")
    added = hand.text()[len("The public"):]
    assert label.rstrip("…") in added.replace(" ", "␣").replace("\n", "⏎")
    hand.find(".optimus-pick").first.focus()
    hand.page.keyboard.press("Enter")
    until(lambda: len(hand.text()) > len("The public") + len(added), "the second token, by key")


def test_each_token_tells_what_the_model_thought(hand):
    hand.number("new tokens", 40)
    hand.wait(hand.button("Generate").click, "a run")
    token = hand.find(".optimus-page [data-tip]").last
    token.hover()
    tip = hand.page.evaluate("e => getComputedStyle(e, '::after').content", token.element_handle())
    assert "%" in tip and "likeliest here" in tip
    shades = hand.page.evaluate("[...document.querySelectorAll('.optimus-legend [class^=k]')]"
                                ".map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(shades)) == 5


def test_copy_copies_the_text(hand):
    hand.button("Copy").click()
    until(lambda: hand.page.evaluate("navigator.clipboard.readText()") == hand.text(), "the clipboard")
    hand.find("button").get_by_text("Copied", exact=True).wait_for()


def test_every_control_can_be_reached_by_keyboard(hand):
    hand.find("textarea").focus()
    reached = []
    for _ in range(60):
        reached.append(hand.page.evaluate("""() => { const e = document.activeElement;
          const slider = e.closest('.optimus-slider');
          return e.closest('.optimus-panel') ? (slider || e).textContent || e.tagName : null }"""))
        if reached[-1] is None: break
        hand.page.keyboard.press("Tab")
    text = " | ".join(filter(None, reached))
    for name in ("TEXTAREA", "Generate", "Continue", "Clear", "Cop", "Compare", "Dice", "temperature",
                 "top-p", "min-p", "INPUT", "given", "↻"): assert name in text, text
    assert sum(label in reached for label in hand.find(".optimus-pick").all_inner_texts()) == 20


def renew(path: Path, name: str):
    """Put a picture into notebooks/images, where asked to."""
    assert path.stat().st_size < 200_000
    if os.environ.get("OPTIMUS_PICTURES"): shutil.copy(path, ROOT / "notebooks" / "images" / name)


def test_pictures_in_light_and_dark_wide_and_narrow(hand):
    hand.write_prompt("The public debt")
    hand.type_into("temperature", "0.80")
    hand.type_into("top-p", "0.60")
    hand.number("new tokens", 90 if os.environ.get("OPTIMUS_PICTURES") else 30)
    hand.number("seed", 7)
    hand.wait(hand.button("Generate").click, "a run")
    hand.page.mouse.move(5, 5)
    for theme in ("Light", "Dark"):
        for width in (1280, 800):
            path = hand.picture(f"one-{theme}-{width}", theme, width)
            if (theme, width) == ("Light", 1280): renew(path, "generation_panel.png")
    hand.picture("one-narrow", "Light", 480)


def test_two_settings_side_by_side(hand):
    hand.button("Compare").click()
    hand.type_into("top-p", "0.95", 0)
    hand.type_into("top-p", "0.50", 1)
    hand.number("new tokens", 90 if os.environ.get("OPTIMUS_PICTURES") else 30)
    hand.wait(hand.button("Generate").click, "two texts")
    assert hand.lab.python("[column.top_p.value for column in panel.columns]") == pytest.approx([0.95, 0.5])
    assert hand.text(0) != hand.text(1) and all(hand.text(i).startswith("The public debt") for i in (0, 1))
    hand.page.mouse.move(5, 5)
    for theme in ("Light", "Dark"):
        for width in (1280, 800):
            path = hand.picture(f"two-{theme}-{width}", theme, width)
            if (theme, width) == ("Dark", 1280): renew(path, "generation_panel_dark.png")
    hand.button("Compare").click()
    until(lambda: hand.find(".optimus-page:visible").count() == 1, "one column")


def test_a_mistake_is_a_sentence_in_the_panel(hand):
    hand.number("seed", -1)
    hand.button("Generate").click()
    alert = hand.find(".optimus-error")
    alert.wait_for()
    assert "seed must be a whole number" in alert.inner_text() and hand.stopped()
    hand.picture("mistake", "Light", 1280)
    hand.number("seed", 1)
    hand.number("new tokens", 3)
    hand.wait(hand.button("Generate").click, "a run")
    assert alert.count() == 0


def test_an_interrupt_and_a_rerun_leave_no_thread(hand):
    hand.number("new tokens", 100_000)
    hand.button("Generate").click()
    until(lambda: hand.lab.python(ALIVE) == 1, "the thread")
    hand.do("kernelmenu:interrupt")
    until(lambda: hand.lab.python(ALIVE) == 0, "its end")
    until(hand.stopped, "the button")
    hand.button("Generate").click()
    until(lambda: hand.lab.python(ALIVE) == 1, "the thread")
    hand.page.locator(".jp-CodeCell", has_text="panel = GenerationPanel").last.locator(".cm-content").click()
    hand.do("notebook:run-cell")
    until(lambda: hand.lab.python(ALIVE) == 0, "its end")
