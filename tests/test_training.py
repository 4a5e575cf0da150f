"""What must stay true of optimus.training. Derived in notebooks/12_training.ipynb."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fork_server import CONFIG, MODEL, TEXTS

from optimus import (LanguageModel, ModelConfig, TrainingConfig, checkpoint, devices, ranks, run_inputs,
                     run_log, runs, training)
from optimus.checkpoint import (CheckpointError, latest_checkpoint, load_checkpoint, sha256_of, step_folders,
                                write_manifest)
from optimus.data import Sequences, batches, prepare, train_tokenizer
from optimus.ranks import SINGLE_PROCESS
from optimus.training import (Muon, StopRequest, TrainingState, accumulate_gradients, amp_dtype,
                              choose_tokenizer, evaluate, learning_rate_at, make_optimizer, orthogonalize,
                              train, train_step)

PLAIN = contextlib.nullcontext()
SMALL = ModelConfig(**MODEL)


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    """The tiny model's whole run, with no setting changed: what others are compared with."""
    place, patch = tmp_path_factory.mktemp("undisturbed"), pytest.MonkeyPatch()
    patch.setenv("OPTIMUS_CACHE", str(place / "cache"))
    config = TrainingConfig(**CONFIG | dict(checkpoint_dir=str(place / "c"), tensorboard_dir=str(place / "r"),
                                            run_name="whole", save_interval=10))
    yield train(SMALL, config, corpus={"text": TEXTS}, tokenizer=tokenizer, progress=False)
    patch.undo()


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


# Schedule and optimizers

@pytest.mark.parametrize("total, warmup", [(97, 0), (97, 13), (7, 7), (1, 0)])
def test_schedule_agrees_with_transformers(total, warmup):
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert learning_rate_at(step, total, warmup, 0.3) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_schedule_ends_at_the_floor_and_stays():
    ends = [learning_rate_at(step, 100, 10, 1.0, 0.1) for step in (100, 500)]
    assert ends[0] == ends[1] == pytest.approx(0.1)
    assert learning_rate_at(10, 100, 10, 1.0, 0.1) == 1.0


@pytest.mark.parametrize("shape", [(17, 5), (5, 17), (11, 11)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    kept = U.T @ orthogonalize(G) @ V.T
    assert (kept - kept.diag().diag()).abs().max() < 1e-3
    assert 0.5 < kept.diag().min() and kept.diag().max() < 1.3


def test_muon_groups_without_muon_are_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    mine = Muon([dict(params=[ours])], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(7):
        ours.grad = theirs.grad = torch.randn(5, 3)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_muon_agrees_with_torch():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(13, 5)) for _ in range(2))
    mine = Muon([dict(params=[ours], muon=True)], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(13, 5)
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (ours - 1).norm()  # theirs iterates in bfloat16


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("muon", Muon)])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_gains_do_not_and_each_parameter_is_in_one_group(name, kind, tied):
    model = tiny(tie_embeddings=tied)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.1))
    assert type(optimizer) is kind
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0.0)
            if group.get("muon"): assert p is not model.embedding.weight and p is not model.head.weight


def test_precision_follows_the_device(monkeypatch):
    assert amp_dtype("auto", torch.device("cpu")) is None
    assert amp_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert amp_dtype("off", torch.device("cuda")) is None
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        supported = lambda including_emulation, native=native: native
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert amp_dtype("auto", torch.device("cuda")) is dtype


# One step

@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_parts_of_any_size_give_the_gradient_of_the_whole(batch, micro):
    x, y = batch
    y = y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    y[3] = -100  # a sequence without any target
    whole, parts = tiny(), tiny()
    expected = torch.nn.functional.cross_entropy(whole(x).flatten(0, 1), y.flatten())
    expected.backward()
    assert accumulate_gradients(parts, x, y, micro, PLAIN) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fields", [{}, {"attention": "gqa"}, {"checkpointing": True}])
def test_a_step_waits_for_the_device_once(batch, monkeypatch, fields, optimizer):
    """On the meta device there are no numbers: every other read, a wait on a GPU, is an error."""
    config = TrainingConfig(optimizer=optimizer)
    with torch.device("meta"): model = LanguageModel(replace(SMALL, dropout=0.1, **fields))
    # AdamW's fused kernel does not exist there
    adamw = optimizer == "adamw" and torch.optim.AdamW(model.parameters(), fused=False)
    run, reads = TrainingState(model, adamw or make_optimizer(model, config), scaler(False), 3), []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.device.type) or [1.0, 1.0])
    train_step(run, *(t.to("meta") for t in batch), config, 1e-3, PLAIN)
    assert reads == ["meta"] and run.updates == 1


def test_a_batch_is_looked_at_before_it_is_sent_to_a_gpu(go, monkeypatch):
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    monkeypatch.setattr(training, "train_step", None)
    beyond = tokens + SMALL.vocab_size
    for pair, named in (((beyond, tokens), "token ids"), ((tokens, tokens - 1), "targets")):
        monkeypatch.setattr(training, "batches", lambda *args, pair=pair, **settings: [pair])
        with pytest.raises(ValueError, match=f"{named} must be"): go()


def test_a_scaled_gradient_is_unscaled_before_it_is_clipped(batch):
    config, steps = TrainingConfig(gradient_clip_val=0.05), []
    for enabled in (False, True):
        model = tiny()
        run = TrainingState(model, torch.optim.SGD(model.parameters()), scaler(enabled), 7)
        row = train_step(run, *batch, config, 0.1, PLAIN)
        steps.append((row["gradient_norm"], row["loss"], gradient(model)))
        assert gradient(model).norm() == pytest.approx(0.05, rel=1e-3)
        assert run.updates == 1
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-4)
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=1e-3, atol=1e-7)


class Faulty:
    """A model that raises or spoils its loss when asked to; everything else is the model's own."""
    def __init__(self, model, fault): self.model, self.fault = model, fault
    def __getattr__(self, name): return getattr(self.model, name)
    def loss(self, x, y): return self.fault(x, self.model.loss(x, y))


NO_MEMORY = [torch.OutOfMemoryError("pretended"),
             RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate")]


def memory_for(sequences, error=NO_MEMORY[0]):
    def fault(x, loss):
        if len(x) > sequences: raise error
        return loss
    return fault


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_halves_the_parts_and_changes_nothing_else(batch, error):
    config, ends = TrainingConfig(), []
    for limit in (7, 2):
        model = tiny()
        faulty = Faulty(model, memory_for(limit, error))
        run = TrainingState(faulty, make_optimizer(model, config), scaler(), 7)
        row = train_step(run, *batch, config, 1e-3, PLAIN)
        ends.append((row["loss"], run.micro_batch_size, gradient(model)))
    assert [e[1] for e in ends] == [7, 2]
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-4, atol=1e-7)


