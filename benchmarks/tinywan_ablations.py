"""What each choice in TinyWan's fine-tuning is worth: one thing changed at a time.

    python -m benchmarks.tinywan_ablations --teacher runs/tinywan/evaluation/FOLDER [ARM ...]
    python -m benchmarks.tinywan_ablations --quote

Every arm is trained, unless its weights are there, and compared with the clips of 50 guided steps.
Consistency is trained for half as long as the shipped students, so that there are arms enough;
arms are compared with the arm "consistency", not with those students. Several processes may each do
some arms; each adds what is in the folder to the results.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tinywan_knowledge import rule_of, uniform
from benchmarks.tinywan_students import SHIPPED, Variant, made, measure, teacher_clips
from benchmarks.tinywan_training import TRAINED_ON
from evdit_opt import FewStepScheduler
from evdit_opt.demo.clips import evaluation_pairs
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from evdit_opt.reuse import refresh_every, with_reuse
from evdit_opt.versions import installed_versions
from evdit_opt.whole_file import whole_file

OUTPUT = Path("benchmarks/results/cpu/ablations.json")
PAGE = Path("docs/notes/ablations.md")
BLOCK = re.compile(r"(<!-- (\w+): .*? -->\n).*?(<!-- /\2 -->)", re.DOTALL)
HALF = ("--phases", "250:3-5:8:5e-4:125", "75:17-17:2:3e-4:35")
HALF_SAMPLES, KNOWLEDGE_SAMPLES = 250 * 8 + 75 * 2, 150 * 2
STUDENT = SHIPPED / "tinywan_6_steps.safetensors"
FOUND = SHIPPED / "tinywan_6_steps_0.4.evdit.json"
SLOW = "3e-5"
STATIC, ALIKE = "2,1,balanced", "4,1,balanced"


@dataclass(frozen=True)
class Arm:
    """One student, and what to make clips with.

    Attributes:
        title: in the tables.
        table: which one.
        train: "consistency" or "knowledge" and its arguments; none: nothing is trained.
        start: the arm whose weights it begins with, or a file; None: TinyWan itself.
        segments: calls of the student.
        plan: it is evaluated under: a rule, "reuse" (own frame, refresh every second step), or the
            file of a plan; None: dense.
        guided: whether the student is called with guidance.
    """

    title: str
    table: str
    train: tuple[str, ...] = ()
    start: str | Path | None = None
    segments: int = 6
    plan: str | Path | None = None
    guided: bool = False


def _consistency(title: str, *more: str, table: str = "consistency", **changes: Any) -> Arm:
    return replace(Arm(title, table, ("consistency", *HALF, *more)), **changes)


def _knowledge(title: str, *more: str, table: str = "knowledge", **changes: Any) -> Arm:
    usual = Arm(title, table, ("knowledge", *more), start=STUDENT, plan=STATIC)
    return replace(usual, **changes)


ARMS: dict[str, Arm] = {
    "consistency": _consistency("as shipped, half as long"),
    "segments-8": _consistency("8 segments", segments=8),
    "8-every-second": Arm(
        "refresh every second step", "eight", start="segments-8", segments=8, plan="reuse"
    ),
    "8-static": Arm(f"{ALIKE}, untrained", "eight", start="segments-8", segments=8, plan=ALIKE),
    "8-static-distilled": _knowledge(
        f"{ALIKE}, distilled", table="eight", start="segments-8", segments=8, plan=ALIKE
    ),
    "8-every-second-distilled": _knowledge(
        "refresh every second step, distilled",
        table="eight", start="segments-8", segments=8, plan="reuse",
    ),
    "8-static-slowly": _knowledge(
        f"{ALIKE}, distilled at a tenth of the rate", "--rate", SLOW,
        table="eight", start="segments-8", segments=8, plan=ALIKE,
    ),
    "8-every-second-slowly": _knowledge(
        "refresh every second step, distilled at a tenth of the rate", "--rate", SLOW,
        table="eight", start="segments-8", segments=8, plan="reuse",
    ),
    "huber": _consistency("pseudo-Huber loss, c = 0.03", "--huber", "0.03"),
    "average": _consistency("moving average of the weights, 0.98", "--average", "0.98"),
    "unfolded": _consistency("guidance left to the call", "--guidance", "1", guided=True),
    "segments-2": _consistency("2 segments", segments=2),
    "segments-4": _consistency("4 segments", segments=4),
    "segments-16": _consistency("16 segments", segments=16),
    "untrained-mask": Arm(f"{STATIC}, untrained", "knowledge", start=STUDENT, plan=STATIC),
    "both-terms": Arm(
        "output 1, attention 0.1 (shipped)", "knowledge",
        start=SHIPPED / "tinywan_6_steps_sparse.safetensors", plan=STATIC,
    ),
    "output-only": _knowledge("output 1, attention 0", "--attention-weight", "0"),
    "attention-only": _knowledge("output 0, attention 0.1", "--output-weight", "0"),
    "more-attention": _knowledge("output 1, attention 1", "--attention-weight", "1"),
    "changes": _knowledge("frame differences 1, too", "--difference-weight", "1"),
    "more-changes": _knowledge("frame differences 4, too", "--difference-weight", "4"),
    "slowly": _knowledge("output 1, attention 0.1, a third of the rate", "--rate", "1e-4"),
    "unweighted-mask": Arm("2,1,none, untrained", "knowledge", start=STUDENT, plan="2,1,none"),
    "unweighted": _knowledge("2,1,none: output 1, attention 0.1", plan="2,1,none"),
    "found": Arm("calibrated plan, density 0.40, untrained", "reuse", start=STUDENT, plan=FOUND),
    "found-distilled": _knowledge("calibrated plan, distilled", table="reuse", plan=FOUND),
    "every-second": Arm("refresh every second step", "reuse", start=STUDENT, plan="reuse"),
    "every-second-distilled": _knowledge(
        "refresh every second step, distilled", table="reuse", plan="reuse"
    ),
    "found-slowly": _knowledge(
        "calibrated plan, distilled at a tenth of the rate", "--rate", SLOW,
        table="reuse", plan=FOUND,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"{', '.join(ARMS)}; all if none")
    parser.add_argument("--teacher", type=Path, help="folder of its clips")
    parser.add_argument("--latents", type=Path, default=Path("runs/tinywan/pool"))
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/tinywan/ablations"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quote", action="store_true", help="put the result into the page")
    options = parser.parse_args()
    if options.quote:
        PAGE.write_text(quote(PAGE.read_text(), json.loads(options.output.read_text())))
        return
    if options.teacher is None:
        parser.error("expected --teacher, or --quote")
    for name in options.arms or ARMS:
        evaluated(name, options)
        gather(options)


def weights_of(start: str | Path | None, options: argparse.Namespace) -> Path | None:
    """The weights of an arm, trained if they are not there; or the file."""
    if not isinstance(start, str):
        return start
    arm, folder = ARMS[start], options.folder / start
    if not arm.train:
        return weights_of(arm.start, options)
    found: Path = folder / "student.safetensors"
    done = folder / "trained"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        script, *given = arm.train
        command = [sys.executable, "-m", f"benchmarks.tinywan_{script}", "--folder", str(folder)]
        command += ["--segments", str(arm.segments), *given]
        begin = weights_of(arm.start, options)
        if begin is not None:
            command += ["--start" if script == "consistency" else "--teacher", str(begin)]
        if script == "consistency":
            command += ["--latents", str(options.latents)]
        if arm.plan is not None:
            plan = plan_of(arm)
            if isinstance(arm.plan, str) and arm.plan != "reuse":
                command += ["--rule", arm.plan]
            else:
                plan.save(folder / "trained_under.evdit.json")
                command += ["--plan", str(folder / "trained_under.evdit.json")]
        subprocess.run(command, check=True)
        done.touch()
    return found


def plan_of(arm: Arm) -> Plan:
    """The plan an arm is evaluated under; with every step's noise level where it reuses."""
    if isinstance(arm.plan, Path):
        return Plan.load(arm.plan)
    assert arm.plan is not None
    if arm.plan != "reuse":
        return uniform(rule_of(arm.plan))
    few = FewStepScheduler(load_tinywan().scheduler, steps=arm.segments, segments=arm.segments)
    few.set_timesteps(arm.segments)
    times = few.timesteps.tolist()
    own = Rule(0)
    return with_reuse(uniform(own), refresh_every(times, 2), rule=own, levels=times)


