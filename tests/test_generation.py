"""What must stay true of optimus.generation. Derived in notebooks/10_sampling.ipynb."""
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from optimus.config import ModelConfig
from optimus.data import train_tokenizer
from optimus.generation import (Generation, Sampling, TokenBuffer, apply_temperature, generate, keep_min_p,
                                keep_top_k, keep_top_p, next_token_probabilities, stream, text_pieces)
from optimus.transformer import LanguageModel

V, WINDOW = 61, 17
KINDS = ["mla", "gqa"]
TEXT = "the ship of state, naïve as ever, meets ⛵ 鯨 and 😀 on the sea. " * 3


def make_model(kind="mla", vocab_size=V, **changes):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**dict(
        vocab_size=vocab_size, embedding_dim=36, num_layers=2, num_attention_heads=3, num_kv_heads=1,
        attention=kind, rope_seq_len=WINDOW, dropout=0.3, intermediate_size=31) | changes))
    for p in model.parameters(): nn.init.uniform_(p, 0.5, 1.5) if p.ndim < 2 else nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer([TEXT], 300)


def prompt(B=2, T=5): return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))


class Scripted(nn.Module):
    """A model that says `script[i]` after i tokens beyond the prompt, or that gives `logits`."""
    def __init__(self, script=(), vocab_size=V, prompt_length=1, logits=None):
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab_size, rope_seq_len=4096)
        self.script, self.prompt_length, self.logits = list(script), prompt_length, logits

    def forward(self, tokens, cache=None):
        B, T = tokens.shape
        logits = torch.zeros(B, T, self.config.vocab_size)
        if self.logits is not None: return logits + self.logits
        logits[:, -1, self.script[T - self.prompt_length]] = 50.0
        return logits


def scripted(*script, **more): return Scripted(script, **more), dict(use_cache=False, temperature=0)


# Filters

def ties(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 8).round() / 4


@pytest.mark.parametrize("columns", [1, 2, 61, 1009])
@pytest.mark.parametrize("seed", range(3))
def test_filtered_sets_and_values_equal_those_of_transformers(columns, seed):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = ties(7, columns, seed)
    for ours, theirs in (
            *((keep_top_k(logits, k), TopKLogitsWarper(k)) for k in (1, 2, 5, 60, 5000)),
            *((keep_top_p(logits, p), TopPLogitsWarper(p)) for p in (1e-9, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)),
            *((keep_min_p(logits, m), MinPLogitsWarper(m)) for m in (0.0, 0.01, 0.3, 1.0))):
        assert torch.equal(ours, theirs(None, logits)), theirs
    for t in (0.1, 0.7, 1.0, 3.0):
        torch.testing.assert_close(apply_temperature(logits, t).softmax(-1),
                                   TemperatureLogitsWarper(t)(None, logits).softmax(-1))


@pytest.mark.parametrize("chain", [
    dict(temperature=0.6, top_k=40, top_p=0.9, min_p=0.05), dict(top_k=3, top_p=0.7),
    dict(temperature=2.0, top_p=0.8), dict(temperature=3.0, min_p=0.2), dict(top_p=0.5, min_p=0.3),
])
def test_the_chain_has_the_order_of_transformers(chain):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = dict(temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper,
                   min_p=MinPLogitsWarper)
    logits = scores = torch.randn(7, 1009, generator=torch.Generator().manual_seed(0)) * 2
    for name, value in chain.items(): scores = warpers[name](value)(None, scores)
    ours = next_token_probabilities(logits, **chain)
    assert torch.equal(ours > 0, scores.isfinite())
    torch.testing.assert_close(ours, scores.softmax(-1))


@settings(deadline=None, max_examples=60)
@given(logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=13),
       top_p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, top_p):
    row = torch.tensor([logits], dtype=torch.double)
    p, kept = row.softmax(-1)[0], keep_top_p(row, top_p)[0].isfinite()
    assert p[kept].sum() >= top_p - 1e-9
    assert p[kept].sum() - p[kept].min() < top_p + 1e-9  # one fewer would not do
    assert kept.all() or p[kept].min() >= p[~kept].max()


