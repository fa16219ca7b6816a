"""What the fused kernels share: the tensors they take, the order of programs, loads and stores.

Programs are numbered so that the ones that run together read the same memory. Tiles come in classes
of equal cost, the most expensive first, so that only cheap ones are left when the chip runs empty.
Within a class all tiles of one head follow each other, ascending by frame: those of one frame meet
exactly the same ranges, those of other frames the same reference frames, so what one program has
read the others find in the L2 cache. Query heads that share a key head are neighbours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.dense import key_bias
from evdit_opt.kernels.triton_configs import LaunchConfig, default_config
from evdit_opt.kernels.triton_tables import TILE_COLUMNS, Tables

__all__ = [
    "addressable",
    "bias_arguments",
    "check_supported",
    "config_for",
    "is_interpreted",
    "launch_options",
    "load_part",
    "locate",
    "on_device_of",
    "split_head_dim",
    "store_part",
    "strides",
    "writable",
]

COLUMNS = tl.constexpr(TILE_COLUMNS)
# Offsets inside of a block are 32 bits wide: at most 256 rows of this stride.
MAX_TOKEN_STRIDE = 1 << 23
# The interpreter's time goes with the number of blocks, not with their size.
INTERPRETER_CONFIG = LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=1)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two plus a smaller one (or 0), each at least 16: the least padding.

    Beside 128 columns the second part is 64: with 16 or 32 of them the gradient kernels spill
    hundreds of bytes, with 64 none (head_dim 160, all chips).
    """
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16 if first < 128 else 64, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)


def is_interpreted() -> bool:
    """True where Triton was imported with its interpreter on: kernels run on the CPU, slowly."""
    return not isinstance(locate, triton.JITFunction)


def check_supported(q: Tensor) -> None:
    """Check that the kernels can run on these tensors.

    Raises:
        UnsupportedInputError: if the tensors are not on a CUDA device of compute capability 8.0 or
            later (CPU tensors only under Triton's interpreter), or of another dtype than float32,
            float16 or bfloat16 (bfloat16 not in the interpreter, whose dot is wrong for it).
    """
    interpreted = is_interpreted()
    supported = (torch.float32, torch.float16) + (() if interpreted else (torch.bfloat16,))
    if q.device.type != "cuda" and not (interpreted and q.device.type == "cpu"):
        raise UnsupportedInputError(
            f"expected tensors on a CUDA device for impl='triton', got {q.device}; "
            "use impl='auto' or 'decomposed' there"
        )
    if q.dtype not in supported:
        raise UnsupportedInputError(
            f"expected one of {', '.join(map(str, supported))} for impl='triton', got {q.dtype}; "
            "cast q, k, v or use impl='decomposed'"
        )
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if torch.version.hip is not None or capability < (8, 0):
            raise UnsupportedInputError(
                "expected an NVIDIA GPU of compute capability 8.0 or later for impl='triton', got "
                f"{torch.cuda.get_device_name(q.device)}; use impl='decomposed' there"
            )


def config_for(kernel: str, q: Tensor) -> LaunchConfig:
    """The default configuration of "forward", "grad_q" or "grad_kv" on the device of ``q``."""
    if is_interpreted():
        return INTERPRETER_CONFIG
    capability = torch.cuda.get_device_capability(q.device)
    return default_config(kernel, capability, q.shape[-1], q.dtype)


def is_addressable(x: Tensor) -> bool:
    """True if the kernels can read and write ``x`` ``[batch, heads, seq, head_dim]`` as it lies."""
    return x.stride(-1) == 1 and x.stride(-2) <= MAX_TOKEN_STRIDE


def addressable(x: Tensor) -> Tensor:
    """``x`` as the kernels can read it, copied if it must be."""
    return x if is_addressable(x) else x.clone(memory_format=torch.contiguous_format)


def writable(x: Tensor) -> Tensor:
    """``x`` if the kernels can write it, otherwise a contiguous tensor to copy from."""
    if is_addressable(x):
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def bias_arguments(attn_mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, int, int]:
    """A key-padding mask as additive numbers, with its strides over batch and query heads."""
    bias = key_bias(attn_mask, q)
    if bias is None:
        return None, 0, 0
    bias = bias.contiguous()
    over_batch, over_heads = (bias.stride(n) if bias.shape[n] > 1 else 0 for n in (0, 1))
    return bias, over_batch, over_heads


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides over batch, heads and tokens of one tensor after the other; head_dim's is 1."""
    return tuple(step for x in tensors for step in x.stride()[:3])


def launch_options(
    config: LaunchConfig, head_dim: int, tables: Tables, bias: Tensor | None
) -> dict[str, Any]:
    """What every kernel over ``tables`` is compiled for."""
    first, second = split_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim, "PART_0": first, "PART_1": second,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "HAS_BIAS": bias is not None, "HAS_WEIGHTS": tables.is_weighted,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Kernels start on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


@triton.jit
def locate(tiles_ptr, batches, heads):
    """This program's work: batch, head, first token, number of tokens, first and last range."""
    program = tl.program_id(0)
    row = tiles_ptr + COLUMNS * (program // (batches * heads))
    class_start = tl.load(row + 4)
    class_size = tl.load(row + 5)
    within = program - class_start * (batches * heads)
    row = tiles_ptr + COLUMNS * (class_start + within % class_size)
    start = tl.load(row)
    count = tl.load(row + 1) - start
    # 64 bits: batch, head and token offsets of a long video pass 2**31 elements.
    batch = (within // class_size // heads).to(tl.int64)
    head = (within // class_size % heads).to(tl.int64)
    return batch, head, start, count, tl.load(row + 2), tl.load(row + 3)


@triton.jit
def load_part(base, stride, rows, columns, row_limit, HEAD_DIM, MASK_ROWS, MASK_COLUMNS):
    """Rows of a [rows, HEAD_DIM] matrix, zero outside of it. # [ROWS, COLUMNS]"""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        inside = (rows[:, None] < row_limit) & (columns[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_part(base, stride, rows, columns, row_limit, values, HEAD_DIM):
    """Inverse of ``load_part``, in the dtype of the matrix."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    inside = (rows[:, None] < row_limit) & (columns[None, :] < HEAD_DIM)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)
