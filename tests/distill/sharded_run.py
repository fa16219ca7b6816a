"""Consistency and knowledge steps in turn, for torchrun: folder, batch, shard, last step."""

import copy
import json
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from evdit_opt.distill.checkpoint import load_state
from evdit_opt.distill.consistency import consistency_loss, consistency_target
from evdit_opt.distill.knowledge import KnowledgeWeights, SiteOutputs, knowledge_losses
from evdit_opt.distill.loop import Numbers, TrainingConfig, train
from evdit_opt.distill.processes import processes
from evdit_opt.distill.segments import segments_of

SITES = ("blocks.0.mix", "blocks.1.mix")
SEGMENTS = segments_of(FlowMatchEulerDiscreteScheduler(shift=3.0), segments=2, full_steps=8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.out(nn.functional.silu(self.mix(self.norm(hidden))))


class Toy(nn.Module):
    """Blocks as a diffusers transformer names them, and something outside of them."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(9, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        level = (timestep / 1000).reshape(-1, 1, 1).expand(*sample.shape[:2], 1)
        hidden = self.enter(torch.cat((sample, level), -1))
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave(hidden)


def main() -> None:
    folder, batch, shard, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.manual_seed(0)
    model = Toy()
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        model.leave.weight.mul_(0.5)  # or the student has nothing to learn from its own copy
    watched, wanted = SiteOutputs(model, SITES), SiteOutputs(teacher, SITES)
    spread = []

    def losses(net: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        spread.append(sum(local(value).numel() for value in net.parameters()))
        clean, noise = (
            torch.stack([
                torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * n + kind))
                for n in numbers.samples
            ])
            for kind in (0, 1)
        )  # fmt: skip
        draw = SEGMENTS.draw([(0, n) for n in numbers.samples], steps=2)
        sample = SEGMENTS.noised(clean, noise, draw.start)
        if numbers.step % 2 == 0:
            target = consistency_target(SEGMENTS, draw, sample, teacher, net, always=bool(shard))
            output = net(*SEGMENTS.model_input(sample, draw.start))
            return {"loss": consistency_loss(SEGMENTS, draw, sample, target, output).mean()}
        given = SEGMENTS.model_input(sample, draw.start)
        with torch.no_grad():
            said = teacher(*given)
        theirs, output = wanted.take(), net(*given)
        found = knowledge_losses(output, watched.take(), said, theirs, KnowledgeWeights())
        return {"loss": found["loss"]}

    config = TrainingConfig(
        steps=6, batch=batch, accumulate=2, learning_rate=0.01, warmup=2, average=0.9,
        save_every=3, shard=bool(shard),
    )  # fmt: skip
    list(train(model, losses, config, folder, lambda step: step == last))
    state = load_state(folder)
    assert state is not None
    told = {
        "held": max(spread, default=0) / sum(value.numel() for value in model.parameters()),
        "model": all(
            torch.equal(value, state["weights"][name]) for name, value in model.named_parameters()
        ),
        "plain": all(type(value) is nn.Parameter for value in model.parameters()),
    }
    (folder / f"told-{processes().process_index}.json").write_text(json.dumps(told))


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


if __name__ == "__main__":
    main()
