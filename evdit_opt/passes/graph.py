"""What every pass needs to know about a Dynamo graph (before AOT: one node per attention call)."""

import copy
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

__all__ = [
    "LEFT_ALONE",
    "REPLACED",
    "SDPA",
    "SPELLED",
    "Attention",
    "attention_calls",
    "bind_attention",
    "copy_graph",
    "first_results",
    "insert_call",
    "is_attention",
    "layer_fqn",
    "live_nodes",
    "operation",
    "read_attention",
    "same_size",
    "subgraphs",
    "tensor_inputs",
    "value_key",
    "value_of",
    "walk_back",
    "written_inputs",
]

SDPA = F.scaled_dot_product_attention

LEFT_ALONE = "evdit_left_alone"
"""Key in the metadata of a softmax, or of a call that attends, which no site can have: says why."""

IN_PLACE = frozenset("iadd iand imul ior isub itruediv ixor setitem".split())
NOT_IN_PLACE = frozenset("and_ is_ not_ or_".split())

REPLACED = "evdit_replaced"
"""Key in the metadata of nodes that another one stands in for."""

SPELLED = "evdit_spelled"
"""Key in the metadata of an SDPA call that stands in for what is no SDPA call."""


class Attention(NamedTuple):
    """The arguments of one SDPA call, wherever the model put them (positional or keyword)."""

    q: Any
    k: Any
    v: Any
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attention_calls(graph: fx.Graph) -> list[fx.Node]:
    """The SDPA calls of a graph, without those that another one stands in for."""
    found = graph.find_nodes(op="call_function", target=SDPA)
    return [node for node in found if REPLACED not in node.meta]


def read_attention(node: fx.Node) -> Attention:
    """The arguments of the SDPA call ``node``."""
    return bind_attention(node.args, node.kwargs)


def bind_attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attention:
    """The arguments of an SDPA call: nodes of a graph, or tensors."""
    spelled = {"query": "q", "key": "k", "value": "v"}
    keywords = {spelled.get(name, name): value for name, value in kwargs.items()}
    return Attention(*args, **keywords)


def subgraphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and the graphs its higher-order operators call (activation checkpointing, ...)."""
    yield gm
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            yield from subgraphs(child)


def is_attention(node: fx.Node) -> bool:
    """True for what mixes tokens by attention: SDPA, our op, flex, a subgraph holding one."""
    if node.op != "call_function":
        return False
    name = str(node.target)
    if node.target is SDPA or "tile_attention" in name or "flex_attention" in name:
        return True
    return any(is_attention(inner) for body in _called_graphs(node) for inner in body.graph.nodes)


def _called_graphs(node: fx.Node) -> Iterator[fx.GraphModule]:
    root = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and root is not None:
            value = getattr(root, str(argument.target), None)
            if isinstance(value, fx.GraphModule):
                yield value


def value_of(argument: Any) -> Any:
    """The example value (a fake tensor, a number or a symbolic one) of a node or constant."""
    if not isinstance(argument, fx.Node):
        return argument
    return argument.meta.get(value_key(argument))


def value_key(node: fx.Node) -> str:
    """Where a node's metadata has its example value: Dynamo's graphs and exported ones differ."""
    return "example_value" if "example_value" in node.meta or "val" not in node.meta else "val"


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs that carry tensors; sizes are left out, they do not say where data comes from."""
    return [
        argument
        for argument in node.all_input_nodes
        if not isinstance(
            value_of(argument), (int, float, torch.Size, torch.SymInt, torch.SymFloat)
        )
    ]


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """True if two sizes are provably equal; asking does not guard, whatever is symbolic."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        difference = a - b
        return isinstance(difference, torch.SymInt) and difference.node.expr == 0
    return a == b


def operation(node: fx.Node) -> str:
    """What a node does, without saying how it was spelled: "transpose", "and_", "softmax".

    ``x.transpose(0, 1)``, ``torch.transpose(x, 0, 1)`` and ``aten.transpose.int`` are alike.
    """
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def insert_call(
    graph: fx.Graph, target: Any, arguments: tuple[Any, ...], like: fx.Node, **keywords: Any
) -> fx.Node:
    """A new call, with its example value, in the module that ``like`` was traced in.

    Args:
        graph: edited at its insertion point.
        target: function or operator.
        arguments: nodes and constants.
        like: node to take the module stack of.
        keywords: keyword arguments of the call.
    """
    node = graph.call_function(target, arguments, keywords)
    values, named = map_arg((arguments, keywords), value_of)
    # Metadata only. The mode is that of Dynamo's example values, not the one active by now.
    leaves = pytree.tree_leaves((values, named))
    modes = [leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)]
    with modes[0] if modes else nullcontext():
        node.meta[value_key(like)] = target(*values, **named)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Everything that an output, or a tensor written in place, depends on."""
    todo = [node for node in graph.nodes if node.op == "output" or written_inputs(node)]
    live = set(todo)
    while todo:
        new = [x for x in todo.pop().all_input_nodes if x not in live]
        live.update(new)
        todo += new
    return live


def first_results(call: fx.Node, live: set[fx.Node]) -> list[fx.Node] | None:
    """Where the first result of a call is taken; None if something else of it is used, too.

    Args:
        call: of a function that returns several things.
        live: :func:`live_nodes` of its graph.
    """
    results = [user for user in call.users if user in live]
    first = all(user.target is operator.getitem and user.args[1] == 0 for user in results)
    return results if first else None


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes to in place; too many rather than too few."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return tensor_inputs(node) if node.target._schema.is_mutable else []
    name = operation(node)
    method = name.endswith("_") and not name.endswith("__") and name not in NOT_IN_PLACE
    return tensor_inputs(node) if method or name in IN_PLACE or "out" in node.kwargs else []


def walk_back(starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """Every node that feeds ``starts``, and they too; nothing behind a node that ``stop`` names."""
    todo, seen = list(starts), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            todo += tensor_inputs(node)


def layer_fqn(node: fx.Node, names: Mapping[int, str] | None) -> str | None:
    """Path of the innermost module that ``node`` was traced in; None if Dynamo lost it.

    Args:
        node: a node of Dynamo's graph.
        names: ``id(module) -> path`` of the model. None: the model is not at hand; the path is
            taken from Dynamo's text, which hooks and graph breaks can garble.
    """
    found = None
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if names is None:
            found = _clean(path)
        else:
            # A module called more than once appears as "<id>@<call>".
            module_id = str(key).split("@")[0]
            found = names.get(int(module_id), found) if module_id.isdigit() else found
    return found


def _clean(path: str) -> str:
    # "L['self'].blocks.0.attn1", "L['args'][0]._modules['blocks']._modules['0'].attn1",
    # "L['self'].__dict__['_modules']['blocks'].0.attn1"
    path = re.sub(r"^L\['\w+'\](\[\w+\])*", "", path)
    path = re.sub(r"\.(_modules|__dict__\['_modules'\])\['(\w+)'\]", r".\2", path)
    return re.sub(r"\[(\d+)\]", r".\1", path).removeprefix(".")


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to edit; Dynamo keeps using its own. Weights are shared, subgraphs are copied too."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copy_graph(child))
    return copied