def test_boundary_token_included_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, size in ((0.4, 1), (0.6, 2), (0.79, 2), (0.9, 3), (0.99, 4), (1, 4)):
        assert keep_top_p(logits, top_p).isfinite().sum() == size
    for top_p, size in ((0.25, 1), (0.5, 2), (0.75, 3), (1, 4)):  # reached exactly, by one of equals
        assert keep_top_p(torch.zeros(1, 4), top_p).isfinite().sum() == size


def test_temperature_zero_is_greedy_and_extremes_are_finite():
    logits = torch.tensor([[1.0, 5.0, 5.0, -math.inf]])
    assert next_token_probabilities(logits, 0).tolist() == [[0, 1, 0, 0]]
    for t in (1e-300, 1e-45, 1e-30): assert next_token_probabilities(logits, t).tolist() == [[0, 0.5, 0.5, 0]]
    for t in (1e30, 1e300):
        torch.testing.assert_close(next_token_probabilities(logits, t), torch.tensor([[1.0, 1, 1, 0]]) / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_computed_in_at_least_float32(dtype):
    logits = ties(3, V).to(dtype)
    p = next_token_probabilities(logits, 0.7, top_p=0.9)
    assert p.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=p.dtype))
    torch.testing.assert_close(p.double(), next_token_probabilities(logits.double(), 0.7, top_p=0.9),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filters", [dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.8),
                                     dict(min_p=0.2),
                                     dict(temperature=1.7, top_k=30, top_p=0.9, min_p=0.02)])
def test_frequencies_agree_by_chi_square(filters):
    logits, N = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2, 20000
    model = Scripted(logits=logits)
    drawn = generate(model, torch.zeros(N, 1, dtype=torch.int64), 1, seed=0, use_cache=False, **filters)[:, 1]
    expected = N * next_token_probabilities(logits[None], **filters)[0].double()
    counts = torch.bincount(drawn, minlength=V).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed, wanted = (torch.cat([x[common], x[~common].sum()[None] + 1e-6]) for x in (counts, expected))
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


# Bad settings, bad prompts, bad logits

NOT_WHOLE = [0, -1, 1.5, True, "a", math.nan, [3]]
BAD = [("temperature", x) for x in (-1, -1e-9, math.nan, math.inf, "a", None, True, [1])] + \
      [("top_p", x) for x in (0, -0.1, 1.5, math.nan, math.inf, "a", True)] + \
      [("min_p", x) for x in (-0.1, 1.5, math.nan, "a", True)] + [("top_k", x) for x in NOT_WHOLE] + \
      [("max_new_tokens", x) for x in [*NOT_WHOLE, 1e9, 10**9, None]] + \
      [("seed", x) for x in (-1, 1.5, "a", True, 2**63)]


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_setting_is_refused_with_its_range(name, value, tokenizer):
    model, arguments = make_model(vocab_size=300), {"max_new_tokens": 3, name: value}
    calls = [lambda: generate(model, [1, 2], **arguments), lambda: stream(model, tokenizer, "a", **arguments)]
    if name in ("temperature", "top_k", "top_p", "min_p"):
        calls.append(lambda: next_token_probabilities(torch.zeros(1, V), **{name: value}))
    for call in calls:  # stream is refused at the call, before anything is printed
        with pytest.raises(ValueError, match=rf"^{name} must be a .*number in [\[(].*[\])].*, got ") as error:
            call()
        assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("tokens, words", [
    ([], r"empty.*\(1, 0\)"), (torch.zeros(2, 0, dtype=torch.int64), r"empty.*\(2, 0\)"),
    (torch.zeros(0, 3, dtype=torch.int64), "empty"), ([V], r"\[0, 61\), got 61"),
    ([3, -1], r"\[0, 61\), got -1"), (torch.tensor([[3, V + 5]]), r"\[0, 61\), got 66"),
    ([1.0], "got 1.0"), ([True], "got True"), (["a"], "got 'a'"), ([[1, 2]], r"got \[1, 2\]"),
    ("abc", "got 'abc'"), (None, "got None"), (torch.zeros(1, 3), "torch.float32"),
    (torch.zeros(3, dtype=torch.int64), r"\(B, T\).*got torch.int64 of shape \(3,\)"),
])
def test_a_bad_prompt_says_what_is_wrong(tokens, words):
    with pytest.raises(ValueError, match=words): generate(make_model(), tokens, 3)


