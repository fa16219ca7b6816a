"""Site marks: how a plan's rule gets from a module into the graph Dynamo makes of it.

A forward pre-hook on a site's module wraps its hidden states, while compiling only, in the operator
``evdit::mark`` with the site's rule and the live grid. Dynamo guards the values it read, so layers
that share one compiled graph never share a mask. A pass always takes the mark out again.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evdit_opt.errors import PlanMismatchError
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.passes.site_mark import MARK, MarkFacts

__all__ = ["LiveGrid", "RootMark", "SiteMark", "add_marks", "site_modules"]


class LiveGrid:
    """The grid of the forward that is running, one per thread, and what its step asks of the sites.

    Threads of PyTorch's own, which recompute checkpointed layers, run no forward: they get the grid
    of the last one.

    Attributes:
        mode: what the step asks of the sites that reuse, one of :data:`MODES`.
        rows: as in the mark, of the forward that is running on this thread.
    """

    def __init__(self) -> None:
        self.here = threading.local()
        self.last_frames = self.last_tokens = 0
        self.mode = "sparse"

    def start(self, frames: int, tokens_per_frame: int) -> None:
        """A forward begins on this thread."""
        self.here.running = True
        self.here.frames = self.last_frames = frames
        self.here.tokens = self.last_tokens = tokens_per_frame

    def stop(self) -> None:
        """The forward on this thread is over."""
        self.here.running = False

    @property
    def running(self) -> bool:
        """True within a forward on this thread, and in recomputation for a backward."""
        backward = torch._C._current_graph_task_id() != -1
        return backward or getattr(self.here, "running", False)

    def read(self) -> tuple[int, int]:
        """Frames and tokens per frame; zeros if there was no forward."""
        frames = getattr(self.here, "frames", self.last_frames)
        return frames, getattr(self.here, "tokens", self.last_tokens)

    @property
    def rows(self) -> Tensor | None:
        """As in the mark; None on a thread whose forward is not checked."""
        return getattr(self.here, "rows", None)

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        if rows is not None:
            self.here.rows = rows
        elif hasattr(self.here, "rows"):
            del self.here.rows  # None would be another state to Dynamo than before the first check

    def __reduce__(self) -> tuple[type["LiveGrid"], tuple[()]]:
        return LiveGrid, ()  # a copy of a model runs forwards of its own


@dataclass
class SiteMark:
    """What hangs on a site's module.

    Attributes:
        name: the module's path.
        spec: encoded :class:`SiteSpec`; empty while observing.
        live: where the grid of the running forward is found.
        index: number of the site; only while observing.
        attend: does the work of an SDPA that runs outside all graphs; see ``scopes``.
        reuses: whether the step's mode is the site's too; else it is always "sparse", but in
            dense steps.
        residual: as in the mark; set before every forward of a model that reuses.
        residual_scale: likewise.
        drift: as in the mark; None at a site that nobody checks.
    """

    name: str
    spec: str
    live: LiveGrid
    index: Tensor | None = None
    attend: Callable[..., Tensor] | None = None
    reuses: bool = False
    residual: Tensor | None = None
    residual_scale: Tensor | None = None
    drift: Tensor | None = None

    @property
    def mode(self) -> str:
        """One of :data:`MODES`."""
        return self.live.mode if self.reuses or self.live.mode == "dense" else "sparse"

    @property
    def facts(self) -> "MarkFacts":
        """What the mark of this forward says."""
        mode, rows, drift = self.mode, self.live.rows, self.drift
        residual, scale = self.residual, self.residual_scale
        if mode not in ("refresh", "reuse"):
            residual = scale = None
        if rows is None or drift is None or mode in ("dense", "refresh"):
            rows = drift = None
        live = self.live.read()
        return MarkFacts(self.spec, *live, self.index, mode, residual, scale, rows, drift)


@dataclass
class RootMark:
    """What hangs on the model while its sites are marked.

    Attributes:
        source: how a forward's grid is read; None if nobody needs it.
        parameters: names of the forward's positional parameters.
        live: where the sites read the grid.
        sites: the marked modules.
        handles: the hooks.
        outside: what keeps the model out of all graphs; empty if nothing does.
    """

    source: GridSource | None
    parameters: tuple[str, ...]
    live: LiveGrid
    sites: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    outside: str = ""

    def remove(self) -> None:
        """Take all hooks and attributes off again."""
        for handle in self.handles:
            handle.remove()
        for module in self.sites:
            del module._evdit_site
        self.handles.clear()
        self.sites.clear()


def add_marks(
    model: nn.Module,
    specs: Mapping[str, str],
    source: GridSource | None,
    indices: Mapping[str, Tensor] | None = None,
) -> RootMark:
    """Hook the sites of ``model``; the caller keeps the result as ``model._evdit`` for the hooks.

    Args:
        model: the denoiser.
        specs: encoded :class:`SiteSpec` per module path.
        source: how a forward's grid is read.
        indices: numbers of the sites as tensors, for observing.

    Raises:
        PlanMismatchError: naming the paths the model has no module at.
    """
    modules = site_modules(model, specs)
    parameters = tuple(inspect.signature(model.forward).parameters)
    root = RootMark(source, parameters, LiveGrid())
    if source is not None:
        root.handles.append(model.register_forward_pre_hook(_read_grid, with_kwargs=True))
    for name, spec in specs.items():
        module = modules[name]
        index = None if indices is None else indices[name]
        module._evdit_site = SiteMark(name, spec, root.live, index)  # type: ignore[assignment]
        handle = module.register_forward_pre_hook(_mark_input, with_kwargs=True)
        root.handles.append(handle)
        root.sites.append(module)
    return root


def site_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules at the given paths.

    Raises:
        PlanMismatchError: naming the paths the model has no module at.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise PlanMismatchError(
            f"expected the sites {', '.join(missing)} in this {type(model).__name__}, found no "
            "such modules; load the plan of this model or make one with evdit_opt.make_plan"
        )
    return {name: modules[name] for name in names}


def _read_grid(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    root: Any = model._evdit
    arguments = dict(zip(root.parameters, args, strict=False))
    arguments.update(kwargs)
    frames, height, width = root.source.sizes(arguments)
    root.live.start(frames, height * width)


def _mark_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    site: Any = module._evdit_site
    if not torch.compiler.is_compiling():
        if site.index is not None or site.attend is not None:
            # Who observes notices that this site never called; a scope does the mark's work.
            return args, kwargs
        raise PlanMismatchError(
            f"expected site {site.name} to run in a compiled graph, it was executed eagerly, where "
            "its sparse attention cannot be applied. Call the whole model rather than its "
            "parts; if it is a copy of an optimized model, restore it and apply the plan to it; if "
            "Dynamo hit its recompile limit, use fewer shapes or fewer distinct rules"
        )
    facts = site.facts
    if "hidden_states" in kwargs:
        x = kwargs["hidden_states"]
    else:
        x = args[0] if args else next(iter(kwargs.values()))
    marked = MARK(x, *facts)
    # Self-attention may be handed the same tensor three times, as query, key and value.
    args = tuple(marked if value is x else value for value in args)
    return args, {name: marked if value is x else value for name, value in kwargs.items()}
