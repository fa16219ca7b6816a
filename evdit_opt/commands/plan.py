"""``evdit plan``: look at a plan, compare two, check one, move one to another size."""

import json
from pathlib import Path
from typing import Annotated

import typer

from evdit_opt.commands.common import AsJson, console, or_exit, tell_error, write_json
from evdit_opt.commands.retarget import retarget
from evdit_opt.commands.summary import summary
from evdit_opt.errors import PlanError

__all__ = ["plans"]

plans = typer.Typer(help="Look at a plan, compare two, check one, move one.", no_args_is_help=True)
plans.command()(retarget)
TROUBLE = 2
"""Exit code of ``diff`` where a plan cannot be read, as of diff(1): 1 says that they differ."""

PlanFile = Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")]


@plans.command()
def show(plan: PlanFile, as_json: AsJson = False) -> None:
    """Print what a plan does to each layer, and the evidence it carries."""
    from evdit_opt.plan import Plan

    def run() -> None:
        loaded = Plan.load(plan)
        if as_json:
            write_json({**summary(loaded), "plan": json.loads(loaded.to_json())})
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
            write_json({"equal": not found, "differences": [vars(one) for one in found]})
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
            write_json({"valid": False, "error": type(error).__name__, "message": str(error)})
        else:
            tell_error(error)
        raise typer.Exit(1) from error
    if as_json:
        write_json({"valid": True, **summary(loaded)})
    else:
        sites = f"{len(loaded.rules)} of {len(loaded.sites)} sites sparse"
        console.print(
            f"{plan}: a plan for {loaded.model_class}, {sites}", markup=False, soft_wrap=True
        )