@pytest.mark.parametrize("tokens, words", [
    ([[1, 2, 3], [4]], "2 rows .*lengths 3, 1,"), ([[7] * 5, [7] * 4, [7] * 9], "3 rows .*lengths 5, 4, 9,"),
    ([[], [1]], "lengths 0, 1,"), ([[]], "1 rows .*lengths 0,"), ([[[1]], [[2], [3]]], "lengths 1, 2,"),
    ([(1, 2), 3], "1 rows .*lengths 2,"), ([1, [2, 3]], "1 rows .*lengths 2,"),
    ([[1]] * 20, r"lengths (1, ){8}\.\.\."),
    ([torch.tensor([1, 2]), torch.tensor([3])], "lengths 2, 1,"), ([np.arange(4)], "lengths 4,"),
    ([1.5], "got 1.5"), ([np.float64(2)], "got 2.0"), ([np.True_], "got True"),
    ([torch.tensor(3)], r"got tensor\(3\)"),
    ((1, 2), r"got \(1, 2\)"), (np.array([[1, 2]]), "got array"), (3, "got 3")])
def test_rows_in_a_list_are_refused_with_their_lengths(tokens, words):
    with pytest.raises(ValueError, match=words) as error: generate(make_model(), tokens, 3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("tokens", [[[1, 2], [3]], [1, 2], 3, None, "ab", np.array([[1, 2]])])
def test_the_model_itself_wants_a_tensor(tokens):
    model, fine = make_model(), torch.tensor([[1, 2]])
    for call in (lambda: model(tokens), lambda: model.loss(tokens, fine), lambda: model.loss(fine, tokens)):
        with pytest.raises(ValueError, match="(tokens|targets) must be an int64 tensor of shape"): call()


KINDS_OF_NUMPY = [
    dict(temperature=np.float32(0.5)), dict(temperature=np.int64(2)), dict(temperature=np.uint8(0)),
    dict(top_k=np.int64(5)), dict(top_k=np.uint8(5)), dict(top_p=np.float64(0.75)),
    dict(top_p=np.float16(0.75)), dict(min_p=np.float32(0.25)),
    dict(top_k=np.int32(7), top_p=np.float32(0.5), min_p=np.int8(0))]


@pytest.mark.parametrize("given_settings", KINDS_OF_NUMPY, ids=str)
def test_numbers_of_numpy_are_settings(given_settings, tokenizer):
    model = make_model(vocab_size=300)
    plain = {name: value.item() for name, value in given_settings.items()}
    ids, new = [np.int64(1), np.uint8(2)], np.int32(6)
    ours = generate(model, ids, new, seed=np.uint64(3), eos_token_id=np.int64(7), **given_settings)
    assert ours == generate(model, [1, 2], 6, seed=3, eos_token_id=7, **plain)
    assert {type(i) for i in ours} == {int}
    pieces = [list(stream(model, tokenizer, "a", max_new_tokens=n, seed=s, **some)) for n, s, some in (
        (new, np.int64(3), given_settings), (6, 3, plain))]
    assert pieces[0] == pieces[1]
    logits = torch.randn(2, V)
    assert torch.equal(*(next_token_probabilities(logits, **some) for some in (given_settings, plain)))


@pytest.mark.parametrize("name, value", [
    ("temperature", np.float32(-1)), ("temperature", np.True_), ("temperature", torch.tensor(1.0)),
    ("top_k", np.float64(2)), ("top_k", np.True_), ("top_k", np.int64(0)), ("top_k", torch.tensor(3)),
    ("top_p", np.float32("nan")), ("top_p", np.array(0.5)), ("min_p", np.float64(1.5)),
    ("max_new_tokens", np.int64(-1)), ("max_new_tokens", torch.tensor(3)), ("seed", np.uint64(2**63)),
    ("seed", np.float32(1)), ("eos_token_id", np.int64(V)), ("eos_token_id", np.True_)])
def test_numbers_of_numpy_out_of_range_bools_and_tensors_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        generate(make_model(), [1, 2], **{"max_new_tokens": 3, name: value})
    assert str(error.value).endswith(repr(value))


def test_a_bad_id_in_the_part_that_is_cut_off_is_found_too():
    tokens = torch.zeros(1, 3 * WINDOW, dtype=torch.int64)
    tokens[0, 0] = V
    for bad in (tokens, tokens[0].tolist()):
        with pytest.raises(ValueError, match=r"\[0, 61\), got 61"): generate(make_model(), bad, 3)


@pytest.mark.parametrize("eos", [-1, V, 1.0, True, "a"])
def test_a_bad_end_of_text_id_is_refused(eos):
    with pytest.raises(ValueError, match=r"eos_token_id must be in \[0, 61\)"):
        generate(make_model(), [1], 3, eos_token_id=eos)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [torch.full((V,), math.nan), torch.full((V,), -math.inf),
                                 torch.full((V,), math.inf),
                                 torch.zeros(V).index_fill(0, torch.tensor(7), math.nan)])
