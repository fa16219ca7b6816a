"""Look at a denoiser's first call: its attentions, graph breaks, and what could be won."""

from dataclasses import dataclass

from evdit_opt.errors import AlreadyOptimizedError, LayoutError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.inspection.attention_share import AttentionShare, measure_share
from evdit_opt.inspection.graph_breaks import GraphBreak, recorded_breaks
from evdit_opt.models import Denoiser, first_call
from evdit_opt.passes.find_attention import AttentionSite, find_attention
from evdit_opt.passes.infer_layout import InferredLayout, infer_layout
from evdit_opt.strict_json import dump
from evdit_opt.versions import installed_versions

__all__ = ["Inspection", "SeenAttention", "examine"]


@dataclass(frozen=True, kw_only=True)
class SeenAttention:
    """One attention of the model.

    Attributes:
        name: module path.
        site: True if a plan can make it sparse.
        way: how a plan would reach it, "mark" or "scope".
        q_tokens: query tokens; None if known at run time only.
        kv_tokens: key tokens; None if known at run time only.
        prefix: tokens before the video; None for what is no site.
        suffix: tokens after the video; None for what is no site.
        heads: query heads.
        head_dim: size of a head; 0 if it is not known.
        reason: why it is a site, or is left alone.
    """

    name: str
    site: bool
    way: str
    q_tokens: int | None
    kv_tokens: int | None
    prefix: int | None
    suffix: int | None
    heads: int
    head_dim: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``evdit inspect`` tells.

    Attributes:
        target: what was asked for.
        model: class of the denoiser.
        grid: latent grid of the call, in tokens; None if it could not be established.
        attentions: every attention, in the order they run, those of one module and kind once.
        fullgraph: True if Dynamo captured the model as one graph.
        graphs: how many it made.
        graph_breaks: where it broke them.
        attention: what the sites' attention costs; None if not measured.
        versions: of what the result depends on.
    """

    target: str
    model: str
    grid: VideoGrid | None
    attentions: tuple[SeenAttention, ...]
    fullgraph: bool
    graphs: int
    graph_breaks: tuple[GraphBreak, ...]
    attention: AttentionShare | None
    versions: tuple[tuple[str, str], ...]

    @property
    def sites(self) -> tuple[SeenAttention, ...]:
        """The attentions that a plan can make sparse."""
        return tuple(seen for seen in self.attentions if seen.site)

    def to_json(self) -> str:
        """The whole of it as one JSON object."""
        return dump(self)


def examine(
    target: str, denoiser: Denoiser, grid: VideoGrid | None = None, timing: bool = True
) -> Inspection:
    """Inspect the first call of a denoiser.

    Args:
        target: what the user asked for.
        denoiser: the model and how to call it.
        grid: the grid of that call, for models whose arguments do not tell.
        timing: compile and time the call, with and without the attention of its sites.

    Raises:
        AlreadyOptimizedError: if a plan is applied.
        LayoutError: if no argument of the call holds a video.
    """
    model = denoiser.model
    if hasattr(model, "_evdit"):
        raise AlreadyOptimizedError(
            f"expected a dense {type(model).__name__}, this one has a plan applied; inspect it "
            "before apply_plan, or call evdit_opt.restore(model)"
        )
    args, kwargs = first_call(denoiser)
    with recorded_breaks() as breaks:
        sites = find_attention(model, args, kwargs)
    inferred, trouble = None, ""
    if sites.names:
        try:
            inferred = infer_layout(model, sites, args, kwargs, grid)
        except LayoutError as error:  # told below, with every site it concerns
            trouble = str(error)
    names = tuple(inferred.layouts) if inferred else ()
    share = None
    if timing and names:
        scoped = frozenset(sites.scoped) & set(names)
        share = measure_share(model, names, args, kwargs, scoped=scoped, fullgraph=sites.fullgraph)
    seen = (_seen(found, inferred, trouble) for found in sites.attentions)
    return Inspection(
        target=target,
        model=type(model).__name__,
        grid=inferred.grid if inferred else None,
        attentions=tuple(dict.fromkeys(seen)),
        fullgraph=sites.fullgraph,
        graphs=sites.graphs,
        graph_breaks=() if sites.fullgraph else tuple(breaks.values()),
        attention=share,
        versions=tuple(sorted(installed_versions().items())),
    )


def _seen(found: AttentionSite, inferred: InferredLayout | None, trouble: str) -> SeenAttention:
    layout: TokenLayout | None = None
    reason = found.reason
    if found.is_site and inferred is not None and found.name in inferred.layouts:
        layout = inferred.layouts[found.name]
        reason = f"3D self-attention; layout confirmed by {inferred.evidence[found.name]}"
    elif found.is_site:
        reason = trouble if inferred is None else inferred.refused[found.name]
    return SeenAttention(
        name=found.name,
        site=layout is not None,
        way=found.way,
        q_tokens=found.q_len,
        kv_tokens=found.kv_len,
        prefix=None if layout is None else layout.prefix,
        suffix=None if layout is None else layout.suffix,
        heads=found.heads,
        head_dim=found.head_dim,
        reason=reason,
    )
