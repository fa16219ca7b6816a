"""``evdit report``: a plan as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from evdit_opt.commands.common import (
    AsJson,
    console,
    or_exit,
    require_writable,
    write_json,
    writing,
)
from evdit_opt.whole_file import whole_file

__all__ = ["report"]


def report(
    plan: Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    clips: Annotated[
        Path | None,
        typer.Option(help="A folder of mp4 files, VARIANT/NAME.mp4 or NAME.mp4, to play in sync."),
    ] = None,
    tiles: Annotated[
        Path | None, typer.Option(help="measure.json, as evdit measure --out writes it.")
    ] = None,
    inspection: Annotated[
        Path | None, typer.Option(help="What evdit inspect --json printed: gives the upper bound.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that shows what a plan does and why; it needs no network."""
    from evdit_opt.page import load_clips, load_measurement, load_share, plan_page
    from evdit_opt.plan import Plan

    def run() -> None:
        require_writable(out)
        shown = () if clips is None else load_clips(clips)
        loaded = Plan.load(plan)
        measured = None if tiles is None else load_measurement(tiles, loaded)
        share = None if inspection is None else load_share(inspection, loaded)
        page = plan_page(loaded, shown, measured, share)
        with writing(out), whole_file(out) as partial:
            partial.write_text(page, encoding="utf-8")
        if as_json:
            told = {"out": str(out), "bytes": len(page.encode()), "clips": len(shown)}
            write_json(told)
        else:
            console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)

    or_exit(run)