def test_logits_without_a_distribution_are_an_error(bad, temperature):
    model = Scripted(logits=bad).train()
    with pytest.raises(ValueError, match="logits have no distribution"):
        generate(model, [1, 2], 3, use_cache=False, temperature=temperature)
    assert model.training


def test_minus_infinity_for_some_tokens_is_fine():
    logits = torch.full((V,), -math.inf)
    logits[[3, 5]] = 1.0
    assert set(generate(Scripted(logits=logits), [1], 40, use_cache=False, seed=0)[1:]) == {3, 5}


def test_a_vocabulary_larger_than_the_models_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(ValueError, match="tokenizer has 300 entries, but the model's vocab_size is 299"):
        stream(make_model(vocab_size=299), tokenizer, "a")


# Generating

def plain_loop(model, tokens, new, **filters):
    """No cache, no window, no batch of random numbers: greedy as one would write it first."""
    for _ in range(new): tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_plain_loop(kind):
    model = make_model(kind).eval()
    with torch.no_grad(): wanted = plain_loop(model, prompt(), 12)
    assert torch.equal(generate(model, prompt(), 12, temperature=0), wanted)
    assert torch.equal(generate(model, prompt(), 12, top_k=1, seed=0), wanted)
    assert generate(model, prompt()[1].tolist(), 12, temperature=0) == wanted[1].tolist()


