"""``evdit demo``: the whole job on TinyWan, with its numbers and its shortfalls."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from evdit_opt import apply_plan, make_plan
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.detect import CaptionAccuracy, caption_accuracy
from evdit_opt.demo.render import write_masks, write_side_by_side
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.masks import Rule
from evdit_opt.models import as_denoiser
from evdit_opt.passes.capture import watched
from evdit_opt.passes.observe_attention import observe
from evdit_opt.plan import Plan, SpeedRecord
from evdit_opt.progress import track
from evdit_opt.quality import compare
from evdit_opt.timing import interleaved_ms
from evdit_opt.versions import installed_versions

__all__ = ["DEMO_CONFIG", "make_report", "paper_plan", "run_demo"]

CALIBRATION_PROMPTS = tuple(label.caption() for label in TRAINED[:: len(TRAINED) // 3][:3])
DEMO_CONFIG = Config(
    density=0.2734,  # what 2 of 17 reference frames keep: the paper's mask then has the same
    references=(1, 2, 3, 4, 6),
    windows=(0,),  # many short calls: at 100 tokens a frame a window costs more than it keeps
    verify_prompts=1,
    calib_steps=20,
    pipe_kwargs=TINYWAN_CALL,
)
TIMED_RUNS = 5
SHOWN = 6
"""Clips in the side-by-side video."""

BARS = {
    "step_speedup": "a transformer step, mean over a run, at least 1.4x faster than dense",
    "ideal": "at least 0.9 of the speedup that density and attention share allow",
    "flicker": "flicker at most 1.5x dense",
    "accuracy": "caption accuracy within 5 points of dense",
    "psnr": "PSNR to the dense clips above the paper's uniform mask of no lower density",
}


def run_demo(
    folder: Path, *, clips: int, steps: int, seed: int, console: Console
) -> dict[str, Any]:
    """Calibrate, optimize and run TinyWan; write videos, pictures, plan and ``report.json``.

    Args:
        folder: where the files go; made if missing.
        clips: held-out clips per variant.
        steps: denoising steps per clip.
        seed: noise seed of the first clip.
        console: where the story is told.

    Returns:
        The content of ``report.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _quieten()
    optimized, dense, uniform = load_tinywan(), load_tinywan(), load_tinywan()

    plan = make_plan(optimized, CALIBRATION_PROMPTS, DEMO_CONFIG)
    plan.save(folder / "plan.evdit.json")
    console.print(_layer_table(plan))
    write_masks(folder / "masks.png", plan)

    paper = paper_plan(plan)
    dense.transformer.compile(dynamic=False)
    apply_plan(optimized.transformer, plan)
    apply_plan(uniform.transformer, paper, inner="eager")
    speed = measure_run(optimized, dense, plan, steps)
    record = SpeedRecord(
        dense_ms=speed["dense"],
        optimized_ms=speed["optimized"],
        device=f"CPU, {torch.get_num_threads()} threads",
    )
    plan = replace(plan, speed=record)
    plan.save(folder / "plan.evdit.json")

    labels = [HELD_OUT[n % len(HELD_OUT)] for n in range(clips)]
    prompts = [label.caption() for label in labels]
    videos = {
        name: _generate(pipe, prompts, steps, seed, f"{name} clips")
        for name, pipe in (("dense", dense), ("optimized", optimized), ("uniform", uniform))
    }
    report = make_report(plan, paper, speed, videos, prompts, steps, seed)
    rows = {
        "dense": videos["dense"][:SHOWN],
        f"evdit, density {plan.density:.2f}": videos["optimized"][:SHOWN],
        f"paper's mask, density {paper.density:.2f}": videos["uniform"][:SHOWN],
    }
    write_side_by_side(folder, rows, prompts[:SHOWN])
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _tell(report, folder, console)
    return report


