"""Where q, k and v come from."""

import operator

import torch

from evdit_opt.passes.trace_origin import common_origin, is_parameter, trace_origin
from tests.passes.graph_builder import GraphBuilder


def start() -> tuple[GraphBuilder, torch.fx.Node]:
    build = GraphBuilder()
    return build, build.input("l_x_", 1, 24, 16)


def test_a_projection_ends_the_walk() -> None:
    build, x = start()
    projection = build.linear(build.linear(x))
    origin = trace_origin(build.heads(projection))
    assert origin.roots == {projection.args[0]}
    assert origin.projections[projection.args[0]] == [projection]


def test_one_projection_for_q_k_and_v() -> None:
    build, x = start()
    q, k, v = (build.call(torch.narrow, build.linear(x, 48), 2, 16 * n, 16) for n in range(3))
    assert common_origin([trace_origin(part) for part in (q, k, v)]) == [x]


def test_rotary_products_are_no_projection() -> None:
    build, x = start()
    angles = build.input("l_freqs_", 1, 16, 16)
    rotated = build.call(torch.matmul, build.linear(x), build.call(torch.cos, angles))
    assert trace_origin(rotated).roots == {x}


def test_a_weight_may_be_computed() -> None:
    build, x = start()
    merged = build.add(build.weight(16, 16), build.input("l_delta_", 16, 16))
    assert trace_origin(build.call(torch.nn.functional.linear, x, merged)).roots == {x}


def test_another_attention_ends_the_walk() -> None:
    build, x = start()
    inner = build.attend(x)
    (root,) = trace_origin(inner).roots
    assert "scaled_dot_product" in str(root.target)


def test_weights_are_told_from_inputs() -> None:
    build, x = start()
    assert not is_parameter(x)
    assert is_parameter(build.weight(3))


def test_a_table_of_rotations_is_no_projection_and_a_packed_weight_is() -> None:
    build, x = start()
    table = build.input("l_self_buffers_rope_", 24, 16, 16)
    rotated = build.call(torch.einsum, "bsd,sde->bse", build.linear(x), table)
    assert trace_origin(rotated).roots == {x}
    packed = build.call(torch.Tensor.unbind, build.weight(3, 16, 16))
    weight = build.call(operator.getitem, packed, 0)
    for product in (
        build.call(torch.einsum, "bsd,de->bse", x, weight),
        build.call(torch.matmul, x, build.call(torch.transpose, weight, 0, 1)),
    ):
        assert trace_origin(product).roots == {x}
