"""Other people's torch.compile on, in and around an optimized model."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.errors import PlanMismatchError
from tests.models.case import Shape
from tests.runtime.pair import WAN, Pair


@pytest.mark.parametrize("when", ["before", "after"])
def test_repeated_blocks(when: str) -> None:
    pair = Pair()
    if when == "before":
        pair.fast.compile_repeated_blocks(backend="aot_eager")
    pair.apply()
    pair.check()
    if when == "after":
        pair.fast.compile_repeated_blocks(backend="aot_eager")
        pair.check()
    assert pair.graphs == 1


@pytest.mark.parametrize("fullgraph", [False, True], ids=["parts-allowed", "fullgraph"])
def test_compiled_once_more(fullgraph: bool) -> None:
    pair = Pair()
    pair.apply()
    model, sites = pair.fast, tuple(pair.rules)
    pair.fast = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    pair.check()
    assert report(model).graphs == 1
    assert report(model).rewritten == sites


def test_called_from_a_compiled_function() -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    right = pair.check()

    @torch.compile(backend="aot_eager")
    @torch.no_grad()
    def doubled(call):
        return 2 * pair.fast(**call)[0]

    assert torch.equal(doubled(WAN.inputs(pair.shape)), 2 * right)
    assert pair.graphs == 1


def test_a_compile_in_its_place_is_an_error_that_says_what_to_do() -> None:
    pair = Pair(Shape(layers=1))
    plan = pair.plan
    pair.apply()
    pair.fast.compile(backend="aot_eager")
    with pytest.raises(PlanMismatchError, match=r"another backend did.*restore\(model\)"):
        pair.check()
    restore(pair.fast)
    apply_plan(pair.fast, plan, inner="eager")
    pair.check()


def test_a_program_that_torch_export_made_is_an_error_that_names_ours() -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    call = WAN.inputs(pair.shape)
    program = torch.export.export(pair.fast, (), call, strict=False)
    with pytest.raises(PlanMismatchError, match=r"evdit_opt\.export\.export_program"):
        program.module()(**call)
    with pytest.raises(Unsupported, match="evdit_opt compiles this model itself"):
        torch.export.export(pair.fast, (), call, strict=True)
    pair.check()
