"""The ``"evdit"`` backend of ``torch.compile``: Dynamo's graph -> passes -> an inner backend."""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.inner import Inner, inner_name, wrong_inner
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.decide_site import SiteOutcome
from evdit_opt.passes.graph import copy_graph, subgraphs
from evdit_opt.passes.inline_decomposed import inline_decomposed
from evdit_opt.passes.mark_planned_sites import mark_planned_sites
from evdit_opt.passes.site_mark import MARKS
from evdit_opt.passes.stand_in import StandIn, settle
from evdit_opt.passes.swap_attention import swap_attention
from evdit_opt.plan import Plan
from evdit_opt.report import Report

__all__ = ["Options", "compile_graph", "evdit", "source_hash"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``torch.compile(..., backend="evdit", options={...})`` understands.

    Attributes:
        plan: the plan, or the path of one; None: the model stays dense.
        inner: what compiles the rewritten graph: "inductor", "eager", "aot_eager", "tensorrt", any
            other Dynamo backend by name, or a callable ``(graph module, example inputs)``.
        inductor: Inductor options, as ``torch.compile`` takes them for its own backend.
        impl: implementation of the sparse attention.
        layout: the grid, where it cannot be read from the graph.

    Raises:
        UnsupportedInputError: if ``inner`` is none of these, or not installed.
    """

    plan: Plan | str | PathLike[str] | None = None
    inner: Inner = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    impl: str = "auto"
    layout: TokenLayout | VideoGrid | None = None

    def __post_init__(self) -> None:
        problem = wrong_inner(self.inner)
        if problem:
            raise UnsupportedInputError(problem)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> "Options":
        """Options from torch.compile's arguments.

        Raises:
            UnsupportedInputError: on an unknown option.
        """
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(options or ()) - set(known))
        if unknown:
            raise UnsupportedInputError(
                f"expected options among {', '.join(known)}, got {', '.join(unknown)}; Inductor's "
                "own go into options={'inductor': {...}}"
            )
        parsed = cls(**(options or {}))
        if mode is None or mode == "default":
            return parsed
        from torch._inductor import list_mode_options

        patches = {**list_mode_options(mode), **parsed.inductor}
        return cls(**{**(options or {}), "inductor": patches})

    @property
    def inner_name(self) -> str:
        """The inner backend, for people."""
        return inner_name(self.inner)


@dataclass
class Compilation:
    """One graph on its way through the passes."""

    gm: fx.GraphModule
    options: Options
    names: Mapping[int, str] | None
    sharing: Mapping[str, str] | None = None
    stand_ins: list[StandIn] = field(default_factory=list)
    sites: list[SiteOutcome] = field(default_factory=list)


def evdit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; ``torch.compile(model, backend="evdit")`` calls this.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        options: see :class:`Options`.
        mode: Inductor's mode, such as "max-autotune".
    """
    compiled, report = compile_graph(gm, example_inputs, Options.parse(options, mode), None)
    if report.sites:
        logger.info("%s", report.show())
    return compiled


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    names: Mapping[int, str] | None,
    sharing: Mapping[str, str] | None = None,
) -> tuple[Callable[..., Any], Report]:
    """Rewrite a copy of ``gm`` and compile it.

    Args:
        gm: Dynamo's graph, before AOT.
        example_inputs: its inputs.
        options: the plan and the inner backend.
        names: ``id(module) -> path`` of the model, where it is known.
        sharing: encoded spec -> the sites that have it, where it is known.

    Returns:
        The compiled graph, and what happened to its sites.
    """
    compilation = Compilation(copy_graph(gm), options, names, sharing)
    for run_pass in PASSES:
        run_pass(compilation)
    report = Report(tuple(compilation.sites), 1, options.inner_name, options.impl)
    return _compile_inner(compilation.gm, example_inputs, options), report


def _canonicalize(compilation: Compilation) -> None:
    compilation.stand_ins += canonicalize_attention(compilation.gm)


def _place_marks(compilation: Compilation) -> None:
    """Marks come from apply_plan's hooks; without them the plan's module names must do."""
    if _has_marks(compilation.gm):
        return
    plan, layout = compilation.options.plan, compilation.options.layout
    if plan is None:
        # With names this is a part of an optimized model that holds no site, and all is well.
        if compilation.names is None:
            _say_dense()
        return
    grid = layout.grid if isinstance(layout, TokenLayout) else layout
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    mark_planned_sites(compilation.gm, plan, grid, compilation.names)


def _swap(compilation: Compilation) -> None:
    compilation.sites += swap_attention(
        compilation.gm, compilation.names, compilation.options.impl, compilation.sharing
    )


def _inline(compilation: Compilation) -> None:
    """Inductor fuses what it can see."""
    if compilation.options.inner == "inductor":
        inline_decomposed(compilation.gm)


def _settle(compilation: Compilation) -> None:
    settle(compilation.stand_ins)


def _clean_up(compilation: Compilation) -> None:
    compilation.gm.graph.lint()
    compilation.gm.recompile()


PASSES: tuple[Callable[[Compilation], None], ...] = (
    _canonicalize,
    _place_marks,
    _swap,
    _settle,
    _inline,
    _clean_up,
)


def _has_marks(gm: fx.GraphModule) -> bool:
    return any(node.target in MARKS for body in subgraphs(gm) for node in body.graph.nodes)


@functools.cache
def _say_dense() -> None:
    logger.warning(
        "backend 'evdit' got no plan: the model stays dense and exact. Make a plan with "
        "evdit_opt.make_plan(pipe, prompts), then call evdit_opt.apply_plan(model, plan), or pass "
        "options={'plan': 'my.evdit.json'} to torch.compile"
    )


def _compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    if callable(options.inner):
        return options.inner(gm, example_inputs)  # type: ignore[no-any-return]
    if options.inner == "tensorrt":
        from evdit_opt.export.tensorrt import tensorrt

        return tensorrt(gm, example_inputs)
    if options.inner == "eager":
        return gm.forward  # type: ignore[no-any-return]
    if options.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        from evdit_opt.passes.cache_key import with_source_key

        patches = with_source_key(dict(options.inductor), source_hash())
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return compiled  # type: ignore[no-any-return]
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.inner)(gm, list(example_inputs))


@functools.cache
def source_hash() -> str:
    """Hash of this package's sources: what is baked into generated code besides graph and plan."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    patterns = ("*.py", "passes/*.py", "kernels/*.py")
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()