def test_greedy_is_what_transformers_generates():
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimus.rope import permute_rope

    model = make_model("gqa", rope_seq_len=64).eval()
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=36, intermediate_size=31, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rms_norm_eps=c.norm_eps, tie_word_embeddings=True, eos_token_id=None,
        pad_token_id=0, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    names = {"embedding.": "model.embed_tokens.", "blocks.": "model.layers.",
             "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
             "feedforward.": "mlp.", "attention.": "self_attn."}
    weights = {}
    for name, x in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name: x = permute_rope(x, 12, interleaved=False)
        for a, b in names.items(): name = name.replace(a, b)
        weights[{"norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}.get(name, name)] = x
    theirs.load_state_dict(weights)
    wanted = theirs.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=30,
                             do_sample=False)
    assert torch.equal(generate(model, prompt(), 30, temperature=0), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("more", [dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=7)])
def test_the_cache_changes_no_token_even_past_the_context(kind, T, more):
    model = make_model(kind)
    on, off = (generate(model, prompt(2, T), 2 * WINDOW, use_cache=flag, **more) for flag in (True, False))
    assert torch.equal(on, off) and on.shape == (2, T + 2 * WINDOW) and torch.equal(on[:, :T], prompt(2, T))


@pytest.mark.parametrize("window", [1, 2, 3, 17])
def test_past_the_context_it_goes_on_from_the_newest_half(window):
    model = make_model(rope_seq_len=window).eval()
    got = generate(model, [3, 5], 40, temperature=0)
    context, wanted = [3, 5], [3, 5]
    for _ in range(40):
        if len(context) > window: context = context[-max(1, window // 2):]
        with torch.no_grad(): best = model(torch.tensor([context]))[0, -1].argmax().item()
        context, wanted = [*context, best], [*wanted, best]
    assert got == wanted


def test_the_cache_is_no_longer_than_needed(monkeypatch):
    model, asked = make_model(), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *sizes: asked.append(sizes) or new_cache(*sizes))
    generate(model, [1, 2], 3)
    generate(model, [1, 2], 100)
    assert asked == [(1, 5), (1, WINDOW)]


def test_lists_and_tensors_come_back_as_they_went():
    model = make_model()
    row, rows = generate(model, [1, 2], 3, seed=0), generate(model, torch.tensor([[1, 2]]), 3, seed=0)
    assert isinstance(row, list) and all(type(i) is int for i in row)
    assert rows.dtype == torch.int64 and rows.tolist() == [row]
    given_tokens = prompt()
    before = given_tokens.clone()
    generate(model, given_tokens, 3)
    assert torch.equal(given_tokens, before)


def test_the_result_may_be_trained_on():
    model = make_model()
    tokens = generate(model, prompt(), 5)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # an inference-mode tensor would refuse


def test_the_seed_decides_and_the_global_state_is_left_alone():
    model, state = make_model(), torch.get_rng_state()
    first, again, other = (generate(model, prompt(), 9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(0)
    free = [generate(model, prompt(), 9) for _ in range(2)]
    assert not torch.equal(*free)
    torch.set_rng_state(state)
    generate(model, prompt(), 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_every_mode_comes_back(training):
    model = make_model().train(training)
    model.blocks[1].train(not training)
    modes = [m.training for m in model.modules()]
    assert torch.equal(generate(model, prompt(), 9, temperature=0),
                       generate(model.eval(), prompt(), 9, temperature=0))
    for module, mode in zip(model.modules(), modes): module.training = mode
    generate(model, prompt(), 2)
    assert [m.training for m in model.modules()] == modes
    def fail(*_): raise RuntimeError("inside")
    model.blocks[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"): generate(model, prompt(), 2)
    assert [m.training for m in model.modules()] == modes


def test_no_graph_is_kept():
    model, enabled = make_model(), []
    model.norm.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    generate(model, prompt(), 2)
    assert enabled and not any(enabled) and torch.is_grad_enabled()


# End of text

@pytest.mark.parametrize("script, wanted", [([9], [9]), ([4, 9], [4, 9]), ([4, 5, 6], [4, 5, 6])])
def test_end_of_text_first_in_the_middle_or_never(script, wanted):
    model, options = scripted(*script, prompt_length=2)
    assert generate(model, [1, 2], 3, eos_token_id=9, **options) == [1, 2, *wanted]
    in_the_prompt = generate(model, [1, 9], len(script), eos_token_id=9, **options)
    assert in_the_prompt == [1, 9, *wanted]  # there it ends nothing


def test_finished_rows_are_padded_until_all_are():
    class TwoRows(Scripted):
        def forward(self, tokens, cache=None):
            logits = torch.zeros(2, tokens.shape[1], V)
            for row, script in enumerate(([4, 9, 5, 5, 5, 5], [4, 5, 6, 9, 5, 5])):
                logits[row, -1, script[tokens.shape[1] - 1]] = 50.0
            return logits
    got = generate(TwoRows(), torch.tensor([[1], [2]]), 6, eos_token_id=9, temperature=0, use_cache=False)
    assert got.tolist() == [[1, 4, 9, 9, 9], [2, 4, 5, 6, 9]]


# Streaming

def ids_of(tokenizer, text): return tokenizer.encode(text)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20)
       | st.text("e\u0301😀👩‍🚀鯨⛵ñ \n\0", max_size=20), cut=st.integers(0, 9))
def test_whole_characters_only_and_joined_they_are_the_text(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    shorter = ids[:max(0, len(ids) - cut)]
    joined = "".join(text_pieces(tokenizer, shorter))
    assert "\ufffd" not in joined and joined == tokenizer.decode(shorter).removesuffix("\ufffd")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_at_all_join_to_their_decoding(tokenizer, ids):
    joined, whole = "".join(text_pieces(tokenizer, ids)), tokenizer.decode(ids)
    assert joined == whole.replace("\ufffd", "")


def test_pieces_are_those_of_the_tokenizers_library(tokenizer):
    from tokenizers.decoders import DecodeStream

    ids, theirs = tokenizer.encode(TEXT), DecodeStream()
    assert list(text_pieces(tokenizer, ids)) == [p for i in ids if (p := theirs.step(tokenizer.backend, i))]


def test_pieces_come_as_soon_as_they_are_settled(tokenizer):
    asked = []
    def slowly():
        for i in tokenizer.encode("ab鯨c"):
            asked.append(i)
            yield i
    pieces = text_pieces(tokenizer, slowly())
    assert next(pieces) == "a" and len(asked) == 1
    assert next(pieces) == "b" and len(asked) == 2
    assert next(pieces) == "鯨" and len(asked) == len(tokenizer.encode("ab鯨"))


def test_the_stream_is_the_decoding_of_what_generate_draws(tokenizer):
    model = make_model(vocab_size=300)
    filters = dict(temperature=0.9, top_k=50, top_p=0.95, seed=3)
    ids = generate(model, tokenizer.encode("the"), 60, eos_token_id=tokenizer.eos_token_id,
                   **filters)[len(tokenizer.encode("the")):]
    text = "".join(stream(model, tokenizer, "the", max_new_tokens=60, **filters))
    assert text == tokenizer.decode(ids).replace("\ufffd", "") and model.training


@pytest.mark.parametrize("script, shown", [("", ""), ("sea 😀", "sea 😀")])
def test_end_of_text_ends_the_stream_and_is_not_shown(tokenizer, script, shown):
    ids = [*tokenizer.encode(script), tokenizer.eos_token_id, *tokenizer.encode("more")]
    model, options = scripted(*ids, vocab_size=300, prompt_length=len(tokenizer.encode("the")))
    assert "".join(stream(model, tokenizer, "the", **options)) == shown


def test_the_stream_stops_at_the_number_asked_for(tokenizer):
    model, options = scripted(*tokenizer.encode("on the sea"), vocab_size=300)
    assert "".join(stream(model, tokenizer, "", max_new_tokens=2,
                          **options)) == tokenizer.decode(tokenizer.encode("on the sea")[:2])


def test_an_empty_prompt_starts_from_end_of_text(tokenizer):
    seen = []
    class Listening(Scripted):
        def forward(self, tokens, cache=None): return seen.append(tokens.tolist()) or super().forward(tokens)
    list(stream(Listening([5], 300), tokenizer, "", max_new_tokens=1, use_cache=False))
    assert seen == [[[tokenizer.eos_token_id]]]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30) | st.sampled_from([" ", "\n\n", "\0", "\ud800", "a\udfffb", "\ufeff",
                                                    "<|endoftext|>"]))
def test_any_prompt_runs_or_is_refused_in_a_sentence(tokenizer, text):
    try: pieces = stream(make_model(vocab_size=300), tokenizer, text, max_new_tokens=3, seed=0)
    except ValueError as error:
        assert "surrogate" in str(error) and any("\ud800" <= c <= "\udfff" for c in text)
    else: "".join(pieces).encode()


def test_a_megabyte_of_prompt_takes_bounded_time(tokenizer):
    assert isinstance("".join(stream(make_model(vocab_size=300), tokenizer, "the sea " * 130_000,
                                     max_new_tokens=3, seed=0)), str)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_a_prompt_that_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="prompt must be text"):
        stream(make_model(vocab_size=300), tokenizer, text)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(tokenizer):
    logits = torch.zeros(307)
    logits[300:] = 30.0
    text = "".join(stream(Scripted(vocab_size=307, logits=logits), tokenizer, "a", max_new_tokens=20,
                          use_cache=False, seed=0))
    assert isinstance(text, str)  # decode refuses ids from 300 on


def test_any_tokenizer_with_encode_and_decode_will_do():
    class Letters:
        eos_token_id = 0
        def encode(self, text): return [ord(c) - 96 for c in text]
        def decode(self, ids): return "".join(chr(96 + i) for i in ids)
    model, options = scripted(2, 1, 4, 0)
    assert list(stream(model, Letters(), "c", **options)) == ["b", "a", "d"]


def test_a_consumer_that_stops_leaves_the_model_as_it_was(tokenizer):
    model = make_model(vocab_size=300)
    pieces = stream(model, tokenizer, "the", max_new_tokens=50, seed=0)
    next(pieces)
    assert model.training and torch.is_grad_enabled()
    pieces.close()


# A text that grows by hand, and questions that are interrupted

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 1, 2, 30])
def test_a_text_grows_beyond_what_was_foreseen_and_past_the_window(kind, room):
    model = make_model(kind)
    with_cache, without = (Generation(model, prompt(T=4), room, use_cache=flag) for flag in (True, False))
    for step in range(2 * WINDOW):
        torch.testing.assert_close(with_cache.next_logits(), without.next_logits(), rtol=1e-4, atol=1e-4)
        drawn = torch.tensor([step % V, 3])
        with_cache.append(drawn)
        without.append(drawn)
    assert with_cache.buffer.tokens[:, 4:].tolist() == [[i % V for i in range(2 * WINDOW)], [3] * 2 * WINDOW]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", [1, 2])
