"""Site marks: how a plan's rule gets from a module into the graph Dynamo makes of it.

A forward pre-hook on a site's module wraps its hidden states, while compiling only, in the operator
``evdit::mark`` with the site's rule and the live grid. Dynamo guards the values it read, so layers
that share one compiled graph never share a mask. A pass always takes the mark out again.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.grid_source import GridSource

__all__ = [
    "MARK",
    "MODES",
    "LiveGrid",
    "RootMark",
    "SiteMark",
    "SiteSpec",
    "add_marks",
    "mark_op",
    "remove_mark",
]


@dataclass(frozen=True)
class SiteSpec:
    """What a mark says about its site, as one string that Dynamo compares as a whole.

    Attributes:
        rule: the rule to apply.
        prefix: text tokens before the video, as calibrated.
        suffix: text tokens after the video, as calibrated.
        min_tokens: sequence length below which the site stays dense.
    """

    rule: Rule
    prefix: int = 0
    suffix: int = 0
    min_tokens: int = 0

    def encode(self) -> str:
        """The string; integers would turn symbolic once two layers sharing a graph differ."""
        rule = self.rule
        parts = (rule.references, rule.window, rule.weighting, rule.spacing)
        return " ".join(map(str, (*parts, self.prefix, self.suffix, self.min_tokens)))

    @classmethod
    def decode(cls, text: str) -> "SiteSpec":
        """Inverse of :meth:`encode`."""
        references, window, weighting, spacing, prefix, suffix, min_tokens = text.split(" ")
        rule = Rule(int(references), int(window), weighting, spacing)  # type: ignore[arg-type]
        return cls(rule, int(prefix), int(suffix), int(min_tokens))


@torch.library.custom_op(
    "evdit::mark",
    mutates_args=(),
    schema="(Tensor x, str spec, SymInt frames, SymInt tokens_per_frame, Tensor? index, str mode, "
    "Tensor? residual) -> Tensor",
)
def mark_op(
    x: Tensor,
    spec: str,
    frames: int,
    tokens_per_frame: int,
    index: Tensor | None,
    mode: str,
    residual: Tensor | None,
) -> Tensor:
    """``x``, marked as the hidden states of a site; exists in graphs only, never runs.

    Args:
        x: ``[batch, seq, channels]``, the input of the site's module.
        spec: ``SiteSpec.encode()``; empty while observing.
        frames: latent frames of this forward.
        tokens_per_frame: tokens of a frame in this forward.
        index: 0-d integer, number of the site; only while observing.
        mode: what the site does in this step, one of :data:`MODES`.
        residual: what the site keeps from a refresh to the next, like the attention's output; only
            in the modes "refresh" and "reuse".
    """
    raise PlanMismatchError(
        "expected the evdit backend to compile this graph, another backend did: a site mark was "
        "left in it. Call the model that apply_plan was given, do not compile it or its parts again"
    )


@mark_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


MARK = torch.ops.evdit.mark.default

MODES = ("sparse", "dense", "refresh", "reuse")
"""What a site does in a step: its mask; dense attention; dense attention, keeping what the mask
would have dropped (the residual); its mask plus the residual."""


@dataclass
class LiveGrid:
    """The grid of the forward that is running, and what its step asks of the sites that reuse."""

    frames: int = 0
    tokens_per_frame: int = 0
    mode: str = "sparse"


@dataclass
class SiteMark:
    """What hangs on a site's module: its name, and the arguments of its mark.

    Attributes:
        reuses: whether the step's mode is the site's too; else it is always "sparse", but in
            dense steps.
        residual: as in the mark; set before every forward of a model that reuses.
    """

    name: str
    spec: str
    live: LiveGrid
    index: Tensor | None = None
    reuses: bool = False
    residual: Tensor | None = None

    @property
    def mode(self) -> str:
        """One of :data:`MODES`."""
        return self.live.mode if self.reuses or self.live.mode == "dense" else "sparse"


@dataclass
class RootMark:
    """What hangs on the model while its sites are marked.

    Attributes:
        source: how a forward's grid is read; None if nobody needs it.
        parameters: names of the forward's positional parameters.
        live: where the sites read the grid.
        sites: the marked modules.
        handles: the hooks.
    """

    source: GridSource | None
    parameters: tuple[str, ...]
    live: LiveGrid
    sites: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

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
    indices: Sequence[Tensor] | None = None,
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
    modules = dict(model.named_modules())
    missing = [name for name in specs if name not in modules]
    if missing:
        raise PlanMismatchError(
            f"expected the sites {', '.join(missing)} in this {type(model).__name__}, found no "
            "such modules; load the plan of this model or make one with evdit_opt.make_plan"
        )
    parameters = tuple(inspect.signature(model.forward).parameters)
    root = RootMark(source, parameters, LiveGrid())
    if source is not None:
        root.handles.append(model.register_forward_pre_hook(_read_grid, with_kwargs=True))
    for number, (name, spec) in enumerate(specs.items()):
        module = modules[name]
        index = None if indices is None else indices[number]
        module._evdit_site = SiteMark(name, spec, root.live, index)  # type: ignore[assignment]
        handle = module.register_forward_pre_hook(_mark_input, with_kwargs=True)
        root.handles.append(handle)
        root.sites.append(module)
    return root


def remove_mark(mark: fx.Node) -> None:
    """Let what it marked take the place of a mark in its graph."""
    marked = mark.args[0]
    assert isinstance(marked, fx.Node)
    mark.replace_all_uses_with(marked)
    mark.graph.erase_node(mark)


def _read_grid(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    root: Any = model._evdit
    arguments = dict(zip(root.parameters, args, strict=False))
    arguments.update(kwargs)
    frames, height, width = root.source.sizes(arguments)
    root.live.frames = frames
    root.live.tokens_per_frame = height * width


def _mark_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    site: Any = module._evdit_site
    if not torch.compiler.is_compiling():
        if site.index is not None:
            return args, kwargs  # observing only: who observes notices that this site never called
        raise PlanMismatchError(
            f"expected site {site.name} to run in a compiled graph, it was executed eagerly, where "
            "its sparse attention cannot be applied. Call the whole model rather than its "
            "parts; if it is a copy of an optimized model, restore it and apply the plan to it; if "
            "Dynamo hit its recompile limit, use fewer shapes or fewer distinct rules"
        )
    live = site.live
    mode = site.mode
    residual = site.residual if mode in ("refresh", "reuse") else None
    facts = (site.spec, live.frames, live.tokens_per_frame, site.index, mode, residual)
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": MARK(kwargs["hidden_states"], *facts)}
    return (MARK(args[0], *facts), *args[1:]), kwargs
