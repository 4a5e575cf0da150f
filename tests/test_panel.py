"""What must stay true of optimus.panel, from Python. Derived in notebooks/16_generation_panel.ipynb."""
import gc
import html
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref

import ipywidgets
import pytest
import torch
from torch import nn

from optimus.checkpoint import write_manifest
from optimus.config import ModelConfig
from optimus.data import save_tokenizer, train_tokenizer
from optimus.generation import Sampling, stream
from optimus.next_token import likeliest, token_label
from optimus.panel import GIVEN, GenerationPanel, ModelChoices, Request, Worker, Writer
from optimus.panel_lifetime import handle_interrupts
from optimus.transformer import LanguageModel

TEXT = "the ship of state, naïve as ever, meets ⛵ 鯨 and 😀 on the sea. " * 3
EVIL = "<img src=x onerror=alert(1)> & \"quotes\" 'single' </div><script>x</script>"


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer([TEXT], 300)


def make_model(**changes):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**dict(
        vocab_size=300, embedding_dim=36, num_layers=2, num_attention_heads=3, rope_seq_len=61, dropout=0.2,
        intermediate_size=31) | changes))
    for p in model.parameters(): nn.init.uniform_(p, 0.5, 1.5) if p.ndim < 2 else nn.init.normal_(p, std=0.3)
    return model


class Scripted(nn.Module):
    """A model that says the ids of `script` one after the other, slowly if asked to."""
    def __init__(self, script=(), prompt_length=1, logits=None, seconds=0.0):
        super().__init__()
        self.config = ModelConfig(vocab_size=300, rope_seq_len=4096)
        self.script, self.prompt_length = list(script), prompt_length
        self.logits, self.seconds = logits, seconds

    def forward(self, tokens, cache=None):
        time.sleep(self.seconds)
        B, T = tokens.shape
        logits = torch.zeros(B, T, 300)
        if self.logits is not None: return logits + self.logits
        at = T - self.prompt_length
        if 0 <= at < len(self.script): logits[:, -1, self.script[at]] = 50.0
        return logits


