"""A toy under a plan, large enough for buckets, for torchrun: folder and batch."""

import sys
from pathlib import Path

import torch
from torch import nn

from evdit_opt.apply import apply_plan
from evdit_opt.distill.loop import Numbers, TrainingConfig, train
from tests.models.toy_dit import ToyDiT, make_plan, toy_inputs, toy_rules


def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
    total = torch.zeros(())
    for number in numbers.samples:
        given = toy_inputs()
        noise = torch.Generator().manual_seed(number)
        given["hidden_states"] = torch.randn(given["hidden_states"].shape, generator=noise)
        total = total + model(**given).square().mean() / len(numbers.samples)
    return {"loss": total}


if __name__ == "__main__":
    torch.manual_seed(0)
    network = ToyDiT(dim=256).eval()
    apply_plan(network, make_plan(network, toy_rules()), inner="eager")
    config = TrainingConfig(steps=2, batch=int(sys.argv[2]), learning_rate=0.01, warmup=1)
    list(train(network, losses, config, Path(sys.argv[1])))