def test_out_of_memory_with_one_sequence_is_advice_and_other_errors_pass_through(batch):
    config, model = TrainingConfig(), tiny()
    run = TrainingState(Faulty(model, memory_for(0)), make_optimizer(model, config), scaler(), 7)
    with pytest.raises(RuntimeError, match="out of memory with one sequence.*max_length.*checkpointing"):
        train_step(run, *batch, config, 1e-3, PLAIN)
    calls = []

    def broken(x, loss):
        calls.append(len(x))
        raise RuntimeError("something else")
    run.model = Faulty(model, broken)
    with pytest.raises(RuntimeError, match="something else"): train_step(run, *batch, config, 1e-3, PLAIN)
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_the_schedule_waits(batch, bad, scaled):
    config, model = TrainingConfig(), tiny()
    fault = Faulty(model, lambda x, loss: loss * bad)
    run = TrainingState(fault, make_optimizer(model, config), scaler(scaled), 7)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train_step(run, *batch, config, 1e-3, PLAIN)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    assert (run.updates, run.bad_steps) == (0, 1)
    assert run.scaler.get_scale() == (512.0 if scaled else 1.0)
    run.model = model
    train_step(run, *batch, config, 1e-3, PLAIN)
    assert (run.updates, run.bad_steps) == (1, 0)


def test_evaluation_is_the_mean_over_all_held_out_windows_and_restores_the_mode(go, tokenizer):
    prepared = prepare({"text": TEXTS}, tokenizer, 0.5)
    sequences, model = Sequences(prepared, "validation", 16), tiny().train()
    pairs = [sequences[i] for i in range(len(sequences))]
    x, y = (torch.stack(part) for part in zip(*pairs))
    expected = torch.nn.functional.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten()).item()
    model.train()
    for size in (1, 4, len(sequences)):
        assert evaluate(model, sequences, size) == pytest.approx(expected, rel=1e-5)
    assert model.training


# The run

def test_the_loss_falls_and_everything_is_written(go, tmp_path):
    result = go()
    assert [row["step"] for row in result.history] == list(range(1, 41))
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 1
    last = result.history[-1]
    bits = last["validation_loss"] / math.log(2) * result.corpus.tokens_per_byte
    assert last["bits_per_byte"] == pytest.approx(bits)
    assert {p.name for p in result.checkpoint.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "train_state.pt",
        "manifest.json"}
    state = load_checkpoint(result.checkpoint).trainer_state
    assert (state["step"], state["tokens"]) == (40, 40 * 4 * 16)
    assert state["training_config"]["seed"] == 0
    assert state["corpus"]["fingerprint"] == result.corpus.fingerprint


def test_the_same_settings_give_the_same_losses_and_another_seed_others(go):
    a, b, c = go("whole"), go("b"), go("c", seed=1)
    assert losses(a) == losses(b) != losses(c)


@pytest.mark.parametrize("stops", [[5], [5, 9], [13], [5, 9, 20, 33]])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_continues_bit_for_bit(go, stops, workers):
    whole = go("whole")
    for i, stop in enumerate(stops):
        part = go("parts", resume=i > 0, stop=stop, num_workers=workers)
        assert part.checkpoint.name[-2:] == f"{stop:02d}"
    parts = go("parts", resume=True, num_workers=workers)
    assert losses(parts) == losses(whole)
    one, other = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    epochs = 40 * 4 / len(Sequences(whole.corpus, "train", 16, 0))
    assert epochs > 2


ITEMS = {
    "optimizer": lambda run, tensors, numbers: tensors.update(optimizer=run.optimizer.state_dict()),
    "schedule": lambda run, tensors, numbers: numbers.update(updates=0),
    "scaler": lambda run, tensors, numbers: tensors.update(scaler=run.scaler.state_dict()),
    "random state": lambda run, tensors, numbers: tensors["rng"].update(cpu=torch.get_rng_state()),
    "step": None,
    "nothing": lambda run, tensors, numbers: None,
}


@pytest.mark.parametrize("item", ITEMS)
def test_the_equality_fails_when_one_item_of_state_is_lost(go, monkeypatch, item):
    """Proof that the tests above have teeth: float16 with a scaler, one overflow at step 3, stop at 9."""
    monkeypatch.setattr(training, "amp_dtype", lambda amp, device: torch.float16 if amp == "fp16" else None)
    monkeypatch.setattr(training, "autocast", lambda dtype, device: PLAIN)  # the scaler alone is enough here
    original, calls = LanguageModel.loss, []

    def loss(self, x, y):
        value = original(self, x, y)
        if self.training: calls.append(1)
        return value * math.inf if self.training and len(calls) == 3 else value
    monkeypatch.setattr(LanguageModel, "loss", loss)

    def curve(result): return [(row["loss"].hex(), row["loss_scale"]) for row in result.history[9:]]
    whole = go("whole", amp="fp16", max_steps=25)
    calls.clear()
    go("parts", stop=9, amp="fp16", max_steps=25)
    restore = TrainingState.restore

    def forgetful(self, tensors, numbers):
        ITEMS[item](self, tensors, numbers)
        restore(self, tensors, numbers)
    if item == "step":
        load = ranks.load_checkpoint
        first = lambda path, **how: replace_step(load(path, **how), 0)
        monkeypatch.setattr(ranks, "load_checkpoint", first)
    else: monkeypatch.setattr(TrainingState, "restore", forgetful)
    parts = go("parts", resume=True, amp="fp16", max_steps=25)
    assert (curve(parts) == curve(whole)) == (item == "nothing")


def replace_step(checkpoint, step):
    checkpoint.step = step
    return checkpoint


def test_an_existing_run_is_never_overwritten(go, tmp_path):
    go("run", stop=3)
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run")
    assert [go(None, stop=1).checkpoint.parent.name for _ in range(2)] == ["run-001", "run-002"]
    assert go(None, resume=True, stop=2).checkpoint.parent.name == "run-002"


def test_resume_without_any_checkpoint_starts_at_the_beginning(go):
    assert go("new", resume=True, stop=2).history[0]["step"] == 1


@pytest.mark.parametrize("change, words", [
    (dict(learning_rate=1e-4), r"training_config.learning_rate was 0.005 .* is 0.0001 now"),
    (dict(seed=5), "training_config.seed was 0 .* is 5 now"),
    (dict(batch_size=2), "training_config.batch_size was 4 .* is 2 now"),
    (dict(model=replace(SMALL, num_layers=3)), "model_config.num_layers was 2 .* is 3 now"),
])
def test_another_run_cannot_be_resumed_by_mistake(go, change, words, monkeypatch):
    go("run", stop=3)
    monkeypatch.setattr(ranks, "load_checkpoint", None)  # refused before any tensor is read
    with pytest.raises(ValueError, match=f"cannot resume: {words}"): go("run", resume=True, **change)


OTHERS = [["edited", *TEXTS[1:]], TEXTS[1:], [*TEXTS, "more"], TEXTS[::-1]]