@pytest.fixture
def panel(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = GenerationPanel(make_model(), tokenizer)
    yield panel
    panel.close()
    assert threads() == []


def threads(): return [t for t in threading.enumerate() if t.name == "optimus-panel"]
def with_model(panel, model):
    panel.writer.texts.model = model
    panel.text_actions.on_prompt_changed()
    assert panel.join(30)


def transcript(panel, column=0): return panel.writer.texts.items[column]
def reader(panel): return transcript(panel).generation.cached_model
def plain(page): return html.unescape(re.sub("<[^>]*>", "", page))


def run(panel, prompt=None, **values):
    if prompt is not None: panel.prompt.value = prompt
    for name, value in values.items(): getattr(panel, name).value = value
    panel.generate_button.click()
    assert panel.join(60)
    return panel.written


# Text stays text

def test_html_in_prompt_and_continuation_is_text(panel, tokenizer):
    prompt = "a"
    with_model(panel, Scripted(tokenizer.encode(EVIL)))
    written = run(panel, prompt, max_new_tokens=len(tokenizer.encode(EVIL)))
    assert written == prompt + EVIL == plain(panel.text.value)
    run(panel, EVIL, max_new_tokens=3)
    shown = panel.next_token_view
    for page in (panel.text.value, shown.bars.value, shown.head.value, panel.message.value):
        assert "<img" not in page and "<script" not in page
    assert html.escape(EVIL) in panel.text.value


def test_html_in_an_error_is_text(panel):
    def broken(*_): raise RuntimeError(EVIL)
    panel.model.forward = broken
    run(panel, "other")
    assert "RuntimeError" in panel.message.value and "<img" not in panel.message.value


# Writing

SETTINGS = [dict(temperature=0.0), dict(temperature=0.7, top_p=0.9, seed=5),
            dict(temperature=1.3, top_p=1.0, top_k=7), dict(temperature=1.0, min_p=0.05, seed=9)]


@pytest.mark.parametrize("chosen", SETTINGS)
def test_the_panel_writes_what_stream_writes(panel, tokenizer, chosen):
    chosen = dict(top_p=1.0, seed=0) | chosen
    written = run(panel, "the ship ⛵", max_new_tokens=40, **chosen)
    wanted = stream(panel.model, tokenizer, "the ship ⛵", max_new_tokens=40, **chosen)
    assert written == "the ship ⛵" + "".join(wanted)
    assert plain(panel.text.value) == written and written in html.unescape(panel.text.value)
    assert "\ufffd" not in panel.text.value and not panel.message.value
    assert not panel.generate_button.disabled and panel.stop_button.disabled


def test_it_writes_on_past_the_end_of_the_context(panel, tokenizer):
    written = run(panel, "the", max_new_tokens=150, seed=2)
    wanted = stream(panel.model, tokenizer, "the", max_new_tokens=150, temperature=0.8, top_p=0.95, seed=2)
    assert written == "the" + "".join(wanted)


def test_stopped_and_continued_is_one_text(panel):
    whole = run(panel, "the", max_new_tokens=30, seed=4)
    run(panel, max_new_tokens=11)
    panel.max_new_tokens.value = 19
    panel.continue_button.click()
    assert panel.join(60) and panel.written == whole
    panel.clear_button.click()
    assert panel.join(60) and panel.written == "the"
    panel.continue_button.click()
    assert panel.join(60) and whole.startswith(panel.written) and panel.written != "the"


def test_the_next_generate_takes_the_new_prompt_and_seed(panel):
    first = run(panel, "the", max_new_tokens=20, seed=1)
    assert run(panel, "of") != first and panel.written.startswith("of")
    assert run(panel, "the", seed=2) != first and run(panel, seed=1) == first


def test_probabilities_of_the_text_are_the_models_own(panel, tokenizer):
    written = run(panel, "the ship", max_new_tokens=25, temperature=1.7, top_p=1.0, seed=8)
    draft = transcript(panel)
    ids = [i for piece in draft.pieces for i in piece.ids]
    assert "".join(piece.text for piece in draft.pieces) == written[len("the ship"):]
    tokens = torch.tensor([tokenizer.encode("the ship") + ids])
    with torch.no_grad(): p = panel.model.eval()(tokens)[0, -len(ids) - 1:-1].softmax(-1)
    own, at = p[range(len(ids)), ids], 0
    for piece in draft.pieces:
        n = len(piece.ids)
        assert piece.probability == pytest.approx(own[at:at + n].prod().item(), rel=1e-3)
        assert [i for i, _ in piece.others] == likeliest(p[at], 5)
        assert piece.text or piece is draft.pieces[-1]
        at += n


def test_a_character_of_several_tokens_is_one_piece(panel, tokenizer):
    fox, a = tokenizer.encode("狐"), tokenizer.encode("a")
    with_model(panel, Scripted([*fox, *a]))
    run(panel, "x", max_new_tokens=len(fox) + 1, temperature=0.0)
    assert len(fox) > 1 and [(p.text, p.ids) for p in transcript(panel).pieces] == [("狐", fox), ("a", a)]
    run(panel, max_new_tokens=1)
    assert panel.written == "x" == plain(panel.text.value)  # a piece of a character is not shown


@pytest.mark.parametrize("script", ["", "sea 😀"])
def test_end_of_text_ends_the_run_and_is_not_shown(panel, tokenizer, script):
    with_model(panel, Scripted([*tokenizer.encode(script), tokenizer.eos_token_id]))
    assert run(panel, "x", temperature=0.0) == f"x{script}"
    assert "end of text" in panel.status.value
    assert "‹end of text›" in panel.next_token_view.buttons[0].description


def test_settings_moved_during_a_run_hold_from_the_next_token_on(panel, tokenizer):
    logits = torch.zeros(300)
    logits[tokenizer.encode("a")[0]] = 9.0
    logits[tokenizer.eos_token_id] = -1e9
    with_model(panel, Scripted(logits=logits, seconds=0.005))
    panel.prompt.value, panel.max_new_tokens.value = "x", 400
    panel.temperature.value, panel.top_p.value = 2.0, 1.0
    panel.generate_button.click()
    until(lambda: len(panel.written) > 20)
    panel.temperature.value = 0.0
    assert panel.join(60)
    assert panel.written.endswith("a" * 50) and set(panel.written[1:15]) != {"a"}


# One thread, one run

def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def slow(panel, tokenizer, tokens=10_000):
    """A run under way that would take minutes."""
    logits = torch.zeros(300)
    logits[tokenizer.encode("a")[0]] = 50.0
    with_model(panel, Scripted(logits=logits, seconds=0.004))
    panel.prompt.value, panel.max_new_tokens.value = "x", tokens
    panel.generate_button.click()
    until(lambda: len(plain(panel.text.value)) > 4)


def test_stop_freezes_the_text_at_once_and_the_buttons_come_back(panel, tokenizer):
    slow(panel, tokenizer)
    assert panel.generate_button.disabled and not panel.stop_button.disabled and len(threads()) == 1
    asked = []
    panel.model.register_forward_pre_hook(lambda *_: asked.append(panel.writer.stopping))
    until(lambda: asked)
    panel.stop_button.click()
    assert panel.join(30) and sum(asked) <= 1  # at most the token that was under way when Stop came
    assert not panel.generate_button.disabled and threads() == []


def test_the_whole_text_is_there_before_generate_can_be_pressed_again(panel):
    seen = []
    def look(change): seen.append((change["new"], plain(panel.text.value)))
    panel.generate_button.observe(look, "disabled")
    text = run(panel, "The public", max_new_tokens=20)
    assert [disabled for disabled, _ in seen] == [True, False] and seen[-1][1] == text != "The public"


def test_a_last_drawing_that_fails_leaves_the_buttons_usable(panel, monkeypatch):
    def broken(final=True): raise OSError("no screen")
    with monkeypatch.context() as patch:
        patch.setattr(panel.renderer, "draw", broken)
        run(panel, "x", max_new_tokens=2)
    assert not panel.generate_button.disabled and "no screen" in panel.message.value
    run(panel, "The", max_new_tokens=3)
    assert panel.message.value == "" and plain(panel.text.value) == panel.written


def test_a_second_click_starts_no_second_run(panel, tokenizer):
    slow(panel, tokenizer)
    before = len(panel.written)
    for button in [panel.generate_button, panel.continue_button] * 5: button.click()
    until(lambda: len(panel.written) > before + 5)
    assert len(threads()) == 1
    panel.stop_button.click()
    assert panel.join(10) and set(panel.written[1:]) == {"a"} and len(panel.written) > before
    assert threads() == []


def test_clicks_from_many_threads_at_once_start_one_run(panel):
    started = []
    panel.writer.worker.submit = lambda name, job: started.append(name)
    clickers = [threading.Thread(target=panel.generate_button.click) for _ in range(20)]
    for t in clickers: t.start()
    for t in clickers: t.join()
    assert started == ["run"]
    del panel.writer.worker.submit
    panel.writer.running = False


def test_a_new_panel_stops_the_run_of_the_old_one(panel, tokenizer):
    slow(panel, tokenizer)
    second = GenerationPanel(make_model(), tokenizer)
    second.join(10)
    assert not panel.running and threads() == []
    second.close()


def test_prompt_edits_and_bars_do_not_disturb_a_run(panel, tokenizer):
    slow(panel, tokenizer)
    panel.prompt.value = "another"
    panel.next_token_view.buttons[3].click()
    panel.compare.value = True
    before = len(panel.written)
    until(lambda: len(panel.written) > before + 5)
    panel.stop_button.click()
    assert panel.join(10) and panel.written.startswith("xaaa") and set(panel.written[1:]) == {"a"}


def test_clear_during_a_run_ends_it(panel, tokenizer):
    slow(panel, tokenizer)
    panel.clear_button.click()
    assert panel.join(10) and panel.written == "x" and not panel.running


def test_an_interrupt_while_waiting_stops_the_run(panel, tokenizer):
    slow(panel, tokenizer)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): panel.join()
    until(lambda: threads() == [])
    assert not panel.running and not panel.generate_button.disabled


