"""nn.MultiheadAttention is opened; what it can do beyond SDPA is left alone."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from evdit_opt.passes.canonicalize_mha import canonicalize_mha
from evdit_opt.passes.graph import (
    LEFT_ALONE,
    attention_calls,
    copy_graph,
    read_attention,
    value_of,
)
from evdit_opt.passes.stand_in import settle
from tests.passes.spelled import dynamo_graph

BATCH, SEQ, HEADS, DIM = 2, 6, 2, 16
X, CONTEXT = torch.randn(2, 2, SEQ, DIM, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(SEQ)[None] >= torch.tensor([[4], [5]])  # True: no key
Call = Callable[[nn.MultiheadAttention], object]


def module(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options}).eval()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return attention


def opened(call: Call, **options: object) -> tuple[fx.GraphModule, list, Tensor]:
    attention = module(**options)
    gm = dynamo_graph(lambda: call(attention))
    with torch.no_grad():
        before = run(copy_graph(gm), attention)
    stand_ins = list(canonicalize_mha(gm.graph))
    gm.graph.lint()
    gm.recompile()
    if stand_ins:
        with torch.no_grad():
            torch.testing.assert_close(run(gm, attention), before)
    return gm, stand_ins, before


def run(gm: fx.GraphModule, attention: nn.MultiheadAttention) -> Tensor:
    """Inputs are the weights and constants of the closure, told by their shapes and names."""
    known = {
        "in_proj_weight": attention.in_proj_weight,
        "in_proj_bias": attention.in_proj_bias,
        "q_proj_weight": attention.q_proj_weight,
        "k_proj_weight": attention.k_proj_weight,
        "v_proj_weight": attention.v_proj_weight,
        "out_proj_parameters_weight": attention.out_proj.weight,
        "out_proj_parameters_bias": attention.out_proj.bias,
        "context": CONTEXT,
        "padding": PADDING,
        "_x_": X,
        "bias_k": attention.bias_k,
        "bias_v": attention.bias_v,
    }
    names = [
        node.name.lower().replace("dict_", "") + "_"  # there in training only
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    return gm(*(next(x for key, x in known.items() if key in name) for name in names))[0]


WAYS: dict[str, tuple[Call, dict]] = {
    "self": (lambda m: m(X, X, X)[0], {}),
    "weights-unread": (lambda m: m(X, X, X, need_weights=True)[0], {}),
    "no-weights": (lambda m: m(X, X, X, need_weights=False)[0], {}),
    "cross": (lambda m: m(X, CONTEXT, CONTEXT)[0], {}),
    "sequence-first": (lambda m: m(X, X, X)[0], {"batch_first": False}),
    "no-bias": (lambda m: m(X, X, X)[0], {"bias": False}),
    "other-widths": (lambda m: m(X, CONTEXT[..., :8], CONTEXT[..., :4])[0], {"kdim": 8, "vdim": 4}),
    "padding": (lambda m: m(X, X, X, key_padding_mask=PADDING)[0], {}),
    "mask": (lambda m: m(X, X, X, attn_mask=torch.linspace(-1, 1, SEQ).expand(SEQ, SEQ))[0], {}),
    "mask-per-head": (
        lambda m: m(X, X, X, attn_mask=PADDING[:1].expand(BATCH * HEADS, SEQ, SEQ))[0],
        {},
    ),
    "dropout-off": (lambda m: m(X, X, X)[0], {"dropout": 0.3}),
}


@pytest.mark.parametrize(("call", "options"), WAYS.values(), ids=WAYS)
def test_it_becomes_one_call(call: Call, options: dict) -> None:
    gm, stand_ins, _ = opened(call, **options)
    assert len(stand_ins) == 1
    (attention,) = attention_calls(gm.graph)
    q = value_of(read_attention(attention).q)
    assert q.shape[1] == HEADS
    assert q.shape[3] == DIM // HEADS
    taken = stand_ins[0].attention
    with gm.graph.inserting_before(taken):
        zeros = gm.graph.call_function(torch.zeros_like, (taken.args[0],))
    taken.replace_all_uses_with(zeros)
    gm.graph.erase_node(taken)
    settle(stand_ins)
    assert "multi_head_attention" not in str(gm.graph)
    gm.graph.lint()


def test_what_is_not_taken_comes_back() -> None:
    attention = module()
    gm = dynamo_graph(lambda: attention(X, X, X)[0])
    before = gm.graph.python_code("self").src
    settle(list(canonicalize_mha(gm.graph)))
    assert gm.graph.python_code("self").src == before


@pytest.mark.parametrize(
    ("call", "options", "reason"),
    [
        (lambda m: m(X, X, X), {}, "used elsewhere"),
        (lambda m: m.train()(X, X, X)[0], {"dropout": 0.3}, r"dropout 0\.3"),
        (lambda m: m(X, X, X)[0], {"add_bias_kv": True}, "keys of its own"),
        (lambda m: m(X, X, X)[0], {"add_zero_attn": True}, "keys of its own"),
        (lambda m: m(X[0], X[0], X[0])[0], {}, "no batch dimension"),
        (
            lambda m: m(X, X, X, key_padding_mask=PADDING, attn_mask=torch.eye(SEQ) > 2)[0],
            {},
            "another one",
        ),
    ],
    ids=["weights-read", "dropout", "bias-kv", "zero", "unbatched", "two-masks"],
)
def test_what_one_call_cannot_compute_is_left_alone(call: Call, options: dict, reason: str) -> None:
    gm, stand_ins, _ = opened(call, **options)
    assert stand_ins == []
    (found,) = [node.meta[LEFT_ALONE] for node in gm.graph.nodes if LEFT_ALONE in node.meta]
    assert re.search(reason, found), found
    (kept,) = [n for n in gm.graph.nodes if n.target is F.multi_head_attention_forward]
    assert LEFT_ALONE in kept.meta
