"""What can be proven about a mask from how it was made: along which dimensions it never changes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from evdit_opt.passes.graph import (
    operation,
    same_size,
    tensor_inputs,
    value_of,
    written_inputs,
)

__all__ = ["constant_dims", "mutated_storages", "storage_of"]

SAME_PLACE = frozenset(
    """abs add and_ bfloat16 bitwise_and bitwise_not bitwise_or bool clamp clone contiguous detach
    div double eq float ge gt half inv invert le logical_and logical_not logical_or lt masked_fill
    mul ne neg or_ rsub sub to _to_copy truediv where xor""".split()
)
"""Every element of the result depends on the elements at its own place, inputs broadcast."""

FILL = frozenset(
    "full full_like new_full new_ones new_zeros ones ones_like zeros zeros_like".split()
)
EXPAND = frozenset("broadcast_to expand expand_as repeat repeat_interleave tile".split())
RESHAPE = frozenset("flatten reshape squeeze unflatten unsqueeze view _unsafe_view".split())


def constant_dims(node: fx.Node, mutated: frozenset[int]) -> frozenset[int]:
    """Dimensions of a tensor along which all its elements are provably equal.

    Args:
        node: a tensor.
        mutated: :func:`mutated_storages` of its graph; how these were made proves nothing.

    Example: ``mask.view(b, 1, 1, s).expand(-1, -1, s, -1)`` is constant along 1 and 2.
    """
    value = value_of(node)
    # One element, or the same one again and again, whoever writes to it.
    alone = frozenset(
        dim
        for dim, (size, step) in enumerate(zip(value.shape, value.stride(), strict=True))
        if _is(size, 1) or _is(step, 0)
    )
    if node.op not in ("call_function", "call_method") or storage_of(node) in mutated:
        return alone
    name, inputs = operation(node), tensor_inputs(node)
    if name in FILL:
        return frozenset(range(value.ndim))
    if not inputs or not all(isinstance(value_of(x), torch.Tensor) for x in inputs):
        return alone
    known = [(value_of(x), constant_dims(x, mutated)) for x in inputs]
    shape, first = known[0]
    if name in SAME_PLACE:
        return alone | _everywhere(value.ndim, known)
    if name in EXPAND and value.ndim >= shape.ndim:
        return alone | _everywhere(value.ndim, known[:1])
    if name in ("transpose", "swapaxes", "swapdims", "permute", "t", "adjoint"):
        order = _order(name, node.args[1:], shape.ndim)
        return frozenset(to for to, source in enumerate(order) if source in first)
    if name in RESHAPE:
        return alone | _reshaped(shape.shape, value.shape, first)
    if name == "getitem":
        return alone | _indexed(node.args[1], shape.ndim, first)
    if name in ("pad", "constant_pad_nd"):
        padded = len(node.args[1]) // 2  # type: ignore[arg-type]
        return alone | frozenset(dim for dim in first if dim < shape.ndim - padded)
    return alone


def mutated_storages(nodes: Iterable[fx.Node]) -> frozenset[int]:
    """Storages that an in-place operation among ``nodes`` writes to."""
    return frozenset(storage_of(x) for node in nodes for x in written_inputs(node))


def storage_of(node: fx.Node) -> int:
    """Identity of the memory of a tensor, which its views share; 0 for what is no tensor."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else 0


def _is(size: int | torch.SymInt, number: int) -> bool:
    return isinstance(size, int) and size == number


def _everywhere(ndim: int, known: Sequence[tuple[torch.Tensor, frozenset[int]]]) -> frozenset[int]:
    """Dimensions of a broadcast result that are constant in every input."""
    constant = set(range(ndim))
    for value, dims in known:
        missing = ndim - value.ndim
        constant &= set(range(missing)) | {dim + missing for dim in dims}
    return frozenset(constant)


def _order(name: str, args: Sequence[Any], ndim: int) -> list[int]:
    if name == "permute":
        dims = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        return [dim % ndim for dim in dims]
    first, second = (args[0], args[1]) if len(args) == 2 else (ndim - 2, ndim - 1)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def _reshaped(
    before: Sequence[Any], after: Sequence[Any], constant: frozenset[int]
) -> frozenset[int]:
    """Dimensions that a reshape leaves alone, matched from either end; sizes of 1 come and go."""
    kept: set[int] = set()
    for turn in (_forward, _backward):
        old, new = turn(before), turn(after)
        for (source, size), (to, other) in zip(old, new, strict=False):
            if not same_size(size, other):
                break
            if source in constant:
                kept.add(to)
    return frozenset(kept)


def _forward(shape: Sequence[Any]) -> list[tuple[int, Any]]:
    return [(dim, size) for dim, size in enumerate(shape) if not _is(size, 1)]


def _backward(shape: Sequence[Any]) -> list[tuple[int, Any]]:
    return _forward(shape)[::-1]


def _indexed(index: Any, ndim: int, constant: frozenset[int]) -> frozenset[int]:
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (part is None or part is ... or isinstance(part, (int, slice))) for part in parts):
        return frozenset()
    used = sum(part is not None and part is not ... for part in parts)
    rest = [slice(None)] * (ndim - used)
    where = parts.index(...) if ... in parts else len(parts)
    full = (*parts[:where], *rest, *parts[where + 1 :])
    kept, source, to = set(), 0, 0
    for part in full:
        if part is None:
            to += 1
            continue
        if isinstance(part, slice):
            if source in constant:
                kept.add(to)
            to += 1
        source += 1
    return frozenset(kept)
