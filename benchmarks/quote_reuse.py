"""Put the measured table into the page on residual reuse: no number there is typed by hand.

python benchmarks/residual_reuse.py quality && python benchmarks/residual_reuse.py speed
python benchmarks/quote_reuse.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/residual_reuse.md"
RESULTS = ROOT / "benchmarks/results/cpu/residual_reuse_20_steps.json"
BLOCK = re.compile(r"(<!-- reuse: .*? -->\n).*?(<!-- /reuse -->)", re.DOTALL)


def reuse_table(report: dict[str, Any]) -> str:
    """The page's table for the content of a ``residual_reuse_*_steps.json``."""
    quality, speed = report["quality"], report.get("speed")
    lines = ["| variant | mean density | PSNR to dense | SSIM | flicker / dense |"]
    lines.append("|---|---|---|---|---|")
    for row in quality["rows"]:
        lines.append(
            f"| {row['variant']} | {row['density']:.2f} | "
            f"{row['psnr_db']:.1f} ± {row['psnr_stderr']:.1f} dB | "
            f"{row['ssim']:.3f} | {row['flicker_ratio']:.2f} |"
        )
    words = min(min(row["caption"]) for row in quality["rows"])
    lines += [
        "",
        f"{quality['clips']} held-out clips, {report['steps']} steps, guidance 2, the same seeds; "
        f"±: standard error; of the words asked for at least {words:.0%} are shown in every row.",
    ]
    if speed is not None:
        lines.append(
            f'A denoising run with "{speed["variant"]}": {speed["dense"]:.2f} s dense, '
            f"{speed['reusing']:.2f} s reusing ({speed['dense'] / speed['reusing']:.2f}x), both "
            f"compiled, {speed['threads']} CPU threads."
        )
    return "\n".join(lines) + "\n"


def quote(page: str, report: dict[str, Any]) -> str:
    """The page with its block made anew."""
    return BLOCK.sub(lambda found: found[1] + reuse_table(report) + found[2], page)


def main() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(quote(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
