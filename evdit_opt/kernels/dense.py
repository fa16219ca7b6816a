"""Dense attention with its log-sum-exp, forward and backward, on whatever device the tensors are.

``attend`` picks PyTorch's fused kernel for the device, explicitly (on CUDA: ``dense_cuda.choose``),
or a softmax in chunks where there is none.

``attend_backward`` takes the *final* output and log-sum-exp of the queries, so the gradient of an
attention that was cut into pieces is the sum over its pieces, without any merging.
"""

import itertools
import math

import torch
from torch import Tensor

from evdit_opt.kernels import dense_cuda
from evdit_opt.kernels.merge import merge

__all__ = ["attend", "attend_backward", "key_bias", "lse_dtype"]

# Logits that the chunked softmax holds at once, in elements: 64 MiB in float32.
CHUNK_LOGITS = 1 << 24

# PyTorch's flash kernel for CPUs takes tiles of 256 queries from this many queries, else 64 or 32.
CPU_LARGE_TILES = 768
CPU_KEY_STRETCH = 2048

# Masks say "no" by the most negative number of their dtype, too. Scaled or cast by a kernel it
# would be -inf, and a piece of keys that are all hidden so would be NaN; this is 0 as well.
LOWEST_BIAS = -1e30


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp, and of accumulators, for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, may_be_empty: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query with every key.

    Args:
        q: ``[batch, heads, queries, head_dim]``, contiguous last dim.
        k: ``[batch, heads, keys, head_dim]``, contiguous last dim.
        v: like k.
        bias: None, or added to the logits: ``[batch | 1, heads | 1, queries | 1, keys]``, in
            ``lse_dtype``.
        scale: multiplies the logits before the bias.
        may_be_empty: whether the bias may hide every key of a query.

    Returns:
        out: ``[batch, heads, queries, head_dim]``, dtype of q; 0 where the bias hides every key.
        lse: ``[batch, heads, queries]``, natural log, ``lse_dtype``; -inf where it does.
    """
    if q.device.type == "cpu":
        return _attend_cpu(q, k, v, bias, scale, may_be_empty)
    kernel = dense_cuda.choose(q, k, bias is not None)
    if kernel is not None:
        out, lse = dense_cuda.attend(q, k, v, bias, scale, kernel)
        return _hide_empty(out, lse, bias) if may_be_empty else (out, lse)
    return _attend_in_chunks(q, k, v, bias, scale)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`, recomputed from the log-sum-exp.

    Args:
        grad_out: gradient of ``out``, ``[batch, heads, queries, head_dim]``.
        q: as in :func:`attend`; so are k, v, bias and scale.
        out: output over *all* keys of a query, of which k may be a part.
        lse: log-sum-exp over all keys of a query, minus the log-weight of this part; +inf (not
            -inf) for a query without any key.

    Returns:
        Gradients of q, k and v for this part.
    """
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_cpu_bias(bias, q), scale=scale
        )
        return grads[0], grads[1], grads[2]
    kernel = dense_cuda.choose(q, k, bias is not None, backward=True)
    if kernel is not None:
        return dense_cuda.attend_backward(grad_out, q, k, v, bias, out, lse, scale, kernel)
    return _attend_backward_in_chunks(grad_out, q, k, v, bias, out, lse, scale)


