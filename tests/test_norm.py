"""What must stay true of optimus.norm. Derived in notebooks/02_rmsnorm.ipynb."""
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from optimus.norm import RMSNorm

B, T, C = 2, 3, 7  # distinct primes: mixing up two axes cannot pass


@pytest.fixture
def norm():
    torch.manual_seed(0)
    norm = RMSNorm(C)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # all ones would hide a forgotten gain
    return norm


@pytest.mark.parametrize("dtype, ulps", [(torch.float16, 0.51), (torch.bfloat16, 0.51),
                                         (torch.float32, 8), (torch.float64, 8)])
@pytest.mark.parametrize("scale", [1e-3, 1, 1000])  # 1e-3 is sqrt(eps); 1000**2 overflows float16
def test_agrees_with_torch_and_rounds_once(norm, dtype, ulps, scale):
    x = (scale * torch.randn(B, T, C, dtype=torch.double)).to(dtype)
    exact = F.rms_norm(x.double(), (C,), norm.weight.double(), norm.eps)
    y = norm.double()(x) if dtype == torch.float64 else norm(x)
    assert y.dtype == dtype
    limits = torch.finfo(dtype)
    torch.testing.assert_close(y.double(), exact, rtol=ulps * limits.eps, atol=limits.tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gain_multiplies_before_the_one_rounding(norm, dtype):
    x, norm = torch.randn(1009, C).to(dtype), norm.to(dtype)
    exact = F.rms_norm(x.double(), (C,), norm.weight.double(), norm.eps)
    torch.testing.assert_close(norm(x).double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.core
def test_agrees_with_llama_and_takes_its_state_dict(norm):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(C, eps=norm.eps)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(B, T, C)
    torch.testing.assert_close(norm(x), theirs(x), rtol=8 * torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.core
def test_forgets_scale_but_not_shift(norm):
    x = torch.randn(B, T, C)
    torch.testing.assert_close(norm(10 * x), norm(x), rtol=1e-4, atol=1e-5)
    assert (norm(x + 10) - norm(x)).abs().max() > 0.1


@pytest.mark.core
@settings(deadline=None, max_examples=50)
@given(size=st.floats(0.1, 1e15), width=st.sampled_from([1, 2, 5, 61]), seed=st.integers(0, 999))
def test_a_new_norm_gives_every_token_size_one(size, width, seed):
    x = size * F.normalize(torch.randn(T, width, generator=torch.Generator().manual_seed(seed)), dim=-1)
    y = RMSNorm(width)(x * width**0.5)
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(T), rtol=2e-4, atol=0)


@pytest.mark.core
def test_no_token_sees_another(norm):
    x = torch.randn(B, T, C)
    changed = x.clone()
    changed[:, -1] *= 100
    assert torch.equal(norm(changed)[:, :-1], norm(x)[:, :-1])


@pytest.mark.core
def test_zero_stays_zero(norm):
    assert norm(torch.zeros(B, T, C)).eq(0).all()


@pytest.mark.core
def test_gradient(norm):
    x = torch.randn(B, T, C, dtype=torch.double, requires_grad=True)
    norm = norm.double()
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))


@pytest.mark.core
def test_any_number_of_leading_axes(norm):
    x = torch.randn(B, T, 5, C)
    torch.testing.assert_close(norm(x)[1, 2, 3], norm(x[1, 2, 3]))
    assert norm(x[:0]).shape == (0, T, 5, C)


def test_autocast_leaves_the_dtype_and_the_numbers(norm):
    x = torch.randn(B, T, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, low = norm(x), norm(x.bfloat16())
    assert torch.equal(inside, norm(x)) and low.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(B, T, C + 1), (C, B), ()])
def test_wrong_width_says_so(norm, shape):
    with pytest.raises(ValueError, match=r"RMSNorm\(7\).*" + re.escape(str(shape))):
        norm(torch.randn(shape))


def test_whole_numbers_are_refused(norm):
    with pytest.raises(ValueError, match="x must hold floating-point numbers, got torch.int64"):
        norm(torch.ones(B, T, C, dtype=torch.long))


@pytest.mark.parametrize("dim, eps", [(0, 1e-6), (-7, 1e-6), (7, -1e-6), (7, float("nan"))])
def test_sizes_that_make_no_norm_are_refused(dim, eps):
    with pytest.raises(ValueError, match=f"eps at least 0, got {dim} and {eps}"): RMSNorm(dim, eps)


@pytest.mark.core
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
def test_eps_is_the_one_given(eps):
    x = torch.randn(B, T, C) / 10
    torch.testing.assert_close(RMSNorm(C, eps)(x), F.rms_norm(x, (C,), eps=eps))
