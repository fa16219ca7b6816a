"""Train TinyWan from scratch: `python -m evdit_opt.demo.train all`.

Stages, each resumable at any moment (also after kill -9):
    latents      encode clips into shards (seconds)
    decoder      train the decoder         } in any order,
    encoder      train the encoder         } or side by side
    transformer  train text encoder and transformer
    export       write the pipeline into the package
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from pathlib import Path

import torch

from evdit_opt.demo import checkpoint, train_autoencoder, train_denoiser
from evdit_opt.demo.export import export
from evdit_opt.demo.tinywan import WEIGHTS

STAGES = ("latents", "decoder", "encoder", "transformer", "export")

logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tinywan"))
    parser.add_argument("--target", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--autoencoder-steps", type=int, default=1500)
    parser.add_argument("--shards", type=int, default=40, help="64 clips each")
    parser.add_argument(
        "--phases",
        type=train_denoiser.parse_phases,
        default=train_denoiser.Recipe().phases,
        help="until:fewest-most frames:batch, ...",
    )
    for field in fields(train_denoiser.Recipe):
        if field.type in ("int", "float"):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type={"int": int, "float": float}[field.type],
                default=field.default,
            )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage or all of them."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    names = [field.name for field in fields(train_denoiser.Recipe)]
    recipe = train_denoiser.Recipe(
        **{name: getattr(options, name) for name in names if hasattr(options, name)}
    )
    for stage in STAGES if options.stage == "all" else (options.stage,):
        if stage == "latents":
            for path in train_autoencoder.write_latents(options.folder, options.shards):
                logger.info("wrote %s", path)
        elif stage in train_autoencoder.PARTS:
            train_autoencoder.train(options.folder, stage, options.autoencoder_steps)
        elif stage == "transformer":
            for record in train_denoiser.train(options.folder, recipe):
                logger.info("%s", record)
                checkpoint.append_line(options.folder / "log.jsonl", record)
        else:
            step = export(options.folder, options.target, recipe)
            logger.info("exported step %d to %s", step, options.target)


if __name__ == "__main__":
    main()
