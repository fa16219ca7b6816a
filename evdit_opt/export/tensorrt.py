"""TensorRT: the rewritten graph in operators that torch-tensorrt converts.

Not measured: no machine with torch-tensorrt has run this yet (docs/export.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from evdit_opt.export.standard_ops import use_standard_ops

__all__ = ["tensorrt", "with_standard_ops"]

Compile = Callable[..., Any]


def with_standard_ops(compile_graph: Compile) -> Compile:
    """An ``inner`` that lowers the sparse attention as ONNX export does, then compiles.

    With it a backend can be given options of its own::

        from torch_tensorrt.dynamo.backend.backends import torch_tensorrt_backend
        inner = with_standard_ops(partial(torch_tensorrt_backend, options={"min_block_size": 3}))
        evdit_opt.apply_plan(pipe, plan, inner=inner)

    Args:
        compile_graph: ``(graph module, example inputs) -> callable``.
    """

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        use_standard_ops(gm)
        return compile_graph(gm, list(example_inputs))  # type: ignore[no-any-return]

    inner.__name__ = getattr(compile_graph, "__name__", "callable")
    return inner


def tensorrt(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """``inner="tensorrt"``: torch-tensorrt, which leaves what it cannot convert to PyTorch."""
    import torch_tensorrt  # noqa: F401  (registers the backend)
    from torch._dynamo.backends.registry import lookup_backend

    return with_standard_ops(lookup_backend("torch_tensorrt"))(gm, example_inputs)  # type: ignore[no-any-return]
