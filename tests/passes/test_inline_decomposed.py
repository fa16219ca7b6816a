"""Inlining: the same numbers from what Inductor makes of the pieces, and only where it may."""

from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule, TileMask
from evdit_opt.passes import inline_decomposed
from tests.kernels.oracle import oracle
from tests.often import often
from tests.passes.graph_builder import GraphBuilder, calls
from tests.tolerance import assert_close_to_fp64

OP = torch.ops.evdit.tile_attention.default
LAYOUT = TokenLayout(VideoGrid(7, 9, 1), prefix=3)
MASKS = {
    "references": Rule(2, 0, "balanced", "centred"),
    "references and window": Rule(2, 1),
    "window": Rule(0, 1),
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: TileMask, impl: str = "decomposed") -> Any:
    grid = LAYOUT.grid
    return OP(
        q, k, v, None, *map(list, mask.segments()), grid.frames, grid.tokens_per_frame,
        LAYOUT.prefix, LAYOUT.suffix, None, impl,
    )  # fmt: skip


def backend(inlined: list[int]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    def compile_inlined(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        inlined.append(inline_decomposed.inline_decomposed(gm))
        return compile_fx(gm, inputs)

    return compile_inlined


@pytest.mark.parametrize("impl", ["decomposed", "masked", "auto"])
@pytest.mark.parametrize("rule", MASKS.values(), ids=MASKS)
def test_inductor_computes_the_pieces(rule: Rule, impl: str) -> None:
    mask, inlined = rule.mask(7), []

    def model(x: Tensor) -> Tensor:  # [1, seq, 3 * heads * head_dim]
        q, k, v = x.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        out, _ = attend(torch.cos(q), k * 2, v + 1, mask, impl)
        return torch.sin(out.transpose(1, 2).flatten(2))

    torch._dynamo.reset()  # one function, compiled for every mask and implementation
    x = torch.randn(1, LAYOUT.seq_len, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = torch.compile(model, backend=backend(inlined), dynamic=False)(x)
    assert inlined == [1]

    def exact(dtype: torch.dtype) -> Tensor:
        wide = x.to(dtype)
        q, k, v = wide.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        out, _ = oracle(torch.cos(q), k * 2, v + 1, mask, LAYOUT, dtype=dtype)
        return torch.sin(out.transpose(1, 2).flatten(2))

    assert_close_to_fp64(out, exact(torch.float64), exact(torch.float32), "out")


@pytest.mark.parametrize("batch", often(["2"], {"1": 1, "2": 2}))
def test_tensors_that_lie_within_larger_ones(batch: int) -> None:
    """What is reordered is read from memory: where it starts there, and its strides, count."""
    mask, inlined = Rule(2).mask(7), []

    def model(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.mul(2)[:, 1:, 3:].unflatten(2, (2, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        out, _ = attend(q, k, v, mask)
        return out

    q = torch.randn(3, batch, 4, LAYOUT.seq_len, 24)[1, :, 1:3, :, 5:21]
    kv = torch.randn(1 + batch, LAYOUT.seq_len + 1, 67)[1:]
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=backend(inlined), dynamic=False)(q, kv)
        torch.testing.assert_close(out, model(q, kv))
    assert inlined == [1]


def test_rules_share_kernels() -> None:
    """Kernels are what compiling costs: what reorders and what merges serve every rule."""
    rules, inlined = [Rule(2), Rule(3), Rule(2, spacing="centred")], []

    def model(x: Tensor) -> Tensor:  # [1, seq, 3 * heads * head_dim]
        for rule in rules:
            q, k, v = x.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
            out, _ = attend(q, k, v, rule.mask(7))
            x = torch.cat([out.transpose(1, 2).flatten(2)] * 3, 2)
        return x

    x = torch.randn(1, LAYOUT.seq_len, 96)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend(inlined), dynamic=False)
        out, (code,) = run_and_get_code(compiled, x)
        torch.testing.assert_close(out, model(x))
    assert inlined == [3]
    kernels = [line.split(" = ")[0] for line in code.splitlines() if "async_compile.cpp" in line]
    merges = [name for name in kernels if "sigmoid" in name]
    assert len(merges) == 2, kernels  # after the last one nothing is reordered
    assert len(kernels) <= 4, kernels


def test_two_masks_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call keeps its own mask, calls with the same one share it, and no call makes one."""
    masks, inlined = [Rule(1).mask(7), Rule(2, 1).mask(7), Rule(1).mask(7)], []
    q, k, v = (torch.randn(1, 2, LAYOUT.seq_len, 16) for _ in range(3))

    def model(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [attend(q, k, v, mask, "masked")[0] for mask in masks]

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend(inlined), dynamic=False)
        compiled(q, k, v)
        monkeypatch.setattr(TileMask, "expand", None)
        outs = compiled(q, k, v)
    assert inlined == [3]
    for out, mask in zip(outs, masks, strict=True):
        exact, _ = oracle(q, k, v, mask, LAYOUT)
        eager, _ = oracle(q, k, v, mask, LAYOUT, dtype=torch.float32)
        assert_close_to_fp64(out, exact, eager, "out")
    build = graph("masked")
    (node,) = build.graph.find_nodes(op="call_function", target=OP)
    with build.graph.inserting_after(node):
        build.graph.call_function(OP, node.args)
    with torch.no_grad():
        assert inline_decomposed.inline_decomposed(build) == 2
    assert [n.target for n in build.graph.nodes if n.op == "get_attr"] == ["evdit_bias_0"] * 2


def test_the_mask_of_a_short_call_is_not_copied() -> None:
    mask = Rule(1).mask(7)
    q, k, v = (torch.randn(1, LAYOUT.seq_len, 2, 16).transpose(1, 2) for _ in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: attend(*x, mask, "masked")[0], backend=backend([]), dynamic=False
    )
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, q, k, v)
    assert "_scaled_dot_product_flash_attention_for_cpu" in code
    assert "cpp_fused" not in code, code


def test_masks_of_bodies_inside_of_a_graph() -> None:
    mask, inlined = Rule(2, 1).mask(7), []
    q, k, v = (torch.randn(1, 2, LAYOUT.seq_len, 16) for _ in range(3))

    def model(q: Tensor) -> Tensor:
        inside = [
            checkpoint(lambda q: attend(q, k, v, mask, "masked")[0], q, use_reentrant=False)
            for _ in range(2)
        ]
        return inside[0] + inside[1] + attend(q, k, v, mask, "masked")[0]

    with torch.no_grad():
        out = torch.compile(model, backend=backend(inlined), dynamic=False)(q)
    assert inlined == [3]
    exact, _ = oracle(q, k, v, mask, LAYOUT)
    eager, _ = oracle(q, k, v, mask, LAYOUT, dtype=torch.float32)
    assert_close_to_fp64(out, 3 * exact, 3 * eager, "out")


def test_under_autocast_the_operator_chooses_the_dtype() -> None:
    mask, inlined = Rule(1).mask(7), []
    q, k, v = (torch.randn(1, 2, LAYOUT.seq_len, 16) for _ in range(3))
    for impl in ("decomposed", "masked"):
        compiled = torch.compile(
            lambda i=impl: attend(q, k, v, mask, i)[0], backend=backend(inlined)
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert compiled().dtype == torch.bfloat16
    assert inlined == [1, 1]


def graph(
    impl: str,
    tokens: Any = 9,
    device: str = "cpu",
    padding: torch.dtype | None = None,
    reads: int = 0,
) -> fx.GraphModule:
    build = GraphBuilder()
    seq = 3 + 7 * (tokens or 9)
    nodes = [build.input(f"l_{name}_", 1, 2, seq, 16) for name in "qkv"]
    for node in nodes:
        node.meta["example_value"] = torch.empty(1, 2, seq, 16, device=device)
    attn_mask = None
    if padding is not None:
        attn_mask = build.input("l_padding_", 1, 1, 1, seq)
        attn_mask.meta["example_value"] = torch.zeros(1, 1, 1, seq, dtype=padding)
    rows = list(map(list, Rule(1).mask(7).segments()))
    node = build.graph.call_function(OP, (*nodes, attn_mask, *rows, 7, tokens, 3, 0, None, impl))
    return build.module(build.graph.call_function(getitem, (node, reads)))


@pytest.mark.parametrize(
    ("arguments", "grad", "expected"),
    [
        ({"impl": "auto", "tokens": 200}, False, 1),
        ({"impl": "auto"}, False, 1),
        ({"impl": "auto", "tokens": 50}, False, 1),
        ({"impl": "masked"}, False, 1),
        ({"impl": "decomposed"}, False, 1),
        ({"impl": "decomposed", "padding": torch.bool}, False, 1),
        ({"impl": "decomposed", "padding": torch.float32}, False, 0),
        ({"impl": "decomposed", "reads": 1}, False, 0),
        ({"impl": "decomposed"}, True, 0),
        ({"impl": "reference"}, False, 0),
        ({"impl": "decomposed", "device": "meta"}, False, 0),
        ({"impl": "decomposed", "tokens": None}, False, 0),
    ],
    ids=[
        "auto",
        "auto, tiny",
        "auto, short",
        "masked",
        "decomposed",
        "bool mask",
        "additive mask",
        "log-sum-exp",
        "gradients",
        "reference",
        "another device",
        "dynamic",
    ],
)
def test_only_where_it_is_the_same_computation(
    arguments: dict[str, Any], grad: bool, expected: int
) -> None:
    gm = graph(**arguments)
    with torch.set_grad_enabled(grad):
        assert inline_decomposed.inline_decomposed(gm) == expected
    operators = [n for n in calls(gm, "tile_attention") if n.target is OP]
    assert len(operators) == 1 - expected
