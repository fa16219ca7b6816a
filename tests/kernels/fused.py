"""The fused kernels against the definition: what the tests of both directions share.

On a CPU Triton's interpreter runs them: float32 and float16 only, as its dot is silently wrong for
bfloat16, and small cases, as it takes milliseconds for a pair of query and key blocks.
"""

import pytest
import torch
from torch import Tensor

from evdit_opt.kernels import tile_attention
from tests.kernels.oracle import Case, oracle
from tests.tolerance import assert_close_to_fp64

DTYPES = (torch.float32, torch.float16)


def require_interpreter() -> None:
    """Skip the calling module where kernels cannot run on the CPU."""
    triton_launch = pytest.importorskip("evdit_opt.kernels.triton_launch", exc_type=ImportError)
    if not triton_launch.is_interpreted():
        pytest.skip("Triton's interpreter is off (a CUDA device is there)", allow_module_level=True)


def inputs(case: Case, device: str) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v of a case, surrounded by NaN on every side; and its attn_mask."""
    *tensors, attn_mask = case.tensors()
    attn_mask = None if attn_mask is None else attn_mask.to(device)
    return [poisoned(x, device) for x in tensors], attn_mask


def poisoned(x: Tensor, device: str) -> Tensor:
    """The same values and order of dimensions, as a slice of a larger tensor of NaN."""
    order = sorted(range(4), key=lambda n: -x.stride(n))
    padding = {0: 1, 1: 1, 2: 3, 3: 5}  # of batch, heads, tokens, head_dim
    shape = [x.shape[n] + 2 * padding[n] for n in order]
    storage = torch.full(shape, float("nan"), dtype=x.dtype, device=device)
    slices = tuple(slice(padding[n], padding[n] + x.shape[n]) for n in order)
    view = storage[slices].permute(*(order.index(n) for n in range(4)))
    return view.copy_(x)


def check_forward(case: Case, device: str = "cpu") -> None:
    """out and lse are as exact as plain attention in the same dtype."""
    (q, k, v), attn_mask = inputs(case, device)
    out, lse = tile_attention(
        q, k, v, case.mask, case.layout, scale=case.scale, attn_mask=attn_mask, impl="triton",
        return_lse=True,
    )  # fmt: skip
    assert out.stride() == torch.empty_like(q).stride()
    tensors = *(x.cpu() for x in (q, k, v)), case.mask, case.layout, case.scale
    padding = None if attn_mask is None else attn_mask.cpu()
    exact, exact_lse = oracle(*tensors, padding)
    eager, eager_lse = oracle(*tensors, padding, dtype=case.dtype)
    assert_close_to_fp64(out.cpu(), exact, eager, "out")
    assert_close_to_fp64(lse.cpu(), exact_lse, eager_lse.float(), "lse")


def check_backward(case: Case, device: str = "cpu") -> None:
    """Gradients of q, k and v are as exact as those of plain attention in the same dtype."""
    tensors, attn_mask = inputs(case, device)
    tensors = [x.requires_grad_() for x in tensors]
    out = tile_attention(
        *tensors, case.mask, case.layout, scale=case.scale, attn_mask=attn_mask, impl="triton"
    )
    grad_out = poisoned(torch.randn(out.shape).to(case.dtype), device)
    actual = torch.autograd.grad(out, tensors, grad_out)
    exact, eager = (
        _oracle_gradients(case, tensors, attn_mask, grad_out, dtype)
        for dtype in (torch.float64, case.dtype)
    )
    # dP - delta is a difference of numbers of this size, where eager may have an exact 0.
    q, k, v, grad = (x.detach().double().norm(dim=-1).max().item() for x in (*tensors, grad_out))
    size = grad * v * max(q, k, 1.0) * (case.scale or case.head_dim**-0.5)
    for name, x, mine, true, plain in zip("qkv", tensors, actual, exact, eager, strict=True):
        assert_close_to_fp64(mine.cpu(), true, plain, f"gradient of {name}", size=size)
        assert mine.stride() == torch.empty_like(x).stride()


def _oracle_gradients(
    case: Case, tensors: list[Tensor], attn_mask: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    copies = [x.detach().to("cpu", dtype).requires_grad_() for x in tensors]
    padding = None if attn_mask is None else attn_mask.cpu()
    out, _ = oracle(*copies, case.mask, case.layout, case.scale, padding, dtype=dtype)
    return torch.autograd.grad(out, copies, grad.to("cpu", dtype))
