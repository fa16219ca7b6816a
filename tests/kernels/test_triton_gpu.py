"""The fused kernels on a GPU: every dtype and configuration, graphs, the same bits twice."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.kernels.triton_configs import LaunchConfig, candidates
from evdit_opt.masks import Rule
from tests.kernels.fused import check_backward, check_forward
from tests.kernels.oracle import Case, cases

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASE = Case(
    mask=Rule(1, 1, "balanced").mask(5), layout=TokenLayout(VideoGrid(5, 131, 1), prefix=7),
    batch=2, heads=4, kv_heads=2, head_dim=96, dtype=torch.bfloat16, kind="packed", padding="bool",
    scale=None, seed=1,
)  # fmt: skip


@given(cases(DTYPES))
@settings(max_examples=60)
def test_forward(case: Case) -> None:
    check_forward(case, "cuda")


@given(cases(DTYPES))
@settings(max_examples=60)
def test_backward(case: Case) -> None:
    check_backward(case, "cuda")


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_every_candidate(kernel: str, head_dim: int) -> None:
    from evdit_opt.kernels import triton_backward, triton_forward

    module = triton_forward if kernel == "forward" else triton_backward
    default = module.config_for
    case = dataclasses.replace(CASE, head_dim=head_dim)
    for config in candidates(kernel, torch.cuda.get_device_capability(), head_dim, torch.bfloat16):

        def chosen(name: str, q: torch.Tensor, config: LaunchConfig = config) -> LaunchConfig:
            return config if name == kernel else default(name, q)

        with mock.patch.object(module, "config_for", chosen):
            (check_forward if kernel == "forward" else check_backward)(case, "cuda")


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, _ = CASE.tensors()
    return q, k, v


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = tile_attention(q, k, v, CASE.mask, CASE.layout, impl="triton")
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v))


def test_the_same_bits_twice() -> None:
    tensors = [x.cuda().requires_grad_() for x in qkv()]
    first, second = step(*tensors), step(*tensors)
    assert all(map(torch.equal, first, second))


def test_cuda_graphs_of_torch_compile() -> None:
    tensors = [x.cuda().requires_grad_() for x in qkv()]

    def call(*x: torch.Tensor) -> torch.Tensor:
        return tile_attention(*x, CASE.mask, CASE.layout, impl="triton")

    expected = step(*tensors)
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        assert all(map(torch.equal, (out, *grads), expected))
