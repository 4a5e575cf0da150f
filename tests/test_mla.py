"""What must stay true of optimus.mla. Derived in notebooks/05_mla.ipynb."""
import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from optimus.mla import MultiHeadLatentAttention, absorbed_attend

B, T = 2, 13
# (dim, heads, sizes). transformers' complex RoPE wants even kv_lora_rank + rope and even nope + rope.
KEYS = "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
NARROW_V = 33, 3, dict(zip(KEYS, (11, 22, 10, 6, 7)))
WIDE_V = 35, 5, dict(zip(KEYS, (17, 6, 4, 2, 19)))
ONE_HEAD = 14, 1, dict(zip(KEYS, (3, 26, 12, 10, 5)))
SHAPES = [NARROW_V, WIDE_V, ONE_HEAD]
NAMES = dict(q_down_proj="q_a_proj", q_norm="q_a_layernorm", q_up_proj="q_b_proj", kv_norm="kv_a_layernorm",
             kv_down_proj="kv_a_proj_with_mqa", kv_up_proj="kv_b_proj", o_proj="o_proj")


def random_layer(shape=NARROW_V, dtype=torch.double, **kwargs):
    torch.manual_seed(0)
    dim, H, sizes = shape
    layer = MultiHeadLatentAttention(dim, H, **sizes, **kwargs)
    for p in layer.parameters():  # gains of one would hide a forgotten gain
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    return layer.to(dtype)


def inputs(shape=NARROW_V, dtype=torch.double):
    torch.manual_seed(1)
    return torch.randn(B, T, shape[0], dtype=dtype), torch.arange(T)


def deepseek(layer, shape, dtype):
    dim, H, sizes = shape
    config = DeepseekV2Config(hidden_size=dim, num_attention_heads=H, num_key_value_heads=H,
                              rope_parameters={"rope_type": "default", "rope_theta": layer.rope_theta},
                              attn_implementation="sdpa", **sizes)
    theirs = modeling_deepseek_v2.DeepseekV2Attention(config, layer_idx=0).to(dtype)
    theirs.load_state_dict({f"{NAMES[key.split('.')[0]]}.weight": w for key, w in layer.state_dict().items()})
    rope = modeling_deepseek_v2.DeepseekV2RotaryEmbedding(config)
    return lambda x, pos: theirs(x, attention_mask=None, position_embeddings=rope(x, pos))[0]


def both_forms(layer, x, pos):
    parts = *layer.queries(x, pos), *layer.latents(x, pos), pos
    return [layer.o_proj(form(*parts).flatten(-2)) for form in (layer.expanded, layer.absorbed)]


class Memory:
    """The plainest cache there is."""
    def __init__(self): self.kept = None

    def update(self, *new):
        self.kept = new if self.kept is None else [torch.cat(pair, dim=1) for pair in zip(self.kept, new)]
        return self.kept


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("theta", [10000.0, 37.0])
def test_both_forms_are_deepseeks_attention(shape, theta):
    layer = random_layer(shape, torch.float32, rope_theta=theta)
    x, pos = inputs(shape, torch.float32)
    rows = pos + torch.tensor([[0], [29]])  # each row starts elsewhere
    expected = deepseek(layer, shape, torch.float32)(x, rows)
    tolerance = dict(rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item()))
    for y in (layer(x, rows), *both_forms(layer, x, rows)):
        torch.testing.assert_close(y, expected, **tolerance)


def test_both_forms_are_deepseeks_attention_in_bfloat16():
    layer = random_layer(dtype=torch.bfloat16)
    x, pos = inputs(dtype=torch.bfloat16)
    expected = deepseek(layer, NARROW_V, torch.bfloat16)(x, pos[None])
    atol = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    for y in both_forms(layer, x, pos):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0, atol=atol)


