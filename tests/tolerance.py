"""How far a kernel may be from the exact result: derived from its dtype, not chosen."""

import torch
from torch import Tensor

__all__ = ["assert_close_to_fp64"]

# Spacing of the dtype at 1, times a few: what the last rounding alone may cost.
ROUNDING_STEPS = 4
# float64 is its own measuring stick: eager's error reads 0, so rounding of the logits fits here.
ROUNDING_STEPS_FP64 = 4096


def assert_close_to_fp64(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    what: str = "result",
    factor: float = 2.0,
    size: float = 1.0,
) -> None:
    """Assert max|actual - exact| <= factor * max|eager - exact| + rounding floor.

    Args:
        actual: what the kernel returned.
        exact: the same in float64.
        eager: the same by plain PyTorch in the kernel's dtype.
        what: name in the message.
        factor: how much worse than eager is allowed; more than 2 needs a reason.
        size: magnitude of the terms that are summed, where the result is smaller than they are.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    empty = exact.isneginf()
    assert torch.equal(actual.isneginf(), empty), f"{what}: -inf in the wrong places"
    assert not actual.isnan().any(), f"{what}: NaN"
    error, eager_error = (
        (x.double() - exact).masked_fill(empty, 0.0).abs().max().item() for x in (actual, eager)
    )
    size = max(size, exact.masked_fill(empty, 0.0).abs().max().item())
    steps = ROUNDING_STEPS_FP64 if actual.dtype == torch.float64 else ROUNDING_STEPS
    floor = steps * torch.finfo(actual.dtype).eps * size
    bound = factor * eager_error + floor
    assert error <= bound, (
        f"{what}: error {error:.3e} > {bound:.3e} = {factor:g} * eager error {eager_error:.3e} "
        f"+ rounding {floor:.3e} ({actual.dtype})"
    )
