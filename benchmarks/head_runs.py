"""Run a model with a rule per head: what no plan can say, so sites are answered one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evdit_opt.calibrate.stage import Stage, dense_attention, sparse_attention
from evdit_opt.calibrate.steps import Steps
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule

__all__ = ["mixed_attention", "run_choice"]


def mixed_attention(
    rules: Sequence[Rule | None],
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention with a rule per head, ``[batch, heads, seq, head_dim]``; None is dense."""
    out = torch.empty_like(q)
    for rule in dict.fromkeys(rules):
        own = [head for head, each in enumerate(rules) if each == rule]
        heads = q[:, own], k[:, own], v[:, own], mask, scale
        if rule is None:
            out[:, own] = dense_attention(*heads)
        else:
            out[:, own] = sparse_attention(rule, layout, *heads, "static")
    return out


def run_choice(
    stage: Stage,
    rules: Mapping[str, Sequence[Rule | None]],
    every: int | None,
    video: str,
    prompts: Sequence[str],
    seed: int,
    steps: int,
) -> list[Tensor]:
    """Clips of whole runs; ``every``: steps from refresh to refresh; None: static."""
    calls = Steps(stage.denoiser, video)
    residuals: dict[tuple[str, int], Tensor] = {}

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Tensor:
        sparse = mixed_attention(rules[name], stage.layouts[name], q, k, v, mask, scale)
        if every is None:
            return sparse
        if calls.step % every == 0:
            dense = dense_attention(q, k, v, mask, scale)
            residuals[name, calls.branch] = dense - sparse
            return dense
        return sparse + residuals[name, calls.branch]

    clips = []
    with stage.playing(attend, calls.listen):
        for number, prompt in enumerate(prompts):
            clips.append(stage.denoiser.run(prompt, seed + number, steps))
            calls.end_run()
    return clips
