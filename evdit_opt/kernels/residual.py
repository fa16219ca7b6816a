"""How residuals are kept between steps: as they are, in bfloat16, or in 8 bits with scales.

Two operators, made of plain ones: whoever compiles a graph sees through them and fuses them with
their neighbours.

float8 is e4m3: 3 bits of mantissa, so a number is off by at most 2^-4 of itself, down to 2^-15 of
the largest one, which the scale of its batch entry and head puts at the end of the range.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError

__all__ = [
    "FLOAT8",
    "PRECISIONS",
    "ROUNDING",
    "Precision",
    "Residual",
    "bytes_of",
    "empty_residual",
    "pack",
    "require_float8",
]

Precision = Literal["model", "bfloat16", "float8"]
PRECISIONS: tuple[Precision, ...] = ("model", "bfloat16", "float8")
"""From the largest to the smallest."""

ROUNDING: dict[Precision, float] = {"model": 0.0, "bfloat16": 2**-8, "float8": 2**-4}
"""What a number is off by at most, relative to itself, if it is not far below the largest."""

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-30  # of a residual that is zero


class Residual(NamedTuple):
    """What a site keeps from a refresh to the next.

    Attributes:
        value: ``[batch, heads, seq, head_dim]``.
        scale: ``[batch, heads, 1, 1]``, float32, by which 8-bit values are multiplied; else None.
    """

    value: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.value.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The residual in a dtype; it may share the memory of ``value``."""
        return _unpack(self.value, self.scale, dtype)

    def keep(self, residual: Tensor) -> None:
        """Write another residual in the place of this one."""
        value, scale = (residual, None) if self.scale is None else _pack(residual)
        self.value.copy_(value)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)


def pack(residual: Tensor, precision: Precision) -> Residual:
    """Round a residual to what is kept of it.

    Args:
        residual: ``[batch, heads, seq, head_dim]``.
        precision: of the numbers.
    """
    if precision == "float8":
        return Residual(*_pack(residual))
    return Residual(residual.to(_dtype(residual.dtype, precision)))


def empty_residual(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, precision: Precision
) -> Residual:
    """A residual of zeros.

    Args:
        shape: of the attention's output, ``[batch, heads, seq, head_dim]``.
        dtype: of the attention's output.
        device: where it is.
        precision: of the numbers.

    Raises:
        UnsupportedInputError: if the device does not know 8-bit floats.
    """
    if precision == "float8":
        require_float8(device)
    value = torch.zeros(shape, dtype=_dtype(dtype, precision), device=device)
    if precision != "float8":
        return Residual(value)
    return Residual(value, torch.zeros(*shape[:2], 1, 1, device=device))


def require_float8(device: torch.device) -> None:
    """Refuse a device on which 8-bit residuals cannot be kept.

    Raises:
        UnsupportedInputError: on CUDA below compute capability 8.9, for which Triton compiles no
            e4m3, and on devices that lack the dtype.
    """
    if problem := _lacks_float8(device):
        raise UnsupportedInputError(
            f"expected a device that computes with {FLOAT8}, in which this plan keeps residuals, "
            f"got {device}: {problem}; calibrate with "
            "Config(reuse_precisions=('model', 'bfloat16'))"
        )


def _lacks_float8(device: torch.device) -> str:
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return f"compute capability {capability[0]}.{capability[1]}, 8.9 is needed"
    try:
        torch.zeros(1, device=device).to(FLOAT8).float()
    except (RuntimeError, TypeError) as error:  # TypeError: MPS
        return str(error).splitlines()[0]
    return ""


def bytes_of(numbers: int, itemsize: int, precision: Precision) -> int:
    """Memory of a residual, without its few scales.

    Args:
        numbers: how many it has.
        itemsize: bytes of one in the model's dtype.
        precision: in which it is kept.
    """
    own = {"model": itemsize, "bfloat16": 2, "float8": 1}
    return numbers * min(itemsize, own[precision])


def _dtype(model: torch.dtype, precision: Precision) -> torch.dtype:
    if precision == "float8":
        return FLOAT8
    # float16 is as small as bfloat16, and more exact.
    return torch.bfloat16 if precision == "bfloat16" and model.itemsize > 2 else model


def _pack(residual: Tensor) -> tuple[Tensor, Tensor]:
    wide = residual.float()
    scale = (wide.abs().amax((2, 3), keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (wide / scale).to(FLOAT8), scale


def _unpack(value: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (value if scale is None else value.float() * scale).to(dtype)


_LIBRARY = torch.library.Library("evdit", "FRAGMENT")
_LIBRARY.define("pack_residual(Tensor residual) -> (Tensor, Tensor)")
_LIBRARY.define("unpack_residual(Tensor value, Tensor? scale, ScalarType dtype) -> Tensor")
_LIBRARY.impl("pack_residual", _pack, "CompositeImplicitAutograd")
_LIBRARY.impl("unpack_residual", _unpack, "CompositeImplicitAutograd")
