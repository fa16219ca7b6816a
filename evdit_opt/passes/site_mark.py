"""The mark of a site: an operator that says, within a graph, what a plan wants there.

A mark exists in graphs only. The passes that read it always take it out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.second_rule import SecondRule

__all__ = [
    "MARK",
    "MARKS",
    "MARK_QKV",
    "MODES",
    "MarkFacts",
    "SiteSpec",
    "Way",
    "facts_of",
    "mark_op",
    "mark_qkv_op",
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
        second: the rule of some heads, where they do not all take ``rule``.
    """

    rule: Rule
    prefix: int = 0
    suffix: int = 0
    min_tokens: int = 0
    second: SecondRule | None = None

    def encode(self) -> str:
        """The string; integers would turn symbolic once two layers sharing a graph differ."""
        parts = (*_parts(self.rule), self.prefix, self.suffix, self.min_tokens)
        if self.second is not None:
            heads = ",".join(map(str, self.second.heads))
            parts = (*parts, *_parts(self.second.rule), self.second.total, heads)
        return " ".join(map(str, parts))

    @classmethod
    def decode(cls, text: str) -> "SiteSpec":
        """Inverse of :meth:`encode`."""
        parts = text.split(" ")
        prefix, suffix, min_tokens = map(int, parts[5:8])
        second = None
        if len(parts) > 8:
            heads = tuple(map(int, parts[14].split(",")))
            second = SecondRule(rule=_rule(parts[8:13]), heads=heads, total=int(parts[13]))
        return cls(_rule(parts[:5]), prefix, suffix, min_tokens, second)


def _parts(rule: Rule) -> tuple[object, ...]:
    return rule.references, rule.window, rule.weighting, rule.spacing, rule.strength


def _rule(parts: Sequence[str]) -> Rule:
    references, window, weighting, spacing, strength = parts
    return Rule(
        int(references),
        int(window),
        weighting,  # type: ignore[arg-type]  # Rule itself refuses what is none
        spacing,  # type: ignore[arg-type]
        float(strength),
    )


FACTS = (
    "str spec, SymInt frames, SymInt tokens_per_frame, Tensor? index, str mode, Tensor? residual, "
    "Tensor? residual_scale, Tensor? rows, Tensor? drift"
)
LEFT_OVER = (
    "expected the evdit backend to compile this graph, another backend did: a site mark was left "
    "in it. Do not call compile() or compile_repeated_blocks() on an optimized model, apply_plan "
    "compiles it: restore(model), then apply_plan(model, plan) make it right again. Export it with "
    "evdit_opt.export.export_program, not with torch.export"
)


@torch.library.custom_op(
    "evdit::mark",
    mutates_args=(),
    schema=f"(Tensor x, {FACTS}) -> Tensor",
)
def mark_op(
    x: Tensor,
    spec: str,
    frames: int,
    tokens_per_frame: int,
    index: Tensor | None,
    mode: str,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    rows: Tensor | None,
    drift: Tensor | None,
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
        residual_scale: where the residual has 8 bits; see ``kernels.residual``.
        rows: ``[rows]``, which queries to compare with dense attention, as shares of the video;
            None in all calls but those that a guard checks (see ``guard``).
        drift: ``[2]``, float32: the result of that is written here; see ``kernels.row_error``.
    """
    raise PlanMismatchError(LEFT_OVER)


@mark_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "evdit::mark_qkv",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {FACTS}) -> (Tensor, Tensor, Tensor)",
)
def mark_qkv_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    frames: int,
    tokens_per_frame: int,
    index: Tensor | None,
    mode: str,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    rows: Tensor | None,
    drift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`mark_op`, put right before an attention by the scope of its site."""
    raise PlanMismatchError(LEFT_OVER)


@mark_qkv_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


MARK = torch.ops.evdit.mark.default
MARK_QKV = torch.ops.evdit.mark_qkv.default
MARKS = (MARK, MARK_QKV)

Way = Literal["mark", "scope"]
"""How a plan reaches a site's attention: by a mark in its graph, or in a scope of its own."""


class MarkFacts(NamedTuple):
    """What a mark says, whatever it marks: its last arguments, numbers or nodes."""

    spec: str
    frames: Any
    tokens_per_frame: Any
    index: Any
    mode: str
    residual: Any
    residual_scale: Any
    rows: Any
    drift: Any


def facts_of(mark: fx.Node) -> MarkFacts:
    """The facts of a mark in a graph."""
    facts: Any = mark.args[-len(MarkFacts._fields) :]
    return MarkFacts(*facts)


MODES = ("sparse", "dense", "refresh", "reuse")
"""What a site does in a step: its mask; dense attention; dense attention, keeping what the mask
would have dropped (the residual); its mask plus the residual."""


def remove_mark(mark: fx.Node) -> None:
    """Let what it marked take the place of a mark in its graph."""
    marked: Any = mark.args[: -len(MarkFacts._fields)]
    if mark.target is MARK:
        mark.replace_all_uses_with(marked[0])
    for part in list(mark.users):  # q, k or v of the three
        part.replace_all_uses_with(marked[part.args[1]])
        mark.graph.erase_node(part)
    mark.graph.erase_node(mark)
