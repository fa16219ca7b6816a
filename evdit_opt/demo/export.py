"""Put the trained parts together as a `WanPipeline` folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from evdit_opt.demo import checkpoint
from evdit_opt.demo.tinywan import WEIGHTS, build_scheduler, build_tokenizer
from evdit_opt.demo.train_autoencoder import load_autoencoder
from evdit_opt.demo.train_denoiser import Recipe, Student


def export(folder: Path, target: Path = WEIGHTS, recipe: Recipe | None = None) -> int:
    """Save the averaged weights of the run in `folder` as a pipeline; returns their step.

    Files are written beside the target and moved one by one, so that readers of the target never
    see a partial file.
    """
    from diffusers import WanPipeline

    state = checkpoint.load(folder / "denoiser.pt")
    if state is None:
        raise FileNotFoundError(
            f"expected {folder / 'denoiser.pt'}; run the transformer stage first"
        )
    student = Student(recipe or Recipe())
    for part, values in state["average"].items():
        student.get_submodule(part).load_state_dict(values)
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=student.text_encoder.eval(),
        vae=load_autoencoder(folder),
        scheduler=build_scheduler(),
        transformer=student.transformer.eval(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tinywan-") as partial:
        pipeline.save_pretrained(partial)
        for path in sorted(Path(partial).rglob("*")):
            if path.is_file():
                final = target / path.relative_to(partial)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, final)
    return int(state["step"])
