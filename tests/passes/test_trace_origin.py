"""Where q, k and v come from."""

import operator

import torch

from evdit_opt.passes.trace_origin import Origin, common_origin, is_parameter, trace_origins
from tests.passes.graph_builder import GraphBuilder


def start() -> tuple[GraphBuilder, torch.fx.Node]:
    build = GraphBuilder()
    return build, build.input("l_x_", 1, 24, 16)


def test_a_projection_ends_the_walk() -> None:
    build, x = start()
    projection = build.linear(build.linear(x))
    origin = Origin(build.heads(projection))
    assert origin.roots == {projection.args[0]}
    assert origin.projections[projection.args[0]] == [projection]


def test_one_projection_for_q_k_and_v() -> None:
    build, x = start()
    q, k, v = (build.call(torch.narrow, build.linear(x, 48), 2, 16 * n, 16) for n in range(3))
    assert common_origin([Origin(part) for part in (q, k, v)]) == [x]


def test_rotary_products_are_no_projection() -> None:
    build, x = start()
    angles = build.input("l_freqs_", 1, 16, 16)
    rotated = build.call(torch.matmul, build.linear(x), build.call(torch.cos, angles))
    assert Origin(rotated).roots == {x}


def test_a_weight_may_be_computed() -> None:
    build, x = start()
    merged = build.add(build.weight(16, 16), build.input("l_delta_", 16, 16))
    assert Origin(build.call(torch.nn.functional.linear, x, merged)).roots == {x}


def test_another_attention_ends_the_walk() -> None:
    build, x = start()
    inner = build.attend(x)
    (root,) = Origin(inner).roots
    assert "scaled_dot_product" in str(root.target)


def test_weights_are_told_from_inputs() -> None:
    build, x = start()
    assert not is_parameter(x)
    assert is_parameter(build.weight(3))


def test_a_table_of_rotations_is_no_projection_and_a_packed_weight_is() -> None:
    build, x = start()
    table = build.input("l_self_buffers_rope_", 24, 16, 16)
    rotated = build.call(torch.einsum, "bsd,sde->bse", build.linear(x), table)
    assert Origin(rotated).roots == {x}
    packed = build.call(torch.Tensor.unbind, build.weight(3, 16, 16))
    weight = build.call(operator.getitem, packed, 0)
    for product in (
        build.call(torch.einsum, "bsd,de->bse", x, weight),
        build.call(torch.matmul, x, build.call(torch.transpose, weight, 0, 1)),
    ):
        assert Origin(product).roots == {x}


def test_hidden_states_written_out_for_each_reader_are_one_root() -> None:
    build, x = start()
    q, k, v = (build.linear(build.call(torch.transpose, x, 0, 1)) for _ in "qkv")
    origins = trace_origins([q, k, v])
    (root,) = common_origin(origins)
    assert root is q.args[0]
    assert [origin.projections[root] for origin in origins] == [[q], [k], [v]]
    (other,) = trace_origins([build.linear(build.call(torch.neg, x))])
    assert other.roots.isdisjoint({root})


def test_a_linear_that_aot_lowered() -> None:
    build, x = start()
    rows = build.call(torch.ops.aten.view.default, x, [24, 16])
    weight = build.call(torch.ops.aten.t.default, build.input("arg1_1", 16, 16))
    bias = build.input("arg2_1", 16)
    assert Origin(build.call(torch.ops.aten.mm.default, rows, weight)).roots == {rows}
    assert Origin(build.call(torch.ops.aten.addmm.default, bias, rows, weight)).roots == {rows}
