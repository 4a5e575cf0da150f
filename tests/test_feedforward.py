"""What must stay true of optimus.feedforward. Derived in notebooks/03_swiglu.ipynb."""
import math
import re

import pytest
import torch

from optimus.feedforward import SwiGLU

B, T, C, HIDDEN = 2, 3, 7, 11  # distinct primes: mixing up two axes cannot pass
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return SwiGLU(C, HIDDEN)


def by_hand(mlp, token):
    """One token through loops over Python's own numbers."""
    gate, up, down = (layer.weight.tolist() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    z = [sum(w * x for w, x in zip(row, token)) for row in gate]
    content = [sum(w * x for w, x in zip(row, token)) for row in up]
    hidden = [a / (1 + math.exp(-a)) * b for a, b in zip(z, content)]
    return [sum(w * h for w, h in zip(row, hidden)) for row in down]


@pytest.mark.core
def test_is_the_loop_over_one_token_at_a_time(mlp):
    mlp, x = mlp.double(), 3 * torch.randn(B, T, C, dtype=torch.double)
    loop = torch.tensor([[by_hand(mlp, token) for token in row] for row in x.tolist()], dtype=torch.double)
    torch.testing.assert_close(mlp(x), loop, rtol=0, atol=1e-13)


@pytest.mark.core
def test_agrees_with_llama_and_takes_its_state_dict(mlp):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=C, intermediate_size=HIDDEN, num_attention_heads=C))
    mlp.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, C)
    torch.testing.assert_close(mlp(x), theirs(x), rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.core
def test_has_three_matrices_and_nothing_else(mlp):
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "gate_proj.weight": (HIDDEN, C), "up_proj.weight": (HIDDEN, C), "down_proj.weight": (C, HIDDEN)}
    assert set(mlp.state_dict()) == set(dict(mlp.named_parameters()))


@pytest.mark.core
def test_two_hidden_units_multiply_two_numbers():
    mlp = SwiGLU(2, 2)
    mlp.load_state_dict({"gate_proj.weight": torch.tensor([[1.0, 0], [-1, 0]]),
                         "up_proj.weight": torch.tensor([[0.0, 1], [0, 1]]),
                         "down_proj.weight": torch.tensor([[1.0, -1], [0, 0]])})
    x = torch.tensor([[3.0, 5.0], [-2.0, 4.0], [0.5, -0.5]])
    torch.testing.assert_close(mlp(x)[:, 0], x.prod(-1), rtol=4 * EPS, atol=0)


@pytest.mark.core
def test_no_token_sees_another_and_any_leading_axes_will_do(mlp):
    x = torch.randn(B, T, 5, C)
    torch.testing.assert_close(mlp(x)[1, 2, 3], mlp(x[1, 2, 3]), rtol=8 * EPS, atol=8 * EPS)
    assert mlp(x[:0]).shape == (0, T, 5, C)


@pytest.mark.core
def test_dropout_zeroes_outputs_and_scales_the_rest_up_while_training():
    torch.manual_seed(0)
    p = 0.3
    mlp, x = SwiGLU(C, HIDDEN, dropout=p), torch.randn(1009, C)
    y, full = mlp(x), mlp.eval()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], full[kept] / (1 - p), rtol=8 * EPS, atol=8 * EPS)
    assert abs((~kept).float().mean() - p) < 4 * (p * (1 - p) / y.numel()) ** 0.5  # four standard errors
    assert (~kept).all(-1).float().mean() < 0.01  # each number on its own, not whole tokens: p**7 is 0.0002


@pytest.mark.core
def test_no_dropout_in_eval_mode_or_by_default():
    torch.manual_seed(0)
    dropping, plain, x = SwiGLU(C, HIDDEN, dropout=0.9).eval(), SwiGLU(C, HIDDEN), torch.randn(B, T, C)
    plain.load_state_dict(dropping.state_dict())
    assert torch.equal(dropping(x), plain(x)) and torch.equal(plain(x), plain.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(mlp, dtype):
    x = torch.randn(B, T, C, dtype=dtype)
    y, exact = mlp.to(dtype)(x), mlp.double()(x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_autocast_runs_float32_weights_in_bfloat16(mlp):
    x = torch.randn(B, T, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(x), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.core
def test_gradient(mlp):
    mlp, x = mlp.double(), torch.randn(B, C, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *mlp.parameters()))


@pytest.mark.parametrize("shape", [(B, T, C + 1), (C, B), ()])
def test_wrong_width_says_so(mlp, shape):
    with pytest.raises(ValueError, match=re.escape(f"SwiGLU({C}) got x of shape {shape}")):
        mlp(torch.randn(shape))


@pytest.mark.parametrize("sizes", [(0, 11), (7, 0), (-7, 11)])
def test_sizes_below_1_are_refused(sizes):
    with pytest.raises(ValueError, match=re.escape(f"must be positive, got {sizes[0]} and {sizes[1]}")):
        SwiGLU(*sizes)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_outside_0_to_1_is_refused(dropout):
    with pytest.raises(ValueError, match=re.escape(f"dropout must be in [0, 1), got {dropout}")):
        SwiGLU(C, HIDDEN, dropout)
