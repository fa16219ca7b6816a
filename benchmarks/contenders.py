"""Who is measured: dense attention by every backend, FlexAttention, and the package."""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.shapes import Shape
from evdit_opt.kernels import tile_attention
from evdit_opt.kernels.flex import make_block_mask, make_score_mod
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import TileMask

__all__ = ["Attention", "compiled_ours", "dense_backends", "flex", "make_inputs", "ours", "timed"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, heads, seq, head_dim]`` of random numbers, heads inside of tokens."""
    torch.manual_seed(0)
    size = (1, shape.layout.seq_len, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def dense_backends(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[dict[str, Attention], dict[str, str]]:
    """Dense attention by every backend that can run here, and why the others cannot."""
    if inputs[0].device.type != "cuda":
        return {"dense": scaled_dot_product_attention}, {}
    can: dict[str, Attention] = {}
    cannot = {}
    for name, backend in BACKENDS.items():
        attention = partial(_dense, backend)
        try:
            attention(*inputs)
            can[f"dense {name}"] = attention
        except RuntimeError as error:
            cannot[f"dense {name}"] = str(error).splitlines()[0]
    return can, cannot


def ours(shape: Shape, mask: TileMask, impl: str) -> Attention:
    """Tile attention by one implementation."""
    return partial(tile_attention, mask=mask, layout=shape.layout, impl=impl)


def compiled_ours(shape: Shape, mask: TileMask) -> Attention:
    """Tile attention inside of a graph, compiled as a model is: inlined on a CPU."""
    from torch._inductor.compile_fx import compile_fx

    from evdit_opt.passes.inline_decomposed import inline_decomposed

    def backend(gm: Any, inputs: Any) -> Any:
        assert inline_decomposed(gm) == 1
        return compile_fx(gm, inputs)

    intervals, log_weights = map(list, mask.segments())
    arguments = (None, intervals, log_weights, shape.frames, shape.tokens, shape.prefix,
                 shape.suffix, None, "auto")  # fmt: skip

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.evdit.tile_attention.default(q, k, v, *arguments)[0]

    return torch.compile(attention, backend=backend, fullgraph=True, dynamic=False)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any) -> Tensor:
    return flex_attention(q, k, v, score_mod, block_mask)


def flex(shape: Shape, mask: TileMask, device: str, compiled: dict[Any, Any]) -> Attention:
    """FlexAttention, compiled, with a BlockMask of the kept tiles and the weights as a score_mod.

    Args:
        shape: the attention.
        mask: the tile mask.
        device: where it runs.
        compiled: filled with what was compiled, one entry per shape; masks share it.
    """
    geometry = Geometry(
        frames=shape.frames, tokens=shape.tokens, prefix=shape.prefix, suffix=shape.suffix
    )
    arguments = (*mask.segments(), geometry, torch.device(device))
    key = (shape, any(arguments[1]))
    if key not in compiled:
        # Dynamo counts recompilations per code object, and gives up after a few: a copy each.
        copy = FunctionType(_flex_attention.__code__.replace(), _flex_attention.__globals__)
        compiled[key] = torch.compile(copy, fullgraph=True, dynamic=False)
    score_mod, block_mask = make_score_mod(*arguments, None), make_block_mask(*arguments)
    return lambda q, k, v: compiled[key](q, k, v, score_mod, block_mask)


def timed(
    attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], grad_out: Tensor | None
) -> Callable[[], object]:
    """One call to be timed: forward, or with ``grad_out`` forward and backward."""
    if grad_out is None:

        def forward() -> object:
            with torch.no_grad():
                return attention(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad_out)
