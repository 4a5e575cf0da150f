"""What must stay true of optimus.rope. Derived in notebooks/01_rope.ipynb.

Positions start above 0 and differ between the rows of a batch: at position 0 every wrong rotation is right.
"""
import cmath
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimus.rope import apply_rope, permute_rope, rope_angles

B, T, H, D = 2, 3, 5, 14  # distinct; D/2 = 7 is prime
PLACES = st.integers(0, 5000)
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(B, T, H, D)


POS = torch.tensor([[1, 17, 1999], [5, 3, 101]])  # (B, T)
ROPE_700 = {"rope_type": "default", "rope_theta": 700.0}  # not the default theta, for transformers


def by_hand(x, pos, theta, interleaved):
    """One complex multiplication per pair, with Python's own complex numbers."""
    y, half = x.clone(), x.shape[-1] // 2
    for b, t, h, i in product(range(B), range(T), range(H), range(half)):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        z = complex(x[b, t, h, first], x[b, t, h, second])
        z *= cmath.exp(1j * pos[b, t].item() * theta ** (-2 * i / x.shape[-1]))
        y[b, t, h, first], y[b, t, h, second] = z.real, z.imag
    return y


@LAYOUTS
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_is_a_complex_multiplication_by_hand(x, theta, interleaved):
    y = apply_rope(x.double(), POS, theta, interleaved)
    torch.testing.assert_close(y, by_hand(x.double(), POS, theta, interleaved), rtol=0, atol=1e-11)


@pytest.mark.core
def test_defaults_are_theta_10000_and_interleaved(x):
    assert torch.equal(apply_rope(x, POS), apply_rope(x, POS, 10000.0, True))


@pytest.mark.core
def test_half_split_is_the_rotation_of_transformers_llama(x):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, rope_parameters=ROPE_700)
    cos, sin = LlamaRotaryEmbedding(config)(x, POS)
    q, k = apply_rotary_pos_emb(x.transpose(1, 2), x.flip(-1).transpose(1, 2), cos, sin)
    eps = torch.finfo(x.dtype).eps
    for mine, theirs in ((x, q), (x.flip(-1), k)):
        y = apply_rope(mine, POS, theta=700.0, interleaved=False)
        torch.testing.assert_close(y, theirs.transpose(1, 2), rtol=8 * eps, atol=8 * eps)


@pytest.mark.core
def test_interleaved_is_the_rotation_of_transformers_deepseek_v2(x):
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs_v2

    config = DeepseekV2Config(qk_rope_head_dim=D, rope_parameters=ROPE_700)
    phase = theirs_v2.DeepseekV2RotaryEmbedding(config)(x, POS)
    q, k = theirs_v2.apply_rotary_emb(x.transpose(1, 2), x.flip(-1).transpose(1, 2), phase)
    eps = torch.finfo(x.dtype).eps
    for mine, theirs in ((x, q), (x.flip(-1), k)):
        y = apply_rope(mine, POS, theta=700.0)
        torch.testing.assert_close(y, theirs.transpose(1, 2), rtol=8 * eps, atol=8 * eps)


@LAYOUTS
@settings(deadline=None, max_examples=50)
@given(m=PLACES, n=PLACES, shift=st.integers(-5000, 5000), seed=st.integers(0, 99))
def test_scores_depend_on_the_distance_only(interleaved, m, n, shift, seed):
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.double, generator=torch.Generator().manual_seed(seed))

    def score(m, n):
        q_m, k_n = (apply_rope(x, torch.tensor([p]), interleaved=interleaved) for x, p in ((q, m), (k, n)))
        return (q_m * k_n).sum()

    torch.testing.assert_close(score(m + shift, n + shift), score(m, n), rtol=0, atol=1e-9)


@pytest.mark.core
@LAYOUTS
def test_keeps_lengths_and_is_the_identity_at_position_0(x, interleaved):
    y = apply_rope(x, POS, interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(apply_rope(x, torch.zeros(T, dtype=torch.long), interleaved=interleaved), x)


@pytest.mark.core
@LAYOUTS
def test_positions_of_shape_T_serve_every_row(x, interleaved):
    for b in range(B):
        alone = apply_rope(x, POS[b], interleaved=interleaved)
        assert torch.equal(alone[b], apply_rope(x, POS, interleaved=interleaved)[b])


@pytest.mark.core
@LAYOUTS
def test_any_chunk_of_the_sequence_can_be_rotated_alone(x, interleaved):
    whole = apply_rope(x, POS, interleaved=interleaved)
    parts = [apply_rope(x[:, t:t + 1], POS[:, t:t + 1], interleaved=interleaved) for t in range(T)]
    assert torch.equal(torch.cat(parts, 1), whole)


@LAYOUTS
def test_no_token_at_all_gives_none(x, interleaved):
    assert apply_rope(x[:, :0], POS[:, :0], interleaved=interleaved).shape == (B, 0, H, D)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(x, dtype, interleaved):
    x = x.to(dtype)
    y = apply_rope(x, POS, interleaved=interleaved)
    wide = apply_rope(x.float(), POS, interleaved=interleaved)
    assert y.dtype == dtype and wide.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide, rtol=0.51 * torch.finfo(dtype).eps, atol=0)