def test_an_interrupt_anywhere_else_stops_the_run_and_goes_on_its_way(panel, tokenizer):
    """A plain program that is not waiting for the panel."""
    slow(panel, tokenizer)
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert panel.join(30) and threads() == [] and not panel.running


def test_an_interrupt_that_was_heard_by_somebody_else_still_is(panel, tokenizer, monkeypatch):
    heard, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        for _ in range(3): handle_interrupts()
        slow(panel, tokenizer)
        signal.raise_signal(signal.SIGINT)
        assert heard == [1] and panel.join(30) and not panel.running
        for quiet in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, quiet)
            handle_interrupts()
            assert signal.getsignal(signal.SIGINT) is quiet
    finally: signal.signal(signal.SIGINT, before)


# In a real kernel, where SIGINT is ignored between cells

CELL = """
import gc, pathlib, threading, time, torch
from ipywidgets.widgets.widget import _instances
from test_panel import TEXT, Scripted, train_tokenizer
from optimus.panel import GenerationPanel
tokenizer = train_tokenizer([TEXT], 300)
def run():
    logits = torch.zeros(300).index_fill(0, torch.tensor([tokenizer.eos_token_id]), -1e9)  # it never ends
    panel = GenerationPanel(Scripted(logits=logits, seconds=0.005), tokenizer, "x")
    panel.max_new_tokens.value = 100_000
    panel.generate_button.click()
    return panel
def alive(): return sum(t.name == "optimus-panel" for t in threading.enumerate())
def counted():
    gc.collect()
    return sum(isinstance(x, GenerationPanel) for x in gc.get_objects()), len(_instances)"""


