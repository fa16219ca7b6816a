"""Every model computes, with a plan applied, what it computes eagerly with dense masks."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.passes.observe_attention import observe
from tests.models.case import Case, Shape
from tests.models.comparison import APART, Reference, compare_gradients, far, plan_of
from tests.models.small_models import BY_NAME, CASES
from tests.often import often

SPARSE = {case.name: case for case in CASES if not case.refused}

# wan: video alone. cogvideox: text before. mochi: text behind, samples of different length, one by
# one.
KINDS = ("wan", "cogvideox", "mochi")


# Their attention is that of another model, which runs every time; so does the detection of most
# (tests/models/test_sites.py).
ALIKE = {
    "anyflow", "chronoedit", "cogvideox15", "consisid", "framepack", "helios_nohist", "hunyuan_i2v",
    "joyimage_plus", "kandinsky6", "minimax_h3", "motif_xattn", "sana_wm", "skyreels",
    "wan_animate", "wan_i2v", "wan_vace",
}  # fmt: skip


def kinds(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", often(names, SPARSE))


# Inductor also fuses and reorders the rest of the model.
FUSED = 4


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(entry, dtype) for entry in value)
    return value


@kinds(set(SPARSE) - ALIKE)
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
@kinds(["wan"])
@torch.no_grad()
def test_inductor_computes_the_same(case: Case) -> None:
    shape = Shape(layers=1)
    model, call = case.model(shape), case.inputs(shape)
    reference = Reference(case, model, call, shape)
    apply_plan(model, plan_of(case, model, shape), inner="inductor")
    out, rewritten = model(**call)[0], report(model).rewritten
    more = 0.0
    if far(out, reference.out) > FUSED * reference.bound:
        # As far as what Inductor makes of the dense model, without a plan, is from that model.
        restore(model)
        more = FUSED * far(torch.compile(model, dynamic=False)(**call)[0], reference.dense)
    reference.check(out, FUSED, more)
    assert rewritten == tuple(case.layouts(shape))


@kinds(KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_batch_of_two(case: Case, dtype: torch.dtype) -> None:
    shape = Shape(batch=2)
    model = case.model(shape).to(dtype)
    call = differing({name: cast(value, dtype) for name, value in case.inputs(shape).items()})
    if dtype != torch.float32:
        try:
            model(**call)
        except RuntimeError as error:  # Kandinsky 5 leaves parts in float32 to CUDA's autocast
            pytest.skip(f"without a plan it does not run in {dtype} on a CPU: {error}")
    reference = Reference(case, model, call, shape)
    apply_plan(model, plan_of(case, model, shape), inner="eager")
    out = model(**call)[0]
    if case.name not in KINDS and reference.gap <= APART * reference.bound:
        assert far(out, reference.out) <= reference.bound
        pytest.skip(f"in {dtype} rounding hides what the rules change in this small model")
    reference.check(out)


def differing(call: dict[str, Any]) -> dict[str, Any]:
    """Pad the second prompt by one token more: guidance batches hold prompts of unequal length."""
    mask = call.get("encoder_attention_mask")
    if mask is not None:
        mask[1, int(mask[1].sum()) - 1] = 0
    return call


@kinds(KINDS)
def test_gradients(case: Case) -> None:
    found = compare_gradients(case, Shape())
    assert found["error"] <= found["bound"]
    assert found["gap"] > 100 * found["bound"]


@pytest.mark.nightly  # every time: tests/test_reuse_gradients.py, tests/test_two_rules.py
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_gradients_through_inductor(name: str) -> None:
    found = compare_gradients(BY_NAME[name], Shape(layers=1), inner="inductor")
    bound = FUSED * found["bound"]
    assert found["error"] <= bound
    assert found["gap"] > 100 * bound


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
