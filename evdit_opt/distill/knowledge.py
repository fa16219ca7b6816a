"""Knowledge distillation: a dense teacher, and a student whose attention a plan makes sparse.

The paper calls its last stage layerwise knowledge distillation and gives neither loss nor weights;
these are ours. A student under ``evdit_opt.apply_plan`` computes nothing that its masks drop, in
the backward neither, so a training step gets cheaper as the plan gets sparser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evdit_opt.distill.consistency import Model
from evdit_opt.distill.segments import Segments
from evdit_opt.errors import DistillationError
from evdit_opt.models import output_tensor
from evdit_opt.plan_records import ReuseRecord

__all__ = [
    "EdgeWalk",
    "KnowledgeWeights",
    "SiteOutputs",
    "hooks_while_recomputing",
    "knowledge_losses",
    "train_only",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnowledgeWeights:
    """What the terms of the loss count.

    Attributes:
        output: of the squared error of the model's output.
        attention: of the squared error of each site's output over the teacher's mean square, mean
            over the sites.
    """

    output: float = 1.0
    attention: float = 0.1

    def __post_init__(self) -> None:
        if min(self.output, self.attention) < 0 or self.output + self.attention <= 0:
            raise DistillationError(
                f"expected weights of at least 0 and one above, got output {self.output} and "
                f"attention {self.attention}"
            )


class SiteOutputs:
    """What some modules of a model put out in its last forward.

    Hook a student before its first forward under a plan: a compiled call does not see hooks that
    come later.

    Args:
        model: the model.
        sites: paths of modules, such as those of a plan's sites.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str]) -> None:
        self.sites = tuple(sites)
        self.found: dict[str, torch.Tensor] = {}
        self.handles = [
            model.get_submodule(site).register_forward_hook(self._hook(site)) for site in self.sites
        ]

    def _hook(self, site: str) -> Any:
        found = self.found

        def keep(_module: nn.Module, _args: object, output: object) -> None:
            found[site] = output_tensor(output)

        return keep

    def take(self) -> dict[str, torch.Tensor]:
        """The outputs by site, which are forgotten here.

        Raises:
            DistillationError: a site did not run, or its model was compiled before it was hooked.
        """
        missing = [site for site in self.sites if site not in self.found]
        taken = dict(self.found)
        self.found.clear()
        if missing:
            raise DistillationError(
                f"expected an output of {missing[0]}, saw none; run the model first, and hook a "
                "model before its first forward under a plan"
            )
        return taken

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.found.clear()


def hooks_while_recomputing() -> Any:
    """While this lasts, sites are watched also where activations are computed again.

    Dynamo refuses a graph that leaves something behind there, because its backward would leave it
    again; the outputs of sites are taken before.
    """
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def knowledge_losses(
    output: torch.Tensor,
    sites: Mapping[str, torch.Tensor],
    wanted: torch.Tensor,
    wanted_sites: Mapping[str, torch.Tensor],
    weights: KnowledgeWeights,
) -> dict[str, torch.Tensor]:
    """The student's distance from the teacher.

    Args:
        output: the student's, any shape; has the gradient.
        sites: outputs of the student's sites, each any shape.
        wanted: the teacher's output, like ``output``.
        wanted_sites: outputs of the teacher's sites, like ``sites``.
        weights: of the terms.

    Returns:
        Scalars: "output" and "attention" as in `KnowledgeWeights`, "loss" their weighted sum, and
        "relative", "output" over the mean square of the teacher's.
    """
    if sites.keys() != wanted_sites.keys():
        raise DistillationError(
            f"expected the same sites of both models, got {sorted(sites)} and "
            f"{sorted(wanted_sites)}"
        )
    final = (output - wanted.detach()).float().square().mean()
    attention = final.new_zeros(())
    for name, value in sites.items():
        target = wanted_sites[name].detach().float()
        missed = (value.float() - target).square().mean()
        attention = attention + missed / target.square().mean() / len(sites)
    loss = weights.output * final + weights.attention * attention
    return {
        "loss": loss,
        "output": final.detach(),
        "attention": attention.detach(),
        "relative": final.detach() / wanted.detach().float().square().mean(),
    }


