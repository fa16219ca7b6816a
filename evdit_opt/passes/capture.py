"""Run a model through a backend of ours for a while: in one graph if it can be, in parts if not."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Capture", "captured", "own_cache"]

RECOMPILE_LIMIT = 64
"""Graphs per frame: layers sharing a frame need one per distinct rule, times the shapes seen."""


class Capture:
    """The model's call while :func:`captured` is active.

    Attributes:
        fullgraph: True until Dynamo turns out not to trace the model whole.
    """

    def __init__(self, model: nn.Module, backend: Callable[..., Any]) -> None:
        self.fullgraph = True
        self._model, self._backend = model, backend
        self._call = self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fullgraph:
            try:
                return self._call(*args, **kwargs)
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
                # Raised while tracing, before anything of the model has run.
                self.fullgraph = False
                self._call = self._compile()
        return self._call(*args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        return torch.compile(  # type: ignore[no-any-return]
            self._model._call_impl,
            backend=self._backend,
            fullgraph=self.fullgraph,
            dynamic=False,
            **own_cache(),
        )


@contextmanager
def captured(model: nn.Module, backend: Callable[..., Any]) -> Iterator[Capture]:
    """Let every call of ``model`` go through ``backend``, whoever calls it; undone at the end."""
    previous = model._compiled_call_impl
    capture = Capture(model, backend)
    model._compiled_call_impl = capture  # what nn.Module.compile sets
    try:
        yield capture
    finally:
        model._compiled_call_impl = previous


def own_cache() -> dict[str, Any]:
    """Arguments of ``torch.compile`` that give a compile its own cache, where torch knows them.

    Dynamo counts recompiles per code object, and every module compiled in place has the same one,
    ``Module._call_impl``: sharing it, the ninth model or plan of a process fails.
    """
    wanted = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    known = inspect.signature(torch.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}
