"""What must stay true of optimus.cache. Derived in notebooks/06_kv_cache.ipynb."""
import random

import pytest
import torch
from torch import nn

from optimus.attention import GroupedQueryAttention
from optimus.cache import KVCache, LatentCache
from optimus.mla import MultiHeadLatentAttention

L, B, T, C, H = 3, 2, 13, 24, 6
PAIRS = [(a, b) for a in range(T) for b in range(a + 1, T + 1)]


class Gqa:
    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.ModuleList(GroupedQueryAttention(C, H, 2) for _ in range(L)).double()

    def cache(self, max_length=T): return KVCache(L, B, max_length, 2, C // H, dtype=torch.double)


class Mla:
    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MultiHeadLatentAttention(C, H, q_lora_rank=11, kv_lora_rank=7, qk_nope_head_dim=5,
                                     qk_rope_head_dim=2, v_head_dim=17) for _ in range(L)).double()
        for p in self.layers.parameters():
            nn.init.normal_(p, std=0.3) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)

    def cache(self, max_length=T): return LatentCache(L, B, max_length, 7, 2, dtype=torch.double)


@pytest.fixture(params=[Gqa, Mla], ids=["kv", "latent"])
def kind(request): return request.param()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, T, C, dtype=torch.double)


@torch.no_grad()
def run(kind, x, pos, cache=None):
    """A stack of layers as a model runs it: each layer writes, the end advances."""
    for i, layer in enumerate(kind.layers): x = x + layer(x, pos, None if cache is None else cache.layer(i))
    if cache is not None: cache.advance(x.shape[1])
    return x


def run_split(kind, x, cuts, cache):
    pos = torch.arange(x.shape[1])
    return torch.cat([run(kind, x[:, a:b], pos[a:b], cache) for a, b in zip(cuts, cuts[1:])], dim=1)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_every_split_of_13_tokens_gives_the_full_pass(kind, x):
    """By induction over the 91 chunks: right outputs, and the cache left as the full pass leaves it."""
    pos, whole = torch.arange(T), kind.cache()
    full = run(kind, x, pos)
    close(run(kind, x, pos, whole), full)
    for a, b in PAIRS:
        cache = kind.cache()
        for mine, theirs in zip(cache.stores, whole.stores): mine[:, :, :a] = theirs[:, :, :a]
        cache.length = a
        close(run(kind, x[:, a:b], pos[a:b], cache), full[:, a:b])
        assert cache.length == b
        for mine, theirs in zip(cache.stores, whole.stores):
            close(mine[:, :, :b], theirs[:, :, :b])
            assert mine[:, :, b:].eq(0).all()  # nothing is written beyond the chunk


@pytest.mark.core
@pytest.mark.parametrize("prefill", range(1, T + 1))
def test_prefill_then_single_steps_give_the_full_pass(kind, x, prefill):
    close(run_split(kind, x, [0, *range(prefill, T + 1)], kind.cache()), run(kind, x, torch.arange(T)))


@pytest.mark.core
def test_random_chunks_in_one_reused_cache_give_the_full_pass(kind, x):
    cache, full = kind.cache(max_length=T + 4), run(kind, x, torch.arange(T))
    draw = random.Random(0)
    for _ in range(8):
        cache.reset()
        assert cache.length == 0
        cuts = [0, *sorted(draw.sample(range(1, T), draw.randint(0, T - 1))), T]
        close(run_split(kind, x, cuts, cache), full)


