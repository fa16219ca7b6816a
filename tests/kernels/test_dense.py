"""The private ATen operators that the decomposition calls keep the contract it relies on."""

import math

import pytest
import torch
from torch import Tensor

from evdit_opt.kernels import dense

SHAPES = [(1, 2, 5, 7, 16), (2, 3, 70, 33, 24), (1, 1, 1, 600, 64)]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    return torch.softmax(logits if bias is None else logits + bias, -1) @ v


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, queries, keys, width = shape
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, width, dtype=dtype).transpose(1, 2)
            for n in (queries, keys, keys)]  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True], ids=["fused", "chunked"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(
    shape: tuple[int, int, int, int, int],
    with_bias: bool,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(shape, torch.float64))
    bias = torch.randn(1, 1, 1, shape[3], dtype=torch.float64) if with_bias else None
    exact = plain(q, k, v, bias, 0.2)
    grad = torch.randn_like(exact)
    exact_grads = torch.autograd.grad(exact, (q, k, v), grad)
    monkeypatch.setattr(dense, "CHUNK_LOGITS", 100)  # several chunks
    with torch.no_grad():
        attend = dense._attend_in_chunks if chunked else dense.attend
        backward = dense._attend_backward_in_chunks if chunked else dense.attend_backward
        out, lse = attend(q, k, v, bias, 0.2)
        grads = backward(grad, q, k, v, bias, out, lse, 0.2)
    torch.testing.assert_close(out, exact)
    logits = q @ k.transpose(-1, -2) * 0.2
    torch.testing.assert_close(lse, torch.logsumexp(logits if bias is None else logits + bias, -1))
    for mine, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("hidden", [0, 20], ids=["plain", "first keys hidden"])
@pytest.mark.parametrize("keys", [15, 16, 23, 24, 33, 50])
def test_few_queries_take_the_keys_in_stretches(
    keys: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors((2, 3, 7, keys, 16), torch.float64)
    bias = torch.zeros(1, 1, 1, keys, dtype=torch.float64) if hidden else None
    if bias is not None:
        bias[..., : min(hidden, keys - 1)] = -math.inf  # whole stretches without a key
    whole, lse = dense.attend(q, k, v, bias, 0.2)
    monkeypatch.setattr(dense, "CPU_KEY_STRETCH", 16)
    out, out_lse = dense.attend(q, k, v, bias, 0.2)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(out_lse, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_lowest_number_hides_and_stays_finite(dtype: torch.dtype) -> None:
    """In the kernels' dtype and base 2: a piece of keys hidden like this is merged, not NaN."""
    lowest = torch.tensor([torch.finfo(torch.float32).min, -math.inf, -3.5]).view(1, 1, 1, 3)
    bias = dense.key_bias(lowest, torch.empty(1, dtype=dtype))
    assert bias is not None
    low = (bias.to(dtype).float() / math.log(2)).flatten()
    assert low.isfinite().tolist() == [True, False, True]
    assert low[0] < -6e4
    assert bias[..., 1:].flatten().tolist() == [-math.inf, -3.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lse_is_float32(dtype: torch.dtype) -> None:
    out, lse = dense.attend(*tensors(SHAPES[1], dtype), None, 0.2)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


def test_hidden_keys_give_zero_and_minus_infinity() -> None:
    bias = torch.full((1, 1, 1, 33), -math.inf)
    for attend in (dense.attend, dense._attend_in_chunks):
        out, lse = attend(*tensors(SHAPES[1], torch.float32), bias, 0.2)
        assert out.count_nonzero() == 0
        assert lse.isneginf().all()
