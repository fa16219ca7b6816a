"""Which implementation runs: the one place that decides."""

from torch import Tensor

from evdit_opt.errors import MaskError
from evdit_opt.kernels import decomposed, decomposed_backward, reference
from evdit_opt.kernels.geometry import Geometry

__all__ = ["IMPLEMENTATIONS", "backward", "forward", "resolve"]

IMPLEMENTATIONS = ("auto", "reference", "decomposed", "triton")


def resolve(impl: str) -> str:
    """The implementation a name stands for. "auto" is "decomposed" on every device, for now.

    Raises:
        MaskError: if there is no such implementation.
    """
    if impl not in IMPLEMENTATIONS:
        raise MaskError(f"expected impl to be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return "decomposed" if impl == "auto" else impl


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Run one implementation; an explicit choice never falls back to another.

    Raises:
        MaskError: if there is no such implementation.
        UnsupportedInputError: if it cannot run on these tensors.
    """
    arguments = (q, k, v, attn_mask, intervals, log_weights, geometry, scale)
    chosen = resolve(impl)
    if chosen == "reference":
        return reference.forward(*arguments)
    if chosen == "triton":
        # Lazy: importing this package must not import Triton.
        from evdit_opt.kernels import triton_forward

        return triton_forward.forward(*arguments)
    return decomposed.forward(*arguments)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: "triton" by its own kernels, every other one by the decomposition.

    Raises:
        MaskError: if there is no such implementation.
        UnsupportedInputError: if it cannot run on these tensors.
    """
    arguments = (
        grad_out, q, k, v, out, lse, attn_mask, intervals, log_weights, geometry, scale
    )  # fmt: skip
    if resolve(impl) == "triton":
        from evdit_opt.kernels import triton_backward

        return triton_backward.backward(*arguments)
    return decomposed_backward.backward(*arguments)
