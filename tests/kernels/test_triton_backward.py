"""The fused backward kernels equal the definition's gradient, run by Triton's interpreter."""

import dataclasses
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.kernels.triton_configs import LaunchConfig
from evdit_opt.masks import Rule, TileMask
from tests.kernels.fused import DTYPES, check_backward, require_interpreter
from tests.kernels.oracle import Case, cases

require_interpreter()
from evdit_opt.kernels import triton_backward, triton_launch  # noqa: E402  (import Triton)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASE = Case(
    mask=Rule(1, 1, "balanced").mask(3), layout=TokenLayout(VideoGrid(3, 67, 1), suffix=7),
    batch=1, heads=2, kv_heads=1, head_dim=32, dtype=torch.float32, kind="packed", padding="bool",
    scale=None, seed=1,
)  # fmt: skip


@given(cases(DTYPES, max_frames=4, max_tokens=100))
@settings(max_examples=15)
def test_any_case(case: Case) -> None:
    check_backward(case)


@pytest.mark.nightly
@given(cases(DTYPES, max_frames=6, max_tokens=300, head_dims=(16, 24, 64, 72, 80, 96, 128, 256)))
@settings(max_examples=1000)
def test_a_thousand_cases(case: Case) -> None:
    check_backward(case)


@pytest.mark.parametrize("head_dim", [16, 72, 96, 160])
def test_head_dims(head_dim: int) -> None:
    check_backward(dataclasses.replace(CASE, head_dim=head_dim, heads=1))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 0.4])
def test_any_scale(scale: float) -> None:
    check_backward(dataclasses.replace(CASE, scale=scale, heads=1, padding="none"))


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 64), (32, 128)])
def test_other_block_sizes(block_m: int, block_n: int) -> None:
    config = LaunchConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
    layout = TokenLayout(VideoGrid(2, 131, 1), suffix=7)
    case = dataclasses.replace(CASE, mask=Rule(0).mask(2), layout=layout, padding="none", heads=1)
    with mock.patch.object(triton_launch, "INTERPRETER_CONFIG", config):
        check_backward(case)


def gradients(
    tensors: list[Tensor], mask: TileMask, layout: TokenLayout, attn_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = tile_attention(*tensors, mask, layout, attn_mask=attn_mask, impl="triton")
    return torch.autograd.grad(out, tensors, torch.ones(1).expand_as(out))


def test_a_query_without_any_key_has_no_gradient() -> None:
    layout = TokenLayout(VideoGrid(3, 4, 1))
    tensors = [torch.randn(1, 2, 12, 16) for _ in range(3)]
    hidden = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    hidden[..., 4:8] = False  # all that frame 1 keeps
    for grad in gradients(tensors, Rule(0).mask(3), layout, hidden):
        assert grad[:, :, 4:8].count_nonzero() == 0
        assert grad.isfinite().all()


def test_a_key_that_no_query_sees_has_no_gradient() -> None:
    mask = TileMask(((0.0, -math.inf), (0.0, -math.inf)))
    tensors = [torch.randn(1, 2, 12, 16) for _ in range(3)]
    _, *grads = gradients(tensors, mask, TokenLayout(VideoGrid(2, 6, 1)))
    for grad in grads:
        assert grad[:, :, 6:].count_nonzero() == 0
        assert grad.isfinite().all()


def test_the_same_bits_twice() -> None:
    q, k, v, attn_mask = CASE.tensors()
    first, second = (gradients([q, k, v], CASE.mask, CASE.layout, attn_mask) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """One sparse file of 4.3 GiB: 260 tokens lie 2**23 elements apart, q, k and v in between."""
    layout, stride = TokenLayout(VideoGrid(4, 65, 1)), 1 << 23
    size = layout.seq_len * stride
    assert size > 2**31
    memory = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    far = [
        memory.as_strided((1, 1, layout.seq_len, 16), (size, size, stride, 1), offset)
        for offset in (0, 1024, 2048)
    ]
    near = [x.copy_(torch.randn(x.shape)).contiguous() for x in far]
    both = zip(*(gradients(x, Rule(1).mask(4), layout) for x in (far, near)), strict=True)
    assert all(torch.equal(*pair) for pair in both)


def test_nothing_quadratic_is_allocated() -> None:
    layout = TokenLayout(VideoGrid(8, 128, 1))
    tensors = [torch.randn(1, 1, layout.seq_len, 16) for _ in range(3)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return result

    with Watch():
        gradients(tensors, Rule(1).mask(8), layout)
    assert largest == layout.seq_len * 16


@pytest.mark.parametrize(("impl", "fused"), [("triton", True), ("auto", False)])
def test_impl_decides_the_gradient_too(impl: str, fused: bool) -> None:
    x = torch.randn(1, 1, 4, 16, requires_grad=True)
    backward = triton_backward.backward
    with mock.patch.object(triton_backward, "backward", side_effect=backward) as spy:
        tile_attention(
            x, x, x, Rule(1).mask(2), TokenLayout(VideoGrid(2, 2, 1)), impl=impl
        ).sum().backward()
    assert spy.called == fused
