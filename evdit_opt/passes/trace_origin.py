"""Where q, k and v come from: the hidden states that the first linears behind them project."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from evdit_opt.passes.graph import is_attention, operation, tensor_inputs, value_of, walk_back
from evdit_opt.passes.same_value import same_value

__all__ = ["Origin", "common_origin", "is_parameter", "projected", "trace_origins"]

PROJECTIONS = frozenset(
    "linear addmm mm bmm baddbmm matmul einsum conv1d conv2d conv3d convolution".split()
)


class Origin:
    """The hidden states behind a tensor, and the projections that read them.

    Walks back to the inputs of the first projections, or to another attention:
    q = rope(norm(linear(x, w) + linear(linear(x, a), b)))  has the roots  {x, linear(x, a)}

    Attributes:
        projections: per hidden state, the linears (or convolutions) that take it.
    """

    def __init__(self, node: fx.Node) -> None:
        self.projections: dict[fx.Node, list[fx.Node]] = {}

        def stop(seen: fx.Node) -> bool:
            return is_attention(seen) or projected(seen) is not None

        for seen in walk_back([node], stop):
            source = seen if is_attention(seen) else projected(seen)
            if source is not None:
                self.projections.setdefault(source, []).append(seen)

    @property
    def roots(self) -> frozenset[fx.Node]:
        """The hidden states."""
        return frozenset(self.projections)

    def rename(self, known: list[fx.Node]) -> None:
        """Let roots that compute the same be the one in ``known``; adds those that are new."""
        projections = self.projections
        self.projections = {}
        for root, readers in projections.items():
            first = next((other for other in known if same_value(other, root)), root)
            if first is root and root not in known:
                known.append(root)
            self.projections.setdefault(first, []).extend(readers)


def trace_origins(nodes: Sequence[fx.Node]) -> list[Origin]:
    """The origin of each node; what is written out twice, such as a transposed x, is one root."""
    origins = [Origin(node) for node in nodes]
    known: list[fx.Node] = []
    for origin in origins:
        origin.rename(known)
    return origins


def common_origin(origins: Iterable[Origin]) -> list[fx.Node]:
    """Hidden states that all of ``origins`` share, in the order of the first."""
    first, *others = origins
    return [
        root for root in first.projections if all(root in other.projections for other in others)
    ]


def is_parameter(node: fx.Node) -> bool:
    """True for weights and buffers of the model, which Dynamo passes as inputs too."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    named = "_parameters_" in str(node.target) or "_buffers_" in str(node.target)
    return named or isinstance(value_of(node), torch.nn.Parameter)


def projected(node: fx.Node) -> fx.Node | None:
    """The activation that a projection reads; None if ``node`` is no projection."""
    if node.op == "call_module":
        inputs = tensor_inputs(node)
        return inputs[0] if len(inputs) == 1 else None
    name = operation(node)
    if name not in PROJECTIONS:
        return None
    if name in ("mm", "addmm") and _is_unnamed_weight(node.args[-1]):
        activation = node.args[-2]
        return activation if isinstance(activation, fx.Node) else None
    activations = [x for x in tensor_inputs(node) if not _is_weight(x)]
    # A product of two activations (rotary embeddings, ...) is no projection. A weight may be
    # computed (merged adapters, dequantisation), so F.linear's first argument always counts.
    if name == "linear":
        first = node.args[0] if node.args else node.kwargs["input"]
        return first if isinstance(first, fx.Node) else None
    return activations[0] if len(activations) == 1 else None


def _is_weight(node: fx.Node) -> bool:
    """True for a trained parameter, and for what is made of such alone (transposed, unpacked).

    Buffers do not count: queries multiplied by a table of rotations are not projected by it.
    """
    leaves = [x for x in walk_back([node], lambda _: False) if not x.all_input_nodes]
    return bool(leaves) and all(
        is_parameter(x) and "_buffers_" not in str(x.target) for x in leaves
    )


def _is_unnamed_weight(node: Any) -> bool:
    """True for a transposed matrix handed to the graph: AOT writes ``linear`` as x @ w.t() + b.

    It hands over parameters as inputs without names.
    """
    if not isinstance(node, fx.Node) or operation(node) not in ("t", "permute", "transpose"):
        return False
    matrix = node.args[0]
    return isinstance(matrix, fx.Node) and matrix.op == "placeholder" and value_of(matrix).ndim == 2
