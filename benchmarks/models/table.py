"""Write what was measured on every model into docs/models.md: no cell is typed by hand.

python -m benchmarks.models.measure_models && python benchmarks/models/table.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "models.json"
BLOCK = re.compile(r"(<!-- models: .*? -->\n).*?(<!-- /models -->)", re.DOTALL)

REFUSED = re.compile(r"refused: (.*)", re.DOTALL)

# How much further away than rounding the dense model must be for "equal" to mean anything.
APART = 4

Row = dict[str, Any]


def sites(row: Row) -> str:
    """Found and expected, over all sizes."""
    if "error" in row["detection"]["usual"]:
        return "refused"
    found, expected, false = (
        sum(one[key] for one in row["detection"].values()) for key in ("found", "expected", "false")
    )
    return f"{found} / {expected}" + (f", {false} false" if false else "")


def layout(row: Row) -> str:
    """Dense tokens before the video, the video, dense tokens behind it; in the usual shape."""
    usual = row["detection"]["usual"]
    if "error" in usual:
        return ""
    found = ", ".join(" + ".join(map(str, one)) for one in usual["layouts"])
    given = "; grid given" if usual["grid"] == "given" else ""
    note = f" ({row['tokens']})" if row["tokens"] else ""
    return found + note + given


def graph(row: Row) -> str:
    """Whether Dynamo traces the model whole."""
    usual = row["detection"]["usual"]
    if "error" in usual:
        return ""
    if usual["fullgraph"]:
        return "full"
    scoped = f", {usual['scoped']} sites in scopes" if usual["scoped"] else ""
    return f"{row['forward']['graphs']} with sites{scoped}"


def equal(row: Row, part: str) -> str:
    """Whether it computes what it does with dense masks."""
    found = row.get(part)
    if found is None:
        return ""
    if "refused" in found:
        return f"refused: {found['refused']}"
    if found["gap"] <= APART * found["bound"]:
        return "proves nothing: dense is as close"
    return "equal" if found["error"] <= found["bound"] else f"off by {found['error']:.1e}"


def reasons(row: Row) -> dict[str, int]:
    """Why attentions were left alone in the usual shape, and how many."""
    usual = row["detection"]["usual"]
    if "error" not in usual:
        return counted(usual["refused"].items())
    found = re.sub(r"^expected 3D self-attention over video in \w+, found ", "", usual["error"])
    if found == usual["error"]:
        return {plain(found): 1}
    entries = found.removesuffix("; nothing can be made sparse here").split("; ")
    return counted((entry.split(": ", 1)[1], 1) for entry in entries)


def counted(entries: Any) -> dict[str, int]:
    """Sums by reason, whatever its numbers."""
    found: dict[str, int] = {}
    for reason, count in entries:
        found[plain(reason)] = found.get(plain(reason), 0) + count
    return found


def plain(reason: str) -> str:
    """A reason without the numbers and symbols of one call."""
    reason = re.sub(r" \(\d+ instead of \d+\)", "", reason)
    untraced = re.match(r"expected a \w+ that torch.export can .*? cannot: (.*?) \w+\(", reason)
    return f"torch.export: {untraced[1]}" if untraced else reason


COLUMNS: dict[str, Callable[[Row], str]] = {
    "class": lambda row: row["class"],
    "sites found / expected": sites,
    "before + video + after": layout,
    "graph": graph,
    "output": lambda row: equal(row, "forward"),
    "gradients": lambda row: equal(row, "backward"),
    "torch.export": lambda row: equal(row, "export"),
    "in ATen": lambda row: equal(row, "export_aten"),
}
"""A further column is a function of the record here, and one that measures in measure_models.py."""


def table(content: dict[str, Any]) -> str:
    """The page's block for the content of models.json."""
    rows, facts = content["rows"], content["environment"]
    legend: list[str] = []

    def letter(reason: str) -> str:
        if reason not in legend:
            legend.append(reason)
        return f"({ascii_lowercase[legend.index(reason)]})"

    def refused(found: re.Match[str]) -> str:
        return f"refused {letter(plain(found[1]))}"

    lines = [["configuration", *COLUMNS, "left alone"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in sorted(rows.items()):
        alone = [f"{count} {letter(reason)}" for reason, count in reasons(row).items()]
        cells = [REFUSED.sub(refused, cell(row)) for cell in COLUMNS.values()]
        lines.append([name, *cells, ", ".join(alone)])
    shapes = [one for row in rows.values() for one in row["detection"].values()]
    found, expected, false = (sum(x[key] for x in shapes) for key in ("found", "expected", "false"))
    return "\n".join(
        [
            f"{len(rows)} configurations of {len({row['class'] for row in rows.values()})} "
            f"classes, {len(shapes)} models: {found} of {expected} expected sites found, {false} "
            f"false ones. torch {facts['torch']}, diffusers {facts['diffusers']}, {facts['date']}.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            "Left alone or refused, because:",
            "",
            *(f"- ({ascii_lowercase[n]}) {reason}" for n, reason in enumerate(legend)),
            "",
        ]
    )


def written(page: str, content: dict[str, Any]) -> str:
    """The page with its block made anew."""
    return BLOCK.sub(lambda found: found[1] + table(content) + found[2], page)


def main() -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main()
