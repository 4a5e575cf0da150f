"""What must stay true of optimus.transformer. Derived in notebooks/08_transformer.ipynb."""
import math

import pytest
import torch
import torch.nn.functional as F
from models import SIZES, B, T, V, draw_tokens, make_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optimus import transformer
from optimus.measure import LiveBytes
from optimus.cache import KVCache, LatentCache
from optimus.config import ModelConfig, count_parameters
from optimus.rope import permute_rope
from optimus.transformer import (LanguageModel, MLATransformerBlock, TransformerBlock, check_targets,
                                 init_weights, lm_loss)

KINDS = ["mla", "gqa"]
# The models of transformers, with copied weights

OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {"blocks.": "model.layers.", "attention_norm": "input_layernorm",
         "feedforward_norm": "post_attention_layernorm",
         "feedforward.": "mlp.", "attention.": "self_attn.",
         "q_down_proj": "q_a_proj", "q_norm": "q_a_layernorm",
         "q_up_proj": "q_b_proj", "kv_down_proj": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm",
         "kv_up_proj": "kv_b_proj"}


def their_weights(model):
    weights = {}
    for name, x in model.state_dict().items():
        if name.endswith(("attention.q_proj.weight", "attention.k_proj.weight")):  # Llama turns halves
            x = permute_rope(x, model.config.head_dim, interleaved=False)
        first = name.split(".")[0]
        if first in OUTER: name = f"{OUTER[first]}.weight"
        else:
            for ours, theirs in INNER.items(): name = name.replace(ours, theirs)
        weights[name] = x
    return weights


def in_transformers(model):
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

    c = model.config
    shared = dict(vocab_size=c.vocab_size, hidden_size=c.embedding_dim, intermediate_size=c.ffn_dim,
                  num_hidden_layers=c.num_layers, num_attention_heads=c.num_attention_heads,
                  rms_norm_eps=c.norm_eps,
                  rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
                  max_position_embeddings=c.rope_seq_len, tie_word_embeddings=c.tie_embeddings)
    if c.attention == "gqa":
        theirs = LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=c.num_kv_heads,
                                              head_dim=c.head_dim))
    else:
        theirs = DeepseekV2ForCausalLM(DeepseekV2Config(
            **shared, first_k_dense_replace=c.num_layers, q_lora_rank=c.q_lora_rank,
            kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim))
    theirs.load_state_dict(their_weights(model))
    return theirs.eval()


@pytest.mark.core
@pytest.mark.parametrize("changes", [
    dict(), dict(tie_embeddings=False, norm_eps=1e-3), dict(rope_theta=50.0, num_layers=1),
    dict(compression_ratio=0.1), dict(num_attention_heads=3, compression_ratio=0.3, intermediate_size=None),
    dict(attention="gqa"), dict(attention="gqa", num_kv_heads=5, tie_embeddings=False, norm_eps=1e-3),
    dict(attention="gqa", num_attention_heads=6, num_kv_heads=2, rope_theta=50.0),
    dict(attention="gqa", num_attention_heads=30, num_kv_heads=3, num_layers=1),
])
def test_logits_equal_those_of_transformers(changes):
    model = make_model(**changes)
    with torch.no_grad(): ours, theirs = model(draw_tokens()), in_transformers(model)(draw_tokens()).logits
    assert ours.shape == (B, T, V) and theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_transformers(kind):
    model = make_model(kind)
    theirs, tokens = in_transformers(model), draw_tokens(B, T + 1)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    reference = theirs(tokens[:, :-1]).logits
    F.cross_entropy(reference.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(model.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3,
                               atol=1e-5)
    for block, layer in zip(model.blocks, theirs.model.layers):
        for mine, other in ((block.attention.o_proj, layer.self_attn.o_proj),
                            (block.feedforward.gate_proj, layer.mlp.gate_proj),
                            (block.attention_norm, layer.input_layernorm)):
            torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-5)


# Blocks, sizes, and the first weights