def paper_plan(plan: Plan) -> Plan:
    """The paper's uniform mask, unweighted, at the lowest density that is not below the plan's."""
    frames = plan.grid.frames
    rules = [Rule(references) for references in range(1, frames + 1)]
    rule = next(rule for rule in rules if rule.mask(frames).density >= plan.density - 1e-9)
    density = rule.mask(frames).density
    sites = tuple(
        replace(s, rule=rule, density=density, reason="uniform", errors=()) for s in plan.sites
    )
    return replace(plan, sites=sites, reuse=None, quality=None)


def measure_run(optimized: Any, dense: Any, plan: Plan, steps: int) -> dict[str, float]:
    """Time the transformer over a whole denoising run, dense and optimized, compiled alike.

    Every forward of one run is kept and replayed, so that steps that refresh and steps that reuse
    count as often as they occur.

    Returns:
        Median milliseconds ``dense`` and ``optimized``, mean over the forwards of a run, and
        ``attention`` (the SDPA calls of all sites on the q, k, v they really get, dense), all
        from interleaved runs.
    """
    denoiser = as_denoiser(load_tinywan(), [CALIBRATION_PROMPTS[0]], TINYWAN_CALL)
    calls: list[dict[str, Any]] = []
    with watched(denoiser.model, calls.append):
        denoiser.run(CALIBRATION_PROMPTS[0], 0, steps)
    attention: list[Callable[[], object]] = []

    def keep(
        _name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        _attn_mask: torch.Tensor | None,
        _scale: float | None,
    ) -> None:
        attention.append(lambda: F.scaled_dot_product_attention(q, k, v))

    with torch.no_grad():
        with observe(denoiser.model, tuple(site.name for site in plan.sites), keep):
            denoiser.model(**calls[0])
        found = interleaved_ms(
            {
                "dense": lambda: [dense.transformer(**call) for call in calls],
                "optimized": lambda: [optimized.transformer(**call) for call in calls],
                "attention": lambda: [call() for _ in calls for call in attention],
            },
            rounds=TIMED_RUNS,
            warmup=1,
        )
    return {name: milliseconds / len(calls) for name, milliseconds in found.items()}


def _quieten() -> None:
    """No loading bars and notes of libraries between the lines of the story."""
    for chatty in ("torchao", "torch.utils._pytree"):  # on import, about what nobody asked for
        logging.getLogger(chatty).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _generate(
    pipe: Any, prompts: Sequence[str], steps: int, seed: int, what: str
) -> list[np.ndarray]:
    run = as_denoiser(pipe, prompts, TINYWAN_CALL).run
    return [
        run(prompt, seed + n, steps).numpy()
        for n, prompt in enumerate(track(prompts, what, shown=True))
    ]


