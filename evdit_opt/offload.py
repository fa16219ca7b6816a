"""Weights that hooks bring to the accelerator, or cast, while a module runs: where hooks sit.

accelerate (``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``, ``device_map``) and
diffusers (``enable_group_offload``, ``enable_layerwise_casting``) put their own ``forward`` in a
module's place. Dynamo does not trace it. Around whole layers that costs a graph break; inside of an
attention it separates the projections from the attention.
"""

from collections.abc import Iterable

from torch import nn

from evdit_opt.errors import UnsupportedInputError

__all__ = ["hook_inside", "require_weights_in_place"]

HOOKS = (
    "group_offloading",
    "lazy_prefetch_group_offloading",
    "layer_execution_tracker",
    "layerwise_casting",
)
"""Names under which diffusers registers such hooks."""


def hook_inside(modules: Iterable[nn.Module]) -> str:
    """Kind of the first such hook on one of the modules or within them; empty if none."""
    found = (_hook_of(part) for module in modules for part in module.modules())
    return next(filter(None, found), "")


def require_weights_in_place(model: nn.Module) -> None:
    """Refuse a model whose single layers hooks load or cast: calibration has to trace them.

    Raises:
        UnsupportedInputError: naming the layer.
    """
    for name, module in model.named_modules():
        hook = "" if next(module.children(), None) is not None else _hook_of(module)
        if name and hook:
            raise UnsupportedInputError(
                f"expected the weights of {type(model).__name__} in place, or moved as a whole or "
                f"by blocks, got {name} loaded or cast by itself ({hook}); make the plan before "
                "sequential or leaf-level offload, or layerwise casting, and apply it afterwards"
            )


def _hook_of(module: nn.Module) -> str:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        return type(hook).__name__
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return next((type(hooks[name]).__name__ for name in HOOKS if name in hooks), "")
