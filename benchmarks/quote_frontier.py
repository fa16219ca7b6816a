"""Put the measured frontiers into their page: tables, and a figure per run.

python -m benchmarks.frontier && python benchmarks/quote_frontier.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/frontier.md"
RESULTS = ROOT / "benchmarks/results/cpu"
BLOCK = re.compile(r"(<!-- frontier: .*? -->\n).*?(<!-- /frontier -->)", re.DOTALL)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 56, 250, 16, 44
COLOURS = ("#0b6e4f", "#c1121f", "#1d4e89", "#8d6a9f", "#f18805", "#6c757d", "#2a9d8f", "#7f5539")


def table(report: dict[str, Any]) -> str:
    """A row per density and variant."""
    lines = [
        "| at most | variant | density | PSNR to dense, dB | flicker / dense | SSIM | clips |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(report["rows"], key=lambda r: (r["target"], -r["mean_psnr_db"])):
        low, high = row["ci95_psnr_db"]
        worst, best = row["ci95_flicker_ratio"]
        lines.append(
            f"| {row['target']} | {row['variant']} | {row['density']:.3f} | "
            f"{row['mean_psnr_db']:.1f} ({low:.1f} to {high:.1f}) | "
            f"{row['mean_flicker_ratio']:.2f} ({worst:.2f} to {best:.2f}) | "
            f"{row['mean_ssim']:.3f} | {len(row['psnr_db'])} |"
        )
    return "\n".join(lines) + "\n"


def gains(report: dict[str, Any]) -> str:
    """Ours against the others at every density, clip by clip."""
    lines = []
    for target in sorted({row["target"] for row in report["rows"]}):
        rows = {row["variant"]: row for row in report["rows"] if row["target"] == target}
        ours = rows.pop("ours", None)
        if ours is None:
            continue
        static = rows.pop("ours without reuse", None)
        told = []
        for what in ("output caching", "output forecasting"):
            if other := rows.pop(f"{what}, even refreshes", None):
                told.append(f"{paired(ours, other)} to {what}")
        if rows:
            best = max(rows.values(), key=lambda row: row["mean_psnr_db"])
            told.append(f"{paired(ours, best)} to the best other static mask ({best['variant']})")
            if static:
                told.append(f"without reuse {paired(static, best)} to that")
        if told:
            lines.append(f"- density {target}: {', '.join(told)}")
    return "\n".join(lines) + "\n"


def paired(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """Mean difference in dB over the clips both made, with its standard error."""
    pairs = list(zip(ours["psnr_db"], other["psnr_db"], strict=False))
    found = [a - b for a, b in pairs]
    mean = sum(found) / len(found)
    spread = (sum((x - mean) ** 2 for x in found) / max(1, len(found) - 1) / len(found)) ** 0.5
    return f"{mean:+.1f} ± {spread:.1f} dB"


def figure(report: dict[str, Any]) -> str:
    """PSNR over density as SVG, 95% intervals as bars."""
    rows = report["rows"]
    low = min(r["ci95_psnr_db"][0] for r in rows) - 1
    high = max(r["ci95_psnr_db"][1] for r in rows) + 1
    span, rise = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    most = max(0.62, max(r["density"] for r in rows))

    def place(density: float, decibel: float) -> tuple[float, float]:
        return LEFT + span * density / most, TOP + rise * (high - decibel) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for decibel in range(int(low // 5 + 1) * 5, int(high) + 1, 5):
        x, y = place(0, decibel)
        parts.append(
            f'<path d="M{x} {y:.1f}H{LEFT + span}" stroke="#ddd"/>'
            f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{decibel}</text>'
        )
    for tenth in range(0, int(most * 10) + 1):
        x, y = place(tenth / 10, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tenth / 10}</text>')
    parts.append(
        f'<text x="{LEFT + span / 2}" y="{HEIGHT - 6}" text-anchor="middle">density, mean over a '
        f'run</text><text x="14" y="{TOP + rise / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {TOP + rise / 2})">PSNR to dense, dB</text>'
    )
    names = sorted({r["variant"] for r in rows}, key=lambda n: (n != "ours", "output" not in n, n))
    for number, name in enumerate(names):
        parts += list(_series([r for r in rows if r["variant"] == name], number, name, place))
    return "\n".join([*parts, "</svg>\n"])


def _series(rows: list[dict[str, Any]], number: int, name: str, place: Any) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    width = 2 if number < 2 else 1
    ordered = sorted(rows, key=lambda row: row["density"])
    points = [(*place(row["density"], row["mean_psnr_db"]), row) for row in ordered]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
    for x, y, row in points:
        ends = [place(row["density"], value)[1] for value in row["ci95_psnr_db"]]
        yield (
            f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        )
    y = TOP + 14 + 18 * number
    yield (
        f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y - 4}" r="4" fill="{colour}"/>'
        f'<text x="{WIDTH - RIGHT + 26}" y="{y}">{name}</text>'
    )


def runs() -> dict[str, dict[str, Any]]:
    """The content of every ``frontier_*.json`` by its name, the largest first."""
    files = sorted(RESULTS.glob("frontier_*.json"), key=lambda path: (-path.stat().st_size, path))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in files}


def section(name: str, report: dict[str, Any]) -> str:
    """Everything about one run."""
    return "\n".join(
        [
            f"### {report['steps']} steps, guidance {report['guidance']:g}\n",
            f"![PSNR over density]({name}.svg)\n",
            "Ours, clip by clip (standard error):\n",
            gains(report),
            table(report),
            f"Calibrated on {report['calibration_prompts']} other prompts; in brackets 95% "
            "bootstrap intervals over clips.\n",
        ]
    )


def written(page: str) -> str:
    """The page with its block made anew."""
    text = "\n".join(section(name, report) for name, report in runs().items())
    return BLOCK.sub(lambda found: found[1] + text + found[2], page)


def main() -> None:
    for name, report in runs().items():
        PAGE.with_name(f"{name}.svg").write_text(figure(report), encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
