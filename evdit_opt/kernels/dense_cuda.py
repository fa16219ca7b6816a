"""Dense attention with its log-sum-exp on CUDA devices, forward and backward, by fused kernels.

PyTorch has three: cuDNN's (the fastest on Hopper and Blackwell), flash attention, and the
memory-efficient one (the only one for float32 and for a bias). ``choose`` says which one a call
takes, from what the host knows: nothing here waits for the device. The limits are those of
PyTorch's own ``scaled_dot_product_attention``, and so are the switches: ``torch.backends.cuda``,
``torch.nn.attention.sdpa_kernel``, and ``torch.nn.attention.activate_flash_attention_impl("FA3")``,
which puts an installed flash-attn 3 or 4 in the place of the flash kernel.

The kernels are private ATen operators: ``tests/kernels/test_dense_cuda.py`` pins their signatures.
All three backward kernels recompute the attention weights as exp(logit - lse) from the log-sum-exp
they are given. With the *final* one of a query, the gradients of its pieces add up.
"""

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

__all__ = ["Kernel", "attend", "attend_backward", "choose"]

Kernel = Literal["cudnn", "flash", "efficient"]

DEVICES = ("cuda",)
HALF = (torch.float16, torch.bfloat16)
# Older ones are wrong for sequences that are not a multiple of 128 (PyTorch issue 169849).
MIN_CUDNN = 91501
# cuDNN's grid: batch and heads are launch dimensions.
MAX_CUDNN_GRID = 65535
# Elements: the kernels load 16 bytes of float16 at a time.
ALIGNMENT = 8
# The efficient kernel reads the log-sum-exp in blocks of this many queries.
LSE_BLOCK = 32


def choose(q: Tensor, k: Tensor, has_bias: bool, backward: bool = False) -> Kernel | None:
    """The fused kernel for a call; None if there is none, and it must be computed otherwise.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k: ``[batch, heads, keys, head_dim]``.
        has_bias: whether something is added to the logits.
        backward: whether the question is about the gradient.
    """
    if q.device.type not in DEVICES:
        return None
    capability = torch.cuda.get_device_capability(q.device)
    width = _aligned_width(q)
    if q.dtype not in (*HALF, torch.float32) or (backward and torch.version.hip is not None):
        return None
    if capability >= (8, 0) and q.dtype in HALF and not has_bias:
        flash = torch.backends.cuda.flash_sdp_enabled() and _flash_fits(capability, width, backward)
        # Whoever activated another flash attention by name wants it used.
        if flash and current_flash_attention_impl() is not None:
            return "flash"
        if torch.backends.cuda.cudnn_sdp_enabled() and _cudnn_fits(q, k, capability, width):
            return "cudnn"
        if flash:
            return "flash"
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return None
    return "efficient" if capability >= (8, 0) or q.dtype != torch.bfloat16 else None


def _flash_fits(capability: tuple[int, int], width: int, backward: bool) -> bool:
    # The backward kernel of wide heads needs the shared memory of a data-centre chip.
    large = capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    return width <= (256 if large or not backward else 192)


def _cudnn_fits(q: Tensor, k: Tensor, capability: tuple[int, int], width: int) -> bool:
    version = torch.backends.cudnn.version()
    strict = torch.are_deterministic_algorithms_enabled()
    nondeterministic = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
    return (
        torch.version.hip is None
        and capability[0] in (9, 10)  # elsewhere flash attention is as fast
        and version is not None
        and version >= MIN_CUDNN
        and not nondeterministic
        and width <= 128
        and min(q.shape[2], k.shape[2]) > 1
        and max(q.shape[:2]) <= MAX_CUDNN_GRID
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query with every key, by one kernel.

    Args and returns as in :func:`evdit_opt.kernels.dense.attend`; where the bias hides every key of
    a query, its results are undefined. q, k and v are copied only if head_dim, a stride or their
    position in memory is not a multiple of 8 elements.
    """
    aten = torch.ops.aten
    width = q.shape[-1]
    q, k, v = (_aligned(x) for x in (q, k, v))
    if kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, False, scale=scale
        )
        lse = lse.reshape(q.shape[:3])  # [batch, heads, queries, 1] in some versions
    elif kernel == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _expanded(bias, q, k), True, 0.0, False, scale=scale
        )
    return out[..., :width], lse[..., : q.shape[2]]


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by one kernel, for this part of the keys.

    Args and returns as in :func:`evdit_opt.kernels.dense.attend_backward`. out and grad_out are
    copied if their strides differ, which cuDNN does not take.
    """
    aten = torch.ops.aten
    width = q.shape[-1]
    q, k, v, out, grad_out = (_aligned(x) for x in (q, k, v, out, grad_out))
    queries, keys = q.shape[2], k.shape[2]
    lse = lse.contiguous()  # all three index it without looking at its strides
    # State of a random generator: without dropout nobody reads it.
    unused = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    if kernel == "cudnn":
        if grad_out.stride() != out.stride():
            out, grad_out = _token_major(out), _token_major(grad_out)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.reshape(_cudnn_lse_shape(lse)), *unused, None, None, None,
            queries, keys, 0.0, False, scale=scale,
        )  # fmt: skip
    elif kernel == "flash":
        state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, queries, keys, 0.0, False, *state, scale=scale
        )
    else:
        # Its kernel computes the stride between tokens of out from the number of heads.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = torch.nn.functional.pad(lse, (0, -queries % LSE_BLOCK), value=math.inf)
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, _expanded(bias, q, k), out, lse, *unused, 0.0,
            [True, True, True, False], False, scale=scale,
        )  # fmt: skip
    return grads[0][..., :width], grads[1][..., :width], grads[2][..., :width]


def _aligned_width(x: Tensor) -> int:
    return -(-x.shape[-1] // ALIGNMENT) * ALIGNMENT


def _aligned(x: Tensor) -> Tensor:
    """``x`` with head_dim filled up, and every row starting, at a multiple of 8 elements."""
    missing = -x.shape[-1] % ALIGNMENT
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = all(step > 0 and step % ALIGNMENT == 0 for step in steps)
    if fits and x.stride(-1) == 1 and x.storage_offset() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _token_major(x: Tensor) -> Tensor:
    """A copy of ``x`` ``[batch, heads, tokens, head_dim]`` with a token's heads side by side."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2).copy_(x)


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias in q's dtype, for every query, in a storage whose rows are multiples of 16 long."""
    if bias is None:
        return None
    keys = k.shape[2]
    storage = bias.new_zeros((*bias.shape[:3], -(-keys // 16) * 16), dtype=q.dtype)
    storage[..., :keys] = bias
    return storage[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)


def _cudnn_lse_shape(lse: Tensor) -> tuple[int, ...]:
    return (*lse.shape, 1) if _cudnn_lse_has_four_dims() else tuple(lse.shape)


@cache
def _cudnn_lse_has_four_dims() -> bool:
    """What cuDNN's operators call a log-sum-exp differs between versions; the meta kernel knows."""
    x = torch.empty(1, 1, 2, 8, dtype=torch.float16, device="meta")
    lse = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return lse.dim() == 4
