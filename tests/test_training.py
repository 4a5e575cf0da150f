"""What must stay true of optimus.training. Derived in notebooks/12_training.ipynb."""
import json
import math
import os
import shutil
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fork_server import CONFIG, MODEL, TEXTS
from trained import PLAIN, SMALL, losses, poison, rewrite_state, signals, tiny

from optimus import LanguageModel, ModelConfig, TrainingConfig, devices, ranks, training
from optimus.checkpoint import latest_checkpoint, load_checkpoint, step_folders
from optimus.data import Sequences, batches, prepare
from optimus.training import TrainingState, evaluate, make_optimizer, train

pytest_plugins = ["trained"]


def test_a_batch_is_looked_at_before_it_is_sent_to_a_gpu(go, monkeypatch):
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    monkeypatch.setattr(training, "train_step", None)
    beyond = tokens + SMALL.vocab_size
    for pair, named in (((beyond, tokens), "token ids"), ((tokens, tokens - 1), "targets")):
        monkeypatch.setattr(training, "batches", lambda *args, pair=pair, **settings: [pair])
        with pytest.raises(ValueError, match=f"{named} must be"): go()


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


def test_the_best_and_the_last_checkpoints_stay(go, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(training, "evaluate", lambda *a: next(values))
    folder = go(eval_interval=7, save_interval=100, keep_last=2).checkpoint.parent
    assert [int(p.name[5:]) for p in step_folders(folder)] == [14, 35, 40]


def test_training_in_a_thread_works(go):
    results = []
    thread = threading.Thread(target=lambda: results.append(go(stop=3)))
    thread.start()
    thread.join()
    assert results[0].history[-1]["step"] == 3


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


def test_the_floor_of_the_rate_defaults_to_a_tenth(go):
    rates = [row["learning_rate"] for row in go().history]
    assert rates[0] == 0 and max(rates) == pytest.approx(5e-3) and 5e-4 < rates[-1] < 6e-4


def told(result):
    """Losses and held-out losses, to the last bit."""
    return [(row["step"], row["loss"].hex(), row.get("validation_loss")) for row in result.history]


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


def test_only_cuda_pins_memory_and_only_cpu_and_cuda_fuse(go, monkeypatch):
    with torch.device("meta"): model = LanguageModel(SMALL)
    assert not make_optimizer(model, TrainingConfig()).defaults["fused"]
    assert make_optimizer(tiny(), TrainingConfig()).defaults["fused"]


def test_ranks_may_be_given_under_their_old_name(tmp_path):
    three = SimpleNamespace(world_size=3, device=None)
    for name in ("ranks", "spread"):
        with pytest.raises(ValueError, match="batch_size is 64; it must be a multiple of 3 ranks"):
            train(SMALL, TrainingConfig(max_length=16, checkpoint_dir=str(tmp_path)), **{name: three})
