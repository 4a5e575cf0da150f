"""The tiny model's runs, for the tests of training: `pytest_plugins = ["trained"]` brings the fixtures.

`go(run_name, resume, stop_at, model fields, settings)` trains; a test file compares what it returns.
PYTEST_DONT_REWRITE: there is no assert in here.
"""
import contextlib
import json
import math
import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from fork_server import CONFIG, MODEL, TEXTS

from optimus import LanguageModel, ModelConfig, TrainingConfig
from optimus.checkpoint import write_manifest
from optimus.data import train_tokenizer
from optimus.training import train


PLAIN = contextlib.nullcontext()
STRICT = partial(json.loads, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
SMALL = ModelConfig(**MODEL)


@pytest.fixture(scope="session")
def tokenizer(): return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tokenizer):
    """The tiny model's whole run, with no setting changed: what others are compared with."""
    place = tmp_path_factory.mktemp("undisturbed")
    config = TrainingConfig(**CONFIG | dict(checkpoint_dir=str(place / "c"), tensorboard_dir=str(place / "r"),
                                            run_name="whole", save_interval=10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIMUS_CACHE", str(place / "cache"))
        return train(SMALL, config, corpus={"text": TEXTS}, tokenizer=tokenizer, progress=False)


@pytest.fixture
def go(tmp_path, tokenizer, monkeypatch, undisturbed):
    """Train the tiny model: go(run_name, resume, stop_at, model fields, settings).

    go("whole") is the run that nothing disturbs; it is trained once for all tests.
    """
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))

    def run(name="run", resume=False, stop=None, model=SMALL, texts=TEXTS, on_step=None, tokenizer=tokenizer,
            **settings):
        if name == "whole" and not settings: return undisturbed
        places = dict(checkpoint_dir=str(tmp_path / "checkpoints"), tensorboard_dir=str(tmp_path / "runs"))
        config = TrainingConfig(**CONFIG | places | dict(run_name=name, save_interval=10) | settings)
        end = on_step or (lambda row: row["step"] == stop)
        return train(model, config, resume=resume, corpus={"text": texts}, tokenizer=tokenizer,
                     progress=False, on_step=end)
    return run


@pytest.fixture
def batch(): return torch.randint(280, (2, 7, 13), generator=torch.Generator().manual_seed(0))


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return LanguageModel(replace(SMALL, dropout=0.0, **fields))


def gradient(model): return torch.cat([p.grad.flatten() for p in model.parameters()])


def losses(result): return [row["loss"].hex() for row in result.history]


def scaler(enabled=False): return torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)


def next_second():
    """Wait for it: TensorBoard's files sort by second, then by a counter as text, so that .10 precedes .9."""
    time.sleep(1.01 - time.time() % 1)


@pytest.fixture
def given(tmp_path, tokenizer):
    """A saved model that a run can start from, with its tokenizer."""
    model = tiny(seed=5)
    model.save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "tokenizer.json").write_text(tokenizer.backend.to_str())
    return model, str(tmp_path / "given")


def signals(number, times, at):
    """A function that sends so many signals to this process when it is called for the `at`-th time."""
    calls = []

    def send():
        calls.append(1)
        if len(calls) == at:
            for _ in range(times): os.kill(os.getpid(), number)
    return send


def poison(monkeypatch, when):
    """Losses that are NaN where `when(number of the call)`; returns the calls."""
    original, calls = LanguageModel.loss, []

    def loss(self, x, y):
        if self.training: calls.append(1)
        return original(self, x, y) * (math.nan if self.training and when(len(calls)) else 1)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    return calls


def rewrite_state(checkpoint, change):
    """Change a checkpoint's trainer_state.json as an older version would have written it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    change(state)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)


def curve(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return [e.step for e in events.Scalars("loss")]
