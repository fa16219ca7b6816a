"""A dense teacher and a sparse student: what is compared, and what learns."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.distill.consistency import jump
from evdit_opt.distill.knowledge import (
    EdgeWalk,
    KnowledgeWeights,
    SiteOutputs,
    hooks_while_recomputing,
    knowledge_losses,
    train_only,
)
from evdit_opt.distill.segments import segments_of
from evdit_opt.errors import DistillationError
from tests.models.toy_dit import make_plan, toy, toy_inputs, toy_rules

SITES = tuple(toy_rules())
WEIGHTS = KnowledgeWeights()


def losses_of(teacher, student, watched: SiteOutputs, wanted: SiteOutputs, weights=WEIGHTS):
    with torch.no_grad():
        target = teacher(**toy_inputs())
    output = student(**toy_inputs())
    return knowledge_losses(output, watched.take(), target, wanted.take(), weights)


def test_a_dense_copy_has_nothing_to_learn() -> None:
    teacher = toy()
    student = copy.deepcopy(teacher)
    found = losses_of(teacher, student, SiteOutputs(student, SITES), SiteOutputs(teacher, SITES))
    assert float(found["loss"].detach()) == 0.0


def test_the_terms_are_what_they_say() -> None:
    wanted, output = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])
    sites = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([0.0, 4.0])}
    theirs = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0, 2.0])}
    weights = KnowledgeWeights(output=2.0, attention=0.5)
    found = knowledge_losses(output, sites, wanted, theirs, weights)
    assert float(found["output"]) == (1 + 4) / 2
    assert float(found["attention"]) == (1 / 1 + 2 / 2) / 2
    assert float(found["loss"]) == 2.0 * 2.5 + 0.5 * 1.0


@pytest.mark.parametrize("only", [False, True], ids=["all", "attention only"])
def test_a_sparse_student_learns_on_the_sparse_op(only: bool) -> None:
    """The loss falls under the plan, the student stays sparse, and the teacher is not touched."""
    teacher = toy()
    student = copy.deepcopy(teacher)
    if only:
        trained = train_only(student, dict(student.named_parameters()), SITES)
        assert trained == sum(
            p.numel() for s in SITES for p in student.get_submodule(s).parameters()
        )
    watched, wanted = SiteOutputs(student, SITES), SiteOutputs(teacher, SITES)
    apply_plan(student, make_plan(student, toy_rules()), inner="eager")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    curve = []
    for _ in range(40):
        found = losses_of(teacher, student, watched, wanted)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        curve.append(float(found["loss"].detach()))
    assert curve[-1] < 0.5 * curve[0]
    changed = {name for name, v in student.state_dict().items() if not torch.equal(v, before[name])}
    inside = {name for name in changed if any(name.startswith(site) for site in SITES)}
    assert inside
    assert (changed == inside) is only
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    # without the plan the student is another function: it was the sparse one that learned
    with torch.no_grad():
        sparse = student(**toy_inputs())
        restore(student)
        assert not torch.allclose(student(**toy_inputs()), sparse, atol=1e-3)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_the_masked_model(checkpoint: bool) -> None:
    from evdit_opt.grid import TokenLayout
    from tests.models.masked import masked_attention
    from tests.models.toy_dit import GRID

    teacher, student = toy(), toy(layers=2)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    spelled = copy.deepcopy(student)
    student.checkpoint = checkpoint
    watched, wanted = SiteOutputs(student, SITES), SiteOutputs(teacher, SITES)
    apply_plan(student, make_plan(student, toy_rules()), inner="eager")
    with hooks_while_recomputing():
        losses_of(teacher, student, watched, wanted)["loss"].backward()
    assert report(student).rewritten == SITES
    reference = SiteOutputs(spelled, SITES)
    with masked_attention(spelled, toy_rules(), TokenLayout(GRID)):
        losses_of(teacher, spelled, reference, wanted)["loss"].backward()
    largest = max(float(p.grad.abs().max()) for p in spelled.parameters())
    for one, other in zip(student.parameters(), spelled.parameters(), strict=True):
        # float32 sums of some 64 terms in another order, relative to the largest gradient
        assert float((one.grad - other.grad).abs().max()) < 64 * 2**-23 * largest


def test_a_hook_that_came_too_late_is_an_error() -> None:
    model = toy()
    watched = SiteOutputs(model, SITES)
    with pytest.raises(DistillationError, match=r"blocks\.0\.attn1"):
        watched.take()
    model(**toy_inputs())
    assert tuple(watched.take()) == SITES
    watched.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_other_sites_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(DistillationError, match="same sites"):
        knowledge_losses(one, {"a": one}, one, {"b": one}, WEIGHTS)
    with pytest.raises(DistillationError, match="one above"):
        KnowledgeWeights(output=0.0, attention=0.0)
    with pytest.raises(DistillationError, match="have none"):
        train_only(torch.nn.Sequential(torch.nn.ReLU()), [], ["0"])


def test_a_walk_goes_along_the_teachers_edges_also_when_it_resumes() -> None:
    segments = segments_of(FlowMatchEulerDiscreteScheduler(shift=4.0), segments=3, full_steps=12)

    def noise(walk: int) -> torch.Tensor:
        return torch.randn(2, 5, generator=torch.Generator().manual_seed(walk))

    def teacher(walk: int):
        return lambda sample, timestep: torch.tanh(sample + walk + timestep[:, None] / 1000)

    walk = EdgeWalk(segments, noise, teacher)
    straight = [walk.visit(step) for step in range(6)]
    for step in (4, 2, 5):
        resumed = EdgeWalk(segments, noise, teacher).visit(step)
        for one, other in zip(straight[step], resumed, strict=True):
            assert torch.equal(one, other)
    sample = noise(1)
    for k in range(3):
        here, points, output = straight[3 + k]
        assert torch.equal(here, sample)
        assert points.tolist() == [segments.edges[k]] * 2
        assert torch.equal(output, teacher(1)(*segments.model_input(here, points)))
        sample = jump(segments, teacher(1), sample, points, torch.full((2,), segments.edges[k + 1]))
