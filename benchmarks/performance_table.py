"""Write the numbers under benchmarks/results into docs/performance.md: none there is typed by hand.

python benchmarks/performance_table.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- numbers: .*? -->\n).*?(<!-- /numbers -->)", re.DOTALL)
NOT_YET = "**Not yet measured on a GPU.**"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention_tables(rows: dict[str, Any], kind: str) -> list[str]:
    """One table per shape: masks against the fastest dense attention and FlexAttention."""
    shapes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, row in rows.items():
        if name.startswith(f"{kind}/"):
            _, shape, rule = name.split("/", 2)
            shapes.setdefault(shape, []).append((rule, row))
    parts = []
    for shape, masks in shapes.items():
        dense = masks[0][1]["results"]
        times = ", ".join(
            f"{name.removeprefix('dense ')} {own['ms']:.2f} ms"
            for name, own in dense.items() if name.startswith("dense")
        )  # fmt: skip
        cannot = [name for name in masks[0][1]["cannot"] if name.startswith("dense")]
        if cannot:
            times += "; cannot run: " + ", ".join(n.removeprefix("dense ") for n in cannot)
        parts += [f"#### {shape}", f"Dense: {times}.", table(
            ["mask", "density", "ideal", "implementation", "ms", "TFLOP/s on kept tiles",
             "speedup over the fastest dense", "of ideal", "over FlexAttention", "largest error"],
            [mask_row(rule, row, impl) for rule, row in masks for impl in row["results"]
             if not impl.startswith("dense")],
        )]  # fmt: skip
    return parts


def mask_row(rule: str, row: dict[str, Any], impl: str) -> list[str]:
    """One implementation on one mask."""
    own = row["results"][impl]
    errors = row["errors"].get(impl)
    worst = "" if errors is None else f"{max(errors.values()):.1e}"
    over = f"{own['over_flex']:.2f}" if "over_flex" in own and impl != "flex" else ""
    return [rule, f"{row['density']:.3f}", f"{row['ideal']:.2f}", impl, f"{own['ms']:.2f}",
            f"{own['tflops_kept']:.0f}", f"{own['speedup']:.2f}", f"{own['of_ideal']:.2f}",
            over, worst]  # fmt: skip


def gpu_section(report: dict[str, Any]) -> str:
    """Everything ``gpu_suite`` measured on one device."""
    facts, rows = report["environment"], report["rows"]
    parts = [
        f"### {facts['device_name']}",
        f"torch {facts['torch']}, cuDNN {facts.get('cudnn')}, {facts['date']}. bfloat16, batch 1; "
        "median of interleaved rounds with cold caches. Errors are the largest of sampled rows "
        "against float64.",
    ]
    for kind, title in (("forward", "Forward"), ("backward", "Forward and backward")):
        tables = attention_tables(rows, kind)
        if tables:
            parts += [f"**{title}**", *tables]
    if "step" in rows:
        step = rows["step"]
        modes = "; ".join(
            f"{mode}: dense {own['dense']:.1f} ms, sparse {own['evdit']:.1f} ms"
            for mode, own in step["ms"].items()
        )
        parts.append(
            f"**A stack of {step['layers']} blocks**, {step['shape']}, mask {step['rule']}, "
            f"density {step['density']:.3f}: {modes}."
        )
    memory = {name: row for name, row in rows.items() if name.startswith("memory/")}
    if memory:
        columns = list(next(iter(memory.values()))["bytes"])
        parts += ["**Peak memory beside the inputs, GiB**", table(
            ["shape", "mask", *columns],
            [[name.removeprefix("memory/"), row["rule"],
              *(f"{row['bytes'][column] / 2**30:.2f}" for column in columns)]
             for name, row in memory.items()],
        )]  # fmt: skip
    return "\n\n".join(parts)


def growth_line(rows: list[dict[str, Any]]) -> str:
    """How time grows with the number of frames."""
    return "; ".join(
        f"{row['references']} reference(s): time grows as frames ** {row['exponent']:.2f}"
        for row in rows
    ) + "."  # fmt: skip


def small_table(rows: list[dict[str, Any]]) -> str:
    """Short calls: "auto", what it chooses from, and what a person would write."""
    names = ["auto", "decomposed", "masked", "masked SDPA"]
    return (
        "*masked SDPA* is one call of PyTorch's with the mask of all token pairs. *compiled*: both "
        "inside of a graph, where no operator is called by name, up to 256 tokens.\n\n"
    ) + table(
        ["frames x tokens", "dtype", "mask", "density", *(f"{n}, ms" for n in names),
         "auto / best implementation", "auto / masked SDPA", "compiled: auto / masked SDPA"],
        [[f"{row['frames']} x {row['tokens']}", row["dtype"], row["rule"],
          f"{row['density']:.2f}", *(f"{row['min_ms'][n]:.2f}" for n in names),
          f"{row['auto_over_own']:.2f}", ratio(row["min_ms"], "auto", "masked SDPA"),
          ratio(row["min_ms"], "auto compiled", "masked SDPA compiled")] for row in rows],
    )  # fmt: skip


def ratio(times: dict[str, float], one: str, other: str) -> str:
    """How many times as long one takes as the other; nothing where they were not measured."""
    return f"{times[one] / times[other]:.2f}" if one in times else ""


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Peaks beside the inputs, and with them relative to dense attention."""
    return (
        "Resident memory at the peak of one call, in a process of its own; the result is part of "
        "what lies beside the inputs.\n\n"
    ) + table(
        ["F, T, H, D", "dtype", "mask", "inputs, MiB", "dense: beside them, MiB",
         "decomposed: beside them, MiB", "inputs included: decomposed / dense"],
        [[shape_of(row), row["dtype"], row["rule"], f"{row['inputs_bytes'] / 2**20:.1f}",
          *(f"{row['beside_inputs_bytes'][n] / 2**20:.1f}" for n in ("dense", "decomposed")),
          f"{row['of_dense']:.2f}"] for row in rows],
    )  # fmt: skip


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Time relative to density x dense, best of the rounds; and the median of ours."""
    names = [name for name in rows[0]["results"] if name != "dense"]
    return table(
        ["F, T, H, D", "dtype", "mask", "density", "dense, ms",
         *(f"{name}: time of ideal" for name in names), "decomposed: median"],
        [[shape_of(row), row["dtype"], row["rule"], f"{row['density']:.3f}",
          f"{row['results']['dense']['min_ms']:.1f}",
          *(f"{row['results'][name]['of_ideal']:.2f}" for name in names),
          f"{row['results']['decomposed']['of_ideal_median']:.2f}"] for row in rows],
    )  # fmt: skip


def shape_of(row: dict[str, Any]) -> str:
    """Frames, tokens of a frame, heads, head_dim."""
    return f"{row['frames']}, {row['tokens']}, {row['heads']}, {row['head_dim']}"


CPU_SECTIONS = {"growth": growth_line, "small": small_table, "memory": memory_table}


def cpu_section(report: dict[str, Any]) -> str:
    """What ``bench_tile_attention`` measured."""
    parts = ["### CPU"]
    titles = {
        "main": "Long frames", "demo": "The demo's shape", "growth": "Growth with the frames",
        "small": "Short sequences: does `auto` choose well?", "memory": "Peak memory",
    }  # fmt: skip
    for section, title in titles.items():
        for name in (name for name in report if name.split(",")[0] == section):
            facts, rows = report[name]["environment"], report[name]["rows"]
            clock = "" if section == "memory" else f", {facts['clock']} clock"
            parts += [
                f"**{title}.** {facts['device_name']}, torch {facts['torch']}, {facts['threads']} "
                f"thread(s){clock}, {facts['date']}.",
                CPU_SECTIONS.get(section, speed_table)(rows),
            ]
    return "\n\n".join(parts)


def numbers(results: Path = RESULTS) -> str:
    """The generated part of the page."""
    gpus = sorted(results.glob("*/gpu_suite.json"))
    parts = [gpu_section(json.loads(path.read_text(encoding="utf-8"))) for path in gpus]
    if not parts:
        parts = [
            f"{NOT_YET} The suite is ready: `python -m benchmarks.gpu_suite` on a machine with "
            "one, then `python benchmarks/performance_table.py`."
        ]
    cpu = results / "cpu" / "tile_attention.json"
    if cpu.exists():
        parts.append(cpu_section(json.loads(cpu.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def written(page: str, results: Path = RESULTS) -> str:
    """The page with today's numbers."""
    return BLOCK.sub(lambda found: f"{found[1]}{numbers(results)}\n{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