class Kernel:
    def __init__(self):
        from jupyter_client.manager import start_new_kernel
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=os.path.dirname(__file__))

    def run(self, code, **more):
        """Run a cell, and wait until the kernel is idle again."""
        reply = self.client.execute(code, reply=True, timeout=120, **more)
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            mine = message["parent_header"].get("msg_id") == reply["parent_header"]["msg_id"]
            if mine and message["content"].get("execution_state") == "idle": return reply["content"]

    def value(self, expression):
        reply = self.run("", user_expressions={"v": expression})
        return reply.get("user_expressions", {}).get("v", {}).get("data", {}).get("text/plain")

    def interrupt(self, cell, tmp_path):
        """Interrupt a cell that has begun; its reply."""
        busy = tmp_path / f"busy-{len(list(tmp_path.iterdir()))}"
        self.client.execute(cell.replace("BUSY", f"pathlib.Path({str(busy)!r}).touch(); time.sleep(600)"))
        until(busy.exists)
        self.manager.interrupt_kernel()
        return self.client.get_shell_msg(timeout=60)["content"]


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    try:
        assert kernel.run(CELL)["status"] == "ok"
        yield kernel
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_an_interrupt_of_an_idle_kernel_stops_the_run_and_a_rerun_leaves_no_thread(kernel):
    for _ in range(2):  # the cell, and the cell again
        assert kernel.run("panel = run()")["status"] == "ok"
        assert kernel.value("alive()") == "1"
    kernel.manager.interrupt_kernel()  # the kernel is idle: it said so
    until(lambda: kernel.value("alive()") == "0")
    assert kernel.value("panel.running, panel.generate_button.disabled") == "(False, False)"


@pytest.mark.slow
def test_an_interrupt_of_a_busy_kernel_stops_the_run(kernel, tmp_path):
    assert kernel.interrupt("panel = run(); BUSY", tmp_path)["status"] == "error"
    until(lambda: kernel.value("alive()") == "0")
    assert kernel.value("panel.running, panel.generate_button.disabled") == "(False, False)"


def test_an_interrupt_that_the_cell_catches_stops_the_run(kernel, tmp_path):
    cell = "panel = run()\ntry: BUSY\nexcept KeyboardInterrupt: pass"
    assert kernel.interrupt(cell, tmp_path)["status"] == "ok"
    until(lambda: kernel.value("alive()") == "0")
    kernel.run("panel.generate_button.click()")
    assert kernel.value("alive()") == "1"
    cell = "try: BUSY\nexcept KeyboardInterrupt: pass"  # a cell that has nothing to do with the panel
    assert kernel.interrupt(cell, tmp_path)["status"] == "ok"
    until(lambda: kernel.value("alive()") == "0")