def key_bias(attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A key-padding mask as additive numbers ``[batch | 1, heads | 1, 1, seq]``.

    They are -inf, or numbers that stay finite in the dtype of q and in base 2.
    """
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool:
        numbers = attn_mask.to(lse_dtype(q.dtype))
        lowest = max(LOWEST_BIAS, torch.finfo(q.dtype).min)
        return torch.where(numbers == -math.inf, numbers, numbers.clamp(min=lowest))
    bias = torch.zeros(attn_mask.shape, dtype=lse_dtype(q.dtype), device=q.device)
    return bias.masked_fill_(~attn_mask, -math.inf)


def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, may_be_empty: bool
) -> tuple[Tensor, Tensor]:
    """The flash kernel, over stretches of the keys where its query tiles are small.

    Each query tile reads all keys. With few queries the tiles are small, and keys that do not fit
    the cache are read from memory again and again: up to 1.3 times slower (docs/notes/kernels.md).
    """
    keys = k.shape[2]
    if q.shape[2] >= CPU_LARGE_TILES or keys < 1.5 * CPU_KEY_STRETCH:
        out, lse = _flash_cpu(q, k, v, bias, scale)
        return _hide_empty(out, lse, bias) if may_be_empty else (out, lse)
    # A stretch of less than half the length joins the one before it.
    cuts = [*range(0, keys - CPU_KEY_STRETCH // 2 + 1, CPU_KEY_STRETCH), keys]
    out, lse = q.new_empty(0), q.new_empty(0)
    for start, stop in itertools.pairwise(cuts):
        part_bias = None if bias is None else bias[..., start:stop]
        part = _flash_cpu(q, k[:, :, start:stop], v[:, :, start:stop], part_bias, scale)
        part = _hide_empty(*part, part_bias)
        out, lse = merge(out, lse, *part, may_be_empty=bias is not None) if start else part
    return out.to(q.dtype), lse


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if bias is None and q.element_size() == 2 and q.shape[2] < CPU_LARGE_TILES:
        # Small query tiles read the keys many times: in one piece 2 to 5% faster, copying included
        # (float32 gains nothing).
        k, v = k.contiguous(), v.contiguous()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=_cpu_bias(bias, q), scale=scale
    )
    return out, lse


def _cpu_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(-1, -1, q.shape[2], -1)


def _hide_empty(out: Tensor, lse: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Set the rows whose keys are all hidden to (0, -inf), whatever a kernel left there."""
    if bias is None:
        return out, lse
    empty = (bias == -math.inf).all(-1)  # [batch | 1, heads | 1, 1]
    return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -math.inf)


def _chunks(q: Tensor, keys: int) -> list[slice]:
    rows = max(1, CHUNK_LOGITS // max(1, q.shape[0] * q.shape[1] * keys))
    return [slice(start, start + rows) for start in range(0, q.shape[2], rows)]


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over a bounded number of queries at a time, for devices without a fused kernel."""
    wide = lse_dtype(q.dtype)
    k_wide, v_wide = k.to(wide), v.to(wide)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    for rows in _chunks(q, k.shape[2]):
        logits = q[:, :, rows].to(wide) @ k_wide.transpose(-1, -2) * scale
        if bias is not None:
            logits = logits + bias
        chunk_lse = torch.logsumexp(logits, -1)
        finite = chunk_lse.masked_fill(chunk_lse == -math.inf, math.inf)
        out[:, :, rows] = ((logits - finite.unsqueeze(-1)).exp() @ v_wide).to(q.dtype)
        lse[:, :, rows] = chunk_lse
    return out, lse


def _attend_backward_in_chunks(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse_dtype(q.dtype)
    k_wide, v_wide = k.to(wide), v.to(wide)
    grad_q = torch.empty_like(q, dtype=wide)
    grad_k, grad_v = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for rows in _chunks(q, k.shape[2]):
        q_wide, grad = q[:, :, rows].to(wide), grad_out[:, :, rows].to(wide)
        logits = q_wide @ k_wide.transpose(-1, -2) * scale
        if bias is not None:
            logits = logits + bias
        weights = (logits - lse[:, :, rows].unsqueeze(-1)).exp()
        delta = (grad * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        grad_logits = weights * (grad @ v_wide.transpose(-1, -2) - delta) * scale
        grad_q[:, :, rows] = grad_logits @ k_wide
        grad_k += grad_logits.transpose(-1, -2) @ q_wide
        grad_v += weights.transpose(-1, -2) @ grad
    return grad_q, grad_k, grad_v