def evaluated(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of an arm, measured if it is not there."""
    arm = ARMS[name]
    weights = weights_of(name, options)
    path = options.folder / name / "row.json"
    if not path.exists():
        pairs = evaluation_pairs(options.clips)
        prompts = [label.caption() for _, label in pairs]
        plan = None if arm.plan is None else plan_of(arm)
        density = 1.0 if plan is None else plan.density
        variant = Variant(
            name, arm.segments, arm.guided, weights, arm.segments, plan=plan, density=density
        )
        clips = made(variant, pairs, options.folder / name)
        reference = teacher_clips(options.teacher, options.clips)
        calls = arm.segments * (2 if arm.guided else 1)
        row = measure(arm.title, calls, density, clips, reference, prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps({"arm": name, "table": arm.table, **row}, indent=2))
    return dict(json.loads(path.read_text()))


def gather(options: argparse.Namespace) -> None:
    """Write the rows that are there; those of arms that other runs measured stay."""
    before = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    if before["rows"] and before["clips"] != options.clips:
        raise SystemExit(f"{options.output} is of {before['clips']} clips: give another --output")
    known = {row["arm"]: row for row in before["rows"]}
    for name in ARMS:
        path = options.folder / name / "row.json"
        if path.exists():
            known[name] = json.loads(path.read_text())
    rows = [known[name] for name in ARMS if name in known]
    result = {
        "what": "TinyWan's students, one choice changed at a time (8-bit clips)",
        "clips": options.clips,
        "samples": {
            "tinywan": TRAINED_ON,
            "consistency": HALF_SAMPLES,
            "knowledge": KNOWLEDGE_SAMPLES,
        },
        "rows": rows,
        "versions": installed_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.output) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")


def quote(page: str, result: dict[str, Any]) -> str:
    """docs/notes/ablations.md with the tables of this result in it."""

    def block(match: re.Match[str]) -> str:
        rows = [row for row in result["rows"] if row["table"] == match[2]]
        return f"{match[1]}{table(rows)}\n{match[3]}"

    return BLOCK.sub(block, page)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each arm, and what it gains on the first one, clip by clip."""
    lines = [
        "| | calls | density | PSNR dB | to the first, paired | SSIM | flicker / teacher "
        "| caption right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["name"], row["calls"], f"{row['density']:.2f}",
            f"{row['psnr_db']:.1f} ± {row['psnr_db_stderr']:.1f}",
            "" if row is rows[0] else gain(row, rows[0]), f"{row['ssim']:.3f}",
            f"{row['flicker_ratio']:.2f} ± {row['flicker_ratio_stderr']:.2f}",
            f"{row['everything']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def gain(row: dict[str, Any], first: dict[str, Any]) -> str:
    """The mean difference of PSNR over the same clips, ± its standard error."""
    pairs = zip(row["psnr_db_of_clips"], first["psnr_db_of_clips"], strict=True)
    differences = np.array([one - other for one, other in pairs])
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return f"{differences.mean():+.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
