"""A plan as one HTML page: what it does, how good it is, and on what evidence."""

import base64
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby

from evdit_opt.calibrate.measure import Measurement
from evdit_opt.inspection.attention_share import AttentionShare
from evdit_opt.masks import Rule
from evdit_opt.page.bound import upper_bound
from evdit_opt.page.clips import Clip
from evdit_opt.page.drawings import MAX_DRAWN_FRAMES, draw_mask, draw_steps, mask_symbols
from evdit_opt.page.frontier import frontier
from evdit_opt.page.html import Html, tag
from evdit_opt.page.tiles import tile_statistics
from evdit_opt.plan import Plan, RuleEvidence, SitePlan

__all__ = ["plan_page"]

SHOWN_LEVELS = 50


def plan_page(
    plan: Plan,
    clips: Sequence[Clip] = (),
    measured: Measurement | None = None,
    share: AttentionShare | None = None,
) -> str:
    """The page.

    Every text of the plan is escaped, and a content policy forbids the page all network and every
    script but its own, so the plan may come from a stranger.

    Args:
        plan: any plan.
        clips: to be played in sync; those of one name, which stand together, side by side.
        measured: where the model's attention goes.
        share: what attention costs in a forward.
    """
    style, script = _asset("style.css"), _asset("play.js") if clips else Html("")
    title = f"{plan.model_class}, plan {plan.fingerprint()[:12]}"
    symbols, masks = mask_symbols(plan)
    policy = (
        "default-src 'none'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        symbols,
        *_header(plan),
        *_clips(clips),
        *_steps(plan),
        *_sites(plan, masks),
        *frontier(plan),
        *upper_bound(plan, share),
        *tile_statistics(measured),
        *_origin(plan),
        *([tag("script", script)] if clips else ()),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> Html:
    return Html(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(plan: Plan) -> Iterator[Html]:
    grid, quality = plan.grid, plan.quality
    reuse = f", {len(plan.reuse.sites)} reuse across steps" if plan.reuse else ""
    yield tag("h1", plan.model_class)
    yield tag(
        "p",
        f"{len(plan.rules)} of {len(plan.sites)} attention layers sparse{reuse}; "
        f"{'calibrated' if plan.calibrated_at is None else 'extrapolated to, not calibrated'} at "
        f"{grid.frames} latent frames of {grid.height} x {grid.width} tokens",
        class_="quiet",
    )
    over = "a run" if plan.reuse is not None and plan.reuse.levels else "layers"
    figures = [("attention computed", f"{plan.density:.0%}", f"of all tiles, mean over {over}")]
    if plan.reuse is not None and plan.reuse.memory is not None:
        detail = f"kept from step to step, in precision {plan.reuse.precision}"
        figures.append(("residuals", f"{plan.reuse.memory / 2**20:.4g} MiB", detail))
    for what, told in (("speed", plan.speed), ("predicted speed", plan.predicted)):
        if told is not None:
            detail = f"{told.dense_ms:.4g} to {told.optimized_ms:.4g} ms a forward, {told.device}"
            figures.append((what, f"{told.speedup:.2f}x", detail))
    if quality is not None:
        clips = f"to the dense clips, {quality.clips} held out"
        figures.append(("PSNR", f"{quality.psnr.mean:.1f} dB", clips))
        figures.append(("SSIM", f"{quality.ssim.mean:.3f}", "1 is identical"))
        if quality.flicker_ratio is not None:
            figures.append(("flicker", f"{quality.flicker_ratio.mean:.2f}x", "of the dense clips'"))
    elif plan.calibration.held_out_error is not None:
        error = f"{plan.calibration.held_out_error:.3f}"
        figures.append(("held-out error", error, "relative, of the output"))
    cards = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", detail)))
        for name, value, detail in figures
    ]
    yield tag("dl", *cards, class_="figures")


def _clips(clips: Sequence[Clip]) -> Iterator[Html]:
    if not clips:
        return
    yield tag("h2", "Clips")
    place = tag(
        "input", id="place", type="range", min=0, max=1, step="any", value=0, aria_label="position"
    )
    yield tag("div", tag("button", "Play", id="play", type="button"), place, class_="player")
    for name, group in groupby(clips, key=lambda clip: clip.name):
        videos = [
            tag(
                "figure",
                tag("video", src=c.data, muted=True, playsinline=True, loop=True, preload="auto"),
                tag("figcaption", c.variant or c.name),
            )
            for c in group
        ]
        yield tag("p", name, class_="quiet")
        yield tag("div", *videos, class_="clips")


def _steps(plan: Plan) -> Iterator[Html]:
    reuse = plan.reuse
    if reuse is None:
        return
    yield tag("h2", "Steps")
    if not reuse.levels:
        shown = ", ".join(f"{level:.5g}" for level in reuse.refresh_at[:SHOWN_LEVELS])
        more = len(reuse.refresh_at) - SHOWN_LEVELS
        text = f"Residuals are renewed at noise levels {shown}" + (f", {more} more" * (more > 0))
        yield tag("p", text + "; the steps of the run are not known.")
        return
    modes = reuse.modes(reuse.levels)
    words = {
        "dense": "dense",
        "refresh": "dense, and what masks drop is kept",
        "reuse": "masks, and what was kept goes on"
        if reuse.trend
        else "masks, and what was kept is added",
    }
    legend = [
        tag("span", tag("i", class_=mode), f"{modes.count(mode)} {text}")
        for mode, text in words.items()
        if mode in modes
    ]
    yield tag(
        "p", f"{len(modes)} denoising steps, from noise to video; the layers that reuse compute"
    )
    yield draw_steps(modes, reuse.levels)
    yield tag("p", *legend, class_="legend quiet")


def _sites(plan: Plan, masks: Mapping[Rule | None, str]) -> Iterator[Html]:
    frames = plan.grid.frames
    yield tag("h2", "Layers")
    drawn = f", drawn at {MAX_DRAWN_FRAMES} of {frames}" if frames > MAX_DRAWN_FRAMES else ""
    between = " between refreshes" if plan.reuse else ""
    yield tag(
        "p",
        f"Masks: query frame (down) by key frame (across){drawn}; coloured tiles are computed"
        f"{between}, darker ones count more than once. Errors are relative, of the layer's "
        "attention output where it is not dense, and of a mask's change from frame to frame.",
        class_="quiet",
    )
    columns = ("mask", "layer", "rule", "share kept", "error", "frame to frame", "reuse", "why")
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    rows = [_site(plan, site, masks) for site in plan.sites]
    yield tag("table", head, tag("tbody", *rows), class_="sites")


def _site(plan: Plan, site: SitePlan, masks: Mapping[Rule | None, str]) -> Html:
    rule = site.describe(plan.grid.frames)
    found = next((one for one in site.errors if site.rule and one.rule == rule), None)
    reuses = plan.reuse is not None and site.name in plan.reuse.sites
    error = site.error if site.error is not None or not found else found.output
    rules = [site.rule] if site.second is None else [site.rule, site.second.rule]
    pictures = [
        draw_mask(masks[own], rule) if own in masks else "too many to draw" for own in rules
    ]
    why: list[str] = [site.reason]
    if site.errors:
        why.append(_evidence(site.errors, {own.describe(plan.grid.frames) for own in rules if own}))
    cells = (
        ("rule", rule),
        ("share kept", f"{site.density:.1%}"),
        ("error", "-" if error is None else f"{error:.3f}"),
        ("frame to frame", f"{found.temporal:.3f}" if found else "-"),
        ("reuse", "yes" if reuses else "no"),
    )
    return tag(
        "tr",
        tag("td", *pictures),
        tag("td", tag("strong", site.name)),
        *(tag("td", value, data_label=label) for label, value in cells),
        tag("td", *why, data_label="why"),
    )


def _evidence(errors: Sequence[RuleEvidence], chosen: Collection[str]) -> Html:
    head = ("rule", "share kept", "error", "frame to frame")
    rows = [
        tag(
            "tr",
            tag("td", tag("strong", e.rule) if e.rule in chosen else e.rule),
            tag("td", f"{e.density:.1%}"),
            tag("td", f"{e.output:.3f}"),
            tag("td", f"{e.temporal:.3f}"),
        )
        for e in errors
    ]
    table = tag("table", tag("tr", *(tag("th", text) for text in head)), *rows)
    return tag(
        "details",
        tag("summary", f"{len(errors)} candidates"),
        tag("div", table, class_="wide"),
    )


def _origin(plan: Plan) -> Iterator[Html]:
    made = plan.calibration
    facts = [
        ("plan", plan.fingerprint()),
        ("calibration", f"{made.prompt_count} prompts, {made.steps} steps, seed {made.seed}"),
        *([("called with", made.describe_call())] if made.call else []),
        ("threshold", f"{made.threshold:.4g}"),
        ("prompts", made.prompts_hash),
        ("model configuration", plan.model_config_hash),
    ]
    if plan.calibrated_at is not None:
        origin = plan.calibrated_at
        size = f"{origin.frames} x {origin.height} x {origin.width} tokens"
        facts.insert(1, ("extrapolated", f"masks and densities are of another grid than {size}"))
    yield tag("h2", "Where it comes from")
    yield _facts(facts)
    speeds = (("measured on", plan.speed), ("predicted on", plan.predicted))
    devices = [(what, speed.device) for what, speed in speeds if speed is not None]
    if plan.versions or devices:
        yield tag("h2", "Environment")
        yield _facts([*devices, *plan.versions])


def _facts(facts: Sequence[tuple[str, str]]) -> Html:
    return tag("table", *(tag("tr", tag("th", name), tag("td", value)) for name, value in facts))
