"""Short eager calls on a CPU, without the operator around them.

128 tokens take 0.25 ms, and the operator 0.1 ms more: PyTorch's dispatch in Python, a log-sum-exp,
lists of numbers. Where nothing is traced, cast or differentiated nobody sees the operator, so the
implementation is called itself; and one masked call is PyTorch's own.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.kernels import dispatch, masked
from evdit_opt.kernels.checks import check_inputs
from evdit_opt.kernels.dense import lse_dtype
from evdit_opt.kernels.geometry import Geometry

__all__ = ["attend", "is_short"]


def is_short(q: Tensor, k: Tensor, v: Tensor, impl: str, seq_len: int) -> bool:
    """Whether an eager call is a short one, and nobody sees whether it is the operator's."""
    return (
        seq_len <= dispatch.SHORT_SEQ
        and impl in ("auto", "static", "decomposed", "masked")
        and type(q) is type(k) is type(v) is Tensor
        and q.device.type == "cpu"
        and q.shape == k.shape
        and not torch.is_autocast_enabled("cpu")
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float | None,
    impl: str,
) -> Tensor:
    """The attention, by the implementation the operator would choose.

    Args:
        q: ``[batch, heads, seq, head_dim]``, for which :func:`is_short` holds.
        k: as q; so is v.
        intervals: ``TileMask.segments()[0]`` of a valid mask.
        log_weights: ``TileMask.segments()[1]``.
        geometry: frames and text of the sequence.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.
        impl: one of ``dispatch.IMPLEMENTATIONS``.

    Returns:
        ``[batch, heads, seq, head_dim]``, strides of ``torch.empty_like(q)``.

    Raises:
        MaskError: if the tensors do not fit the layout.
        UnsupportedInputError: if dtype, device or head_dim are not supported.
    """
    check_inputs(q, k, v, None, geometry)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, None, intervals, log_weights, geometry, scale)
    impl = dispatch.choose(impl, arguments)
    if impl != "masked" or not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return dispatch.run(impl, arguments)[0]
    bias = masked.pair_bias(intervals, log_weights, geometry, lse_dtype(q.dtype), q.device)
    result = scaled_dot_product_attention(q, k, v, bias, scale=scale)
    out = torch.empty_like(q)
    return result if result.stride() == out.stride() else out.copy_(result)
