"""Gradients of every implementation: gradcheck in float64, and against the definition."""

import pytest
import torch
from hypothesis import given, settings

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule
from tests.kernels.oracle import Case, cases, oracle, strided
from tests.tolerance import assert_close_to_fp64

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("impl", ["reference", "decomposed"])
@pytest.mark.parametrize("rule", [Rule(1), Rule(1, 1, "balanced"), Rule(0, 1)], ids=Rule.describe)
def test_gradcheck(rule: Rule, impl: str) -> None:
    torch.manual_seed(0)
    layout = TokenLayout(VideoGrid(4, 3, 1), prefix=1, suffix=1)
    tensors = strided("transposed", 1, layout.seq_len, (2, 1, 1), 4)
    assert torch.autograd.gradcheck(
        lambda *x: tile_attention(*x, rule.mask(4), layout, impl=impl),
        [x.double().requires_grad_() for x in tensors],
    )


def gradients(case: Case, dtype: torch.dtype, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *tensors, attn_mask = case.tensors()
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    out, _ = oracle(*tensors, case.mask, case.layout, case.scale, attn_mask, dtype=dtype)
    return torch.autograd.grad(out, tensors, grad_out.to(dtype))


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@given(cases(DTYPES, max_tokens=600, head_dims=(16, 24, 64)))
@settings(max_examples=100)
def test_gradients_are_exact(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@given(cases(DTYPES, max_tokens=600))
@settings(max_examples=1000)
def test_a_thousand_cases(case: Case) -> None:
    check(case)


def check(case: Case) -> None:
    *tensors, attn_mask = case.tensors()
    tensors = [x.requires_grad_() for x in tensors]
    out = tile_attention(*tensors, case.mask, case.layout, scale=case.scale, attn_mask=attn_mask)
    grad_out = torch.randn_like(out)
    actual = torch.autograd.grad(out, tensors, grad_out)
    exact = gradients(case, torch.float64, grad_out)
    eager = gradients(case, case.dtype, grad_out)
    # A flash backward subtracts two numbers of this size (dP - delta) where eager's softmax
    # backward may give an exact 0, for example with a single key.
    q, k, v, grad = (x.detach().double().norm(dim=-1).max().item() for x in (*tensors, grad_out))
    size = grad * v * max(q, k, 1.0) * (case.scale or case.head_dim**-0.5)
    for name, mine, true, plain in zip("qkv", actual, exact, eager, strict=True):
        assert_close_to_fp64(mine, true, plain, f"gradient of {name}", size=size)


def test_the_same_bits_twice() -> None:
    layout = TokenLayout(VideoGrid(5, 31, 1), suffix=2)
    tensors = [x.requires_grad_() for x in strided("packed", 2, layout.seq_len, (4, 2, 2), 24)]
    mask = Rule(2, 1, "balanced").mask(5)
    first, second = (
        torch.autograd.grad(tile_attention(*tensors, mask, layout).square().sum(), tensors)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_memory_of_the_backward_is_linear() -> None:
    """Nothing seq x seq lives between forward and backward, or inside of either."""
    layout = TokenLayout(VideoGrid(16, 256, 1))
    seq = layout.seq_len
    tensors = [x.requires_grad_() for x in strided("transposed", 1, seq, (1, 1, 1), 16)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    with Watch():
        tile_attention(*tensors, Rule(2, 0, "balanced").mask(16), layout).sum().backward()
    assert largest < seq * seq / 16
