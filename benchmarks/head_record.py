"""How far every rule moves every head of a site, seen behind the site's output projection.

Heads add up there, so what two heads miss may cancel or double. All products of the errors of two
heads under two rules are kept: they give the error of every choice of one rule per head, exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evdit_opt.calibrate.parts import tile_parts
from evdit_opt.calibrate.stage import Stage
from evdit_opt.calibrate.steps import Steps
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule

__all__ = ["HeadErrors", "SiteHeads", "products", "record_heads"]

POSITIONS = 8
"""Positions of every frame whose queries are looked at, as calibration does."""

STATIC_EVERY = 2
"""Of how many steps one measures static rules, as calibration does."""


@dataclass
class HeadErrors:
    """Sums over calls. The first index says: of the output, of its change from frame to frame.

    Attributes:
        products: ``[2, steps, heads, rules, heads, rules]``, float64: inner products of errors.
        scale: ``[2, steps]``, float64: squared norms of the dense output.
    """

    products: Tensor
    scale: Tensor


def products(errors: Tensor) -> Tensor:
    """Inner products of errors, and of their changes from frame to frame.

    Args:
        errors: ``[heads, rules, batch, frames, positions, channels]``.

    Returns:
        ``[2, heads, rules, heads, rules]``, float64.
    """
    found = []
    for each in (errors, errors.diff(dim=3)):
        rows = each.flatten(0, 1).flatten(1)
        found.append((rows @ rows.T).double())
    shape = errors.shape[:2]
    return torch.stack(found).reshape(2, *shape, *shape)


class SiteHeads:
    """Sums of one site.

    Args:
        layout: of its tokens.
        rules: applied in every step.
        reused: applied between refreshes.
        every: schedules: a refresh in every so many steps, from the first step on.
        steps: of a run.
        project: weight of the output projection, ``[channels, heads * head_dim]``.
        heads: of the site.
        seed: of the choice of positions.
    """

    def __init__(
        self,
        layout: TokenLayout,
        rules: Sequence[Rule],
        reused: Sequence[Rule],
        every: Sequence[int],
        steps: int,
        project: Tensor,
        heads: int,
        seed: int,
    ) -> None:
        self.layout, self.heads = layout, heads
        random = torch.Generator().manual_seed(seed)
        self._positions = torch.randperm(layout.grid.tokens_per_frame, generator=random)[:POSITIONS]
        frames = layout.grid.frames
        kept = [rule for rule in reused if not rule.keeps_nothing]
        masks = [rule.mask(frames).bias for rule in (*rules, *kept)]
        self._bias = torch.stack([torch.zeros(frames, frames), *masks])
        self._static, self._cached = len(rules), len(reused) - len(kept)
        self._project = project.detach().unflatten(1, (heads, -1))  # [channels, heads, head_dim]
        self.static = _empty(1, heads, len(rules))
        self.reuse = {each: _empty(steps, heads, len(reused)) for each in every}
        self._run: dict[int, list[Tensor]] = {}  # residuals by guidance branch and step
        self._scales: dict[int, list[Tensor]] = {}

    def add(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, call: Steps) -> None:
        """Measure one call; see ``observe_attention.Callback``."""
        parts = tile_parts(q, k, v, self.layout, self._positions, mask, scale)
        out = torch.cat([part.combine(self._bias) for part in parts], 2)
        dense, sparse, kept = out.split([1, self._static, len(out) - 1 - self._static])
        total = self._behind(dense).sum(0)  # [1, batch, frames, positions, channels]
        norms = torch.stack([total.square().sum(), total.diff(dim=2).square().sum()]).double()
        if call.step % STATIC_EVERY == 0:
            self.static.products[:, 0] += products(self._behind(sparse - dense))
            self.static.scale[:, 0] += norms
        nothing = torch.zeros_like(dense).expand(self._cached, *dense.shape[1:])
        residuals = dense - torch.cat([nothing, kept])
        self._run.setdefault(call.branch, []).append(residuals)
        self._scales.setdefault(call.branch, []).append(norms)

    def end_run(self) -> None:
        """A run is over: what its residuals miss, by schedule and step."""
        for branch, residuals in self._run.items():
            for every, sums in self.reuse.items():
                for step, norms in enumerate(self._scales[branch]):
                    sums.scale[:, step] += norms
                    if step % every:
                        missed = residuals[step] - residuals[step - step % every]
                        sums.products[:, step] += products(self._behind(missed))
        self._run, self._scales = {}, {}

    def _behind(self, out: Tensor) -> Tensor:
        """Of every head, behind the projection: ``[heads, rules, ..., channels]``."""
        return torch.einsum("rbhfpd,chd->hrbfpc", out, self._project)


def _empty(steps: int, heads: int, rules: int) -> HeadErrors:
    shape = (2, steps, heads, rules, heads, rules)
    return HeadErrors(
        torch.zeros(shape, dtype=torch.float64), torch.zeros(2, steps, dtype=torch.float64)
    )


def record_heads(
    stage: Stage,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    video: str,
    rules: Sequence[Rule],
    reused: Sequence[Rule],
    every: Sequence[int],
) -> tuple[Mapping[str, SiteHeads], list[Tensor]]:
    """Dense runs of all prompts.

    Returns:
        Sums per site, and the clips.
    """
    model = stage.denoiser.model
    sites = {}
    for number, (name, layout) in enumerate(stage.layouts.items()):
        module: Any = model.get_submodule(name)
        weight = module.to_out[0].weight
        sites[name] = SiteHeads(
            layout, rules, reused, every, steps, weight, module.heads, seed=number
        )
    calls = Steps(stage.denoiser, video)

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> None:
        sites[name].add(q, k, v, mask, scale, calls)

    clips = []
    with stage.playing(attend, calls.listen):
        for number, prompt in enumerate(prompts):
            clips.append(stage.denoiser.run(prompt, seed + number, steps))
            for site in sites.values():
                site.end_run()
            calls.end_run()
    return sites, clips