@pytest.mark.slow
def test_a_cell_that_is_run_again_frees_its_panel_and_no_other(kernel):
    kernel.run("other = run()")
    kernel.run("panel = run()")
    before = kernel.value("counted()")
    for _ in range(4): kernel.run("panel = run()")
    assert kernel.value("counted()") == before
    assert kernel.value("other.comm is None, panel.comm is None") == "(False, False)"
    kernel.run("pair = [run() for _ in range(2)]")  # one run of a cell may make two
    assert kernel.value("[p.comm is None for p in pair]") == "[False, False]"
    kernel.run("for p in (other, panel, *pair): p.close()")
    assert kernel.value("alive()") == "0"


def test_outside_a_notebook_a_panel_that_nobody_holds_is_freed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def counted():
        gc.collect()
        return len(ipywidgets.widget._instances)
    model, before = make_model(), counted()
    gone = []
    for _ in range(3):
        panel = GenerationPanel(model, tokenizer, "the")
        run(panel, max_new_tokens=3)
        gone.append(weakref.ref(panel))
    gone.append(weakref.ref(panel.next_token_view))
    kept = GenerationPanel(model, tokenizer)
    del panel
    gc.collect()
    assert kept.join(30)
    assert [ref() for ref in gone] == [None] * 4 and threads() == []
    assert run(kept, "the", max_new_tokens=3).startswith("the")  # its buttons still work
    kept.close()
    del kept
    assert counted() == before


def test_two_panels_may_stand_side_by_side(panel, tokenizer):
    other = GenerationPanel(make_model(), tokenizer, "the")
    assert run(panel, "a", max_new_tokens=3) != "a" and run(other, max_new_tokens=3) != "the"
    other.close()


def test_the_worker_drops_what_is_out_of_date_and_survives_errors():
    done, trouble, gate = [], [], threading.Event()
    worker = Worker(trouble.append)
    worker.submit("wait", lambda: gate.wait(10))
    for i in range(5): worker.submit("view", lambda i=i: done.append(i))
    worker.submit("bad", lambda: 1 / 0)
    worker.submit("last", lambda: done.append("last"))
    assert not worker.join(0.01)
    gate.set()
    assert worker.join(10) and done == [4, "last"] and [type(e) for e in trouble] == [ZeroDivisionError]
    for i in range(300):  # jobs that arrive just as the thread ends
        worker.submit(f"{i}", lambda i=i: done.append(i))
        if i % 3 == 0: worker.join(10)
    assert worker.join(10) and done[2:] == list(range(300)) and worker.thread is None


def test_a_writer_needs_no_widget_and_says_when_it_is_done(tokenizer):
    seen, said, changes = [], [], []
    writer = Writer(make_model(), tokenizer, say=said.append, on_change=changes.append,
                    on_running=lambda: seen.append(writer.running))
    def request(*settings, **more):
        settings = [lambda s=s: Sampling(**s) for s in settings]
        return Request("the", settings, **dict(max_new_tokens=9, seed=1, fresh=True) | more)
    writer.start(request(dict(temperature=0.5), dict(top_p=0.9)))
    assert writer.worker.join(30) and seen == [True, False] and changes[-1] is True and set(said) == {""}
    for transcript, chosen in zip(writer.texts.items, (dict(temperature=0.5), dict(top_p=0.9)), strict=True):
        wanted = stream(writer.texts.model, tokenizer, "the", max_new_tokens=9, seed=1, **chosen)
        assert transcript.text == "the" + "".join(wanted)
    before = writer.texts.items[0].text
    writer.start(request(dict(top_k=0)))  # a mistake writes nothing
    assert writer.worker.join(30) and said[-1].startswith("top_k must be") and not writer.running
    assert writer.texts.items[0].text == before
    writer.start(request(dict(), fresh=False))
    writer.edit("restart", lambda texts: texts.restart("of", 1))  # waits for the run
    assert writer.worker.join(30) and [t.text for t in writer.texts.items] == ["of"]


# Mistakes become sentences

@pytest.mark.parametrize("name, value, words", [
    ("top_k", -1, "top_k must be a whole number"),
    ("max_new_tokens", 0, "max_new_tokens must be a whole number"),
    ("max_new_tokens", -1, "max_new_tokens"), ("max_new_tokens", 10**9, "max_new_tokens"),
    ("seed", -1, "seed must be a whole number"), ("seed", 2**63, "seed"),
    ("temperature", math.nan, "temperature must be a number in [0, inf)"),
    ("top_p", math.nan, "top_p must be"), ("min_p", math.nan, "min_p must be")])
