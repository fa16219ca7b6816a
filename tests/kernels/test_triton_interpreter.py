"""The fused kernel equals the definition, run by Triton's interpreter (tests/conftest.py).

float32 and float16 only: the interpreter's dot is silently wrong for bfloat16.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule
from tests.kernels.oracle import Case, cases, oracle
from tests.tolerance import assert_close_to_fp64

pytest.importorskip("triton", reason="Triton is not installed")
triton_forward = pytest.importorskip("evdit_opt.kernels.triton_forward")

if isinstance(triton_forward.tile_attention_kernel, triton_forward.triton.JITFunction):
    pytest.skip("Triton's interpreter is off (a CUDA device is there)", allow_module_level=True)


def check(case: Case) -> None:
    q, k, v, attn_mask = case.tensors()
    out, lse = tile_attention(
        q, k, v, case.mask, case.layout, scale=case.scale, attn_mask=attn_mask, impl="triton",
        return_lse=True,
    )  # fmt: skip
    exact, exact_lse = oracle(q, k, v, case.mask, case.layout, case.scale, attn_mask)
    eager, eager_lse = oracle(
        q, k, v, case.mask, case.layout, case.scale, attn_mask, dtype=case.dtype
    )
    assert_close_to_fp64(out, exact, eager, "out")
    assert_close_to_fp64(lse, exact_lse, eager_lse.float(), "lse")


# Small: the interpreter takes about 5 ms per pair of query and key blocks.
@given(cases((torch.float32, torch.float16), max_frames=4, max_tokens=140))
@settings(max_examples=10)
def test_interpreted_kernel_is_exact(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("head_dim", [17, 72, 80, 96, 160, 256])
def test_odd_head_dims(head_dim: int) -> None:
    check(
        Case(
            mask=Rule(1, 1, "balanced").mask(3), layout=TokenLayout(VideoGrid(3, 67, 1), prefix=7),
            batch=1, heads=1, kv_heads=1, head_dim=head_dim, dtype=torch.float32, kind="packed",
            padding="bool", scale=None, seed=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 64), (64, 128), (32, 64)])
def test_other_block_sizes(block_m: int, block_n: int) -> None:
    config = triton_forward.LaunchConfig(
        block_m=block_m, block_n=block_n, num_warps=4, num_stages=1
    )
    with mock.patch.object(triton_forward, "INTERPRETER_CONFIG", config):
        check(
            Case(
                mask=Rule(1).mask(3), layout=TokenLayout(VideoGrid(3, 131, 1), suffix=7), batch=1,
                heads=1, kv_heads=1, head_dim=32, dtype=torch.float32, kind="transposed",
                padding="none", scale=None, seed=2,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)),
     (256, (256, 0))],
)  # fmt: skip
def test_head_dim_is_split_with_least_padding(head_dim: int, parts: tuple[int, int]) -> None:
    assert triton_forward.split_head_dim(head_dim) == parts


def test_gradients_go_through_the_decomposition() -> None:
    layout = TokenLayout(VideoGrid(2, 20, 1))
    mask = Rule(1).mask(2)
    q, k, v = (torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3))
    triton, plain = (
        torch.autograd.grad(
            tile_attention(q, k, v, mask, layout, impl=impl).square().sum(), (q, k, v)
        )
        for impl in ("triton", "decomposed")
    )
    for mine, theirs in zip(triton, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bfloat16_is_refused_where_it_would_be_wrong() -> None:
    x = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedInputError, match=r"impl='triton', got torch\.bfloat16"):
        tile_attention(x, x, x, Rule(1).mask(2), TokenLayout(VideoGrid(2, 2, 1)), impl="triton")
