"""Run a model through a backend of ours for a while: in one graph if it can be, in parts if not."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Capture", "captured", "compile_call", "restore_call", "uncompiled", "watched"]

RECOMPILE_LIMIT = 64
"""Graphs per frame: layers sharing a frame need one per distinct rule, times the shapes seen."""


class Capture:
    """The model's call while :func:`captured` is active.

    Attributes:
        fullgraph: True until Dynamo turns out not to trace the model whole.
        graphs: how many graphs it made.
    """

    def __init__(self, model: nn.Module, backend: Callable[..., Any]) -> None:
        self.fullgraph, self.graphs = True, 0
        self._model, self._inner = model, backend
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
        return compile_call(self._model, self._backend, self.fullgraph, dynamic=False)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return self._inner(gm, example_inputs)  # type: ignore[no-any-return]


@contextmanager
def captured(model: nn.Module, backend: Callable[..., Any]) -> Iterator[Capture]:
    """Let every call of ``model`` go through ``backend``, whoever calls it; undone at the end."""
    previous = vars(model).get("_compiled_call_impl")
    capture = Capture(model, backend)
    model._compiled_call_impl = capture  # what nn.Module.compile sets
    try:
        yield capture
    finally:
        restore_call(model, previous)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let every call of ``model`` run eagerly, whatever it was compiled with; undone at the end."""
    previous = vars(model).get("_compiled_call_impl")
    model._compiled_call_impl = None
    try:
        yield
    finally:
        restore_call(model, previous)


@contextmanager
def watched(model: nn.Module, listener: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let ``listener`` see the arguments of every call of ``model``, by name, before it runs."""
    previous = vars(model).get("_compiled_call_impl")
    call = previous or model._call_impl
    names = tuple(inspect.signature(model.forward).parameters)

    def listening(*args: Any, **kwargs: Any) -> Any:
        listener(dict(zip(names, args, strict=False)) | kwargs)
        return call(*args, **kwargs)

    model._compiled_call_impl = listening
    try:
        yield
    finally:
        restore_call(model, previous)


def restore_call(model: nn.Module, previous: Callable[..., Any] | None) -> None:
    """Give a model back the compiled call it had, or none."""
    if previous is None:
        vars(model).pop("_compiled_call_impl", None)  # what is left is the class's: None
    else:
        model._compiled_call_impl = previous


def compile_call(
    model: nn.Module, backend: Callable[..., Any], fullgraph: bool, dynamic: bool | None
) -> Callable[..., Any]:
    """``torch.compile`` of calling ``model``, for its ``_compiled_call_impl``.

    ``nn.Module.compile`` hands Dynamo a function it skips: hooks of the model then run outside the
    graph, and numbers they leave for it become constants, whatever ``dynamic`` says. Here they are
    traced. Recompiles are counted per code object; with a cache shared by all models, the ninth
    model or plan of a process would fail, so each call has its own where torch offers that.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    wanted = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    known = inspect.signature(torch.compile).parameters
    cache: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    compiled: Callable[..., Any] = torch.compile(
        call, backend=backend, fullgraph=fullgraph, dynamic=dynamic, **cache
    )
    return compiled