@pytest.mark.core
def test_the_latent_cache_holds_what_transformers_holds(x):
    from transformers import DeepseekV2Config, DynamicCache
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

    torch.manual_seed(0)
    sizes = dict(q_lora_rank=11, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=17)
    ours = MultiHeadLatentAttention(C, H, **sizes)
    for p in ours.parameters(): nn.init.normal_(p, std=0.3) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    config = DeepseekV2Config(hidden_size=C, num_attention_heads=H, num_key_value_heads=H,
                              attn_implementation="sdpa", **sizes)
    theirs = deepseek.DeepseekV2Attention(config, layer_idx=0)
    rope = deepseek.DeepseekV2RotaryEmbedding(config)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))  # the same order
    cache, their_cache, x = LatentCache(1, B, T, 8, 2), DynamicCache(), x.float()
    with torch.no_grad():
        for a, b in [(0, 5), *((t, t + 1) for t in range(5, T))]:
            pos = torch.arange(a, b)
            y = ours(x[:, a:b], pos, cache.layer(0))
            cache.advance(b - a)
            z = theirs(x[:, a:b], attention_mask=None, past_key_values=their_cache,
                       position_embeddings=rope(x, pos[None]))[0]
            torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.c_kv[0], their_cache.layers[0].keys[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.k_rope[0], their_cache.layers[0].values[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("dtype, size", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_the_formula(dtype, size):
    kv, latent = KVCache(3, 2, 13, 5, 7, dtype=dtype), LatentCache(3, 2, 13, 11, 4, dtype=dtype)
    assert kv.nbytes == kv.k.nbytes + kv.v.nbytes == 3 * 2 * 13 * 2 * 5 * 7 * size
    assert latent.nbytes == latent.c_kv.nbytes + latent.k_rope.nbytes == 3 * 2 * 13 * (11 + 4) * size
    assert kv.k.dtype == kv.v.dtype == latent.c_kv.dtype == latent.k_rope.dtype == dtype


@pytest.mark.core
def test_the_tensors_are_layers_batch_slots():
    kv, latent = KVCache(3, 2, 13, 5, 7), LatentCache(3, 2, 13, 11, 4)
    assert kv.k.shape == kv.v.shape == (3, 2, 13, 5, 7)
    assert latent.c_kv.shape == (3, 2, 13, 11) and latent.k_rope.shape == (3, 2, 13, 4)


def test_deepseek_v3_keeps_576_numbers_a_token_instead_of_40960():
    latent = LatentCache(1, 1, 2, 512, 64, dtype=torch.bfloat16)
    assert latent.nbytes // (2 * 2) == 576
    assert 128 * (128 + 64 + 128) == 40_960


@pytest.mark.parametrize("before, given", [(0, T + 1), (T, 1), (9, 5)])
def test_too_many_tokens_are_refused_and_nothing_changes(kind, x, before, given):
    cache, more = kind.cache(), torch.cat([x, x], dim=1)
    if before: run(kind, more[:, :before], torch.arange(before), cache)
    snapshot = [store.clone() for store in cache.stores]
    said = f"max_length=13 tokens; {before} are in it and {given} more were given"
    with pytest.raises(ValueError, match=said):
        run(kind, more[:, :given], torch.arange(before, before + given), cache)
    assert cache.length == before
    assert all(torch.equal(a, b) for a, b in zip(snapshot, cache.stores))
    with pytest.raises(ValueError, match="max_length=13"): cache.advance(given)
    assert cache.length == before


@pytest.mark.core
def test_exactly_max_length_tokens_fit(kind, x):
    cache = kind.cache()
    run_split(kind, x, [0, T - 1, T], cache)
    assert cache.length == T == cache.max_length


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size_is_refused_with_both_shapes(kind, batch):
    """A batch of 1 would otherwise be broadcast over the rows of the cache."""
    with pytest.raises(ValueError, match=rf"takes shape \(2, 5, .*\), got \({batch}, 5, "):
        run(kind, torch.randn(batch, 5, C).double(), torch.arange(5), kind.cache())


def test_another_kind_of_layer_is_refused(x):
    with pytest.raises(ValueError, match=r"\(2, 13, 2, 4\), got \(2, 13, 7\)"):
        run(Mla(), x, torch.arange(T), Gqa().cache())
    with pytest.raises(ValueError): LatentCache(L, B, T, 7, 2).layer(0).update(torch.zeros(B, T, 7))


@pytest.mark.core
def test_a_layer_writes_its_own_slots_and_does_not_advance(kind, x):
    cache = kind.cache()
    with torch.no_grad(): kind.layers[1](x[:, :5], torch.arange(5), cache.layer(1))
    assert cache.length == 0
    for store in cache.stores:
        assert store[0].eq(0).all() and store[2].eq(0).all() and store[1, :, 5:].eq(0).all()
        assert store[1, :, :5].ne(0).all()


@pytest.mark.core
def test_a_pass_that_fails_half_way_can_be_repeated(kind, x):
    cache = kind.cache()
    run(kind, x[:, :5], torch.arange(5), cache)
    with torch.no_grad(): kind.layers[0](-x[:, 5:9], torch.arange(5, 9), cache.layer(0))  # and no more
    assert cache.length == 5
    close(run(kind, x[:, 5:], torch.arange(5, T), cache), run(kind, x, torch.arange(T))[:, 5:])


@pytest.mark.core
def test_update_copies_nothing_of_the_past():
    cache = KVCache(3, 2, 13, 5, 7)
    cache.length = 9
    k, v = cache.layer(2).update(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7))
    assert k.shape == v.shape == (2, 12, 5, 7)
    assert k.data_ptr() == cache.k[2].data_ptr() and v.data_ptr() == cache.v[2].data_ptr()


@pytest.mark.core
def test_the_cache_keeps_numbers_and_no_graph(kind, x):
    cache = kind.cache()
    y = kind.layers[0](x, torch.arange(T), cache.layer(0))  # gradients are on
    assert y.requires_grad and not any(store.requires_grad for store in cache.stores)
    new = [torch.ones_like(store[0, :, :5]).requires_grad_() for store in cache.stores]
    assert not any(held.requires_grad for held in cache.layer(1).update(*new))


@pytest.mark.parametrize("make, said", [
    (lambda: KVCache(0, 1, 1, 1, 1), "num_layers must be .* at least 1, got 0"),
    (lambda: KVCache(1, 0, 1, 1, 1), "batch_size must be .* at least 1, got 0"),
    (lambda: LatentCache(1, 1, -5, 1, 1), "max_length must be .* at least 1, got -5"),
    (lambda: KVCache(1, 1, 1, 0, 1), "num_kv_heads must be .* at least 1, got 0"),
    (lambda: KVCache(1, 1, 1, 1, 0), "head_dim must be .* at least 1, got 0"),
    (lambda: LatentCache(1, 1, 1, 0, 1), "kv_lora_rank must be .* at least 1, got 0"),
    (lambda: LatentCache(1, 1, 1, 1, 2.0), r"qk_rope_head_dim must be a whole number .*, got 2\.0"),
])
def test_sizes_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said): make()
