"""Short eager calls on a CPU, without the operator around them.

128 tokens take 0.25 ms, and the operator 0.1 ms more: PyTorch's dispatch in Python, a log-sum-exp,
lists of numbers. Where nothing is traced, cast or differentiated nobody sees the operator, so the
implementation is called itself; and one masked call is PyTorch's own. The first call of a kind is
checked, and its implementation chosen; the next one finds both in a dictionary.
"""

from collections.abc import Callable, Hashable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.grid import TokenLayout
from evdit_opt.kernels import dispatch, masked
from evdit_opt.kernels.checks import check_frames, check_inputs
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import TileMask

__all__ = ["attend", "is_short"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

# Kinds of calls that are kept: of each the mask of all token pairs, at most 4 MiB.
MAX_CALLS = 64
_calls: dict[Hashable, Call] = {}


def is_short(q: Tensor, k: Tensor, v: Tensor, impl: str) -> bool:
    """Whether an eager call is a short one, and nobody sees whether it is the operator's."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and q.ndim == 4
        and q.shape[2] <= dispatch.SHORT_SEQ
        and impl in ("auto", "static", "decomposed", "masked")
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    layout: TokenLayout,
    scale: float | None,
    impl: str,
) -> Tensor:
    """The attention, by the implementation the operator would choose.

    Args:
        q: ``[batch, heads, seq, head_dim]``, for which :func:`is_short` holds.
        k: ``[batch, kv_heads, seq, head_dim]``; so is v.
        mask: the tile mask.
        layout: frames and text of the sequence.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.
        impl: one of ``dispatch.IMPLEMENTATIONS``.

    Returns:
        ``[batch, heads, seq, head_dim]``, strides of ``torch.empty_like(q)``.

    Raises:
        MaskError: if mask, layout and tensors do not fit together.
        UnsupportedInputError: if dtype, device or head_dim are not supported.
    """
    # Whatever a check or a choice looks at: a call that finds its kind needs neither.
    kind = (
        mask, layout, scale, impl, torch.get_num_threads(), q.dtype, k.dtype, v.dtype,
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
    )  # fmt: skip
    call = _calls.get(kind)
    if call is None:
        call = _prepare(q, k, v, mask, layout, scale, impl)
        if len(_calls) >= MAX_CALLS:
            del _calls[next(iter(_calls))]
        _calls[kind] = call
    return call(q, k, v)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    layout: TokenLayout,
    scale: float | None,
    impl: str,
) -> Call:
    """Check a call, and choose what calls of its kind run. Args and errors as of :func:`attend`."""
    check_frames(mask, layout)
    geometry = Geometry(
        frames=mask.frames, tokens=layout.grid.tokens_per_frame,
        prefix=layout.prefix, suffix=layout.suffix,
    )  # fmt: skip
    check_inputs(q, k, v, None, geometry)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, None, *mask.segments(), geometry, scale)
    make = cache(partial(_call_of, arguments=arguments))
    return make(dispatch.choose(impl, arguments, lambda name: make(name)(q, k, v)))


def _call_of(impl: str, arguments: dispatch.Arguments) -> Call:
    """Calls of one implementation that differ from ``arguments`` in their numbers only."""
    q, k, v, _, intervals, log_weights, geometry, scale = arguments
    rest = arguments[3:]
    has_rows = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if impl != "masked" or not has_rows or q.shape != k.shape:
        return lambda q, k, v: dispatch.run(impl, (q, k, v, *rest))[0]
    dtype = masked.pair_dtype(log_weights, q.dtype)
    bias = masked.pair_bias(intervals, log_weights, geometry, dtype, q.device)
    strides = torch.empty_like(q).stride()

    def one_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = scaled_dot_product_attention(q, k, v, bias, scale=scale)
        return result if result.stride() == strides else torch.empty_like(q).copy_(result)

    return one_call
