"""What must stay true of optimus.attention. Derived in notebooks/04_attention.ipynb."""
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from optimus.attention import GroupedQueryAttention, attend, causal_mask
from optimus.rope import permute_rope

B, S = 2, 7  # every size below differs from every other that could be mixed up with it


def attend_loop(q, k, v, pos_q, pos_k, scale):
    """Softmax attention one number at a time; pos_q: (B, T), pos_k: (B, S)."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    group = q.shape[2] // k.shape[2]
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        seen = [s for s in range(k.shape[1]) if pos_k[b, s] <= pos_q[b, t]]
        scores = [scale * float(q[b, t, h] @ k[b, s, h // group]) for s in seen]
        total = sum(math.exp(score) for score in scores)
        for score, s in zip(scores, seen): y[b, t, h] += math.exp(score) / total * v[b, s, h // group]
    return y


def random_qkv(T, H, H_kv, D=5, D_v=5, dtype=torch.double):
    torch.manual_seed(T * H + H_kv)
    return (torch.randn(B, T, H, D, dtype=dtype), torch.randn(B, S, H_kv, D, dtype=dtype),
            torch.randn(B, S, H_kv, D_v, dtype=dtype))


def random_layer(dim=24, num_heads=6, num_kv_heads=2, **kwargs):
    torch.manual_seed(0)
    layer = GroupedQueryAttention(dim, num_heads, num_kv_heads, **kwargs)
    for p in layer.parameters(): nn.init.normal_(p, std=0.3)
    return layer


@pytest.mark.core
@pytest.mark.parametrize("H, H_kv", [(6, 6), (6, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("T", [1, 3, S])
def test_attend_equals_the_loop_for_every_grouping_and_past(H, H_kv, T):
    q, k, v = random_qkv(T, H, H_kv)
    pos = torch.arange(S - T, S)
    expected = attend_loop(q, k, v, pos.expand(B, T), torch.arange(S).expand(B, S), 5**-0.5)
    torch.testing.assert_close(attend(q, k, v, pos), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_a_query_in_the_middle_of_the_past_does_not_see_what_comes_after_it():
    q, k, v = random_qkv(2, 6, 2)
    pos = torch.tensor([2, 4])
    expected = attend_loop(q, k, v, pos.expand(B, 2), torch.arange(S).expand(B, S), 5**-0.5)
    torch.testing.assert_close(attend(q, k, v, pos), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_each_row_of_the_batch_has_its_own_positions():
    q, k, v = random_qkv(3, 6, 2)
    pos = torch.tensor([[0, 2, 6], [3, 4, 5]])
    expected = attend_loop(q, k, v, pos, torch.arange(S).expand(B, S), 5**-0.5)
    torch.testing.assert_close(attend(q, k, v, pos), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.core
@pytest.mark.parametrize("D_v", [3, 5, 11])
@pytest.mark.parametrize("T", [3, S])
def test_values_may_be_narrower_or_wider_than_keys_and_the_scale_may_be_given(D_v, T):
    q, k, v = random_qkv(T, 6, 2, D_v=D_v)
    pos = torch.arange(S - T, S)
    expected = attend_loop(q, k, v, pos.expand(B, T), torch.arange(S).expand(B, S), 0.37)
    torch.testing.assert_close(attend(q, k, v, pos, scale=0.37), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_the_mask_compares_positions():
    assert causal_mask(torch.tensor([1, 3]), 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert causal_mask(torch.tensor([[0], [2]]), 3).int().tolist() == [[[1, 0, 0]], [[1, 1, 1]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T", [3, S])
def test_attend_keeps_the_dtype_and_rounds_a_few_times_at_most(dtype, T):
    q, k, v = (z.to(dtype) for z in random_qkv(T, 6, 2))
    pos = torch.arange(S - T, S)
    y, exact = attend(q, k, v, pos), attend(q.double(), k.double(), v.double(), pos)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.core
@pytest.mark.parametrize("T", [3, S])
def test_gradients_of_attend(T):
    inputs = [z.requires_grad_() for z in random_qkv(T, 6, 2, D_v=3)]
    pos = torch.arange(S - T, S)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, pos), inputs, fast_mode=True)


def llama(layer, dtype=torch.float32):
    """transformers' LlamaAttention with our weights: it pairs (i, i + D/2), so rows of q and k move."""
    H, H_kv, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    config = LlamaConfig(hidden_size=layer.dim, num_attention_heads=H, num_key_value_heads=H_kv, head_dim=D,
                         rope_parameters={"rope_type": "default", "rope_theta": layer.rope_theta},
                         attn_implementation="sdpa")
    weights = layer.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        weights[name] = permute_rope(weights[name], D, interleaved=False)
    theirs = LlamaAttention(config, layer_idx=0)
    theirs.load_state_dict(weights)
    theirs, rope = theirs.to(dtype), LlamaRotaryEmbedding(config)
    return lambda x, pos: theirs(x, position_embeddings=rope(x, pos), attention_mask=None)[0]


@pytest.mark.core
@pytest.mark.parametrize("dim, H, H_kv, theta",
                         [(42, 3, 3, 1e4), (60, 6, 3, 1e4), (60, 6, 2, 37.0), (28, 7, 1, 1e4)])
