"""The fused forward kernel equals the definition, run by Triton's interpreter."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.kernels.triton_configs import LaunchConfig
from evdit_opt.masks import Rule
from tests.kernels.fused import DTYPES, check_forward, require_interpreter
from tests.kernels.oracle import Case, cases, oracle

require_interpreter()
from evdit_opt.kernels import triton_launch  # noqa: E402  (imports Triton)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASE = Case(
    mask=Rule(1, 1, "balanced").mask(3), layout=TokenLayout(VideoGrid(3, 67, 1), prefix=7),
    batch=1, heads=1, kv_heads=1, head_dim=32, dtype=torch.float32, kind="packed", padding="bool",
    scale=None, seed=1,
)  # fmt: skip


@given(cases(DTYPES, max_frames=4, max_tokens=140))
@settings(max_examples=15)
def test_any_case(case: Case) -> None:
    check_forward(case)


@pytest.mark.nightly
@given(cases(DTYPES, max_frames=6, max_tokens=300, head_dims=(16, 24, 64, 72, 80, 96, 128, 256)))
@settings(max_examples=1000)
def test_a_thousand_cases(case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize("head_dim", [16, 17, 72, 80, 96, 160, 256])
def test_head_dims(head_dim: int) -> None:
    check_forward(dataclasses.replace(CASE, head_dim=head_dim))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("padding", ["none", "float"])
def test_any_scale(scale: float, padding: str) -> None:
    check_forward(dataclasses.replace(CASE, scale=scale, padding=padding))


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 64), (64, 128), (32, 64)])
def test_other_block_sizes(block_m: int, block_n: int) -> None:
    config = LaunchConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
    layout = TokenLayout(VideoGrid(3, 131, 1), suffix=7)
    with mock.patch.object(triton_launch, "INTERPRETER_CONFIG", config):
        check_forward(dataclasses.replace(CASE, layout=layout, padding="none", kind="transposed"))


@pytest.mark.nightly  # 20 seconds in the interpreter
def test_a_frame_of_cogvideox() -> None:
    """1,350 tokens: 21 blocks of 64 and 6 tokens."""
    layout = TokenLayout(VideoGrid(2, 1350, 1), prefix=10)
    check_forward(
        dataclasses.replace(CASE, mask=Rule(0).mask(2), layout=layout, head_dim=64, padding="none")
    )


@pytest.fixture
def tma() -> Iterator[None]:
    config = dataclasses.replace(triton_launch.INTERPRETER_CONFIG, use_tma=True)
    with mock.patch.object(triton_launch, "INTERPRETER_CONFIG", config):
        yield


@pytest.mark.usefixtures("tma")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 96])
def test_tensor_memory_accelerator(head_dim: int, dtype: torch.dtype) -> None:
    layout = TokenLayout(VideoGrid(3, 67, 1), suffix=7)
    case = dataclasses.replace(CASE, layout=layout, head_dim=head_dim, dtype=dtype)
    check_forward(dataclasses.replace(case, batch=2, heads=2))


@pytest.mark.usefixtures("tma")
def test_what_a_descriptor_cannot_describe_is_copied() -> None:
    layout = TokenLayout(VideoGrid(2, 70, 1))
    q = torch.randn(1, 2, 140, 16)
    odd_stride = torch.randn(1, 2, 140, 17)[..., :16]
    odd_start = torch.randn(1, 2, 140, 32)[..., 1:17]
    same_for_all_heads = torch.randn(1, 1, 140, 16).expand(1, 2, 140, 16)
    for k in (odd_stride, odd_start, same_for_all_heads):
        expected, _ = oracle(q, k, k, Rule(1).mask(2), layout)
        out = tile_attention(q, k, k, Rule(1).mask(2), layout, impl="triton")
        torch.testing.assert_close(out, expected.float())


@pytest.mark.usefixtures("tma")
def test_rows_that_no_descriptor_can_describe_are_an_error() -> None:
    with pytest.raises(UnsupportedInputError, match="multiple of 16 bytes for use_tma=True"):
        check_forward(dataclasses.replace(CASE, head_dim=17))


def test_a_query_without_any_key_gives_zero() -> None:
    layout = TokenLayout(VideoGrid(3, 4, 1))
    q = torch.randn(1, 2, 12, 16)
    hidden = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    hidden[..., 4:8] = False  # all that frame 1 keeps
    out, lse = tile_attention(
        q, q, q, Rule(0).mask(3), layout, attn_mask=hidden, impl="triton", return_lse=True
    )
    assert out[:, :, 4:8].count_nonzero() == 0
    assert lse[:, :, 4:8].isneginf().all()
    assert lse[:, :, :4].isfinite().all()


def test_the_same_bits_twice() -> None:
    q, k, v, attn_mask = CASE.tensors()
    first, second = (
        tile_attention(q, k, v, CASE.mask, CASE.layout, attn_mask=attn_mask, impl="triton")
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("token_stride", [1 << 23, (1 << 23) + 8], ids=["read", "copied"])
def test_offsets_past_32_bits(token_stride: int, tmp_path: Path) -> None:
    """One sparse file of 4.3 GiB: 260 tokens lie 2**23 elements apart, q, k and v in between."""
    tokens, head_dim = 65, 16
    layout = TokenLayout(VideoGrid(4, tokens, 1))
    size = layout.seq_len * token_stride
    assert size > 2**31
    memory = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    q, k, v = (
        memory.as_strided((1, 1, layout.seq_len, head_dim), (size, size, token_stride, 1), offset)
        for offset in (0, 1024, 2048)
    )
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    mask = Rule(1).mask(4)
    expected, _ = oracle(q, k, v, mask, layout)
    out = tile_attention(q, k, v, mask, layout, impl="triton")
    # float16 keeps 11 bits, out is below 4.
    torch.testing.assert_close(out.double(), expected, rtol=0.0, atol=4 * 2**-11)


def test_bfloat16_is_refused_where_it_would_be_wrong() -> None:
    x = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedInputError, match=r"impl='triton', got torch\.bfloat16"):
        tile_attention(x, x, x, Rule(1).mask(2), TokenLayout(VideoGrid(2, 2, 1)), impl="triton")