@pytest.mark.parametrize("texts", OTHERS, ids=["edited", "shorter", "longer", "another order"])
def test_another_text_is_refused_in_words(go, texts, monkeypatch):
    go("run", stop=3, dataset_name="my.txt")
    monkeypatch.setattr(ranks, "load_checkpoint", None)
    words = "run: the text of the corpus my.txt has changed since step 3; bring the old text back, or begin"
    with pytest.raises(ValueError, match=words) as error:
        go("run", resume=True, texts=texts, dataset_name="my.txt")
    assert not re.search("[0-9a-f]{16}", str(error.value))
    with pytest.raises(ValueError, match="corpus other.txt is another text than my.txt, .* to step 3; bring"):
        go("run", resume=True, texts=texts, dataset_name="other.txt")


def test_the_same_text_under_another_name_is_the_same_corpus(go):
    go("run", stop=3, dataset_name="old.txt")
    moved = go("run", resume=True, dataset_name="/elsewhere/new.jsonl", dataset_config="edition")
    assert losses(moved) == losses(go("whole"))


def test_another_tokenizer_of_the_same_size_is_refused(go, tmp_path):
    result = go("run", stop=3)
    other = train_tokenizer([t[::-1] for t in TEXTS], len(result.tokenizer))
    assert len(other) == len(result.tokenizer)
    config = TrainingConfig(**load_checkpoint(result.checkpoint).trainer_state["training_config"])
    with pytest.raises(ValueError, match="tokenizer is not the one that the run was trained with; leave"):
        train(SMALL, config, resume=True, corpus={"text": TEXTS}, tokenizer=other, progress=False)


def test_settings_that_change_no_number_may_change(go):
    go("run", stop=3)
    changed = dict(num_workers=1, save_interval=20, keep_last=1, micro_batch_size=4)
    assert len(go("run", resume=True, **changed).history) == 40


def test_activation_checkpointing_may_be_switched_on_resume_and_changes_no_bit(go):
    whole, other = go("whole"), replace(SMALL, checkpointing=not SMALL.checkpointing)
    go("run", stop=7)
    result = go("run", resume=True, model=other)
    assert losses(result) == losses(whole) and result.model.config == other
    assert LanguageModel.from_pretrained(result.checkpoint).config == other


def test_the_speed_counts_the_wait_for_data_and_not_the_validation(go, monkeypatch):
    clock = [0.0]  # moves where the test moves it
    def slowly(*args, **settings):
        for pair in batches(*args, **settings):
            clock[0] += 0.2
            yield pair
    original = training.evaluate
    def evaluate(*args): clock[0] += 0.5; return original(*args)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "batches", slowly)
    monkeypatch.setattr(training, "evaluate", evaluate)
    config = dict(max_steps=4, eval_interval=1, batch_size=8, max_length=16)
    rates = [row["tokens_per_second"] for row in go(**config).history]
    assert rates == pytest.approx([8 * 16 / 0.2] * 4)