def test_float32_angles_stay_exact_where_bfloat16_ones_do_not():
    pos = torch.arange(4096)
    exact = pos[:, None].double() * 10000.0 ** (-torch.arange(D // 2).double() * 2 / D)
    assert (rope_angles(pos, D) - exact).abs().max() < 4096 * 2 * torch.finfo(torch.float32).eps
    assert (rope_angles(pos, D, dtype=torch.bfloat16) - exact).abs().max() > 1


@LAYOUTS
def test_autocast_changes_nothing(x, interleaved):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply_rope(x, POS, interleaved=interleaved)
    assert torch.equal(y, apply_rope(x, POS, interleaved=interleaved))


@LAYOUTS
def test_gradient(x, interleaved):
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, POS, interleaved=interleaved), x)


@LAYOUTS
def test_compiles_into_one_graph(x, interleaved):
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    for pos in (POS, POS[0]):
        args = x, pos, 700.0, interleaved
        torch.testing.assert_close(compiled(*args), apply_rope(*args))


@LAYOUTS
def test_works_on_the_device_of_x(x, interleaved):
    y = apply_rope(x.to("meta"), POS.to("meta"), interleaved=interleaved)  # others raise
    assert y.device.type == "meta" and y.shape == x.shape


@pytest.mark.core
@LAYOUTS
def test_input_is_not_changed_and_strides_do_not_matter(x, interleaved):
    before = x.clone()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = apply_rope(strided, POS, interleaved=interleaved)
    assert torch.equal(y, apply_rope(x, POS, interleaved=interleaved))
    assert torch.equal(x, before)


C = 11


@pytest.mark.core
@pytest.mark.parametrize("interleaved", [True, False], ids=["half_to_interleaved", "interleaved_to_half"])
def test_permuted_weights_keep_every_score(interleaved):
    torch.manual_seed(0)
    x, (W_q, W_k) = torch.randn(B, T, C, dtype=torch.double), torch.randn(2, H * D, C, dtype=torch.double)

    def scores(weights, interleaved):
        q, k = (apply_rope((x @ W.T).unflatten(-1, (H, D)), POS, interleaved=interleaved) for W in weights)
        return torch.einsum("bthd,bshd->bhts", q, k)

    moved = [permute_rope(W, D, interleaved=interleaved) for W in (W_q, W_k)]
    torch.testing.assert_close(scores(moved, interleaved), scores((W_q, W_k), not interleaved))
    assert not torch.allclose(scores((W_q, W_k), interleaved), scores((W_q, W_k), not interleaved))


@pytest.mark.core
def test_permute_rope_is_the_conversion_of_transformers_and_is_undone_by_its_other_direction():
    weight = torch.randn(H * D, C)
    half = permute_rope(weight, D, interleaved=False)
    assert torch.equal(half, weight.view(H, D // 2, 2, C).transpose(1, 2).reshape(H * D, C))
    assert torch.equal(permute_rope(half, D, interleaved=True), weight)
    assert torch.equal(permute_rope(weight[:, 0], D, interleaved=False), half[:, 0])  # a bias
    assert permute_rope(weight, 2, interleaved=False).data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("shape, pos, theta, message", [
    ((2, 3, 5, 7), (3,), 1e4, "even and positive, got x of shape (2, 3, 5, 7)"),
    ((2, 3, 5, 0), (3,), 1e4, "even and positive, got x of shape (2, 3, 5, 0)"),
    ((3, 5, 14), (3,), 1e4, "(B, T, H, D), got (3, 5, 14)"),
    ((2, 3, 5, 14), (5,), 1e4, "pos must have shape (3,) or (2, 3) for x of shape (2, 3, 5, 14), got (5,)"),
    ((2, 3, 5, 14), (1,), 1e4, "got (1,)"),
    ((2, 3, 5, 14), (), 1e4, "got ()"),
    ((2, 3, 5, 14), (2, 1), 1e4, "got (2, 1)"),
    ((2, 3, 5, 14), (3, 2), 1e4, "got (3, 2)"),
    ((2, 3, 5, 14), (3,), 0.0, "theta must be positive, got 0.0"),
    ((2, 3, 5, 14), (3,), -1e4, "theta must be positive, got -10000.0"),
    ((2, 3, 5, 14), (3,), float("nan"), "theta must be positive, got nan"),
])
@LAYOUTS
def test_wrong_arguments_say_so(shape, pos, theta, message, interleaved):
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_rope(torch.randn(shape), torch.zeros(pos, dtype=torch.long), theta, interleaved)


@pytest.mark.parametrize("head_dim", [7, 0, -2, 4])
def test_permute_rope_refuses_what_is_not_whole_heads(head_dim):
    with pytest.raises(ValueError, match=f"70 rows.*got {head_dim}"):
        permute_rope(torch.randn(H * D, C), head_dim, interleaved=True)


@LAYOUTS
def test_whole_numbers_are_refused(interleaved):
    with pytest.raises(ValueError, match="x must hold floating-point numbers, got torch.int64"):
        apply_rope(torch.ones(2, 3, 5, 14, dtype=torch.long), torch.arange(3), interleaved=interleaved)
