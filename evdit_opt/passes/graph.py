"""What every pass needs to know about a Dynamo graph (before AOT: one node per attention call)."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

__all__ = [
    "SDPA",
    "Attention",
    "bind_attention",
    "copy_graph",
    "is_attention",
    "layer_fqn",
    "read_attention",
    "subgraphs",
    "tensor_inputs",
    "value_of",
    "walk_back",
]

SDPA = F.scaled_dot_product_attention


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
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs that carry tensors; sizes are left out, they do not say where data comes from."""
    return [
        argument
        for argument in node.all_input_nodes
        if not isinstance(
            value_of(argument), (int, float, torch.Size, torch.SymInt, torch.SymFloat)
        )
    ]


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