def test_a_bad_setting_is_a_sentence_and_the_next_run_works(panel, name, value, words):
    good = getattr(panel, name).value
    run(panel, "the", **{name: value})
    assert words in html.unescape(panel.message.value) and "Traceback" not in panel.message.value
    assert not panel.generate_button.disabled and panel.written == "the"
    run(panel, max_new_tokens=3, **({} if name == "max_new_tokens" else {name: good}))
    assert panel.message.value == "" and len(transcript(panel).pieces) >= 1


def test_a_slider_moved_to_a_bad_value_and_back_says_so_and_forgets_it(panel):
    panel.prompt.value = "the"
    panel.join(30)
    panel.top_k.value = -3
    assert "top_k must be" in panel.message.value
    panel.top_k.value = None
    assert panel.message.value == "" and panel.top_k.value == 0 and panel.columns[0].sampling().top_k is None


@pytest.mark.parametrize("bad", [torch.full((300,), math.nan), torch.full((300,), -math.inf)])
def test_logits_without_a_distribution_are_a_sentence(panel, bad):
    panel.writer.texts.model = Scripted(logits=bad)
    run(panel, "the")
    assert "no distribution" in panel.message.value and not panel.generate_button.disabled


def test_an_error_in_the_middle_is_a_sentence_and_the_text_stays(panel, tokenizer):
    class Breaks(Scripted):
        def forward(self, tokens, cache=None):
            if tokens.shape[1] > 6: raise RuntimeError("out of luck")
            return super().forward(tokens)
    with_model(panel, Breaks(tokenizer.encode("abcdefghij")))
    run(panel, "x", temperature=0.0)
    assert "RuntimeError: out of luck" in panel.message.value
    assert panel.written == "xabcdef" and not panel.generate_button.disabled and panel.stop_button.disabled


@pytest.mark.parametrize("prompt", ["", "   ", "\0", "\ud800", "the sea " * 20_000, "<|endoftext|>",
                                    "\ufeff"], ids=range(7))
def test_any_prompt_runs_or_is_refused_in_a_sentence(panel, prompt):
    panel.prompt.value = prompt
    panel.max_new_tokens.value = 3
    panel.generate_button.click()
    assert panel.join(60) and not panel.running
    if prompt == "\ud800": assert "surrogate" in panel.message.value
    else: assert panel.message.value == "" and panel.written.startswith(prompt)


def test_a_tokenizer_larger_than_the_model_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = GenerationPanel(make_model(vocab_size=299), tokenizer, "the")
    assert panel.join(30) and "300 entries" in panel.message.value
    run(panel)
    assert "300 entries" in panel.message.value and not panel.generate_button.disabled
    panel.close()


# What a hand can do

def counted(panel):
    calls = []
    reader(panel).model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_slider_moves_the_bars_without_asking_the_model(panel):
    panel.prompt.value = "the"
    panel.join(30)
    calls, seen = counted(panel), set()
    for name, value in (("temperature", 1.5), ("top_p", 0.3), ("top_p", 0.9), ("min_p", 0.2), ("top_k", 3)):
        getattr(panel, name).value = value
        seen.add((panel.next_token_view.bars.value, panel.next_token_view.head.value))
    assert not calls and len(seen) == 5 and panel.next_token_view.bars.value.count("optimus-bar in") <= 3


@pytest.mark.parametrize("row", [0, 2, 19])
def test_a_bar_writes_its_token(panel, tokenizer, row):
    panel.prompt.value = "the"
    panel.join(30)
    i, bars = panel.next_token_view.ids[row], panel.next_token_view.bars.value
    assert panel.next_token_view.buttons[row].description == token_label(tokenizer, i)
    panel.next_token_view.buttons[row].click()
    assert panel.join(30)
    draft = transcript(panel)
    assert draft.generation.buffer.tokens.tolist() == [[*tokenizer.encode("the"), i]]
    assert panel.next_token_view.bars.value != bars and draft.pieces[0].ids == [i]


