"""Run the dense model on calibration items and measure every candidate on what each site sees."""

from collections.abc import Collection, Mapping, Sequence

import torch

from evdit_opt.calibrate.candidates import candidate_rules
from evdit_opt.calibrate.error import CandidateError, SiteErrors
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.grid import TokenLayout
from evdit_opt.models import Denoiser, Item, require_finite
from evdit_opt.passes.observe_attention import observe
from evdit_opt.progress import track

__all__ = ["record_errors"]


def record_errors(
    denoiser: Denoiser,
    layouts: Mapping[str, TokenLayout],
    items: Sequence[Item],
    config: Config,
    scoped: Collection[str] = (),
) -> tuple[dict[str, tuple[CandidateError, ...]], list[torch.Tensor]]:
    """Dense runs of all items, with every ``config.record_every``-th forward measured.

    Args:
        denoiser: the model and how to run it.
        layouts: token layout per site, in model order.
        items: prompts or calls to run; the seed of item n is ``config.seed + n``.
        config: candidates, steps, seed.
        scoped: the sites of ``layouts`` that are reached in a scope.

    Returns:
        Candidate errors per site, and what each dense run returned (see ``Denoiser.run``).

    Raises:
        NonFiniteOutputError: on NaN or infinity in an attention input or a result.
        CalibrationError: if a site was never reached.
    """
    sites = {
        name: SiteErrors(
            layout, candidate_rules(config, layout.grid.frames), config.repeatable_impl
        )
        for name, layout in layouts.items()
    }
    seen = dict.fromkeys(sites, 0)

    def measure(
        name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        if seen[name] % config.record_every == 0:
            for tensor, what in ((q, "queries"), (k, "keys"), (v, "values")):
                require_finite(tensor, f"the {what} at {name}")
            sites[name].add(q, k, v, attn_mask, scale)
        seen[name] += 1

    results = []
    with observe(denoiser.model, tuple(sites), measure, scoped=scoped):
        for index, item in enumerate(track(items, "calibrating", config.progress)):
            results.append(denoiser.run(item, config.seed + index, config.calib_steps))
    unseen = [name for name, site in sites.items() if site.calls == 0]
    if unseen:
        raise CalibrationError(
            f"expected every site to run during calibration, these never did: {', '.join(unseen)}"
        )
    return {name: site.result() for name, site in sites.items()}, results
