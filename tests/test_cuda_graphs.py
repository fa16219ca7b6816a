"""What CUDA graphs need: no graph of an optimized model makes the host wait for the device.

Without a GPU: the graphs that reach the inner backend, one per step mode, run on meta tensors in
the place of the GPU's (fake CUDA tensors cannot be sliced by a PyTorch built without CUDA), under a
mode that fails on everything a recorded graph cannot hold. The operator itself is watched in
tests/kernels/test_dense_cuda.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from evdit_opt.apply import apply_plan
from evdit_opt.grid import TokenLayout
from evdit_opt.reuse import with_reuse
from tests.models.masked import masked_attention
from tests.models.small_models import BY_NAME
from tests.models.timed_toy import call, conditioning, timed_toy
from tests.models.toy_dit import GRID, ToyDiT, make_plan, toy, toy_inputs, toy_rules

WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
    "unique", "_unique2", "unique_consecutive", "unique_dim", "bincount", "repeat_interleave",
}  # fmt: skip
GPU = torch.device("meta")
MODES = ("sparse", "dense", "refresh", "reuse")
Graph = tuple[fx.GraphModule, list[Any]]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


class NoWaiting(TorchDispatchMode):
    """Fails on operators that need a value on the host, or move data between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert name not in WAITS, f"{name} waits for the device"
        if name == "index":
            masks = [x for x in given[1:] if x.dtype in (torch.bool, torch.uint8)]
            assert not masks, "an index by a mask waits for the device, to know how many it keeps"
        # Numbers are no tensors on a device: PyTorch wraps them in 0-d tensors of the CPU.
        devices = {x.device for x in given if x.ndim or x.device.type != "cpu"}
        if kwargs.get("device") is not None and given:
            devices.add(torch.device(kwargs["device"]))
        assert len(devices) < 2, f"{name} moves data"
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.unique(x),
    ],
    ids=["item", "branch", "nonzero", "mask", "to host", "from host", "copy_", "unique"],
)
def test_waiting_is_noticed(wait: Callable[[Tensor], object]) -> None:
    x = torch.empty(3, device=GPU)
    with NoWaiting(), pytest.raises(AssertionError, match=r"waits for|moves data"):
        wait(x)


def test_ordinary_work_is_no_waiting() -> None:
    x = torch.empty(3, 3, device=GPU)
    with NoWaiting():
        y = (x @ x).softmax(-1) * 2.0 + torch.arange(3, device=GPU)
        y[:, 1:].clone().copy_(x[:, torch.zeros(2, dtype=torch.int64, device=GPU)])


def on_gpu(graph: Graph) -> None:
    """Run a graph that was captured on the CPU as if everything in it were on a GPU."""
    gm, example_inputs = graph

    def moved(_device: torch.device) -> torch.device:
        return GPU

    for node in gm.graph.nodes:
        node.args = tree_map_only(torch.device, moved, node.args)
        node.kwargs = tree_map_only(torch.device, moved, dict(node.kwargs))
    gm.recompile()
    inputs = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
        if isinstance(x, Tensor)
        else x
        for x in example_inputs
    ]
    with torch.no_grad(), NoWaiting():
        gm(*inputs)


def keep(graphs: list[Graph]) -> Callable[..., Any]:
    def inner(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, list(example_inputs)))
        return gm.forward

    return inner


@pytest.fixture(scope="module")
def graphs_by_mode() -> dict[str, Graph]:
    """The graphs of the toy, one per mode of a step."""
    graphs: list[Graph] = []
    model = toy()
    apply_plan(model, make_plan(model, toy_rules()), inner=keep(graphs))
    with torch.no_grad():
        model(**toy_inputs())
    assert len(graphs) == 1
    timed, inputs = timed_toy(), conditioning()
    plan = with_reuse(make_plan(timed, toy_rules()), (800.0,))
    apply_plan(timed, plan, inner=keep(graphs))
    for level, known in ((900.0, 2), (800.0, 3), (700.0, 4), (600.0, 4)):
        call(timed, inputs, level)
        assert len(graphs) == known, f"{len(graphs)} graphs after the step at {level}"
    return dict(zip(MODES, graphs, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(graphs_by_mode: dict[str, Graph], mode: str) -> None:
    gm, _ = graphs_by_mode[mode]
    rewritten = torch.ops.evdit.tile_attention.default
    calls = gm.graph.find_nodes(op="call_function", target=rewritten)
    assert len(calls) == (0 if mode == "dense" else 2)
    for node in gm.graph.nodes:
        assert not free_unbacked_symbols(node.meta.get("example_value"))
    on_gpu(graphs_by_mode[mode])


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx"])
def test_no_model_waits_because_of_us(name: str) -> None:
    case = BY_NAME[name]
    model, graphs = case.model(), []
    plan = make_plan(model, case.rules(), source=case.grid_source(), layouts=case.layouts())
    apply_plan(model, plan, inner=keep(graphs))
    with torch.no_grad():
        model(**case.inputs())
    (graph,) = graphs
    on_gpu(graph)


@pytest.mark.gpu
@pytest.mark.parametrize("reuses", [False, True], ids=["sparse", "reuse"])
def test_a_model_replays_its_cuda_graphs(reuses: bool) -> None:
    from torch._inductor import list_mode_options

    model: nn.Module = timed_toy().cuda()
    assert isinstance(model, ToyDiT)
    inputs = {name: x.cuda() for name, x in conditioning().items()}
    levels = (900.0, 800.0, 700.0, 600.0, 500.0)
    rules = toy_rules()
    plan = make_plan(model, rules)
    eager = [call(model, inputs, level) for level in levels]
    with masked_attention(model, rules, TokenLayout(GRID)):
        sparse = [call(model, inputs, level) for level in levels]
    if reuses:
        plan = with_reuse(plan, (800.0,))
    counters.clear()
    apply_plan(model, plan, inductor_options=list_mode_options("reduce-overhead"))
    for _ in range(3):  # the first call warms up, the second one records, the third one replays
        got = []
        for level in levels:
            torch.compiler.cudagraph_mark_step_begin()
            got.append(call(model, inputs, level))
    right = [*eager[:2], None, None, None] if reuses else sparse
    for mine, expected in zip(got, right, strict=True):
        if expected is not None:  # TF32 is off, so this is rounding in another order
            assert (mine - expected).abs().max() < 1e-5
    # A refresh writes to what it was given, which Inductor does not record.
    assert (counters["inductor"]["cudagraph_skips"] == 0) or reuses
