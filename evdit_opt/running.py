"""How an optimized model runs: in one graph, in parts, or outside of all graphs."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evdit_opt.errors import PlanMismatchError, UnsupportedInputError
from evdit_opt.offload import hook_inside
from evdit_opt.passes.capture import RECOMPILE_LIMIT, compile_call
from evdit_opt.passes.marks import RootMark
from evdit_opt.passes.scopes import Attend, marks_to_scopes

__all__ = ["Running", "require_no_compiled_parts"]

logger = logging.getLogger(__name__)


class Running:
    """The call of an optimized model; retreats as far as the model makes it, never further.

    1. One graph, if the plan was made so.
    2. In parts, once Dynamo cannot trace the model whole: offloading of whole models or blocks,
       step caches. Every planned site is still rewritten, or is an error.
    3. Outside of all graphs, where hooks load weights inside of the sites (sequential and leaf
       level offload, layerwise casting): a graph would hold a single linear layer, one graph per
       layer of the model. The sites' attention is sparse, in scopes; the rest runs as it does
       without a plan. When the hooks go, the model is compiled again.

    A call that failed is made again from the start: a forward has no effects.

    Args:
        model: the denoiser.
        backend: compiles Dynamo's graphs.
        root: the model's marks.
        attend: computes a site's attention outside of graphs.
        fullgraph: begin with one graph.
        may_split: go on in parts where one graph cannot be; else Dynamo's error is raised.
        dynamic: as in ``torch.compile``.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Callable[..., Any],
        root: RootMark,
        attend: Attend,
        *,
        fullgraph: bool,
        may_split: bool,
        dynamic: bool | None,
    ) -> None:
        self._model, self._backend, self._root, self._attend = model, backend, root, attend
        self._fullgraph, self._may_split, self._dynamic = fullgraph, may_split, dynamic
        self._undo_scopes: Callable[[], None] | None = None
        self._call = self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            if self._root.outside:
                if hook_inside(self._root.sites):
                    return self._model._call_impl(*args, **kwargs)
                self._go_inside()
            try:
                return self._call(*args, **kwargs)
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
                if not self._go_outside() and not self._split(error):
                    raise
            except (torch._dynamo.exc.BackendCompilerFailed, PlanMismatchError) as error:
                cause = getattr(error, "inner_exception", error)
                if not isinstance(cause, PlanMismatchError) or not self._go_outside():
                    raise
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise UnsupportedInputError(
                    f"expected at most {RECOMPILE_LIMIT} kinds of calls (sizes, dtypes, gradients, "
                    f"adapters) of {type(self._model).__name__}, each is compiled; pass "
                    "dynamic=True to apply_plan, or restore the model and apply the plan again"
                ) from error

    def _compile(self) -> Callable[..., Any]:
        return compile_call(self._model, self._backend, self._fullgraph, self._dynamic)

    def _split(self, error: Exception) -> bool:
        """Compile in parts from now on; False if that is out of the question."""
        if not self._fullgraph or not self._may_split:
            return False
        require_no_compiled_parts(self._model)
        self._fullgraph = False
        self._call = self._compile()
        logger.warning(
            "%s is compiled in parts from now on, Dynamo does not trace it whole: %s",
            type(self._model).__name__,
            str(error).splitlines()[0],
        )
        return True

    def _go_outside(self) -> bool:
        """Run without graphs from now on; False if nothing makes that necessary."""
        hook = hook_inside(self._root.sites)
        if not hook:
            return False
        self._root.outside = f"{hook} loads or casts the weights of single layers"
        self._undo_scopes = marks_to_scopes(self._model, self._root, self._attend)
        logger.warning(
            "%s runs without torch.compile from now on, its sites sparse: %s. Offload whole models "
            "or blocks (enable_model_cpu_offload, offload_type='block_level') to have it compiled",
            type(self._model).__name__,
            self._root.outside,
        )
        return True

    def _go_inside(self) -> None:
        assert self._undo_scopes is not None
        self._undo_scopes()
        self._root.outside, self._undo_scopes = "", None


def require_no_compiled_parts(model: nn.Module) -> None:
    """Refuse parts that were compiled by somebody else, in a model that is compiled in parts.

    Where the graph breaks, a part compiled earlier would go on running its old, dense code.

    Raises:
        UnsupportedInputError: naming the first.
    """
    parts = [name for name, module in model.named_modules() if name and _is_compiled(module)]
    if parts:
        raise UnsupportedInputError(
            f"expected no compiled parts in a model that breaks Dynamo's graph, got "
            f"{parts[0]}; load the model without compiling its blocks, apply_plan compiles them"
        )


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(
        module, torch._dynamo.OptimizedModule
    )
