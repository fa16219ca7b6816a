"""The error of some rows, against a float64 softmax; as models lay tensors out."""

import pytest
import torch
from torch import Tensor

import evdit_opt.kernels.row_error  # noqa: F401  (registers the operator)

FRAMES, TOKENS, PREFIX, SUFFIX = 3, 7, 5, 2
SEQ = PREFIX + FRAMES * TOKENS + SUFFIX


def inputs(kv_heads: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (  # transposed, as models make them
        torch.randn(2, SEQ, heads, 24).transpose(1, 2) for heads in (4, kv_heads, kv_heads)
    )
    return q, k, v, torch.randn(2, 4, SEQ, 24), torch.rand(9)


def right(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor, hidden: Tensor | None, scale: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.transpose(2, 3) * scale
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    dense = (logits.softmax(-1) @ v)[:, :, PREFIX + (rows * FRAMES * TOKENS).long()]
    wrong = out.double()[:, :, PREFIX + (rows * FRAMES * TOKENS).long()] - dense
    return torch.stack([wrong.square().sum(), dense.square().sum()])


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as many keys", "grouped"])
@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "padding"])
def test_against_float64(kv_heads: int, padded: bool) -> None:
    q, k, v, out, rows = inputs(kv_heads)
    keep = torch.ones(2, 1, 1, SEQ, dtype=torch.bool)
    keep[1, ..., :4] = False
    mask = keep if padded else None
    got = torch.ops.evdit.row_error(q, k, v, mask, out, rows, FRAMES, TOKENS, PREFIX, 0.3)
    wanted = right(q, k, v, out, rows, ~keep if padded else None, 0.3)
    # Sums of squares in float32 of numbers that err by a few roundings each.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0.0)


def test_dense_attention_has_no_error_and_the_last_row_is_the_last_of_the_video() -> None:
    q, k, v, _, _ = inputs()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out[:, :, PREFIX + FRAMES * TOKENS :] = torch.nan  # text is not looked at
    out[:, :, :PREFIX] = torch.nan
    rows = torch.tensor([0.0, 0.5, 1.0 - 2**-24, 1.0])
    wrong, size = torch.ops.evdit.row_error(
        q, k, v, None, out, rows, FRAMES, TOKENS, PREFIX, None
    ).tolist()
    assert size > 1.0
    assert wrong / size < (4 * torch.finfo(torch.float32).eps) ** 2


def test_opcheck() -> None:
    q, k, v, out, rows = inputs(2)
    arguments = (q, k, v, None, out, rows, FRAMES, TOKENS, PREFIX, None)
    torch.library.opcheck(torch.ops.evdit.row_error.default, arguments)
