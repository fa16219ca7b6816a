"""How much an error at one site moves the model's output: one probe per site.

Equal relative errors at two layers do unequal damage. A probe runs one forward in which a single
site sees its own frame only, and compares the outputs; no derivative, no second model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evdit_opt.calibrate.stage import Stage, dense_attention, sparse_attention
from evdit_opt.masks import Rule
from evdit_opt.models import output_tensor

__all__ = ["probe_gains"]

PROBE = Rule(references=0, window=0)


def probe_gains(
    stage: Stage, calls: Sequence[Mapping[str, Any]], impl: str = "static"
) -> Mapping[str, float]:
    """Squared relative change of the model's output per squared relative error of a site's.

    Args:
        stage: the model.
        calls: arguments by name, to probe with.
        impl: implementation of tile attention.

    Returns:
        The mean over calls, per site.
    """
    model = stage.denoiser.model
    sums = dict.fromkeys(stage.layouts, 0.0)
    for call in calls:
        with torch.no_grad():
            dense = output_tensor(model(**call)).clone()
        for site in stage.layouts:
            error = 0.0

            def attend(
                name: str,
                q: Tensor,
                k: Tensor,
                v: Tensor,
                mask: Tensor | None,
                scale: float | None,
                probed: str = site,
            ) -> Tensor | None:
                nonlocal error
                if name != probed:
                    return None
                sparse = sparse_attention(PROBE, stage.layouts[name], q, k, v, mask, scale, impl)
                error = _relative(sparse, dense_attention(q, k, v, mask, scale))
                return sparse

            with torch.no_grad(), stage.playing(attend, lambda _: None):
                moved = output_tensor(model(**call))
            if error > 0.0:
                sums[site] += _relative(moved, dense) / error / len(calls)
    return sums


def _relative(candidate: Tensor, reference: Tensor) -> float:
    candidate, reference = candidate.float(), reference.float()
    return float((candidate - reference).square().sum() / reference.square().sum().clamp_min(1e-30))
