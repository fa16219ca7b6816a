"""Every chip has a configuration for every call, and a few more to time."""

import pytest
import torch

from evdit_opt.kernels.triton_configs import (
    SHARED_KIB,
    LaunchConfig,
    candidates,
    default_config,
    family,
    shared_kib,
)

CAPABILITIES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
KERNELS = ("forward", "grad_q", "grad_kv")


def test_an_unknown_chip_gets_what_fits_everywhere() -> None:
    assert SHARED_KIB[family((13, 0))] == min(SHARED_KIB.values())


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit_and_start_with_the_default(
    kernel: str, capability: tuple[int, int]
) -> None:
    for head_dim in (1, 16, 64, 72, 80, 96, 128, 192, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = candidates(kernel, capability, head_dim, dtype)
            assert found[0] == default_config(kernel, capability, head_dim, dtype)
            assert not found[0].use_tma
            assert len(set(found)) == len(found)
            if dtype == torch.float32:
                continue
            limit = SHARED_KIB[family(capability)]
            assert all(shared_kib(kernel, c, head_dim) <= limit for c in found)
            assert len(found) > 4 or head_dim > 128
            tma = any(c.use_tma for c in found)
            assert tma == (kernel == "forward" and capability >= (9, 0))


def test_the_arithmetic_of_shared_memory() -> None:
    """As the compiler reports it for sm_90 (tests/kernels/test_triton_compile.py prints it)."""
    config = LaunchConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)
    assert [shared_kib("forward", config, d) for d in (64, 96, 128)] == [64, 96, 128]
    config = LaunchConfig(block_m=32, block_n=128, num_warps=8, num_stages=2)
    assert [shared_kib("grad_kv", config, d) for d in (64, 96, 128)] == [48, 72, 96]
