"""TinyWan in a few single calls, dense and sparse, against its 50 guided steps, on unseen noise.

    python -m evdit_opt.demo.evaluate --pairs 64 --steps 50       # the teacher's clips
    python -m benchmarks.tinywan_students --teacher runs/tinywan/evaluation/FOLDER
    python -m benchmarks.tinywan_students --quote
    python -m benchmarks.tinywan_students --teacher ... --pictures       # of clips made before

Every variant makes the same clips (prompts and noise) as the teacher; all are compared as 8-bit
video. Density is the mean over sites and steps, a refresh counts the dense attention and the mask.
"""

import argparse
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tinywan_knowledge import rule_of, uniform
from benchmarks.tinywan_training import TRAINED_ON, load_half
from evdit_opt import FewStepScheduler
from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.make import make_plan
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED, evaluation_pairs
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.evaluate import generate
from evdit_opt.demo.render import write_side_by_side
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from evdit_opt.quality import MAX_PSNR, compare, psnr
from evdit_opt.reuse import refresh_every, with_reuse
from evdit_opt.sampling.measure import measure_placement
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/few_step_students.json")
PAGE = Path("docs/few_steps.md")
PICTURES = Path("docs/few_steps")
SHIPPED = Path("benchmarks/students")
BLOCK = re.compile(r"(<!-- students: .*? -->\n).*?(<!-- /students -->)", re.DOTALL)
BATCH = 4
SHOWN = 4
CALIBRATION_PROMPTS = 6


@dataclass(frozen=True)
class Variant:
    """One way to make the clips."""

    name: str
    steps: int
    guided: bool
    weights: Path | None = None  # None: TinyWan's own
    segments: int | None = None
    placement: str | None = "even"  # None: the pipeline's scheduler, asked for fewer steps
    plan: Plan | None = None
    density: float = 1.0


