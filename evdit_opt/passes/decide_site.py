"""Whether the attention of a site is sparse in one forward, and with what layout."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from evdit_opt.errors import LayoutError, PlanMismatchError
from evdit_opt.masks import Rule, TileMask
from evdit_opt.passes.check_attention import unsupported
from evdit_opt.passes.graph import Attention, value_of
from evdit_opt.passes.site_mark import SiteSpec, Way
from evdit_opt.second_rule import SecondRule

__all__ = ["Decision", "SiteOutcome", "decide", "text_around"]

Size = int | torch.SymInt


@dataclass(frozen=True)
class SiteOutcome:
    """What became of a site in one compiled graph.

    Attributes:
        name: module path of the site.
        rule: the rule asked for; None: the plan leaves the site dense.
        density: kept / all tiles; 1 if it stayed dense.
        reason: why it stayed dense; empty if it was rewritten.
        way: how the attention was reached.
        spec: what the plan wants there, encoded; layers that share a compiled graph share it.
        second: the rule asked for at some of its heads.
    """

    name: str
    rule: Rule | None
    density: float
    reason: str = ""
    way: Way = "mark"
    spec: str = ""
    second: SecondRule | None = None


@dataclass(frozen=True)
class Decision:
    """For an attention and a rule.

    Attributes:
        mask: the rule's mask for the frames of this forward; None if the rule keeps nothing.
        reason: why the attention stays dense; empty if it is to be sparse.
        second: the mask of some heads; None if all have the same one. One of the two masks may keep
            everything.
    """

    mask: TileMask | None
    reason: str
    second: TileMask | None = None

    def outcome(self, name: str, spec: SiteSpec, way: Way) -> SiteOutcome:
        """The decision as an entry of a report."""
        kept = 0.0 if self.mask is None else self.mask.density
        if self.second is not None and spec.second is not None:
            kept += spec.second.share * (self.second.density - kept)
        density = 1.0 if self.reason else kept
        return SiteOutcome(name, spec.rule, density, self.reason, way, spec.encode(), spec.second)


def decide(
    attention: Attention, spec: SiteSpec, frames: int, tokens: Size, name: str, mode: str = "sparse"
) -> Decision:
    """Decide about one attention call.

    Args:
        attention: its arguments, nodes of a graph or tensors.
        spec: what the plan wants at the site.
        frames: latent frames of this forward.
        tokens: tokens of a frame in this forward.
        name: the site, for messages.
        mode: what the site does in this step, one of ``marks.MODES``.

    Raises:
        PlanMismatchError: if the operator cannot compute this attention.
    """
    problem = unsupported(attention)
    if problem:
        raise PlanMismatchError(
            f"expected at {name} an attention that can be made sparse, got {problem}; set this "
            "site's rule to null in the plan to leave it dense"
        )
    if frames == 0:
        raise PlanMismatchError(
            f"expected the model of {name} to run, which says how many frames there are, got a "
            "call of a part; call the whole model"
        )
    _require_heads(attention, spec, name)
    mask = _mask(spec.rule, frames)
    second = None if spec.second is None else _mask(spec.second.rule, frames)
    if second == mask:
        second = None
    reason = _too_short(attention, frames, tokens, spec.min_tokens)
    if mask is None and mode == "sparse":
        raise PlanMismatchError(
            f"expected {name}, whose rule keeps nothing, to reuse its output, got a call without "
            "reuse; apply the plan with evdit_opt.apply_plan"
        )
    if mask is not None and mask.is_dense and second is None:
        reason = f"rule {spec.rule.describe()} keeps every tile of {frames} frames"
    if mode == "dense":
        reason = "this noise level is dense in the plan"
    return Decision(mask, reason, second)


def _require_heads(attention: Attention, spec: SiteSpec, name: str) -> None:
    if spec.second is None:
        return
    heads, keys = (value_of(x).shape[1] for x in (attention.q, attention.k))
    if heads != spec.second.total or keys != heads:
        raise PlanMismatchError(
            f"expected at {name} {spec.second.total} heads with keys of their own, which the plan "
            f"gives two rules, got {int(heads)} heads with {int(keys)} of keys; load the plan of "
            "this model, or take the site's second rule out of it"
        )


@functools.lru_cache(maxsize=256)
def _mask(rule: Rule, frames: int) -> TileMask | None:
    return None if rule.keeps_nothing else rule.mask(frames)


def _too_short(attention: Attention, frames: int, tokens: Size, min_tokens: int) -> str:
    length = value_of(attention.q).shape[2]
    if isinstance(length, torch.SymInt) and not length.node.has_hint():
        length = frames * tokens  # text of a length known only at run time is not counted
    if length < min_tokens:
        return f"{int(length)} tokens, the plan is for at least {min_tokens}"
    return ""


def text_around(
    length: Any, frames: int, tokens: Size, spec: SiteSpec, name: str
) -> tuple[Size, Size]:
    """Text tokens before and after the video of a forward that is no graph.

    What is longer than the video is text, and lies where it lay in calibration. In a graph,
    ``passes.text_tokens`` sees more.

    Raises:
        LayoutError: if the sequence does not fit the grid and the text of the plan.
    """
    text = length - frames * tokens
    calibrated = (
        f"a video of {frames} x {tokens} tokens after {spec.prefix} and before "
        f"{spec.suffix} text tokens, as in calibration"
    )
    got = f"expected at {name} {calibrated}, got a sequence of {length}; calibrate for such calls"
    if not spec.prefix and not spec.suffix:
        if text != 0:
            raise LayoutError(got)
        return 0, 0
    if spec.prefix and spec.suffix:
        if text != spec.prefix + spec.suffix:
            raise LayoutError(got)
        return spec.prefix, spec.suffix
    if not isinstance(text, torch.SymInt) and text < 0:
        raise LayoutError(got)
    return (text, 0) if spec.prefix else (0, text)
