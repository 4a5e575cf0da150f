"""What must stay true of optimus.measure and optimus.bench. Derived in notebooks 15 and 15b.

Nothing timed is asserted: clocks are replaced where a test needs one.
"""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optimus.bench import (bench, bench_table, build_models, decoding_rows, interleaved_seconds,
                           training_pair, with_ratios)
from optimus.config import ModelConfig, TrainingConfig, flops_per_token, training_memory
from optimus.measure import (LiveBytes, create_optimizer_state, measure_gemm_rate, measure_training,
                             median_seconds, model_flops_utilization, state_bytes, table,
                             training_flops_per_token)
from optimus.training import start_or_resume
from optimus.transformer import LanguageModel

# Sizes are distinct primes times what divisibility needs.
B, T, L, H = 2, 13, 3, 5
SMALL = ModelConfig(vocab_size=61, embedding_dim=60, num_layers=L, num_attention_heads=H, num_kv_heads=H,
                    intermediate_size=31, rope_seq_len=101, dropout=0.0)
KINDS = pytest.mark.parametrize("kind", ["mla", "gqa"])
CPU = torch.device("cpu")


def counted(config):
    """PyTorch's own count of a training step's forward and backward pass, attention done step by step."""
    model, tokens = LanguageModel(config), torch.randint(config.vocab_size, (B, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return counter.get_total_flops()


def measure(config=SMALL, **changes):
    settings = dict(batch_size=B, max_length=T, amp="off", device="cpu", steps=1, gemm_rate=7e9)
    return measure_training(config, **(settings | changes))


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("changes", [
    {}, dict(num_layers=2, num_attention_heads=3, num_kv_heads=1),
    dict(tie_embeddings=False, mlp_ratio=7, intermediate_size=None)], ids=str)
def test_hardware_flops_are_those_that_torch_counts(kind, dropout, changes):
    for checkpointing, passes in ((False, 3), (True, 4)):
        config = replace(SMALL, attention=kind, dropout=dropout, checkpointing=checkpointing, **changes)
        masked = flops_per_token(config, T) - flops_per_token(config, (T + 1) / 2)
        padded = config.num_layers * T * config.num_attention_heads * 2 * config.qk_rope_head_dim
        per_token = training_flops_per_token(config, T)["hardware"]
        assert counted(config) == B * T * (per_token + passes * (masked + (padded if kind == "mla" else 0)))


@KINDS
def test_model_flops_do_not_know_of_checkpointing(kind):
    on, off = (training_flops_per_token(replace(SMALL, attention=kind, checkpointing=c), T)
               for c in (True, False))
    assert on["model"] == off["model"] == off["hardware"] == 3 * off["forward"] and off["recomputed"] == 0
    assert on["hardware"] == on["model"] + on["recomputed"] and 0 < on["recomputed"] < on["forward"]


@KINDS
def test_the_causal_mean_is_the_mean_over_tokens(kind):
    config = replace(SMALL, attention=kind)
    tokens = [flops_per_token(config, position + 1) for position in range(T)]
    assert math.isclose(training_flops_per_token(config, T)["forward"], sum(tokens) / T)


def test_mfu_is_one_when_only_model_flops_fill_the_machine():
    flops = training_flops_per_token(SMALL, T)["model"]
    assert math.isclose(model_flops_utilization(1e9 / flops, SMALL, T, peak_flops=1e9), 1.0)
    assert math.isclose(model_flops_utilization(3.0, SMALL, T, 7e9), 3 * flops / 7e9)
    assert model_flops_utilization(3.0, SMALL, T, 7e9) == model_flops_utilization(
        3.0, replace(SMALL, checkpointing=False), T, 7e9)


def test_live_bytes_counts_storages_once_and_forgets_the_freed():
    known = torch.zeros(11)
    with LiveBytes([known, known[3:]]) as live:
        assert live.now == 44
        a = torch.zeros(7, 13)
        view = a.T[2:]
        a += 1
        assert live.now == 44 + 4 * 91
        b = (a * 2).double()
        assert (live.now, live.peak) == (44 + 4 * 91 + 8 * 91, 44 + 8 * 91 + 8 * 91)
        del a
        assert live.now == 44 + 4 * 91 + 8 * 91  # the view still holds it
        del b, view, known
        assert (live.now, live.peak) == (0, 44 + 16 * 91)


@KINDS
def test_live_bytes_sees_what_autograd_saves(kind):
    model = LanguageModel(replace(SMALL, attention=kind, checkpointing=False))
    tokens, saved = torch.randint(61, (B, T)), {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights: saved[storage._cdata] = storage.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), \
         LiveBytes([*model.parameters(), tokens]) as live:
        before = live.now
        hidden = model.hidden(tokens)
        tensors = sum(saved.values())
        assert tensors <= live.now - before <= tensors + hidden.nbytes + 8 * T


@KINDS
def test_weights_gradients_and_optimizer_are_as_predicted(kind):
    config = replace(SMALL, attention=kind)
    row, predicted = measure(config, steps=0), training_memory(config, B, T)
    steps = 4 * len(list(LanguageModel(config).parameters()))  # AdamW's counters
    assert row["weights"] == predicted["weights"] and row["gradients"] == predicted["gradients"]
    assert row["optimizer"] == predicted["optimizer"] + steps


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_near_the_prediction_when_activations_rule(kind, checkpointing):
    config = replace(SMALL, attention=kind, checkpointing=checkpointing)
    peak, predicted = (measure(config, batch_size=17, max_length=53, steps=0)["peak"],
                       training_memory(config, 17, 53)["total"])
    assert 0.85 * predicted < peak < 1.15 * predicted


@KINDS
def test_the_peak_grows_without_checkpointing_and_with_the_batch(kind):
    config = replace(SMALL, attention=kind, num_layers=5)
    on, off, twice = (measure(config, max_length=97, checkpointing=c, batch_size=b, steps=0)["peak"]
                      for c, b in ((True, 7), (False, 7), (False, 14)))
    assert on < off < twice
    predicted = [training_memory(replace(config, checkpointing=c), 7, 97)["total"] for c in (True, False)]
    assert off / on > 0.8 * predicted[1] / predicted[0]


@KINDS
def test_the_first_step_already_carries_the_optimizers_memory_beside_the_activations(kind):
    config = replace(SMALL, attention=kind, checkpointing=False)
    row, predicted = measure(config, steps=0), training_memory(config, B, T)
    assert row["peak"] >= sum(predicted[part] for part in ("weights", "optimizer", "activations"))
    assert row["peak"] == measure(config, steps=0)["peak"]


def test_creating_the_optimizer_state_allocates_all_of_it_and_keeps_no_gradient():
    run = start_or_resume(SMALL, TrainingConfig(amp="off"), CPU)
    assert state_bytes(run)["optimizer"] == 0
    create_optimizer_state(run)
    held = state_bytes(run)
    assert held["optimizer"] > 2 * held["weights"] and held["gradients"] == 0


def test_a_timed_row_is_whole_and_consistent():
    row = measure(checkpointing=True)
    assert (row["dtype"], row["checkpointing"], row["compile"]) == ("float32", True, False)
    assert (row["batch_size"], row["max_length"], row["micro_batch_size"]) == (B, T, B)
    assert math.isclose(row["tokens_per_second"] * row["seconds"], B * T)
    assert math.isclose(row["mfu"], model_flops_utilization(row["tokens_per_second"], SMALL, T, 7e9))
    assert math.isclose(row["model_flops_per_second"], row["mfu"] * 7e9) and row["gemm_rate"] == 7e9
    assert all(row[name] > 0 for name in ("seconds", "peak", "weights", "gradients", "optimizer"))


def test_without_steps_nothing_is_timed():
    row = measure(steps=0, amp="bf16")
    assert row["dtype"] == "bfloat16" and row["peak"] > 0
    assert [row[name] for name in ("seconds", "tokens_per_second", "mfu", "gemm_rate")] == [None] * 4


def test_the_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure()
    assert torch.equal(torch.rand(3), expected)


def test_out_of_memory_is_reported_as_a_smaller_micro_batch(monkeypatch):
    loss = LanguageModel.loss

    def fits_two(self, tokens, targets):
        if len(tokens) > 2: raise torch.OutOfMemoryError
        return loss(self, tokens, targets)
    monkeypatch.setattr(LanguageModel, "loss", fits_two)
    row = measure(batch_size=7, steps=0)
    assert (row["batch_size"], row["micro_batch_size"]) == (7, 2)


def test_the_median_ignores_warmup_and_one_hiccup(monkeypatch):
    now, seconds = [0.0], iter([100.0, 100.0, 2.0, 50.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(): now[0] += next(seconds)
    assert median_seconds(work, CPU, repeats=5) == 2.0


def test_the_gemm_rate_counts_two_flops_per_multiplication(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    mm = torch.mm

    def one_second(*args, **kwargs):
        now[0] += 1.0
        return mm(*args, **kwargs)
    monkeypatch.setattr(torch, "mm", one_second)
    assert measure_gemm_rate("cpu", torch.float64, size=17, repeats=3) == 2 * 17**3


def test_the_table_shows_every_row_and_a_dash_where_nothing_was_timed():
    timed, untimed = measure(checkpointing=True), measure(steps=0, checkpointing=False, amp="bf16")
    device, head, first, second = table([timed, untimed]).splitlines()
    assert device == timed["device"] and device.startswith("cpu")
    assert first.split()[:6] == ["float32", "on", "off", str(B), "x", str(T)]
    assert second.split()[:2] == ["bfloat16", "off"] and second.split()[6:9] == ["-"] * 3
    assert second.split()[-1] == f"{untimed['peak'] / 2**20:,.1f}" and len(head) == len(first) == len(second)


@pytest.mark.parametrize("call, message", [
    (lambda: training_flops_per_token(SMALL, 0), r"length must be in \[1, 101\], got 0"),
    (lambda: training_flops_per_token(SMALL, 102), r"length must be in \[1, 101\], got 102"),
    (lambda: measure(max_length=102), r"length must be in \[1, 101\], got 102"),
    (lambda: measure(steps=-1), "steps must be at least 0, got -1"),
    (lambda: measure(batch_size=0), "batch_size must be .* got 0"),
    (lambda: measure(amp="half"), "amp must be .* got 'half'"),
    (lambda: model_flops_utilization(1.0, SMALL, T, 0.0), "peak_flops must be above 0, got 0.0"),
    (lambda: model_flops_utilization(1.0, SMALL, T, math.nan), "peak_flops must be above 0, got nan"),
    (lambda: median_seconds(lambda: None, CPU, 0), "repeats must be at least 1, got 0"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_says_so(call, message):
    with pytest.raises(ValueError, match=message): call()


# --- bench: ours and transformers in one run ---

BENCH = ModelConfig(vocab_size=61, embedding_dim=20, num_layers=2, num_attention_heads=5, num_kv_heads=1,
                    intermediate_size=31, rope_seq_len=131, dropout=0.3)


def test_contenders_take_turns_and_a_slow_minute_hits_all(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    def work(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds * (100 if 4 <= len(calls) < 6 else 1)  # the second turn is a slow minute
        return run
    times = interleaved_seconds({"a": work("a", 2.0), "b": work("b", 3.0)}, CPU, rounds=5, warmup=1)
    assert calls == ["a", "b"] * 6
    assert times == {"a": 2.0, "b": 3.0}


def test_ratio_limit_and_share_are_what_they_say():
    row = with_ratios(dict(what="decode", unit="tokens/s", ours=30.0, theirs=20.0, bytes=1e8, rate=6e9))
    assert (row["ratio"], row["limit"], row["reached"]) == (1.5, 60.0, 0.5) and "bytes" not in row
    row = with_ratios(dict(what="prefill", unit="tokens/s", ours=250.0, theirs=500.0, flops=1e8, rate=1e11))
    assert (row["ratio"], row["limit"], row["reached"]) == (0.5, 1000.0, 0.25)
    assert with_ratios(dict(what="cache", unit="numbers", ours=416)).keys() == {"what", "unit", "ours"}


def test_the_limit_is_measured_in_turn_with_the_row(monkeypatch):
    rates = iter([9e9, 9e9, 1e9, 5e9, 3e9])  # a turn each, the two of warm-up too
    monkeypatch.setattr("optimus.bench.measure_read_bandwidth", lambda device, repeats: next(rates))
    ours, theirs = build_models(BENCH, CPU, compile=False)["writers"]
    [row] = decoding_rows(ours, theirs, 64, 3, CPU, {})
    assert row["rate"] == 5e9 and next(rates, None) is None


@pytest.fixture(scope="module")
def result():
    state = torch.get_rng_state()
    said = []
    result = bench(BENCH, device="cpu", quick=True, compile=False, say=said.append)
    assert torch.equal(torch.get_rng_state(), state) and len(said) == 5
    return result


@pytest.mark.slow
def test_bench_has_every_row_of_the_comparison(result):
    rows = {row["what"]: row for row in result["rows"]}
    for n in (64, 128): assert {"ours", "theirs", "ratio", "limit"} <= rows[f"decode at {n}, eager"].keys()
    assert {"ours", "theirs", "ratio", "limit"} <= rows["prefill of 128"].keys()
    for mode in ("on", "off"): assert rows[f"peak memory, 4 x 64, checkpointing {mode}"]["theirs"] > 0
    numbers = [rows[f"cache of a token and layer, {kind}"]["ours"] for kind in ("MHA", "GQA", "MLA")]
    assert numbers == [2 * 5 * 4, 2 * 1 * 4, BENCH.kv_lora_rank + BENCH.qk_rope_head_dim]
    assert rows["loading, no workers"]["ours"] > 0 and rows["tokenizing"]["unit"] == "MB/s"
    assert all(row["ours"] > 0 for row in result["rows"])
    assert result["parameters"] == LanguageModel(BENCH).num_parameters()


def test_the_table_shows_device_versions_and_every_row(result):
    text = bench_table(result)
    lines = text.splitlines()
    assert len(lines) == 2 + len(result["rows"])
    for part in ("cpu, ", "float32", result["torch"], result["transformers"], "GB/s", "GFLOP/s"):
        assert part in lines[0]
    for row, line in zip(result["rows"], lines[2:]): assert line.startswith(row["what"])


def test_both_contenders_compute_the_same_function():
    nets = build_models(BENCH, CPU, compile=False)
    (ours, theirs), tokens = nets["trained"], torch.randint(61, (2, 13))
    with torch.no_grad(): a, b = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    pair = training_pair(ours, theirs, 2, 13, CPU)
    losses = {name: step()["loss"] for name, (_, step) in pair.items()}
    assert math.isclose(losses["ours"], losses["theirs"], rel_tol=1e-4)


def test_decoding_rows_name_the_bytes_a_step_must_read():
    nets = build_models(BENCH, CPU, compile=False)
    [row] = decoding_rows(*nets["writers"], 64, 2, CPU, {})
    kept = 64 * 2 * (BENCH.kv_lora_rank + BENCH.qk_rope_head_dim)
    assert row["bytes"] == 4 * (LanguageModel(BENCH).num_parameters() + kept)


@pytest.mark.parametrize("changes, words", [(dict(attention="gqa"), "'gqa' and 131"),
                                            (dict(rope_seq_len=127), "'mla' and 127")])
def test_bench_refuses_what_it_cannot_compare(changes, words):
    with pytest.raises(ValueError, match=words): bench(replace(BENCH, **changes), device="cpu")


@pytest.mark.slow
def test_compiled_decoders_join_the_comparison():
    nets = build_models(BENCH, CPU, compile=True)
    names = list(nets["decoders"])
    rows = decoding_rows(*nets["writers"], 64, 2, CPU, nets["decoders"])
    assert [row["what"] for row in rows] == [f"decode at 64, {name}" for name in ("eager", *names)]
    assert rows[2]["bytes"] < 0.6 * rows[1]["bytes"] and names[1].endswith("bfloat16 weights")
