"""``evdit plan``: look at a plan, compare two, check one."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from evdit_opt.commands.common import console, or_exit, tell_error
from evdit_opt.errors import PlanError

__all__ = ["plans", "summary"]

plans = typer.Typer(help="Look at a plan, compare two, check one.", no_args_is_help=True)
TROUBLE = 2
"""Exit code of ``diff`` where a plan cannot be read, as of diff(1): 1 says that they differ."""

PlanFile = Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")
]


@plans.command()
def show(plan: PlanFile, as_json: AsJson = False) -> None:
    """Print what a plan does to each layer, and the evidence it carries."""
    from evdit_opt.plan import Plan

    def run() -> None:
        loaded = Plan.load(plan)
        if as_json:
            _write({**summary(loaded), "plan": json.loads(loaded.to_json())})
        else:
            console.print(loaded.describe(), markup=False, highlight=False, soft_wrap=True)

    or_exit(run)


@plans.command()
def diff(old: PlanFile, new: PlanFile, as_json: AsJson = False) -> None:
    """Tell what two plans do differently. Exit code: 0 nothing, 1 something, 2 trouble."""
    from evdit_opt.plan import Plan
    from evdit_opt.plan_diff import plan_differences

    def run() -> None:
        found = plan_differences(Plan.load(old), Plan.load(new))
        if as_json:
            _write({"equal": not found, "differences": [vars(one) for one in found]})
        else:
            for one in found:
                console.print(one.describe(), markup=False, highlight=False, soft_wrap=True)
        if found:
            raise typer.Exit(1)

    or_exit(run, TROUBLE)


@plans.command()
def validate(plan: PlanFile, as_json: AsJson = False) -> None:
    """Check that a file is a plan this version can apply. Exit code: 0 it is, 1 it is not."""
    from evdit_opt.plan import Plan

    try:
        loaded = Plan.load(plan)
    except PlanError as error:
        if as_json:
            _write({"valid": False, "error": type(error).__name__, "message": str(error)})
        else:
            tell_error(error)
        raise typer.Exit(1) from error
    if as_json:
        _write({"valid": True, **summary(loaded)})
    else:
        sites = f"{len(loaded.rules)} of {len(loaded.sites)} sites sparse"
        console.print(
            f"{plan}: a plan for {loaded.model_class}, {sites}", markup=False, soft_wrap=True
        )


def summary(plan: Any) -> dict[str, Any]:
    """A plan's key figures, for programs."""
    return {
        "fingerprint": plan.fingerprint(),
        "model_class": plan.model_class,
        "density": plan.density,
        "sites": len(plan.sites),
        "sparse_sites": len(plan.rules),
        "reusing_sites": 0 if plan.reuse is None else len(plan.reuse.sites),
        "psnr_db": None if plan.quality is None else plan.quality.psnr.mean,
        "held_out_error": plan.calibration.held_out_error,
        "speedup": None if plan.speed is None else plan.speed.speedup,
    }


def _write(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
