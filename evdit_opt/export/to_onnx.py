"""ONNX: the optimized denoiser in the standard's own operators."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.export.program import ATEN_SDPA, export_program
from evdit_opt.export.residuals import residual_values
from evdit_opt.plan import Plan

__all__ = ["OPSET", "export_onnx", "require_packages", "write_onnx"]

OPSET = 18
"""The version of the operator set that is written by default: old enough for most runtimes."""

ATTENTION_OPSET = 23
"""From here on attention is one operator."""


def export_onnx(
    target: object,
    kwargs: Mapping[str, Any],
    path: Path,
    plan: Plan | None = None,
    *,
    mode: str | None = None,
    opset: int = OPSET,
) -> Path:
    """Write a denoiser with the sparse attention of its plan as an ONNX model.

    Inputs carry the names of the forward's arguments, at the shapes of the call; what is no tensor
    becomes part of the model. Weights of more than about 2 GB go to ``<path>.data``. A plan with
    residual reuse takes a file per mode; ``export_onnx_steps`` writes all of them.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``; with a plan applied, or plain.
        kwargs: arguments of one forward of the denoiser.
        path: the file to write.
        plan: as in ``export_program``.
        mode: as in ``export_program``.
        opset: version of ONNX's operator set. From 23 on attention is one operator, ``Attention``.

    Returns:
        ``path``.

    Raises:
        UnsupportedInputError: if packages are missing, or ONNX lacks an operator of the model.
        EvditError: as ``export_program``.
    """
    require_packages()
    program = export_program(target, kwargs, plan, mode=mode, standard_ops=True)
    return write_onnx(program, path, mode=mode, opset=opset)


def write_onnx(
    program: ExportedProgram,
    path: Path,
    *,
    mode: str | None = None,
    opset: int = OPSET,
    external_data: bool = False,
) -> Path:
    """Write an exported program, sparse or dense, as an ONNX model.

    Args:
        program: in ATen operators.
        path: the file to write.
        mode: that the program was exported with. In "refresh" the model has further outputs, in
            "reuse" further inputs, named like ``residual.blocks.0.attn1``.
        opset: version of ONNX's operator set.
        external_data: put weights into ``<path>.data`` however small they are.

    Raises:
        UnsupportedInputError: if packages are missing, or ONNX lacks an operator of the model.
    """
    require_packages()
    program = program.run_decompositions(WITHOUT_BOOLEAN_WHERE)
    if opset >= ATTENTION_OPSET:
        _widen_masks(program)
    try:
        converted = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedInputError(
            f"expected a model that torch.onnx converts to operator set {opset}, it does not: "
            f"{error}"
        ) from error
    assert converted is not None
    graph = converted.model.graph
    _name_residuals(program, mode, [*graph.inputs, *graph.outputs])
    foreign = {f"{node.domain}::{node.op_type}" for node in graph.all_nodes() if node.domain}
    if foreign or converted.model.functions:
        raise UnsupportedInputError(
            "expected operators of the ONNX standard only, got "
            f"{', '.join(sorted(foreign) or map(str, converted.model.functions))}; export with "
            "another opset"
        )
    for node in graph.all_nodes():
        # Paths of this machine, and most of the size of a small model.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    converted.save(path, external_data=external_data)
    return path


def _name_residuals(program: ExportedProgram, mode: str | None, values: Sequence[Any]) -> None:
    """Call residuals ``residual.<site>`` among the inputs and outputs of an ONNX model."""
    sites = residual_values(program, mode)
    for value in values:
        if value.name in sites:
            value.name = f"residual.{sites[value.name]}"


def _widen_masks(program: ExportedProgram) -> None:
    """Give every attention a mask with a row per query, where it has one row for all.

    The standard lets a mask broadcast to the logits, onnxruntime's ``Attention`` takes no such one.
    """
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=ATEN_SDPA):
        q, mask = node.args[0], node.args[3] if len(node.args) > 3 else None
        if mask is None or mask.meta["val"].shape[-2] == q.meta["val"].shape[-2]:
            continue
        shape = [*mask.meta["val"].shape[:-2], q.meta["val"].shape[-2], mask.meta["val"].shape[-1]]
        with graph.inserting_before(node):
            wide = graph.call_function(torch.ops.aten.expand.default, (mask, shape))
        wide.meta["val"] = mask.meta["val"].expand(shape)
        node.update_arg(3, wide)
    program.graph_module.recompile()


def require_packages() -> None:
    """Raise UnsupportedInputError, saying what to install, if something is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UnsupportedInputError(
            f"expected the packages onnx and onnxscript, {' and '.join(missing)} cannot be "
            "imported; pip install 'evdit-opt[export]'"
        )


# onnxruntime has no Where for booleans on a CPU.


def _masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    if x.dtype != torch.bool:
        return NotImplemented
    return x | mask if value else x & ~mask


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != torch.bool or y.dtype != torch.bool:
        return NotImplemented
    return (condition & x) | (~condition & y)


WITHOUT_BOOLEAN_WHERE: dict[Any, Any] = {
    torch.ops.aten.masked_fill.Scalar: _masked_fill,
    torch.ops.aten.where.self: _where,
}