def variants(options: argparse.Namespace) -> list[Variant]:
    """What is compared, in the order of its interest: an evaluation may be cut short."""
    steps = options.segments
    trained = Variant("consistency student", steps, False, options.consistency, steps)
    plan, alike = uniform(rule_of(options.rule)), uniform(rule_of(options.alike))
    sparse = replace(trained, plan=plan, density=plan.density)
    few = FewStepScheduler(load_tinywan().scheduler, steps=steps, segments=steps)
    few.set_timesteps(steps)
    times = few.timesteps.tolist()
    reusing = with_reuse(plan, refresh_every(times, 2), rule=Rule(0), levels=times)
    reused = replace(trained, plan=reusing, density=reusing.density)
    distilled = {"weights": options.knowledge}
    found_for = {
        d: calibrated(options.consistency, steps, d, options.work) for d in options.calibrated
    }
    rule = "own frame, refresh every second step"
    found = [
        trained,
        replace(sparse, name=f"+ {options.rule}, not trained"),
        replace(sparse, name=f"+ {options.rule}, distilled", **distilled),
        *(
            [
                replace(
                    sparse, name=f"{options.rule}, knowledge first", weights=options.knowledge_first
                )
            ]
            if options.knowledge_first
            else []
        ),
        replace(reused, name=f"+ {rule}"),
        *(
            replace(trained, name=f"+ calibrated for density {d:g}", plan=own, density=own.density)
            for d, own in found_for.items()
        ),
        replace(
            trained,
            name=f"+ calibrated for density {options.calibrated[-1]:g}, distilled",
            plan=found_for[options.calibrated[-1]],
            density=found_for[options.calibrated[-1]].density,
            weights=options.knowledge_found,
        ),
        Variant("its own scheduler asked for fewer steps", steps, True, placement=None),
        Variant("FewStepScheduler, even", steps, True),
        replace(reused, name=f"+ {rule}, on the distilled weights", **distilled),
        replace(trained, name=f"+ {options.alike}, not trained", plan=alike, density=alike.density),
        Variant("FewStepScheduler, even, no guidance", steps, False),
        Variant("FewStepScheduler, measured", steps, True, placement="measured"),
    ]
    return [variant for variant in found if options.only in variant.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--consistency", type=Path, default=SHIPPED / "tinywan_6_steps.safetensors")
    parser.add_argument(
        "--knowledge", type=Path, default=SHIPPED / "tinywan_6_steps_sparse.safetensors"
    )
    parser.add_argument(
        "--knowledge-found", type=Path, default=SHIPPED / "tinywan_6_steps_found.safetensors"
    )
    parser.add_argument(
        "--knowledge-first", type=Path, help="weights of the other order: knowledge, consistency"
    )
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--rule", default="2,1,balanced")
    parser.add_argument("--alike", default="4,1,balanced", help="costs what reuse costs")
    parser.add_argument("--calibrated", type=float, nargs="*", default=[0.36, 0.4])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument(
        "--only", default="", help="variants whose name contains this; other rows are kept"
    )
    parser.add_argument(
        "--samples", type=int, nargs=2, default=(4400, 300), help="trained on: C, K"
    )
    parser.add_argument("--teacher", type=Path, help="folder of its clips")
    parser.add_argument("--work", type=Path, default=Path("runs/tinywan/students"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quote", action="store_true", help="put the result into the page")
    parser.add_argument("--pictures", action="store_true", help="show clips side by side instead")
    options = parser.parse_args()
    if options.quote:
        PAGE.write_text(quote(PAGE.read_text(), json.loads(options.output.read_text())))
        return
    if options.teacher is None:
        parser.error("expected --teacher, or --quote")
    pairs = evaluation_pairs(options.clips)
    reference = teacher_clips(options.teacher, options.clips)
    if options.pictures:
        show(options, pairs, reference)
        return
    prompts = [label.caption() for _, label in pairs]
    rows: list[dict[str, Any]] = [
        measure("teacher", 100, 1.0, reference, reference, prompts) | {"steps": 50}
    ]
    result = {
        "what": "TinyWan in few steps, paired with its 50 guided steps (8-bit clips)",
        "clips": options.clips,
        "held_out_combinations": sum(label in HELD_OUT for _, label in pairs),
        "noise_seeds": [pairs[0][0], pairs[-1][0]],
        "samples": {
            "tinywan": TRAINED_ON,
            "consistency": options.samples[0],
            "knowledge": options.samples[1],
        },
        "rows": rows,
        "versions": installed_versions(),
    }
    if options.only:
        before = json.loads(options.output.read_text())
        assert before["clips"] == options.clips, "rows of other clips cannot be kept"
        rows[:] = [row for row in before["rows"] if options.only not in row["name"]]
    for variant in variants(options):
        clips = made(variant, pairs, options.work)
        calls = variant.steps * (2 if variant.guided else 1)
        row = measure(variant.name, calls, variant.density, clips, reference, prompts)
        rows.append(row | {"steps": variant.steps})
        # after every variant: an interrupted evaluation has what it has
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def show(options: argparse.Namespace, pairs: Any, teacher: list[np.ndarray]) -> None:
    """Write the clips of a few variants side by side, of the first unseen captions."""
    chosen = [n for n, (_, label) in enumerate(pairs) if label in HELD_OUT][:SHOWN]
    titles = {
        "consistency student": "student, 6 calls",
        f"+ {options.rule}, not trained": "static mask",
        f"+ {options.rule}, distilled": "static mask, distilled",
        f"+ calibrated for density {options.calibrated[-1]:g}": "calibrated plan",
    }
    rows = {"50 guided steps, 100 calls": teacher}
    for variant in variants(options):
        if variant.name in titles:
            title = f"{titles[variant.name]}, density {variant.density:.2f}"
            rows[title] = made(variant, pairs, options.work)
    floats = {
        title: [clips[n].astype(np.float32) / 255 for n in chosen] for title, clips in rows.items()
    }
    PICTURES.mkdir(parents=True, exist_ok=True)
    video, _ = write_side_by_side(PICTURES, floats, [pairs[n][1].caption() for n in chosen])
    video.unlink()  # the page shows the other one


def teacher_clips(folder: Path, count: int) -> list[np.ndarray]:
    """Clips of `evdit_opt.demo.evaluate`, [frames, height, width, 3] uint8."""
    files = sorted(folder.glob("*.npz"))
    clips = [clip for path in files for clip in np.load(path)["videos"]]
    assert len(clips) >= count, f"expected {count} clips in {folder}, got {len(clips)}"
    return clips[:count]


def made(variant: Variant, pairs: Any, work: Path) -> list[np.ndarray]:
    """The clips of a variant as uint8, kept in a file for each batch so that a run can go on."""
    folder = work / re.sub(r"\W+", "-", f"{variant.name} {variant.steps}")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_tinywan()
    if variant.weights is not None:
        load_half(pipe.transformer, variant.weights)
    if variant.placement is not None:
        placement: Any = variant.placement
        if placement == "measured":
            placement = measured(folder / "placement.json", variant.steps)
        pipe.scheduler = FewStepScheduler(
            pipe.scheduler, steps=variant.steps, segments=variant.segments, placement=placement
        )
    if variant.plan is not None:
        apply_plan(pipe.transformer, variant.plan, inner="eager")
    clips: list[np.ndarray] = []
    guidance = TINYWAN_CALL["guidance_scale"] if variant.guided else 1.0
    for start in range(0, len(pairs), BATCH):
        path = folder / f"{start:03d}.npy"
        if not path.exists():
            batch = pairs[start : start + BATCH]
            videos = generate(pipe, batch, variant.steps, guidance_scale=guidance)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, (videos * 255).round().astype("u1"))
            partial.replace(path)
        clips.extend(np.load(path))
    if variant.plan is not None:
        restore(pipe.transformer)
    return clips


def calibrated(weights: Path, steps: int, density: float, work: Path) -> Plan:
    """What calibration finds for the student, from prompts that are not evaluated; kept."""
    path = work / f"calibrated_{steps}_steps_{density:g}.evdit.json"
    if not path.exists():
        pipe = load_tinywan()
        load_half(pipe.transformer, weights)
        pipe.scheduler = FewStepScheduler(pipe.scheduler, steps=steps, segments=steps)
        call = {**TINYWAN_CALL, "guidance_scale": 1.0}
        prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(CALIBRATION_PROMPTS)]
        config = Config(density=density, calib_steps=steps, pipe_kwargs=call)
        path.parent.mkdir(parents=True, exist_ok=True)
        make_plan(pipe, prompts, config).save(path)
    return Plan.load(path)


def measured(path: Path, steps: int) -> list[float]:
    """Where `measure_placement` puts the steps, from one prompt that is not evaluated."""
    if not path.exists():
        placement = measure_placement(
            load_tinywan(), [TRAINED[0].caption()], steps=steps, pipe_kwargs=TINYWAN_CALL
        )
        path.write_text(json.dumps(placement))
    found: list[float] = json.loads(path.read_text())
    return found


def measure(
    name: str,
    calls: int,
    density: float,
    clips: list[np.ndarray],
    reference: list[np.ndarray],
    prompts: list[str],
) -> dict[str, Any]:
    """One row: fidelity to the teacher's clips, what the detectors see, steadiness."""
    begin = time.process_time()
    videos, twins = (
        [clip.astype(np.float32) / 255 for clip in each] for each in (clips, reference)
    )
    quality = compare(videos, twins)
    accuracy = caption_accuracy(videos, prompts)
    found = accuracy.detections
    assert quality.flicker_ratio is not None
    return {
        "name": name,
        "calls": calls,
        "density": round(density, 4),
        "psnr_db": round(quality.psnr.mean, 3),
        "psnr_db_stderr": round(quality.psnr.stderr or 0.0, 3),
        "ssim": round(quality.ssim.mean, 4),
        "flicker_ratio": round(quality.flicker_ratio.mean, 4),
        "flicker_ratio_stderr": round(quality.flicker_ratio.stderr or 0.0, 4),
        "motion_consistency": round(quality.motion_consistency.mean, 4),
        "shape": accuracy.shape,
        "colour": accuracy.colour,
        "direction": accuracy.direction,
        "everything": accuracy.everything,
        "median_overlap": round(float(np.median([each.overlap for each in found])), 4),
        "median_jerk": round(float(np.nanmedian([each.jerk for each in found])), 4),
        "median_flicker": round(float(np.nanmedian([each.flicker for each in found])), 5),
        "psnr_db_of_clips": [
            round(min(psnr(a, b), MAX_PSNR), 2) for a, b in zip(videos, twins, strict=True)
        ],
        "measuring_cpu_seconds": round(time.process_time() - begin),
    }


def quote(page: str, result: dict[str, Any]) -> str:
    """docs/few_steps.md with this result in it."""
    samples = result["samples"]
    text = (
        f"{result['clips']} clips of unseen noise ({result['held_out_combinations']} of captions "
        "never trained on), compared with the clips of 50 guided steps (100 calls)\nfrom the same "
        "noise; mean ± standard error. The consistency student saw "
        f"{samples['consistency']} samples ({samples['consistency'] / samples['tinywan']:.1%} of "
        f"the {samples['tinywan']}\nthat TinyWan was trained on), knowledge distillation "
        f"{samples['knowledge']} ({samples['knowledge'] / samples['tinywan']:.2%}).\n\n"
    )
    return BLOCK.sub(lambda match: f"{match[1]}{text}{table(result)}\n{match[2]}", page)


def table(result: dict[str, Any]) -> str:
    """One row for each variant."""
    lines = [
        "| | steps | calls | density | PSNR dB | SSIM | flicker / teacher | caption right | IoU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    # what is built on the student, marked "+", below it
    for row in sorted(result["rows"], key=lambda row: (-row["calls"], row["name"][0] == "+")):
        teacher = row["name"] == "teacher"
        psnr = "" if teacher else f"{row['psnr_db']:.1f} ± {row['psnr_db_stderr']:.1f}"
        flicker = f"{row['flicker_ratio']:.2f} ± {row['flicker_ratio_stderr']:.2f}"
        cells = [
            row["name"], row["steps"], row["calls"], f"{row['density']:.2f}", psnr,
            "" if teacher else f"{row['ssim']:.3f}", "1" if teacher else flicker,
            f"{row['everything']:.3f}", f"{row['median_overlap']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
