"""Block sizes and launch options of the fused kernels, by chip, head_dim and dtype.

Chosen by compiling (``tests/kernels/test_triton_compile.py``), not by speed: no GPU has run them
yet. A default is the largest configuration that fits into the chip's shared memory and keeps its
accumulators in registers; ``candidates`` lists what is worth timing. Data only, no Triton import.
"""

from dataclasses import dataclass

import torch

__all__ = ["SHARED_KIB", "LaunchConfig", "candidates", "default_config", "family", "shared_kib"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Block sizes and launch options of one kernel.

    Attributes:
        block_m: queries of a block.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over blocks.
        use_tma: the forward kernel reads whole key blocks by the tensor memory accelerator, which
            compute capability 9.0 and later have.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""Shared memory that one program can have, by family."""

_FAMILIES = {
    (8, 0): "sm_80", (8, 7): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90",
    (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip

_HEAD_DIMS = (64, 96, 128, 256)

# By kernel and family, for head_dim up to 64, 96, 128 and 256, in float16 and bfloat16:
# (block_m, block_n, num_warps, num_stages).
_HALF = {
    "forward": {
        "sm_80": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "sm_89": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        "sm_90": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "sm_100": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "sm_120": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 1)),
    },
    "grad_q": {
        "sm_80": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_89": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_90": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (32, 32, 4, 2)),
        "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2)),
        "sm_120": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    },
    "grad_kv": {
        "sm_80": ((32, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_89": ((32, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_90": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2)),
        "sm_100": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        "sm_120": ((32, 128, 8, 2), (16, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    },
}

# float32 is computed exactly, without tensor cores: small blocks, the same for every family but
# sm_90, where the same code takes more registers.
_FLOAT32 = {
    "forward": ((64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    "grad_q": ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "grad_kv": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}
_FLOAT32_SM_90 = {
    "forward": ((32, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1), (32, 16, 16, 1)),
    "grad_q": ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 64, 8, 1)),
    "grad_kv": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}

_CANDIDATES = {
    "forward": (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2), (256, 64, 16, 2),
    ),
    "grad_q": (
        (128, 128, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3),
        (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (32, 32, 8, 2),
    ),
    "grad_kv": (
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (16, 128, 8, 3),
        (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3),
        (32, 32, 8, 2),
    ),
}  # fmt: skip


def family(capability: tuple[int, int]) -> str:
    """The family whose configurations a chip uses; one that asks for little if it is not known."""
    return _FAMILIES.get(capability, "sm_89")


def default_config(
    kernel: str, capability: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> LaunchConfig:
    """The committed configuration.

    Args:
        kernel: "forward", "grad_q" or "grad_kv".
        capability: compute capability of the device.
        head_dim: 1 to 256.
        dtype: float32, float16 or bfloat16.
    """
    chip = family(capability)
    exact = _FLOAT32_SM_90 if chip == "sm_90" else _FLOAT32
    table = exact[kernel] if dtype == torch.float32 else _HALF[kernel][chip]
    return _config(next(c for d, c in zip(_HEAD_DIMS, table, strict=True) if head_dim <= d))


def candidates(
    kernel: str, capability: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[LaunchConfig, ...]:
    """Configurations worth timing that fit into shared memory, the default first.

    Args as of :func:`default_config`. Some spill registers: a sweep sees that in their time.
    """
    default = default_config(kernel, capability, head_dim, dtype)
    if dtype == torch.float32:
        return (default,)
    others = [_config(c) for c in _CANDIDATES[kernel]]
    if kernel == "forward" and capability >= (9, 0):
        others += [_config(c, use_tma=True) for c in _CANDIDATES[kernel]]
    limit = SHARED_KIB[family(capability)]
    fitting = [c for c in others if shared_kib(kernel, c, head_dim) <= limit and c != default]
    return (default, *fitting)


def shared_kib(kernel: str, config: LaunchConfig, head_dim: int) -> float:
    """Shared memory of a configuration in float16 or bfloat16 on Hopper, by its arithmetic."""
    width = -(-head_dim // 16) * 16
    queries, keys = config.block_m * width, config.block_n * width
    if kernel == "forward":
        numbers = queries + config.num_stages * 2 * keys
    elif kernel == "grad_q":
        numbers = 2 * queries + config.num_stages * 2 * keys
    else:
        numbers = 2 * keys + config.num_stages * 2 * queries
    return numbers * 2 / 1024


def _config(numbers: tuple[int, int, int, int], use_tma: bool = False) -> LaunchConfig:
    block_m, block_n, num_warps, num_stages = numbers
    return LaunchConfig(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages,
        use_tma=use_tma,
    )  # fmt: skip
