"""The graph of one eager call, for models that Dynamo captures in parts only.

Data-dependent branches, loops and context managers that break Dynamo's graph are nothing to a
recorder that sits below Python: it writes down every PyTorch function while the model runs. What it
writes looks like a Dynamo graph (same targets, example values, module stacks), so the passes
that prove where q, k and v come from need not know which of the two they read.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["eager_graph"]


def eager_graph(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """Run ``model`` once, eagerly, and return what it did as a graph.

    Nodes carry ``example_value`` (meta tensors: shapes, no data) and ``nn_module_stack`` as
    Dynamo's do. The graph is for reading, not for running: branches are those this call took.

    Args:
        model: the denoiser; a compiled call on it is bypassed.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    recorder = _Recorder(model, args, kwargs)
    with torch.no_grad(), _module_stack(model, recorder.stack), recorder:
        result = model._call_impl(*args, **kwargs)
    recorder.end(result)
    return recorder.graph


class _Recorder(TorchFunctionMode):
    """Writes a node for every function that returns a tensor, or changes one in place."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.stack: list[nn.Module] = []
        self._nodes: Any = WeakIdKeyDictionary()  # tensor -> the node that made it
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._nodes[tensor] = self._node("get_attr", name, (), tensor)
        for tensor in _tensors((args, kwargs)):
            self._nodes[tensor] = self._node("placeholder", "input", (), tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op, target, arguments = _like_dynamo(func, args)
        if target is operator.setitem:
            self._nodes[args[0]] = self._node(op, target, arguments, args[0], kwargs)
            return out
        results = _tensors(out)
        if results:
            whole = self._node(op, target, arguments, out, kwargs)
            for number, tensor in enumerate(results):
                part = whole
                if tensor is not out:
                    part = self._node("call_function", operator.getitem, (whole, number), tensor)
                if tensor in self._nodes and tensor._is_view() and tensor._base is not None:
                    # Changed in place: what it is a view of now comes from here, too.
                    base = tensor._base
                    self._nodes[base] = self._node("call_function", torch.add, (base, part), base)
                self._nodes[tensor] = part
        return out

    def end(self, result: Any) -> None:
        """Say what the call returned: what leads there is used, the rest is not."""
        # Where no tensor is to be seen in what it returned: all that are still alive.
        returned = _tensors(result) or list(self._nodes)
        self.graph.output(tuple(self._nodes[x] for x in returned if x in self._nodes))

    def _node(
        self, op: str, target: Any, args: Any, value: Any, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        arguments = tree_map(self._argument, (tuple(args), dict(kwargs or {})))
        node = self.graph.create_node(op, target, *arguments)
        node.meta["example_value"] = tree_map(_shape_of, value)
        node.meta["nn_module_stack"] = {
            str(id(module)): ("", type(module)) for module in self.stack
        }
        return node

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value not in self._nodes:
            # Made where no PyTorch function was seen to: from nowhere, as far as proofs go.
            self._nodes[value] = self._node("placeholder", "unknown", (), value)
        return self._nodes[value]


@contextmanager
def _module_stack(model: nn.Module, stack: list[nn.Module]) -> Iterator[None]:
    """Keep the modules whose forward is running in ``stack``."""
    handles = []
    for module in model.modules():
        enter = module.register_forward_pre_hook(lambda entered, _args: stack.append(entered))
        leave = module.register_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True)
        handles += [enter, leave]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _like_dynamo(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Operation, target and arguments that Dynamo would write down for a call of ``func``."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute of a tensor, such as x.T
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    if getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _shape_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
