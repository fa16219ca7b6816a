"""Residuals in fewer bits: how far off they are, against float64, and where they are refused."""

import pytest
import torch

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.residual import (
    FLOAT8,
    PRECISIONS,
    ROUNDING,
    Precision,
    bytes_of,
    empty_residual,
    pack,
    require_float8,
)

SHAPE = (2, 3, 70, 24)
SMALLEST_STEP = 2.0**-9 / 448
"""Distance of the smallest 8-bit numbers, relative to the largest number of the head."""


def residual(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of every size, other heads much larger than others."""
    torch.manual_seed(0)
    sizes = torch.tensor([1e-6, 1.0, 300.0]).reshape(1, 3, 1, 1)
    spread = 10.0 ** torch.empty(SHAPE).uniform_(-6, 0)
    return (torch.randn(SHAPE) * sizes * spread).to(dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_off_by_at_most_its_rounding(
    precision: Precision, dtype: torch.dtype
) -> None:
    given = residual(dtype)
    kept = pack(given, precision).unpack(torch.float64)
    right = given.double()
    bound = right.abs() * ROUNDING[precision]
    if precision == "float8":
        # Half the distance of two 8-bit numbers where they are denormal; the scale is rounded.
        largest = right.abs().amax((2, 3), keepdim=True)
        bound += largest * SMALLEST_STEP / 2 + right.abs() * 4 * torch.finfo(torch.float32).eps
    assert ((kept - right).abs() <= bound).all()
    exact = precision == "model" or (precision == "bfloat16" and dtype.itemsize == 2)
    assert torch.equal(kept, right) == exact


def test_zeros_stay_zeros_and_the_largest_number_fits() -> None:
    assert not pack(torch.zeros(SHAPE), "float8").unpack(torch.float32).any()
    large = torch.full(SHAPE, torch.finfo(torch.float32).max)
    large[0] *= -1
    torch.testing.assert_close(pack(large, "float8").unpack(torch.float32), large)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_kept_is_what_is_packed_and_takes_what_is_said(precision: Precision) -> None:
    given = residual()
    kept = empty_residual(SHAPE, given.dtype, given.device, precision)
    assert not kept.unpack(torch.float32).any()
    kept.keep(given)
    assert torch.equal(kept.unpack(torch.float32), pack(given, precision).unpack(torch.float32))
    scales = 4 * SHAPE[0] * SHAPE[1] if precision == "float8" else 0
    assert kept.nbytes == bytes_of(given.numel(), 4, precision) + scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_operators_give_the_same_bits(dtype: torch.dtype) -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, scale = torch.ops.evdit.pack_residual(x)
        return value, scale, torch.ops.evdit.unpack_residual(value, scale, dtype)

    given = residual(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # as models lay it out
    eager, compiled = both(given), torch.compile(both)(given)
    for a, b in zip(eager, compiled, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.float(), b.float())
    assert eager[0].dtype == FLOAT8


def test_devices_without_8_bit_floats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UnsupportedInputError, match=r"8\.0, 8\.9 is needed; calibrate with"):
        empty_residual(SHAPE, torch.float32, torch.device("cuda:0"), "float8")

    def no_float8(*_args: object, **_kwargs: object) -> None:
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend")

    monkeypatch.setattr(torch, "zeros", no_float8)
    with pytest.raises(UnsupportedInputError, match="MPS backend"):
        require_float8(torch.device("cpu"))
