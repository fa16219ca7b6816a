"""One traced model for everything calibration does: record it dense, then try out plans on it.

Sites call back instead of computing (see ``observe``), so a plan is tried by answering with its
outputs. Nothing is compiled again for another plan; the numbers are those of the compiled plan up
to rounding.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evdit_opt.calibrate.kept import Kept
from evdit_opt.generations import Generation, Generations
from evdit_opt.grid import TokenLayout
from evdit_opt.kernels import tile_attention
from evdit_opt.kernels.residual import PRECISIONS, pack
from evdit_opt.masks import Rule
from evdit_opt.models import Denoiser, Item
from evdit_opt.passes.capture import watched
from evdit_opt.passes.graph import Attention
from evdit_opt.passes.head_groups import attend_in_groups
from evdit_opt.passes.observe_attention import Callback, observe
from evdit_opt.plan import Plan, SecondRule

__all__ = ["Rehearsal", "Stage", "dense_attention", "sparse_attention", "staged"]


def _dense(*_: Any) -> None:
    return None


@dataclass
class Stage:
    """A model whose sites call back.

    Attributes:
        denoiser: the model and how to run it.
        layouts: token layout per site.
        attend: what every attention of a site calls; see ``observe_attention.Callback``.
        begin: gets the arguments of every call of the model, by name, before it runs.
        kept: for those who rehearse: where finished runs are.
    """

    denoiser: Denoiser
    layouts: Mapping[str, TokenLayout]
    attend: Callback = _dense
    begin: Callable[[dict[str, Any]], None] = _dense
    kept: Kept = field(default_factory=Kept)

    @contextmanager
    def playing(self, attend: Callback, begin: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Let sites and calls go to ``attend`` and ``begin``; dense again afterwards."""
        self.attend, self.begin = attend, begin
        try:
            yield
        finally:
            self.attend, self.begin = _dense, _dense

    def rehearse(
        self, plan: Plan, items: Sequence[Item], seed: int, steps: int, impl: str = "static"
    ) -> list[Tensor]:
        """Run items under a plan.

        Args:
            plan: of this model, at the grid of these runs.
            items: what to run; item n with noise seed ``seed + n``.
            seed: of the first.
            steps: denoising steps.
            impl: implementation of tile attention.

        Returns:
            What each run returned; see ``Denoiser.run``.
        """
        rehearsal = Rehearsal(plan, self.layouts, impl)
        with self.playing(rehearsal.attend, rehearsal.begin):
            return [self.denoiser.run(item, seed + n, steps) for n, item in enumerate(items)]


@contextmanager
def staged(
    denoiser: Denoiser,
    layouts: Mapping[str, TokenLayout],
    scoped: Collection[str] = (),
    kept: Kept | None = None,
) -> Iterator[Stage]:
    """Put a model on stage.

    Args:
        denoiser: the model and how to run it.
        layouts: token layout per site, in model order.
        scoped: those sites that are reached in a scope.
        kept: where finished runs under a plan are; None: nowhere.
    """
    stage = Stage(denoiser, layouts, kept=kept or Kept())
    with (
        observe(denoiser.model, tuple(layouts), lambda *a: stage.attend(*a), scoped=scoped),
        watched(denoiser.model, lambda arguments: stage.begin(arguments)),
    ):
        yield stage


class Rehearsal:
    """Answers with the outputs that a plan would compute."""

    def __init__(self, plan: Plan, layouts: Mapping[str, TokenLayout], impl: str) -> None:
        self._rules, self._second = plan.rules, plan.second_rules
        self._layouts, self._impl, self._min_tokens = layouts, impl, plan.min_tokens
        self._reusing = frozenset() if plan.reuse is None else frozenset(plan.reuse.sites)
        self._generations, self._precision = None, PRECISIONS[0]
        if plan.reuse is not None:
            video, self._precision = plan.grid_source.input, plan.reuse.precision
            self._generations = Generations(video, plan.reuse.timestep, plan.reuse)
        self._now: Generation | None = None

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """A call of the model begins."""
        if self._generations is not None:
            if self._now is not None:
                self._now.end_step(finished=True)
            self._now = self._generations.begin(arguments)

    def attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """The output of a site; None: dense."""
        rule, layout = self._rules.get(name), self._layouts[name]
        mode = "sparse" if self._now is None else self._now.mode
        if rule is None or mode == "dense" or layout.seq_len < self._min_tokens:
            return None
        if name in self._second:
            attention = Attention(q, k, v, mask, scale=scale)
            return self._in_groups(rule, self._second[name], layout, attention)
        sparse = sparse_attention(rule, layout, q, k, v, mask, scale, self._impl)
        if name not in self._reusing or self._now is None:
            return sparse
        if mode == "refresh":
            dense = dense_attention(q, k, v, mask, scale)
            self._now.residuals[name] = pack(dense - sparse, self._precision)
            return dense
        return sparse + self._now.residuals[name].unpack(sparse.dtype)

    def _in_groups(
        self, rule: Rule, second: SecondRule, layout: TokenLayout, attention: Attention
    ) -> Tensor:
        """The output of a site with two rules."""

        def attend(own: Attention, group: bool) -> Tensor:
            chosen, (q, k, v, mask) = (rule, second.rule)[group], own[:4]
            return sparse_attention(chosen, layout, q, k, v, mask, own.scale, self._impl)

        found: Tensor = attend_in_groups(attention, second.heads, attend)
        return found


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention as the model computes it."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)


def sparse_attention(
    rule: Rule,
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    impl: str,
) -> Tensor:
    """Attention under a rule; zeros if it keeps nothing."""
    if rule.keeps_nothing:
        return torch.zeros_like(q)
    tiles = rule.mask(layout.grid.frames)
    return tile_attention(q, k, v, tiles, layout, scale=scale, attn_mask=mask, impl=impl)
