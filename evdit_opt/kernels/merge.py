"""Attention over two sets of keys from the attention over each: the log-sum-exp merge."""

import math

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(
    out: Tensor,
    lse: Tensor,
    part: Tensor,
    part_lse: Tensor,
    may_be_empty: bool,
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys.

    Args:
        out: attention over one set, ``[..., queries, head_dim]``.
        lse: its log-sum-exp, ``[..., queries]``, float32 or float64; -inf where it saw no key.
        part: attention over the other set, like out.
        part_lse: its log-sum-exp, like lse.
        may_be_empty: whether a log-sum-exp may be -inf.
        in_place: overwrite ``part`` if it has the result's dtype. For a compiler that is a detour.

    Returns:
        out in the dtype of lse, and lse.
    """
    difference = part_lse - lse
    if may_be_empty:
        # -inf - -inf: no key seen on either side.
        difference = torch.nan_to_num(difference, nan=0.0, posinf=math.inf, neginf=-math.inf)
        lse = torch.logaddexp(lse, part_lse)
    else:
        # The same number as logaddexp, which is 20 times slower on a CPU.
        lse = lse + torch.nn.functional.softplus(difference, threshold=40.0)
    share = torch.sigmoid(difference).unsqueeze(-1)
    # Two vectorised passes; lerp with a broadcast weight is scalar on a CPU. ``out`` is converted
    # here because an operator with operands of two dtypes converts it each time.
    out, part = out.to(share.dtype), part.to(share.dtype)
    if not in_place:
        return part * share + out * (1.0 - share), lse
    return part.mul_(share).addcmul_(out, 1.0 - share), lse