def test_a_part_of_the_validation_is_spread_over_all_of_it(tokenizer, monkeypatch):
    sequences = Sequences(prepare({"text": TEXTS}, tokenizer), "train", 16)
    taken, read = [], sequences.__getitems__
    monkeypatch.setattr(sequences, "__getitems__", lambda rows: taken.append(rows[0]) or read(rows))
    n = len(sequences)
    for most in (0, n, n - 1, 3 * n // 4, n // 2 + 1, 4, 1):
        taken.clear()
        evaluate(tiny(), sequences, 1, most)
        gaps = {b - a for a, b in zip(taken, [*taken[1:], n])}
        assert len(taken) == (most or n) and taken[0] == 0 and max(gaps) - min(gaps) <= 1, most


def test_a_found_micro_batch_is_kept_on_resume(go, monkeypatch):
    original = LanguageModel.loss

    def loss(self, x, y):
        if len(x) > 2: raise torch.OutOfMemoryError("pretended")
        return original(self, x, y)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    monkeypatch.setattr(training, "evaluate", lambda *a: 1.0)
    path = go("run", stop=3).checkpoint
    assert load_checkpoint(path).trainer_state["run"]["micro_batch_size"] == 2
    tried = []
    counted = lambda self, x, y: tried.append(len(x)) or original(self, x, y)
    monkeypatch.setattr(LanguageModel, "loss", counted)
    go("run", resume=True, stop=4)
    assert tried == [2, 2]


def test_out_of_memory_leaves_the_curve_as_it_was(go, monkeypatch):
    plain = go("plain", model=replace(SMALL, dropout=0.0))
    original = LanguageModel.loss

    def loss(self, x, y):
        if self.training and len(x) > 2: raise torch.OutOfMemoryError("pretended")
        return original(self, x, y)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    small = go("small", model=replace(SMALL, dropout=0.0))
    for a, b in zip(plain.history, small.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    a, b = (load_checkpoint(result.checkpoint).trainer_state["tokens"] for result in (plain, small))
    assert a == b


def test_ten_bad_steps_in_a_row_stop_with_everything_worth_knowing(go, monkeypatch, tmp_path):
    original = LanguageModel.loss
    calls = []

    def loss(self, x, y):
        if self.training: calls.append(1)
        return original(self, x, y) * (math.nan if len(calls) > 12 and self.training else 1)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    words = "step 22: 10 steps in a row.*learning rate.*norm nan.*last good checkpoint is .*step-00000010;"
    with pytest.raises(FloatingPointError, match=words): go(save_interval=5, keep_last=9)
    state = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).model.state_dict()
    assert all(x.isfinite().all() for x in state.values())
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000010"


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(go, tmp_path):
    (tmp_path / "file").write_text("")
    rows = []
    with pytest.raises(CheckpointError, match="cannot write checkpoints in .*file"):
        go(checkpoint_dir=str(tmp_path / "file"), on_step=rows.append)
    assert rows == []


def test_the_best_and_the_last_checkpoints_stay(go, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(training, "evaluate", lambda *a: next(values))
    folder = go(eval_interval=7, save_interval=100, keep_last=2).checkpoint.parent
    assert [int(p.name[5:]) for p in step_folders(folder)] == [14, 35, 40]


def next_second():
    """Wait for it: TensorBoard's files sort by second, then by a counter as text, so that .10 precedes .9."""
    time.sleep(1.01 - time.time() % 1)


def test_tensorboard_shows_one_curve_after_a_resume(go, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go("run", stop=25)
    place = tmp_path / "checkpoints" / "run"
    for folder in step_folders(place)[2:]: shutil.rmtree(folder)  # as if it had been killed after step 20
    resumed_at = int(step_folders(place)[-1].name[5:])
    assert resumed_at < 25
    next_second()
    result = go("run", resume=True)
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 41))
    for event, row in zip(events.Scalars("loss"), result.history):
        assert event.value == pytest.approx(row["loss"], rel=1e-6)
    names = ["learning_rate", "gradient_norm", "loss_scale", "tokens_per_second", "validation_loss"]
    if sys.platform == "linux": names.append("peak_memory_bytes")
    for name in [*names, "bits_per_byte"]: assert events.Scalars(name)


def test_history_is_one_json_object_a_line(go):
    result = go(stop=5)
    lines = (result.checkpoint.parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_training_in_a_thread_works(go):
    results = []
    thread = threading.Thread(target=lambda: results.append(go(stop=3)))
    thread.start()
    thread.join()
    assert results[0].history[-1]["step"] == 3


def test_the_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_vocabulary_larger_than_the_model_is_refused_with_both_numbers(go, tokenizer):
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer has {size} entries, so .* it is {size - 1}"):
        go(model=replace(SMALL, vocab_size=size - 1))


def test_samples_are_written_and_leave_the_curve_alone(go, tmp_path):
    said = []
    plain = go("plain")
    config = TrainingConfig(**load_checkpoint(plain.checkpoint).trainer_state["training_config"])
    talking = train(SMALL, replace(config, run_name="talking", sample_interval=8), corpus={"text": TEXTS},
                    tokenizer=plain.tokenizer, progress=False, say=said.append)
    assert losses(plain) == losses(talking)
    assert sum(s.startswith("sample: ") for s in said) == 5


def test_batches_of_different_sizes_in_parts_see_the_same_sequences(go, tokenizer):
    sequences = Sequences(prepare({"text": TEXTS}, tokenizer), "train", 16, seed=0)
    one = torch.cat([x for x, _ in batches(sequences, 8, range(3))])
    four = torch.cat([x for x, _ in batches(sequences, 2, range(12))])
    assert torch.equal(one, four)


# What a reviewer broke

def test_a_small_text_file_trains_with_its_own_tokenizer(tmp_path, monkeypatch):
    from optimus import generate

    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the cat sat on the mat. the dog sat on the log.\n" * 40)
    config = TrainingConfig(dataset_name=tmp_path / "a.txt", batch_size=4, max_length=16, max_steps=5,
                            num_workers=0, checkpoint_dir=tmp_path / "c", tensorboard_dir=tmp_path / "r")
    state = torch.get_rng_state()
    result = train(ModelConfig(**MODEL | dict(vocab_size=512)), config, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(result.tokenizer) == 512 and not result.model.training
    ids = generate(result.model, result.tokenizer.encode("the cat"), 20, seed=0)
    assert result.tokenizer.decode(ids).startswith("the cat")
    again = LanguageModel.from_pretrained(result.checkpoint)
    tokens = torch.tensor([ids])
    assert torch.equal(again(tokens), result.model(tokens))


def test_a_damaged_newest_checkpoint_does_not_cost_the_new_ones(go):
    rarely = dict(save_interval=4, eval_interval=100)
    folder = go("run", stop=8, **rarely).checkpoint.parent
    (folder / "step-00000008" / "config.json").write_text("damaged")
    with pytest.warns(UserWarning, match="step-00000008"):
        result = go("run", resume=True, stop=6, keep_last=1, **rarely)
    assert result.checkpoint.name == "step-00000006" and result.checkpoint.is_dir()
    assert [p.name for p in step_folders(folder)] == ["step-00000006"]
    assert (folder / ".damaged-step-00000008").is_dir()
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_resuming_a_finished_run_changes_nothing(go):
    done = go("run")
    before = (done.checkpoint / "manifest.json").stat().st_mtime_ns
    again = go("run", resume=True)
    assert (again.checkpoint / "manifest.json").stat().st_mtime_ns == before
    assert losses(again) == losses(done) and not again.model.training


@pytest.mark.parametrize("hidden", [(".old-",), (".old-", ".half-")])
def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(go, hidden):
    path = go("run", stop=3).checkpoint
    for prefix in hidden: shutil.copytree(path, path.with_name(prefix + path.name))
    shutil.rmtree(path)
    taken = []
    result = go("run", resume=True, on_step=lambda row: taken.append(row["step"]))
    assert taken[0] == 4 and not list(path.parent.glob(".*-step-*"))
    assert losses(result) == losses(go("whole"))


def test_a_checkpoint_that_is_damaged_again_is_set_aside_again(go):
    folder = go("run", stop=6, save_interval=3).checkpoint.parent
    for _ in range(2):
        (folder / "step-00000006" / "config.json").write_text("damaged")
        with pytest.warns(UserWarning, match="step-00000006"): go("run", resume=True, stop=6, save_interval=3)
    assert latest_checkpoint(folder).name == "step-00000006"
    assert len(list(folder.glob(".damaged-step-00000006*"))) == 2


def test_damaged_small_files_do_not_stop_a_resume(go):
    folder = go("run", stop=6).checkpoint.parent
    lines = (folder / "history.jsonl").read_bytes().splitlines(True)
    (folder / "history.jsonl").write_bytes(b"".join([lines[0], b"{\xff\n", b"7\n", *lines[2:], b'{"st']))
    (folder / "micro_batch_size").write_text("")
    result = go("run", resume=True)
    assert [row["step"] for row in result.history] == [1, *range(3, len(result.history) + 2)]
    assert losses(result)[2:] == losses(go("whole"))[3:]


def test_two_processes_do_not_train_in_one_folder(go, monkeypatch):
    folder = go("run", stop=3).checkpoint.parent
    def tree(): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    before = tree()
    monkeypatch.setattr(runs, "lock_run", partial(runs.lock_run, seconds=0.1))
    hold = ("import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n"
            "    print(flush=True)\n    input()")
    with subprocess.Popen([sys.executable, "-c", hold, str(folder / ".lock")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is training in .*run"): go("run", resume=True)
        assert tree() == before
        other.kill()
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_a_second_process_does_not_write_over_what_the_first_trained_meanwhile(go, monkeypatch, tmp_path):
    lock_run, trees = runs.lock_run, []
    folder = tmp_path / "checkpoints" / "run"
    def tree(): return {p: p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}

    def waits(*arguments):
        monkeypatch.setattr(runs, "lock_run", lock_run)
        go("run", stop=3, seed=5)  # the other process, which has the folder first
        trees.append(tree())
        return lock_run(*arguments)

    monkeypatch.setattr(runs, "lock_run", waits)
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run", seed=6)
    assert [tree()] == trees


def test_a_run_without_a_checkpoint_has_left_its_settings(go, tmp_path):
    def dies(row): raise SystemExit("killed")
    with pytest.raises(SystemExit): go("run", on_step=dies)
    folder = tmp_path / "checkpoints" / "run"
    assert not list(folder.glob("step-*"))
    state = json.loads((go("undisturbed").checkpoint / "trainer_state.json").read_text())
    state["training_config"]["run_name"] = "run"
    told = json.loads((folder / "settings.json").read_text())
    assert told == {name: state[name] for name in ("model_config", "training_config", "corpus")}
    assert losses(go("run", resume=True)) == losses(go("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["add_scalar", "add_text", "close"])
def test_a_tensorboard_that_cannot_write_does_not_end_the_run(go, monkeypatch, what):
    from torch.utils.tensorboard import SummaryWriter
    def refuse(self, *arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(SummaryWriter, what, refuse)
    with pytest.warns(UserWarning, match="TensorBoard shows no more of this run.*No space left") as told:
        result = go("run", sample_interval=5)
    assert len([w for w in told if "TensorBoard" in str(w.message)]) == 1
    monkeypatch.undo()
    assert [json.loads(line)["step"] for line in open(result.checkpoint.parent / "history.jsonl")] == [
        row["step"] for row in result.history]
    assert result.history[-1]["step"] == result.history[0]["step"] + len(result.history) - 1 > 5


def test_a_history_that_cannot_be_written_names_the_file(go, monkeypatch):
    class Full:
        def seek(self, *where): return 0
        def write(self, text): raise OSError(28, "No space left on device")
        def close(self): raise OSError(28, "No space left on device")
    begin = run_log.History.__init__

    def on_a_full_disk(self, *arguments):
        begin(self, *arguments)
        self.file = Full()

    monkeypatch.setattr(run_log.History, "__init__", on_a_full_disk)
    words = "could not write .*run/history.jsonl: No space left.*bytes free"
    with pytest.raises(CheckpointError, match=words): go("run")


def test_resume_takes_the_highest_number_or_a_named_run_that_took_a_step_later(go):
    go(None, stop=2)
    assert go("mine", stop=2).checkpoint.parent.name == "mine"
    assert go(None, resume=True, stop=3).checkpoint.parent.name == "mine"
    assert go("run-001", resume=True, stop=3).checkpoint.parent.name == "run-001"
    assert go(None, resume=True, stop=4).checkpoint.parent.name == "run-001"


def test_resume_without_a_run_is_an_error_and_failed_starts_are_not_runs(go, tmp_path):
    with pytest.raises(ValueError, match="no run to resume in"): go(None, resume=True)
    assert go(None, stop=2).checkpoint.parent.name == "run-001"
    (tmp_path / "checkpoints" / "run-002").mkdir()
    (tmp_path / "checkpoints" / "run-001-backup").mkdir()
    assert go(None, resume=True, stop=3).checkpoint.parent.name == "run-001"
    assert go(None, stop=1).checkpoint.parent.name == "run-003"


def test_what_cannot_run_is_refused_before_the_corpus_is_tokenized(go, tmp_path, monkeypatch):
    go("run", stop=1)
    monkeypatch.setattr(training, "prepare_data", None)
    with pytest.raises(ValueError, match="no run to resume in .*resume=True"):
        go(None, resume=True, checkpoint_dir=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="run already holds a run; resume it"): go("run")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["run"]


def test_a_run_may_go_on_longer_with_a_warning(go):
    go("run", max_steps=5)
    with pytest.warns(UserWarning, match="max_steps was 5 and is 8 now"):
        assert len(go("run", resume=True, max_steps=8).history) == 8
    with pytest.raises(ValueError, match="max_steps was 8 .* is 6 now"): go("run", resume=True, max_steps=6)


def test_a_sequence_longer_than_the_context_is_refused_before_anything_is_made(go, tmp_path):
    with pytest.raises(ValueError, match="max_length is 33; it must be at most model.rope_seq_len = 32"):
        go(max_length=33)
    assert not (tmp_path / "checkpoints").exists()


def test_a_micro_batch_given_on_resume_wins(go, monkeypatch):
    go("run", stop=2)
    original, seen = LanguageModel.loss, []
    monkeypatch.setattr(LanguageModel, "loss", lambda self, x, y: seen.append(len(x)) or original(self, x, y))
    go("run", resume=True, stop=3, micro_batch_size=1)
    assert seen == [1, 1, 1, 1]


def test_tf32_is_allowed_only_inside_a_mixed_precision_run_on_cuda(go, monkeypatch):
    now = torch.get_float32_matmul_precision
    for dtype, device, wanted in ((torch.bfloat16, "cuda", "high"), (None, "cuda", "highest"),
                                  (torch.bfloat16, "cpu", "highest")):
        with pytest.raises(KeyError), devices.allow_tf32(dtype, torch.device(device)):
            assert now() == wanted
            raise KeyError
        assert now() == "highest"
    asked = []
    real = training.allow_tf32
    monkeypatch.setattr(training, "allow_tf32", lambda *how: asked.append(how) or real(*how))
    go("run", stop=1, amp="bf16")
    assert asked == [(torch.bfloat16, torch.device("cpu"))]


@pytest.mark.parametrize("asked, now, used", [(None, None, 2), (None, 4, 4), (4, 4, 2), (4, None, 4)])
def test_what_did_not_fit_counts_for_the_setting_it_was_tried_with(
        go, tmp_path, monkeypatch, asked, now, used):
    go("run", stop=2, micro_batch_size=asked)
    def no_memory(*a): raise torch.OutOfMemoryError("pretended")  # not to be cured alone, as on several ranks
    with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
        broken.setattr(training, "train_step", no_memory)
        go("run", resume=True, micro_batch_size=asked)
    assert (tmp_path / "checkpoints" / "run" / "micro_batch_size").is_file()
    original, seen = LanguageModel.loss, []
    monkeypatch.setattr(LanguageModel, "loss", lambda self, x, y: seen.append(len(x)) or original(self, x, y))
    go("run", resume=True, stop=3, micro_batch_size=now)
    assert seen[:4 // used] == [used] * (4 // used)


def test_two_runs_in_one_tensorboard_folder_show_one_curve(go, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for place in ("x", "y"):
        next_second()
        go("run", stop=4, checkpoint_dir=str(tmp_path / place))
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]


def test_the_floor_of_the_rate_defaults_to_a_tenth(go):
    rates = [row["learning_rate"] for row in go().history]
    assert rates[0] == 0 and max(rates) == pytest.approx(5e-3) and 5e-4 < rates[-1] < 6e-4


# Starting from a saved model

@pytest.fixture
def given(tmp_path, tokenizer):
    """A saved model that a run can start from, with its tokenizer."""
    model = tiny(seed=5)
    model.save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "tokenizer.json").write_text(tokenizer.backend.to_str())
    return model, str(tmp_path / "given")


def test_a_run_starts_with_the_weights_it_is_told_to(go, given):
    model, folder = given
    steps = dict(max_steps=2, warmup=0.0, learning_rate=1e-12, weight_decay=0.0, optimizer="adamw")
    result, fresh = go("a", start_from=folder, **steps), go("b", **steps)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], weight, rtol=0, atol=1e-9)
        if weight.ndim > 1: assert (fresh.model.state_dict()[name] - weight).abs().max() > 0.01, name
    saved = json.loads((result.checkpoint / "trainer_state.json").read_text())
    assert saved["training_config"]["start_from"] == folder


def test_a_run_with_a_start_continues_bit_for_bit_without_it(go, given, tokenizer):
    whole = go("whole", start_from=given[1])
    go("cut", start_from=given[1], stop=7)
    shutil.rmtree(given[1])
    assert losses(go("cut", resume=True, start_from=given[1], tokenizer=None)) == losses(whole)


@pytest.mark.parametrize("field, value, shown", [("num_layers", 3, "2; model.num_layers is 3"),
                                                 ("attention", "gqa", "'mla'; model.attention is 'gqa'")])
def test_a_start_of_other_sizes_is_refused(go, given, field, value, shown):
    with pytest.raises(ValueError, match=f"given', a model with {field} = {shown}"):
        go(start_from=given[1], model=replace(SMALL, **{field: value}))
    assert go(start_from=given[1], model=replace(SMALL, dropout=0.3), max_steps=1).history


def test_the_tokenizer_of_the_start_is_the_runs(given, tokenizer):
    config, corpus = TrainingConfig(start_from=given[1]), {"text": TEXTS[:1]}
    assert choose_tokenizer(SMALL, config, corpus).backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(ValueError, match="no tokenizer 'nowhere'"):
        choose_tokenizer(SMALL, replace(config, start_from="nowhere"), corpus)

# Stop and resume

STRICT = partial(json.loads, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def told(result):
    """Losses and held-out losses, to the last bit."""
    return [(row["step"], row["loss"].hex(), row.get("validation_loss")) for row in result.history]


def signals(number, times, at):
    """A function that sends so many signals to this process when it is called for the `at`-th time."""
    calls = []

    def send():
        calls.append(1)
        if len(calls) == at:
            for _ in range(times): os.kill(os.getpid(), number)
    return send


PLACES = {"train_step": 9, "save_checkpoint": 3, "update_trainer_state": 1, "evaluate": 2, "sample_text": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer):
    """The run that the interrupted ones must equal."""
    place, patch = tmp_path_factory.mktemp("uninterrupted"), pytest.MonkeyPatch()
    patch.setenv("OPTIMUS_CACHE", str(place / "cache"))
    config = TrainingConfig(**CONFIG | dict(checkpoint_dir=str(place / "c"), tensorboard_dir=str(place / "r"),
                                            save_interval=10, sample_interval=6, max_steps=20))
    yield train(SMALL, config, corpus={"text": TEXTS}, tokenizer=tokenizer, progress=False)
    patch.undo()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number, times", [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_two_signals_anywhere_lose_no_finished_step(go, uninterrupted, monkeypatch, place, number, times):
    original, send = getattr(training, place), signals(number, times, PLACES[place])
    monkeypatch.setattr(training, place, lambda *a, **k: send() or original(*a, **k))
    settings = dict(sample_interval=6, max_steps=20)
    part = go("run", **settings)
    monkeypatch.undo()
    assert part.stopped_by == number and 0 < len(part.history) < 20
    assert int(part.checkpoint.name[5:]) == part.history[-1]["step"]
    monkeypatch.setenv("OPTIMUS_CACHE", str(part.checkpoint.parents[2] / "cache"))
    whole = go("run", resume=True, **settings)
    assert told(whole) == told(uninterrupted)
    assert [row.keys() for row in whole.history] == [row.keys() for row in uninterrupted.history]
    one, other = (load_checkpoint(r.checkpoint).trainer_state["run"] for r in (whole, uninterrupted))
    assert one == other


def test_a_signal_while_the_data_is_waited_for_loses_nothing_either(go, uninterrupted, monkeypatch):
    send = signals(signal.SIGINT, 2, 9)

    def slowly(*a, **k):
        for pair in batches(*a, **k):
            send()
            yield pair
    monkeypatch.setattr(training, "batches", slowly)
    part = go("run", sample_interval=6, max_steps=20)
    assert (part.stopped_by, part.checkpoint.name[-2:]) == (2, "08")
    monkeypatch.setattr(training, "batches", batches)
    assert told(go("run", resume=True, sample_interval=6, max_steps=20)) == told(uninterrupted)


def test_the_last_validation_can_be_cut_short_and_is_made_up_for(go, uninterrupted, monkeypatch):
    original, batches_seen = training.evaluate, []

    def watched(*arguments):
        *rest, watch = arguments

        def stop_at_the_first(steps):
            for step in watch(steps):
                batches_seen.append((step, len(steps)))
                if arguments[3] == 0 and step == 0: os.kill(os.getpid(), signal.SIGINT)
                yield step
        return original(*rest, stop_at_the_first)
    monkeypatch.setattr(training, "evaluate", watched)
    part = go("run", sample_interval=6, max_steps=20)
    assert part.stopped_by == 2 and part.checkpoint.name == "step-00000020"
    assert batches_seen[-1][0] == 0 and batches_seen[-1][1] > 1 and "validation_loss" not in part.history[-1]
    monkeypatch.setattr(training, "evaluate", original)
    whole = go("run", resume=True, sample_interval=6, max_steps=20)
    assert told(whole) == told(uninterrupted) and whole.stopped_by is None
    lines = (whole.checkpoint.parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads(lines[-1])["validation_loss"] == whole.history[-1]["validation_loss"]


def test_the_step_is_saved_before_its_validation_begins(go, monkeypatch):
    original, saved = training.evaluate, []

    def evaluate(*arguments):
        saved.append([int(p.name[5:]) for p in step_folders(folder)][-1])
        return original(*arguments)
    folder = go("run", stop=1).checkpoint.parent
    monkeypatch.setattr(training, "evaluate", evaluate)
    go("run", resume=True, save_interval=100)
    assert saved == [7, 14, 21, 28, 35, 40]


def test_the_third_signal_interrupts_even_a_step(go, monkeypatch):
    send, original = signals(signal.SIGTERM, 3, 4), training.train_step
    monkeypatch.setattr(training, "train_step", lambda *a: send() or original(*a))
    with pytest.raises(KeyboardInterrupt) as stopped: go("run", save_interval=2)
    assert stopped.value.signal == signal.SIGTERM
    monkeypatch.setattr(training, "train_step", original)
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_with_several_ranks_only_the_third_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest(SimpleNamespace(world_size=2)) as stop:
        for count in (1, 2, 3):
            assert stop.count == count - 1
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.count == 3


def test_a_system_without_sigterm_listens_to_ctrl_c(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delattr(signal, "SIGTERM")
    with StopRequest() as stop:
        assert list(stop.previous) == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before


def poison(monkeypatch, when):
    """Losses that are NaN where `when(number of the call)`; returns the calls."""
    original, calls = LanguageModel.loss, []

    def loss(self, x, y):
        if self.training: calls.append(1)
        return original(self, x, y) * (math.nan if self.training and when(len(calls)) else 1)
    monkeypatch.setattr(LanguageModel, "loss", loss)
    return calls


def test_the_history_of_a_run_with_bad_numbers_is_json_and_is_read_again(go, monkeypatch):
    poison(monkeypatch, lambda call: call in (3, 5))
    monkeypatch.setattr(training, "evaluate", lambda *a: math.nan)
    folder = go("run", stop=8).checkpoint.parent
    rows = [STRICT(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 5]
    assert rows[6]["validation_loss"] is None
    state = STRICT((step_folders(folder)[-1] / "trainer_state.json").read_text())
    assert state["run"]["best_loss"] is None and state["run"]["best_step"] is None
    again = go("run", resume=True, stop=10)
    assert math.isnan(again.history[2]["loss"]) and len(again.history) == 10


def test_nothing_is_saved_amid_bad_steps_but_at_a_stop_which_deletes_nothing(go, monkeypatch, tmp_path):
    calls = poison(monkeypatch, lambda call: call >= 13)
    def saved(): return [int(p.name[5:]) for p in step_folders(tmp_path / "checkpoints" / "run")]
    often = dict(save_interval=1, keep_last=2, eval_interval=100)
    go("run", stop=16, **often)
    assert saved() == [11, 12, 16]
    newest = latest_checkpoint(tmp_path / "checkpoints" / "run")
    assert load_checkpoint(newest).trainer_state["run"]["bad_steps"] == 4
    with pytest.raises(FloatingPointError, match="step 22: 10 steps.*good checkpoint is .*step-00000011; "):
        go("run", resume=True, **often)
    assert saved() == [11] and len(calls) == 22  # ten bad steps in all, across the stop
    aside = {p.name for p in (tmp_path / "checkpoints" / "run").glob(".diverged-*")}
    assert aside == {".diverged-step-00000012", ".diverged-step-00000016"}


def test_a_save_that_fell_on_a_bad_step_is_made_up_for(go, monkeypatch):
    poison(monkeypatch, lambda call: call in (10, 11))
    folder = go("run", stop=13, eval_interval=100).checkpoint.parent
    assert [int(p.name[5:]) for p in step_folders(folder)] == [12, 13]


def test_a_run_that_diverged_goes_on_with_a_smaller_rate(go, monkeypatch, tmp_path):
    wild = dict(save_interval=1, warmup=0.1, eval_interval=100, max_steps=20)
    with pytest.raises(FloatingPointError) as error: go("run", learning_rate=1e38, **wild)
    good = re.search(r"last good checkpoint is (\S+); resume the run with a smaller", str(error.value))[1]
    assert load_checkpoint(good).trainer_state["run"]["bad_steps"] == 0
    for line in (tmp_path / "checkpoints/run/history.jsonl").read_text().splitlines(): STRICT(line)
    with pytest.raises(ValueError, match=r"learning_rate was 1e\+38 .* is 2e\+38 now"):
        go("run", resume=True, learning_rate=2e38, **wild)
    with pytest.warns(UserWarning, match=r"learning_rate was 1e\+38 and is 0.001 now: the run diverged"):
        result = go("run", resume=True, learning_rate=1e-3, **wild)
    assert len(result.history) == 20 and all(math.isfinite(row["loss"]) for row in result.history)
    go("calm", stop=3)
    with pytest.raises(ValueError, match="cannot resume: training_config.learning_rate"):
        go("calm", resume=True, learning_rate=1e-4)


def test_without_a_checkpoint_from_before_a_divergence_a_new_run_is_advised(go, monkeypatch):
    poison(monkeypatch, lambda call: True)
    with pytest.raises(FloatingPointError, match="there is no good checkpoint; begin a new run"): go("run")


# Runs of older versions, other devices, other places

def rewrite_state(checkpoint, change):
    """Change a checkpoint's trainer_state.json as an older version would have written it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    change(state)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)


@pytest.mark.parametrize("gone", [("training_config", "beta1"), ("training_config", "start_from"),
                                  ("model_config", "rope_theta"), ("model_config", "intermediate_size"),
                                  ("run", "validation_due"), ("run", "fits_on"), ("corpus", "documents")])
def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(go, gone):
    path = go("run", stop=3).checkpoint
    rewrite_state(path, lambda state: state[gone[0]].pop(gone[1]))
    assert len(go("run", resume=True, stop=5).history) == 5


def test_a_missing_setting_that_is_not_the_default_is_still_another_run(go):
    path = go("run", stop=3, beta1=0.8).checkpoint
    rewrite_state(path, lambda state: state["training_config"].pop("beta1"))
    with pytest.raises(ValueError, match="beta1 was 0.9 in the saved run and is 0.8 now"):
        go("run", resume=True, beta1=0.8)


@pytest.mark.parametrize("saved, index, wanted", [(4, None, 0), (4, 2, 2), (1, 0, 0), (2, 5, 0), (1, 3, 0)])
def test_a_run_resumes_on_fewer_and_on_more_gpus(monkeypatch, saved, index, wanted):
    """`saved` GPUs there when it was saved, by an older version; now the run's own one has this index."""
    given, state = [], torch.get_rng_state()
    def only_its_own(*_): raise AssertionError("another GPU's state was touched")
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", only_its_own)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", only_its_own)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: given.append((s, device)))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    device = torch.device("cuda", index) if index is not None else torch.device("cuda")
    before = [f"GPU {i}" for i in range(saved)]
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": before}, device)
    assert given == [(f"GPU {wanted}", device)]
    assert ranks.gather_rng_state(SINGLE_PROCESS, device)["cuda"] == [f"state of {device}"]
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": []}, device)  # saved on a CPU
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": ["GPU 0"]}, torch.device("cpu"))
    assert len(given) == 1


def test_a_checkpoint_from_a_gpu_machine_resumes_on_a_cpu(go):
    path = go("run", stop=3).checkpoint
    state = torch.load(path / "train_state.pt", weights_only=True)
    state["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 3
    torch.save(state, path / "train_state.pt")
    write_manifest(path)
    assert losses(go("run", resume=True)) == losses(go("whole"))


def test_the_newest_checkpoint_is_hashed_once_on_resume(go, monkeypatch):
    path = go("run", stop=3).checkpoint
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256_of", lambda p: hashed.append(p) or sha256_of(p))
    monkeypatch.setattr(training, "save_checkpoint", lambda *a, **k: path)
    go("run", resume=True, stop=4)
    mine = [p.name for p in hashed if p.parent == path]
    assert sorted(mine) == sorted(set(mine)) and len(mine) == 5


def test_parts_that_fitted_on_one_gpu_say_nothing_about_another(go, monkeypatch, tmp_path):
    path = go("run", stop=2, micro_batch_size=None).checkpoint
    rewrite_state(path, lambda state: state["run"].update(micro_batch_size=1))
    original, seen = LanguageModel.loss, []
    monkeypatch.setattr(LanguageModel, "loss", lambda self, x, y: seen.append(len(x)) or original(self, x, y))
    for device, used in (("cpu", 1), ("small GPU with 8 bytes", 4)):
        rewrite_state(path, lambda state, device=device: state["run"].update(fits_on=device))
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(path.parents[1], tmp_path / "copy")
        seen.clear()
        go("run", resume=True, stop=3, checkpoint_dir=str(tmp_path / "copy"))
        assert seen == [used] * (4 // used)


@pytest.mark.parametrize("note, fits", [
    ({"asked": None, "fits": 2, "device": "cpu"}, 2), ({"asked": None, "fits": 2}, 2),
    ({"asked": 8, "fits": 2, "device": "cpu"}, None), ({"asked": None, "fits": 2, "device": "GPU"}, None),
    ({"asked": None, "fits": "two"}, None), ([], None), ({}, None)])
def test_a_note_about_parts_counts_on_the_device_it_names(tmp_path, note, fits):
    (tmp_path / "micro_batch_size").write_text(json.dumps(note))
    assert runs.micro_batch_hint(tmp_path, None, "cpu") == fits


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    facts = SimpleNamespace(name="Some GPU", total_memory=80_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert devices.describe_device(torch.device("cuda")) == "Some GPU with 80,000 bytes"


@pytest.mark.parametrize("settings, saved, wanted", [
    (dict(dataset_name="sotu"), None, None), (dict(dataset_name="."), None, None),
    (dict(dataset_name=".", dataset_size=5), None, 5), (dict(dataset_name="sotu", dataset_size=5), None, 5),
    (dict(), None, 200_000), (dict(dataset_size=7), None, 7),
    (dict(dataset_name="."), {"training_config": {}, "corpus": {}}, 200_000),  # an older version always cut
    (dict(dataset_name="."), {"corpus": {"documents": None}}, None),
    (dict(dataset_name=".", dataset_size=9), {"corpus": {"documents": None}}, 9)])
def test_a_size_cuts_what_is_on_the_hub_and_other_corpora_only_when_given(settings, saved, wanted):
    assert run_inputs.document_limit(TrainingConfig(**settings), saved) == wanted


def test_a_corpus_of_ones_own_is_cut_where_that_is_asked_for(go, tmp_path, tokenizer):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for size, documents in ((200_000, len(TEXTS)), (5, 5)):
        config = TrainingConfig(**CONFIG | dict(
            dataset_name=str(path), dataset_size=size, max_steps=1, checkpoint_dir=str(tmp_path / f"c{size}"),
            tensorboard_dir=str(tmp_path / "r")))
        corpus = train(SMALL, config, tokenizer=tokenizer, progress=False).corpus
        assert corpus.train_documents + corpus.validation_documents == documents


def curve(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return [e.step for e in events.Scalars("loss")]


def test_runs_of_one_name_have_boards_of_their_own_and_keep_them(go, tmp_path):
    places = {place: dict(checkpoint_dir=str(tmp_path / place)) for place in "xyz"}
    for steps, place in ((4, "x"), (3, "y"), (2, "z")): go("run", stop=steps, **places[place])
    boards = [tmp_path / "runs" / name for name in ("run", "run-2", "run-3")]
    assert [curve(board) for board in boards] == [[1, 2, 3, 4], [1, 2, 3], [1, 2]]
    next_second()
    go("run", resume=True, stop=5, **places["y"])
    (tmp_path / "z").rename(tmp_path / "moved")
    go("run", resume=True, stop=6, checkpoint_dir=str(tmp_path / "moved"))
    assert [curve(board) for board in boards] == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["run", "run-2", "run-3"]


def test_a_run_of_an_older_version_goes_on_in_its_old_board(go, tmp_path):
    go("run", stop=3)
    (tmp_path / "runs" / "run" / ".run").unlink()
    next_second()
    go("run", resume=True, stop=5)
    assert curve(tmp_path / "runs" / "run") == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]


def test_a_board_that_cannot_be_made_does_not_end_the_run(go, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="TensorBoard shows no more of this run"):
        assert len(go("run", stop=2, tensorboard_dir=str(tmp_path / "file" / "runs")).history) == 2


@pytest.mark.parametrize("field, value", [("num_kv_heads", 2), ("intermediate_size", 128), ("dropout", 0.4)])
def test_a_start_may_differ_in_what_changes_no_size(go, given, field, value):
    assert SMALL.ffn_dim == 128 and getattr(SMALL, field) != value or field == "num_kv_heads"
    model = replace(SMALL, num_kv_heads=1) if field == "num_kv_heads" else replace(SMALL, **{field: value})
    assert go(start_from=given[1], model=model, max_steps=1).history


@pytest.mark.parametrize("change, shown", [
    (dict(num_attention_heads=1), "num_attention_heads = 2; model.num_attention_heads is 1"),
    (dict(rope_theta=500.0), "rope_theta = 10000.0; model.rope_theta is 500.0"),
    (dict(compression_ratio=0.25), "kv_lora_rank = 16; model.kv_lora_rank is 8"),
    (dict(intermediate_size=64), "ffn_dim = 128; model.ffn_dim is 64")])
def test_a_start_of_other_sizes_in_force_is_refused(go, given, change, shown):
    with pytest.raises(ValueError, match=re.escape(shown)):
        go(start_from=given[1], model=replace(SMALL, **change))


# Apple's GPU, as far as a CPU can show it

@pytest.mark.parametrize("cuda, mps, wanted, why", [
    (True, True, "cuda", "a CUDA GPU"), (False, True, "mps", "no CUDA GPU, but torch can use Apple's GPU"),
    (False, False, "cpu", "neither")])
def test_the_best_device_is_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, wanted, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = devices.best_device()
    assert device.type == wanted and why in devices.why_device(device)
    for kind, there in (("cuda", cuda), ("mps", mps), ("cpu", True)):
        assert devices.is_device_available(torch.device(kind)) == there
    if not mps:
        with pytest.raises(ValueError, match=r"device is mps, but this machine has no Apple \(mps\) GPU"):
            devices.check_device(torch.device("mps"))


def test_precision_memory_and_random_state_on_mps(monkeypatch):
    mps, seen = torch.device("mps"), []
    assert amp_dtype("auto", mps) is None and amp_dtype("bf16", mps) is torch.bfloat16
    with pytest.raises(ValueError, match="amp is 'fp16'; on mps it must be"): amp_dtype("fp16", mps)
    assert training.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "mps state")
    monkeypatch.setattr(torch.mps, "set_rng_state", seen.append)
    with devices.isolated_rng(mps): drawn = torch.rand(3)
    assert seen == ["mps state"] and torch.equal(drawn, torch.rand(3))
    devices.set_rng_state(mps, {"cpu": torch.get_rng_state(), "cuda": ["of another machine"]})
    assert seen == ["mps state"]


def test_only_cuda_pins_memory_and_only_cpu_and_cuda_fuse(go, monkeypatch):
    with torch.device("meta"): model = LanguageModel(SMALL)
    assert not make_optimizer(model, TrainingConfig()).defaults["fused"]
    assert make_optimizer(tiny(), TrainingConfig()).defaults["fused"]