def test_an_interrupted_question_can_be_repeated(kind, after, place, monkeypatch):
    """Interrupted before or after a pass of the model: that of the prompt, or that of the last token."""
    model, passes = make_model(kind), []
    generation, calm = (Generation(model, prompt(), 5) for _ in range(2))
    asked = type(generation.cached_model.model)
    original = asked.hidden
    def hidden(self, *args, **options):
        passes.append(self)
        if len(passes) == place and not after: raise KeyboardInterrupt
        out = original(self, *args, **options)
        if len(passes) == place: raise KeyboardInterrupt
        return out
    with monkeypatch.context() as patched:
        patched.setattr(asked, "hidden", hidden)
        with pytest.raises(KeyboardInterrupt): generation.next_logits()
    torch.testing.assert_close(generation.next_logits(), calm.next_logits())
    assert generation.cached_model.cache.length == calm.cached_model.cache.length == 5


def test_the_model_is_asked_once_a_position_and_sampling_writes_nothing():
    model, calls = Scripted(logits=torch.arange(V).float()), []
    model.register_forward_hook(lambda *_: calls.append(1))
    generation = Generation(model, prompt(), 5, use_cache=False, seed=0)
    for _ in range(3): drawn = generation.sample(Sampling(top_k=2))
    assert len(calls) == 1 and torch.equal(generation.buffer.tokens, prompt())
    generation.append(drawn)
    assert generation.buffer.tokens[:, -1].tolist() == drawn.tolist() and generation.buffer.length == 6
    assert generation.sample(Sampling(temperature=0)).tolist() == [V - 1] * 2 and len(calls) == 2


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_buffer_shows_the_newest_half_of_what_has_outgrown_the_window(window):
    buffer, context = TokenBuffer(torch.tensor([[0]]), 0, window), [0]
    for i in range(1, 20):
        buffer.append(torch.tensor([i]))
        context.append(i)
        cut = len(context) > window
        if cut: context = context[-max(1, window // 2):]
        assert buffer.cut_context() == cut and buffer.context.tolist() == [context]
    assert buffer.tokens.tolist() == [list(range(20))] and buffer.capacity >= 20


def test_a_sampling_is_frozen_and_holds_numbers_of_python():
    sampling = Sampling(np.float32(0.5), np.int64(3), min_p=np.float16(0.25))
    assert sampling == Sampling(0.5, 3, None, 0.25) and type(sampling.top_k) is int
    with pytest.raises(AttributeError): sampling.top_k = -1


def test_settings_are_judged_once_and_not_for_every_token(monkeypatch):
    judged = []
    check = Sampling.__post_init__
    monkeypatch.setattr(Sampling, "__post_init__", lambda self: judged.append(1) or check(self))
    generate(make_model(), [1, 2], 9, top_p=0.9)
    assert len(judged) == 1
