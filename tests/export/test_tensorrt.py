"""TensorRT: the graph handed over holds operators it converts, and the numbers stay.

What torch-tensorrt makes of it can be tested only where it is installed, which takes a GPU.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch._functorch.aot_autograd import make_boxed_func

from evdit_opt.apply import apply_plan, report
from evdit_opt.export.tensorrt import tensorrt, with_standard_ops
from tests.export.planned import Planned, first, planned, planned_toy

OP = torch.ops.evdit.tile_attention.default


def recording(seen: list[fx.GraphModule]) -> Callable[..., Any]:
    """A backend that keeps the ATen graphs it is given."""

    def compile_aten(gm: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return make_boxed_func(gm.forward)

    return aot_autograd(fw_compiler=compile_aten)


def namespaces(gm: fx.GraphModule) -> set[str]:
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if hasattr(target, "namespace")}


@torch.no_grad()
def run(given: Planned, inner: Any) -> torch.Tensor:
    apply_plan(given.model, given.plan, inner=inner)
    return first(given.model(**given.call))


@pytest.mark.parametrize("kind", ["toy", "hunyuan"])
def test_the_graph_handed_over_holds_aten_only(kind: str) -> None:
    given = planned_toy() if kind == "toy" else planned(kind, layers=1)
    expected = given.optimized()
    seen: list[fx.GraphModule] = []
    out = run(given, with_standard_ops(recording(seen)))
    assert [namespaces(gm) for gm in seen] == [{"aten"}]
    assert report(given.model).rewritten == tuple(given.plan.rules)
    # The same sums in another order: a few roundings a layer.
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < 16 * torch.finfo(torch.float32).eps


def test_a_plain_callable_gets_the_operator() -> None:
    given = planned_toy()
    seen: list[fx.GraphModule] = []
    run(given, recording(seen))
    assert [namespaces(gm) for gm in seen] == [{"aten", "evdit"}]


def test_the_name_hands_the_lowered_graph_to_torch_tensorrt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With something else in its place, that is: this tests our side."""
    given = planned_toy()
    expected = given.optimized()
    seen: list[fx.GraphModule] = []
    stand_in = ModuleType("torch_tensorrt")
    stand_in.__spec__ = ModuleSpec("torch_tensorrt", None)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    from torch._dynamo.backends import registry

    for table in ("_BACKENDS", "_COMPILER_FNS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    register_backend(recording(seen), name="torch_tensorrt")
    assert lookup_backend("torch_tensorrt") is not None

    out = run(given, "tensorrt")
    assert [namespaces(gm) for gm in seen] == [{"aten"}]
    assert report(given.model).inner == "tensorrt"
    assert not any(node.target is OP for gm in seen for node in gm.graph.nodes)
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_torch_tensorrt_computes_the_same() -> None:
    pytest.importorskip("torch_tensorrt", reason="torch-tensorrt is not installed")
    given = planned_toy()
    given.model.to("cuda")
    call = {name: value.to("cuda") for name, value in given.call.items()}
    on_gpu = Planned(given.model, call, given.plan)
    expected = on_gpu.optimized()
    out = run(on_gpu, tensorrt)
    # TensorRT may use TF32: ten bits of mantissa.
    assert (out - expected).norm() / expected.norm() < 8 * 2**-10
