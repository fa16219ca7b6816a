"""Which weights a plan for fine-tuned ones is applied to: those, or the ones training began with.

A hash of weights would change with their precision, quantization or a fused adapter. Instead the
plan records a few numbers of the layers that training changed most, before and after. How far a
model's own numbers lie on the way from the one to the other says which it holds, and how far they
lie beside it says how much that is worth.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from evdit_opt.errors import PlanMismatchError
from evdit_opt.plan_records import ChangedLayer, FinetuneRecord

__all__ = ["changed_layers", "require_changed", "share_of_change"]

logger = logging.getLogger(__name__)

LAYERS, PLACES = 4, 16
LEAST_CHANGE = 1e-3
"""Of a layer's weights, relative; rounding to bfloat16 is as large."""
SURE = 3.0
"""Standard errors."""


@torch.no_grad()
def changed_layers(before: nn.Module, after: nn.Module) -> tuple[ChangedLayer, ...]:
    """The linear layers that training changed most, at the places where it changed them most.

    Args:
        before: the model that training began with.
        after: the trained one; adapters count as what they add to their layer's weight.

    Returns:
        The four layers of the largest relative change; fewer, or none, where less changed by more
        than a precision's rounding.
    """
    old, found = dict(before.named_modules()), []
    for name, module in after.named_modules():
        if not isinstance(old.get(name), nn.Linear):
            continue
        was, now = _weight(old[name]), _weight(module)
        if was is None or now is None or was.shape != now.shape:
            continue
        change = (now - was.to(now.device)).flatten()
        relative = float(change.norm() / was.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if relative < LEAST_CHANGE:
            continue
        places = change.abs().topk(min(PLACES, change.numel())).indices.sort().values.cpu()
        layer = ChangedLayer(
            layer=name,
            shape=(int(was.shape[0]), int(was.shape[1])),
            places=tuple(places.tolist()),
            before=tuple(was.flatten().cpu()[places].tolist()),
            after=tuple(now.flatten().cpu()[places].tolist()),
        )
        found.append((relative, layer))
    return tuple(layer for _, layer in sorted(found, key=lambda one: -one[0])[:LAYERS])


@torch.no_grad()
def share_of_change(model: nn.Module, layers: Sequence[ChangedLayer]) -> tuple[float, float] | None:
    """How much of what training changed a model holds: 0 before, 1 after; and the standard error.

    Args:
        model: of any precision or quantization, its adapters loaded or fused.
        layers: of `changed_layers`.

    Returns:
        None where the weights of these layers cannot be read: packed, sharded, elsewhere.
    """
    modules, sides, ways = dict(model.named_modules()), [], []
    for layer in layers:
        weight = _weight(modules[layer.layer]) if layer.layer in modules else None
        if weight is None or tuple(weight.shape) != layer.shape:
            continue
        held = weight.flatten().cpu()[list(layer.places)].double()
        before, after = (torch.tensor(v, dtype=torch.float64) for v in (layer.before, layer.after))
        ways.append(after - before)
        sides.append(held - before)
    if not ways:
        return None
    way, side = torch.cat(ways), torch.cat(sides)
    share = float(side @ way / (way @ way))
    beside = float((side - share * way).norm() / way.norm())
    return share, beside / max(1, len(way) - 1) ** 0.5


def require_changed(model: nn.Module, record: FinetuneRecord) -> None:
    """Refuse to run a plan for fine-tuned weights on those that training began with.

    What cannot be told is a warning: weights that cannot be read, adapters at a part of their
    scale. A record without numbers, of an earlier version, says nothing.

    Raises:
        PlanMismatchError: the weights are surely not the fine-tuned ones.
    """
    if not record.changed:
        return
    found = share_of_change(model, record.changed)
    names = ", ".join(layer.layer for layer in record.changed)
    if found is None:
        logger.warning(
            "this plan is for fine-tuned weights; whether %s holds them cannot be read off %s",
            type(model).__name__, names,
        )  # fmt: skip
        return
    share, error = found
    if share + SURE * error < 0.25:
        raise PlanMismatchError(
            "expected the fine-tuned weights that this plan is for, got others: of what training "
            f"changed in {names}, {share:.0%} is there; load them before the plan, with "
            "evdit_opt.distill.saved.restore_finetuned(pipe, folder), which applies it too, or "
            "load the pipeline that was saved after training"
        )
    if share - SURE * error < 0.5:
        logger.warning(
            "this plan is for fine-tuned weights; of what training changed in %s, %.0f%% is in "
            "this %s (standard error %.0f%%)",
            names, 100 * share, type(model).__name__, 100 * error,
        )  # fmt: skip


def _weight(module: Any) -> torch.Tensor | None:
    """What a linear layer multiplies by, adapters included, float32; None if it cannot be read."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or isinstance(weight, DTensor):
        return None
    if type(weight).dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()
    if weight.ndim != 2 or not weight.is_floating_point():
        return None
    total = weight.detach().float()
    if base is not module and not (module.merged or module.disable_adapters):
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                total = total + (b.float() @ a.float()).to(total.device) * module.scaling[name]
    return None if total.is_meta else total
