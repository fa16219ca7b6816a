"""The gradient of tile attention, for every implementation, from dense pieces.

Each piece recomputes its attention weights from the final log-sum-exp of the queries, so the pieces
simply add up. FLOPs are those of the kept tiles; memory is linear in the sequence.
"""

import math

import torch
from torch import Tensor

from evdit_opt.kernels.constants import constant
from evdit_opt.kernels.decomposition import Decomposition, Run, decompose
from evdit_opt.kernels.dense import attend_backward, key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry, own_windows

__all__ = ["backward"]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        grad_out: gradient of out, ``[batch, heads, seq, head_dim]``.
        q: as in the forward call; so are k, v, attn_mask, the mask, geometry and scale.
        out: what the forward call returned; so is lse.

    Returns:
        Tensors like ``torch.empty_like`` of q, k and v.
    """
    plan = decompose(intervals, log_weights, geometry.frames)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    q, k, v, out, grad_out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out, grad_out)
    )
    if q.device.type != "cpu" and grad_out.stride() != out.stride():
        # Here once: cuDNN wants both alike, and would copy for every piece.
        grad_out = torch.empty_like(out).copy_(grad_out)
    wide = lse_dtype(q.dtype)
    grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    grad_k = torch.zeros(k.shape, dtype=wide, device=q.device)
    grad_v = torch.zeros(v.shape, dtype=wide, device=q.device)
    bias = key_bias(attn_mask, q)
    if bias is not None:
        # A query without any key: exp(logit - inf) = 0.
        lse = lse.masked_fill(lse.isneginf(), math.inf)
    groups = q.shape[1] // k.shape[1]
    for group in range(groups):
        heads = slice(group, None, groups)
        own_bias = bias[:, heads] if bias is not None and bias.shape[1] > 1 else bias
        for b in range(q.shape[0]):
            one = slice(b, b + 1)
            pieces = _Pieces(
                (grad_out[one, heads], q[one, heads], k[one], v[one], out[one, heads]),
                lse[one, heads],
                own_bias[one] if own_bias is not None and own_bias.shape[0] > 1 else own_bias,
                (grad_q[one, heads], grad_k[one], grad_v[one]),
                geometry,
                scale,
            )
            pieces.dense_rows(plan)
            pieces.shared_keys(plan)
            for run in plan.runs:
                pieces.own_keys(run)
    for grad, total in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        grad.copy_(total)
    return grads


class _Pieces:
    """One batch element with as many query heads as key heads; adds to ``grads``."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        lse: Tensor,
        bias: Tensor | None,
        grads: tuple[Tensor, Tensor, Tensor],
        geometry: Geometry,
        scale: float,
    ) -> None:
        self.grad_out, self.q, self.k, self.v, self.out = tensors  # [1, heads, seq, head_dim]
        self.lse = lse  # [1, heads, seq]
        self.bias = bias  # [1, heads | 1, 1, seq]
        self.grad_q, self.grad_k, self.grad_v = grads
        self.geometry = geometry
        self.scale = scale

    def dense_rows(self, plan: Decomposition) -> None:
        """Queries that see the whole sequence: frames kept in full, and text."""
        for queries in self.geometry.ranges(plan.dense, with_text=True):
            self._add(slice(*queries), slice(None), 0.0)

    def shared_keys(self, plan: Decomposition) -> None:
        """Consecutive sparse rows with every range of shared keys."""
        geometry = self.geometry
        for span in plan.spans:
            stop = span[-1].first + span[-1].count
            queries = slice(geometry.token(span[0].first), geometry.token(stop))
            for text in geometry.text:
                self._add(queries, slice(*text), 0.0)
            for group in plan.shared:
                weights = group.weights[span[0].position : span[-1].position + span[-1].count]
                shift: float | Tensor = weights[0]
                if any(weight != weights[0] for weight in weights):
                    shift = constant(weights, self.lse).repeat_interleave(geometry.tokens)
                for keys in geometry.ranges(group.keys):
                    self._add(queries, slice(*keys), shift)

    def own_keys(self, run: Run) -> None:
        """All rows of a run with their own keys, the rows as the batch of one call."""

        def rows(x: Tensor, start: int = 0, stop: int = 1) -> Tensor:
            return own_windows(x, self.geometry, run.first, run.count, start, stop)

        for start, stop, weight in run.own:
            bias = None
            if self.bias is not None:
                bias = rows(self.bias.transpose(2, 3), start, stop).transpose(2, 3)
            grads = attend_backward(
                rows(self.grad_out),
                rows(self.q),
                rows(self.k, start, stop),
                rows(self.v, start, stop),
                bias,
                rows(self.out),
                rows(self.lse.unsqueeze(-1)).squeeze(-1) - weight,
                self.scale,
            )
            rows(self.grad_q).add_(grads[0])
            # Windows of neighbouring rows overlap, their single frames do not.
            tokens = self.geometry.tokens
            for frame in range(stop - start):
                part = slice(frame * tokens, (frame + 1) * tokens)
                rows(self.grad_k, start + frame, start + frame + 1).add_(grads[1][:, :, part])
                rows(self.grad_v, start + frame, start + frame + 1).add_(grads[2][:, :, part])

    def _add(self, queries: slice, keys: slice, shift: float | Tensor) -> None:
        grads = attend_backward(
            self.grad_out[:, :, queries],
            self.q[:, :, queries],
            self.k[:, :, keys],
            self.v[:, :, keys],
            None if self.bias is None else self.bias[..., keys],
            self.out[:, :, queries],
            self.lse[:, :, queries] - shift,
            self.scale,
        )
        self.grad_q[:, :, queries] += grads[0]
        self.grad_k[:, :, keys] += grads[1]
        self.grad_v[:, :, keys] += grads[2]