def test_the_layer_is_llamas(dim, H, H_kv, theta):
    layer = random_layer(dim, H, H_kv, rope_theta=theta)
    x, pos = torch.randn(B, S, dim), torch.tensor([[0], [11]]) + torch.arange(S)
    torch.testing.assert_close(layer(x, pos), llama(layer)(x, pos), rtol=1e-5, atol=1e-5)


def test_the_layer_is_llamas_in_bfloat16():
    layer = random_layer(60, 6, 2).bfloat16()
    x, pos = torch.randn(B, S, 60, dtype=torch.bfloat16), torch.arange(S)
    y, expected = layer(x, pos), llama(layer, torch.bfloat16)(x, pos[None])
    assert y.dtype == torch.bfloat16
    atol = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)


@pytest.mark.core
def test_groups_are_multi_head_attention_with_copied_heads():
    gqa, mha = random_layer(24, 6, 2).double(), random_layer(24, 6, 6).double()
    weights = gqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].unflatten(0, (2, 4))
        weights[name] = torch.cat([heads[h // 3] for h in range(6)])
    mha.load_state_dict(weights)
    x, pos = torch.randn(B, S, 24).double(), torch.arange(S)
    torch.testing.assert_close(gqa(x, pos), mha(x, pos), rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_only_distances_count_in_each_row():
    layer = random_layer().double()
    x, pos = torch.randn(B, S, 24).double(), torch.arange(S)
    shifted = pos + torch.tensor([[0], [997]])
    torch.testing.assert_close(layer(x, shifted), layer(x, pos), rtol=1e-9, atol=1e-9)
    assert (layer(x, 3 * pos) - layer(x, pos)).abs().max() > 0.01  # and they do count


@pytest.mark.core
def test_a_later_token_changes_nothing_before_it():
    layer = random_layer()
    x, pos = torch.randn(B, S, 24), torch.arange(S)
    other = x.clone()
    other[:, 4] += 1
    changed = (layer(other, pos) != layer(x, pos)).any(-1).any(0)
    assert changed.tolist() == [False] * 4 + [True] * 3


@pytest.mark.core
def test_gradients_of_the_layer():
    layer = random_layer(12, 3, 1).double()
    x = torch.randn(B, 3, 12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, torch.arange(3)), x, fast_mode=True)
    layer(x, torch.arange(3)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.core
def test_dropout_falls_on_the_output_and_only_in_training():
    layer = random_layer(dropout=0.5)
    x, pos = torch.randn(B, S, 24), torch.arange(S)
    y = layer(x, pos)
    kept = y != 0
    assert 0.3 < kept.float().mean() < 0.7
    expected = layer.eval()(x, pos)
    torch.testing.assert_close(y[kept], 2 * expected[kept])


@pytest.mark.parametrize("args, said", [
    ((25, 6, 2), r"num_heads must divide dim = 25, got 6"),
    ((24, 6, 4), r"num_kv_heads must divide num_heads = 6, got 4"),
    ((24, 6, 12), r"num_kv_heads must divide num_heads = 6, got 12"),
    ((18, 6, 2), r"even for RoPE, got 18 / 6 = 3"),
    ((0, 6, 2), r"dim must be .* at least 1, got 0"),
    ((24, 0, 1), r"num_heads must be .* at least 1, got 0"),
    ((24, 6, -1), r"num_kv_heads must be .* at least 1, got -1"),
    ((24, 6, 2.0), r"num_kv_heads must be a whole number .*, got 2\.0"),
])
def test_sizes_that_do_not_fit_are_refused(args, said):
    with pytest.raises(ValueError, match=said): GroupedQueryAttention(*args)


@pytest.mark.parametrize("x_shape, pos_shape, said", [
    ((B, S, 23), (S,), r"\(B, T, 24\), got \(2, 7, 23\)"),
    ((S, 24), (S,), r"\(B, T, 24\), got \(7, 24\)"),
    ((B, S, 24), (1,), r"of x \(2, 7, 24\), got \(1,\)"),
    ((B, S, 24), (S + 1,), r"of x \(2, 7, 24\), got \(8,\)"),
    ((B, S, 24), (B + 1, S), r"of x \(2, 7, 24\), got \(3, 7\)"),
])
def test_wrong_shapes_say_so(x_shape, pos_shape, said):
    with pytest.raises(ValueError, match=said):
        random_layer()(torch.randn(x_shape), torch.zeros(pos_shape, dtype=torch.long))


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("shape", [(1,), (), (B, 1), (S + 1,)])
def test_positions_that_would_broadcast_are_refused(past, shape):
    q, k = torch.randn(B, S, 4, 6), torch.randn(B, S + past, 4, 6)
    with pytest.raises(ValueError, match=r"pos must have shape \(7,\) or \(2, 7\), got"):
        attend(q, k, k, torch.zeros(shape, dtype=torch.long))


def test_heads_that_cannot_share_evenly_are_refused():
    q, k = torch.randn(B, S, 5, 6), torch.randn(B, S, 2, 6)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key/value heads"):
        attend(q, k, k, torch.arange(S))