@pytest.mark.core
@pytest.mark.parametrize("prefill", range(1, T))
def test_token_by_token_on_the_latents_is_deepseeks_full_pass(prefill):
    layer, memory = random_layer(dtype=torch.float32), Memory()
    x, pos = inputs(dtype=torch.float32)
    cuts = [(0, prefill), *((t, t + 1) for t in range(prefill, T))]
    y = torch.cat([layer(x[:, a:b], pos[a:b], memory) for a, b in cuts], dim=1)
    expected = deepseek(layer, NARROW_V, torch.float32)(x, pos[None])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert sum(part[0, 0].numel() for part in memory.kept) == 22 + 6


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("new", [1, 5, T])
def test_absorbed_equals_expanded_on_any_past(shape, new):
    layer = random_layer(shape)
    x, pos = inputs(shape)
    parts = *layer.queries(x[:, -new:], pos[-new:]), *layer.latents(x, pos), pos[-new:]
    torch.testing.assert_close(layer.absorbed(*parts), layer.expanded(*parts), rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_each_row_sees_up_to_its_own_position():
    layer = random_layer()
    x, pos = inputs()
    rows = torch.tensor([[0, 5, 12], [3, 4, 9]])
    q = layer.queries(x[:, :3], rows)
    memory = layer.latents(x, pos)
    alone = []
    for b in range(B):
        for t in range(3):
            seen = rows[b, t] + 1
            one = [z[b : b + 1, t : t + 1] for z in q] + [z[b : b + 1, :seen] for z in memory]
            alone.append(layer.expanded(*one, rows[b, t : t + 1]))
    expected = torch.cat(alone, dim=1).unflatten(1, (B, 3))[0]
    for form in (layer.expanded, layer.absorbed):
        torch.testing.assert_close(form(*q, *memory, rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.core
def test_decoding_builds_no_key_or_value(monkeypatch):
    layer, memory = random_layer(), Memory()
    x, pos = inputs()
    layer(x[:, :5], pos[:5], memory)
    monkeypatch.setattr(layer, "expanded", lambda *_: pytest.fail("keys and values were built"))
    monkeypatch.setattr(layer.kv_up_proj, "forward", lambda *_: pytest.fail("the latents were expanded"))
    layer(x[:, 5:6], pos[5:6], memory)
    layer(x[:, 6:], pos[6:], memory)


@pytest.mark.core
@pytest.mark.parametrize("new", [64, 65])
def test_the_border_between_the_two_forms_cannot_be_seen(new):
    layer, S = random_layer(), 70
    x, pos = torch.randn(1, S, 33).double(), torch.arange(S)
    memory = Memory()
    layer(x[:, : S - new], pos[: S - new], memory)
    y = layer(x[:, S - new :], pos[S - new :], memory)
    torch.testing.assert_close(y, layer(x, pos)[:, S - new :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, ulps", [(torch.float16, 3), (torch.bfloat16, 3), (torch.float32, 30)])
def test_absorbed_keeps_the_dtype_and_rounds_a_few_times_at_most(dtype, ulps):
    torch.manual_seed(0)
    H, d_nope, d_rope, r, d_v, S = 3, 5, 2, 11, 7, 1009  # 1009 weights that must add up to 1
    shapes = (B, 1, H, d_nope), (B, 1, H, d_rope), (B, S, r), (B, S, d_rope), (H, d_nope, r), (H, d_v, r)
    parts = [torch.randn(shape) for shape in shapes]
    parts[-2] *= 0.01  # nearly equal weights
    parts = [part.to(dtype) for part in parts]
    y, exact = absorbed_attend(*parts, torch.tensor([S - 1])), absorbed_attend(
        *(part.double() for part in parts), torch.tensor([S - 1]))
    assert y.dtype == dtype
    atol = ulps * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)


@pytest.mark.core
def test_gradients_of_both_forms_agree_and_are_right():
    layer = random_layer()
    x, pos = inputs()
    gradients = [torch.autograd.grad(both_forms(layer, x, pos)[form].square().sum(), layer.parameters())
                 for form in (0, 1)]
    for name, a, b in zip(dict(layer.named_parameters()), *gradients):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    small = x[:, :3].clone().requires_grad_()
    for form in (0, 1):
        def forward(x, form=form): return both_forms(layer, x, pos[:3])[form]
        assert torch.autograd.gradcheck(forward, small, fast_mode=True)


@pytest.mark.core
def test_only_distances_count():
    layer = random_layer()
    x, pos = inputs()
    rows = pos + torch.tensor([[0], [997]])
    torch.testing.assert_close(layer(x, rows), layer(x, pos), rtol=1e-9, atol=1e-9)
    assert (layer(x, 3 * pos) - layer(x, pos)).abs().max() > 0.01  # and they do count


@pytest.mark.core
def test_a_later_token_changes_nothing_before_it():
    layer = random_layer()
    x, pos = inputs()
    other = x.clone()
    other[:, 4] += 1
    for a, b in zip(both_forms(layer, x, pos), both_forms(layer, other, pos)):
        assert (a != b).any(-1).any(0).tolist() == [False] * 4 + [True] * 9


@pytest.mark.core
def test_a_token_is_remembered_as_rank_plus_rope_numbers_after_the_norm():
    layer = random_layer()
    x, pos = inputs()
    c_kv, k_rope = layer.latents(x, pos)
    assert c_kv.shape == (B, T, 22) and k_rope.shape == (B, T, 6)
    torch.testing.assert_close((c_kv / layer.kv_norm.weight).square().mean(-1), torch.ones(B, T).double(),
                               rtol=1e-5, atol=0)


@pytest.mark.core
def test_dropout_falls_on_the_output_and_only_in_training():
    layer = random_layer(dropout=0.5)
    x, pos = inputs()
    y = layer(x, pos)
    kept = y != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(y[kept], 2 * layer.eval()(x, pos)[kept])


@pytest.mark.parametrize("change, said", [
    (dict(qk_rope_head_dim=5), r"qk_rope_head_dim must be even for RoPE, got 5"),
    (dict(kv_lora_rank=0), r"kv_lora_rank must be .* at least 1, got 0"),
    (dict(q_lora_rank=-3), r"q_lora_rank must be .* at least 1, got -3"),
    (dict(qk_nope_head_dim=0), r"qk_nope_head_dim must be .* at least 1, got 0"),
    (dict(v_head_dim=7.0), r"v_head_dim must be a whole number .*, got 7\.0"),
    (dict(num_heads=0), r"num_heads must be .* at least 1, got 0"),
])
def test_sizes_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        MultiHeadLatentAttention(**{"dim": 33, "num_heads": 3, **NARROW_V[2], **change})


@pytest.mark.parametrize("x_shape, pos_shape, said", [
    ((B, T, 32), (T,), r"\(B, T, 33\), got \(2, 13, 32\)"),
    ((T, 33), (T,), r"\(B, T, 33\), got \(13, 33\)"),
    ((B, T, 33), (1,), r"of x \(2, 13, 33\), got \(1,\)"),
    ((B, T, 33), (B + 1, T), r"of x \(2, 13, 33\), got \(3, 13\)"),
])
def test_wrong_shapes_say_so(x_shape, pos_shape, said):
    with pytest.raises(ValueError, match=said):
        random_layer()(torch.randn(x_shape).double(), torch.zeros(pos_shape, dtype=torch.long))


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("shape", [(1,), (), (B, 1), (T + 1,)])
def test_positions_that_would_broadcast_are_refused(past, shape):
    q_nope, q_rope, c_kv, k_rope = (torch.randn(*s) for s in [(B, T, 3, 5), (B, T, 3, 2), (B, T + past, 9),
                                                              (B, T + past, 2)])
    with pytest.raises(ValueError, match=r"pos must have shape \(13,\) or \(2, 13\), got"):
        absorbed_attend(q_nope, q_rope, c_kv, k_rope, torch.randn(3, 5, 9), torch.randn(3, 4, 9),
                        torch.zeros(shape, dtype=torch.long))
