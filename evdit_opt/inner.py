"""``inner``: what compiles the rewritten graph."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

__all__ = ["Inner", "inner_name", "wrong_inner"]

Inner = str | Callable[..., Any]
"""A backend of Dynamo by name, or a function ``(graph module, example inputs) -> callable``."""

NAMED = ("inductor", "eager", "aot_eager", "tensorrt")
"""Those that are tested by name; any other that Dynamo knows will do, but for our own."""


def wrong_inner(inner: object, name: str = "inner") -> str:
    """What is wrong with ``inner``, as "expected ..., got ...; do ..."; empty if nothing is.

    Args:
        inner: what somebody passed.
        name: what they passed it as.
    """
    if callable(inner):
        return ""
    if inner == "tensorrt" and find_spec("torch_tensorrt") is None:
        return (
            f"expected torch_tensorrt for {name}='tensorrt', it is not installed; pip install "
            "'evdit-opt[tensorrt]'"
        )
    if not isinstance(inner, str) or (inner not in NAMED and inner not in _others()):
        return (
            f"expected {name} to be {', '.join(NAMED)}, another backend by name, or a "
            f"callable, got {inner!r}; torch._dynamo.list_backends(None) lists the others here"
        )
    return ""


def inner_name(inner: Inner) -> str:
    """The inner backend, for people."""
    return inner if isinstance(inner, str) else getattr(inner, "__name__", "callable")


def _others() -> set[str]:
    from torch._dynamo import list_backends

    return set(list_backends(None)) - {"evdit"}