@pytest.mark.core
def test_the_blocks_differ_in_their_attention_only():
    mla = MLATransformerBlock(ModelConfig(**SIZES))
    gqa = TransformerBlock(ModelConfig(**SIZES | {"attention": "gqa"}))
    assert type(mla).forward is type(gqa).forward and type(mla).__mro__[1] is type(gqa).__mro__[1]
    assert type(mla.attention) is not type(gqa.attention)
    for block in (mla, gqa): block.attention = nn.Identity()
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in (mla, gqa)]
    assert shapes[0] == shapes[1]
    assert [type(x) for x in mla.children()] == [type(x) for x in gqa.children()]


@pytest.mark.core
@pytest.mark.parametrize("kind, block", [("mla", MLATransformerBlock), ("gqa", TransformerBlock)])
def test_the_configuration_reaches_every_part(kind, block):
    model = LanguageModel(ModelConfig(**SIZES | {"attention": kind, "dropout": 0.3, "norm_eps": 1e-3,
                                                 "rope_theta": 77.0}))
    assert all(type(b) is block for b in model.blocks) and len(model.blocks) == 3
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.3] * 7  # the embedding, two a block
    assert {b.attention.rope_theta for b in model.blocks} == {77.0}
    norms = [model.norm, *(n for b in model.blocks for n in (b.attention_norm, b.feedforward_norm))]
    assert {norm.eps for norm in norms} == {1e-3}
    if kind == "mla":
        assert model.blocks[0].attention.kv_norm.eps == model.blocks[0].attention.q_norm.eps == 1e-6


@pytest.mark.core
@pytest.mark.parametrize("changes", [dict(), dict(attention="gqa"), dict(tie_embeddings=False),
                                     dict(intermediate_size=None)])
def test_parameters_are_those_predicted(changes):
    model = LanguageModel(ModelConfig(**SIZES | changes))
    assert model.num_parameters() == count_parameters(model.config)["total"]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_the_writers_of_the_stream_start_smaller_by_the_root_of_their_number(kind):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SIZES | {"attention": kind, "intermediate_size": 509,
                                                 "num_layers": 8}))
    for name, p in model.named_parameters():
        if p.ndim < 2: assert p.eq(1).all()
        else:
            writer = name.endswith(("attention.o_proj.weight", "feedforward.down_proj.weight"))
            std = 0.02 / 4 if writer else 0.02  # sqrt(2 * 8) = 4
            assert abs(p.std().item() / std - 1) < 6 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean().item()) < 6 * std / p.numel() ** 0.5, name


@pytest.mark.core
def test_a_new_model_is_unsure():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=997, embedding_dim=60, num_attention_heads=5, num_layers=2,
                                      dropout=0.0,
                                      tie_embeddings=False)).eval()
    tokens = torch.randint(0, 997, (8, 65))
    assert abs(model.loss(tokens[:, :-1], tokens[:, 1:]).item() - math.log(997)) < 0.05


@pytest.mark.core
@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_the_embedding(tie):
    model = make_model(tie_embeddings=tie)
    assert (model.head.weight is model.embedding.weight) is tie
    init_weights(model)
    assert (model.head.weight.data_ptr() == model.embedding.weight.data_ptr()) is tie


# Positions and caches

@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_full_for_every_split(kind):
    model, tokens = make_model(kind), draw_tokens()
    with torch.no_grad():
        full = model(tokens)
        for first in range(1, T):
            cache = model.new_cache(B, T)
            steps = [model(tokens[:, :first], cache)]
            steps += [model(tokens[:, t:t + 1], cache) for t in range(first, T)]
            torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
            assert cache.length == T


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_cached_in_chunks_equals_full(kind):
    model, tokens = make_model(kind), draw_tokens()
    with torch.no_grad():
        for sizes in ([2, 5, 1, 5], [1, 12], [11, 2], [3, 3, 7]):
            cache = model.new_cache(B, T)
            parts = [model(part, cache) for part in tokens.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [1, 2, 9])
