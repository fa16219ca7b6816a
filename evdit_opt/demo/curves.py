"""Pictures for docs/tinywan.md: `python -m evdit_opt.demo.curves`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np


def write_curves(records: list[dict[str, Any]], path: Path) -> Path:
    """Plot the training log: errors of the autoencoder, of velocity by noise level, of position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    stages = dict.fromkeys(record["stage"] for record in records)
    for stage in (stage for stage in stages if stage != "denoiser"):
        rows = [record for record in records if record["stage"] == stage]
        minutes = [row["seconds"] / 60 for row in rows]
        left.plot(minutes, [row["error"] for row in rows], marker=".", label=stage)
    left.set(xlabel="minutes", ylabel="L1 + L2 error", title="autoencoder", yscale="log")
    left.legend()
    rows = [record for record in records if record["stage"] == "denoiser"]
    minutes = [row["seconds"] / 60 for row in rows]
    names = {
        "loss_1": "noise 0.95 to 1",
        "loss_0.95": "noise 0.8 to 0.95",
        "loss_0.8": "noise 0.5 to 0.8",
        "loss_0.5": "noise 0 to 0.5",
        "position": "position (auxiliary)",
    }
    for name, label in names.items():
        values = [np.nan if row[name] is None else row[name] for row in rows]
        right.plot(minutes, values, label=label, linewidth=1)
    right.set(xlabel="minutes", ylabel="squared error", title="transformer", yscale="log")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def write_contact_sheet(videos: np.ndarray, path: Path, columns: int = 8) -> Path:
    """One row of evenly spaced frames per clip; videos [clips, frames, height, width, 3] uint8."""
    from PIL import Image

    frames = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    rows = [np.concatenate(list(video[frames]), axis=1) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(path)
    return path


def quality_table(quality: dict[str, Any]) -> str:
    """The summary of evaluate.py as markdown."""
    head = ("clips", "shape", "colour", "direction", "everything")
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for part in ("all", "trained_combinations", "held_out_combinations"):
        row = quality[part]
        shares = [f"{row[name]:.3f}" for name in head[1:]]
        lines.append(f"| {part.replace('_', ' ')} | {row['clips']} | " + " | ".join(shares) + " |")
    median, version = quality["median"], quality["versions"]
    lines.append(
        f"\n{quality['steps']} steps, guidance {quality['guidance_scale']:g}, noise seeds "
        f"{quality['seeds'][0]} to {quality['seeds'][1]}. Median over clips: template overlap "
        f"(IoU) {median['overlap']:.2f}, jerk {median['jerk']:.2f} px/frame², flicker "
        f"{median['flicker']:.4f}. Autoencoder on real clips: "
        f"{quality['reconstruction_psnr_db']:.1f} dB. Weights {quality['weights']}, torch "
        f"{version['torch']}, diffusers {version['diffusers']}, {version['machine']}."
    )
    return "\n".join(lines)


def write_table(document: Path, table: str) -> None:
    """Put the table between the two quality markers of a markdown file."""
    before, _, rest = document.read_text().partition("<!-- quality -->")
    _, _, after = rest.partition("<!-- /quality -->")
    document.write_text(f"{before}<!-- quality -->\n{table}\n<!-- /quality -->{after}")


def main(arguments: list[str] | None = None) -> None:
    """Copy the log, draw it, fill in the quality table, add a contact sheet of evaluated clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("runs/tinywan/log.jsonl"))
    parser.add_argument("--clips", type=Path, help="a folder of runs/tinywan/evaluation")
    parser.add_argument("--output", type=Path, default=Path("docs/tinywan"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(options.log, options.output / "log.jsonl")
    lines = options.log.read_text().splitlines()
    write_curves([json.loads(line) for line in lines], options.output / "curves.png")
    quality = json.loads((options.output / "quality.json").read_text())
    write_table(options.output.with_suffix(".md"), quality_table(quality))
    if options.clips:
        files = sorted(options.clips.glob("*.npz"))[:3]
        videos = np.concatenate([np.load(file)["videos"] for file in files])
        write_contact_sheet(videos, options.output / "samples.png")


if __name__ == "__main__":
    main()
