"""Put the package's sources into Inductor's cache key. Imports Inductor: import this lazily."""

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = ["with_source_key"]

SLOT = "post_grad_custom_pre_pass"
CACHEABLE = "unsafe_marked_cacheable_functions"
INLINED = "evdit_opt.passes.inline_decomposed.tile_attention"
"""The function that graphs call where attention is inlined: unless it is marked, AOT caches none of
them, and traces each anew in every process."""


class _SourceKey(CustomGraphPass):
    """Changes nothing; its identity is part of the cache key, like that of every custom pass."""

    def __init__(self, source_hash: str, users: CustomGraphPass | None) -> None:
        self.source_hash, self.users = source_hash, users

    def __call__(self, graph: fx.Graph) -> None:
        if self.users is not None:
            self.users(graph)

    def uuid(self) -> Any:
        return ("evdit", self.source_hash, None if self.users is None else self.users.uuid())


def with_source_key(patches: dict[str, Any], source_hash: str) -> dict[str, Any]:
    """Inductor config patches whose cache key also depends on ``source_hash``.

    Generated code bakes in what the package does with a graph, but Inductor's key sees the graph
    only: without this, edited kernels were served stale code.
    """
    cacheable = {**patches.get(CACHEABLE, {}), INLINED: source_hash}
    return {
        **patches,
        SLOT: _SourceKey(source_hash, patches.get(SLOT)),
        CACHEABLE: cacheable,
    }