def test_only_the_last_positions_cost_their_last_feedforward(kind, last):
    model, tokens, rows = make_model(kind), draw_tokens(), []
    for block in model.blocks:
        block.feedforward.register_forward_hook(lambda module, x, y: rows.append(y.shape[1]))
    one, other = (model.new_cache(B, T) for _ in range(2))
    with torch.no_grad():
        for cache in (None, one):
            rows.clear()
            found = model.hidden(tokens, cache, keep_last=last)
            assert rows == [T] * (len(model.blocks) - 1) + [last]
            torch.testing.assert_close(found, model.hidden(tokens)[:, -last:], rtol=1e-4, atol=1e-5)
        model.hidden(tokens, other)
    assert one.length == T
    for ours, wanted in zip(one.stores, other.stores): assert torch.equal(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cache_takes_the_models_dtype_and_sizes(kind, dtype):
    model = make_model(kind).to(dtype)
    cache = model.new_cache(B, 7)
    assert type(cache) is {"mla": LatentCache,
                           "gqa": KVCache}[kind] and {x.dtype for x in cache.stores} == {dtype}
    per_token = (30 + 6) if kind == "mla" else 2 * 1 * 12
    assert cache.nbytes == 3 * B * 7 * per_token * dtype.itemsize
    with torch.no_grad(): assert model(draw_tokens(B, 7), cache).dtype == dtype and cache.length == 7


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one_or_another_row(kind):
    model, tokens = make_model(kind), draw_tokens()
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % V
    with torch.no_grad(): moved = (model(tokens) - model(changed)).abs().amax(-1) > 0  # (B, T)
    assert moved[0, 7:].all() and not moved[0, :7].any() and not moved[1].any()


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_only_distances_count(kind):
    model, tokens = make_model(kind), draw_tokens()
    with torch.no_grad():
        shifted = model(tokens, pos=torch.arange(T) + 4)
        torch.testing.assert_close(shifted, model(tokens), rtol=1e-3, atol=1e-3)
        rows = torch.stack([torch.arange(T), torch.arange(T) + torch.arange(T) // 6])
        assert (model(tokens, pos=rows)[1] - model(tokens)[1]).abs().max() > 0.01  # the second row has gaps
        torch.testing.assert_close(model(tokens, pos=rows)[0], model(tokens)[0])


# What is refused

@pytest.mark.parametrize("tokens, words", [
    (torch.zeros(T, dtype=torch.int64), r"int64 of shape \(B, T\).*got torch.int64 of shape \(13,\)"),
    (torch.zeros(B, T), r"torch.float32 of shape \(2, 13\)"), (torch.zeros(B, T, dtype=torch.int32), "int32"),
    (torch.zeros(B, 0, dtype=torch.int64), r"at least 1.*\(2, 0\)"),
    (torch.full((B, T), V), r"\[0, 61\), got 61"), (torch.full((B, T), -1), r"\[0, 61\), got -1"),
    (torch.zeros(1, 18, dtype=torch.int64), "position 17 .* rope_seq_len = 17"),
])
def test_bad_tokens_say_what_is_wrong(tokens, words):
    with pytest.raises(ValueError, match=words): make_model()(tokens)


@pytest.mark.parametrize("pos, words", [
    (torch.arange(T - 1), r"\(13,\) or \(2, 13\), got torch.int64 of shape \(12,\)"),
    (torch.arange(T).float(), "float32"),
    (torch.arange(T).flip(0), "increase"), (torch.zeros(T, dtype=torch.int64), "increase"),
    (torch.arange(T) - 1, "start at 0 or later"), (torch.arange(T) + 5, "position 17 .* rope_seq_len = 17"),
    (torch.stack([torch.arange(T), torch.arange(T) * 2]), "position 24"),
])
def test_bad_positions_say_what_is_wrong(pos, words):
    with pytest.raises(ValueError, match=words): make_model()(draw_tokens(), pos=pos)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_continued_or_refused(kind):
    model, tokens = make_model(kind), draw_tokens()
    cache = model.new_cache(B, 7)
    with torch.no_grad():
        model(tokens[:, :5], cache, pos=torch.arange(5))
        for call, words in (
                (lambda: model(tokens[:, 5:7], cache, pos=torch.arange(2)),
                 "with 5 tokens in the cache pos must be 5 to 6"),
                (lambda: model(tokens[:, 5:8], cache), "max_length=7.*5 are in it and 3 more"),
                (lambda: model(tokens[:1, 5:6], cache), r"\(2, 1"),
                (lambda: model(tokens[:, :1] + V, cache), "61")):
            with pytest.raises(ValueError, match=words): call()
            assert cache.length == 5
        full = model(tokens[:, :7])
        torch.testing.assert_close(model(tokens[:, 5:7], cache, pos=torch.arange(5, 7)), full[:, 5:],
                                   rtol=1e-4, atol=1e-4)
        long = model.new_cache(B, 99)
        model(draw_tokens(B, 17), long)
        with pytest.raises(ValueError, match="position 17 .* rope_seq_len = 17"): model(tokens[:, :1], long)


def test_ids_on_another_device_are_read_outside_training_only():
    with torch.device("meta"): model, tokens = LanguageModel(ModelConfig(**SIZES)), torch.zeros(1, 3).long()
    assert model.train().loss(tokens, tokens).shape == ()
    with pytest.raises(RuntimeError, match="meta"): model.eval()(tokens)  # no number can be read there
    with pytest.raises(RuntimeError): check_targets(tokens, tokens, V)


@pytest.mark.parametrize("targets, words", [
    (torch.zeros(B, T - 1, dtype=torch.int64),
     r"\(2, 13\), got torch.int64 of shape \(2, 12\)"), (torch.zeros(B, T), "float32"),
    (torch.full((B, T), V), "-100 or in .*got 61"), (torch.full((B, T), -1), "got -1"),
])
def test_bad_targets_say_what_is_wrong(targets, words):
    with pytest.raises(ValueError, match=words): make_model().loss(draw_tokens(), targets)


# Loss and checkpointing

@pytest.mark.core
@pytest.mark.parametrize("dtype, close", [(torch.float32, dict(rtol=1e-4, atol=1e-6)),
                                          (torch.float64, dict(rtol=1e-12, atol=1e-14))])
@pytest.mark.parametrize("N", [1, 7, 256, 613])
def test_the_loss_is_pytorchs_with_its_gradients(N, dtype, close):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 7, dtype=dtype, requires_grad=True) for n in (N, V))
    targets = torch.randint(0, V, (N,))
    if N > 1: targets[::3] = -100
    naive, ours = F.cross_entropy(hidden @ weight.T, targets), lm_loss(hidden, weight, targets)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, naive, rtol=min(close["rtol"], 1e-5), atol=0)
    wanted, got = (torch.autograd.grad(2 * loss, (hidden, weight)) for loss in (naive, ours))
    for a, b in zip(got, wanted): torch.testing.assert_close(a, b, **close)
    for frozen, other in ((hidden, weight), (weight, hidden)):
        frozen.requires_grad_(False)
        torch.testing.assert_close(torch.autograd.grad(lm_loss(hidden, weight, targets), other)[0],
                                   torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), other)[0],
                                   **close)
        frozen.requires_grad_(True)
    with torch.no_grad(): torch.testing.assert_close(lm_loss(hidden, weight, targets), ours)


