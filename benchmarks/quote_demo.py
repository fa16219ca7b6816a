"""Put a demo's numbers and pictures into the README: no number there is typed by hand.

make demo && python benchmarks/quote_demo.py evdit-demo
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUOTED = ROOT / "docs" / "demo"
BLOCK = re.compile(r"(<!-- demo: .*? -->\n).*?(<!-- /demo -->)", re.DOTALL)


def demo_table(report: dict[str, Any]) -> str:
    """The README's table for the content of a ``report.json``."""
    paper = report["paper_uniform"]
    versions = report["versions"]
    rows = [
        ("", "dense", "evdit", f"paper's uniform mask {paper['mask']}"),
        (
            "tiles computed, mean over a run",
            "100%",
            f"{report['density']:.0%}",
            f"{paper['density']:.0%}",
        ),
        (
            "transformer step, mean over a run",
            f"{report['step_ms_dense']:.0f} ms",
            f"{report['step_ms_optimized']:.0f} ms ({report['step_speedup']:.2f}x)",
            "",
        ),
        (
            "PSNR to the dense clip",
            "",
            f"{report['psnr_db']:.1f} dB",
            f"{paper['psnr_db']:.1f} dB",
        ),
        ("SSIM", "", f"{report['ssim']:.3f}", f"{paper['ssim']:.3f}"),
        (
            "flicker, relative to dense",
            "1",
            f"{report['flicker_ratio']:.2f}",
            f"{paper['flicker_ratio']:.2f}",
        ),
        (
            "caption words shown",
            f"{report['caption_accuracy_dense']:.0%}",
            f"{report['caption_accuracy_optimized']:.0%}",
            f"{paper['caption_accuracy']:.0%}",
        ),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|---|")
    missed = "; ".join(report["missed"]) or "none"
    lines += [
        "",
        f"{report['clips']} held-out prompts, {report['steps']} steps, no training, "
        f"{report['threads']} CPU threads, torch {versions['torch']}. Self-attention is "
        f"{report['attention_share']:.0%} of a dense step; computing fewer tiles alone could "
        f"make it {report['ideal_step_speedup']:.2f}x faster. evdit computes dense attention in "
        f"{report['refreshes']} of {report['steps']} steps and reuses what its masks drop in the "
        f"others; a site that drops everything needs no queries, keys and values there either. "
        f"Bars missed: {missed}.",
    ]
    return "\n".join(lines) + "\n"


def quote(readme: str, report: dict[str, Any]) -> str:
    """The README with its demo block made anew."""
    return BLOCK.sub(lambda found: found[1] + demo_table(report) + found[2], readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `evdit demo` wrote")
    folder = parser.parse_args().folder
    QUOTED.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "side_by_side.gif", "masks.png", "plan.evdit.json"):
        shutil.copy(folder / name, QUOTED / name)
    report = json.loads((QUOTED / "report.json").read_text())
    readme = ROOT / "README.md"
    readme.write_text(quote(readme.read_text(), report))


if __name__ == "__main__":
    main()
