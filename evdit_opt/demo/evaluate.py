"""Measure TinyWan on unseen seeds: `python -m evdit_opt.demo.evaluate --pairs 64 --steps 50`.

Every batch of clips leaves small JSON files, so that an interrupted evaluation continues and
several processes can share the work (`--worker 0 --workers 2`); the process that finds all of them
done writes the summary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evdit_opt.demo.clips import (
    HELD_OUT,
    LABELS,
    Label,
    draw_clip,
    evaluation_pairs,
    sample_clip,
)
from evdit_opt.demo.detect import detect
from evdit_opt.demo.tinywan import TINYWAN_CALL, WEIGHTS, load_tinywan
from evdit_opt.demo.train_autoencoder import VALIDATION_SEED, psnr, to_tensor

if TYPE_CHECKING:
    from diffusers import WanPipeline

ATTRIBUTES = ("shape", "colour", "direction")


@torch.no_grad()
def generate(
    pipeline: WanPipeline, pairs: Sequence[tuple[int, Label]], steps: int, **call: Any
) -> np.ndarray:
    """Clips [batch, frames, height, width, 3] in 0..1; each noise seed is its own generator."""
    return pipeline(
        [label.caption() for _, label in pairs],
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed, _ in pairs],
        output_type="np",
        **{**TINYWAN_CALL, **call},
    ).frames


def fingerprint(folder: Path) -> str:
    """A short hash of all tensors that take part in generation: not the autoencoder's encoder."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        for name, value in sorted(load_file(path).items()):
            if path.parent.name != "vae" or not name.startswith(("encoder.", "quant_conv.")):
                digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by attribute, confusion and steadiness over the records of single clips."""

    def shares(part: Sequence[dict[str, Any]]) -> dict[str, Any]:
        right = [[r["asked"][name] == r["found"][name] for name in ATTRIBUTES] for r in part]
        accuracy = dict(zip(ATTRIBUTES, np.mean(right, axis=0).tolist(), strict=True))
        return {
            "clips": len(part),
            **{name: round(value, 4) for name, value in accuracy.items()},
            "everything": round(float(np.all(right, axis=1).mean()), 4),
        }

    held_out = [record for record in records if record["held_out"]]
    trained = [record for record in records if not record["held_out"]]
    measures = {
        name: [record["found"][name] for record in records]
        for name in ("overlap", "jerk", "flicker", "visible")
    }
    return {
        "all": shares(records),
        "trained_combinations": shares(trained) if trained else None,
        "held_out_combinations": shares(held_out) if held_out else None,
        "mistakes": {
            name: dict(
                Counter(
                    f"{record['asked'][name]} -> {record['found'][name]}"
                    for record in records
                    if record["asked"][name] != record["found"][name]
                )
            )
            for name in ATTRIBUTES
        },
        "median": {
            name: round(float(np.nanmedian(values)), 5) for name, values in measures.items()
        },
    }


@torch.no_grad()
def reconstruction_psnr(pipeline: WanPipeline, count: int = 8) -> float:
    """Mean PSNR in dB of real clips of unseen seeds after encoding and decoding."""
    autoencoder, values = pipeline.vae, []
    for index in range(count):
        video = to_tensor(draw_clip(sample_clip(VALIDATION_SEED + index, LABELS[index * 9]))[None])
        decoded = autoencoder.decode(autoencoder.encode(video).latent_dist.mode()).sample
        values.append(psnr(video, decoded))
    return round(float(np.mean(values)), 2)


def versions() -> dict[str, str]:
    """What the numbers were measured with."""
    import diffusers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()} CPU",
    }


def main(arguments: list[str] | None = None) -> None:
    """Evaluate the embedded pipeline and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=TINYWAN_CALL["guidance_scale"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=10_000_000)
    parser.add_argument("--work", type=Path, default=Path("runs/tinywan/evaluation"))
    parser.add_argument("--output", type=Path, default=Path("docs/tinywan/quality.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    weights = fingerprint(WEIGHTS)
    work = options.work / f"{weights}-{options.steps}-{options.guidance:g}-{options.first_seed}"
    work.mkdir(parents=True, exist_ok=True)
    pipeline = load_tinywan()
    pairs = evaluation_pairs(options.pairs, options.first_seed)
    batches = [
        pairs[start : start + options.batch] for start in range(0, len(pairs), options.batch)
    ]
    for batch in batches[options.worker :: options.workers]:
        if all((work / f"{seed}.json").exists() for seed, _ in batch):
            continue
        started = time.monotonic()
        videos = generate(pipeline, batch, options.steps, guidance_scale=options.guidance)
        seconds = (time.monotonic() - started) / len(batch)
        np.savez_compressed(work / f"{batch[0][0]}.npz", videos=(videos * 255).round().astype("u1"))
        for (seed, label), video in zip(batch, videos, strict=True):
            record = {
                "seed": seed,
                "asked": asdict(label),
                "held_out": label in HELD_OUT,
                "found": asdict(detect(video)),
                "seconds": round(seconds, 2),
            }
            partial = work / f"{seed}.partial"
            partial.write_text(json.dumps(record))
            os.replace(partial, work / f"{seed}.json")
    files = [work / f"{seed}.json" for seed, _ in pairs]
    if not all(path.exists() for path in files):
        return  # another worker is still busy and will write the summary
    records = [json.loads(path.read_text()) for path in files]
    summary = {
        "weights": weights,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "seeds": [pairs[0][0], pairs[-1][0]],
        **summarise(records),
        "reconstruction_psnr_db": reconstruction_psnr(pipeline),
        "versions": versions(),
        "clips": records,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