class EdgeWalk:
    """The points where a few-step student is called, with what its teacher is given there.

    The teacher walks from noise along its own edges, so noise and prompts are all the data there
    is. Its call at an edge serves twice: it leads to the next edge, and it is what is taught. Steps
    count through the edges of one walk, then through those of the next.

    Args:
        segments: the schedule.
        noise: ``noise(walk)`` is where a walk begins, [batch, ...], of unit variance.
        teacher: ``teacher(walk)`` is the teacher with the prompts of a walk.

    Attributes:
        samples: where the teacher was called in this walk, edge by edge, each [batch, ...].
    """

    def __init__(
        self,
        segments: Segments,
        noise: Callable[[int], torch.Tensor],
        teacher: Callable[[int], Model],
    ) -> None:
        self.segments, self.noise, self.teacher = segments, noise, teacher
        self.here = (-1, 0)
        self.sample = torch.empty(0)
        self.samples: list[torch.Tensor] = []

    @torch.no_grad()
    def visit(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the teacher is at a step.

        The teacher's call for it is the last one made before this returns.

        Returns:
            sample [batch, ...], points [batch], and the teacher's output, like sample.
        """
        walk, edge = divmod(step, len(self.segments))
        if self.here != (walk, edge):  # a new walk, or a run that goes on in the middle of one
            self._begin(walk)
            for _ in range(edge):
                self._advance(walk)
        sample = self.sample
        points, output = self._advance(walk)
        return sample, points, output

    @torch.no_grad()
    def renew(self, student: Model, reuse: ReuseRecord) -> None:
        """Give a student that reuses residuals those it would have at the step just visited.

        It is called where it renews them, in this walk and as it is now: what a step teaches
        depends on the weights and the number of the step alone.

        Args:
            student: with the prompts of this walk.
            reuse: of the student's plan.
        """
        here = len(self.samples) - 1
        levels = self.segments.timesteps[list(self.segments.edges[: here + 1])].tolist()
        for edge in reuse.renewals(levels):
            points = torch.full((len(self.samples[edge]),), self.segments.edges[edge])
            student(*self.segments.model_input(self.samples[edge], points))

    def _begin(self, walk: int) -> None:
        noise = self.noise(walk)
        start = torch.zeros(len(noise), dtype=torch.int64)
        self.sample = self.segments.noised(torch.zeros_like(noise), noise, start)
        self.here = (walk, 0)
        self.samples = []

    def _advance(self, walk: int) -> tuple[torch.Tensor, torch.Tensor]:
        edge, sample = self.here[1], self.sample
        self.samples.append(sample)
        points = torch.full((len(sample),), self.segments.edges[edge])
        following = torch.full_like(points, self.segments.edges[edge + 1])
        output = self.teacher(walk)(*self.segments.model_input(sample, points))
        clean, noise = self.segments.predict(output, sample, points)
        self.sample = self.segments.noised(clean, noise, following)
        self.here = (walk, edge + 1)
        return points, output


def train_only(
    model: nn.Module, trainable: Iterable[str], sites: Iterable[str] | None = None
) -> int:
    """Let some parameters of a model train: all that may, or those within some modules.

    Args:
        model: the model.
        trainable: names of the parameters that may.
        sites: paths of the modules; None: all of the model.

    Returns:
        How many numbers are trained.

    Raises:
        DistillationError: there are none.
    """
    names = set(trainable)
    inside = None if sites is None else tuple(f"{site}." for site in sites)
    for name, value in model.named_parameters():
        value.requires_grad_(name in names and (inside is None or name.startswith(inside)))
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    if not count:
        raise DistillationError(
            "expected parameters to train within the plan's sites, they have none; set "
            "attention_only=False"
        )
    return count
