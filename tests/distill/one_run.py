"""One short training, for `accelerate launch`: folder and batch are the arguments."""

import sys
from pathlib import Path

import torch
from torch import nn

from evdit_opt.distill.loop import Numbers, TrainingConfig, train


def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
    rows = [
        torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        for number in numbers.samples
    ]
    given, wanted = torch.stack(rows).unbind(1)
    return {"loss": (model(given) - wanted).square().mean()}


if __name__ == "__main__":
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    config = TrainingConfig(steps=5, batch=int(sys.argv[2]), learning_rate=0.01)
    list(train(network, losses, config, Path(sys.argv[1])))
