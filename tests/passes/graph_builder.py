"""Graphs by hand, with example values and module stacks as Dynamo writes them."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.node import map_arg

from evdit_opt.passes.graph import value_of
from evdit_opt.passes.site_mark import MARK, SiteSpec


class GraphBuilder:
    """Adds nodes at the end of a graph; ``layer`` names the module they are traced in."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.layer = ""
        self.names: dict[int, str] = {}

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return node

    def weight(self, *shape: int) -> fx.Node:
        count = len(self.graph.find_nodes(op="placeholder"))
        return self.input(f"l_self_parameters_w{count}_", *shape)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, keywords = map_arg((args, kwargs), value_of)
        with self.mode:
            node.meta["example_value"] = target(*values, **keywords)
        if self.layer:
            key = next((k for k, v in self.names.items() if v == self.layer), len(self.names) + 1)
            self.names[key] = self.layer
            node.meta["nn_module_stack"] = {str(key): (f"L['self'].{self.layer}", nn.Module)}
        return node

    def linear(self, x: fx.Node, width: int | None = None) -> fx.Node:
        channels = value_of(x).shape[-1]
        return self.call(F.linear, x, self.weight(width or channels, channels))

    def heads(self, x: fx.Node) -> fx.Node:
        """[batch, seq, channels] -> [batch, 2, seq, channels / 2]"""
        split = self.call(torch.unflatten, x, 2, (2, -1))
        return self.call(torch.transpose, split, 1, 2)

    def attend(self, x: fx.Node, context: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Self-attention of x, or cross-attention to context: ``[batch, seq, channels]``."""
        q, k, v = (self.heads(self.linear(source)) for source in (x, *((context or x,) * 2)))
        out = self.call(F.scaled_dot_product_attention, q, k, v, **kwargs)
        return self.call(torch.flatten, self.call(torch.transpose, out, 1, 2), 2)

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self.call(operator.add, x, y)

    def embed(self, video: fx.Node) -> fx.Node:
        """[batch, 4, frames, height, width] -> [batch, frames * height * width, 16]"""
        volume = self.call(torch.conv3d, video, self.weight(16, 4, 1, 1, 1))
        return self.call(torch.transpose, self.call(torch.flatten, volume, 2), 1, 2)

    def mark(
        self, x: fx.Node, spec: SiteSpec, frames: int, tokens: int,
        mode: str = "sparse", residual: fx.Node | None = None,
    ) -> fx.Node:  # fmt: skip
        return self.call(
            MARK, x, spec.encode(), frames, tokens, None, mode, residual, None, None, None
        )

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(nn.Module(), self.graph)


def calls(gm: fx.GraphModule, part: str) -> list[fx.Node]:
    """The calls of ``gm`` whose target's name has ``part``."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and part in str(n.target)]