def make_report(
    plan: Plan,
    paper: Plan,
    speed: dict[str, float],
    videos: dict[str, list[np.ndarray]],
    prompts: Sequence[str],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """The content of ``report.json``.

    Args:
        plan: what was applied.
        paper: the uniform baseline.
        speed: as :func:`measure_run` returns it.
        videos: clips per variant, "dense", "optimized" and "uniform", one per prompt.
        prompts: what the clips were asked to show.
        steps: denoising steps of a clip.
        seed: seed of the first clip.
    """
    quality = compare(videos["optimized"], videos["dense"])
    baseline = compare(videos["uniform"], videos["dense"])
    accuracy = {name: caption_accuracy(clips, prompts) for name, clips in videos.items()}
    share = speed["attention"] / speed["dense"]
    speedup = speed["dense"] / speed["optimized"]
    ideal = 1.0 / (1.0 - share * (1.0 - plan.density))
    flicker = quality.flicker_ratio.mean if quality.flicker_ratio else None
    report: dict[str, Any] = {
        "density": plan.density,
        "attention_share": share,
        "step_ms_dense": speed["dense"],
        "step_ms_optimized": speed["optimized"],
        "step_speedup": speedup,
        "ideal_step_speedup": ideal,
        "psnr_db": quality.psnr.mean,
        "psnr_db_stderr": quality.psnr.stderr,
        "ssim": quality.ssim.mean,
        "flicker_ratio": flicker,
        "motion_consistency": quality.motion_consistency.mean,
        "caption_accuracy_dense": _words_right(accuracy["dense"]),
        "caption_accuracy_optimized": _words_right(accuracy["optimized"]),
        "caption_accuracy_by_word": {
            name: {word: getattr(found, word) for word in ("shape", "colour", "direction")}
            for name, found in accuracy.items()
        },
        "paper_uniform": {
            "density": paper.density,
            "mask": next(iter(paper.rules.values())).describe(paper.grid.frames),
            "psnr_db": baseline.psnr.mean,
            "ssim": baseline.ssim.mean,
            "flicker_ratio": baseline.flicker_ratio.mean if baseline.flicker_ratio else None,
            "caption_accuracy": _words_right(accuracy["uniform"]),
        },
        "clips": len(prompts),
        "steps": steps,
        "seed": seed,
        "guidance_scale": TINYWAN_CALL["guidance_scale"],
        "threads": torch.get_num_threads(),
        "refreshes": 0
        if plan.reuse is None
        else plan.reuse.modes(plan.reuse.levels).count("refresh"),
        "rules": {s.name: s.describe(plan.grid.frames) for s in plan.sites},
        "versions": installed_versions(),
    }
    report["missed"] = [BARS[name] for name, met in _bars(report).items() if not met]
    return report


def _bars(report: dict[str, Any]) -> dict[str, bool]:
    lost = report["caption_accuracy_dense"] - report["caption_accuracy_optimized"]
    return {
        "step_speedup": report["step_speedup"] >= 1.4,
        "ideal": report["step_speedup"] >= 0.9 * report["ideal_step_speedup"],
        "flicker": report["flicker_ratio"] is not None and report["flicker_ratio"] <= 1.5,
        "accuracy": lost <= 0.05,
        "psnr": report["psnr_db"] > report["paper_uniform"]["psnr_db"],
    }


def _refreshes(plan: Plan) -> int:
    """Steps of the calibrated run that compute dense attention and renew residuals."""
    return 0 if plan.reuse is None else plan.reuse.modes(plan.reuse.levels).count("refresh")


def _words_right(accuracy: CaptionAccuracy) -> float:
    """Share of the captions' three words (shape, colour, direction) that the clips show."""
    return (accuracy.shape + accuracy.colour + accuracy.direction) / 3


def _layer_table(plan: Plan) -> Table:
    table = Table(
        title=f"TinyWan, {plan.grid.frames} latent frames x {plan.grid.tokens_per_frame} tokens"
    )
    for column in ("layer", "mask", "density", "error", "frame to frame"):
        table.add_column(column, justify="left" if column in ("layer", "mask") else "right")
    for site in plan.sites:
        rule = site.describe(plan.grid.frames)
        found = next((e for e in site.errors if site.rule and e.rule == rule), None)
        error = "-" if site.error is None else f"{site.error:.3f}"
        temporal = f"{found.temporal:.3f}" if found else "-"
        table.add_row(site.name, rule, f"{site.density:.3f}", error, temporal)
    return table


def _tell(report: dict[str, Any], folder: Path, console: Console) -> None:
    table = Table(
        title=f"{report['clips']} held-out clips, {report['steps']} steps", show_header=False
    )
    for name, value in report.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}")
    console.print(table)
    for shortfall in report["missed"]:
        console.print(f"[bold yellow]missed:[/] {shortfall}")
    console.print(
        f"TinyWan's {len(report['rules'])} attention layers compute {report['density']:.0%} of "
        f"their tiles, mean over a run: a transformer step is {report['step_speedup']:.2f}x "
        f"faster, PSNR to the dense clips {report['psnr_db']:.1f} dB "
        f"(see {folder / 'side_by_side.gif'})."
    )
    console.print(
        "Next: evdit_opt.optimize(pipe, prompts) on your own diffusers pipeline; "
        "`evdit inspect MODEL` lists what it would find."
    )