@pytest.mark.core
def test_large_logits_do_not_overflow():
    hidden, targets = torch.full((3, 1), 200.0, requires_grad=True), torch.tensor([0, 1, 2])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    naive = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(lm_loss(hidden, weight, targets), naive)
    torch.testing.assert_close(*(torch.autograd.grad(form, hidden)[0] for form in
                                 (lm_loss(hidden, weight, targets), naive)))


@pytest.mark.parametrize("N", [0, 5])
def test_without_a_counted_target_the_loss_is_nan_and_gradients_0_as_pytorchs(N):
    hidden, weight = torch.randn(N, 7, requires_grad=True), torch.randn(V, 7, requires_grad=True)
    targets = torch.full((N,), -100)
    for loss in (lm_loss(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)):
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, (hidden, weight)): assert (gradient == 0).all()


@pytest.mark.parametrize("target", [-1, V])
def test_an_impossible_target_is_not_counted_as_another(target):
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        lm_loss(torch.randn(2, 7), torch.randn(V, 7), torch.tensor([0, target]))


def test_a_loss_goes_backward_once():
    hidden, weight = torch.randn(5, 7, requires_grad=True), torch.randn(V, 7, requires_grad=True)
    loss = lm_loss(hidden, weight, torch.arange(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up: compute it again"): loss.backward()
    slope, = torch.autograd.grad(lm_loss(hidden, weight, torch.arange(5)) ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"): slope.sum().backward()


def test_without_gradients_none_are_made():
    hidden, weight = torch.randn(5, 7, requires_grad=True), torch.randn(V, 7, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as flops: lm_loss(hidden, weight, torch.arange(5))
    assert flops.get_total_flops() == 2 * 5 * 7 * V
    with FlopCounterMode(display=False) as flops: lm_loss(hidden, weight, torch.arange(5)).backward()
    assert flops.get_total_flops() == 3 * 2 * 5 * 7 * V  # no logit is computed twice


@pytest.fixture
def nan_in_fresh_memory():
    """Every tensor that PyTorch leaves uninitialized is full of NaN, as memory of others may be."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_low_precision_is_summed_in_float32(dtype):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(613, 60), torch.randn(V, 60) / 8, torch.randint(0, V, (613,))
    x, W = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.cross_entropy(x @ W.T, targets)
    wanted = torch.autograd.grad(exact, (x, W))
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=dtype): mixed = lm_loss(hidden, weight, targets)
    low = lm_loss(hidden.to(dtype), weight.to(dtype), targets)
    for loss in (mixed, low):
        assert loss.dtype == torch.float32 and abs(loss.item() / exact.item() - 1) < 2e-3
    logits = hidden.detach().to(dtype) @ weight.detach().to(dtype).T
    torch.testing.assert_close(mixed, F.cross_entropy(logits.float(), targets), rtol=1e-6, atol=0)
    for scale in (1.0, 2.0**16):  # as a gradient scaler has it
        with torch.autocast("cpu", dtype=dtype): loss = lm_loss(hidden, weight, targets) * scale
        for got, true in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
            assert got.dtype == torch.float32
            assert (got / scale - true).norm() < 8e-3 * true.norm()


def test_the_gradient_of_a_16_bit_head_is_summed_in_float32():
    # 300 parts of 256 tokens add 128 each; a sum in bfloat16 stays at 256 * 128, for the next is 258 * 128
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = torch.ones(300 * 256, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        weight.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            loss = lm_loss(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64))
        wanted = torch.tensor([[-0.5], [0.5]], dtype=dtype)
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], wanted)


def test_float16_keeps_small_gradients_as_a_scaled_loss_does():
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 32), torch.randn(9973, 32) * 0.8
    targets = torch.randint(0, 9973, (256,))
    def gradient(loss, x, W, dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
            value = loss(x, W, targets) * 2**14
        return torch.autograd.grad(value, W)[0] / 2**14
    def naive(x, W, targets): return F.cross_entropy(F.linear(x, W), targets)
    W = weight.double().requires_grad_()
    exact = gradient(naive, hidden.double(), W, torch.float64)
    off = {form: ((gradient(form, hidden, weight.requires_grad_(), torch.float16) / exact - 1).abs() > 0.1)
           .double().mean().item() for form in (lm_loss, naive)}
    assert off[lm_loss] < 1.02 * off[naive], off  # without lifting 7 % more are off


@pytest.mark.parametrize("autocast", [True, False])
def test_a_large_stream_does_not_overflow_float16(autocast):
    dtype = torch.float32 if autocast else torch.float16
    hidden, weight = torch.full((1024, 8), 600.0, dtype=dtype), torch.zeros(2, 8, dtype=dtype)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        loss = lm_loss(hidden, weight, torch.zeros(1024, dtype=torch.int64))
    gradient, = torch.autograd.grad(loss, weight)  # 256 * 600 / 2 is more than float16 holds
    torch.testing.assert_close(gradient, torch.tensor([[-300.0], [300.0]], dtype=dtype).expand(2, 8))


@pytest.mark.parametrize("tokens", [1, 257, 600])
def test_as_many_targets_as_hidden_states(tokens):
    with pytest.raises(ValueError, match=rf"shape \(512,\), got \({tokens},\)"):
        lm_loss(torch.randn(512, 7), torch.randn(V, 7), torch.zeros(tokens, dtype=torch.int64))


def test_one_part_of_the_logits_at_a_time_in_16_bits_too():
    hidden, weight = torch.randn(1024, 7, requires_grad=True), torch.randn(4096, 7, requires_grad=True)
    with LiveBytes([hidden, weight]) as live, torch.autocast("cpu", dtype=torch.bfloat16):
        lm_loss(hidden, weight, torch.zeros(1024, dtype=torch.int64)).backward()
    assert 0 < live.peak - 256 * 4096 * 6 < 2**20


def test_the_loss_never_holds_all_logits():
    from torch.profiler import ProfilerActivity, profile

    hidden, weight = torch.randn(2048, 7).requires_grad_(), torch.randn(4099, 7).requires_grad_()
    targets = torch.randint(0, 4099, (2048,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        lm_loss(hidden, weight, targets).backward()
    held = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 0 < peak - 256 * 4099 * 4 < 2**20  # the logits of 256 tokens once; naively all, three times


def test_a_compiled_loss_is_the_same():
    hidden, weight = torch.randn(300, 7, requires_grad=True), torch.randn(V, 7, requires_grad=True)
    targets = torch.randint(0, V, (300,))
    losses = [form(hidden, weight, targets)
              for form in (lm_loss, torch.compile(lm_loss, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*losses)
    for pair in zip(*(torch.autograd.grad(2 * loss, (hidden, weight)) for loss in losses)):
        torch.testing.assert_close(*pair)


def test_the_fused_loss_is_the_same(monkeypatch):
    kernel = torch.compile(transformer._softmax_gradient_by_formula, backend="aot_eager")
    monkeypatch.setattr(transformer, "fused_softmax_gradient", lambda: kernel)
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 7, requires_grad=True), torch.randn(V, 7, requires_grad=True)
    targets = torch.randint(0, V, (300,)).masked_fill(torch.rand(300) < 0.2, -100)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            losses = [lm_loss(hidden, weight, targets, fused=fused) for fused in (False, True)]
        torch.testing.assert_close(*losses)
        for pair in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses)):
            torch.testing.assert_close(*pair, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.core
def test_the_loss_of_a_model_is_that_of_its_logits():
    model, tokens, targets = make_model(), draw_tokens(), draw_tokens().flip(1)
    targets[0, 3:] = -100
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets),
                                   F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit_of_loss_or_gradient(kind):
    results = []
    for checkpointing in (False, True):
        model = make_model(kind, checkpointing=checkpointing, dropout=0.2).train()
        torch.manual_seed(5)
        loss = model.loss(draw_tokens(), draw_tokens().flip(1))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters()), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def kept_numbers(model):
    """Numbers which autograd keeps for the backward pass, weights aside; and how often a block ran."""
    seen, runs, weights = {}, [], {p.untyped_storage().data_ptr() for p in model.parameters()}
    def show(t):
        if t.untyped_storage().data_ptr() not in weights: seen[t.untyped_storage().data_ptr()] = t
        return t
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.autograd.graph.saved_tensors_hooks(show, lambda t: t):
        loss = model.loss(draw_tokens(), draw_tokens())
    loss.backward()
    return sum(t.untyped_storage().nbytes() // 4 for t in seen.values()), len(runs)


def test_checkpointing_keeps_less_and_runs_only_in_training():
    kept = {flag: kept_numbers(make_model(checkpointing=flag).train()) for flag in (False, True)}
    assert kept[True][0] < kept[False][0] / 4 and [runs for _, runs in kept.values()] == [1, 2]
    assert kept_numbers(make_model(checkpointing=True).eval()) == kept[False]


@pytest.mark.core
def test_dropout_acts_in_training_only():
    model, tokens = make_model(dropout=0.5), draw_tokens()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    entering = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model(tokens)
    embedded, dropped = model.embedding(tokens), entering[0] == 0
    assert 0.4 < dropped.double().mean() < 0.6 and torch.equal(entering[0][~dropped], 2 * embedded[~dropped])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [61, 101, 128])
def test_what_lay_in_memory_before_is_in_no_gradient(nan_in_fresh_memory, dtype, size):
    hidden, weight = torch.randn(300, 7, requires_grad=True), torch.randn(size, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = lm_loss(hidden, weight, torch.randint(0, size, (300,)))
    for x in (loss, *torch.autograd.grad(loss, (hidden, weight))): assert x.isfinite().all()
