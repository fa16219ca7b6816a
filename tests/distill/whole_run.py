"""TinyWan fine-tuned on a folder of videos, for torchrun: folder, clips, batch, shard, rank."""

import sys
from pathlib import Path
from typing import Any

import torch

from evdit_opt import Config
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill import encode
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.encode import VideoData
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.pipeline import finetune

CALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}


if __name__ == "__main__":
    torch.set_num_threads(1)
    read = encode.read_clip

    def reading(path: Path, *given: Any) -> Any:
        with Path(sys.argv[1] + ".read").open("a") as told:
            told.write(f"{path.name}\n")
        return read(path, *given)

    encode.read_clip = reading
    batch, shard, rank = map(int, sys.argv[3:])
    config = FinetuneConfig(
        folder=Path(sys.argv[1]),
        stages=("consistency",),
        guidance=2.0,
        full_steps=6,
        lora_rank=rank or None,
        data=VideoData(videos=Path(sys.argv[2])),
        consistency=TrainingConfig(
            steps=6, batch=batch, learning_rate=1e-3, warmup=1, shard=bool(shard)
        ),
    )
    finetune(load_tinywan(), ("a red circle",), config, steps=2, search=Config(pipe_kwargs=CALL))
