"""Tile attention in standard operators: the numbers of the operator, and nothing but ATen."""

import operator

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.export.standard_ops import attend_in_blocks, use_standard_ops
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from tests.kernels.oracle import Case, cases, oracle
from tests.tolerance import assert_close_to_fp64

OP = torch.ops.evdit.tile_attention.default
LAYOUT = TokenLayout(VideoGrid(7, 9, 1), prefix=3, suffix=2)


@settings(max_examples=60)
@given(cases((torch.float32, torch.float64, torch.bfloat16, torch.float16), max_tokens=600))
def test_any_call_of_the_operator(case: Case) -> None:
    q, k, v, attn_mask = case.tensors()
    layout, mask = case.layout, case.mask
    with torch.no_grad():
        out = attend_in_blocks(
            q, k, v, attn_mask, *map(list, mask.segments()), layout.grid.frames,
            layout.grid.tokens_per_frame, layout.prefix, layout.suffix, case.scale, "auto",
        )  # fmt: skip
    exact, _ = oracle(q, k, v, mask, layout, case.scale, attn_mask)
    eager, _ = oracle(q, k, v, mask, layout, case.scale, attn_mask, dtype=case.dtype)
    assert_close_to_fp64(out, exact, eager, "out")


def test_queries_whose_keys_are_all_hidden_get_zeros() -> None:
    mask = Rule(0).mask(7)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 8)
    hidden = torch.ones(1, 1, 1, LAYOUT.seq_len, dtype=torch.bool)
    hidden[..., 3 : 3 + 9] = False  # the keys of frame 0
    hidden[..., :3] = hidden[..., -2:] = False  # and the text, the rest of what it sees
    for attn_mask in (hidden, torch.zeros(hidden.shape).masked_fill(~hidden, -torch.inf)):
        out = attend_in_blocks(
            q, k, v, attn_mask, *map(list, mask.segments()), 7, 9, 3, 2, None, "auto"
        )
        exact, _ = oracle(q, k, v, mask, LAYOUT, attn_mask=attn_mask)
        assert_close_to_fp64(out, exact, out, "out")
        assert (out[:, :, 3 : 3 + 9] == 0).all()
        assert not (out[:, :, 3 + 9] == 0).any()


def graph(rule: Rule, *, read: int) -> fx.GraphModule:
    """``both = evdit.tile_attention(q, k, v, ...); return both[read]``"""
    built = fx.Graph()
    q, k, v = (built.placeholder(name) for name in "qkv")
    segments = map(list, rule.mask(7).segments())
    both = built.call_function(OP, (q, k, v, None, *segments, 7, 9, 3, 2, None, "auto"))
    built.output(built.call_function(operator.getitem, (both, read)))
    return fx.GraphModule(torch.nn.Module(), built)


@pytest.mark.parametrize("rule", [Rule(2, 0, "balanced", "centred"), Rule(1, 1)], ids=str)
def test_the_pass_leaves_standard_operators_only(rule: Rule) -> None:
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 8, dtype=torch.float64)
    gm = graph(rule, read=0)
    before = gm(q, k, v)
    assert use_standard_ops(gm) == 1
    with torch.no_grad():
        program = torch.export.export(gm, (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), before)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    attentions = [node for node in calls if "scaled_dot_product_attention" in str(node.target)]
    distinct = len(set(rule.mask(7).rows) | {(0.0,) * 7})  # text queries keep everything
    assert len(attentions) == distinct
    spaces = {node.target.namespace for node in calls if hasattr(node.target, "namespace")}
    assert spaces == {"aten"}


def test_a_graph_that_reads_the_log_sum_exp_keeps_the_operator() -> None:
    gm = graph(Rule(1), read=1)
    with pytest.raises(UnsupportedInputError, match="log-sum-exp"):
        use_standard_ops(gm)
