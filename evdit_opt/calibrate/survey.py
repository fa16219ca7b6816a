"""Before any measuring: what there is to calibrate."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from evdit_opt.errors import LayoutError, NoVideoAttentionError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.models import Denoiser, first_call
from evdit_opt.passes.find_attention import AttentionSite, find_attention
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.passes.infer_layout import infer_layout

__all__ = ["Survey", "survey_attention"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """The sites of a model, and everything it has beside them.

    Attributes:
        grid: the video grid of the first call.
        grid_source: how any call's grid is read.
        layouts: token layout per site, in model order.
        evidence: per site, how its layout is known.
        refused: reason per module path, of every attention left alone.
        attentions: all attention calls, in the order they run.
        fullgraph: True if Dynamo captured the model as one graph.
        scoped: sites that a plan reaches in a scope, not by a mark.
    """

    grid: VideoGrid
    grid_source: GridSource
    layouts: Mapping[str, TokenLayout]
    evidence: Mapping[str, str]
    refused: Mapping[str, str]
    attentions: tuple[AttentionSite, ...]
    fullgraph: bool
    scoped: frozenset[str] = frozenset()


def survey_attention(denoiser: Denoiser, grid: VideoGrid | None = None) -> Survey:
    """Find the sites on the first call of a denoiser, and their layouts.

    Args:
        denoiser: the model and how to call it.
        grid: the grid of that call, for models whose arguments do not tell.

    Raises:
        NoVideoAttentionError: if there is no site; says what was found instead.
        LayoutError: if the grid cannot be established.
    """
    args, kwargs = first_call(denoiser)
    try:
        sites = find_attention(denoiser.model, args, kwargs)
    except LayoutError as error:  # no argument is a video
        raise NoVideoAttentionError(str(error)) from error
    if not sites.names:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(sites.refused.items())[:5])
        raise NoVideoAttentionError(
            f"expected 3D self-attention over video in {type(denoiser.model).__name__}, found "
            f"{found or 'no attention at all'}; nothing can be made sparse here"
        )
    inferred = infer_layout(denoiser.model, sites, args, kwargs, grid)
    for name, reason in inferred.refused.items():
        logger.warning("evdit leaves %s dense, its token layout is not certain: %s", name, reason)
    return Survey(
        grid=inferred.grid,
        grid_source=inferred.source,
        layouts=inferred.layouts,
        evidence=inferred.evidence,
        refused={**sites.refused, **inferred.refused},
        attentions=sites.attentions,
        fullgraph=sites.fullgraph,
        scoped=frozenset(sites.scoped) & set(inferred.layouts),
    )