def test_two_quick_clicks_on_a_bar_write_it_once(panel):
    panel.prompt.value = "the"
    panel.join(30)
    for _ in range(2): panel.next_token_view.buttons[1].click()
    panel.join(30)
    assert sum(len(p.ids) for p in transcript(panel).pieces) == 1


def test_the_end_of_text_bar_ends_the_text(panel, tokenizer):
    with_model(panel, Scripted([tokenizer.eos_token_id]))
    panel.prompt.value = "x"
    panel.join(30)
    panel.next_token_view.buttons[0].click()
    assert panel.join(30) and panel.written == "x" and "end of text" in panel.status.value


def test_two_settings_stand_side_by_side(panel, tokenizer):
    panel.compare.value = True
    a, b = panel.columns
    b.temperature.value, b.top_p.value = 1.4, 0.5
    run(panel, "the ship", max_new_tokens=25, seed=6, temperature=0.9)
    for column, chosen in ((a, dict(temperature=0.9, top_p=0.95)), (b, dict(temperature=1.4, top_p=0.5))):
        wanted = stream(panel.model, tokenizer, "the ship", max_new_tokens=25, seed=6, **chosen)
        assert plain(column.text.value) == "the ship" + "".join(wanted)
    assert b.box.layout.display is None
    a.top_p.value = 0.9
    assert "settings A" in panel.next_token_view.head.value
    b.top_p.value = 0.6
    assert "settings B" in panel.next_token_view.head.value
    assert panel.next_token_view.ids == panel.renderer.last_logits[1][1]
    panel.next_token_view.buttons[0].click()
    panel.join(30)
    first, second = (sum(len(piece.ids) for piece in transcript(panel, i).pieces) for i in (0, 1))
    assert (first, second) == (25, 26)
    panel.compare.value = False
    panel.join(30)
    assert b.box.layout.display == "none"
    assert "settings" not in panel.next_token_view.head.value.split("</b>")[0]


def test_the_same_settings_side_by_side_write_the_same(panel):
    panel.compare.value = True
    panel.columns[1].top_p.value = panel.top_p.value
    run(panel, "the", max_new_tokens=20)
    assert plain(panel.columns[0].text.value) == plain(panel.columns[1].text.value)


def test_the_status_counts_bytes_and_tokens(panel, tokenizer):
    run(panel, "the ship", max_new_tokens=7)
    cache, length = reader(panel).cache, transcript(panel).generation.buffer.length
    assert cache.max_length == 61 and cache.length == length
    held = cache.nbytes * cache.length // 61
    for words in (f"cache {held / 1024:.0f} of {cache.nbytes / 1024:.0f} kB", "tokens/s",
                  f"{61 - length} of 61 tokens left"):
        assert words in panel.status.value


def test_dice(panel):
    seeds = set()
    for _ in range(20):
        panel.dice_button.click()
        seeds.add(panel.seed.value)
    assert len(seeds) > 10 and all(0 <= seed < 2**31 for seed in seeds)


# Models to choose from

def save_run(folder, tokenizer, seed):
    torch.manual_seed(seed)
    model = make_model(embedding_dim=24, num_attention_heads=2)
    for p in model.parameters(): nn.init.normal_(p, std=0.3)
    folder.mkdir(parents=True)
    path = folder / "step-00000003"
    model.save_pretrained(path)
    save_tokenizer(tokenizer, path)
    write_manifest(path)
    return model


def test_runs_and_shipped_models_can_be_chosen(panel, tokenizer, tmp_path, monkeypatch):
    trained = save_run(tmp_path / "checkpoints" / "run-001", tokenizer, 3)
    shipped = tmp_path / "shipped" / "presidents"
    trained.save_pretrained(shipped)
    save_tokenizer(tokenizer, shipped)
    monkeypatch.setattr("optimus.panel.shipped_models", lambda: {"presidents": shipped})
    panel.refresh_button.click()
    assert panel.checkpoint.options == (GIVEN, "shipped: presidents", "run: run-001")
    first, given_model = run(panel, "the", max_new_tokens=15), panel.model
    for label in ("run: run-001", "shipped: presidents"):
        panel.checkpoint.value = label
        assert panel.join(30) and panel.message.value == "" and panel.written == "the"
        wanted = "the" + "".join(stream(trained, tokenizer, "the", max_new_tokens=15, temperature=0.8,
                                        top_p=0.95, seed=0))
        assert run(panel) == wanted != first
        panel.refresh_button.click()
        assert panel.checkpoint.value == label and panel.join(10) and panel.written == wanted
    panel.checkpoint.value = GIVEN
    assert panel.join(30) and panel.model is given_model and run(panel) == first


