"""Every model computes, with a plan applied, what it computes eagerly with dense masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.passes.observe_attention import observe
from evdit_opt.plan import Plan
from tests.models.case import Case, Shape
from tests.models.masked import masked_attention
from tests.models.small_models import BY_NAME, CASES
from tests.models.toy_dit import make_plan

SPARSE = [case for case in CASES if not case.refused]

# One of each kind. wan: video alone. cogvideox: text before. hunyuan: text behind, a key mask,
# padding of another length in each sample. hunyuan15: broken graphs, a mask over rows and keys.
# mochi: samples of different length, one by one. helios: history. ltx: tokens as input, RoPE.
KINDS = ("wan", "cogvideox", "hunyuan", "hunyuan15", "mochi", "helios", "ltx")
kinds = pytest.mark.parametrize("case", [BY_NAME[name] for name in KINDS], ids=KINDS)

# The same arithmetic but for the order of sums. So the bound is a few times what another order of
# the keys does to the masked reference, and one rounding of the output (rms 0.2 eps of its size).
# Errors are root mean squares: in bfloat16 the largest is that of a single unlucky rounding.
REORDERED, ROUNDED = 3, 0.2
# Inductor also fuses and reorders the rest of the model.
FUSED = 4
# How much further away the dense model must be for a test to mean anything.
APART = 4


def plan_of(case: Case, model: nn.Module, shape: Shape) -> Plan:
    return make_plan(
        model,
        dict(case.rules(shape)),
        source=case.grid_source(shape),
        grid=shape.grid,
        layouts=case.layouts(shape),
        fullgraph=case.fullgraph,
    )


class Reference:
    """The masked model, and how far an equal computation may be from it."""

    def __init__(self, case: Case, model: nn.Module, call: dict[str, Any], shape: Shape) -> None:
        def run(order: str = "") -> torch.Tensor:
            rules, layouts = case.rules(shape), case.layouts(shape)
            with masked_attention(model, rules, layouts, order) as applied:
                out = model(**call)[0]
            assert all(applied.values()), applied
            return out

        self.dense = model(**call)[0]
        self.out = run()
        reordered = max(far(run(order), self.out) for order in ("backwards", "rotated"))
        rounded = ROUNDED * torch.finfo(self.out.dtype).eps * far(self.out, 0 * self.out)
        self.bound = REORDERED * reordered + rounded

    def check(self, actual: torch.Tensor, times: float = 1) -> None:
        error, bound = far(actual, self.out), times * self.bound
        gap = far(self.dense, self.out)
        assert error <= bound, f"{error:.1e} from the masked model, bound {bound:.1e}"
        assert gap > APART * bound, f"bound {bound:.1e} proves little: dense is {gap:.1e} away"


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(entry, dtype) for entry in value)
    return value


@pytest.mark.parametrize("case", SPARSE, ids=[case.name for case in SPARSE])
@torch.no_grad()
def test_outputs_are_those_of_dense_masks(case: Case) -> None:
    shape = Shape()
    model, call = case.model(), case.inputs()
    reference = Reference(case, model, call, shape)

    apply_plan(model, plan_of(case, model, shape), inner="eager")
    reference.check(model(**call)[0])
    assert report(model).rewritten == tuple(case.layouts())
    assert report(model).graphs == 1 or not case.fullgraph

    restore(model)
    assert torch.equal(model(**call)[0], reference.dense)


@pytest.mark.slow
@kinds
@torch.no_grad()
def test_inductor_computes_the_same(case: Case) -> None:
    shape = Shape(layers=1)
    model, call = case.model(shape), case.inputs(shape)
    reference = Reference(case, model, call, shape)
    apply_plan(model, plan_of(case, model, shape), inner="inductor")
    reference.check(model(**call)[0], times=FUSED)
    assert report(model).rewritten == tuple(case.layouts(shape))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_batch_of_two(case: Case, dtype: torch.dtype) -> None:
    shape = Shape(batch=2)
    model = case.model(shape).to(dtype)
    call = differing({name: cast(value, dtype) for name, value in case.inputs(shape).items()})
    reference = Reference(case, model, call, shape)
    apply_plan(model, plan_of(case, model, shape), inner="eager")
    reference.check(model(**call)[0])


def differing(call: dict[str, Any]) -> dict[str, Any]:
    """Pad the second prompt by one token more: guidance batches hold prompts of unequal length."""
    mask = call.get("encoder_attention_mask")
    if mask is not None:
        mask[1, int(mask[1].sum()) - 1] = 0
    return call


@kinds
def test_gradients(case: Case) -> None:
    shape = Shape()
    model, call = case.model(shape), case.inputs(shape)
    plan = plan_of(case, model, shape)

    def gradients(run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def masked(order: str = "") -> torch.Tensor:
        with masked_attention(model, case.rules(shape), case.layouts(shape), order):
            return model(**call)[0]

    dense = gradients(lambda: model(**call)[0])
    expected = gradients(lambda: masked())
    again = gradients(lambda: masked("backwards"))
    apply_plan(model, plan, inner="eager")
    actual = gradients(lambda: model(**call)[0])
    assert actual.keys() == expected.keys()
    reordered, size = apart(again, expected), apart(expected)
    bound = REORDERED * reordered + ROUNDED * torch.finfo(torch.float32).eps * size
    assert apart(actual, expected) <= bound
    assert apart(dense, expected) > 100 * bound


def apart(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor] | None = None) -> float:
    """The largest root mean square difference of a parameter's gradients; without others, size."""
    return max(far(grad, others[name] if others else 0 * grad) for name, grad in some.items())


@torch.no_grad()
def test_observing_shows_every_site_and_changes_nothing() -> None:
    case = BY_NAME["hunyuan"]  # its own mask, joint text
    model, call = case.model(), case.inputs()
    dense = model(**call)[0]
    seen = []

    def look(name, q, k, v, attn_mask, scale):
        assert not q.requires_grad
        seen.append((name, q.shape[2], k.shape[2], v.shape[2], attn_mask.shape))

    with observe(model, tuple(case.layouts()), look):
        assert torch.equal(model(**call)[0], dense)
        model(**call)
    once = [
        (name, layout.seq_len, layout.seq_len, layout.seq_len, (1, 1, 1, layout.seq_len))
        for name, layout in case.layouts().items()
    ]
    assert seen == once * 2
    model(**call)
    assert len(seen) == 2 * len(once)