def test_a_damaged_run_is_a_sentence_and_the_old_model_stays(panel, tokenizer, tmp_path):
    save_run(tmp_path / "checkpoints" / "run-001", tokenizer, 3)
    (tmp_path / "checkpoints" / "run-001" / "step-00000003" / "model.safetensors").write_bytes(b"x")
    panel.refresh_button.click()
    before = run(panel, "the", max_new_tokens=9)
    panel.checkpoint.value = "run: run-001"
    assert panel.join(30) and "damaged" in panel.message.value and panel.checkpoint.value == GIVEN
    assert run(panel) == before and panel.message.value == ""


def test_the_newest_run_comes_first(tokenizer, tmp_path):
    for name, age in (("run-001", 100), ("run-002", 50), ("run-003", 300)):
        save_run(tmp_path / name, tokenizer, 1)
        moment = time.time() - age
        os.utime(tmp_path / name / "step-00000003", (moment, moment))
    listed = [label for label in ModelChoices(None, None, [tmp_path]).labels() if label.startswith("run")]
    assert listed == ["run: run-002", "run: run-001", "run: run-003"]


# Shape

def test_it_is_a_widget_with_the_names_of_the_contract(panel):
    assert isinstance(panel, ipywidgets.Widget) and "optimus-panel" in panel._dom_classes
    for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "prompt"):
        assert getattr(panel, name).value is not None
    assert isinstance(panel.generate_button, ipywidgets.Button) and isinstance(panel.text, ipywidgets.HTML)


def test_a_panel_whose_arguments_were_refused_can_be_closed():
    GenerationPanel.__new__(GenerationPanel).close()  # as the garbage collector does


def test_any_tokenizer_with_encode_and_decode_will_do(tmp_path, monkeypatch):
    class Letters:
        eos_token_id = 0
        def encode(self, text): return [ord(c) for c in text]
        def decode(self, ids): return "".join(map(chr, ids))
        def __len__(self): return 128
    monkeypatch.chdir(tmp_path)
    panel = GenerationPanel(make_model(vocab_size=128, attention="gqa", num_kv_heads=1), Letters())
    assert run(panel, "abc", max_new_tokens=9).startswith("abc")
    panel.close()


def test_a_run_leaves_the_models_mode_and_chance_alone(panel):
    panel.model.train()
    state, before = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(panel, "the", max_new_tokens=9)
        panel.temperature.value = 0.3  # draws the bars in this thread
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)
    assert panel.model.training and torch.equal(torch.get_rng_state(), state)


def test_a_long_text_is_drawn_less_often(panel, tokenizer, monkeypatch):
    """At most 400 kB a second go to the browser."""
    panel.prompt.value = "the sea " * 20_000
    panel.join(30)
    drawn = []
    panel.text.observe(lambda change: drawn.append(len(change["new"])), "value")
    began = time.monotonic()
    run(panel, max_new_tokens=200)
    assert sum(drawn) <= 400_000 * (time.monotonic() - began) + 3 * max(drawn)


LEAVE = """
import sys, optimus
assert "ipywidgets" not in sys.modules
from test_panel import TEXT, GenerationPanel, make_model, train_tokenizer, until
open_, running = (GenerationPanel(make_model(), train_tokenizer([TEXT], 300), "x") for _ in range(2))
running.max_new_tokens.value = 1_000_000
running.generate_button.click()
until(lambda: len(running.written) > 3)
"""


@pytest.mark.slow
def test_importing_optimus_imports_no_widgets_and_python_is_left_in_silence_with_a_run_under_way():
    child = subprocess.run([sys.executable, "-c", LEAVE], cwd=os.path.dirname(__file__), capture_output=True,
                           text=True)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
